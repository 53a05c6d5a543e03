"""`bolid ui`: a local page to look and try. Needs the extra `[ui]`."""

from __future__ import annotations

from bolid.ui.command import ui

__all__ = ["ui"]
