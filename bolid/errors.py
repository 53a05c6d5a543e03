"""The one error type that a user is meant to see."""

from __future__ import annotations

import errno
import re


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


_AMOUNT = re.compile(r"to allocate (\d[\d.]*) ?(bytes|[KMGT]i?B)")


def out_of_memory(error: BaseException) -> BolidError | None:
    """What a failed allocation of Python's, NumPy's, torch's or the system's means to a user. None for other errors."""
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, on a GPU
        or (isinstance(error, RuntimeError) and "allocate memory" in text)  # torch's, on a CPU
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    ):
        return None
    amount = ""
    if found := _AMOUNT.search(text):
        plain = f"{int(found[1]) / 2**20:.0f} MiB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
        amount = f": another {plain} cannot be had"
    return BolidError(f"too little memory{amount}", "lower --batch-size, --workers or --size, or close other programs")
