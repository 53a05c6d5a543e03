"""What all commands share on a terminal: common options, progress, tables, errors.

Standard output is for data, standard error for everything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bolid.errors import BolidError, out_of_memory
from bolid.models.families import FAMILY_NAMES, Family, chosen_family, get_family
from bolid.run import LARGEST_SEED, Progress, canonical_json
from bolid_cli._command import explain_usage
from bolid_cli._settings import COMMON
from bolid_cli._streams import Terminated, discard_output, emit, note

if TYPE_CHECKING:
    from bolid.evaluate.results import Comparison, Metric

MINUTE = 60.0  # seconds between two lines of progress where there is no terminal

FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family",
        help=f"Model family: {', '.join(FAMILY_NAMES)}, or a .toml file. Default: the input's own, BOLID_FAMILY, "
        "`bolid models use`, tiny.",
        metavar="NAME",
        show_default=False,
        rich_help_panel=COMMON,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto: the best there is.", rich_help_panel=COMMON),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", help="Same seed, same result.", min=0, max=LARGEST_SEED, metavar="N", rich_help_panel=COMMON
    ),
]


class Engine(StrEnum):
    """Choices of --engine."""

    local = "local"
    ray = "ray"


EngineOption = Annotated[
    Engine,
    typer.Option(help="Where the workers run: processes of this machine, or actors of a Ray cluster.", hidden=True),
]
WorkersOption = Annotated[
    int, typer.Option(help="Processes. The result is the same for any number.", min=1, max=4096, hidden=True)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=COMMON)
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Read photographs with family tiny, too, which knows only renders.", hidden=True),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the result only.", rich_help_panel=COMMON)
]


def emit_paths(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Paths on stdout, one a line, for pipes."""
    for path in paths:
        emit(str(path))  # a remote path has no os.fspath


def emit_json(obj: Any) -> None:
    """One JSON object on stdout. Takes dataclasses, paths and numpy numbers too."""
    emit(json.dumps(json.loads(canonical_json(obj)), indent=2, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], quiet: bool = False) -> None:
    """A plain aligned table on stderr; columns of numbers are right-aligned."""
    if quiet:
        return
    rows = list(rows)
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        all(isinstance(value, int | float) or value is None for value in column) for column in zip(*rows, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = numeric or [False] * len(headers)
    for line in [list(headers), ["-" * width for width in widths], *cells]:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        note("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_rejected(rejected: dict[str, list[str]], quiet: bool = False, most: int = 20) -> None:
    """What was left out and why (reason -> sources), as a table on stderr; of many, the first ones."""
    rows = [(source, reason) for reason, sources in rejected.items() for source in sources]
    if rows:
        print_table(("rejected", "reason"), rows[:most], quiet)
    if len(rows) > most:
        note(f"... and {len(rows) - most} more", quiet)


def print_unread(unread: dict[str, list[str]], quiet: bool = False, most: int = 3) -> None:
    """What a folder holds besides photos (reason -> names), a line a reason on stderr; of many names the first ones."""
    for reason, names in unread.items():
        note(
            f"not read: {len(names)} ({', '.join(names[:most])}{', ...' if len(names) > most else ''}): {reason}", quiet
        )


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """``with progress_bar(quiet) as progress: work(..., progress=progress)``.

    A bar on stderr while the work calls ``progress(done, total, text)``; a line a minute when stderr is no terminal.
    """
    if quiet:
        yield lambda done, total, text: None
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _LineEachMinute()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)  # rich respects NO_COLOR
    # Lines on stdout while the bar is there: above it on a terminal, untouched in a file or a pipe.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total or None, description=text.replace("[", r"\["))

        yield progress


class _LineEachMinute:
    """Progress for a log file: what is done, of how much, and how long the rest takes."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._total, self._first, self._began = -1, 0, self._said  # of the work that is now under way

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if total != self._total or done < self._first:
            self._total, self._first, self._began = total, done, now
        if now - self._said < MINUTE:
            return
        self._said = now
        part = f"{done}/{total}" if total else str(done)
        left = ""
        if total and done > self._first:
            seconds = (now - self._began) / (done - self._first) * (total - done)
            left = f", {duration(seconds)} left"
        note(f"{part} {' '.join(text.split())}{left}")


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def choose_family(option: str | None, quiet: bool = False) -> Family:
    """The family of a command whose input does not name one; says so when it is only the default."""
    family = get_family(option)
    if option is None and chosen_family()[1] == "default":
        note(
            "family: tiny (embedded; knows only rendered people). Another: --family NAME, or bolid models use NAME",
            quiet,
        )
    return family


def show_error(error: BaseException) -> int:
    """Show a failure on stderr; returns the exit status. BOLID_DEBUG=1 adds the traceback."""
    if os.environ.get("BOLID_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # `bolid ... | head`: whoever reads has read enough
        discard_output()
        return 0
    if isinstance(error, KeyboardInterrupt):
        status, what = (error.status, f"ended by {error}") if isinstance(error, Terminated) else (130, "interrupted")
        note(f"{what}; the same command goes on where it stopped")
        return status
    known = error if isinstance(error, BolidError) else out_of_memory(error)
    if known is not None:
        _show(known.message, known.hint)
    else:
        hint = "this is a fault in bolid; BOLID_DEBUG=1 before the same command shows where"
        _show(f"unexpected {type(error).__name__}: {error}", hint)
    return getattr(error, "exit_code", 1)


def show_usage_error(error: Any) -> int:
    """Show a mistake in typing that Typer has found; returns the exit status."""
    if "NoArgs" in type(error).__name__:  # no command: the help is the answer
        note(error.format_message())
    else:
        _show(*explain_usage(error))
    return int(getattr(error, "exit_code", 2))


def _show(message: str, hint: str) -> None:
    note(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""))


def print_differences(compared: Comparison, quiet: bool = False) -> None:
    """A table of the methods' paired differences from the first."""
    rows = [
        (method, name, d.value, d.low, d.high, d.pairs, d.paired_by, "*" if d.differs else "")
        for method, found in compared.differences.items()
        for name, d in found.items()
    ]
    print_table(("method", "metric", "difference", "from", "to", "pairs", "of", ""), rows, quiet)


def print_metric_notes(metrics: Mapping[str, Metric], quiet: bool = False) -> None:
    """What metrics note, a line each: a restriction, or why one is not measured."""
    for name, metric in metrics.items():
        if metric.note:
            note(f"{name}{'' if metric.value is not None else ' not measured'}: {metric.note}", quiet)
