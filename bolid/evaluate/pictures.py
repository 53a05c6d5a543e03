"""Pictures to be scored, from a folder or a shard directory, with the prompt, person and seed of each.

These come from a table beside the pictures (prompts.csv, prompts.jsonl, metadata.jsonl), from the run record in our own
PNGs, or from a shard's captions.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.formats.images import PHOTO_SUFFIXES, decode_image, list_photos, printable, read_file, unread_files
from bolid.formats.parsing import parse_json
from bolid.formats.pictures import picture_record
from bolid.formats.shards import INDEX, JOURNAL, ShardReader

TABLES = ("prompts.csv", "prompts.jsonl", "metadata.jsonl", "metadata.csv")
MAX_SIDE = 1536  # larger pictures are reduced to this many pixels, as `extract` does
_COLUMNS = {"file": ("file", "file_name", "image", "picture"), "prompt": ("prompt", "text", "caption")}
_TABLE_HINT = "a table has the columns file and prompt, and if you like person and seed; as CSV with a header, or JSONL"


@dataclass(frozen=True)
class Picture:
    """One picture, not loaded. `source` is its path, or its key in a shard directory."""

    source: str
    sha256: str  # of the file; of a shard's sample the first 16 digits of its photo's
    folder: Path  # where it was listed
    prompt: str = ""
    person: str = ""
    seed: int | None = None
    record: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=dict)  # body ratios of a synthetic person

    @property
    def relative_source(self) -> str:
        """The path below its folder, or the key."""
        path = Path(self.source)
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else self.source

    @property
    def scales(self) -> dict[str, Any]:
        """Face and body scale in the run record: numbers, or scales by block as text."""
        return dict(self.record.get("config", {}).get("scales", {}))

    @property
    def of_nobody(self) -> bool:
        """Whether the record names neither a profile nor a reference photo."""
        return bool(self.record) and not {"profile", "photo"} & set(self.record.get("inputs", {}))

    @property
    def photos_used(self) -> set[str]:
        """Hashes of the photos behind the picture, as far as the record names them."""
        inputs = self.record.get("inputs", {})
        return {sha for name, sha in inputs.items() if name.startswith("photo_") or name == "photo"}


class PictureFolder:
    """A folder or a shard directory of pictures.

    `pictures` are in order; `rejected` maps a reason to the sources that were left out for it.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place)
        self.pictures: list[Picture] = []
        self.rejected: dict[str, list[str]] = {}
        self.paths: dict[str, Path] = {}  # source -> its file
        self.shards = ShardReader(self.place) if _is_shards(self.place) else None

    def unread_notes(self) -> list[str]:
        """A line for each reason why something in a folder of photos is not read."""
        found = {} if self.shards is not None else unread_files(self.place)
        return [f"not read in {self.place}: {len(names)} ({names[0]}, ...): {why}" for why, names in found.items()]

    def load(self, picture: Picture) -> np.ndarray:
        """uint8 [H, W, 3]. Raises BolidError for what cannot be read."""
        if self.shards is not None:
            (sample,) = self.shards.read([picture.source])
            return decode_image(sample.image, name=picture.source, max_side=MAX_SIDE)
        data = read_file(self.paths.get(picture.source, Path(picture.source)), picture.source)
        return decode_image(data, name=picture.source, max_side=MAX_SIDE)

    def reject(self, picture_or_source: Picture | str, reason: str) -> None:
        """Note that a picture is left out."""
        source = picture_or_source if isinstance(picture_or_source, str) else picture_or_source.source
        self.rejected.setdefault(reason, []).append(source)


def generated_pictures(place: str | os.PathLike[str], prompts: str | os.PathLike[str] | None = None) -> PictureFolder:
    """The pictures in a folder and below it, or in a shard directory. `prompts`: a table that lies elsewhere.

    A damaged picture is rejected, and so is one that the table names and the folder lacks. Raises BolidError when no
    picture remains.
    """
    folder = PictureFolder(place)
    if folder.shards is not None:
        folder.pictures = _of_shards(folder.shards, folder.place)
    else:
        if not folder.place.is_dir():
            what = "is a file, not a folder" if folder.place.exists() else "does not exist"
            raise BolidError(f"the folder of pictures {folder.place} {what}", "give the folder of generated pictures")
        try:
            inside = sorted(path for path in folder.place.rglob("*") if not path.name.startswith("."))
        except OSError as error:
            raise BolidError(f"cannot read {folder.place}: {error.strerror}", "give a folder of pictures") from error
        paths = [path for path in inside if path.suffix.lower() in PHOTO_SUFFIXES]
        table = _table(folder.place, prompts)
        for path in paths:
            try:
                folder.pictures.append(_generated_picture(path, folder.place, table.pop(path.resolve(), {})))
                folder.paths[printable(path)] = path
            except BolidError as error:
                folder.reject(printable(path), error.message)
        for path in table:
            folder.reject(printable(path), "named in the table of prompts, but not there")
    if not folder.pictures:
        listed = "; ".join(reason for reason in folder.rejected)
        raise BolidError(
            f"no pictures in {folder.place}" + (f": {listed}" if listed else ""),
            "give the folder that `bolid generate --out` wrote, or any folder of PNG or JPEG pictures",
        )
    return folder


