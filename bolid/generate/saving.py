"""Pictures as PNG files that carry their run record, beside those of other commands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.run import atomic_path, canonical_json, disk_errors, run_differences


def save_picture(path: Path, picture: Any, record: dict[str, Any]) -> None:
    """Write a PNG (of a PIL picture or uint8 [H,W,3]) that carries its run record in the text chunk `bolid`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("bolid", canonical_json(record))
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)


def save_beside(path: Path, picture: Any, record: dict[str, Any]) -> Path:
    """Write to `path`, or, where a picture of another command lies there, to the same with _2, _3, ...: nothing is
    lost, and the same command writes the same files. Returns where."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    place = next(place for place in itertools.chain([path], numbered) if _claim(place) or _is_of_run(place, record))
    try:
        save_picture(place, picture, record)
    except BaseException:
        if not place.stat().st_size:
            place.unlink()
        raise
    return place


def _claim(path: Path) -> bool:
    """Whether `path` was free. It is an empty file now, and no other process takes it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def _is_of_run(path: Path, record: dict[str, Any]) -> bool:
    """Whether the same command has made the picture at `path`."""
    from bolid.formats.images import picture_record

    try:
        found = picture_record(path.read_bytes(), str(path))
    except BolidError:  # unreadable, so not ours
        return False
    return found is not None and not run_differences(found, record)
