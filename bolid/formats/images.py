"""Picture files -> upright 8-bit RGB, and back to JPEG.

Every picture of anybody's is decoded here. Whatever its decoder raises becomes a BolidError, so that one damaged file
never ends a run.

Images are numpy uint8 [H, W, 3], RGB, 0..255.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from bolid.errors import BolidError

PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))

# A picture of more pixels is taken for a decompression bomb. 100 Mpx is above any camera people own.
MAX_PIXELS = 100_000_000


def list_photos(folder: str | os.PathLike[str]) -> list[tuple[str, Path]]:
    """(person, path) of every photo below ``folder``, ordered by person and name.

    ``folder/<person>/*.jpg``; photos in ``folder`` itself belong to one person with the folder's name. Hidden files are
    left out. Raises BolidError for a missing folder and for one without photos.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise BolidError(f"the photo folder {folder} {what}", "give the folder that holds <person>/*.jpg")
    photos = [(folder.resolve().name or "person", path) for path in _photos_in(folder)]
    for person in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        photos += [(person.name, path) for path in _photos_in(person)]
    if not photos:
        raise BolidError(
            f"no photos in {folder}",
            f"put pictures in {folder}/<person>/ (or, of one person, straight into it); known endings: "
            + " ".join(sorted(PHOTO_SUFFIXES)),
        )
    return photos


def _photos_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def read_photo(path: str | os.PathLike[str], max_side: int | None = None) -> np.ndarray:
    """A photo as upright RGB, uint8 [H, W, 3], reduced so that no side is longer than ``max_side``.

    Raises BolidError for a damaged or oversized picture, and for other files.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BolidError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    return decode_image(data, name=os.fspath(path), max_side=max_side)


def decode_image(data: bytes, name: str = "the picture", max_side: int | None = None) -> np.ndarray:
    """The bytes of a picture file, of any format that Pillow knows, as upright RGB, uint8 [H, W, 3].

    Applies the EXIF orientation, converts colours to sRGB by the picture's ICC profile, puts transparent pictures on
    white, takes the first frame of an animation, converts 16-bit and CMYK to 8-bit RGB. No side of the result is longer
    than ``max_side``. Raises BolidError, with ``name`` in its text, for damaged data, for other files than pictures and
    for pictures of more than MAX_PIXELS.
    """
    with _decoding(data, name) as image:
        if max_side is not None and image.format == "JPEG":
            # The decoder skips detail that is not needed; at least twice the wanted size remains.
            image.draft(None, (2 * max_side, 2 * max_side))
        image.load()
        rgb = _to_rgb(_to_srgb(_upright(image, _orientation(image))))
    if max_side is not None and max(rgb.size) > max_side:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def glance(data: bytes, side: int, name: str = "the picture") -> tuple[Image.Image, tuple[int, int], str]:
    """(a small upright grey copy, no side longer than ``side``; the picture's (width, height) as stored; its format).

    Several times as fast as `decode_image`. Raises BolidError for the same pictures.
    """
    with _decoding(data, name) as image:
        stored, kind = image.size, image.format or ""
        scale = min(1.0, side / max(stored))
        small = (max(1, round(stored[0] * scale)), max(1, round(stored[1] * scale)))
        if kind == "JPEG":
            image.draft("L", small)
        image.load()
        grey = image if image.mode == "L" else _to_rgb(image).convert("L")
        grey = grey.resize(small, Image.Resampling.BOX)
        return _upright(grey, _orientation(image)), stored, kind


@contextlib.contextmanager
def _decoding(data: bytes, name: str) -> Iterator[Image.Image]:
    """The picture, opened. Whatever is raised inside becomes a BolidError: decoders raise almost any exception."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of a large picture; the limit below is stricter and always raises. It warns of a broken EXIF
            # block; the pixels do not depend on it.
            warnings.simplefilter("ignore")
            with open_image(data) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError:
        raise BolidError(
            f"{name} is too large a picture (more than {MAX_PIXELS // 1_000_000} megapixels)",
            "scale it down first, if you trust it",
        ) from None
    except Image.UnidentifiedImageError:
        raise BolidError(f"{name} is not a picture", "remove it, or save it as JPEG or PNG") from None
    except Exception as error:
        raise BolidError(f"{name} is damaged: {_reason(error)}", "fetch or export it again") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def open_image(data: bytes | BinaryIO) -> Image.Image:
    """Pillow's own ``Image.open``; the one that ultralytics puts in its place installs a package for unknown files."""
    patched = sys.modules.get("ultralytics.utils.patches")
    return getattr(patched, "_image_open", Image.open)(io.BytesIO(data) if isinstance(data, bytes) else data)


_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 for a broken EXIF block."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the pixels do not depend on it
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of a wide-gamut camera or of a printer's CMYK to sRGB, by the picture's ICC profile."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile, or one of another colour space
        return image
    return converted if converted is not None else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # Pillow would clip at 255, not scale
        high = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(high, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        scale = 255.0 if grey.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray(np.clip(grey * scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] as JPEG without colour subsampling and without metadata. Equal pixels, equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
