"""How well the body encoder tells held-out people apart, and how much of their proportions one can read off it.

    python examples/tiny_family/measure_body_encoder.py photos/val --train photos/train

Photos go the way of `bolid profile`. The photos of a person differ in clothes, pose, camera and place.

- rank-1: among 100 people, is the nearest person to some photos the same person in four *other* photos? Nearness is the
  cosine of the fused means; averaged over 20 draws of people and photos.
- R2: ridge regression from `body_mean` to each body ratio, learnt on training people, read for the held-out ones; mean
  of all ratios, averaged over 20 draws of photos.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from bolid.backends.body import BodyEncoder, fuse_views
from bolid.formats.images import read_photo
from bolid.method.metrics import r2_scores
from bolid.models.families import get_family
from bolid.views import View, ViewReader, person_crop

GALLERY = 4  # photos of each person that are searched
DRAWS = 20
READ_OUT_PEOPLE = 600  # training people that the read-out is learnt on


def encode_people(
    photos: Path, encoder: BodyEncoder, limit: int | None = None
) -> tuple[list[tuple[torch.Tensor, ...]], np.ndarray, list[str]]:
    """Each person's views (mean [M, D], logvar [M, D], confidence [M]), the true ratios [people, R] and their names."""
    family = get_family("tiny")
    reader = ViewReader(family)
    people, ratios, names = [], [], []
    for folder in sorted(path for path in photos.iterdir() if path.is_dir())[:limit]:
        files = sorted(folder.glob("*.jpg"))
        read = reader.read([read_photo(file) for file in files]) if files else []
        views = [view for view in read if isinstance(view, View)]
        if len(views) < 2:
            continue
        cut = [person_crop(view.image, view.box, view.keypoints, family.view_size) for view in views]
        features = [view.view_features for view in views] if encoder.needs_features else None
        people.append(encoder.encode([image for image, _, _ in cut], [points for _, _, points in cut], features))
        truth = json.loads(files[0].with_suffix(".json").read_text())["ratios"]
        names = list(truth)
        ratios.append([truth[name] for name in names])
    return people, np.array(ratios), names


def fused(people: list[tuple[torch.Tensor, ...]], rows: list[np.ndarray]) -> np.ndarray:
    """body_mean [people, D] of the given views of each person."""
    means = []
    for (mean, logvar, confidence), own in zip(people, rows, strict=True):
        means.append(fuse_views(mean[own], logvar[own], confidence[own])[0].numpy())
    return np.stack(means)


def rank_1(people: list[tuple[torch.Tensor, ...]], photos: int, among: int = 100, seed: int = 0) -> float:
    """The part of people found again from `photos` photos."""
    rng = np.random.default_rng(seed)
    eligible = [i for i, views in enumerate(people) if len(views[0]) >= photos + GALLERY]
    found = []
    for _ in range(DRAWS):
        drawn = [people[i] for i in rng.permutation(eligible)[:among]]
        orders = [rng.permutation(len(views[0])) for views in drawn]
        query = fused(drawn, [order[:photos] for order in orders])
        gallery = fused(drawn, [order[photos : photos + GALLERY] for order in orders])
        query, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery))
        found.append(np.mean((query @ gallery.T).argmax(1) == np.arange(len(drawn))))
    return float(np.mean(found))


def ratio_r2(
    people: list[tuple[torch.Tensor, ...]],
    ratios: torch.Tensor,
    train: tuple[list[tuple[torch.Tensor, ...]], torch.Tensor],
    photos: int,
    seed: int = 0,
) -> torch.Tensor:
    """R2 of each ratio, [R], for `people`; the read-out is learnt on `train` = (people, ratios).

    The ridge's penalty is chosen on a fifth of the training people.
    """
    rng = np.random.default_rng(seed)

    def means(of: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        return torch.from_numpy(fused(of, [rng.permutation(len(views[0]))[:photos] for views in of]))

    x, (fit_x, fit_y) = means(people), (means(train[0]), train[1])
    part = torch.arange(len(fit_x)) % 5 > 0
    penalties = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    scores = [float(r2_scores(fit_y[~part], read(fit_x[part], fit_y[part], fit_x[~part], p)).mean()) for p in penalties]
    return r2_scores(ratios, read(fit_x, fit_y, x, penalties[int(np.argmax(scores))]))


def read(bodies: torch.Tensor, ratios: torch.Tensor, new: torch.Tensor, penalty: float) -> torch.Tensor:
    """The ratios of the bodies `new` by a ridge regression learnt on (bodies, ratios)."""
    x, y = (part.double() - part.double().mean(0) for part in (bodies, ratios))
    y = y / ratios.double().std(0)
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return (new.double() - bodies.double().mean(0)) @ weight * ratios.double().std(0) + ratios.double().mean(0)


def measure(val: Path, train: Path, encoder_path: Path | None = None) -> dict[str, float]:
    """The figures of the body encoder; by default the tiny family's."""
    encoder = BodyEncoder(encoder_path or get_family("tiny").require("body_encoder"))
    people, truth, names = encode_people(val, encoder)
    ratios = torch.from_numpy(truth)
    known, known_ratios, _ = encode_people(train, encoder, READ_OUT_PEOPLE)
    words = {1: "one photo", 4: "four photos"}
    figures = {f"rank-1 among 100, {words[n]}": rank_1(people, n) for n in words}
    for n in words:
        learnt = known, torch.from_numpy(known_ratios)
        r2 = torch.stack([ratio_r2(people, ratios, learnt, n, seed) for seed in range(DRAWS)]).mean(0)
        figures[f"mean R2 of a linear read-out, {words[n]}"] = float(r2.mean())
        if n == 4:
            figures |= {f"R2 of {name}, four photos": value for name, value in zip(names, r2.tolist(), strict=True)}
    return {**figures, "people": len(people)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", type=Path)
    parser.add_argument("--train", type=Path, default=Path("photos/train"), help="for the read-out")
    parser.add_argument("--body-encoder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(args.val, args.train, args.body_encoder), indent=1))
