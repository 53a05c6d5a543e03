"""One folder of generated pictures: the scores of each (picture_scores.py) and the metrics of all (aggregate.py).

Shapes: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bolid.errors import BolidError
from bolid.evaluate.aggregate import Bodies, body_metrics, distribution_metrics, mean_metrics
from bolid.evaluate.body_shape import shape_metrics
from bolid.evaluate.evaluators import Evaluators, PictureFeatures
from bolid.evaluate.extraction import Extractor
from bolid.evaluate.picture_scores import BasePictures, Conditioning, Diversity, ReferenceScores
from bolid.evaluate.pictures import Picture, PictureFolder, assign_people
from bolid.evaluate.references import References
from bolid.evaluate.results import DESCRIPTIONS, PER_PICTURE, Evaluation, PictureScores, Scored
from bolid.method.distributions import InceptionScore
from bolid.method.feature_statistics import FeatureStatistics
from bolid.run import Progress

MAX_CLASSES = 1000  # prompts that serve as the classes of the inception score


def score(
    name: str,
    folder: PictureFolder,
    references: References,
    conditioning: dict[str, Conditioning],
    base: PictureFolder | None,
    extractor: Extractor,
    progress: Progress,
) -> Scored:
    """Score every picture of a folder, and the folder as a whole.

    `conditioning`: person -> the photos that made the profile. `base`: the same
    prompts and seeds without adapter. Raises BolidError when no picture can be read.
    """
    pictures, people = folder.pictures, assign_people(folder.pictures, set(references.people))
    evaluators = extractor.evaluators
    reference_scores = ReferenceScores(references, conditioning, evaluators)
    whole = _WholeSet(evaluators, pictures)
    diversity = Diversity(evaluators)
    base_pictures = BasePictures(base, evaluators) if base is not None else None
    values: dict[str, list[float]] = {key: [] for key in PER_PICTURE}
    bodies: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    views: list[torch.Tensor] = []
    scored_places: list[int] = []
    sizes: set[tuple[int, ...]] = set()
    for places, images, batch in extractor.batches(folder, pictures):
        progress(places[-1] + 1, len(pictures), f"scoring {name}")
        whole.update(batch)
        for place, image, found in zip(places, images, batch, strict=True):
            picture, person = pictures[place], people[place]
            row = reference_scores.scores(found, picture.prompt, person)
            row["diversity"] = diversity.of(image, (person, picture.prompt))
            row["disturbance"] = base_pictures.disturbance(picture, found.embed) if base_pictures else math.nan
            for key in PER_PICTURE:
                values[key].append(row.get(key, math.nan))
            bodies.append((found.keypoints, found.widths, found.reading))
            views.append(found.view)
            sizes.add(image.shape[:2])
        scored_places += places
    if not scored_places:
        raise BolidError(
            f"none of the pictures in {folder.place} can be read: {next(iter(folder.rejected), '')}",
            "give a folder of PNG or JPEG pictures",
        )
    scored = PictureScores(
        name, folder, [pictures[i] for i in scored_places], [people[i] for i in scored_places],
        {key: torch.tensor(column, dtype=torch.float64) for key, column in values.items()}, {},
    )  # fmt: skip
    metrics = mean_metrics(scored, reference_scores, evaluators, base is not None)
    stacked = Bodies(*(torch.stack(parts) for parts in zip(*bodies, strict=True)))
    found_metrics, ratios = body_metrics(scored, references, stacked, evaluators)
    metrics |= found_metrics
    shapes, measurements = shape_metrics(scored, references, torch.stack(views), evaluators.shape_reader)
    metrics |= shapes
    metrics |= distribution_metrics(whole.statistics, references.statistics, whole.inception, whole.classes, evaluators)
    evaluation = Evaluation(
        len(scored_places), len(references.owner), len({p for p in scored.people if p}),
        {key: metrics[key] for key in DESCRIPTIONS if key in metrics}, ratios, {},
        _notes(evaluators, sizes, scored.people.count(""), len(set(references.people) - set(scored.people))),
        {}, measurements,
    )  # fmt: skip
    return Scored(**vars(scored), evaluation=evaluation)


def _notes(evaluators: Evaluators, sizes: set[tuple[int, ...]], unknown: int, unseen: int) -> list[str]:
    notes = list(evaluators.notes)
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes)[:4])
        notes.append(f"the pictures have {len(sizes)} sizes ({shown}): each is brought to the extractor's by itself")
    if unknown:
        notes.append(f"whose picture it is, is not known of {unknown}: scored only as pictures")
    if unseen:
        notes.append(f"of {unseen} people in the reference there is no picture: they count as strangers only")
    return notes


class _WholeSet:
    """Streams a folder's features into the statistics of FID and KID, and into the inception score.

    Rank 0 alone has it, so torchmetrics must not wait for those of other ranks.
    """

    def __init__(self, evaluators: Evaluators, pictures: Sequence[Picture]) -> None:
        self.evaluators = evaluators
        self.statistics = FeatureStatistics(evaluators.feature_size, seed=1, sync_on_compute=False)
        prompts = sorted({picture.prompt for picture in pictures if picture.prompt})
        self.classes = len(prompts)
        self.inception: InceptionScore | None = None
        self.texts: torch.Tensor | None = None  # [C, E]
        if evaluators.inception is not None:
            self.inception = InceptionScore(evaluators.inception.classes, sync_on_compute=False)
        elif 2 <= self.classes <= MAX_CLASSES:
            self.inception = InceptionScore(self.classes, sync_on_compute=False)
            self.texts = torch.stack([evaluators.text(text) for text in prompts])

    def update(self, batch: Sequence[PictureFeatures]) -> None:
        """Add a batch."""
        self.statistics.update(torch.stack([one.features for one in batch]))
        if self.inception is not None:
            self.inception.update(torch.stack([self._logits(one) for one in batch]))

    def _logits(self, one: PictureFeatures) -> torch.Tensor:
        """InceptionV3's, or those of the prompts as classes: [C]."""
        if one.logits is not None or self.texts is None:
            return one.logits
        return self.evaluators.image_text.logit_scale * self.texts @ one.embed
