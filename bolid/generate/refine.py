"""A second look at faces: each small face is sampled again, larger, and blended into its picture.

In a full-body picture a face has few latent positions. Here the head is cut out as a portrait, enlarged to the size of
the base's pictures, noised in part, denoised as a portrait of the same person, and laid back with a soft edge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bolid.backends.people import FaceDetector, PoseDetector

FACE_IN_PORTRAIT, CENTRE_IN_PORTRAIT = 0.30, 0.36
"""The height of the face, and where its middle is, in fractions of a portrait's height."""
LEAST_GAIN = 1.5
"""A face is sampled again only where it has so many times more latent positions then."""
STRENGTH = 0.5
"""How much of the denoising is done again, 0 to 1."""
HEAD_RADIUS = 0.9
"""Half of the height of what is blended in, in heights of the face."""
_HEAD_KEYPOINTS = 5  # COCO's first: nose, eyes, ears
_FRAMING = re.compile(r"\b(full|whole|half|three)[- ](body|length|quarters?)\b( photo(graph)?| picture| shot)?", re.I)

Resample = Callable[[list[np.ndarray], list[str], list[int], float], list[np.ndarray]]
"""(pictures of the base's size, their prompts, seeds, strength) -> the pictures, sampled again."""


@dataclass(frozen=True)
class Head:
    """Where a face is, in pixels of its picture."""

    x: float  # of the face's middle
    y: float
    height: float  # of the face


def portrait_prompt(prompt: str) -> str:
    """The prompt for the head alone: "a full body photo of a man" becomes "a portrait of a man"."""
    return _FRAMING.sub("portrait", prompt, count=1)


class FaceRefiner:
    """Finds heads by the family's face model, or by the pose model where it finds no face. `size`: (height, width) of
    the base's pictures."""

    def __init__(self, faces: FaceDetector, pose: PoseDetector, size: tuple[int, int]) -> None:
        self.faces, self.pose, self.size = faces, pose, size

    def __call__(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[int], resample: Resample
    ) -> list[np.ndarray]:
        """The pictures, uint8 [H,W,3], with the surest person's face sampled again where that gains something. They
        may be larger than the base's, by an upscaler."""
        done = list(pictures)
        heads = {i: head for i, picture in enumerate(pictures) if (head := self.find(picture)) is not None}
        windows = {i: window(head, self.size) for i, head in heads.items()}
        chosen = [i for i, (_, _, height) in windows.items() if pictures[i].shape[0] / height >= LEAST_GAIN]
        if not chosen:
            return done
        crops = [cut(pictures[i], windows[i], self.size) for i in chosen]
        texts = [portrait_prompt(prompts[i]) for i in chosen]
        for i, made in zip(chosen, resample(crops, texts, [seeds[i] for i in chosen], STRENGTH), strict=True):
            done[i] = blend_head(pictures[i], made, windows[i], heads[i])
        return done

    def find(self, picture: np.ndarray) -> Head | None:
        """The face of the surest person, or where the keypoints of a head say that it is; None for neither."""
        if faces := self.faces.detect(picture):
            left, top, right, bottom = faces[0].box
            return Head((left + right) / 2, (top + bottom) / 2, bottom - top)
        people = self.pose.detect([picture])[0]
        if not people:
            return None
        seen = people[0].keypoints[:_HEAD_KEYPOINTS]
        seen = seen[seen[:, 2] >= 0.5, :2]
        shoulders = people[0].keypoints[5:7]
        if len(seen) < 3 or (shoulders[:, 2] < 0.5).any():
            return None  # from behind, or the head is not in the picture
        middle, neck = seen.mean(0), shoulders[:, :2].mean(0)
        return Head(middle[0], middle[1], 0.65 * float(np.linalg.norm(neck - middle)))


def window(head: Head, size: tuple[int, int]) -> tuple[float, float, float]:
    """(left, top, height) of the portrait around a head, of the proportions of `size` (height, width)."""
    height = head.height / FACE_IN_PORTRAIT
    return head.x - height * size[1] / size[0] / 2, head.y - height * CENTRE_IN_PORTRAIT, height


def _from_crop(place: tuple[float, float, float], rows: int) -> np.ndarray:
    """The affine map, f32 [2,3], from pixels of a crop of so many `rows` to those of its picture; see `window`."""
    left, top, height = place
    scale = height / rows
    # Pixels have their middles at half numbers.
    return np.array([[scale, 0, left + scale / 2 - 0.5], [0, scale, top + scale / 2 - 0.5]], np.float32)


def cut(picture: np.ndarray, place: tuple[float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The part of `picture` at `place` (see `window`), enlarged to `size`; outside, its edges go on."""
    import cv2

    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, _from_crop(place, size[0]), size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def blend_head(picture: np.ndarray, made: np.ndarray, place: tuple[float, float, float], head: Head) -> np.ndarray:
    """`picture` with the head of `made`, the part at `place` sampled again, inside a soft ellipse around `head`."""
    import cv2

    scale = place[2] / made.shape[0]
    blurred = cv2.GaussianBlur(made, (0, 0), 0.5 / scale) if scale < 0.5 else made  # what a smaller picture can hold
    onto, size = _from_crop(place, made.shape[0]), picture.shape[1::-1]
    placed = cv2.warpAffine(blurred, onto, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    radius = HEAD_RADIUS * head.height
    distance = np.hypot((x - head.x) / (0.9 * radius), (y - head.y) / radius)
    weight = np.clip((1 - distance) / 0.35, 0, 1)[..., None]  # 1 within two thirds of the ellipse, 0 at its edge
    return (weight * placed + (1 - weight) * picture).round().astype(np.uint8)
