"""Photos that a browser sends: limits, and pictures of what the models saw in them."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from bolid.errors import BolidError
from bolid.method.keypoints import BONES, MIN_CONFIDENCE
from bolid.views import View

if TYPE_CHECKING:
    from PIL import Image

MAX_PHOTOS = 40
MAX_BYTES = 32 * 1024 * 1024
"""Of one uploaded file."""

_LOCK = ".lock"
_SIDE = 640  # pixels: photos are shown about so large
_BOX, _BONE, _FACE = (250, 249, 247), (196, 60, 44), (64, 120, 180)


def own_folder(uploads: Path) -> tuple[Path, FileLock]:
    """A new folder below `uploads`, for one server as long as it holds the lock. Those without a server are deleted."""
    uploads.mkdir(parents=True, exist_ok=True)
    for old in uploads.iterdir():
        if old.suffix == _LOCK:
            continue
        lock = FileLock(old.with_name(old.name + _LOCK), timeout=0)
        try:
            with lock:
                delete_folder(old, lock)
        except Timeout:  # it is another server's
            continue
    name = secrets.token_hex(8)
    lock = FileLock(uploads / (name + _LOCK), timeout=0)
    lock.acquire()  # before there is a folder that others could delete
    (uploads / name).mkdir()
    return uploads / name, lock


def delete_folder(folder: Path, lock: FileLock) -> None:
    """Delete a server's uploads, and its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.release(force=True)
    Path(lock.lock_file).unlink(missing_ok=True)


def uploaded(files: Sequence[str | Path], folder: Path) -> list[Path]:
    """The files, which must lie in the `folder` of uploads. Raises BolidError for others, too many, too large ones."""
    if len(files) > MAX_PHOTOS:
        raise BolidError(f"{len(files)} photos are too many", f"give at most {MAX_PHOTOS}: eight good ones are enough")
    paths = [Path(file) for file in files]
    for path in paths:
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside or not path.is_file():
            raise BolidError(f"{path.name!r} was not uploaded", "upload the file first")
        if path.stat().st_size > MAX_BYTES:
            raise BolidError(f"{path.name} is larger than {MAX_BYTES // 2**20} MB", "send a smaller copy")
    return paths


def draw_detections(view: View) -> Image.Image:
    """The photo with the person's box, skeleton and face."""
    from PIL import Image, ImageDraw

    picture, factor = enlarged(Image.fromarray(view.image), _SIDE)
    pen, width = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 220))
    pen.rectangle([float(x) * factor for x in view.box], outline=_BOX, width=width)
    if view.face_box is not None:
        pen.rectangle([float(x) * factor for x in view.face_box], outline=_FACE, width=width)
    points, sure = view.keypoints[:, :2] * factor, view.keypoints[:, 2] >= MIN_CONFIDENCE
    for a, b in (pair for bones in BONES.values() for pair in bones):
        if sure[a] and sure[b]:
            pen.line([tuple(points[a]), tuple(points[b])], fill=_BONE, width=width)
    for x, y in points[sure]:
        pen.ellipse([x - 1.5 * width, y - 1.5 * width, x + 1.5 * width, y + 1.5 * width], fill=_BONE)
    return picture


def faded_photo(photo: Path) -> Image.Image:
    """A photo that was left out, pale; a grey field where it is no picture."""
    from PIL import Image

    from bolid.formats.images import read_photo

    try:
        pixels = read_photo(photo, max_side=_SIDE)
    except BolidError:
        return Image.new("RGB", (_SIDE // 2, _SIDE * 2 // 3), (225, 222, 217))
    pale = Image.fromarray((0.35 * pixels + 0.65 * 225).astype(np.uint8))
    return enlarged(pale, _SIDE)[0]


def enlarged(picture: Image.Image, side: int) -> tuple[Image.Image, float]:
    """A picture about `side` pixels long, and by how much: small ones a whole number of times as large, sharply."""
    from PIL import Image

    longest = max(picture.size)
    factor = float(side // longest) if longest * 2 <= side else min(1.0, side / longest)
    size = [max(1, round(length * factor)) for length in picture.size]
    kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return (picture.resize(size, kind) if factor != 1 else picture.copy()), factor
