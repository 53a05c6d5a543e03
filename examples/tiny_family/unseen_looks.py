"""Render held-out people in a look that no training saw, or with bodies far outside the training's ranges.

    python examples/tiny_family/unseen_looks.py look --people 100 --out work/unseen
    python examples/tiny_family/unseen_looks.py far --people 60 --out work/far

look: places and cloth have the textures of photographs (those that scikit-image ships), clothes are up to three times
as loose, with noise of 6 grey levels, JPEG of quality 40. far: `bolid synth`'s own look, but every shape change lies
outside its range and every phenotype at an end of its own; adults all. People 100000 and on.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image

from bolid.run import derive_seed
from bolid.synth.people import BODY_CHANGES, PhotoPlan, SyntheticPerson, sample_person, sample_plan
from bolid.synth.render import RenderedPhoto, Renderer

SIZE = (256, 192)
FIRST = 100_000
TEXTURES = ("brick.png", "grass.png", "gravel.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png",
            "coins.png", "ihc.png", "hubble_deep_field.jpg")  # fmt: skip


def textures() -> list[np.ndarray]:
    """Photographs, f32 [h, w, 3] in 0..1."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install scikit-image: its photographs are the textures")
    files = [Path(spec.origin).parent / "data" / name for name in TEXTURES]
    return [np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files]


def patch_of(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece of a texture at some size, f32 [*SIZE, 3]."""
    height, width = texture.shape[:2]
    side = rng.uniform(0.4, 1.0) * min(height / SIZE[0], width / SIZE[1])
    h, w = side * SIZE[0], side * SIZE[1]
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
    picture = Image.fromarray((texture * 255).astype(np.uint8))
    cut = picture.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return np.asarray(cut, np.float32) / 255


def loose_plan(person: SyntheticPerson, index: int) -> tuple[PhotoPlan, np.random.Generator]:
    """(the plan of a photo in another look, what draws the rest of it)."""
    rng = np.random.default_rng(derive_seed(person.seed, "unseen look", index))
    return replace(sample_plan(person, index), looseness=float(rng.uniform(1.0, 3.0))), rng


def in_another_look(renderer: Renderer, index: int, pictures: list[np.ndarray]) -> RenderedPhoto:
    """The photo number `index` of a person, before photographs and with their textures on it."""
    plan, rng = loose_plan(renderer.person, index)
    photo = renderer.render(plan)
    mask = renderer.outline(plan)[0][..., None]
    behind, cloth = (patch_of(pictures[int(rng.integers(len(pictures)))], rng) for _ in range(2))
    person = photo.image / 255 * (0.55 + 0.9 * cloth.mean(-1, keepdims=True))
    picture = np.where(mask, person, behind) * 255 + rng.normal(0, 6, (*SIZE, 3))
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=40)
    return replace(photo, image=np.asarray(Image.open(buffer)))


def far_person(seed: int) -> SyntheticPerson:
    """An adult whose body lies outside the ranges of `sample_person`."""
    rng = np.random.default_rng(derive_seed(seed, "far body"))
    person = sample_person(seed)
    ends = {name: float(rng.choice((0.0, 1.0))) for name in ("muscle", "weight", "height", "proportions")}
    ends["weight"] = float(rng.choice((0.1, 1.0)))
    changes = {
        name: float(rng.choice((-1, 1)) * rng.uniform(width, 1.3 * width)) for name, width in BODY_CHANGES.items()
    }
    phenotypes = {**person.phenotypes, **ends, "gender": float(rng.uniform(0.25, 0.75)), "age": 0.8}
    return replace(person, phenotypes=phenotypes, local_changes={**person.local_changes, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("look", "far"))
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = textures() if args.kind == "look" else []
    for seed in range(FIRST, FIRST + args.people):
        person = sample_person(seed) if args.kind == "look" else far_person(seed)
        folder = args.out / person.name
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.glob("*.json"))) == args.photos:
            continue
        renderer = Renderer(person, SIZE)
        for index in range(args.photos):
            if args.kind == "look":
                photo = in_another_look(renderer, index, pictures)
            else:
                photo = renderer.render(sample_plan(person, index))
            Image.fromarray(photo.image).save(folder / f"{index:03d}.jpg", quality=95, subsampling=0)
            (folder / f"{index:03d}.json").write_text(json.dumps(photo.truth))


if __name__ == "__main__":
    main()
