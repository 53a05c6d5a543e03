"""A view: one photo of one person, with the features that the family's models extract from it.

``extract``, ``profile`` and ``generate`` read photos through ``ViewReader``, so that a photo has the same features in
all of them. Images are uint8 [H, W, 3] RGB; boxes are [left, top, right, bottom] and
keypoints [17, 3] (x, y, confidence), in pixels of the image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bolid.errors import BolidError
from bolid.method.keypoints import ANKLES, HEAD, HIPS, KNEES, MIN_CONFIDENCE, SHOULDERS, TORSO

if TYPE_CHECKING:
    from bolid.backends.face import Face
    from bolid.backends.pose import Detection
    from bolid.method.mask_views import MaskView
    from bolid.models.families import Family

PersonRule = Literal["main", "only"] | int
"""Of several people in a photo: the main one, none at all, or the N-th from the left."""

MIN_SCORE = 0.35  # of the person's detection
MIN_HEIGHT = 32  # pixels of the person's box
MIN_KEYPOINTS = 6  # visible ones, one of them of the torso; a hand or a foot alone has fewer
BODY_PARTS = {"feet": ANKLES, "knees": KNEES, "hips": HIPS, "shoulders": SHOULDERS}

NO_PERSON = "no person found"
UNSURE = "a person only guessed at (low confidence)"
SEVERAL = "several people (--select-person only)"
FEWER = "fewer people than --select-person counts to"
SMALL = "the person is too small"
NO_MASK = "the segmentation model does not find the person"
CUT_OFF = "too little of the person is in the picture"
# Models give these reasons also for a kind of picture that they were not trained on.
NOT_RECOGNISED = (NO_PERSON, UNSURE, CUT_OFF)


@dataclass(frozen=True)
class View:
    """One photo of one person and its features."""

    image: np.ndarray  # uint8 [H, W, 3]
    box: np.ndarray  # f32 [4], holds all visible keypoints
    score: float  # 0..1, the detection's confidence
    keypoints: np.ndarray  # f32 [17, 3]
    face: np.ndarray | None  # f32 [512], unit length
    face_box: np.ndarray | None  # f32 [4]
    image_embed: np.ndarray  # f32 [E], of the whole picture, unit length
    view_features: np.ndarray  # f16 [17, C]; zeros where the keypoint is not visible
    mask: MaskView | None = None  # where the family has a segmentation model, and that finds the person
    others: tuple[tuple[list[float], float], ...] = ()  # (box, score) of people who were not chosen

    @property
    def people_beside(self) -> list[list[float]]:
        """The boxes of the other people that are no mere guesses."""
        return [box for box, score in self.others if score >= MIN_SCORE]

    @property
    def number(self) -> tuple[int, int]:
        """(which of the people in the photo it shows, counted from the left from 1 on; how many there are)."""
        others = self.people_beside
        return 1 + sum(box[0] + box[2] < self.box[0] + self.box[2] for box in others), 1 + len(others)

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of a shard sample."""
        tensors = {
            "keypoints": self.keypoints,
            "image_embed": self.image_embed,
            "view_features": self.view_features,
        }
        if self.face is not None:
            tensors["face"] = self.face
        return tensors if self.mask is None else tensors | self.mask.tensors()


class ViewReader:
    """Extracts views with the family's pose, face and image-text models, and its segmentation model if it has one.

    ``person``: of several people in a picture take the ``main`` one (large and clear), or the N-th from the left, or
    accept pictures of one person ``only``. Raises BolidError when the family lacks a model.
    """

    def __init__(self, family: Family, device: str = "cpu", person: PersonRule = "main") -> None:
        if person not in ("main", "only") and not (isinstance(person, int) and person >= 1):
            raise BolidError(f"--select-person is {person!r}", "choose main or only, or a number from 1 on")
        from bolid.backends.image_text import ImageTextModel
        from bolid.backends.people import face_detector, pose_detector
        from bolid.backends.segmentation import load_segmenter

        self.person = person
        self.pose = pose_detector(family.require("pose"), device)
        self.faces = face_detector(family.require("face"), device)
        self.image_text = ImageTextModel(family.require("image_text"), device)
        self.segmenter = load_segmenter(family.require("segmentation"), device) if family.has("segmentation") else None

    def read(self, images: Sequence[np.ndarray]) -> list[View | str]:
        """For each image, uint8 [H, W, 3], a View, or the reason why there is none (a constant of this module)."""
        results: list[View | str] = []
        chosen: list[tuple[int, Detection, list[Detection]]] = []
        for index, people in enumerate(self.pose.detect(images)):
            choice = choose_person(people, self.person)
            results.append(choice if isinstance(choice, str) else "")
            if not isinstance(choice, str):
                chosen.append((index, choice, [other for other in people if other is not choice]))
        if not chosen:
            return results
        kept = [images[index] for index, _, _ in chosen]
        keypoints = np.stack([person.keypoints for _, person, _ in chosen])
        embeds, features = (part.float().cpu().numpy() for part in self.image_text.views(kept, keypoints))
        features *= keypoints[..., 2:] >= MIN_CONFIDENCE
        for (index, person, others), embed, feature in zip(chosen, embeds, features, strict=True):
            image = images[index]
            face = face_of(person, self.faces.detect(image)) if len(_head(person)) else None
            box, points = whole_box(person, image.shape[:2]), person.keypoints.astype(np.float32)
            results[index] = View(
                image=image,
                box=box,
                score=float(person.score),
                keypoints=points,
                face=None if face is None else face.embedding.astype(np.float32),
                face_box=None if face is None else face.box.astype(np.float32),
                image_embed=embed.astype(np.float32),
                view_features=feature.astype(np.float16),
                mask=None if self.segmenter is None else self.segmenter.segment(image, box, points),
                others=tuple(([float(side) for side in other.box], float(other.score)) for other in others),
            )
        return results


