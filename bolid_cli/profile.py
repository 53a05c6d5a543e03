"""``bolid profile``, and ``bolid profile mix``, ``edit`` and ``show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolid_cli._console import (  # fmt: skip
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
from bolid_cli._streams import emit


def profile(
    photos: Annotated[
        list[Path], typer.Argument(help="Photos of one person, or their folder. One of the whole body is enough.")
    ],
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

    More and better photos make the body more certain; their order does not matter. `bolid profile mix`, `edit` and
    `show` work on such files; if there is a file or folder called mix, edit or show, it is read as photos.
    """
    import bolid.profile

    with progress_bar(quiet) as progress:
        result = bolid.profile.make_profile(
            photos, out, body_encoder=body_encoder, family=family, device=device, progress=progress
        )
    rows = [
        (report.photo, report.weight, "yes" if report.face else "no", report.down_to or "-", report.rejected or "-")
        for report in result.reports
    ]
    print_table(("photo", "weight", "face", "visible down to", "rejected because"), rows, quiet)
    note(f"{result.photos} of {len(rows)} photos used; uncertainty {result.uncertainty:.2f} (1: nothing known)", quiet)
    if not any(report.down_to == "feet" for report in result.reports):
        note("no photo shows the whole body; an upright full-body photo makes the profile much more certain", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])


SlidersOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Sliders measured for this body encoder. Default: the family's.")
]


def mix(
    a: Annotated[Path, typer.Argument(help="Profile of one person.")],
    b: Annotated[Path, typer.Argument(help="Profile of another.")],
    weight: Annotated[float, typer.Option(help="How much of B: 0 is A, 1 is B.", min=0, max=1)] = 0.5,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("mixed.safetensors"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the profile of somebody between two people."""
    import bolid.profile

    result = bolid.profile.mix_profiles(a, b, out, weight=weight)
    if not result.has_face:
        note("no face: not both of them have one", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])


def edit(
    profile: Annotated[Path, typer.Argument(help="File that `bolid profile` wrote.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SLIDER=NUMBER", help="Move the body, in standard deviations of the population."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("edited.safetensors"),
    sliders: SlidersOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Change a profile's body along its sliders, like --set legs=+1 --set build=-0.5. The face stays.

    One slider leaves the others where they are; `bolid profile show` lists them. The starting profile is not changed.
    """
    import bolid.profile

    wanted = bolid.profile.read_changes(changes or [])
    result = bolid.profile.edit_profile(profile, out, changes=wanted, sliders=sliders)
    rows = [(b.slider, b.value, a.value, b.r2) for b, a in zip(result.before, result.after, strict=True)]
    print_table(("slider", "before", "after", "R2"), rows, quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])


def show(
    profile: Annotated[Path, typer.Argument(help="File that `bolid profile` wrote.")],
    sliders: SlidersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a profile's body is on each slider, in standard deviations from the population's mean.

    R2 says how exact a slider is: 1 is exact, 0 is a guess. bolid inspect shows what else is in the file.
    """
    import bolid.profile

    readings = bolid.profile.show_profile(profile, sliders=sliders)
    if as_json:
        emit_json({"sliders": readings})
    else:
        for reading in readings:
            emit(f"{reading.slider}: {reading.value:+.2f} (R2 {reading.r2:.2f})")
