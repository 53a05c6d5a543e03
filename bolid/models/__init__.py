"""`bolid models`: which models belong together, where they are, and how they get there."""

from __future__ import annotations

from bolid.models.pull import convert, describe, pull, verify

__all__ = ["convert", "describe", "pull", "verify"]
