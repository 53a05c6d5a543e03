"""Write training shards for `bolid train-vae --view mask` from rendered masks, with the errors that networks make.

    python examples/tiny_family/render_masks.py 50000:52000 --out work/masks
    python examples/tiny_family/mask_shards.py work/masks --out work/mask-shards
    bolid train-vae work/mask-shards --view mask --ratio-weight 20 --out body-encoder.safetensors

Errors, by what the tiny family's own networks do to renders of known keypoints and masks, and up to twice as much:
keypoints off by 1.5 to 3.5 % of a torso, hips and shoulders together by more; some lost. Outlines off by a pixel or
two, in places more; hands and feet lost, things of the background taken for the person. Something in front of one
person in six; one picture in four cropped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
from render_masks import SIZE

from bolid.formats.images import encode_jpeg
from bolid.formats.shards import Sample, ShardWriter, sample_key
from bolid.method.mask_views import MaskView
from bolid.run import derive_seed, run_record
from bolid.synth.body import body_ratios
from bolid.synth.people import sample_person

# Standard deviation of a keypoint, in torso lengths: twice what the tiny family's pose network has on 140 renders.
NOISE = np.array([0.03] * 5 + [0.04] * 2 + [0.07] * 2 + [0.06] * 2 + [0.06] * 2 + [0.07] * 2 + [0.07] * 2)
PAIRS = ((5, 6, 0.03), (11, 12, 0.05), (13, 14, 0.03))  # both sides off together


def noisy_keypoints(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keypoints [17, 3] as a pose network gives them, of true ones with v 0 to 2."""
    torso = max(np.linalg.norm(points[[5, 6], :2].mean(0) - points[[11, 12], :2].mean(0)), 20.0)
    level = rng.uniform(0.2, 1.0)
    found = points.copy()
    found[:, :2] += level * torso * NOISE[:, None] * rng.normal(size=(17, 2))
    for left, right, deviation in PAIRS:
        found[[left, right], :2] += level * torso * deviation * rng.normal(size=2)
    sure = np.where(points[:, 2] == 2, rng.uniform(0.85, 1.0, 17), rng.uniform(0.6, 1.0, 17))
    lost = rng.random(17) < rng.choice((0.0, 0.03, 0.1))
    found[:, 2] = np.where((points[:, 2] == 0) | lost, 0.0, sure)
    return found.astype(np.float32)


def noisy_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask [H, W] with an outline as a segmentation network draws it."""
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), float(rng.uniform(0.5, 2.5)))
    shape = (max(2, int(mask.shape[0] / rng.uniform(6, 30))),) * 2
    rough = cv2.resize(rng.normal(size=shape).astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_CUBIC)
    found = soft + 0.2 * rng.random() ** 2 * rough > 0.5 + rng.uniform(-0.2, 0.2)
    edge = np.argwhere(found & ~cv2.erode(found.astype(np.uint8), np.ones((3, 3))).astype(bool))
    for _ in range(rng.poisson(0.6)):  # a piece of something else, or a piece lost
        if len(edge):
            y, x = edge[rng.integers(len(edge))]
            axes = (int(rng.uniform(2, 10)), int(rng.uniform(2, 16)))
            piece = np.zeros(mask.shape, np.uint8)
            cv2.ellipse(piece, (int(x), int(y)), axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
            found = found & (piece == 0) if rng.random() < 0.5 else found | (piece > 0)
    return found


def occluded(mask: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same with something in front of the person: its keypoints are guessed."""
    inside = np.argwhere(mask)
    if not len(inside):
        return mask, points
    y, x = inside[rng.integers(len(inside))]
    half_h, half_w = rng.uniform(8, 45), rng.uniform(8, 40)
    top, left = max(0, int(y - half_h)), max(0, int(x - half_w))
    bottom, right = int(y + half_h), int(x + half_w)
    mask, points = mask.copy(), points.copy()
    mask[top:bottom, left:right] = False
    hit = (points[:, 0] > left) & (points[:, 0] < right) & (points[:, 1] > top) & (points[:, 1] < bottom)
    points[hit, 2] *= rng.uniform(0.2, 0.9, int(hit.sum()))
    return mask, points


def cropped(mask: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture that ends earlier, mostly below."""
    height, width = mask.shape
    bottom = int(height * (rng.uniform(0.55, 1.0) if rng.random() < 0.7 else 1.0))
    left, right = int(width * max(0, rng.uniform(-0.3, 0.2))), int(width * min(1, rng.uniform(0.8, 1.3)))
    points = points - np.array([left, 0, 0], np.float32)
    outside = (points[:, 0] < 0) | (points[:, 0] > right - left) | (points[:, 1] > bottom)
    points[outside, 2] = 0
    return mask[:bottom, left:right], points


def view_of(bits: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> MaskView | None:
    """A view with errors; None where too little of the person is left."""
    mask = np.unpackbits(bits).reshape(SIZE).astype(bool)
    found = noisy_keypoints(points, rng)
    if rng.random() < 0.25:
        mask, found = cropped(mask, found, rng)
    mask = noisy_mask(mask, rng)
    if rng.random() < 1 / 6:
        mask, found = occluded(mask, found, rng)
    if (found[:, 2] > 0.3).sum() < 6 or not mask.any():
        return None
    return MaskView.cut(mask, found)


def samples_of(seed: int, masks: np.ndarray, keypoints: np.ndarray, variant: int, truth: np.ndarray) -> list[Sample]:
    """The usable views of a person with errors drawn anew for each `variant`; `truth`: the body ratios."""
    group = []
    person = f"p{seed:06d}-{variant}"
    for index, (bits, points) in enumerate(zip(masks, keypoints, strict=True)):
        view = view_of(bits, points, np.random.default_rng(derive_seed(seed, "mask errors", index, variant)))
        if view is None:
            continue
        picture = np.repeat(view.mask[..., None].astype(np.uint8) * 255, 3, 2)
        meta = {"person": person, "width": picture.shape[1], "height": picture.shape[0]}
        key = sample_key(person, f"{index:016d}")
        group.append(Sample(key, encode_jpeg(picture, 50), meta, "", {**view.tensors(), "ratios": truth}))
    return group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", type=Path, help="what render_masks.py wrote")
    parser.add_argument("--variants", type=int, default=2, help="of each person, with errors of their own")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    files = sorted(args.masks.glob("[0-9]*[0-9].npz"))
    config = {"variants": args.variants, "files": [path.name for path in files]}
    writer = ShardWriter(args.out, run_record("shards", family="tiny", config=config))
    for file in files:
        with np.load(file) as stored:
            parts = [stored[name] for name in ("seeds", "masks", "keypoints")]
        for seed, masks, keypoints in zip(*parts, strict=True):
            truth = np.array([*body_ratios(sample_person(int(seed))).values()], np.float32)
            for variant in range(args.variants):
                group = samples_of(int(seed), masks, keypoints, variant, truth)
                if len(group) > 1 and group[0].key not in writer.done_keys:
                    writer.write_group(group)
    index = writer.close()
    print(f"{index['samples']} views of {index['persons']} people")


if __name__ == "__main__":
    main()
