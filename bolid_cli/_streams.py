"""The program's streams and signals: lines on stdout and stderr, closed and full streams, SIGTERM and SIGHUP."""

from __future__ import annotations

import io
import os
import signal
import sys

from bolid.errors import BolidError


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. Ends a command as Ctrl-C does, with an exit status of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def note(text: str, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """One line on stdout, at once. Raises BolidError where it cannot be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise output_error(error) from error


def output_error(error: OSError) -> BolidError:
    """What an OSError of stdout means to the user. Throws away what stdout still holds."""
    discard_output()
    return BolidError(
        f"cannot write to standard output: {error.strerror}", "free some space, or send the output elsewhere"
    )


def discard_output() -> None:
    """Throw away what cannot be written, or Python complains once more about stdout when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def prepare_terminal() -> None:
    """Before anything else: closed streams, names that are not UTF-8, and signals that end the program."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed; the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdout else "backslashreplace")

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    for name in ("SIGTERM", "SIGHUP"):
        found = getattr(signal, name, None)  # Windows has no SIGHUP
        if found is not None and signal.getsignal(found) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(found, end)


def check_working_directory() -> None:
    """Raises BolidError when the working directory has been deleted."""
    try:
        os.getcwd()
    except OSError as error:
        raise BolidError("the working directory does not exist any more", "go to another one: cd") from error
