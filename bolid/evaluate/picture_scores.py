"""Scores of single pictures: against the person's held-out photos, the profile's photos, and the plain base.

Shapes: M reference photos, P people, E embedding, R body readings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from bolid.errors import BolidError
from bolid.evaluate.evaluators import Evaluators, PictureFeatures
from bolid.evaluate.pictures import Picture, PictureFolder
from bolid.evaluate.references import References
from bolid.evaluate.results import FALSE_ACCEPT_RATE
from bolid.method.metrics import accept_threshold, copy_paste, expected_max, rank_and_auc, weighted_mean

if TYPE_CHECKING:
    import numpy as np

MIN_IMPOSTORS = 20  # comparisons of different people's faces, below which no threshold is set


class Conditioning(NamedTuple):
    """The k photos behind a person's profile: embeddings [k, E], faces [k, F] (nan where none is found), captions."""

    embeds: torch.Tensor
    faces: torch.Tensor
    captions: list[str]


class ReferenceScores:
    """Scores of single pictures against their person's held-out photos."""

    def __init__(
        self,
        references: References,
        conditioning: dict[str, Conditioning],
        evaluators: Evaluators,
    ) -> None:
        self.evaluators, self.conditioning, self.references = evaluators, conditioning, references
        owner, people = references.owner, range(len(references.people))
        self.embeds = [references.embeds[owner == p] for p in people]
        self.own_faces = [references.faces[owner == p] for p in people]
        # [P, F], nan where no photo shows the face
        self.faces = torch.stack([unit_faces(weighted_mean(faces)) for faces in self.own_faces])
        bodies = torch.stack([weighted_mean(references.readings[owner == p]) for p in people])  # [P, R]
        self.people_with_body = (~bodies.isnan().any(1)).nonzero()[:, 0].tolist()
        self.spread: torch.Tensor | None = None  # [R], over people
        if len(self.people_with_body) > 1:
            self.spread = bodies[self.people_with_body].std(0).clamp_min(1e-6)
            self.bodies = bodies[self.people_with_body] / self.spread
        # Impostors: every reference face against every other person's mean face.
        similarity = references.faces @ self.faces.T  # [M, P]
        others = similarity[owner[:, None] != torch.arange(len(references.people))]
        self.impostors = others[~others.isnan()]
        enough = len(self.impostors) >= MIN_IMPOSTORS
        self.threshold = accept_threshold(self.impostors, FALSE_ACCEPT_RATE) if enough else None

    def scores(self, found: PictureFeatures, prompt: str, person: str) -> dict[str, float]:
        """Name -> value of the scores that apply to a picture of `person` ("" if unknown) generated from `prompt`."""
        has_person = bool((found.keypoints[:, 2] > 0).any())
        has_face = not bool(found.face.isnan().any())
        values = {"person_found": float(has_person), "face_found": float(has_face)}
        if prompt:
            values["text_score"] = float(found.embed @ self.evaluators.text(prompt))
        if not person:
            return values
        number = self.references.people.index(person)
        values["image_score"] = float((self.embeds[number] @ found.embed).mean())
        own_face = self.faces[number]
        if not own_face.isnan().any():
            if has_face:
                values["face_similarity"] = float(own_face @ found.face)
            if self.threshold is not None:
                values["face_tar"] = float(has_face and values["face_similarity"] > self.threshold)
        if self.spread is not None and number in self.people_with_body and not found.reading.isnan().any():
            distances = (self.bodies - found.reading / self.spread).norm(dim=1)
            first, auc = rank_and_auc(distances[None], torch.tensor([self.people_with_body.index(number)]))
            values["body_rank1"], values["body_auc"] = float(first), float(auc)
        if person in self.conditioning:
            photos = self.conditioning[person]
            count = min(len(photos.embeds), len(self.embeds[number]))
            nearest = [expected_max(side @ found.embed, count) for side in (photos.embeds, self.embeds[number])]
            values["copy_paste"] = nearest[0] - nearest[1]
            values["face_copy_paste"] = copy_paste(found.face, self.own_faces[number], photos.faces)
            values["clothing_leak"] = self._clothing_leak(found.embed, prompt, photos.captions)
        return values

    def _clothing_leak(self, embed: torch.Tensor, prompt: str, captions: Iterable[str]) -> float:
        """Mean probability of a conditioning photo's outfit in the prompt, against the prompt itself; nan without."""
        wanted = outfit(prompt)
        others = {worn for worn in map(outfit, captions) if worn and worn != wanted}
        if not wanted or not others:
            return math.nan
        scale = self.evaluators.image_text.logit_scale
        own = float(embed @ self.evaluators.text(prompt))
        leaked = [float(embed @ self.evaluators.text(prompt.replace(wanted, worn))) for worn in sorted(others)]
        return sum(1 / (1 + math.exp(min(500.0, scale * (own - score)))) for score in leaked) / len(leaked)


def unit_faces(faces: torch.Tensor) -> torch.Tensor:
    """Faces [..., F], scaled so that each recogniser's 512 numbers count alike and the whole has unit length."""
    each = F.normalize(faces.unflatten(-1, (-1, 512)), dim=-1)
    return each.flatten(-2) / each.shape[-2] ** 0.5


GARMENTS = (
    "top", "shirt", "t-shirt", "blouse", "sweater", "hoodie", "jacket", "coat", "suit", "dress", "skirt", "trousers",
    "pants", "jeans", "shorts", "uniform", "gown", "robe", "swimsuit", "costume", "armor", "armour",
)  # fmt: skip
_GARMENT = re.compile(rf"\b(?:{'|'.join(GARMENTS)})\b")


def outfit(caption: str) -> str:
    """The clothes in a caption, "" for none: of the clause that names a garment, what follows "in" or "wearing"."""
    for clause in caption.split(","):
        if _GARMENT.search(clause):
            words = re.split(r"\b(?:wearing|dressed in|in)\b", clause)
            named = [part.strip() for part in words if _GARMENT.search(part)]
            return named[-1] if named else ""
    return ""


class Diversity:
    """LPIPS between consecutive pictures of the same person and prompt."""

    def __init__(self, evaluators: Evaluators) -> None:
        self.evaluators = evaluators
        self.last: tuple[tuple[str, str], Any] | None = None

    def of(self, image: np.ndarray, group: tuple[str, str]) -> float:
        """The distance to the picture before, nan if that is of another (person, prompt)."""
        if not group[1]:
            return math.nan
        before, view = self.last, self.evaluators.perceptual_view(image)
        self.last = (group, view)
        if before is None or before[0] != group:
            return math.nan
        return self.evaluators.perceptual_distance(before[1], view)


class BasePictures:
    """The pictures without adapter, found by prompt and seed, else by the same name."""

    def __init__(self, folder: PictureFolder, evaluators: Evaluators) -> None:
        self.folder, self.evaluators = folder, evaluators
        self.by_seed = {(p.prompt, p.seed): p for p in folder.pictures if p.prompt and p.seed is not None}
        self.by_name = {p.relative_source: p for p in folder.pictures}

    def disturbance(self, picture: Picture, embed: torch.Tensor) -> float:
        """1 - cosine of a picture and its counterpart; nan without one."""
        if picture.seed is None:
            other = self.by_name.get(picture.relative_source)
        else:
            other = self.by_seed.get((picture.prompt, picture.seed))
        if other is None:
            return math.nan
        try:
            image = self.folder.load(other)
        except BolidError as error:
            self.folder.reject(other, error.message)
            return math.nan
        return 1 - float(self.evaluators.image_text.encode_images([image]).float().cpu()[0] @ embed)
