"""``bolid models``: which model families there are, what they need, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bolid.errors import BolidError
from bolid.models.families import (
    FAMILY_NAMES,
    chosen_family,
    commercial_use,
    get_family,
    remember_commercial,
    remember_family,
)
from bolid.models.sources import SOURCES
from bolid_cli._command import Command
from bolid_cli._console import JsonOption, QuietOption, emit_json, emit_paths, note, print_table, progress_bar
from bolid_cli._streams import emit

app = typer.Typer(
    help="List, fetch, check and convert the models of the families, or choose a family.",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CommercialOption = Annotated[
    bool,
    typer.Option("--commercial", help="Refuse what may not be used commercially. BOLID_COMMERCIAL=1 does everywhere."),
]
FamilyArgument = Annotated[str, typer.Argument(metavar="FAMILY", help=f"One of {', '.join(SOURCES)}.")]


@app.command("list", cls=Command)
def list_families(
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Only this one.", show_default=False)] = None,
    commercial: CommercialOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show every model family: what it needs, how big that is, its license, and where it lies or is looked for."""
    from bolid.models.manifest import describe

    chosen, source = chosen_family()
    names = [family] if family else [*FAMILY_NAMES] + ([chosen] if chosen not in FAMILY_NAMES else [])
    commercial = commercial or commercial_use()
    families: list[dict[str, Any]] = []
    for name in names:
        found = get_family(name)
        families.append(
            {
                "name": name,
                "description": found.description,
                "image_size": found.image_size,
                "root": found.root,
                "missing": found.missing(),
                "chosen": name == chosen,
                "parts": describe(found, commercial=commercial),
            }
        )
    if as_json:
        emit_json({"families": families, "chosen_by": source, "commercial": commercial})
        return
    for entry in families:
        emit(entry["name"])
    _print_families(families, quiet)
    for entry in families:
        if entry["parts"]:
            note(f"\n{entry['name']}, in {entry['root']}", quiet)
            _print_parts(entry, quiet)
    _print_notices([part for entry in families for part in entry["parts"]], quiet)
    note(f"\n* used by default, chosen by: {source}. A full-size family's body adapter is your own training's", quiet)
    note("(train-adapter); its face may be the published face_portrait. Next: bolid models pull FAMILY", quiet)


def _print_families(families: list[dict[str, Any]], quiet: bool) -> None:
    rows = []
    for entry in families:
        height, width = entry["image_size"]
        fetched = [part for part in entry["parts"] if not part["optional"]]
        lacking = [part["part"] for part in fetched if part["state"] == "missing"] if fetched else entry["missing"]
        state = "complete" if not lacking else f"missing {', '.join(lacking)}"
        name = f"{entry['name']} *" if entry["chosen"] else entry["name"]
        rows.append((name, f"{width}x{height}", entry["description"], state, entry["root"]))
    print_table(("family", "size", "what", "files", "where"), rows, quiet)


def _print_parts(family: dict[str, Any], quiet: bool) -> None:
    rows: list[tuple[object, ...]] = []
    for part in family["parts"]:
        state = part["state"] + (", optional" if part["optional"] and part["state"] == "missing" else "")
        where = part["where"].relative_to(family["root"])
        revision = (part["revision"] or "-")[:12]
        rows.append((part["part"], part["name"], part["megabytes"], part["license"], state, revision, where))
    print_table(("part", "what", "MB", "license", "state", "revision", "where"), rows, quiet)


def _print_notices(parts: list[dict[str, Any]], quiet: bool) -> None:
    """What licenses forbid, once for all parts that it is about."""
    notices: dict[str, list[str]] = {}
    for part in parts:
        for text in (part["notice"], part["instead"] and f"refused; {part['instead']}"):
            if text and part["name"] not in notices.setdefault(text, []):
                notices[text].append(part["name"])
    note("", quiet or not notices)
    for text, about in notices.items():
        note(f"{', '.join(about)}: {text}", quiet)


@app.command("pull", cls=Command)
def pull(
    family: FamilyArgument,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Only this part (also an optional one). May be repeated."),
    ] = None,
    from_dir: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Take the files from a folder copied from another machine."),
    ] = None,
    commercial: CommercialOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch the published weights of FAMILY; what is there already stays. An interrupted pull goes on where it stopped.

    From the Hugging Face Hub (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are respected) and the releases of InsightFace and
    ultralytics. The SHA-256 of every file is recorded; `bolid models verify` compares with the record.
    """
    import bolid.models.pull
    from bolid.models.manifest import describe

    commercial = commercial or commercial_use()
    with progress_bar(quiet) as progress:
        places = bolid.models.pull.pull(
            family, only=only or (), from_dir=from_dir, commercial=commercial, progress=progress
        )
    for part in describe(get_family(family), commercial=commercial):
        if part["where"] in places and part["notice"]:
            note(f"{part['name']}, {part['license']}: {part['notice']}", quiet)
    if as_json:
        emit_json({"family": family, "parts": places})
    else:
        emit_paths(places)


@app.command("verify", cls=Command)
def verify(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help=f"{', '.join(FAMILY_NAMES)}, or a .toml file.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that the files of FAMILY are there and whole. Where their SHA-256 was recorded, it is compared."""
    import bolid.models.manifest

    with progress_bar(quiet) as progress:
        rows = bolid.models.manifest.verify(family, progress=progress)
    if as_json:
        emit_json({"family": family, "parts": rows})
    else:
        emit_paths(row["where"] for row in rows if row["state"] != "missing")
    print_table(("part", "state", "where"), [(row["part"], row["state"], row["where"]) for row in rows], quiet)
    published = [source.part for source in SOURCES.get(family, ())]
    if missing := [row["part"] for row in rows if row["state"] == "missing" and row["part"] in published]:
        raise BolidError(f"family {family!r} lacks {', '.join(missing)}", f"bolid models pull {family}")


@app.command("convert", cls=Command)
def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="YOLO11 weights for pose (.pt, or exported .onnx) or segmentation (.pt), torchvision's Mask R-CNN "
            "(.pth), or a FaceID-Portrait adapter (.bin)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write. Default: beside the file, under its name.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Family that an adapter is for. Default: sd15 or sdxl, whichever it fits.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Convert a published file into a model or a face adapter that BoLID reads. Nothing in a pickle is run."""
    import bolid.models.convert

    emit_paths([bolid.models.convert.convert(file, out, family=family)])
    license = {".bin": "for non-commercial research only", ".pth": "BSD-3-Clause"}.get(file.suffix, "AGPL-3.0")
    note(f"{license}, like the file it is made from", quiet)


@app.command("use", cls=Command)
def use(
    name: str,
    commercial: Annotated[
        bool | None,
        typer.Option(
            "--commercial/--no-commercial",
            help="Later commands refuse models that may not be used commercially, or take them again.",
            show_default=False,
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Remember NAME (a family, or a .toml file of your own) as the family of later commands."""
    remember_family(name)
    note(f"later commands use family {name!r} unless --family or BOLID_FAMILY says otherwise", quiet)
    if not (found := get_family(name)).has("base"):
        note(f"its base is missing: bolid doctor --family {found.name} says what else, and how to get it", quiet)
    if commercial is not None:
        remember_commercial(commercial)
        note(f"they {'refuse' if commercial else 'take'} models that may not be used commercially", quiet)