def choose_person(people: Sequence[Detection], rule: PersonRule) -> Detection | str:
    """The person with the largest area times confidence, or the one that `rule` counts to; or why there is none."""
    if not people:
        return NO_PERSON
    certain = [person for person in people if person.score >= MIN_SCORE]
    if not certain:
        return UNSURE
    if rule == "only" and len(certain) > 1:
        return SEVERAL
    if isinstance(rule, int) and len(certain) > 1:
        if rule > len(certain):
            return FEWER
        person = sorted(certain, key=lambda person: float(person.box[0] + person.box[2]))[rule - 1]
    else:
        person = max(certain, key=lambda person: _area(person.box) * person.score)
    if person.box[3] - person.box[1] < MIN_HEIGHT:
        return SMALL
    visible = person.keypoints[:, 2] >= MIN_CONFIDENCE
    if visible.sum() < MIN_KEYPOINTS or not visible[list(TORSO)].any():
        return CUT_OFF
    return person


def person_in_photo(photo: str | os.PathLike[str], family: Family, device: str = "cpu") -> tuple[np.ndarray, Detection]:
    """(the photo, uint8 [H, W, 3]; its main person), for --pose-from. Raises BolidError when nobody is recognised."""
    from bolid.backends.pose import PoseModel
    from bolid.formats.images import read_photo

    image = read_photo(photo, max_side=1536)
    person = choose_person(PoseModel(family.require("pose"), device).detect([image])[0], "main")
    if isinstance(person, str):
        hint = "give a photo in which one person can be seen at least to the hips"
        if family.name == "tiny":
            hint += "; the tiny family knows only rendered people"
        raise BolidError(f"--pose-from {photo}: {person}", hint)
    return image, person


def lowest_part(keypoints: np.ndarray) -> str:
    """The lowest of BODY_PARTS with both sides visible in `keypoints` [17, 3], else "head"."""
    return next(
        (part for part, pair in BODY_PARTS.items() if (keypoints[list(pair), 2] >= MIN_CONFIDENCE).all()), "head"
    )


def face_of(person: Detection, faces: Sequence[Face]) -> Face | None:
    """The face of this person: the nearest to the pose's head, at most its own size away.

    None when the head is not visible or no face is near it.
    """
    head = _head(person)
    if not len(head):
        return None
    best, least = None, 1.0
    for face in faces:
        centre = (face.box[:2] + face.box[2:]) / 2
        size = max(float(max(face.box[2] - face.box[0], face.box[3] - face.box[1])), 1.0)
        distance = float(np.linalg.norm(centre - head.mean(axis=0))) / size
        if distance < least:
            best, least = face, distance
    return best


def whole_box(person: Detection, size: tuple[int, int]) -> np.ndarray:
    """The detection's box, widened to hold every visible keypoint inside the picture of ``size`` (H, W): f32 [4].

    Detectors tend to cut off raised arms.
    """
    visible = person.keypoints[person.keypoints[:, 2] >= MIN_CONFIDENCE, :2]
    low, high = np.minimum(person.box[:2], visible.min(axis=0)), np.maximum(person.box[2:], visible.max(axis=0))
    return np.clip(np.concatenate([low, high]), 0, [size[1], size[0], size[1], size[0]]).astype(np.float32)


def _head(person: Detection) -> np.ndarray:
    """The visible points of the head, [n, 2]."""
    head = person.keypoints[HEAD]
    return head[head[:, 2] >= MIN_CONFIDENCE, :2]


def person_crop(
    image: np.ndarray, box: np.ndarray, keypoints: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop a photo around the person: (uint8 [h, w, 3], box, keypoints) with ``size`` = (h, w).

    The body encoder takes the family's ``view_size``, the base its ``image_size``; both have the same window. That is
    the largest of this format inside the picture, as close to centred on the person as the picture's edges allow. It
    shrinks until the person fills 40 % of its height. Box and keypoints are moved to the crop.
    """
    from PIL import Image

    height, width = image.shape[:2]
    box = np.asarray(box, np.float64)
    aspect = size[1] / size[0]
    window_h = min(float(height), width / aspect)
    person_h, person_w = box[3] - box[1], box[2] - box[0]
    # Zooming in must not cut the person off: not at the head and feet, nor, for someone lying down, at the sides.
    window_h = min(window_h, max(person_h / 0.4, person_w / aspect, 8.0))
    window_w = window_h * aspect
    left = float(np.clip((box[0] + box[2] - window_w) / 2, 0, width - window_w))
    top = float(np.clip((box[1] + box[3] - window_h) / 2, 0, height - window_h))
    if person_h > window_h:  # too tall for the window: lose the feet, not the head
        top = float(np.clip(box[1] - 0.03 * window_h, 0, height - window_h))
    cut = Image.fromarray(image).resize(
        (size[1], size[0]), Image.Resampling.LANCZOS, box=(left, top, left + window_w, top + window_h)
    )
    scale = size[0] / window_h
    moved = np.asarray(keypoints, np.float32).copy()
    moved[:, :2] = (moved[:, :2] - [left, top]) * scale
    outside = (moved[:, 0] < 0) | (moved[:, 0] > size[1]) | (moved[:, 1] < 0) | (moved[:, 1] > size[0])
    moved[outside, 2] = 0  # outside the crop
    new_box = (box - [left, top, left, top]) * scale
    new_box = np.clip(new_box, 0, [size[1], size[0], size[1], size[0]])
    return np.asarray(cut), new_box.astype(np.float32), moved


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
