"""`bolid extract`: photos in, feature shards out."""

from __future__ import annotations

from bolid.extract.command import ExtractResult, TooManyRejected, extract

__all__ = ["ExtractResult", "TooManyRejected", "extract"]
