"""The pictures behind figures.py: of each person, by the base alone and by BoLID, with one sampler and equal noise.

A row is a way to make pictures. All rows get the same prompts and noise. The prompts are captions of photos that were
never rendered, with the person's gender and no word for the build; only `build-words` gets words for it.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_words import with_build
from instruments import REFERENCES
from PIL import Image

from bolid.backends.attention import cache_conditions
from bolid.backends.diffusion import decode_latents, load_base, load_controlnet, quiet_diffusers
from bolid.backends.sampling import Control, sample
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter, nested_state_dict
from bolid.formats.images import read_photo
from bolid.generate.shape_map import depth_picture
from bolid.models.families import Family
from bolid.person import Person, PersonReader
from bolid.run import canonical_json, derive_seed, sha256_file, write_atomic
from bolid.scales import parse_guidance, parse_scale
from bolid.synth.people import SyntheticPerson, sample_person
from bolid.synth.render import write_photos

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from measure import random_prompt

BASE, WORDS, ONE, EIGHT, BOTH = "base", "build-words", "bolid-1", "bolid-8", "bolid-8-both"
ROWS = {
    BASE: "the base alone, no photo",
    WORDS: "the base alone, the true build in words in full-body prompts, no photo",
    ONE: "BoLID, one upright full-body photo",
    EIGHT: "BoLID, eight photos",
    BOTH: "BoLID, eight photos, the body from adapter and 3D body (`--body-from both --pose`)",
}
REAL = "real"
PHOTO_SIZE = (256, 192)
HELD_OUT, PORTRAITS = 100, 200  # photo numbers, far above those that profiles are made from
BRANCHES = ("face", "body")


@dataclass(frozen=True)
class Wanted:
    """One picture that every row makes of a person."""

    name: str  # its file's
    prompt: str
    attributes: dict[str, Any]
    seed: int


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
    """Rendered photos of one person. No row sees `held_out` and `portraits`."""

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


class Maker:
    """Makes the rows' pictures with one family. `adapter`: a folder with other branches than the family's."""

    def __init__(self, family: Family, adapter: Path | None = None) -> None:
        self.family, self.settings = family, family.defaults
        folder = adapter or family.body_adapter.parent
        self.adapters = {branch: folder / f"{branch}.safetensors" for branch in BRANCHES}
        self.people: dict[tuple[Path, int], Person] = {}

    def lacks(self, row: str) -> str:
        """What a row needs and is not there, or ""."""
        if row in (BASE, WORDS):
            return ""
        missing = [str(path) for path in self.adapters.values() if not path.is_file()]
        if row == BOTH:
            missing += [part for part in ("depth_controlnet", "body_shape") if not self.family.has(part)]
        return ", ".join(missing)

    @cached_property
    def plain(self) -> Any:
        pipe = load_base(self.family, sampler=self.settings)
        cache_conditions(pipe.unet)
        return pipe

    @cached_property
    def adapted(self) -> Any:
        pipe, states = load_base(self.family, sampler=self.settings), []
        for branch, path in self.adapters.items():
            tensors, _ = load_adapter(path, branch)
            states.append(nested_state_dict({name: value.to(pipe.unet.dtype) for name, value in tensors.items()}))
        with quiet_diffusers():
            pipe.load_ip_adapter(
                states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
            )
        cache_conditions(pipe.unet)
        return pipe

    @cached_property
    def reader(self) -> PersonReader:
        return PersonReader(self.family)

    @cached_property
    def depth(self) -> Any:
        return load_controlnet(self.adapted, self.family, "depth_controlnet")

    def person(self, photos: Sequence[Path]) -> Person:
        """As `bolid profile` reads these photos."""
        key = photos[0], len(photos)
        if key not in self.people:
            self.people[key] = self.reader.read(photos)
        return self.people[key]

    def make(self, row: str, who: SyntheticPerson, photos: Photos, asked: Sequence[Wanted]) -> list[np.ndarray]:
        """A picture uint8 [H, W, 3] of each that is asked for."""
        prompts = [one.prompt for one in asked]
        if row in (BASE, WORDS):
            if row == WORDS:
                worded = with_build(prompts, who, self._fits)
                bodies = [one.attributes["framing"] == "full body" for one in asked]
                prompts = [words if body else plain for body, words, plain in zip(bodies, worded, prompts, strict=True)]
            return self._sample(self.plain, prompts, [one.seed for one in asked])
        person = self.person(photos.given[:1] if row == ONE else photos.given)
        if row != BOTH:
            return self._sample(self.adapted, prompts, [one.seed for one in asked], person)
        body, size = self.reader.shapes(person)[0].mean, self.family.image_size
        pictures = []
        for one in asked:  # each in the pose of its prompt; a portrait has no body to follow
            full = one.attributes["framing"] == "full body"
            maps = [depth_picture(body, one.attributes["pose"], size)] if full else []
            controls = [
                Control(self.depth, Image.fromarray(picture), parse_scale(1.0, "shape_scale")) for picture in maps
            ]
            pictures += self._sample(self.adapted, [one.prompt], [one.seed], person, controls)
        return pictures

    def _fits(self, prompt: str) -> bool:
        tokenizer = self.plain.tokenizer
        return len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length

    def _sample(
        self, pipe: Any, prompts: list[str], seeds: list[int], person: Person | None = None,
        controls: Sequence[Control] = (),
    ) -> list[np.ndarray]:  # fmt: skip
        """As `bolid generate` samples: clothes, timesteps, guidance and scales are the family's."""
        given: dict[str, Any] = {}
        if person is not None:
            face = torch.zeros(512) if person.face is None else person.face
            scales = [parse_scale(self.settings.get(f"{branch}_scale", 1.0), f"{branch}_scale") for branch in BRANCHES]
            if person.face is None:
                scales[0] = parse_scale(0.0, "face_scale")
            given = {"vectors": (face, person.body_mean), "scales": scales}
        latents = sample(
            pipe, [self.family.dressed(prompt) for prompt in prompts], size=self.family.image_size,
            steps=self.family.schedule,
            guidance=parse_guidance(self.settings.get("guidance", 5.0)),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds], controls=controls, **given,
        )  # fmt: skip
        return decode_latents(pipe, latents)

    def models(self) -> dict[str, str]:
        """SHA-256 of what decides on the pictures."""
        family, hashes = self.family, {}
        for part in ("base", "depth_controlnet", "body_encoder"):
            path: Path = getattr(family, part)
            for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []:
                hashes[f"{part}/{file.relative_to(path)}"] = sha256_file(file)
        hashes |= {name: sha256_file(path) for name, path in self.adapters.items() if path.is_file()}
        return hashes | {"size": str(family.image_size), "sampler": canonical_json(self.settings)}


