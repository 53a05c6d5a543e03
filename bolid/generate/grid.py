"""The contact sheet of a grid: every picture of the request, labelled with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.contact_sheet import contact_sheet
from bolid.generate.identity import Identity
from bolid.generate.request import Request

if TYPE_CHECKING:
    from PIL import Image

Place = tuple[int, int, int, int]
"""A picture's person, cell, prompt and number."""


def grid_sheet(request: Request, people: Sequence[Identity], pictures: Mapping[Place, Path]) -> Image.Image:
    """Columns: the first axis of the grid. Rows: people, prompts and the other axes, where there are several."""
    from PIL import Image

    cells, prompts = request.cells, request.prompts
    first, *others = cells[0].values
    columns = list(dict.fromkeys(cell.values[first] for cell in cells))
    rows: dict[tuple[int, int, str], list[list[Image.Image]]] = {}  # person, prompt, label -> pictures of each column
    for who, person in enumerate(people):
        for index, prompt in enumerate(prompts):
            for where, cell in enumerate(cells):
                words = [person.folder, prompt if len(prompts) > 1 else ""]
                words += [f"{axis} {cell.values[axis]}" for axis in others]
                label = "\n".join(word for word in words if word)
                row = rows.setdefault((who, index, label), [[] for _ in columns])
                for number in range(request.n):
                    with Image.open(pictures[who, where, index, number]) as picture:
                        row[columns.index(cell.values[first])].append(picture.convert("RGB"))
    return contact_sheet(list(rows.values()), [label for _, _, label in rows], [f"{first} {v}" for v in columns])
