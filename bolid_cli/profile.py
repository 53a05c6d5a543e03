"""``bolid profile``, and ``bolid profile mix``, ``edit``, ``export`` and ``show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import bolid_cli.profile_body as body
from bolid.errors import BolidError
from bolid.formats.parsing import parse_assignments
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    emit_json,
    emit_paths,
    note,
    print_table,
    print_unread,
    progress_bar,
)

if TYPE_CHECKING:
    from bolid.profile import ProfileResult
    from bolid.views import PersonRule


def profile(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Photos of one person, or their folder. One of the whole body is enough."),
    ] = None,
    height: body.HeightOption = None,
    inseam: body.InseamOption = None,
    chest: body.ChestOption = None,
    waist: body.WaistOption = None,
    hip: body.HipOption = None,
    weight: body.WeightOption = None,
    measure: body.MeasureOption = None,
    sex: body.SexOption = None,
    units: body.UnitsOption = "cm",
    select_person: Annotated[
        str,
        typer.Option(
            metavar="main|only|N",
            help="Where a photo shows several people: use the main one, only photos of one person, or the N-th from "
            "the left.",
        ),
    ] = "main",
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Picture to write: what was taken of each photo.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("me.safetensors"),
    body_encoder: Annotated[
        Path | None, typer.Option(help="Body encoder that `bolid train-vae` has written. Default: the family's.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Treat photographs as renders, with family tiny, which knows only renders.")
    ] = False,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a small file of a person's body and face. From then on the photos are not needed any more.

    More and better photos make the body more certain; their order does not matter. Photos do not show size: give the
    height. Measurements alone make a profile too. `bolid profile mix`, `edit`, `export` and `show` work on such files;
    if there is a file or folder of one of these names, it is read as photos.
    """
    import bolid.profile

    options = {"height": height, "inseam": inseam, "chest": chest, "waist": waist, "hip": hip, "weight": weight}
    known = body.known_from(options, measure, units)
    with progress_bar(quiet) as progress:
        result = bolid.profile.make_profile(
            photos or [], out, known=known, sex=sex, select_person=_rule(select_person), preview=preview,
            body_encoder=body_encoder, family=family, device=device, force=force, progress=progress,
        )  # fmt: skip
    rows = [
        (
            report.photo, report.weight, "no" if not report.face else "grey" if report.grey else "yes",
            report.down_to or "-", f"{report.number} of {report.people}" if not report.rejected else "-",
            report.rejected or "-",
        )
        for report in result.reports
    ]  # fmt: skip
    if rows:
        headers = ("photo", "weight", "face", "visible down to", "person", "rejected because")
        print_table(headers, rows, quiet)
    _report_photos(result, quiet)
    used = f"{result.photos} of {len(rows)} photos used; uncertainty {result.uncertainty:.2f} (1: nothing known)"
    if result.warning:
        note(f"warning: {result.warning}")
    note(used if rows else "no photo: a body from measurements, without a face", quiet)
    if result.measurements:
        print_table(body.TABLE_HEADERS, body.table_rows(result.measurements), quiet)
    if rows and not any(report.down_to == "feet" for report in result.reports):
        note("no photo shows the whole body; an upright full-body photo makes the profile much more certain", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])


def _rule(text: str) -> PersonRule:
    if text in ("main", "only"):
        return "main" if text == "main" else "only"
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise BolidError(f"--select-person is {text!r}", "choose main or only, or count from the left: 1, 2, ...")


def _report_photos(result: ProfileResult, quiet: bool) -> None:
    print_unread(result.unread, quiet)
    several = [report for report in result.reports if report.people > 1]
    if several:
        shown = "1 photo shows" if len(several) == 1 else f"{len(several)} photos show"
        note(f"{shown} several people: --preview shows whom, --select-person changes it", quiet)
    grey = [report for report in result.reports if report.grey and report.face]
    if grey:
        faces = (
            "1 face is from a black-and-white photo and counts"
            if len(grey) == 1
            else (f"{len(grey)} faces are from black-and-white photos and count")
        )
        note(f"{faces} a tenth: photos in colour are better", quiet)


def mix(
    a: Annotated[Path, typer.Argument(help="Profile of one person.")],
    b: Annotated[Path, typer.Argument(help="Profile of another.")],
    fraction: Annotated[float, typer.Option(help="How much of B: 0 is A, 1 is B.", min=0, max=1)] = 0.5,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("mixed.safetensors"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the profile of somebody between two people."""
    import bolid.profile

    result = bolid.profile.mix_profiles(a, b, out, fraction=fraction)
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
        typer.Option("--set", metavar="NAME=CHANGE", help="A measurement, like waist=-4cm, inseam=+2sd or hip=101cm."),
    ] = None,
    hold: Annotated[str, typer.Option(help="Whether other measurements stay: all or none.")] = "all",
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("edited.safetensors"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Change a profile's body: --set waist=-4cm moves one measurement and holds the others. The face stays.

    sd is the standard deviation of the population, within one sex. The starting profile is not changed.
    """
    import bolid.profile

    if hold not in ("all", "none"):
        raise BolidError(f"--hold is {hold!r}", "choose all or none")
    wanted = parse_assignments(changes or (), "--set", "waist=-4cm or inseam=+2sd")
    result = bolid.profile.edit_profile(profile, out, changes=wanted, hold=hold == "all")
    pairs = zip(body.table_rows(result.before), body.table_rows(result.after), strict=True)
    print_table(("measurement", "before", "after", "±"), [(b[0], b[1], a[1], a[2]) for b, a in pairs], quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])


def show(
    profile: Annotated[Path, typer.Argument(help="File that `bolid profile` wrote.")],
    picture: Annotated[
        Path | None, typer.Option(help="PNG to write: front, side and back with the measuring lines.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the measurements of a profile's body.

    Sizes are in cm, with ± their standard deviation and the percentile among synthetic adults of the same sex. Photos
    do not show size: without a known height it is the population's. bolid inspect shows what else is in the file.
    """
    import bolid.profile

    rows = bolid.profile.show_profile(profile)
    if picture is not None:
        note(f"picture: {bolid.profile.picture_profile(profile, picture)}")
    if as_json:
        emit_json({"measurements": rows})
    else:
        body.print_body(rows)
