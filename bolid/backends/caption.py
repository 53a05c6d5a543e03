"""Captions of photos: the text file beside a photo. (Families for real photos add a captioning model here.)"""

from __future__ import annotations

from pathlib import Path

from bolid.errors import BolidError

MAX_BYTES = 10_000  # a caption; anything longer is some other file


def caption_for(photo: Path | str) -> str:
    """The caption in `<photo's name>.txt` beside the photo, as one line; "" when there is none.

    Raises BolidError for a caption file that cannot be read, is not UTF-8 text, or is far too long to be one.
    """
    path = Path(photo).with_suffix(".txt")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise BolidError(f"cannot read the caption {path}: {error.strerror}", "check its permissions") from error
    if len(data) > MAX_BYTES:
        raise BolidError(f"{path} is too long for a caption", f"shorten it to {MAX_BYTES} bytes, or remove it")
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise BolidError(f"the caption {path} is not UTF-8 text", "save it as UTF-8, or remove it") from error
