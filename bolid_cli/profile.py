"""``bolid profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolid_cli._render import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    emit_json,
    emit_paths,
    note,
    print_table,
    progress_bar,
)


def profile(
    photos: Annotated[list[Path], typer.Argument(help="Photos of one person, or their folder. One is enough.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("me.safetensors"),
    body_encoder: Annotated[
        Path | None, typer.Option(help="Body encoder that `bolid train-vae` has written. Default: the family's.")
    ] = None,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a small file of a person's body and face. From then on the photos are not needed any more.

    More and better photos make the body more certain; their order does not matter.
    """
    import bolid.profile

    with progress_bar(quiet) as progress:
        result = bolid.profile.make_profile(
            photos, out, body_encoder=body_encoder, family=family, device=device, progress=progress
        )
    rows = [
        (report.photo, report.weight, "yes" if report.face else "no", report.rejected or "-")
        for report in result.reports
    ]
    print_table(("photo", "weight", "face", "rejected because"), rows, quiet)
    note(f"{result.photos} of {len(rows)} photos used; uncertainty {result.uncertainty:.2f} (1: nothing known)", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])