def make_row(maker: Maker, row: str, people: dict[int, tuple[Photos, list[Wanted]]], work: Path) -> Path:
    """work/row/<person>/*.png, made where missing, or where a model, the prompt or the noise is another. Returns
    work/row.

    A person of whom the one photo shows no body is left out, with a line on stderr.
    """
    folder, models = work / row, maker.models()
    for seed, (photos, asked) in people.items():
        theirs = folder / sample_person(seed).name
        stamps = {one.name: canonical_json([one.prompt, one.seed, models]) for one in asked}
        missing = [one for one in asked if not is_made(theirs / f"{one.name}.png", stamps[one.name])]
        if not missing:
            continue
        try:
            pictures = maker.make(row, sample_person(seed), photos, missing)
        except BolidError as error:
            shutil.rmtree(theirs, ignore_errors=True)
            print(f"{row} leaves out {theirs.name}: {error.message}", file=sys.stderr, flush=True)
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


def seconds_a_picture(maker: Maker, photos: Photos, asked: Sequence[Wanted]) -> float | None:
    """CPU seconds of one picture by BoLID from eight photos, models and person loaded, four at once; the lesser of two
    runs. None without adapters."""
    if maker.lacks(EIGHT):
        return None
    spent = []
    for _ in range(2):
        begun = time.process_time()
        count = len(maker.make(EIGHT, sample_person(0), photos, list(asked)[:4]))
        spent.append((time.process_time() - begun) / count)
    return min(spent)


def load(paths: Sequence[Path]) -> list[np.ndarray]:
    return [read_photo(path) for path in paths]
