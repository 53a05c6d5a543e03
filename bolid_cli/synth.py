"""``bolid synth``."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bolid.errors import BolidError
from bolid.scales import parse_size
from bolid_cli._console import JsonOption, QuietOption, emit_json, emit_paths, progress_bar


class Framing(StrEnum):
    full_body = "full-body"
    three_quarter = "three-quarter"
    portrait = "portrait"


def synth(
    person_seed: Annotated[
        str, typer.Option(metavar="N|N:M", help="Seed of the person (7), or seeds of several (0:100).")
    ] = "200000",
    photos: Annotated[int, typer.Option(help="Photos of each person.", min=1, max=10_000)] = 8,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for <person>/*.jpg, .txt, .json.")] = Path("photos"),
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Of the photos, in pixels.")] = "384x512",
    framing: Annotated[Framing | None, typer.Option(help="Only photos of this kind.", show_default="all")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Render photos of synthetic people, with captions and ground truth.

    Adults, always dressed. A seed gives the same person in every photo; photos differ in pose, clothes, place, camera
    and light. The same command gives the same pixels. Photos that are there already are kept. Seeds below 200000 made
    the tiny family's training and validation data: use 200000 or more to try the family on new people.
    """
    seeds = _seeds(person_seed)
    pixels = _size(size)
    from bolid.synth.people import FRAMINGS
    from bolid.synth.render import write_photos

    fixed: dict[str, Any] = {"framing": dict(zip(Framing, FRAMINGS, strict=True))[framing]} if framing else {}
    paths: list[Path] = []
    with progress_bar(quiet) as progress:
        for done, seed in enumerate(seeds):
            progress(done, len(seeds), "rendering people")
            paths += write_photos(out, seed, photos, size=pixels, **fixed)
    if as_json:
        emit_json({"people": len(seeds), "photos": paths})
    else:
        emit_paths(paths)


def _seeds(text: str) -> list[int]:
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,7}))?", text.strip())
    first, last = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
    if last <= first or last > 1_000_000:
        raise BolidError(f"--person-seed is {text!r}", "write one seed (7) or a range (0:100), below 1000000")
    return list(range(first, last))


def _size(text: str) -> tuple[int, int]:
    height, width = parse_size(text)
    if not (64 <= height <= 2048 and 64 <= width <= 2048) or height % 2 or width % 2:
        raise BolidError(f"--size is {text!r}", "give even numbers from 64 to 2048, like 384x512")
    return height, width
