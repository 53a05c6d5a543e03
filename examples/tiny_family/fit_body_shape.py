"""Fit p(shape | c_body) of a body encoder, and write it beside the encoder: body-shape.safetensors.

    bolid synth --person-seed 30000:30300 --photos 8 --size 192x256 --out photos/shape
    bolid synth --person-seed 31000:31246 --photos 8 --size 192x256 --out photos/shape
    python examples/tiny_family/fit_body_shape.py photos/shape --head-photos photos/train \
        --out bolid/tiny/body-shape.safetensors

With `--head-photos` a head that reads the shape off photos is trained too (train_shape_head.py), on these people and
the others; c_body tells the shape where there are no photos any more. What the readings say is fitted on readings by
heads that did not know the person (eight folds).

With `--looks` what it claims is made true in looks that the photos do not have: both noises are multiplied by one
number, so that of the measurements of these people 68 % are within +-1 standard deviation, from one view and from all.
For the encoder of masks; render_masks.py renders such people, and neither it nor the fit may know them.

Photos go the way of `bolid profile` through the real body encoder; the people's shapes are known. Take people that the
encoder was not trained on: it knows its own too well, and would claim too much. Seeds of 100,000 and more are refused:
they are for figures. `--work` keeps what was encoded, so the same command goes on. About 0.8 s a person on one core.

What is printed is measured on a fifth of the people, fitted without them; the file is fitted on all.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from make_population import body_of
from mask_shards import view_of
from train_shape_head import components, train

from bolid.backends.body import BodyEncoder, fuse_views
from bolid.backends.pose import PoseModel
from bolid.backends.segmentation import Segmenter, load_segmenter
from bolid.body.body_vector import KIND, BodyVectors, ShapeReadings, fit, save_body_vectors
from bolid.body.measurements import MEASUREMENTS, NAMES
from bolid.body.shape import POWERS, measure_body, population
from bolid.errors import BolidError
from bolid.formats.images import read_photo
from bolid.method.shape_head import ShapeHead
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record
from bolid.views import choose_person, lowest_part, person_crop, whole_box

SEALED = 100_000
"""Seeds from here on are never fitted on."""
VIEWS = (1, 2, 4, 8)
FOLDS = 8
WITHIN = 0.6827  # +-1 standard deviation of a Gaussian


class Encoded(NamedTuple):
    """One person's M usable photos."""

    seed: int
    mean: torch.Tensor  # [M, D]
    logvar: torch.Tensor  # [M, D]
    confidence: torch.Tensor  # [M]
    evidence: torch.Tensor  # f16 [M, E], what the encoder sees
    down_to: np.ndarray  # [M], the lowest part that each shows
    pose: np.ndarray  # [M], its true pose

    def fused(self, rows: Sequence[int], head: ShapeHead | None = None) -> tuple[np.ndarray, np.ndarray]:
        """body_mean, body_logvar [D] of these photos, N(0, I) their prior; with a head its readings [R]."""
        rows = list(rows)
        views = (self.mean[rows], self.logvar[rows]) if head is None else head(self.evidence[rows].float())
        mean, logvar, _ = fuse_views(*views, self.confidence[rows])
        return mean.double().numpy(), logvar.double().numpy()

    def upright(self) -> list[int]:
        """The photos that show a whole person who does not squat."""
        return [i for i in range(len(self.down_to)) if self.down_to[i] == "feet" and self.pose[i] != "squatting"]


def encode(
    photos: Path, encoder: BodyEncoder, work: Path, most: int | None = None, each: int | None = None
) -> list[Encoded]:
    """The first `most` people under `photos`, or all, `each` with so many photos; encoded once and kept in `work`."""
    family = get_family("tiny")
    models = PoseModel(family.require("pose")), load_segmenter(family.require("segmentation"))
    folder = work / encoder.sha256[:12]
    folder.mkdir(parents=True, exist_ok=True)
    people = []
    for person in sorted(path for path in photos.iterdir() if path.is_dir())[:most]:
        kept = folder / f"{person.name}.npz"
        if not kept.exists():
            _encode_person(sorted(person.glob("*.jpg"))[:each], encoder, models, family.view_size, kept)
        with np.load(kept) as stored:
            parts = {name: stored[name] for name in stored.files}
        if len(parts["mean"]):
            tensors = (torch.from_numpy(parts[name]) for name in ("mean", "logvar", "confidence", "evidence"))
            people.append(Encoded(int(person.name[1:]), *tensors, parts["down"], parts["pose"]))
    return people


