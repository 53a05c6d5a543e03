"""A view: one photo of one person, and what the family's models see in it.

``extract``, ``profile``, ``generate --reference`` and ``evaluate`` all look at photos through ``ViewReader``, so that a
person looks the same to each of them. Images are uint8 [H, W, 3] RGB; boxes are [left, top, right, bottom] and
keypoints [17, 3] (x, y, confidence), in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bolid.errors import BolidError

if TYPE_CHECKING:
    from bolid.backends.face import Face
    from bolid.backends.pose import Detection
    from bolid.models.families import Family

PersonRule = Literal["main", "only"]

SEEN = 0.3  # a keypoint of less confidence is not seen
MIN_SCORE = 0.35  # of the person's detection
MIN_HEIGHT = 32  # pixels of the person's box
MIN_KEYPOINTS = 6  # seen ones, one of them of the torso; a hand or a foot alone has fewer
HEAD, TORSO = slice(0, 5), (5, 6, 11, 12)  # of COCO's 17: nose, eyes, ears; shoulders, hips
PAIRS = {"feet": (15, 16), "knees": (13, 14), "hips": (11, 12), "shoulders": (5, 6)}  # "feet": the ankles

NO_PERSON = "no person found"
UNSURE = "a person only guessed at (low confidence)"
SEVERAL = "several people (--person only)"
SMALL = "the person is too small"
CUT_OFF = "too little of the person is in the picture"
# Reasons that also come from models that do not know this kind of picture.
NOT_RECOGNISED = (NO_PERSON, UNSURE, CUT_OFF)


@dataclass(frozen=True)
class View:
    """What is known of one photo of one person."""

    image: np.ndarray  # uint8 [H, W, 3]
    box: np.ndarray  # f32 [4], holds all seen keypoints
    score: float  # 0..1, how sure the detection is
    keypoints: np.ndarray  # f32 [17, 3]
    face: np.ndarray | None  # f32 [512], unit length
    face_box: np.ndarray | None  # f32 [4]
    image_embed: np.ndarray  # f32 [E], of the whole picture, unit length
    view_features: np.ndarray  # f16 [17, C]; zeros where the keypoint is not seen
    others: tuple[tuple[list[float], float], ...] = ()  # (box, score) of people who were not chosen

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of a shard sample."""
        tensors = {
            "keypoints": self.keypoints,
            "image_embed": self.image_embed,
            "view_features": self.view_features,
        }
        return tensors if self.face is None else {**tensors, "face": self.face}


class ViewReader:
    """The family's pose, face and image-text models together.

    ``person``: in a picture of several people take the ``main`` one (large and clear), or accept pictures of one person
    ``only``. Raises BolidError when the family lacks a model.
    """

    def __init__(self, family: Family, device: str = "cpu", person: PersonRule = "main") -> None:
        if person not in ("main", "only"):
            raise BolidError(f"--person is {person!r}", "choose main or only")
        from bolid.backends.face import FaceModel
        from bolid.backends.image_text import ImageTextModel
        from bolid.backends.pose import PoseModel

        self.person = person
        self.pose = PoseModel(family.require("pose"), device)
        self.faces = FaceModel(family.require("face"), device)
        self.image_text = ImageTextModel(family.require("image_text"), device)

    def read(self, images: Sequence[np.ndarray]) -> list[View | str]:
        """For each image a View, or the reason why there is none (one of the constants of this module)."""
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
        features *= keypoints[..., 2:] >= SEEN
        for (index, person, others), embed, feature in zip(chosen, embeds, features, strict=True):
            image = images[index]
            face = face_of(person, self.faces.detect(image)) if len(_head(person)) else None
            results[index] = View(
                image=image,
                box=whole_box(person, image.shape[:2]),
                score=float(person.score),
                keypoints=person.keypoints.astype(np.float32),
                face=None if face is None else face.embedding.astype(np.float32),
                face_box=None if face is None else face.box.astype(np.float32),
                image_embed=embed.astype(np.float32),
                view_features=feature.astype(np.float16),
                others=tuple(([float(side) for side in other.box], float(other.score)) for other in others),
            )
        return results


