"""A view without colour: a person's mask and keypoints, the same in a render and in a photograph.

Shapes: K = 17 COCO keypoints; (H, W) = MASK_SIZE, the window that `body_views.view_crop` cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bolid.method.body_views import crop_size, view_crop

MASK_SIZE = crop_size(2.0)


class MaskView(NamedTuple):
    """A person's mask and keypoints in their window."""

    mask: np.ndarray  # bool [H, W]
    keypoints: np.ndarray  # f32 [K, 3], (x, y) in -1..1 over the window, confidence 0..1

    @classmethod
    def cut(cls, mask: np.ndarray, keypoints: np.ndarray) -> MaskView:
        """The window of a mask of the whole picture, [h, w] of 0..255 or bool; `keypoints` [K, 3] in its pixels."""
        levels = mask.astype(np.uint8) * 255 if mask.dtype == bool else mask
        crop, inside = view_crop(np.repeat(levels[..., None], 3, 2), keypoints, detail=2.0)
        return cls(crop[..., 0] >= 128, inside)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, np.ndarray]) -> MaskView | None:
        """What `tensors` gave; None for a sample without a mask."""
        if "mask" not in tensors:
            return None
        return cls(np.unpackbits(tensors["mask"]).reshape(MASK_SIZE).astype(bool), tensors["mask_keypoints"])

    def tensors(self) -> dict[str, np.ndarray]:
        """As a shard sample holds them: the mask as bits, u8 [H * W / 8]."""
        return {"mask": np.packbits(self.mask), "mask_keypoints": self.keypoints}

    def crop(self, detail: float) -> np.ndarray:
        """The mask as the body encoder's crop at this detail: uint8 [h, w, 1], 255 on the person."""
        from PIL import Image

        height, width = crop_size(detail)
        levels = Image.fromarray(self.mask.astype(np.uint8) * 255)
        return np.asarray(levels.resize((width, height), Image.Resampling.BOX))[..., None]
