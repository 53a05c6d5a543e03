"""What all commands share on a terminal: common options, progress, tables, errors. stdout is data, stderr is talk."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

from bolid.errors import BolidError
from bolid.models.families import FAMILY_NAMES, Family, chosen_family, get_family
from bolid.run import Progress, canonical_json

FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family",
        help=f"Model family: {', '.join(FAMILY_NAMES)}, or a .toml file. Default: the input's own, BOLID_FAMILY, "
        "`bolid models use`, tiny.",
        metavar="NAME",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto: the best there is.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same result.", min=0)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and the result.")]


def note(text: str, quiet: bool = False) -> None:
    """One line of talk on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def emit_paths(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Paths on stdout, one a line, for pipes."""
    for path in paths:
        print(path, flush=True)  # a remote path has no os.fspath


def emit_json(obj: Any) -> None:
    """One JSON object on stdout. Takes dataclasses, paths and numpy numbers too."""
    print(json.dumps(json.loads(canonical_json(obj)), indent=2, ensure_ascii=False))


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


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """``with progress_bar(quiet) as progress: work(..., progress=progress)``.

    A bar on stderr while the work calls ``progress(done, total, text)``; nothing when stderr is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total or None, description=text.replace("[", r"\["))

        yield progress


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
    """Tell a failure on stderr; returns the exit status. BOLID_DEBUG=1 adds the traceback."""
    if os.environ.get("BOLID_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # `bolid ... | head`: whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it ends
        return 0
    if isinstance(error, KeyboardInterrupt):
        note("interrupted; the same command goes on where it stopped")
        return 130
    if isinstance(error, BolidError):
        message, hint = error.message, error.hint
    else:
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "this is a fault in bolid; BOLID_DEBUG=1 before the same command shows where"
    note(f"error: {message}" + (f"\n\nhint: {hint}" if hint else ""))
    return 1
