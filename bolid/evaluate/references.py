"""The held-out reference photos of `bolid evaluate`, as the evaluators see them; cached between runs.

Shapes: M photos, P people, E embedding, D features, F face recognisers' numbers, W width profile, R body readings,
V numbers of the shape reader.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bolid.errors import BolidError
from bolid.evaluate.evaluators import PictureFeatures
from bolid.evaluate.extraction import Extractor
from bolid.evaluate.pictures import PictureFolder
from bolid.method.feature_statistics import FeatureStatistics
from bolid.run import Progress, canonical_json, home, run_record

CACHE_KIND = "reference-statistics"


@dataclass
class References:
    """Features of the held-out photos. `people`: the P names; `owner` [M]: the number of each photo's person."""

    people: list[str]
    owner: torch.Tensor
    embeds: torch.Tensor  # f32 [M, E]
    faces: torch.Tensor  # f32 [M, F]
    keypoints: torch.Tensor  # f32 [M, 17, 3]
    widths: torch.Tensor  # f32 [M, W]
    readings: torch.Tensor  # f32 [M, R]
    truth: dict[str, dict[str, float]]  # person -> body ratios
    statistics: FeatureStatistics
    views: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # f32 [M, V]
    bodies: dict[str, np.ndarray] = field(default_factory=dict)  # person -> parameters [P] of the known body


def read_references(folder: PictureFolder, extractor: Extractor, progress: Progress) -> References:
    """The features of all photos in `folder`, extracted now or by an earlier run with the same evaluators.

    The cache is a safetensors file under BOLID_HOME, keyed by the photos' hashes and the evaluators.
    """
    from bolid.formats.tensors import load_tensors, save_tensors

    evaluators = extractor.evaluators
    key = canonical_json([CACHE_KIND, 3, evaluators.fingerprint, [[p.person, p.sha256] for p in folder.pictures]])
    path = home() / "evaluate" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    try:
        tensors, record = load_tensors(path, CACHE_KIND)
        rejected = record["config"]["rejected"]
    except (BolidError, KeyError):  # missing or unusable
        tensors, rejected = _extract_all(folder, extractor, progress), folder.rejected
        save_tensors(path, tensors, run_record(CACHE_KIND, family=evaluators.family, config={"rejected": rejected}))
        # As later runs read it: where numbers lie in memory changes how sums are rounded.
        tensors, _ = load_tensors(path, CACHE_KIND)
    folder.rejected = rejected
    folder.pictures = [folder.pictures[row] for row in tensors["rows"].tolist()]
    people = sorted({photo.person for photo in folder.pictures})
    truth: dict[str, dict[str, float]] = {}
    for person in people:
        theirs = [photo.truth for photo in folder.pictures if photo.person == person]
        if theirs[0] and all(one == theirs[0] for one in theirs):
            truth[person] = theirs[0]
    return References(
        people, torch.tensor([people.index(photo.person) for photo in folder.pictures]), tensors["embed"],
        tensors["face"], tensors["keypoints"], tensors["widths"], tensors["reading"], truth,
        FeatureStatistics.from_tensors(tensors, sync_on_compute=False), tensors["view"],
    )  # fmt: skip


def _extract_all(folder: PictureFolder, extractor: Extractor, progress: Progress) -> dict[str, torch.Tensor]:
    """Features of all readable photos, their `rows` in `folder.pictures`, and the tensors of their statistics."""
    statistics = FeatureStatistics(extractor.evaluators.feature_size, sync_on_compute=False)
    photos: list[PictureFeatures] = []
    rows: list[int] = []
    for places, _, found in extractor.batches(folder, folder.pictures):
        statistics.update(torch.stack([one.features for one in found]))
        photos += [replace(one, features=one.features[:0], logits=None) for one in found]
        rows += places
        progress(places[-1] + 1, len(folder.pictures), "reading reference photos")
    if not photos:
        raise BolidError(f"none of the photos in {folder.place} can be read", "give a folder of photos of the person")
    names = ("embed", "face", "keypoints", "widths", "reading", "view")
    tensors = {name: torch.stack([getattr(one, name) for one in photos]) for name in names}
    return {**tensors, "rows": torch.tensor(rows), **statistics.tensors()}
