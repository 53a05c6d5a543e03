"""Scores of generated pictures: of each picture, of each person, and of a folder of them, with their intervals.

Shapes: N pictures, M reference photos, P people, E embedding, D features, R body readings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.evaluate.pictures import Picture, Source, assign_people
from bolid.evaluate.results import Evaluation, Metric, Scored
from bolid.run import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.evaluate.observe import Models, References, Seen
    from bolid.method.distributions import FeatureStatistics
    from bolid.method.metrics import Interval

FEW = 2048  # pictures; below, FID says more about their number than about them
FAR = 0.01  # false accepts at which faces are verified
REPLICATES = 1000

HIGHER, LOWER = "higher", "lower"
# name -> (which is better, what it is). In the order of every table.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "text_score": (HIGHER, "cosine of picture and prompt (CLIP-T)"),
    "image_score": (HIGHER, "mean cosine of picture and held-out photos (CLIP-I)"),
    "face_found": (HIGHER, "share of pictures in which a face is found"),
    "face_similarity": (HIGHER, "cosine of the face and the person's mean face on held-out photos"),
    "face_tar": (HIGHER, f"share of pictures whose face passes for the person's at {FAR:.0%} false accepts"),
    "person_found": (HIGHER, "share of pictures with a person, from the shoulders down"),
    "bone_ratio_error": (LOWER, "mean difference of bone lengths over torso + thigh + shin, person by person"),
    "width_profile_distance": (LOWER, "mean difference of silhouette widths over torso + thigh + shin"),
    "body_ratio_error": (LOWER, "mean relative error of the 3D body ratios, person by person"),
    "body_ratio_correlation": (HIGHER, "correlation over people of 3D body ratios, read off the pictures and true"),
    "body_rank1": (HIGHER, "share of pictures whose body is nearest to the right person of all"),
    "body_auc": (HIGHER, "share of other people whose body is further off; 0.5 is chance"),
    "copy_paste": (LOWER, "nearest conditioning photo's cosine minus nearest held-out photo's, of equally many"),
    "clothing_leak": (LOWER, "probability of the conditioning photos' outfit instead of the one asked for"),
    "disturbance": (LOWER, "1 - cosine of the pictures with and without adapter, same prompt and seed"),
    "lpips_diversity": (HIGHER, "LPIPS distance between pictures of one person and prompt"),
    "tower_lpips_diversity": (
        HIGHER,
        "LPIPS distance between pictures of one person and prompt, on the family's tower, without learned weights",
    ),
    "fid": (LOWER, "Frechet distance of the features to those of the held-out photos (BoLID Eq. 15)"),
    "fid_extrapolated": (LOWER, "FID extrapolated over 1/N to infinitely many pictures"),
    "kid": (LOWER, "kernel distance of the features (unbiased)"),
    "inception_score": (HIGHER, "inception score over the named classes, one split"),
}


PER_PICTURE = (
    "text_score", "image_score", "face_found", "face_similarity", "face_tar", "person_found", "body_rank1", "body_auc",
    "copy_paste", "clothing_leak", "disturbance", "diversity",
)  # fmt: skip


def score(
    name: str,
    source: Source,
    references: References,
    conditioning: dict[str, tuple[torch.Tensor, list[str]]],
    bases: Source | None,
    models: Models,
    tell: Progress,
) -> Scored:
    """Go through the pictures once; of each a few numbers stay, of all together the streaming statistics."""
    import torch

    from bolid.evaluate.observe import loaded
    from bolid.method.distributions import FeatureStatistics, InceptionScore

    pictures, people = source.pictures, assign_people(source.pictures, set(references.people))
    against = Against(references, conditioning, models)
    statistics = FeatureStatistics(models.feature_size, seed=1)
    classes = sorted({picture.prompt for picture in pictures if picture.prompt})
    inception = None
    if models.inception is not None:
        inception = InceptionScore(models.inception.classes)
    elif 2 <= len(classes) <= 1000:
        inception = InceptionScore(len(classes))
        class_texts = torch.stack([models.text(text) for text in classes])
    diversity = _Diversity(models)
    without = _Bases(bases, models) if bases is not None else None
    rows: dict[str, list[float]] = {key: [] for key in PER_PICTURE}
    bodies: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    kept: list[int] = []
    sizes: set[tuple[int, ...]] = set()
    for places, images in loaded(source, pictures):
        tell(places[-1] + 1, len(pictures), f"looking at {name}")
        looked = models.look(images)
        statistics.update(torch.stack([seen.features for seen in looked]))
        if inception is not None:
            logits = [
                seen.logits if seen.logits is not None else models.image_text.logit_scale * class_texts @ seen.embed
                for seen in looked
            ]
            inception.update(torch.stack(logits))
        for place, image, seen in zip(places, images, looked, strict=True):
            picture, person = pictures[place], people[place]
            values = against.scores(seen, picture.prompt, person)
            values["diversity"] = diversity.of(image, (person, picture.prompt))
            values["disturbance"] = without.disturbance(picture, seen.embed) if without else math.nan
            for key in PER_PICTURE:
                rows[key].append(values.get(key, math.nan))
            bodies.append((seen.keypoints, seen.widths, seen.reading))
            kept.append(place)
            sizes.add(image.shape[:2])
    if not kept:
        raise BolidError(
            f"none of the pictures in {source.place} can be read: {next(iter(source.rejected), '')}",
            "give a folder of PNG or JPEG pictures",
        )
    scored = Scored(
        name, source, [pictures[i] for i in kept], [people[i] for i in kept],
        {key: torch.tensor(values, dtype=torch.float64) for key, values in rows.items()},
    )  # fmt: skip
    keypoints, widths, readings = (torch.stack(parts) for parts in zip(*bodies, strict=True))
    metrics: dict[str, Metric] = {}
    _mean_metrics(scored, references, against, models, metrics, bases is not None, bool(conditioning))
    ratios = _body_metrics(scored, references, keypoints, widths, readings, models, metrics)
    _distribution_metrics(statistics, references.statistics, inception, len(classes), models, metrics)
    notes = list(models.notes)
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes)[:4])
        notes.append(f"the pictures have {len(sizes)} sizes ({shown}): each is brought to the extractor's by itself")
    unknown = scored.people.count("")
    if unknown:
        notes.append(f"whose picture it is, is not known of {unknown}: scored only as pictures")
    scored.evaluation = Evaluation(
        len(kept), len(references.owner), len({p for p in scored.people if p}),
        {key: metrics[key] for key in DESCRIPTIONS if key in metrics}, ratios, {}, notes, {},
    )  # fmt: skip
    return scored


class Against:
    """Scores of one picture against its person's held-out photos."""

    def __init__(
        self, references: References, conditioning: dict[str, tuple[torch.Tensor, list[str]]], models: Models
    ) -> None:
        import torch
        import torch.nn.functional as F

        from bolid.method.metrics import accept_threshold, weighted_mean

        self.models, self.conditioning, self.references = models, conditioning, references
        owner, people = references.owner, range(len(references.people))
        self.embeds = [references.embeds[owner == p] for p in people]
        self.faces = torch.stack(
            [F.normalize(weighted_mean(references.faces[owner == p]), dim=0) for p in people]
        )  # [P, 512], nan where no photo shows the face
        self.gallery = torch.stack([weighted_mean(references.readings[owner == p]) for p in people])  # [P, R]
        self.known_bodies = (~self.gallery.isnan().any(1)).nonzero()[:, 0].tolist()
        spread = self.gallery[self.known_bodies].std(0).clamp_min(1e-6) if len(self.known_bodies) > 1 else None
        self.gallery_scaled = None if spread is None else self.gallery[self.known_bodies] / spread
        self.spread = spread
        # Impostors: every reference face against every other person's mean face.
        similarity = references.faces @ self.faces.T  # [M, P]
        others = similarity[owner[:, None] != torch.arange(len(references.people))]
        self.impostors = others[~others.isnan()]
        self.threshold = accept_threshold(self.impostors, FAR) if len(self.impostors) >= 20 else None

    def scores(self, seen: Seen, prompt: str, person: str) -> dict[str, float]:
        """Name -> value; what does not apply is left out."""
        import torch

        from bolid.method.metrics import expected_max, rank_and_auc

        found = bool((seen.keypoints[:, 2] > 0).any())
        has_face = not bool(seen.face.isnan().any())
        values = {"person_found": float(found), "face_found": float(has_face)}
        if prompt:
            values["text_score"] = float(seen.embed @ self.models.text(prompt))
        if not person:
            return values
        number = self.references.people.index(person)
        values["image_score"] = float((self.embeds[number] @ seen.embed).mean())
        own_face = self.faces[number]
        if not own_face.isnan().any():
            if has_face:
                values["face_similarity"] = float(own_face @ seen.face)
            if self.threshold is not None:
                values["face_tar"] = float(has_face and values["face_similarity"] > self.threshold)
        if self.gallery_scaled is not None and number in self.known_bodies and not seen.reading.isnan().any():
            distances = (self.gallery_scaled - seen.reading / self.spread).norm(dim=1)
            first, auc = rank_and_auc(distances[None], torch.tensor([self.known_bodies.index(number)]))
            values["body_rank1"], values["body_auc"] = float(first), float(auc)
        if person in self.conditioning:
            embeds, captions = self.conditioning[person]
            count = min(len(embeds), len(self.embeds[number]))
            nearest = [expected_max(side @ seen.embed, count) for side in (embeds, self.embeds[number])]
            values["copy_paste"] = nearest[0] - nearest[1]
            values["clothing_leak"] = self._leak(seen.embed, prompt, captions)
        return values

    def _leak(self, embed: torch.Tensor, prompt: str, captions: Iterable[str]) -> float:
        """Mean over the photos' outfits of p(prompt with that outfit | either that or the prompt); nan without any."""
        asked = outfit(prompt)
        others = {worn for worn in map(outfit, captions) if worn and worn != asked}
        if not asked or not others:
            return math.nan
        scale = self.models.image_text.logit_scale
        own = float(embed @ self.models.text(prompt))
        swapped = [float(embed @ self.models.text(prompt.replace(asked, worn))) for worn in sorted(others)]
        return sum(1 / (1 + math.exp(min(500.0, scale * (own - score)))) for score in swapped) / len(swapped)


