"""How well body encoders read bodies off photos that differ from the training's: the read-out R2 of each set of photos.

    python examples/tiny_family/measure_mask_encoder.py --train photos/train --encoder masks=body-encoder.safetensors \\
        --encoder colour=bolid/tiny/body-encoder.safetensors  own=photos/val unseen=work/unseen far=work/far

Photos go the way of `bolid profile`, by the tiny family's pose and segmentation networks; "known pose": with the true
keypoints instead, as far off as that network's are on renders, which shows what is the encoder's own. R2 of ridge
regression from `body_mean` of up to four photos to each body ratio, learnt on training people as
`measure_body_encoder.py` does, mean over 20 draws of photos; the standard error is over people (jackknife). With
--masks also the masks' intersection over union with the renderer's own, and GrabCut's. What is read is kept in --work.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from fit_body_shape import Encoded, errors
from mask_shards import NOISE
from measure_body_encoder import DRAWS, fused, ratio_r2, read
from PIL import Image
from unseen_looks import loose_plan

from bolid.backends.body import BodyEncoder
from bolid.backends.pose import Detection, PoseModel
from bolid.backends.segmentation import Segmenter, load_segmenter
from bolid.backends.silhouette import silhouette
from bolid.body.body_vector import load_body_vectors
from bolid.formats.images import read_photo
from bolid.method.mask_views import MASK_SIZE, MaskView
from bolid.method.metrics import r2_scores
from bolid.models.families import Family, get_family
from bolid.run import derive_seed
from bolid.synth.people import sample_person, sample_plan
from bolid.synth.render import Renderer
from bolid.views import choose_person, person_crop, whole_box

PHOTOS = 4
SIZE = (256, 192)


def true_person(file: Path, rng: np.random.Generator) -> Detection:
    """The person of a photo by its truth, the keypoints as far off as the tiny family's network has them on renders."""
    truth = json.loads(file.with_suffix(".json").read_text())
    points = np.array(truth["keypoints"], np.float32)
    torso = max(float(np.linalg.norm(points[[5, 6], :2].mean(0) - points[[11, 12], :2].mean(0))), 20.0)
    points[:, :2] += torso * NOISE[:, None] / 2 * rng.normal(size=(17, 2))
    points[:, 2] = np.where(points[:, 2] > 0, 0.95, 0.0)
    return Detection(np.array(truth["box"], np.float32), 1.0, points)


def read_person(
    folder: Path, family: Family, pose: PoseModel | None, segmenter: Segmenter, limit: int
) -> dict[str, Any]:
    """The views of a person's first `limit` photos, as both kinds of encoder take them, and the true ratios.

    Without a `pose` network the true keypoints are taken, with noise.
    """
    rng = np.random.default_rng(derive_seed(0, "keypoints", folder.name))
    parts: dict[str, list[Any]] = {name: [] for name in ("mask", "mask_keypoints", "crop", "points", "photo")}
    ratios = np.zeros(0)
    for index, file in enumerate(sorted(folder.glob("*.jpg"))[:limit]):
        ratios = np.array([*json.loads(file.with_suffix(".json").read_text())["ratios"].values()])
        image = read_photo(file)
        person = choose_person(pose.detect([image])[0], "main") if pose else true_person(file, rng)
        if isinstance(person, str):
            continue
        box, keypoints = whole_box(person, image.shape[:2]), person.keypoints.astype(np.float32)
        view = segmenter.segment(image, box, keypoints)
        if view is None:
            continue
        crop, _, points = person_crop(image, box, keypoints, family.view_size)
        for name, value in (*view.tensors().items(), ("crop", crop), ("points", points), ("photo", index)):
            parts[name].append(value)
    return {**{name: np.array(values) for name, values in parts.items()}, "ratios": ratios}


def read_people(
    photos: Path, family: Family, segmentation: Path, work: Path, people: int, known_pose: bool = False
) -> list[dict]:
    """Everybody with two usable photos; each person is read once and kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    pose, segmenter = None if known_pose else PoseModel(family.require("pose")), load_segmenter(segmentation)
    found = []
    for folder in sorted(path for path in photos.iterdir() if path.is_dir())[:people]:
        kept = work / f"{folder.name}.npz"
        if not kept.exists():
            person = read_person(folder, family, pose, segmenter, PHOTOS)
            temporary = kept.with_suffix(".tmp.npz")
            np.savez(temporary, **person)
            temporary.replace(kept)
        with np.load(kept) as stored:
            person = {name: stored[name] for name in stored.files}
        if len(person["photo"]) >= 2:
            found.append({**person, "seed": int(folder.name[1:])})
    return found


def encode(people: list[dict], encoder: BodyEncoder) -> list[tuple[torch.Tensor, ...]]:
    """mean [M, D], logvar [M, D], confidence [M] of each person's views."""
    if encoder.needs_masks:
        return [
            encoder.encode_masks(
                [
                    MaskView(np.unpackbits(bits).reshape(MASK_SIZE).astype(bool), points)
                    for bits, points in zip(person["mask"], person["mask_keypoints"], strict=True)
                ]
            )
            for person in people
        ]
    return [encoder.encode([*person["crop"]], [*person["points"]]) for person in people]


