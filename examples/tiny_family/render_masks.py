"""Render masks and keypoints of synthetic people for the mask encoder, with domain randomisation; no colours.

    python examples/tiny_family/render_masks.py 50000:54000 --views 6 --out work/masks

A view differs from `bolid synth`'s in what photographs differ in: lenses of 24 to 135 mm, clothes up to seven times as
loose, hair of any style (it must not name the person), more turned and tilted people. One .npz for 50
people; the same command goes on. About 0.07 s a view on one core.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from bolid.errors import BolidError
from bolid.run import derive_seed
from bolid.synth.people import HAIR_STYLES, PhotoPlan, SyntheticPerson, sample_person, sample_plan
from bolid.synth.render import Renderer

SIZE = (256, 192)
CHUNK = 50  # people in a file
FORBIDDEN = 100_000  # seeds from here on are for figures and users
LENSES = (24.0, 135.0)  # mm, over a picture 36 mm high


def randomised(person: SyntheticPerson, index: int) -> tuple[PhotoPlan, str, float]:
    """(plan, hair style, vertical field of view in degrees) of a person's view number `index`."""
    rng = np.random.default_rng(derive_seed(person.seed, "mask view", index))
    plan = sample_plan(person, 1000 + index)
    loose = rng.uniform(0.3, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 7.0)
    lens = np.exp(rng.uniform(*np.log(LENSES)))
    plan = replace(
        plan, looseness=float(loose), yaw=float(np.clip(rng.normal(0, 30), -80, 80)),
        pitch=float(rng.uniform(-10, 18)), roll=float(rng.normal(0, 3)), fill=float(rng.uniform(0.6, 0.97)),
        shift=(float(rng.normal(0, 0.05)), float(rng.normal(0, 0.04))),
    )  # fmt: skip
    return plan, HAIR_STYLES[int(rng.integers(len(HAIR_STYLES)))], float(np.degrees(2 * np.arctan(18 / lens)))


def render_person(seed: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    """(masks as bits, u8 [views, bytes]; keypoints f32 [views, 17, 3] in pixels, v 0 to 2) of one person."""
    renderer = Renderer(sample_person(seed), SIZE)
    masks, keypoints = [], []
    for index in range(views):
        plan, hair, fov = randomised(sample_person(seed), index)
        renderer.person = replace(renderer.person, hair_style=hair)
        mask, points = renderer.outline(plan, fov)
        masks.append(np.packbits(mask))
        keypoints.append(points)
    return np.stack(masks), np.stack(keypoints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", help="FIRST:END")
    parser.add_argument("--views", type=int, default=6, help="of each person")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    first, end = map(int, args.seeds.split(":"))
    if end > FORBIDDEN:
        raise BolidError(f"people of {FORBIDDEN} and more are for figures", "render others")
    args.out.mkdir(parents=True, exist_ok=True)
    for start in range(first, end, CHUNK):
        path = args.out / f"{start:06d}.npz"
        if path.exists():
            continue
        seeds = np.arange(start, min(start + CHUNK, end))
        masks, keypoints = zip(*(render_person(int(seed), args.views) for seed in seeds), strict=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, seeds=seeds, masks=np.stack(masks), keypoints=np.stack(keypoints))
        temporary.replace(path)


if __name__ == "__main__":
    main()
