"""`bolid evaluate`: how well generated pictures follow their prompts and keep a person's body."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.families import Family, get_family

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]
FEW = 2048


@dataclass(frozen=True)
class Metric:
    """One figure: its value (None where it could not be measured), the pictures behind it, and what measured it."""

    value: float | None
    n: int
    measured_by: str
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    pictures: int
    references: int
    metrics: dict[str, Metric]
    ratios: dict[str, dict[str, float]]
    """Body ratios by name: {"true", "pictures"} (the mean of the probe's readings); empty without ground truth."""
    rejected: dict[str, list[str]]


def evaluate(
    generated: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    family: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Score the PNGs in `generated` (their run records name the prompts) against photos of one person in `reference`.

    Metrics: `text_score`, the cosine of picture and prompt (-1..1); `bone_ratio_error`, the mean absolute difference of
    the mean bone ratios over the references' (both by the pose model); `body_ratio_error`, the mean relative error of
    the probe's mean reading against the ground truth beside the photos (synthetic people only, families with a probe);
    `person_found`, the share of pictures with a person; `fid` (BoLID Eq. 15) on the image tower's embeddings.
    Pictures that cannot be read are listed and the rest is scored. Raises BolidError when nothing can be.
    """
    import torch

    from bolid.backends.image_text import ImageTextModel
    from bolid.backends.pose import PoseModel
    from bolid.formats.images import list_photos
    from bolid.method.metrics import bone_ratios, frechet_distance
    from bolid.run import pick_device

    generated, reference = Path(generated), Path(reference)
    if generated.exists() and reference.exists() and generated.samefile(reference):
        raise BolidError("the generated pictures and the reference photos are the same folder", "give two folders")
    chosen = get_family(family)
    device = pick_device(device)
    rejected: dict[str, list[str]] = {}
    paths, images = _read(_pictures(generated), rejected)
    reference_paths, reference_images = _read([path for _, path in list_photos(reference)], rejected)
    if not images or not reference_images:
        which = generated if not images else reference
        raise BolidError(f"none of the pictures in {which} can be read", "give a folder of PNG or JPEG pictures")
    steps = 4
    tell = progress or (lambda done, total, text: None)

    tell(0, steps, "reading pictures")
    image_text = ImageTextModel(chosen.require("image_text"), device)
    embeds = image_text.encode_images(images).float().cpu()
    reference_embeds = image_text.encode_images(reference_images).float().cpu()
    prompts = [_prompt(path) for path in paths]
    with_prompt = [i for i, prompt in enumerate(prompts) if prompt]
    metrics: dict[str, Metric] = {}
    tower = f"open_clip model of family {chosen.name}"
    if with_prompt:
        texts = image_text.encode_text([prompts[i] for i in with_prompt]).float().cpu()
        score = float((embeds[with_prompt] * texts).sum(-1).mean())
        metrics["text_score"] = Metric(score, len(with_prompt), tower)
    else:
        metrics["text_score"] = Metric(None, 0, tower, "no picture carries its prompt")

    tell(1, steps, "finding bodies")
    pose = PoseModel(chosen.require("pose"), device)
    people, reference_people = (
        [found[0] for found in pose.detect(many) if found] for many in (images, reference_images)
    )
    metrics["person_found"] = Metric(len(people) / len(images), len(images), f"pose model of family {chosen.name}")
    means = [
        torch.nanmean(bone_ratios(torch.stack([torch.from_numpy(p.keypoints) for p in found])), 0) if found else None
        for found in (people, reference_people)
    ]
    error = None if means[0] is None or means[1] is None else float(torch.nanmean((means[0] - means[1]).abs()))
    if error is not None and error != error:
        error = None
    note = "" if error is not None else "no whole body on both sides"
    metrics["bone_ratio_error"] = Metric(error, len(people), f"pose model of family {chosen.name}", note)

    tell(2, steps, "measuring bodies")
    ratios, metric = _body_ratio_error(chosen, device, images, reference_paths)
    metrics["body_ratio_error"] = metric

    tell(3, steps, "comparing distributions")
    count = min(len(embeds), len(reference_embeds))
    if count >= 2:
        few = f"of {count} pictures: all bias below {FEW}; compare only equal counts" if count < FEW else ""
        metrics["fid"] = Metric(frechet_distance(embeds, reference_embeds), count, tower, few)
    else:
        metrics["fid"] = Metric(None, count, tower, "needs two pictures or more on both sides")
    tell(steps, steps, "done")
    return Evaluation(len(images), len(reference_images), metrics, ratios, rejected)


def _pictures(folder: Path) -> list[Path]:
    from bolid.formats.images import PHOTO_SUFFIXES

    if not folder.is_dir():
        raise BolidError(f"there is no folder {folder}", "give the folder that `bolid generate --out` wrote")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise BolidError(f"no pictures in {folder}", "give the folder that `bolid generate --out` wrote")
    return paths


def _read(paths: list[Path], rejected: dict[str, list[str]]) -> tuple[list[Path], list[np.ndarray]]:
    from bolid.formats.images import read_photo

    good, images = [], []
    for path in paths:
        try:
            images.append(read_photo(path, max_side=1536))
            good.append(path)
        except BolidError as error:
            rejected.setdefault(error.message, []).append(str(path))
    return good, images


def _prompt(path: Path) -> str:
    """The prompt in a picture's run record, "" where there is none."""
    from bolid.formats.images import open_image

    with open_image(path.read_bytes()) as image:
        text = getattr(image, "text", {}).get("bolid", "")
    try:
        return str(json.loads(text)["config"]["prompt"])
    except (ValueError, KeyError, TypeError):
        return ""


def _truth(paths: list[Path]) -> dict[str, float]:
    """The ground-truth ratios beside the photos of a synthetic person; {} for others and several people."""
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            found.append(json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["ratios"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
    return found[0] if found and all(ratios == found[0] for ratios in found) else {}


def _body_ratio_error(
    family: Family, device: str, images: list[np.ndarray], reference_paths: list[Path]
) -> tuple[dict[str, dict[str, float]], Metric]:
    truth = _truth(reference_paths)
    if not truth:
        return {}, Metric(None, 0, "body probe", "needs the ground truth of one synthetic person beside the photos")
    if family.probe is None or not family.probe.exists():
        return {}, Metric(None, 0, "body probe", f"family {family.name} has no probe")
    from bolid.backends.probe import BodyProbe

    probe = BodyProbe(family.probe, device)
    mean = probe.predict(images).mean(0)
    ratios = {
        name: {"true": truth[name], "pictures": float(value)}
        for name, value in zip(probe.ratio_names, mean, strict=True)
        if name in truth
    }
    error = sum(abs(r["pictures"] / r["true"] - 1) for r in ratios.values()) / len(ratios)
    return ratios, Metric(error, len(images), f"body probe of family {family.name}")
