"""What one step of the field test came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "running"


@dataclass(frozen=True)
class Failure:
    """An error and where it was raised. ``hint`` is empty but for our own errors."""

    kind: str
    message: str
    hint: str
    traceback: str


@dataclass(frozen=True)
class StepResult:
    """``figures``: what the step returned. Peaks in bytes; None where they cannot be measured.

    ``pictures``: paths below the report's folder. ``reason``: why the step was skipped.
    """

    name: str
    title: str
    state: str
    seconds: float = 0.0
    host_peak: int | None = None
    device_peak: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    reason: str = ""
    failure: Failure | None = None
