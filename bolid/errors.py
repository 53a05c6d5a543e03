"""The one error type that a user is meant to see."""

from __future__ import annotations


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