def read_methods(
    place: str | os.PathLike[str], prompts: str | os.PathLike[str] | None = None
) -> dict[str, PictureFolder]:
    """Method -> its pictures: of a folder or shard directory, which is one method's, or of a manifest.

    A manifest is a table (CSV or JSONL) of picture, person, prompt, seed and method; pictures are relative to it, and
    without a method they are of one named as the file. Raises BolidError when no picture remains.
    """
    place = Path(place)
    if place.suffix.lower() not in (".csv", ".jsonl") or place.is_dir():
        return {place.resolve().name: generated_pictures(place, prompts)}
    methods: dict[str, PictureFolder] = {}
    for path, row in _table(place.parent, place).items():
        folder = methods.setdefault(str(row.get("method") or place.stem), PictureFolder(place.parent))
        try:
            folder.pictures.append(_generated_picture(path, place.parent, row))
        except BolidError as error:
            folder.reject(str(path), error.message)
    empty = [name for name, folder in methods.items() if not folder.pictures]
    if empty or not methods:
        reason = next(iter(methods[empty[0]].rejected), "") if empty else "it has no rows"
        raise BolidError(f"the manifest {place} names no picture that can be read: {reason}", _TABLE_HINT)
    return methods


def _generated_picture(path: Path, folder: Path, row: dict[str, Any]) -> Picture:
    """A picture with what its `row` of the table and its run record know. Raises BolidError for what is none."""
    data = read_file(path)
    record = picture_record(data, str(path)) or {}
    if record.get("kind", "picture") != "picture":
        raise BolidError(f"not one picture but a {record['kind']}", "leave it out")
    if not _is_well_formed(record):
        record = {}
    config = record.get("config", {})
    return Picture(
        source=printable(path),
        sha256=hashlib.sha256(data).hexdigest(),
        folder=folder,
        prompt=str(row.get("prompt") or config.get("prompt") or ""),
        person=str(row.get("person") or _person_of(config)),
        seed=_seed(row.get("seed", record.get("seed"))),
        record=record,
    )


def _is_well_formed(record: dict[str, Any]) -> bool:
    """Whether settings, scales and inputs are of the form that `generate` writes."""
    config, inputs = record.get("config"), record.get("inputs", {})
    if not isinstance(config, dict) or not isinstance(config.get("scales", {}), dict) or not isinstance(inputs, dict):
        return False
    return bool(config) and all(isinstance(text, str) for pair in inputs.items() for text in pair)


def reference_photos(place: str | os.PathLike[str]) -> PictureFolder:
    """Photos of people, `<person>/*.jpg` or of one person, or a shard directory; with captions and ground truth."""
    folder = PictureFolder(place)
    if folder.shards is not None:
        folder.pictures = _of_shards(folder.shards, folder.place)
        return folder
    from bolid.backends.caption import caption_for

    for person, path in list_photos(folder.place):
        source = printable(path)
        try:
            data, caption = read_file(path), caption_for(path)
        except BolidError as error:
            folder.reject(source, error.message)
            continue
        folder.paths[source] = path
        sha256, truth = hashlib.sha256(data).hexdigest(), _truth(path)
        folder.pictures.append(Picture(source, sha256, folder.place, caption, printable(person), truth=truth))
    return folder


def assign_people(pictures: Iterable[Picture], people: set[str]) -> list[str]:
    """Each picture's person: the table's or record's, else a folder of that name, else "".

    With one person among the references, every picture is of them.
    """
    only = next(iter(people)) if len(people) == 1 else ""
    found = []
    for picture in pictures:
        parents = [parent.name for parent in Path(picture.source).parents]
        names = [name for name in (picture.person, *parents) if name in people]
        found.append(only or (names[0] if names else ""))
    return found


def _is_shards(place: Path) -> bool:
    return place.is_dir() and ((place / INDEX).is_file() or (place / JOURNAL).is_file())


def _of_shards(reader: ShardReader, place: Path) -> list[Picture]:
    pictures = []
    for sample in reader.read(reader.keys):
        truth = {name: float(value) for name, value in sample.meta.get("ratios", {}).items()}
        sha = sample.key.rpartition("/")[2]
        pictures.append(Picture(sample.key, sha, place, sample.caption, sample.person, truth=truth))
    return pictures


def _person_of(config: dict[str, Any]) -> str:
    """The name in a record's "the profile NAME.safetensors"."""
    words = str(config.get("person", "")).removeprefix("the profile ")
    return words.removesuffix(".safetensors") if words.endswith(".safetensors") else ""


def _seed(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _truth(photo: Path) -> dict[str, float]:
    """The body ratios beside a rendered photo, {} elsewhere."""
    try:
        found = parse_json(read_file(photo.with_suffix(".json")))["ratios"]
        return {str(name): float(value) for name, value in found.items()}
    except (BolidError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def _table(folder: Path, given: str | os.PathLike[str] | None) -> dict[Path, dict[str, Any]]:
    """Absolute path of a picture -> its row."""
    paths = [Path(given)] if given is not None else [folder / name for name in TABLES if (folder / name).is_file()][:1]
    if not paths:
        return {}
    path = paths[0]
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
        else:
            rows = [parse_json(line) for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise BolidError(f"cannot read the prompts in {path}: {error}", _TABLE_HINT) from error
    table = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BolidError(f"row {number} of {path} is no object", _TABLE_HINT)
        for name, known in _COLUMNS.items():
            row.setdefault(name, next((row[other] for other in known if row.get(other)), None))
        if not row["file"]:
            raise BolidError(f"row {number} of {path} names no file", _TABLE_HINT)
        if "\0" in str(row["file"]):
            raise BolidError(f"row {number} of {path} names a file with a null character", _TABLE_HINT)
        table[(folder / str(row["file"])).resolve()] = row
    return table