def _encode_person(
    files: Sequence[Path],
    encoder: BodyEncoder,
    models: tuple[PoseModel, Segmenter],
    size: tuple[int, int],
    kept: Path,
) -> None:
    pose, segmenter = models
    cut, points, masks, down, poses, index = [], [], [], [], [], []
    for i, file in enumerate(files):
        image = read_photo(file)
        found = choose_person(pose.detect([image])[0], "main")
        if isinstance(found, str):
            continue
        keypoints, box = found.keypoints.astype(np.float32), whole_box(found, image.shape[:2])
        crop, _, moved = person_crop(image, box, keypoints, size)
        if encoder.needs_masks:
            masks.append(segmenter.segment(image, box, keypoints))
            if masks[-1] is None:
                masks.pop()
                continue
        cut.append(crop)
        points.append(moved)
        down.append(lowest_part(keypoints))
        index.append(i)
        poses.append(json.loads(file.with_suffix(".json").read_text())["attributes"]["pose"])
    mean = logvar = np.zeros((0, encoder.body_dim), np.float32)
    confidence, evidence = np.zeros(0, np.float32), np.zeros((0, encoder.model.evidence_dim), np.float16)
    if cut:
        seen, sure = encoder.mask_evidence(masks) if encoder.needs_masks else encoder.evidence(cut, points)
        evidence, confidence = seen.half().numpy(), sure.numpy()
        mean, logvar = (part.numpy() for part in encoder.gaussians(seen))
    temporary = kept.with_suffix(".tmp.npz")
    np.savez(temporary, mean=mean, logvar=logvar, confidence=confidence, evidence=evidence,
             down=np.array(down), pose=np.array(poses), index=np.array(index))  # fmt: skip
    temporary.replace(kept)


def encode_looks(masks: Path, encoder: BodyEncoder) -> list[Encoded]:
    """People in looks of their own, as render_masks.py writes them, with the errors that networks make."""
    people = []
    for file in sorted(masks.glob("[0-9]*[0-9].npz")):
        with np.load(file) as stored:
            parts = [stored[name] for name in ("seeds", "masks", "keypoints")]
        for seed, bits, keypoints in zip(*parts, strict=True):
            rngs = [np.random.default_rng(derive_seed(int(seed), "looks", index)) for index in range(len(bits))]
            made = [view_of(*view) for view in zip(bits, keypoints, rngs, strict=True)]
            views = [view for view in made if view is not None]
            if views:
                seen, sure = encoder.mask_evidence(views)
                down = np.array([lowest_part(view.keypoints) for view in views])
                people.append(
                    Encoded(int(seed), *encoder.gaussians(seen), sure, seen, down, np.array([""] * len(views)))
                )
    return people


def widened(model: BodyVectors, people: Sequence[Encoded]) -> tuple[BodyVectors, float]:
    """The model with both noises multiplied by a number, and the number: of what `people` measure 68 % are within +-1
    standard deviation, from one view of each and from all.
    """
    first = [
        person._replace(**{name: getattr(person, name)[:1] for name in Encoded._fields if name != "seed"})
        for person in people
    ]
    none = [None] * (2 * len(people))
    low, high = 0.5, 20.0
    while high / low > 1.02:
        scale = (low * high) ** 0.5
        wide = replace(model, noise=scale * model.noise, photo_noise=scale * model.photo_noise)
        inside = np.mean([part for _, part in errors(wide, [*people, *first], none).values()])
        low, high = (scale, high) if inside < WITHIN else (low, scale)
    return wide, scale


def cross_fitted(people: Sequence[Encoded], others: Sequence[Encoded]) -> tuple[list[ShapeHead], ShapeHead]:
    """(for each of `people` a head that was trained without them, the head trained on everybody)."""
    everybody = [*people, *others]
    evidence = torch.zeros(len(everybody), max(VIEWS), people[0].evidence.shape[1])
    confidence = torch.zeros(len(everybody), max(VIEWS))
    for i, person in enumerate(everybody):
        count = min(max(VIEWS), len(person.confidence))
        evidence[i, :count], confidence[i, :count] = person.evidence[:count].float(), person.confidence[:count]
    target = torch.from_numpy(components([person.seed for person in everybody])).float()
    fold = torch.tensor([i % FOLDS for i in range(len(people))] + [FOLDS] * len(others))
    heads = [train(evidence[fold != k], confidence[fold != k], target[fold != k]) for k in range(FOLDS)]
    return [heads[i % FOLDS] for i in range(len(people))], train(evidence, confidence, target)


