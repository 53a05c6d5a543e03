"""Generated pictures, as PNG, JPEG or WebP, with the run record and with settings in words for other programs.

    PNG         text chunks `bolid` (the record) and `parameters` (the words)
    JPEG, WebP  EXIF MakerNote (the record behind `bolid\\0`) and UserComment (the words, in UTF-16)

The words are in the form of AUTOMATIC1111's web UI, where other programs look for them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from bolid.errors import BolidError
from bolid.formats.images import open_image
from bolid.formats.parsing import parse_json
from bolid.formats.tensors import METADATA_KEY
from bolid.run import canonical_json

FORMATS = ("png", "jpg", "webp")
_EXIF, _MAKER_NOTE, _USER_COMMENT = 0x8769, 0x927C, 0x9286
_UNICODE, _OURS = b"UNICODE\0", METADATA_KEY.encode() + b"\0"
_MAX_EXIF = 65_000  # bytes; a JPEG has room for 65,533


def write_picture(path: Path, image: Image.Image, record: dict[str, Any], parameters: str = "") -> None:
    """Write a picture in the format of the path's ending. `parameters`: the settings in words, "" for none.

    JPEG and WebP have quality 95, JPEG all its colours. Equal arguments, equal bytes. Raises BolidError where the
    record does not fit into the format.
    """
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt(METADATA_KEY, canonical_json(record))
        if parameters:
            info.add_text("parameters", parameters)
        image.save(path, "PNG", pnginfo=info)
        return
    exif = Image.Exif()
    fields = exif.get_ifd(_EXIF)
    fields[_MAKER_NOTE] = _OURS + canonical_json(record).encode()
    if parameters:
        fields[_USER_COMMENT] = _UNICODE + parameters.encode("utf_16_be")
    if len(exif.tobytes()) > _MAX_EXIF:
        raise BolidError(f"the settings of {path.name} do not fit into a {path.suffix} file", "choose --format png")
    if path.suffix == ".webp":
        image.save(path, "WEBP", quality=95, exif=exif)
    else:
        image.save(path, "JPEG", quality=95, subsampling=0, exif=exif)


def picture_record(data: bytes, name: str = "the picture") -> dict[str, Any] | None:
    """The run record in the bytes of a picture; None for a picture without one.

    Other programs may move text behind the pixels, so the whole file is read, and every checksum of a PNG compared.
    Raises BolidError, with `name` in its text, for a damaged PNG and for a damaged picture with a record.
    """
    png = data.startswith(b"\x89PNG")
    if not png and _OURS not in data:
        return None
    try:
        with open_image(data) as image:
            image.load()  # reads the text behind the pixels
            record = _record_in(image)
        if png:
            with open_image(data) as image:
                image.verify()
    except UnidentifiedImageError:  # its own message names an address in memory
        raise BolidError(f"{name} is damaged: its header cannot be read", "make or copy it again") from None
    except Exception as error:  # decoders raise almost any
        raise BolidError(f"{name} is damaged: {error or type(error).__name__}", "make or copy it again") from error
    return record


def record_of_whole(path: Path) -> dict[str, Any] | None:
    """The record of a file that is not cut off, read from its header; None for anything else. Pixels are not read."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 12))
            tail = file.read()
            if head.startswith(b"\x89PNG"):
                whole = tail[4:8] == b"IEND"
            elif head.startswith(b"RIFF"):
                whole = int.from_bytes(head[4:8], "little") + 8 == size
            else:
                whole = tail.endswith(b"\xff\xd9")
            if not whole:
                return None
            file.seek(0)
            with open_image(file) as image:
                return _record_in(image)
    except Exception:  # unreadable, so not ours
        return None


def _record_in(image: Image.Image) -> dict[str, Any] | None:
    """Of a PNG what stands before the pixels, and behind them too once they are loaded."""
    if image.format == "PNG":
        text = image.info.get(METADATA_KEY)
    else:
        note = image.getexif().get_ifd(_EXIF).get(_MAKER_NOTE, b"")
        text = note.removeprefix(_OURS).decode() if isinstance(note, bytes) and note.startswith(_OURS) else None
    record = None if text is None else parse_json(text)
    return record if isinstance(record, dict) else None
