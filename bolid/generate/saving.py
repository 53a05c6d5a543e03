"""Pictures as files that carry their run record, beside those of other commands."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bolid.run import atomic_path, claim, remove_leftovers, run_differences, sync_file, unfinished


def save_picture(path: Path, picture: Any, record: dict[str, Any], parameters: str = "") -> None:
    """Write a PIL picture or uint8 [H,W,3] with its run record, in the format of the path's ending.

    `parameters`: the settings as other programs read them, see `bolid.generate.parameters`.
    """
    with atomic_path(path) as temporary:
        _write(temporary, picture, record, parameters)


def save_beside(path: Path, picture: Any, record: dict[str, Any], parameters: str = "") -> Path:
    """Write to `path`, or, where a picture of another command lies there, to the same with _2, _3, ...: nothing is
    lost, and the same command writes the same files. Returns where."""
    with unfinished(path) as temporary:
        _write(temporary, picture, record, parameters)
        sync_file(temporary)
        for place in _places(path):
            if _is_of_run(place, record):
                os.replace(temporary, place)
                return place
            if claim(temporary, place):
                return place
    raise RuntimeError("unreachable: there is always another name")


def find_finished(path: Path, records: Sequence[dict[str, Any]]) -> Path | None:
    """The picture that `save_beside` would replace, which has one of the `records`; None where there is none.

    Of a process that was killed after it had named its picture, the temporary file is removed.
    """
    there = itertools.takewhile(Path.exists, _places(path))
    found = next((place for place in there if any(_is_of_run(place, record) for record in records)), None)
    if found is not None:
        remove_leftovers(path)
    return found


def _write(path: Path, picture: Any, record: dict[str, Any], parameters: str) -> None:
    from PIL import Image

    from bolid.formats.pictures import write_picture

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    write_picture(path, image, record, parameters)


def _places(path: Path) -> Iterator[Path]:
    return itertools.chain([path], (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2)))


def _is_of_run(path: Path, record: dict[str, Any]) -> bool:
    """Whether the picture at `path` is whole and the same command has made it."""
    from bolid.formats.pictures import record_of_whole

    found = record_of_whole(path)
    return found is not None and not run_differences(found, record)
