"""From scores of single pictures to the metrics of a folder: means, errors of each person's body, distributions.

Shapes: N pictures, M reference photos, P people, W width profile, R body readings or ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bolid.evaluate.evaluators import Evaluators
from bolid.evaluate.picture_scores import ReferenceScores
from bolid.evaluate.references import References
from bolid.evaluate.results import FALSE_ACCEPT_RATE, PER_PICTURE, Metric, PictureScores
from bolid.method.distributions import InceptionScore, frechet_intervals, kernel_distance
from bolid.method.feature_statistics import FeatureStatistics
from bolid.method.metrics import (
    ENDS,
    MIN_GROUPS,
    Interval,
    bone_ratios,
    bone_weights,
    bootstrap_mean,
    correlation_interval,
    resamples,
    weighted_mean,
)

REPLICATES = 1000
MIN_FID_PICTURES = 2048  # with fewer, FID is mostly bias
MIN_CORRELATION_PEOPLE = 5


def to_metric(interval: Interval, n: int, measured_by: str, note: str = "") -> Metric:
    """A Metric; nan becomes None."""
    value, low, high = (None if math.isnan(x) else float(x) for x in interval)
    return Metric(value, n, measured_by, note, low, high)


def person_numbers(people: Sequence[str]) -> torch.Tensor:
    """Each picture's person as a number, [N], for the bootstrap over people."""
    names = sorted(set(people))
    return torch.tensor([names.index(person) for person in people])


# ---- means over pictures ------------------------------------------------------------------------------------------


def mean_metrics(
    scored: PictureScores, reference_scores: ReferenceScores, evaluators: Evaluators, has_base: bool
) -> dict[str, Metric]:
    """The metrics that are means over pictures; names the diversity's evaluator in `scored.scores`."""
    diversity = "lpips_diversity" if evaluators.lpips else "tower_lpips_diversity"
    measured_by = _measured_by(evaluators, diversity)
    missing = _missing_notes(diversity, has_base, bool(reference_scores.conditioning))
    notes = {}
    with_face = float(scored.scores["face_found"].nanmean())
    notes["face_similarity"] = f"of the {with_face:.0%} of pictures in which a face is found"
    if reference_scores.threshold is not None:
        impostors = len(reference_scores.impostors)
        notes["face_tar"] = f"above {reference_scores.threshold:.3f}; of {impostors} comparisons of strangers"
        if impostors < 1 / FALSE_ACCEPT_RATE:
            notes["face_tar"] += ", too few for this rate"
    if (people := len(reference_scores.people_with_body)) > 1:
        notes["body_rank1"] = f"of {people} people; chance is {1 / people:.3f}"
    groups = person_numbers(scored.people)
    metrics = {}
    for score in PER_PICTURE:
        values = scored.scores[score]
        key = diversity if score == "diversity" else score
        scored.scores.setdefault(key, values)
        n = int((~values.isnan()).sum())
        note = notes.get(key, "") if n else missing.get(key, "")
        metrics[key] = to_metric(bootstrap_mean(values, groups, REPLICATES), n, measured_by[key], note)
    scored.scores.pop("diversity", None)
    return metrics


def _measured_by(evaluators: Evaluators, diversity: str) -> dict[str, str]:
    family, tower, body = evaluators.family.name, evaluators.tower, evaluators.body_evaluator
    pose, face = f"pose model of family {family}", evaluators.face_evaluator
    return {
        "text_score": tower, "image_score": tower, "face_found": face, "face_similarity": face, "face_tar": face,
        "person_found": pose, "body_rank1": body, "body_auc": body, "copy_paste": tower, "face_copy_paste": face,
        "clothing_leak": tower, "disturbance": tower, diversity: evaluators.lpips.name if evaluators.lpips else tower,
    }  # fmt: skip


def _missing_notes(diversity: str, has_base: bool, has_conditioning: bool) -> dict[str, str]:
    """Why a mean could not be measured."""
    several = "needs reference photos of several people"
    profile_photos = "needs the photos that made the profile: among the reference photos, or --conditioning"
    captions = "needs captions of the photos that made the profile, and prompts that name clothes"
    return {
        "text_score": "no picture carries its prompt",
        "face_similarity": "no face on both sides",
        "face_tar": several + ": the threshold comes from other people's faces",
        "body_rank1": several,
        "body_auc": several,
        "copy_paste": profile_photos,
        "face_copy_paste": profile_photos,
        "clothing_leak": captions if has_conditioning else profile_photos,
        "disturbance": "no picture in --without-adapter has the same prompt and seed"
        if has_base
        else "needs --without-adapter",
        diversity: "needs two pictures or more of the same prompt and person",
    }