def readout_r2(views: list, ratios: torch.Tensor, train: tuple[list, torch.Tensor], photos: int) -> tuple[float, float]:
    """(mean R2 over ratios and draws, its standard error over people by the jackknife on one draw)."""
    mean = torch.stack([ratio_r2(views, ratios, train, photos, seed) for seed in range(DRAWS)]).mean()
    x = torch.from_numpy(fused(views, [np.arange(len(view[0]))[:photos] for view in views]))
    fit = torch.from_numpy(fused(train[0], [np.arange(len(view[0]))[:photos] for view in train[0]]))
    predicted = read(fit, train[1], x, 10.0)
    rows = torch.arange(len(x))
    left_out = torch.stack([r2_scores(ratios[rows != i], predicted[rows != i]).mean() for i in rows])
    error = ((len(x) - 1) * left_out.var(unbiased=False)).sqrt()
    return float(mean), float(error)


def in_centimetres(people: list[dict], views: list, encoder: BodyEncoder, file: Path, photos: int) -> dict[str, Any]:
    """Of each measurement, the stature known: mean absolute error in cm (kg), and the fraction within the given ±1
    standard deviation; from the first `photos` of each.
    """
    made = []
    for person, own in zip(people, views, strict=True):
        mean, logvar, confidence = (part[:photos] for part in own)
        unused = torch.zeros(len(mean), 0), np.zeros(len(mean)), np.zeros(len(mean))
        made.append(Encoded(person["seed"], mean, logvar, confidence, *unused))
    found = errors(load_body_vectors(file, encoder.space), made, [None] * len(made))
    return {**found, "within": round(float(np.mean([inside for _, inside in found.values()])), 3)}


def overlaps(photos: Path, family: Family, segmenter: Segmenter, unseen: bool, people: int) -> dict[str, list[float]]:
    """Intersection over union with the renderer's own masks of each person's first two photos: [mean, 10th percentile]
    of the network and of GrabCut, both started from the pose network's person.
    """
    pose = PoseModel(family.require("pose"))
    found: dict[str, list[float]] = {"network": [], "GrabCut": []}
    for folder in sorted(path for path in photos.iterdir() if path.is_dir())[:people]:
        renderer = Renderer(sample_person(int(folder.name[1:])), SIZE)
        for index in range(2):
            image = read_photo(folder / f"{index:03d}.jpg")
            person = choose_person(pose.detect([image])[0], "main")
            if isinstance(person, str):
                continue
            plan = loose_plan(renderer.person, index)[0] if unseen else sample_plan(renderer.person, index)
            box, keypoints = whole_box(person, image.shape[:2]), person.keypoints.astype(np.float32)
            true = MaskView.cut(renderer.outline(plan)[0], keypoints).mask
            view = segmenter.segment(image, box, keypoints)
            cut = silhouette(image, box, keypoints)[0]
            rough = MaskView.cut(np.asarray(Image.fromarray(cut).resize(image.shape[1::-1])), keypoints).mask
            for name, mask in (("network", np.zeros_like(true) if view is None else view.mask), ("GrabCut", rough)):
                found[name].append(float((mask & true).sum() / (mask | true).sum()))
    return {name: [round(float(np.mean(v)), 4), round(float(np.quantile(v, 0.1)), 4)] for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=PHOTOS")
    parser.add_argument("--train", type=Path, required=True, help="photos for the read-out")
    parser.add_argument("--train-people", type=int, default=400)
    parser.add_argument("--people", type=int, default=100, help="of each set")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--body-shape", type=Path, help="of the encoder: measure centimetres too")
    parser.add_argument("--segmentation", type=Path, help="by default the tiny family's")
    parser.add_argument("--masks", type=int, default=0, metavar="PEOPLE", help="measure the masks of so many people")
    parser.add_argument("--work", type=Path, default=Path("runs/mask-encoder"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = get_family("tiny")
    segmentation = args.segmentation or family.require("segmentation")
    known = read_people(args.train, family, segmentation, args.work / "train", args.train_people)
    sets = {}
    if args.masks:
        segmenter = load_segmenter(segmentation)
        for name, _, photos in (text.partition("=") for text in args.sets):
            if name != "far":  # their bodies are not those of their seeds
                figures = overlaps(Path(photos), family, segmenter, name == "unseen", args.masks)
                print(json.dumps({"photos": name, "IoU, its 10th percentile": figures}), flush=True)
    for text in args.sets:
        name, _, photos = text.partition("=")
        for how, known_pose in (("", False), (", known pose", True)):
            work = args.work / (name + how).replace(", ", "-").replace(" ", "-")
            sets[name + how] = read_people(Path(photos), family, segmentation, work, args.people, known_pose)
    for text in args.encoder:
        name, _, file = text.partition("=")
        encoder = BodyEncoder(file)
        train = encode(known, encoder), torch.from_numpy(np.stack([person["ratios"] for person in known]))
        for which, people in sets.items():
            ratios = torch.from_numpy(np.stack([person["ratios"] for person in people]))
            views = encode(people, encoder)
            figures = {f"{n} photos": [round(v, 3) for v in readout_r2(views, ratios, train, n)] for n in (1, PHOTOS)}
            print(
                json.dumps({"encoder": name, "photos": which, "people": len(people), "R2, error": figures}), flush=True
            )
            for n in (1, PHOTOS) if args.body_shape and not which.startswith("far") else ():
                sizes = in_centimetres(people, views, encoder, args.body_shape, n)
                print(json.dumps({"photos": which, "number": n, "cm, within ±1 sd": sizes}), flush=True)


if __name__ == "__main__":
    main()
