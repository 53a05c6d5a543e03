"""What the training scripts of this folder share: reading rendered photos (see make_photos.sh) into memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def photo_paths(folder: Path, limit: int | None = None) -> list[Path]:
    """The JPEGs under folder/<person>/, in a fixed order; at most `limit`."""
    return sorted(Path(folder).glob("*/*.jpg"))[:limit]


def load_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """One photo as uint8 [h, w, 3]."""
    with Image.open(path) as image:
        height, width = size
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def load_pictures(paths: list[Path], size: tuple[int, int]) -> np.ndarray:
    """Photos as uint8 [N, h, w, 3]."""
    return np.stack([load_picture(path, size) for path in paths])


def load_caption(path: Path) -> str:
    return path.with_suffix(".txt").read_text(encoding="utf-8").strip()


def load_truth(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
