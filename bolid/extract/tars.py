"""Photos in WebDataset tars of other programs: `<key>.jpg`, `<key>.txt` and `<key>.json` side by side.

As webdataset's ShardWriter, img2dataset and others write them. The tars are listed here and read in place; nothing is
unpacked, and no decoder but our own is run.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bolid.backends.caption import CAPTION_SUFFIXES, MAX_BYTES, decode_caption
from bolid.errors import BolidError
from bolid.formats.images import PHOTO_SUFFIXES
from bolid.formats.parsing import parse_json

NO_PICTURE = "a sample without a picture"
PERSON_FIELDS = ("person", "identity", "person_id", "identity_id")  # of a sample's json
MAX_PHOTO = 2**28  # bytes of one member
MAX_JSON = 2**20


@dataclass(frozen=True)
class Member:
    """A photo in a tar. `fault`: why it cannot be used, or ""."""

    tar: Path
    offset: int  # of its bytes in the tar
    size: int
    name: str
    person: str  # as its json or the folder in its key says; "" where nobody says
    caption: str
    sha256: str
    origin: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def find_tars(pattern: str) -> list[Path]:
    """The tars that `pattern` names: a file, a folder of them, or a brace pattern like `data/{00000..00012}.tar`.

    Empty for anything else. Raises BolidError for a pattern of which a tar is missing.
    """
    if "{" in pattern and not Path(pattern).exists():
        from braceexpand import braceexpand

        try:
            tars = [Path(path) for path in braceexpand(pattern)]
        except ValueError as error:
            raise BolidError(f"{pattern} has unbalanced braces", "write it like data/{00000..00012}.tar") from error
        if absent := [tar for tar in tars if not tar.is_file()]:
            raise BolidError(
                f"{len(absent)} of the {len(tars)} tars of {pattern} are missing, the first is {absent[0]}",
                "correct the pattern",
            )
        return tars
    path = Path(pattern)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    return sorted(path.glob("*.tar")) if path.is_dir() else []


def read_members(tar: Path) -> Iterator[Member]:
    """The photos of a tar, in its order. The members of one sample follow each other, as WebDataset wants it.

    Raises BolidError for a damaged tar.
    """
    sample: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(tar, "r:") as file, open(tar, "rb") as data:
            for info in file:
                if not info.isfile() or Path(info.name).name.startswith((".", "__")):
                    continue
                if sample and _key(info.name) != _key(sample[0].name):
                    yield _member(tar, data, sample)
                    sample = []
                sample.append(info)
            if sample:
                yield _member(tar, data, sample)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BolidError(f"{tar} is damaged or no tar: {error}", "make or copy it again") from error


def _key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    return folder + slash + last.partition(".")[0]


def _member(tar: Path, data: Any, sample: Sequence[tarfile.TarInfo]) -> Member:
    def content(info: tarfile.TarInfo | None, most: int) -> bytes:
        if info is None:
            return b""
        data.seek(info.offset_data)
        read: bytes = data.read(min(info.size, most))
        if len(read) < min(info.size, most):
            raise EOFError("it ends early")
        return read

    def of_kind(*suffixes: str) -> tarfile.TarInfo | None:
        return next((info for info in sample if info.name.lower().endswith(suffixes)), None)

    picture = of_kind(*PHOTO_SUFFIXES)
    key = _key(sample[0].name)
    if picture is None or picture.size > MAX_PHOTO:
        fault = NO_PICTURE if picture is None else "the file is larger than any photo"
        return Member(tar, 0, 0, key, "", "", "", fault=fault)
    notes, caption, fault = _notes(content(of_kind(".json"), MAX_JSON)), "", ""
    try:
        caption = decode_caption(content(of_kind(*CAPTION_SUFFIXES), MAX_BYTES + 1))
    except BolidError as error:
        fault = error.message
    person = next((str(notes[name]) for name in PERSON_FIELDS if notes.get(name) not in (None, "")), "")
    person = person or key.rpartition("/")[0].rpartition("/")[2]
    text = caption or notes.get("caption")
    sha256 = hashlib.sha256(content(picture, picture.size)).hexdigest()
    origin = {name: notes[name] for name in ("url", "license", "consent") if isinstance(notes.get(name), str)}
    return Member(
        tar, picture.offset_data, picture.size, picture.name, person,
        " ".join(text.split())[:MAX_BYTES] if isinstance(text, str) else "", sha256, origin, fault,
    )  # fmt: skip


def _notes(data: bytes) -> dict[str, Any]:
    try:
        notes = parse_json(data.decode("utf-8")) if data else {}
    except ValueError:
        return {}
    return notes if isinstance(notes, dict) else {}
