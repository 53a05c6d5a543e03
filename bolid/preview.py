"""The preview sheet of `bolid profile`: every photo with the person, the keypoints and the face as they were taken."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bolid.errors import BolidError
from bolid.formats.images import label_font, printable, read_photo
from bolid.method.keypoints import BONES, MIN_CONFIDENCE
from bolid.run import atomic_path

if TYPE_CHECKING:
    from bolid.person import PhotoReport
    from bolid.views import View

HEIGHT, WIDEST = 420, 520  # pixels of a photo in the sheet, at most
ACROSS = 4  # photos in a row
_GAP, _HEAD = 10, 64
_LETTERS = 44  # of a caption in a line
_TAKEN, _OTHER, _BONE, _POINT, _FACE = "#00c853", "#9e9e9e", "#ff9100", "#d50000", "#2979ff"


def save_preview(path: Path, reports: Sequence[PhotoReport], views: Mapping[Path, View]) -> None:
    """Write the sheet as a PNG: one tile a photo of `reports`; `views`: of the photos that were used.

    Green: the person that was taken; grey: others, all numbered from the left; orange and red: bones and visible
    keypoints; blue: the face.
    """
    tiles = [_tile(report, views.get(report.photo)) for report in reports]
    rows = [tiles[start : start + ACROSS] for start in range(0, len(tiles), ACROSS)]
    width = max(sum(tile.width + _GAP for tile in row) for row in rows) + _GAP
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    top = _GAP
    for row, step in zip(rows, heights, strict=True):
        left = _GAP
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + _GAP
        top += step
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def check_preview(path: Path) -> None:
    """Raises BolidError where the sheet could not be written to `path`."""
    if path.suffix.lower() != ".png":
        raise BolidError(f"--preview {path} is no PNG", "end the name in .png")


def _tile(report: PhotoReport, view: View | None) -> Image.Image:
    """A photo under two lines: its name, and what was made of it."""
    image = _photo(report.photo) if view is None else view.image
    scale = min(HEIGHT / image.shape[0], WIDEST / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    if view is not None:
        _draw_view(ImageDraw.Draw(picture), view, scale)
        face = "no face" if view.face is None else "grey face" if report.grey else "face"
        whom = f"person {report.number} of {report.people}, " if report.people > 1 else ""
        caption = f"{whom}{face}, down to {report.down_to}, weight {report.weight:.2f}"
    else:
        picture = Image.blend(picture, Image.new("RGB", size, "white"), 0.5)
        caption = f"not used: {report.rejected}"
    lines = [unicodedata.normalize("NFC", printable(report.photo.name)), *textwrap.wrap(caption, _LETTERS)[:2]]
    font = label_font("".join(lines), 14)
    lines = [_cut(line, font, WIDEST) for line in lines]
    width = max(size[0], *(round(font.getlength(line)) + 4 for line in lines))
    tile = Image.new("RGB", (width, size[1] + _HEAD), "white")
    tile.paste(picture, (0, _HEAD))
    draw = ImageDraw.Draw(tile)
    for row, line in enumerate(lines):
        draw.text((2, 3 + 20 * row), line, fill="black" if view is not None or not row else "#c62828", font=font)
    return tile


def _draw_view(draw: ImageDraw.ImageDraw, view: View, scale: float) -> None:
    points = view.keypoints[:, :2] * scale
    seen = view.keypoints[:, 2] >= MIN_CONFIDENCE
    font = ImageFont.load_default(16)
    boxes = [(view.box, _TAKEN), *((np.array(box), _OTHER) for box in view.people_beside)]
    boxes.sort(key=lambda pair: float(pair[0][0] + pair[0][2]))
    for number, (box, colour) in enumerate(boxes, 1):
        draw.rectangle([float(side) for side in box * scale], outline=colour, width=3)
        if len(boxes) > 1:
            corner = (float(box[0] * scale) + 6, float(box[1] * scale) + 4)
            draw.text(corner, str(number), fill=colour, font=font, stroke_width=2, stroke_fill="white")
    for a, b in (pair for pairs in BONES.values() for pair in pairs):
        if seen[a] and seen[b]:
            draw.line([*points[a], *points[b]], fill=_BONE, width=3)
    for x, y in points[seen]:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=_POINT)
    if view.face_box is not None:
        draw.rectangle([float(side) for side in view.face_box * scale], outline=_FACE, width=2)


def _photo(path: Path) -> np.ndarray:
    """The photo, or a grey page for one that cannot be read."""
    try:
        return read_photo(path, max_side=WIDEST)
    except BolidError:
        return np.full((HEIGHT, HEIGHT * 3 // 4, 3), 235, np.uint8)


def _cut(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
