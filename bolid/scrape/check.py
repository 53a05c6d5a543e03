"""Checks of one photo: is it a picture, how large, how sharp, how many people, is it a copy?"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bolid.formats.images import decode_image, glance
from bolid.models.families import get_family
from bolid.rendered import refusal

# Two photos whose perceptual hashes (signs of a 16x16 DCT) differ in at most so many of 256 bits are the same photo. In
# 40 rendered people with 8 photos each, two photos of a person differed in 66 bits or more, and a copy at 3/4 of the
# size and JPEG quality 50 in 12 at most. Their sharpness was 102 or more, and at most 19.5 after a blur of 1 % of the
# width.
HASH_SIDE = 16
MAX_PHASH_DISTANCE = 24
MEASURE_SIDE = 512  # pixels: sharpness is measured on a copy of this size, so that it does not depend on the camera's
POSE_SIDE = 1536  # pixels: the size at which `extract` runs the pose model

Watermark = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Filters:
    """What a photo must be like. A verdict is recorded with the setting of the filter, as `name=value`."""

    min_size: int
    min_sharpness: float
    one_person: str  # the family whose pose model counts people; "" for off
    photographs: str  # the family that drops photographs because it does not know them; "" for off
    watermark: str  # the checker's name; "" for off
    min_photos: int
    max_photos: int | None
    robots: bool
    public_only: bool

    def settings(self) -> list[str]:
        """All filters as text, NAME=VALUE."""
        return [f"{name}={value}" for name, value in vars(self).items()]

    def setting(self, name: str) -> str:
        """One filter as text, NAME=VALUE: under it a verdict is remembered."""
        return f"{name}={getattr(self, name)}"


@dataclass(frozen=True)
class PhotoQuality:
    """What was measured of a photo."""

    sha256: str  # of the original
    bytes: int  # of the original
    format: str  # Pillow's name of it
    width: int
    height: int
    sharpness: float
    phash: int
    reason: str = ""  # why it is dropped; "" for a good one
    setting: str = ""  # the filter that decides so


class PhotoChecker:
    """Measures photos and applies the filters. Several threads may call it."""

    def __init__(self, filters: Filters, watermark: Watermark | None, family: str | None, device: str) -> None:
        self._filters, self._watermark, self._family = filters, watermark, get_family(family)
        self._pose: Any = None
        self._one_at_a_time = threading.Lock()
        if filters.one_person:
            from bolid.backends.people import pose_detector
            from bolid.run import pick_device

            self._pose = pose_detector(self._family.require("pose"), pick_device(device))

    def __call__(self, data: bytes) -> PhotoQuality:
        """Raises BolidError for what is not a whole picture."""
        import cv2
        import imagehash
        from PIL import Image

        grey, (width, height), kind = glance(data, MEASURE_SIDE, name="the file")
        sharpness = float(cv2.Laplacian(np.asarray(grey), cv2.CV_16S).var())
        rough = grey.resize((4 * HASH_SIDE, 4 * HASH_SIDE), Image.Resampling.BOX)  # the size that phash works at
        bits = imagehash.phash(rough, hash_size=HASH_SIDE).hash
        phash = int.from_bytes(np.packbits(bits).tobytes(), "big")
        reason, setting = self._reason(data, width, height, sharpness)
        sha256 = hashlib.sha256(data).hexdigest()
        return PhotoQuality(sha256, len(data), kind, width, height, round(sharpness, 1), phash, reason, setting)

    def _reason(self, data: bytes, width: int, height: int, sharpness: float) -> tuple[str, str]:
        """(why the photo is dropped, the setting of the filter that drops it); ("", "") for a good one."""
        filters = self._filters
        if min(width, height) < filters.min_size:
            return f"smaller than --min-size {filters.min_size}", filters.setting("min_size")
        if sharpness < filters.min_sharpness:
            return f"blurred (--min-sharpness {filters.min_sharpness:g})", filters.setting("min_sharpness")
        if self._pose is None and self._watermark is None:
            return "", ""
        image = decode_image(data, name="the file", max_side=POSE_SIDE)
        if self._pose is not None:
            from bolid.views import choose_person

            if filters.photographs and (refused := refusal(image, self._family)):
                return refused, filters.setting("photographs")
            with self._one_at_a_time:
                choice = choose_person(self._pose.detect([image])[0], "only")
            if isinstance(choice, str):
                return choice.replace("--select-person only", "--one-person"), filters.setting("one_person")
        if self._watermark is not None and (mark := self._watermark(image)):
            return f"watermark: {mark}", filters.setting("watermark")
        return "", ""
