"""The one error type that a user is meant to see, and what checks the numbers of a command's options."""

from __future__ import annotations

import math
from collections.abc import Iterable


class BolidError(Exception):
    """Something the user can put right.

    ``message`` says what was wrong and names the value seen; ``hint`` says what to do about it.
    The command line prints both and exits with status 1; anything else that is raised is a bug.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple:
        # The default would lose the hint on the way back from a worker process.
        return type(self), (self.message, self.hint)


def require_not_negative(settings: object, names: Iterable[str]) -> None:
    """Raises BolidError unless these of the settings, options of that name, are numbers of 0 or more."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise BolidError(f"--{name.replace('_', '-')} is {value}", "give 0 (off) or more")


def require_parts(settings: object, names: Iterable[str]) -> None:
    """Raises BolidError unless these of the settings, options of that name, are from 0 to 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise BolidError(f"--{name.replace('_', '-')} is {value}", "it is a part: give 0 to 1")
