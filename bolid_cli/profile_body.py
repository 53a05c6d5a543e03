"""The body in `bolid profile`: measurements as options, the table of centimetres, and ``bolid profile export``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bolid.errors import BolidError
from bolid.formats.parsing import parse_assignments
from bolid.scales import parse_size
from bolid_cli._console import JsonOption, emit_json, emit_paths
from bolid_cli._streams import emit

if TYPE_CHECKING:
    from bolid.body.profiles import MeasurementRow
    from bolid.body.shape import Known

_GROUP = "Measurements"


def _measurement(text: str) -> Any:
    return typer.Option(help=text, metavar="CM", rich_help_panel=_GROUP)


HeightOption = Annotated[str | None, _measurement("Stature in cm, like 172 or 172±0.5.")]
InseamOption = Annotated[str | None, _measurement("Inside leg height.")]
ChestOption = Annotated[str | None, _measurement("Bust girth.")]
WaistOption = Annotated[str | None, _measurement("Waist girth, like 80, or 80±2 with its standard deviation.")]
HipOption = Annotated[str | None, _measurement("Hip girth.")]
WeightOption = Annotated[str | None, typer.Option(help="Body mass in kg.", metavar="KG", rich_help_panel=_GROUP)]
MeasureOption = Annotated[
    list[str] | None,
    typer.Option("--measure", metavar="NAME=VALUE", help="Any other, like neck=38.", rich_help_panel=_GROUP),
]
SexOption = Annotated[
    str | None, typer.Option(help="woman or man. Default: photos and measurements decide.", rich_help_panel=_GROUP)
]
UnitsOption = Annotated[str, typer.Option(help="cm (and kg), or in (and pounds).", rich_help_panel=_GROUP)]


def known_from(options: dict[str, str | None], others: Sequence[str] | None, units: str) -> dict[str, Known]:
    """What the options of measurements say, in metres and kilograms."""
    texts = {name: text for name, text in options.items() if text is not None}
    for name, text in parse_assignments(others or (), "--measure", "--measure neck=38").items():
        if name in texts:
            raise BolidError(f"{name} is given twice", "leave one of them out")
        texts[name] = text
    if not texts:
        return {}
    from bolid.body.profiles import read_known

    return read_known(texts, units)


def table_rows(rows: Iterable[MeasurementRow]) -> list[tuple[str, str, str, str, str]]:
    """(measurement, value, ±, percentile, whether it was given), as text."""
    return [
        (row.title, f"{row.value:.1f} {row.unit}", f"{row.sd:.1f}", f"{row.percentile:.0f} %", "given" * row.known)
        for row in rows
    ]


TABLE_HEADERS = ("measurement", "value", "±", "percentile", "")


def print_body(rows: Iterable[MeasurementRow]) -> None:
    """The table of measurements on stdout: it is what was asked for."""
    cells = [TABLE_HEADERS, *table_rows(rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(TABLE_HEADERS))]
    for row in cells:
        texts = [
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        emit("  ".join(texts).rstrip())


def export(
    profile: Annotated[Path, typer.Argument(help="File that `bolid profile` wrote.")],
    mesh: Annotated[Path | None, typer.Argument(help="Mesh to write: .glb, .obj or .ply.")] = None,
    pose: Annotated[
        str | None, typer.Option(help="a-pose, standing, walking, ... Default: a-pose for a mesh, standing for maps.")
    ] = None,
    pose_from: Annotated[
        Path | None, typer.Option(metavar="PHOTO", help="Take the pose of the person in this photo.")
    ] = None,
    maps: Annotated[
        str | None, typer.Option(help="Control maps, like depth,normal,silhouette,openpose.", metavar="NAMES")
    ] = None,
    size: Annotated[str, typer.Option(help="Of the maps, in pixels.", metavar="WIDTHxHEIGHT")] = "832x1216",
    turn: Annotated[float, typer.Option(help="Of the camera round the body, degrees; 90 shows the left side.")] = 0.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the maps.")] = Path("maps"),
    as_json: JsonOption = False,
) -> None:
    """Write a profile's body as a mesh in metres, or as control maps for published ControlNets."""
    if mesh is None and maps is None:
        raise BolidError("nothing to export", "name a mesh, like me.glb, or --maps depth,openpose")
    if pose is not None and pose_from is not None:
        raise BolidError("--pose is given with --pose-from", "leave one of the two out")
    import bolid.profile

    paths = []
    if mesh is not None:
        paths.append(bolid.profile.export_profile(profile, mesh, pose=pose or "a-pose", pose_from=pose_from))
    if maps is not None:
        names = [name.strip() for name in maps.split(",")]
        pixels = parse_size(size)
        paths += bolid.profile.export_maps(
            profile, out, maps=names, pose=pose or "standing", pose_from=pose_from, size=pixels, turn=turn
        )  # fmt: skip
    if as_json:
        emit_json({"paths": paths})
    else:
        emit_paths(paths)
