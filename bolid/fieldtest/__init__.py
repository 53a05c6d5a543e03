"""`bolid fieldtest`: every step of the chain, small, on the user's own machine, with a report to attach to an issue."""

from __future__ import annotations

from bolid.fieldtest.command import FieldtestResult, fieldtest
from bolid.fieldtest.results import StepResult

__all__ = ["FieldtestResult", "StepResult", "fieldtest"]
