"""A recogniser of faces that has no part in any training: Fisherfaces (Belhumeur et al. 1997), a linear map.

    python examples/experiment/fisher_faces.py photos/portraits --val photos/val

fits it on people that the family's recogniser does not know, in seconds, and says how well it tells others apart.
A face is aligned as InsightFace does, reduced to SIDE pixels and projected to where people differ most beside what
changes between pictures of one person: light, place, mirror image, blur and a detector's errors, which are drawn here.

Shapes: N faces, P = 3 SIDE^2 pixels, D dimensions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import torch

from bolid.backends.face import Face, quiet_insightface
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.run import derive_seed, run_record

sys.path.append(str(Path(__file__).parents[1] / "tiny_family"))
from truth import FLIP_LANDMARKS, read_image, read_truth

KIND = "fisher-faces"
FILE = Path(__file__).with_name("fisher-faces.safetensors")
SIDE, DIMENSIONS = 32, 96
COPIES = 4  # of each face, changed by chance
RIDGE = 0.03  # of the mean variance within people, added to each pixel's


class FisherFaces:
    """The recogniser read from its file."""

    def __init__(self, file: Path = FILE) -> None:
        tensors, self.record = load_tensors(file, KIND)
        self.mean, self.weight = (tensors[name].float().numpy() for name in ("mean", "weight"))

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        """f32 [D], unit length, of a face that some detector has found in a picture (uint8 [H, W, 3] RGB)."""
        return unit((aligned(image, face.landmarks).ravel() - self.mean) @ self.weight)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def aligned(image: np.ndarray, landmarks: np.ndarray, change: np.ndarray | None = None) -> np.ndarray:
    """f32 [SIDE, SIDE, 3] in 0..1 of the face with landmarks [5, 2], which `change` [2, 3] moves in the crop."""
    from insightface.utils.face_align import estimate_norm

    with quiet_insightface():
        matrix = estimate_norm(np.asarray(landmarks, np.float32), 112)
    if change is not None:
        matrix = change @ np.vstack([matrix, [0, 0, 1]])
    face = cv2.warpAffine(image, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(face, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def changed(image: np.ndarray, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An aligned face [SIDE, SIDE, 3] of a coarser picture in other light, mirrored or not, a little out of place."""
    landmarks = np.array(landmarks, np.float32)
    if rng.random() < 0.5:
        image, landmarks = image[:, ::-1], landmarks[FLIP_LANDMARKS]
        landmarks = np.stack([image.shape[1] - 1 - landmarks[:, 0], landmarks[:, 1]], 1)
    angle, zoom = rng.normal(0, 0.04), np.exp(rng.normal(0, 0.04))
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    x, y = 56 + rng.normal(0, 2.5, 2)
    change = np.array([[c, -s, x - 56 * c + 56 * s], [s, c, y - 56 * s - 56 * c]])
    scale = rng.uniform(0.35, 1)
    small = cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    image = cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    face = aligned(image, landmarks, change) * rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
    return np.clip(face + rng.normal(0, 0.02), 0, 1).astype(np.float32)


def faces_of(rows: Sequence[dict[str, Any]], copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """f32 [N * copies, P] of the rows' faces, changed by chance (0 copies: one each, as it is), and whose they are."""
    faces, owners = [], []
    for number, row in enumerate(rows):
        image, rng = read_image(row["path"]), np.random.default_rng(derive_seed(seed, "fisher", number))
        made = [changed(image, row["face_landmarks"], rng) for _ in range(copies)]
        faces += made or [aligned(image, row["face_landmarks"])]
        owners += [row["seed"]] * max(copies, 1)
    return np.stack(faces).reshape(len(faces), -1), np.array(owners)


def fit(faces: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean [P] and weight [P, D]: the directions with the most variance between people, where that within is 1."""
    _, index, counts = np.unique(owners, return_inverse=True, return_counts=True)
    mean, sums = faces.mean(0), np.zeros((len(counts), faces.shape[1]), np.float32)
    np.add.at(sums, index, faces)
    centres = sums / counts[:, None]
    off = faces - centres[index]
    within = (off.T @ off).astype(np.float64) / (len(faces) - len(counts))
    within += RIDGE * np.trace(within) / len(within) * np.eye(len(within))
    values, vectors = np.linalg.eigh(within)
    white = vectors / np.sqrt(values)
    between = (centres - mean) @ white
    directions = np.linalg.svd(between, full_matrices=False)[2][:DIMENSIONS].T
    return mean, (white @ directions).astype(np.float32)


def accepted(vectors: np.ndarray, owners: np.ndarray, rate: float = 0.01) -> dict[str, float]:
    """Cosines of unit vectors [N, D] of one person and of strangers, and the share of pairs of one person that is
    accepted where `rate` of strangers is."""
    cosine = vectors @ vectors.T
    pairs = np.triu(np.ones_like(cosine, bool), 1)
    same = (owners[:, None] == owners[None]) & pairs
    strangers = cosine[pairs & ~same]
    return {
        "cosine, one person": float(cosine[same].mean()),
        "cosine, strangers": float(strangers.mean()),
        "accepted at 1 % false accepts": float((cosine[same] > np.quantile(strangers, 1 - rate)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--people", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in read_truth(args.photos, people=args.people) if row["face_landmarks"]]
    mean, weight = fit(*faces_of(rows, COPIES, 0))
    figures = {}
    for framing in ("portrait", "full body"):
        held = [
            row for row in read_truth(args.val) if row["face_landmarks"] and row["attributes"]["framing"] == framing
        ]
        faces, owners = faces_of(held, 0, 1)
        figures[framing] = {"faces": len(faces)} | accepted(unit((faces - mean) @ weight), owners)
    config = {"people": args.people, "faces": len(rows), "copies": COPIES, "measured": figures}
    tensors = {"mean": torch.from_numpy(mean), "weight": torch.from_numpy(weight).half()}
    save_tensors(args.out, tensors, run_record(KIND, family=None, config=config))
    print(figures, f"{args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
