"""A line of the doctor's page, and how sizes are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Row:
    """One line of the page.

    ``state``: "ok"; "note": works, but worth knowing; "wrong": something needed is missing or broken.
    ``advice``: what to do about it. ``details``: the same as plain values, for ``--json``.
    """

    name: str
    value: str
    state: str = OK
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def gigabytes(size: float) -> str:
    """Bytes in words: 512 MB, 9.1 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