GARMENTS = (
    "top", "shirt", "t-shirt", "blouse", "sweater", "hoodie", "jacket", "coat", "suit", "dress", "skirt", "trousers",
    "pants", "jeans", "shorts", "uniform", "gown", "robe", "swimsuit", "costume", "armor", "armour",
)  # fmt: skip
_GARMENT = re.compile(rf"\b(?:{'|'.join(GARMENTS)})\b")


def outfit(caption: str) -> str:
    """The clothes that a caption names, "" for none: of the clause that names a garment, what follows "in"."""
    for clause in caption.split(","):
        if _GARMENT.search(clause):
            words = re.split(r"\b(?:wearing|dressed in|in)\b", clause)
            named = [part.strip() for part in words if _GARMENT.search(part)]
            return named[-1] if named else ""
    return ""


class _Diversity:
    """LPIPS between neighbours of the same person and prompt."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.last: tuple[tuple[str, str], Any] | None = None

    def of(self, image: np.ndarray, group: tuple[str, str]) -> float:
        if not group[1]:
            return math.nan
        before, view = self.last, self.models.perceptual_view(image)
        self.last = (group, view)
        if before is None or before[0] != group:
            return math.nan
        return self.models.perceptual_distance(before[1], view)


class _Bases:
    """The pictures without adapter, found by prompt and seed, else by the same name."""

    def __init__(self, source: Source, models: Models) -> None:
        self.source, self.models = source, models
        self.by_seed = {(p.prompt, p.seed): p for p in source.pictures if p.prompt and p.seed is not None}
        self.by_name = {relative_source(p): p for p in source.pictures}

    def disturbance(self, picture: Picture, embed: torch.Tensor) -> float:
        if picture.seed is None:
            other = self.by_name.get(relative_source(picture))
        else:
            other = self.by_seed.get((picture.prompt, picture.seed))
        if other is None:
            return math.nan
        try:
            image = self.source.load(other)
        except BolidError as error:
            self.source.reject(other, error.message)
            return math.nan
        return 1 - float(self.models.image_text.encode_images([image]).float().cpu()[0] @ embed)


def relative_source(picture: Picture) -> str:
    path = Path(picture.source)
    return path.relative_to(picture.folder).as_posix() if path.is_relative_to(picture.folder) else picture.source


# ---- figures ------------------------------------------------------------------------------------------------------


def _metric(interval: Interval, n: int, by: str, note: str = "") -> Metric:
    value, low, high = (None if math.isnan(x) else float(x) for x in interval)
    return Metric(value, n, by, note, low, high)


def numbered(people: Sequence[str]) -> torch.Tensor:
    import torch

    names = sorted(set(people))
    return torch.tensor([names.index(person) for person in people])


def _mean_metrics(
    scored: Scored,
    references: References,
    against: Against,
    models: Models,
    metrics: dict[str, Metric],
    has_base: bool,
    has_conditioning: bool,
) -> None:
    """The figures that are means over pictures."""
    from bolid.method.metrics import bootstrap_mean

    pose, face = f"pose model of family {models.family.name}", f"face model of family {models.family.name}"
    diversity = "lpips_diversity" if models.lpips else "tower_lpips_diversity"
    by = {
        "text_score": models.tower, "image_score": models.tower, "face_found": face, "face_similarity": face,
        "face_tar": face, "person_found": pose, "body_rank1": models.reader_name, "body_auc": models.reader_name,
        "copy_paste": models.tower, "clothing_leak": models.tower, "disturbance": models.tower,
        diversity: models.lpips.name if models.lpips else models.tower,
    }  # fmt: skip
    one_person = "needs reference photos of several people"
    why_not = {
        "text_score": "no picture carries its prompt",
        "face_similarity": "no face on both sides",
        "face_tar": one_person + ": the threshold comes from other people's faces",
        "body_rank1": one_person,
        "body_auc": one_person,
        "copy_paste": "needs the photos that made the profile: among the reference photos, or --conditioning",
        "clothing_leak": "needs captions of the photos that made the profile, and prompts that name clothes"
        if has_conditioning
        else "needs the photos that made the profile: among the reference photos, or --conditioning",
        "disturbance": "no picture in --without-adapter has the same prompt and seed"
        if has_base
        else "needs --without-adapter",
        diversity: "needs two pictures or more of the same prompt and person",
    }
    notes = {}
    if against.threshold is not None:
        notes["face_tar"] = f"above {against.threshold:.3f}; of {len(against.impostors)} comparisons of strangers"
        if len(against.impostors) < 1 / FAR:
            notes["face_tar"] += ", too few for this rate"
    if len(against.known_bodies) > 1:
        notes["body_rank1"] = f"of {len(against.known_bodies)} people; chance is {1 / len(against.known_bodies):.3f}"
    groups = numbered(scored.people)
    for key in PER_PICTURE:
        values = scored.scores[key]
        key = diversity if key == "diversity" else key
        scored.scores.setdefault(key, values)
        n = int((~values.isnan()).sum())
        note = notes.get(key, "") if n else why_not.get(key, "")
        metrics[key] = _metric(bootstrap_mean(values, groups, REPLICATES), n, by[key], note)
    scored.scores.pop("diversity", None)


def _body_metrics(
    scored: Scored,
    references: References,
    keypoints: torch.Tensor,
    widths: torch.Tensor,
    readings: torch.Tensor,
    models: Models,
    metrics: dict[str, Metric],
) -> dict[str, dict[str, float]]:
    """Body errors: of every person's mean over their pictures, so that pose and foreshortening average out."""
    import torch

    from bolid.method.metrics import (
        ENDS,
        Interval,
        bone_confidence,
        bone_ratios,
        mean_correlation,
        resamples,
        weighted_mean,
    )

    owner = references.owner
    pose = f"pose model of family {models.family.name}"
    bones, sure = bone_ratios(keypoints), bone_confidence(keypoints)
    reference_bones, reference_sure = bone_ratios(references.keypoints), bone_confidence(references.keypoints)
    present = [person for person in references.people if person in set(scored.people)]

    def of(person: str, values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        number = references.people.index(person)
        return values[owner == number], weights[owner == number]

    ones, reference_ones = torch.ones_like(widths), torch.ones_like(references.widths)
    wanted_bones = {p: weighted_mean(*of(p, reference_bones, reference_sure)) for p in present}
    wanted_widths = {p: weighted_mean(*of(p, references.widths, reference_ones)) for p in present}
    targets = {
        "bone_ratio_error": (bones, sure, wanted_bones),
        "width_profile_distance": (widths, ones, wanted_widths),
    }
    by = {"bone_ratio_error": pose, "width_profile_distance": f"GrabCut from the {pose}"}
    why_not = {
        "bone_ratio_error": "no whole body on both sides",
        "width_profile_distance": "no whole body on both sides",
        "body_ratio_error": "needs the ground truth of synthetic people beside the photos",
    }
    if models.probe is not None:
        names = [name for name in models.probe.ratio_names if all(name in references.truth.get(p, {}) for p in present)]
        columns = [models.probe.ratio_names.index(name) for name in names]
        known = {
            p: torch.tensor([references.truth[p][name] for name in names]) for p in present if p in references.truth
        }
        if names and known:
            targets["body_ratio_error"] = (readings[:, columns], torch.ones(len(readings), len(names)), known)
    else:
        why_not["body_ratio_error"] = f"family {models.family.name} has no probe"
    by["body_ratio_error"] = models.reader_name
    for key in ("bone_ratio_error", "width_profile_distance", "body_ratio_error"):
        if key not in targets:
            metrics[key] = Metric(None, 0, by[key], why_not[key])
            continue
        values, weights, wanted = targets[key]
        relative = key == "body_ratio_error"
        _per_person(scored, key, values, weights, wanted, relative, metrics, by[key], why_not[key])
    ratios: dict[str, dict[str, float]] = {}
    metrics["body_ratio_correlation"] = Metric(
        None, 0, models.reader_name, "needs the ground truth of five people or more"
    )
    if "body_ratio_error" in targets:
        values, weights, wanted = targets["body_ratio_error"]
        people = [p for p in wanted if p in scored.per_person.get("body_ratio_error", {})]
        if people:
            rows = [_rows(scored, p) for p in people]
            read = torch.stack([weighted_mean(values[r], weights[r]) for r in rows]).double()
            truth = torch.stack([wanted[p] for p in people]).double()
            for i, name in enumerate(names):
                ratios[name] = {"true": float(truth[:, i].mean()), "pictures": float(read[:, i].mean())}
            if len(people) >= 5:
                generator = torch.Generator().manual_seed(0)
                draws = [
                    mean_correlation(truth.repeat_interleave(c, 0), read.repeat_interleave(c, 0))
                    for c in resamples(REPLICATES, len(people), generator).long()
                ]
                low, high = torch.stack(draws).quantile(ENDS).tolist()
                value = float(mean_correlation(truth, read))
                metrics["body_ratio_correlation"] = _metric(
                    Interval(value, low, high), len(people), models.reader_name, "n is people"
                )
    # Every picture by itself, for the plots and nothing else: pose is in it.
    scored.scores["bone_error"] = _each(scored, bones, targets["bone_ratio_error"][2], relative=False)
    if "body_ratio_error" in targets:
        scored.scores["body_error"] = _each(
            scored, targets["body_ratio_error"][0], targets["body_ratio_error"][2], relative=True
        )
    return ratios


def _rows(scored: Scored, person: str) -> list[int]:
    return [i for i, name in enumerate(scored.people) if name == person]


def _error(mean: torch.Tensor, wanted: torch.Tensor, relative: bool) -> float:
    error = (mean / wanted - 1).abs() if relative else (mean - wanted).abs()
    return float(error.nanmean())


def _each(scored: Scored, values: torch.Tensor, wanted: dict[str, torch.Tensor], relative: bool) -> torch.Tensor:
    import torch

    errors = [
        _error(values[i], wanted[person], relative) if person in wanted else math.nan
        for i, person in enumerate(scored.people)
    ]
    return torch.tensor(errors, dtype=torch.float64)


def _per_person(
    scored: Scored,
    key: str,
    values: torch.Tensor,
    weights: torch.Tensor,
    wanted: dict[str, torch.Tensor],
    relative: bool,
    metrics: dict[str, Metric],
    by: str,
    why_not: str,
) -> None:
    """Mean over people of the error of their mean. Resampled: people where there are enough, else their pictures."""
    import torch

    from bolid.method.metrics import ENDS, FEWEST_GROUPS, Interval, bootstrap_mean, resamples, weighted_mean

    errors: dict[str, float] = {}
    n = 0
    for person, target in wanted.items():
        rows = _rows(scored, person)
        seen = int((~values[rows].isnan().all(1)).sum())
        error = _error(weighted_mean(values[rows], weights[rows]), target, relative)
        if seen and not math.isnan(error):
            errors[person] = error
            n += seen
    scored.per_person[key] = errors
    if not errors:
        metrics[key] = Metric(None, 0, by, why_not)
        return
    each = torch.tensor(list(errors.values()), dtype=torch.float64)
    interval = bootstrap_mean(each, None, REPLICATES)
    if len(errors) < FEWEST_GROUPS and n >= 2:
        generator, draws = torch.Generator().manual_seed(0), []
        for _ in range(REPLICATES // 5):
            found = []
            for person in errors:
                rows = _rows(scored, person)
                counts = resamples(1, len(rows), generator)[0].to(weights)[:, None]
                found.append(_error(weighted_mean(values[rows], weights[rows] * counts), wanted[person], relative))
            draws.append(torch.tensor(found, dtype=torch.float64).nanmean())
        spread = torch.stack(draws)
        low, high = spread[~spread.isnan()].quantile(ENDS).tolist()
        interval = Interval(float(each.mean()), low, high)
    note = f"mean of {len(errors)} people" if len(errors) > 1 else ""
    metrics[key] = _metric(interval, n, by, note)


def _distribution_metrics(
    statistics: FeatureStatistics,
    reference: FeatureStatistics,
    inception: Any,
    classes: int,
    models: Models,
    metrics: dict[str, Metric],
) -> None:
    from bolid.method.distributions import frechet_extrapolated, frechet_interval, kernel_distance

    n, m = int(statistics.count), int(reference.count)
    by, count = models.feature_name, min(n, m)
    if count < 2:
        too_few = f"needs two pictures or more on both sides, not {n} and {m}"
        for key in ("fid", "fid_extrapolated", "kid", "inception_score"):
            metrics[key] = Metric(None, count, by, too_few)
    else:
        replicates = 200 if models.feature_size <= 256 else 50
        note = f"of {n} pictures and {m} photos"
        biased = f"{note}: mostly bias below {FEW:,}; compare equal counts only, or look at kid and fid_extrapolated"
        metrics["fid"] = _metric(
            frechet_interval(statistics, reference, replicates), count, by, biased if count < FEW else note
        )
        few = "" if count > models.feature_size else "rough: fewer pictures than features"
        metrics["fid_extrapolated"] = _metric(frechet_extrapolated(statistics, reference), count, by, few)
        metrics["kid"] = _metric(kernel_distance(statistics, reference), count, by)
    if inception is None:
        metrics["inception_score"] = Metric(None, n, by, "the tower's classes are the prompts: needs two or more")
    elif n >= 2:
        what = f"classes: the {classes} prompts" if models.inception is None else "classes: InceptionV3's 1,008"
        metrics["inception_score"] = _metric(inception.interval(), n, by, what)
