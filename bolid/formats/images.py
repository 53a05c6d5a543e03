"""Picture files -> upright 8-bit RGB, and back to JPEG.

Every picture of anybody's is decoded here. Whatever its decoder raises becomes a BolidError, so that one damaged file
never ends a run.

Images are numpy uint8 [H, W, 3], RGB, 0..255.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFont

from bolid.errors import BolidError

PHOTO_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif")
)

# A picture of more pixels is taken for a decompression bomb. Some phones have modes of 108 and 200 Mpx beside the usual
# one; they write JPEG, which is decoded straight to half its size.
MAX_PIXELS = 100_000_000
MAX_JPEG_PIXELS = 4 * MAX_PIXELS
MAX_BYTES = 2**30  # of a photo's file


def list_photos(folder: str | os.PathLike[str]) -> list[tuple[str, Path]]:
    """(person, path) of everything below ``folder`` that is named like a photo, ordered by person and name.

    ``folder/<person>/*.jpg``; photos in ``folder`` itself belong to one person with the folder's name. Hidden files are
    left out. What is no file (a link to nothing, a pipe, a folder called x.jpg) and a person's folder that cannot be
    read are listed too: `read_file` says why they cannot be used. Raises BolidError for a missing folder and for one
    without photos.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise BolidError(f"the photo folder {folder} {what}", "give the folder that holds <person>/*.jpg")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise BolidError(f"cannot read the photo folder {folder}: {error.strerror}", "check its permissions") from error
    people = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    own = folder.resolve().name or "person"
    photos = [(own, path) for path in entries if _like_a_photo(path) and not path.is_dir()]
    for person in people:
        try:
            photos += [(person.name, path) for path in sorted(person.iterdir()) if _like_a_photo(path)]
        except OSError:
            photos.append((person.name, person))
    if not photos:
        raise BolidError(
            f"no photos in {folder}",
            f"put pictures in {folder}/<person>/ (or, of one person, straight into it); known endings: "
            + " ".join(sorted(PHOTO_SUFFIXES)),
        )
    return photos


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name as text, with forward slashes; bytes that are not UTF-8 as \\xff."""
    return os.fsencode(Path(name).as_posix()).decode("utf-8", "backslashreplace")


def _like_a_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")


def read_file(path: Path, name: str = "the file") -> bytes:
    """The bytes of a photo's file. Raises BolidError, with ``name`` in its text, for one that cannot be read, is too
    large, or is no file: a folder, a pipe, a link to nothing.
    """
    with _opened(path, name) as file:
        return file.read(MAX_BYTES)


def hash_file(path: Path, name: str = "the file") -> str:
    """The sha256 of a photo's file, in hex. Raises BolidError as `read_file` does."""
    with _opened(path, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.listdir(path)
            raise BolidError(f"{name} is a folder", "name a file")
        if not stat.S_ISREG(status.st_mode):
            raise BolidError(f"{name} is a pipe, a socket or a device", "name a file")
        if status.st_size > MAX_BYTES:
            raise BolidError(f"{name} is larger than {MAX_BYTES >> 20} MiB", "it is no photo: leave it out")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise BolidError(f"{name} is a link to nothing", "mend the link, or remove it") from error
        raise BolidError(f"{name} cannot be read: {error.strerror}", "check the path and its permissions") from error


def unread_files(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reason -> names below ``folder`` of the files, folders and people that `list_photos` passes over.

    Hidden ones do not count, nor records and tables (.json, .csv, .toml), nor captions beside their photo.
    """
    folder, unread = Path(folder), dict[str, list[str]]()

    def note(reason: str, path: Path) -> None:
        unread.setdefault(reason, []).append(path.relative_to(folder).as_posix())

    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if place.name.startswith(".") and place != folder:
            continue
        try:
            entries = sorted(place.iterdir())
        except OSError:
            continue  # `list_photos` lists it
        stems = {path.stem for path in entries if _like_a_photo(path)}
        if not stems and place != folder:
            note("no photo in this person's folder", place)
        for path in entries:
            suffix = path.suffix.lower()
            if path.name.startswith(".") or suffix in (".json", ".csv", ".toml"):
                continue
            if path.is_dir():
                if place != folder and not _like_a_photo(path):
                    note("deeper folders are not read, only <person>/ is", path)
            elif suffix in (".txt", ".caption"):
                if path.stem not in stems:
                    note("a caption without its photo", path)
            elif suffix not in PHOTO_SUFFIXES:
                note(f"no known picture ({suffix or 'no ending'}); save it as JPEG or PNG if it is a photo", path)
    return unread


def read_photo(path: str | os.PathLike[str], max_side: int | None = None) -> np.ndarray:
    """A photo as upright RGB, uint8 [H, W, 3], reduced so that no side is longer than ``max_side``.

    Raises BolidError for a damaged or oversized picture, and for other files.
    """
    data = read_file(Path(path), os.fspath(path))
    return decode_image(data, name=os.fspath(path), max_side=max_side)


def decode_image(data: bytes, name: str = "the picture", max_side: int | None = None) -> np.ndarray:
    """The bytes of a picture file, of any format that Pillow knows, as upright RGB, uint8 [H, W, 3].

    Applies the EXIF orientation, converts colours to sRGB by the picture's ICC profile, puts transparent pictures on
    white, takes the first frame of an animation, converts 16-bit and CMYK to 8-bit RGB. No side of the result is longer
    than ``max_side``; a JPEG of more than MAX_PIXELS has half its size. Raises BolidError, with ``name`` in its text,
    for damaged data, for other files than pictures and for pictures that are too large.
    """
    with _decoding(data, name) as image:
        if image.format == "JPEG":
            # The decoder skips detail that is not needed; at least twice the wanted size remains.
            needed = [2 * max_side] * 2 if max_side is not None else list(image.size)
            if image.width * image.height > MAX_PIXELS:
                needed = [min(side, whole // 2) for side, whole in zip(needed, image.size, strict=True)]
            if needed != list(image.size):
                image.draft(None, (needed[0], needed[1]))
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
            with _open_of_any_size(data) as image:
                width, height = image.size
                if width * height > (MAX_JPEG_PIXELS if image.format == "JPEG" else MAX_PIXELS):
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError:
        raise BolidError(
            f"{name} is too large a picture (more than {MAX_PIXELS // 1_000_000} megapixels; as JPEG, "
            f"{MAX_JPEG_PIXELS // 1_000_000})",
            "scale it down first, if you trust it",
        ) from None
    except Image.UnidentifiedImageError:
        raise BolidError(f"{name} is not a picture", "remove it, or save it as JPEG or PNG") from None
    except Exception as error:
        raise BolidError(f"{name} is damaged: {_reason(error)}", "fetch or export it again") from error


def _open_of_any_size(data: bytes) -> Image.Image:
    """`open_image` without Pillow's own limit, which is below that of a 200 Mpx JPEG."""
    with _PILLOWS_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return open_image(data)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_PILLOWS_LIMIT = threading.Lock()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def open_image(data: bytes | BinaryIO) -> Image.Image:
    """Pillow's own ``Image.open``; the one that ultralytics puts in its place installs a package for unknown files."""
    _read_heic_too()
    patched = sys.modules.get("ultralytics.utils.patches")
    return getattr(patched, "_image_open", Image.open)(io.BytesIO(data) if isinstance(data, bytes) else data)


@functools.cache
def _read_heic_too() -> None:
    """HEIC, as phones write it, by libheif; Pillow has no decoder of its own for it, as it has for AVIF."""
    import pi_heif

    pi_heif.register_heif_opener()


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


# Behind a JPEG's scan header: the next marker that does not belong to the scan's own data.
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_END, _SCAN, _COMMENT = 0xD9, 0xDA, 0xFE


def own_jpeg(data: bytes, image: np.ndarray) -> bytes | None:
    """The JPEG file `data` without its metadata, if that still decodes to `image`, which `decode_image` made of it.

    What stays is what the pixels depend on: the tables and scans, the ICC profile, Adobe's colour transform. EXIF, XMP,
    comments and anything behind the picture go. None for other formats, and where the pixels are no longer the file's:
    reduced, or turned upright.
    """
    with _decoding(data, "the picture") as opened:
        height, width = image.shape[:2]
        if opened.format != "JPEG" or opened.size != (width, height) or _orientation(opened) != 1:
            return None
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and at + 3 < len(data) and data[at + 1] != _END:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _SCAN:
            following = _SCAN_END.search(data, end)
            if following is None:
                return None
            end = following.start()
        application = 0xE0 <= marker <= 0xEF
        if not (application or marker == _COMMENT) or _of_pixels(marker, data[at + 4 : at + 16]):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at : at + 2]]) if data[at : at + 2] == b"\xff\xd9" else None


def _of_pixels(marker: int, start: bytes) -> bool:
    """Whether the pixels depend on an application's segment: JFIF's, Adobe's, and the ICC profile."""
    names = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
    return marker in names and start.startswith(names[marker])


MAX_HASH_DISTANCE = 28
"""Bits of 256 in which the difference hashes of two copies of one photo differ at most. Of 160 rendered people with 8
photos each, different photos of a person differed in 44 bits or more; copies at 3/4 of the size and JPEG quality 50 in
at most 28 (99 of 100)."""


def difference_hash(image: np.ndarray, side: int = 16) -> int:
    """A hash of ``side``**2 bits (dHash, Krawetz 2013): 1 where a cell of a tiny copy is darker than the next one."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((side + 1, side), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes(), "big")


def is_grey(image: np.ndarray) -> bool:
    """Whether uint8 [H, W, 3] is a black-and-white photo: the channels of 99 % of its pixels differ by 8 at most."""
    few = image[:: max(1, image.shape[0] // 256), :: max(1, image.shape[1] // 256)].astype(np.int16)
    return bool(np.mean(np.ptp(few, axis=2) <= 8) >= 0.99)


def label_font(text: str, size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """A font for `text` in a picture: Pillow's own, or where that lacks a letter DejaVu Sans, which matplotlib brings:
    Latin, Greek, Cyrillic, Arabic and Hebrew letters.
    """
    own = ImageFont.load_default(size)
    none = bytes(own.getmask("\uffff"))
    if all(letter.isascii() or bytes(own.getmask(letter)) != none for letter in set(text)):
        return own
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return own
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG. Equal pixels, equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] as JPEG without colour subsampling and without metadata. Equal pixels, equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