# ---- bodies -------------------------------------------------------------------------------------------------------


class Bodies(NamedTuple):
    """The bodies in N pictures."""

    keypoints: torch.Tensor  # f32 [N, 17, 3]
    widths: torch.Tensor  # f32 [N, W]
    readings: torch.Tensor  # f32 [N, R]


@dataclass(frozen=True)
class _BodyError:
    """One body error: what pictures show, and each person's target. Pose and foreshortening average out over a
    person's pictures, so the error is that of each person's mean."""

    values: torch.Tensor  # [N, R]
    weights: torch.Tensor  # [N, R]
    targets: dict[str, torch.Tensor]  # person -> [R]
    measured_by: str
    missing: str
    relative: bool = False  # to the target

    def of(self, mean: torch.Tensor, person: str) -> float:
        """Mean absolute error over the R values."""
        target = self.targets[person]
        error = (mean / target - 1).abs() if self.relative else (mean - target).abs()
        return float(error.nanmean())

    def of_rows(self, rows: Sequence[int], person: str, counts: torch.Tensor | None = None) -> float:
        """Error of the mean of a person's pictures, each taken `counts` [n, 1] times."""
        weights = self.weights[rows] if counts is None else self.weights[rows] * counts
        return self.of(weighted_mean(self.values[rows], weights), person)

    def of_each(self, people: Sequence[str]) -> torch.Tensor:
        """Error of each picture by itself, f64 [N]; for plots only, since pose is in it."""
        errors = [self.of(self.values[i], p) if p in self.targets else math.nan for i, p in enumerate(people)]
        return torch.tensor(errors, dtype=torch.float64)