def views_of(
    people: Sequence[Encoded], heads: Sequence[ShapeHead | None], seed: int = 0
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Number of views -> (mean, logvar) [N, D] of so many photos of each, drawn at random."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(person.mean)) for person in people]
    fused = {}
    for count in VIEWS:
        rows = [person.fused(order[:count], head) for person, order, head in zip(people, orders, heads, strict=True)]
        fused[count] = (np.stack([mean for mean, _ in rows]), np.stack([logvar for _, logvar in rows]))
    return fused


@functools.cache
def truth_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters [P] and measurements [K] of a synthetic person."""
    body = body_of(seed)
    return body, measure_body(body[None])[0]


def fit_vectors(people: Sequence[Encoded], record: dict, heads: Sequence[ShapeHead | None]) -> BodyVectors:
    """The model of c_body (head: None), or of a head's readings, from people whose shapes their seeds tell."""
    bodies, sizes = (np.stack(rows) for rows in zip(*(truth_of(person.seed) for person in people), strict=True))
    return BodyVectors(*fit(bodies, sizes, views_of(people, heads), population().shape), record)


def errors(model: BodyVectors, people: Sequence[Encoded], heads: Sequence[ShapeHead | None]) -> dict[str, list[float]]:
    """Of each measurement of `people`, at their true stature: mean absolute error in cm (kg) and coverage of +-1 sd."""
    start, off, sd = population(), [], []
    for person, head in zip(people, heads, strict=True):
        state, covariance = model.posterior(start.shape, *person.fused(range(len(person.mean)), head))
        truth, sizes = truth_of(person.seed)
        size = truth[0] ** POWERS
        rows = np.concatenate([start.slope, np.eye(len(NAMES))], 1) * size[:, None]
        rows[:, 0] = 0
        state[0] = 0
        off.append(rows @ state + start.intercept * size - sizes)
        sd.append(np.sqrt(np.einsum("ks,st,kt->k", rows, covariance, rows).clip(1e-12)))
    scale = np.array([row.scale for row in MEASUREMENTS])
    mean, inside = np.abs(off).mean(0) * scale, (np.abs(off) < sd).mean(0)
    return {name: [round(float(mean[k]), 2), round(float(inside[k]), 2)] for k, name in enumerate(NAMES) if k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="photos/<person>/*.jpg with their truth beside them")
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    parser.add_argument("--people", type=int, help="the first so many")
    parser.add_argument("--photos-each", type=int, help="of a person, the first so many")
    parser.add_argument("--looks", type=Path, help="masks of others in looks that the photos do not have")
    parser.add_argument("--head-photos", type=Path, help="train a head too, on these people and the others")
    parser.add_argument("--head-people", type=int, help="so many of these people")
    parser.add_argument("--work", type=Path, default=Path("runs/body-shape"), help="what was encoded")
    parser.add_argument("--out", type=Path, default=Path("bolid/tiny/body-shape.safetensors"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder"))
    people = encode(args.photos, encoder, args.work, args.people, args.photos_each)
    others = encode(args.head_photos, encoder, args.work, args.head_people) if args.head_photos else []
    if any(person.seed >= SEALED for person in [*people, *others]):
        raise BolidError(f"people of {SEALED} and more are for figures", "fit on others")
    seeds = [person.seed for person in people]
    config: dict[str, object] = {"people": len(people), "seeds": [min(seeds), max(seeds)]}
    none = [None] * len(people)
    left_out = {"c_body": _left_out(people, none)}
    readings = None
    if args.head_photos:
        config["head"] = {"people": len(others), "seeds": [others[0].seed, others[-1].seed]}
        heads, head = cross_fitted(people, others)
        left_out["head"] = _left_out(people, heads)
        readings = ShapeReadings(head, fit_vectors(people, {}, heads))
    vectors = fit_vectors(people, {}, none)
    if args.looks:
        looks = encode_looks(args.looks, encoder)
        vectors, config["noise"] = widened(vectors, looks)
        config["looks"] = {"people": len(looks), "seeds": [looks[0].seed, looks[-1].seed]}
    record = run_record(KIND, family="tiny", config=config, inputs=encoder.inputs)
    save_body_vectors(args.out, replace(vectors, record=record), readings)
    print(json.dumps({"left out": left_out, "size": args.out.stat().st_size, **config}, indent=1))


def _left_out(people: Sequence[Encoded], heads: Sequence[ShapeHead | None]) -> dict[str, list[float]]:
    """`errors` of a fifth of the people, whom the model is not fitted on."""
    inside = [i for i in range(len(people)) if i % 5]
    model = fit_vectors([people[i] for i in inside], {}, [heads[i] for i in inside])
    return errors(model, people[::5], heads[::5])


if __name__ == "__main__":
    main()
