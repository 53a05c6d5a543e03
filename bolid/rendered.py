"""Is a picture a photograph, or a render of the kind that `tiny` knows? Decided by its fine texture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from bolid.models.families import Family

REFUSED = "a photograph, and family tiny knows only rendered people"
REFUSED_HINT = "choose a family for photographs (bolid models list); --force uses them all the same"

SIDE = 256  # pixels; larger pictures are reduced to this longer side, so that their size does not count
BLOCK = 8  # pixels, the side of a block
PHOTOGRAPH = 0.5
"""From this fine texture on a picture counts as a photograph.

Measured: of 5,465 renders by `bolid synth` (2,227 people, 187 of them in no training) the largest has 0.47; of 902 of
them as JPEG of quality 40, 0.41. Of the 34 photographs that installed packages and those of scikit-learn and gradio
ship, all 7 of people have 1.00 and more, 12 cuts of single persons 0.87 and more, and 25 of the 27 others 0.51 and
more; a cheetah before a wholly blurred background has 0.34, cells under a microscope 0.29. A photograph that is blurred
until no texture is left passes for a render (all 18 of people, at a Gaussian blur of 1/256 of the longer side), and so
may one of JPEG quality 40 (one of 7 of people is near: 0.53). A render with noise of 5 grey levels
passes for a photograph."""


def fine_texture(image: np.ndarray) -> float:
    """Noise and texture of a picture, uint8 [H, W, 3]: in grey levels, 0 for a picture of one colour.

    The mean absolute response to Immerkaer's noise filter (Computer Vision and Image Understanding 64, 1996), scaled
    so that Gaussian noise of deviation s gives s; of each block of 8x8 pixels, and then the median over the blocks.
    Renders are plain in most places, photographs nearly nowhere.
    """
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(image)
    longer = max(picture.size)
    if longer > SIDE:
        size = [max(1, round(side * SIDE / longer)) for side in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BOX)
    grey = np.asarray(picture, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # [H, W]
    rows = grey[:-2] - 2 * grey[1:-1] + grey[2:]
    response = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]) * np.sqrt(np.pi / 2) / 6
    height, width = (side // BLOCK * BLOCK for side in response.shape)
    if not height or not width:
        return 0.0
    blocks = response[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return float(np.median(blocks.mean((1, 3))))


def is_photograph(image: np.ndarray) -> bool:
    """Whether a picture, uint8 [H, W, 3], has the fine texture of a photograph."""
    return fine_texture(image) >= PHOTOGRAPH


OUTLINE_ONLY = (
    "these are photographs, and family tiny knows only rendered people: the body is read off the outline alone, "
    "there is no face, and what clothes hide is not seen (how far it can be trusted: docs/concepts/mask-encoder.md)"
)


def refusal(image: np.ndarray, family: Family) -> str:
    """Why `family` cannot read a picture, uint8 [H, W, 3]: REFUSED for a photograph given to `tiny`, else ""."""
    return REFUSED if family.name == "tiny" and is_photograph(image) else ""