def body_metrics(
    scored: PictureScores, references: References, bodies: Bodies, evaluators: Evaluators
) -> tuple[dict[str, Metric], dict[str, dict[str, float]]]:
    """(body metrics, ratio name -> {"true", "pictures"}); adds single pictures' errors to `scored`."""
    pose = f"pose model of family {evaluators.family.name}"
    present = [person for person in references.people if person in set(scored.people)]

    def person_means(values: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        masks = {person: references.owner == references.people.index(person) for person in present}
        return {person: weighted_mean(values[mask], weights[mask]) for person, mask in masks.items()}

    errors = {
        "bone_ratio_error": _BodyError(
            bone_ratios(bodies.keypoints),
            bone_weights(bodies.keypoints),
            person_means(bone_ratios(references.keypoints), bone_weights(references.keypoints)),
            pose,
            "no whole body on both sides",
        ),
        "width_profile_distance": _BodyError(
            bodies.widths,
            torch.ones_like(bodies.widths),
            person_means(references.widths, torch.ones_like(references.widths)),
            f"GrabCut from the {pose}",
            "no whole body on both sides",
        ),
    }
    metrics = {key: _error_metric(scored, key, error) for key, error in errors.items()}
    scored.scores["bone_error"] = errors["bone_ratio_error"].of_each(scored.people)
    metrics["body_ratio_correlation"] = Metric(
        None, 0, evaluators.body_evaluator, "needs the ground truth of five people or more"
    )
    missing = "needs the ground truth of synthetic people beside the photos"
    if evaluators.probe is None:
        missing = f"family {evaluators.family.name} has no probe"
    names, error = _ratio_error(references, present, bodies.readings, evaluators, missing)
    if error is None:
        metrics["body_ratio_error"] = Metric(None, 0, evaluators.body_evaluator, missing)
        return metrics, {}
    metrics["body_ratio_error"] = _error_metric(scored, "body_ratio_error", error)
    ratios, correlation = _ratios(scored, names, error)
    if correlation is not None:
        metrics["body_ratio_correlation"] = correlation
    scored.scores["body_error"] = error.of_each(scored.people)
    return metrics, ratios


def _ratio_error(
    references: References, present: Sequence[str], readings: torch.Tensor, evaluators: Evaluators, missing: str
) -> tuple[list[str], _BodyError | None]:
    """(names of the true body ratios, their error); None without a probe or ground truth."""
    if evaluators.probe is None:
        return [], None
    ratio_names = evaluators.probe.ratio_names
    names = [name for name in ratio_names if all(name in references.truth.get(p, {}) for p in present)]
    targets = {p: torch.tensor([references.truth[p][name] for name in names]) for p in present if p in references.truth}
    if not names or not targets:
        return [], None
    columns = [ratio_names.index(name) for name in names]
    ones = torch.ones(len(readings), len(names))
    return names, _BodyError(readings[:, columns], ones, targets, evaluators.body_evaluator, missing, relative=True)


def _rows(scored: PictureScores, person: str) -> list[int]:
    return [i for i, name in enumerate(scored.people) if name == person]


def _error_metric(scored: PictureScores, key: str, error: _BodyError) -> Metric:
    """Mean over people of their errors. Resamples people where there are MIN_GROUPS, else each person's pictures."""
    errors: dict[str, float] = {}
    n = 0
    for person in error.targets:
        rows = _rows(scored, person)
        measured = int((~error.values[rows].isnan().all(1)).sum())
        value = error.of_rows(rows, person)
        if measured and not math.isnan(value):
            errors[person] = value
            n += measured
    scored.per_person[key] = errors
    if not errors:
        return Metric(None, 0, error.measured_by, error.missing)
    each = torch.tensor(list(errors.values()), dtype=torch.float64)
    interval = bootstrap_mean(each, None, REPLICATES)
    if len(errors) < MIN_GROUPS and n >= 2:
        generator, draws = torch.Generator().manual_seed(0), []
        for _ in range(REPLICATES // 5):
            drawn = []
            for person in errors:
                rows = _rows(scored, person)
                counts = resamples(1, len(rows), generator)[0].to(error.weights)[:, None]
                drawn.append(error.of_rows(rows, person, counts))
            draws.append(torch.tensor(drawn, dtype=torch.float64).nanmean())
        spread = torch.stack(draws)
        low, high = spread[~spread.isnan()].quantile(ENDS).tolist()
        interval = Interval(float(each.mean()), low, high)
    note = f"mean of {len(errors)} people" if len(errors) > 1 else ""
    return to_metric(interval, n, error.measured_by, note)


def _ratios(
    scored: PictureScores, names: Sequence[str], error: _BodyError
) -> tuple[dict[str, dict[str, float]], Metric | None]:
    """(ratio name -> {"true", "pictures"}, means over people; the correlation over people, if there are enough)."""
    people = [p for p in error.targets if p in scored.per_person.get("body_ratio_error", {})]
    if not people:
        return {}, None
    rows = [_rows(scored, p) for p in people]
    predicted = torch.stack([weighted_mean(error.values[r], error.weights[r]) for r in rows]).double()
    truth = torch.stack([error.targets[p] for p in people]).double()
    ratios = {
        name: {"true": float(truth[:, i].mean()), "pictures": float(predicted[:, i].mean())}
        for i, name in enumerate(names)
    }
    if len(people) < MIN_CORRELATION_PEOPLE:
        return ratios, None
    scored.bodies = {p: (truth[i], predicted[i]) for i, p in enumerate(people)}
    interval = correlation_interval(truth, predicted)
    return ratios, to_metric(interval, len(people), error.measured_by, "n is people")


# ---- distributions ------------------------------------------------------------------------------------------------


def distribution_metrics(
    statistics: FeatureStatistics,
    reference: FeatureStatistics,
    inception: InceptionScore | None,
    classes: int,
    evaluators: Evaluators,
) -> dict[str, Metric]:
    """FID, its extrapolation, KID and the inception score. `classes`: the number of different prompts."""
    n, m = int(statistics.count), int(reference.count)
    by, count = evaluators.feature_name, min(n, m)
    metrics: dict[str, Metric] = {}
    if count < 2:
        too_few = f"needs two pictures or more on both sides, not {n} and {m}"
        for key in ("fid", "fid_extrapolated", "kid", "inception_score"):
            metrics[key] = Metric(None, count, by, too_few)
    else:
        fid, extrapolated = frechet_intervals(statistics, reference)
        note = f"of {n} pictures and {m} photos"
        if count < MIN_FID_PICTURES:
            note += f": mostly bias below {MIN_FID_PICTURES:,}; compare equal counts only, or look at kid and "
            note += "fid_extrapolated"
        metrics["fid"] = to_metric(fid, count, by, note)
        few = "" if count > evaluators.feature_size else "rough: fewer pictures than features"
        metrics["fid_extrapolated"] = to_metric(extrapolated, count, by, few)
        metrics["kid"] = to_metric(kernel_distance(statistics, reference), count, by)
    if inception is None:
        metrics["inception_score"] = Metric(None, n, by, "the tower's classes are the prompts: needs two or more")
    elif n >= 2:
        kinds = f"classes: the {classes} prompts" if evaluators.inception is None else "classes: InceptionV3's 1,008"
        metrics["inception_score"] = to_metric(inception.interval(), n, by, kinds)
    return metrics
