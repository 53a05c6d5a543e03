"""How far the 3D body in the pictures is from the person's, in millimetres and centimetres, beside the same of photos.

A reader (shape_reader.py) reads a body off one person's pictures. It reads as many of the person's held-out photos too:
what is wrong with those is the reader's own error, the floor. Neither shows size, so both bodies get the true stature.

Shapes: N pictures, M photos, V numbers that a reader keeps of a picture, P parameters of a body, K measurements.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bolid.evaluate.results import Metric, PictureScores
from bolid.method.metrics import bootstrap_mean

if TYPE_CHECKING:
    from bolid.evaluate.pictures import Picture
    from bolid.evaluate.references import References
    from bolid.evaluate.shape_reader import ShapeReader

SHAPE, FLOOR = "body_shape_mm", "body_shape_floor_mm"


def known_bodies(
    photos: Sequence[Picture], profiles: Sequence[str | os.PathLike[str]], people: Sequence[str]
) -> dict[str, np.ndarray]:
    """Person -> parameters [P] of the body: a synthetic person's true one, else that of a profile with measurements.

    A profile belongs to the person of its name, or to the only one.
    """
    found = {}
    for photo in photos:
        if photo.person not in found and (body := _true_body(Path(photo.source))) is not None:
            found[photo.person] = body
    for path in profiles:
        person = people[0] if len(people) == 1 else Path(path).stem
        if person in people and person not in found and (body := _measured_body(path)) is not None:
            found[person] = body
    return found


def _true_body(photo: Path) -> np.ndarray | None:
    """The body of the synthetic person in a photo; None without its truth beside it."""
    from bolid.formats.parsing import parse_json

    try:
        truth = parse_json(photo.with_suffix(".json").read_text(encoding="utf-8"))
        seed, phenotypes = int(truth["seed"]), truth["phenotypes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    from bolid.body.mesh import parameters_of
    from bolid.body.shape import of_sex, population
    from bolid.synth.people import sample_person

    person = sample_person(seed)
    if person.phenotypes != phenotypes:
        return None
    sex = "woman" if phenotypes["gender"] > 0.5 else "man"
    return parameters_of(person.phenotypes, person.local_changes, float(of_sex(population().shape, sex).mean[0]))


def _measured_body(path: str | os.PathLike[str]) -> np.ndarray | None:
    """The body of a profile into which measurements went; None for others, which only pictures tell of."""
    from bolid.body.profiles import shape_in
    from bolid.formats.profile import load_profile

    profile = load_profile(path)
    if profile.body is None or not (shape := shape_in(profile, None)).known:
        return None
    return shape.mean


def shape_metrics(
    scored: PictureScores, references: References, views: torch.Tensor, reader: ShapeReader | None
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """(body_shape_mm and its floor, measurement -> {"true", "pictures", "error", "floor"}); `views` f32 [N, V].

    As many pictures as photos are read of each person, the first of both. Sizes are in cm, the weight in kg; "error"
    and "floor" are mean absolute errors over people. Adds each person's distances to `scored`.
    """
    by = reader.name if reader is not None else "nothing: the family has no body encoder that knows shapes"
    missing = "needs the true body of synthetic people, or a --profile with measurements"
    rows = {person: _pairs(scored.people, person, references, views) for person in references.bodies}
    people = {person: pair for person, pair in rows.items() if len(pair[0])}
    if reader is None or not people:
        return {key: Metric(None, 0, by, missing if reader is not None else "") for key in (SHAPE, FLOOR)}, {}
    distances, sizes = _read_all(people, references.bodies, reader)
    count = sum(len(made) for made, _ in people.values())
    metrics = {}
    for key, column in ((SHAPE, 0), (FLOOR, 1)):
        scored.per_person[key] = {
            person: float(value) for person, value in zip(people, distances[:, column], strict=True)
        }
        value, low, high = bootstrap_mean(torch.from_numpy(distances[:, column]))
        ends = (low, high) if low == low else (None, None)
        what = "pictures" if key == SHAPE else "held-out photos"
        note = f"n is people; {count} {what}"
        metrics[key] = Metric(float(value), len(people), by, note, *ends)
    return metrics, _errors(sizes)


def _pairs(
    owners: Sequence[str], person: str, references: References, views: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a person's pictures and photos, equally many of both: [n, V] each."""
    made = views[[i for i, owner in enumerate(owners) if owner == person]]
    real = references.views[references.owner == references.people.index(person)]
    made, real = (part[~part.isnan().any(1)] for part in (made, real))
    count = min(len(made), len(real))
    return made[:count], real[:count]


def _read_all(
    people: Mapping[str, tuple[torch.Tensor, torch.Tensor]], truth: Mapping[str, np.ndarray], reader: ShapeReader
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm [people, 2] of pictures and photos; measurements [people, 3, K], true, of pictures, of photos."""
    from bolid.body.mesh import body_model, vertex_distances
    from bolid.body.shape import measure_body, within_bounds

    distances, sizes = [], []
    for person, pair in people.items():
        bodies = np.stack([truth[person], *(reader.body(part) for part in pair)])
        bodies[:, 0] = truth[person][0]  # pictures show no size
        meshes = body_model().rest(within_bounds(bodies))
        distances.append([1000 * vertex_distances(mesh, meshes[0]).mean() for mesh in meshes[1:]])
        sizes.append(measure_body(bodies))
    return np.array(distances), np.array(sizes)


def _errors(sizes: np.ndarray) -> dict[str, dict[str, float]]:
    from bolid.body.measurements import MEASUREMENTS

    found = {}
    for k, row in enumerate(MEASUREMENTS):
        if row.name == "height":
            continue
        true, made, real = row.scale * sizes[:, :, k].T
        error, floor = (float(np.abs(part - true).mean()) for part in (made, real))
        found[row.name] = {"true": float(true.mean()), "pictures": float(made.mean()), "error": error, "floor": floor}
    return found
