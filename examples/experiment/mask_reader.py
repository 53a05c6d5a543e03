"""A second reader of bodies: body ratios off a person's mask and keypoints, linearly from the body encoder of masks.

    python examples/experiment/mask_reader.py photos/train --val photos/val --work runs/mask-encoder

fits the linear maps of mask-readout.safetensors on training people and says how well they read held-out ones. Neither
the encoder (bolid/masks) nor the segmentation network has a part in the training of a base or an adapter; the pose
network, which places the keypoints, has one through L_id.

Shapes: N pictures, D body dimensions, R ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from bolid.backends.body import BodyEncoder, fuse_views
from bolid.backends.pose import PoseModel
from bolid.backends.segmentation import load_segmenter
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method.metrics import r2_scores
from bolid.models.families import MASK_ENCODER, Family, get_family
from bolid.run import run_record, sha256_file
from bolid.synth.people import RATIO_NAMES
from bolid.views import choose_person, whole_box

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from measure_body_encoder import READ_OUT_PEOPLE
from measure_mask_encoder import encode, read_people

KIND = "mask-readout"
FILE = Path(__file__).with_name("mask-readout.safetensors")
COUNTS = (1, 4)  # of pictures whose readings are averaged: a map is fitted for each
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class MaskReader:
    """Reads body ratios, named `ratio_names`. Raises BolidError where a model is missing."""

    ratio_names = RATIO_NAMES

    def __init__(self, family: Family, file: Path = FILE) -> None:
        tensors, self.record = load_tensors(file, KIND)
        self.maps = {count: (tensors[f"weight_{count}"], tensors[f"bias_{count}"]) for count in COUNTS}
        self.encoder = BodyEncoder(MASK_ENCODER)
        self.pose = PoseModel(family.require("pose"))
        self.segmenter = load_segmenter(family.require("segmentation"))

    def read(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """f32 [N, 2 D + 1] of pictures uint8 [H, W, 3]: mean and log variance of the view, and its confidence, which is
        0 where nobody is found."""
        found = np.zeros((len(images), 2 * self.encoder.body_dim + 1), np.float32)
        for row, image in zip(found, images, strict=True):
            person = choose_person(self.pose.detect([image])[0], "main")
            if isinstance(person, str):
                continue
            keypoints = person.keypoints.astype(np.float32)
            view = self.segmenter.segment(image, whole_box(person, image.shape[:2]), keypoints)
            if view is not None:
                row[:] = torch.cat([part.flatten() for part in self.encoder.encode_masks([view])])
        return found

    def ratios(self, read: np.ndarray) -> np.ndarray:
        """[P, R] of readings [P, N, 2 D + 1] of N pictures each, which are fused as `bolid profile` does."""
        weight, bias = self.maps[1 if read.shape[1] == 1 else COUNTS[-1]]
        bodies = [fused(*torch.from_numpy(theirs).split([weight.shape[0], weight.shape[0], 1], 1)) for theirs in read]
        return (torch.stack(bodies) @ weight + bias).numpy()


def fused(mean: torch.Tensor, logvar: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """body_mean [D] of views [N, D], [N, D], [N, 1]."""
    return fuse_views(mean, logvar, confidence.flatten())[0]


def ridge(x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [D, R] and bias [R] of y [N, R] on x [N, D]; the penalty is chosen by five-fold cross-validation over
    people, whose numbers `groups` [N] has."""

    def solved(rows: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        centre, mean = x[rows].mean(0), y[rows].mean(0)
        a = x[rows] - centre
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(a.T @ a + penalty * eye, a.T @ (y[rows] - mean))
        return weight, mean - centre @ weight

    def score(penalty: float) -> float:
        read = torch.empty_like(y)
        for fold in range(5):
            out = groups % 5 == fold
            weight, bias = solved(~out, penalty)
            read[out] = x[out] @ weight + bias
        return float(r2_scores(y, read).mean())

    return solved(torch.ones(len(x), dtype=torch.bool), max(PENALTIES, key=score))


def of_people(people: list[dict], encoder: BodyEncoder) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
    """Each person's views (mean [N, D], log variance [N, D], confidence [N]), and the true ratios [P, R], f64."""
    return encode(people, encoder), torch.from_numpy(np.stack([person["ratios"] for person in people])).double()


def bodies_of(views: list[tuple[torch.Tensor, ...]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """body_mean [n, D], f64, of every `count` views of a person (fewer where that is all), and whose they are [n]."""
    chosen = [(i, v, k) for i, v in enumerate(views) for k in range(0, max(len(v[0]) - count, 0) + 1, count)]
    bodies = [fused(*(part[k : k + count] for part in v)) for _, v, k in chosen]
    return torch.stack(bodies).double(), torch.tensor([i for i, _, _ in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--people", type=int, default=READ_OUT_PEOPLE)
    parser.add_argument("--work", type=Path, default=Path("runs/mask-encoder"), help="views that were read already")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    family, encoder = get_family("tiny"), BodyEncoder(MASK_ENCODER)
    segmentation = family.require("segmentation")
    views, ratios = of_people(read_people(args.photos, family, segmentation, args.work / "train", args.people), encoder)
    held, truth = of_people(read_people(args.val, family, segmentation, args.work / "own", 200), encoder)
    tensors: dict[str, torch.Tensor] = {}
    figures = {}
    for count in COUNTS:
        x, owner = bodies_of(views, count)
        weight, bias = ridge(x, ratios[owner], owner)
        tensors |= {f"weight_{count}": weight.float(), f"bias_{count}": bias.float()}
        own, whose = bodies_of(held, count)
        scores = r2_scores(truth[whose], own @ weight + bias)
        figures[f"{count} photos"] = {"mean R2": float(scores.mean())} | dict(
            zip(RATIO_NAMES, scores.tolist(), strict=True)
        )
    config = {"people": len(views), "photos of each": COUNTS[-1], "held-out people": len(held), "R2": figures}
    record = run_record(KIND, family=None, config=config, inputs={"body_encoder": sha256_file(MASK_ENCODER)})
    save_tensors(args.out, tensors, record)
    print(json.dumps({name: {k: round(v, 3) for k, v in part.items()} for name, part in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
