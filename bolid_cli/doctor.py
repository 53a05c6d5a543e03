"""``bolid doctor``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bolid.errors import BolidError
from bolid_cli._console import FamilyOption, JsonOption, QuietOption, emit_json, progress_bar

if TYPE_CHECKING:
    from bolid.doctor import Row

WIDTH = 110  # columns of the page
_MARKS = {"ok": " ", "note": "-", "wrong": "!"}


def doctor(
    family: FamilyOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Versions only: do not import the libraries. Takes a second.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show whether a family can be used on this machine, and what to do if not.

    One page: Python, memory, disk, environment variables, the family's files, which commands can run, package versions,
    whether each library imports, and the device. No weights are loaded and no network is asked. Lines marked ! are
    faults, lines marked - are worth knowing. Exit status 1 when something that the family needs is missing or broken.
    """
    from bolid.doctor import diagnose

    with progress_bar(quiet) as progress:
        found = diagnose(family, quick=quick, show=None if as_json else _show, progress=progress)
    if as_json:
        emit_json(found)
    if not found.usable:
        more = f"; and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise BolidError(
            f"family {found.family!r} cannot be used here: {found.problems[0]}{more}",
            "every line of the page that is marked ! says what to do",
        )


def _show(title: str, rows: Sequence[Row]) -> None:
    """A section of the page, on stdout: it is what was asked for."""
    print(f"\n{title}")
    width = min(28, max((len(row.name) for row in rows), default=0))
    for row in rows:
        lines = textwrap.wrap(row.value, WIDTH - width - 6, break_on_hyphens=False) or [""]
        print(f"{_MARKS[row.state]} {row.name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(f"  {'':<{width}}  {line}")
        for number, line in enumerate(textwrap.wrap(row.advice, WIDTH - width - 6, break_on_hyphens=False)):
            print(f"  {'':<{width}}  {'  ' if number else '> '}{line}")
    print(end="", flush=True)
