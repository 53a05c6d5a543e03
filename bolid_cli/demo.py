"""``bolid demo``."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bolid_cli._console import JsonOption, QuietOption, SeedOption, emit_json, emit_paths, note

if TYPE_CHECKING:
    from bolid.generate.models import Models


def demo(
    context: typer.Context,
    person_seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Seed of the person to show. 200000 and more are in no training data.", min=0, max=999_999
        ),
    ] = 200000,
    other_seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Seed of another person to compare with. Default: one of another build.",
            min=0,
            max=999_999,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the demo makes.")] = Path(
        "bolid-demo"
    ),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole chain on the embedded models: photos of a person, a profile, pictures from text, a contact sheet.

    The demo shows every command that it runs, so you can type it yourself. Works offline on a CPU in a few minutes.
    """
    import bolid.demo
    from bolid.generate.models import Models

    os.environ["BOLID_FAMILY"] = "tiny"  # whatever else the user has chosen
    plan = bolid.demo.plan(out, person_seed, other_seed, seed)
    bolid.demo.prepare(plan)
    if not quiet:
        note(f"{len(plan.commands)} commands, on the embedded `tiny` models: they know rendered people only")
    compared, models = {}, Models(most=2)  # loaded once: the base with branches and without
    for command in plan.commands:
        note(f"\n$ {plan.shown(command)}", quiet)
        printed = _run(context, command, models, quiet)
        if command[0] == "evaluate":
            compared = json.loads(printed)
    rows = bolid.demo.how_close(plan, compared)
    note(f"\n{'compared with this person':32}{'body off by':>12}{'follows the text':>19}", quiet)
    for name, body, text in rows:
        shown = ["-" if value is None else f"{value:.{digits}f} %" for value, digits in ((body, 1), (text, 0))]
        note(f"{name:32}{shown[0]:>12}{shown[1]:>19}", quiet)
    sheet = bolid.demo.draw_contact_sheet(plan)
    summary = bolid.demo.write_summary(plan, rows)
    note("\nLook at this picture:", quiet)
    if as_json:
        emit_json({"contact_sheet": sheet, "summary": summary, "table": rows})
    else:
        emit_paths([sheet])


def _run(context: typer.Context, arguments: tuple[str, ...], models: Models, quiet: bool) -> str:
    """Run one bolid command in this process, with networks that stay loaded; returns what it printed on stdout."""
    bolid = context.find_root().command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = bolid.main([*arguments, *(["--quiet"] if quiet else [])], standalone_mode=False, obj=models)
    if code:
        raise typer.Exit(code)
    return printed.getvalue()