def choose_person(people: Sequence[Detection], rule: PersonRule) -> Detection | str:
    """The person a photo is of, or the reason why nobody is. Large and sure beats small or doubtful."""
    if not people:
        return NO_PERSON
    sure = [person for person in people if person.score >= MIN_SCORE]
    if not sure:
        return UNSURE
    if rule == "only" and len(sure) > 1:
        return SEVERAL
    person = max(sure, key=lambda person: _area(person.box) * person.score)
    if person.box[3] - person.box[1] < MIN_HEIGHT:
        return SMALL
    seen = person.keypoints[:, 2] >= SEEN
    if seen.sum() < MIN_KEYPOINTS or not seen[list(TORSO)].any():
        return CUT_OFF
    return person


def seen_down_to(keypoints: np.ndarray) -> str:
    """The lowest of PAIRS of which both sides are seen in `keypoints` [17, 3], else "head"."""
    return next((part for part, pair in PAIRS.items() if (keypoints[list(pair), 2] >= SEEN).all()), "head")


def face_of(person: Detection, faces: Sequence[Face]) -> Face | None:
    """The face on this person's shoulders: the nearest to where the pose sees the head, and not further off than its
    own size. None when the head is not seen or no face is there."""
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
    """The detection's box, widened to hold every seen keypoint inside the picture of ``size`` (H, W): f32 [4].

    A detector tends to leave out raised arms.
    """
    seen = person.keypoints[person.keypoints[:, 2] >= SEEN, :2]
    low, high = np.minimum(person.box[:2], seen.min(axis=0)), np.maximum(person.box[2:], seen.max(axis=0))
    return np.clip(np.concatenate([low, high]), 0, [size[1], size[0], size[1], size[0]]).astype(np.float32)


def _head(person: Detection) -> np.ndarray:
    """The seen points of the head, [n, 2]."""
    head = person.keypoints[HEAD]
    return head[head[:, 2] >= SEEN, :2]


def person_crop(
    image: np.ndarray, box: np.ndarray, keypoints: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a photo to the family's format around the person: (uint8 [h, w, 3], box, keypoints), ``size`` = (h, w).

    For the body encoder ``size`` is the family's ``view_size``; for the base it is ``image_size``, the same window.

    The window is the largest of that format that fits into the picture, as well centred on the person as it can be. A
    person who would fill less than 40 % of its height is zoomed in on, until they do. Box and keypoints move along.
    """
    from PIL import Image

    height, width = image.shape[:2]
    box = np.asarray(box, np.float64)
    aspect = size[1] / size[0]
    window_h = min(float(height), width / aspect)
    person_h, person_w = box[3] - box[1], box[2] - box[0]
    # Zooming in must neither cut the person off nor, for someone lying down, make the window narrower than they are.
    window_h = min(window_h, max(person_h / 0.4, person_w / aspect, 8.0))
    window_w = window_h * aspect
    left = float(np.clip((box[0] + box[2] - window_w) / 2, 0, width - window_w))
    top = float(np.clip((box[1] + box[3] - window_h) / 2, 0, height - window_h))
    if person_h > window_h:  # too tall for the window: rather lose the feet than the head
        top = float(np.clip(box[1] - 0.03 * window_h, 0, height - window_h))
    cut = Image.fromarray(image).resize(
        (size[1], size[0]), Image.Resampling.LANCZOS, box=(left, top, left + window_w, top + window_h)
    )
    scale = size[0] / window_h
    moved = np.asarray(keypoints, np.float32).copy()
    moved[:, :2] = (moved[:, :2] - [left, top]) * scale
    outside = (moved[:, 0] < 0) | (moved[:, 0] > size[1]) | (moved[:, 1] < 0) | (moved[:, 1] > size[0])
    moved[outside, 2] = 0  # cut away, so not seen any more
    new_box = (box - [left, top, left, top]) * scale
    new_box = np.clip(new_box, 0, [size[1], size[0], size[1], size[0]])
    return np.asarray(cut), new_box.astype(np.float32), moved


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
