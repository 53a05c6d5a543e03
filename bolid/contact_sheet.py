"""A contact sheet: pictures in labelled rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_GAP = 6
_LABEL = 188  # rows' labels are wrapped at this width, in pixels
_HEIGHTS = (192, 512)  # the least and the greatest height of a picture, in pixels


def contact_sheet(
    cells: Sequence[Sequence[Sequence[Image.Image]]], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """`cells[row][column]`: the pictures (all of one size) of a cell, side by side; `rows`, `columns`: their labels."""
    from PIL import Image, ImageDraw

    from bolid.formats.images import label_font

    width, height = cells[0][0][0].size
    scale = min(max(height, _HEIGHTS[0]), _HEIGHTS[1]) / height
    size = (round(width * scale), round(height * scale))
    across = max(len(pictures) for row in cells for pictures in row)
    font = label_font("".join([*rows, *columns]), 15)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    block = across * size[0] + (across - 1) * 2
    wrapped = [wrap_text(label, measure, font, _LABEL) for label in rows]
    longest = max(measure.textlength(line, font=font) for label in wrapped for line in label.split("\n"))
    margin = round(longest) + 2 * _GAP if any(rows) else 0
    head = 26 if any(columns) else 0
    tall = [max(size[1], 20 * (label.count("\n") + 1)) + _GAP for label in wrapped]
    sheet = Image.new("RGB", (margin + len(columns) * (block + _GAP) + _GAP, head + sum(tall) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        place = (margin + _GAP + column * (block + _GAP) + block / 2, head / 2 + 2)
        draw.text(place, label, fill="black", font=font, anchor="mm")
    top = head + _GAP
    for row, (label, step) in enumerate(zip(wrapped, tall, strict=True)):
        draw.multiline_text((_GAP, top + 2), label, fill="black", font=font, spacing=3)
        for column, pictures in enumerate(cells[row]):
            for index, picture in enumerate(pictures):
                left = margin + _GAP + column * (block + _GAP) + index * (size[0] + 2)
                sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
        top += step
    return sheet


def wrap_text(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """`text` with line breaks, so that no line of several words is wider than `width` pixels."""
    lines = [""]
    for word in text.replace("\n", " \n ").split(" "):
        line = f"{lines[-1]} {word}".strip(" ")
        if word == "\n":
            lines.append("")
        elif draw.textlength(line, font=font) <= width or not lines[-1]:
            lines[-1] = line
        else:
            lines.append(word)
    return "\n".join(lines)
