"""Photos of synthetic people with the depth of the body in them: what `train_controlnet.py --kind depth` trains on.

The person and the photo's plan follow from the truth beside the photo, and with them shape, pose and camera. The depth
is that of the body without clothes and hair, for a profile knows no others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from truth import read_resized, read_truth

from bolid.backends.diffusion import LatentEncoder
from bolid.body.maps import depth_map
from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.run import atomic_path, canonical_json
from bolid.synth.people import attributes, sample_person, sample_plan
from bolid.synth.render import Renderer


class DepthPhotos(NamedTuple):
    """N photos at the family's picture size."""

    latents: np.ndarray  # f16 [N,2,C,h,w], the VAE's moments
    captions: np.ndarray  # [N], text
    keypoints: np.ndarray  # f32 [N,17,3]: x and y in pixels; 1 visible, 0.5 hidden, 0 outside
    depth: np.ndarray  # uint8 [N,H,W,3]


def read_depth_photos(
    photos: Path, family: Family, work: Path, people: int | None = None, seed: int = 0
) -> DepthPhotos:
    """The photos under `photos`, of so many `people`, that show more than the head; kept in `work`. 0.15 s a photo."""
    rows = [row for row in read_truth(photos, people=people, seed=seed) if row["attributes"]["framing"] != "portrait"]
    size = family.image_size
    key = canonical_json([str(family.require("base")), size, [str(row["path"]) for row in rows]])
    kept = work / f"depth-photos-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if kept.exists():
        with np.load(kept) as stored:
            return DepthPhotos(*(stored[name] for name in DepthPhotos._fields))
    encoder, parts, renderers = LatentEncoder(family), [], dict[int, Renderer]()
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        for row in some:
            if row["seed"] not in renderers:  # one person's photos come together
                renderers = {row["seed"]: Renderer(sample_person(row["seed"]), (row["height"], row["width"]))}
            row["depth"] = depth_of(renderers[row["seed"]], row, size)
        moments = encoder.encode(list(read_resized(some, size)))
        points = np.array([row["keypoints"] for row in some], np.float32)
        points *= [size[1] / some[0]["width"], size[0] / some[0]["height"], 0.5]
        captions = np.array([row["caption"] for row in some])
        parts.append(DepthPhotos(moments, captions, points, np.stack([row.pop("depth") for row in some])))
    found = DepthPhotos(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    work.mkdir(parents=True, exist_ok=True)
    with atomic_path(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, **found._asdict())
    return found


def depth_of(renderer: Renderer, row: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The depth map [H,W,3] of the photo whose truth is `row`. BolidError where the truth is not that of its seed."""
    plan = sample_plan(renderer.person, row["photo"])
    if attributes(renderer.person, plan) != row["attributes"]:
        raise BolidError(f"{row['path']} is not what its seed makes", "render it again: bolid synth")
    scale = [size[1] / row["width"], size[0] / row["height"], 1]
    with torch.no_grad():
        return depth_map(renderer.project_body(plan) * scale, renderer.body.faces, size)
