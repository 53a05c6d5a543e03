"""Which pictures are made of a person, from which photos, and where they are kept.

All methods get the same photos, prompts and noise. The prompts are captions of photos that were never rendered, with
the person's gender and no word for the build; only `build-words` (methods.py) adds words for it.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from instruments import REFERENCES
from PIL import Image

from bolid.errors import BolidError
from bolid.formats.images import read_photo
from bolid.run import canonical_json, derive_seed, write_atomic
from bolid.synth.people import SyntheticPerson, sample_person
from bolid.synth.render import write_photos

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from measure import random_prompt

PHOTO_SIZE = (256, 192)
HELD_OUT, PORTRAITS = 100, 200  # photo numbers, far above those that methods are given


@dataclass(frozen=True)
class Wanted:
    """One picture that every method makes of a person."""

    name: str  # its file's
    prompt: str
    attributes: dict[str, Any]
    seed: int

    @property
    def full(self) -> bool:
        """Whether it shows the whole body."""
        return self.attributes["framing"] == "full body"


def wanted(person: SyntheticPerson, bodies: int, portraits: int) -> list[Wanted]:
    """`bodies` full-body pictures, the first prompt once more with other noise, and `portraits`."""
    found = []
    for framing, count in (("full body", bodies), ("portrait", portraits)):
        for i in range(count):
            seed = derive_seed(person.seed, "figures", framing, i)
            prompt, attributes = random_prompt(_of_the_same_sex(person, seed), framing=framing)
            found.append(Wanted(f"{framing.split()[0]}-{i}", prompt, attributes, derive_seed(seed, "noise")))
    again = Wanted("full-0-again", found[0].prompt, found[0].attributes, derive_seed(found[0].seed, "again"))
    return [*found, again]


def _of_the_same_sex(person: SyntheticPerson, seed: int) -> int:
    """The seed of somebody else, whose clothes suit the base's words for the person."""
    woman = person.phenotypes["gender"] > 0.5
    others = (int(derive_seed(seed, k) % 20_000) + 150_000 for k in itertools.count())
    return next(other for other in others if (sample_person(other).phenotypes["gender"] > 0.5) == woman)


@dataclass(frozen=True)
class Photos:
    """Rendered photos of one person. No method sees `held_out` and `portraits`."""

    given: list[Path]  # the first is upright and shows the whole body
    held_out: list[Path]  # full bodies
    portraits: list[Path]  # the first REFERENCES are what faces are compared with


def photos_of(person: SyntheticPerson, folder: Path, bodies: int, portraits: int, given: int = 8) -> Photos:
    """Render what is missing."""

    def render(count: int, **plan: Any) -> list[Path]:
        return write_photos(folder, person.seed, count, size=PHOTO_SIZE, **plan)

    first = render(1, framing="full body", pose="standing")
    return Photos(
        first + render(given - 1, start=1),
        render(bodies, start=HELD_OUT, framing="full body"),
        render(REFERENCES + portraits, start=PORTRAITS, framing="portrait"),
    )


People = dict[int, tuple[Photos, list[Wanted]]]
"""Seed -> a person's photos, and the pictures to be made."""


def people_of(seeds: Sequence[int], photos: Path, bodies: int, portraits: int) -> People:
    """The people with these seeds; missing photos are rendered into the folder `photos`."""
    everybody = {seed: sample_person(seed) for seed in seeds}
    return {
        seed: (photos_of(who, photos, bodies, portraits), wanted(who, bodies, portraits))
        for seed, who in everybody.items()
    }


class MakesPictures(Protocol):
    """What methods.Maker is to `make_row`."""

    def models(self, method: str) -> dict[str, str]: ...

    def make(
        self, method: str, who: SyntheticPerson, photos: Photos, asked: Sequence[Wanted]
    ) -> list[np.ndarray]: ...  # fmt: skip


def make_row(maker: MakesPictures, method: str, people: People, work: Path) -> Path:
    """work/method/<person>/*.png, made where missing, or where a model, the prompt or the noise is another. Returns
    work/method.

    A person for whom the method fails (its one photo shows no body) is left out, with a line on stderr.
    """
    folder, models = work / method, maker.models(method)
    for seed, (photos, asked) in people.items():
        theirs = folder / sample_person(seed).name
        stamps = {one.name: canonical_json([one.prompt, one.seed, models]) for one in asked}
        missing = [one for one in asked if not is_made(theirs / f"{one.name}.png", stamps[one.name])]
        if not missing:
            continue
        try:
            pictures = maker.make(method, sample_person(seed), photos, missing)
        except BolidError as error:
            shutil.rmtree(theirs, ignore_errors=True)
            print(f"{method} leaves out {theirs.name}: {error.message}", file=sys.stderr, flush=True)
            continue
        for one, picture in zip(missing, pictures, strict=True):
            path = theirs / f"{one.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path.with_suffix(".tmp"), "PNG")
            path.with_suffix(".tmp").replace(path)
            write_atomic(path.with_suffix(".json"), stamps[one.name])
    return folder


def is_made(path: Path, stamp: str) -> bool:
    """Whether the picture is there and was made from the same things."""
    record = path.with_suffix(".json")
    return path.is_file() and record.is_file() and record.read_text(encoding="utf-8") == stamp


def load(paths: Sequence[Path]) -> list[np.ndarray]:
    return [read_photo(path) for path in paths]


def contact_sheet(folders: dict[str, Path], people: Sequence[int], path: Path, most: int = 5) -> None:
    """Full body and portrait of the first people, one method below the other."""
    names = [sample_person(seed).name for seed in list(people)[:most]]
    rows = []
    for folder in folders.values():
        files = [folder / name / f"{kind}-0.png" for name in names for kind in ("full", "portrait")]
        if all(file.is_file() for file in files):
            rows.append(np.concatenate(load(files), 1))
    if rows:
        Image.fromarray(np.concatenate(rows)).save(path)
