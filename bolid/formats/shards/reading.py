"""Reading a finished shard directory: its index, its tars in order, its samples by key."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json
from bolid.formats.shards.samples import Sample, parse_sample
from bolid.formats.storage import fetch, is_remote, place, remote_errors
from bolid.run import canonical_json, sha256_file

INDEX = "index.json"
JOURNAL = "journal.jsonl"
DIGEST = "sha256"  # of the index's other content
_TAR_NAME = re.compile(r"shard-\d{6,}(-\d+)?\.tar")

Layout = dict[str, dict[str, tuple[int, int]]]  # key -> member kind -> (offset, size)


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``index.json`` of a finished shard directory: record, samples, persons, shards, rejected (reason -> sources)."""
    directory = place(directory)
    path = directory / INDEX
    with remote_errors(path):
        found = path.is_file()
        unfinished = not found and (directory / JOURNAL).exists()
    if not found:
        if not unfinished and (is_remote(directory) or not directory.is_dir()):
            raise BolidError(
                f"there is no shard directory {directory}", "make it with `bolid extract` or `bolid shard`"
            )
        raise BolidError(
            f"{directory} has no {INDEX}" + (": its writing was interrupted" if unfinished else ""),
            "run the command that writes it again; it goes on where it stopped"
            if unfinished
            else "give a directory that `bolid extract` or `bolid shard` has finished",
        )
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
        _check_index(index)
        damaged = DIGEST in index and index.pop(DIGEST) != index_digest(index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BolidError(f"{path} is not the index of a shard directory: {error}", "make the shards again") from error
    if damaged:
        raise BolidError(f"{path} is damaged: its content does not match the checksum it carries", _COPY_AGAIN)
    samples = sum(shard["count"] for shard in index["shards"])
    if samples != index["samples"]:
        raise BolidError(f"{path} counts {index['samples']} samples, its tars have {samples}", _COPY_AGAIN)
    return dict(index)


def _check_index(index: Any) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for a JSON value that is no index."""
    if not isinstance(index["record"]["kind"], str):
        raise ValueError("its record has no kind")
    for count in (index["samples"], index["persons"]):
        if type(count) is not int or count < 0:
            raise ValueError(f"{count!r} is no count")
    for shard in index["shards"]:
        check_tar_entry(shard)
    files = [shard["file"] for shard in index["shards"]]
    if len(set(files)) < len(files):
        raise ValueError("it names a tar twice")
    for reason, sources in index["rejected"].items():
        if not isinstance(sources, list) or not all(isinstance(text, str) for text in (reason, *sources)):
            raise ValueError("its list of rejected photos is damaged")


def check_tar_entry(shard: Any) -> None:
    """Raises ValueError, KeyError or TypeError for a JSON value that is no entry of a tar."""
    for name in ("count", "bytes"):
        if type(shard[name]) is not int or shard[name] < 0:
            raise ValueError(f"{shard[name]!r} is no number of a tar's {name}")
    if not isinstance(shard["file"], str) or not isinstance(shard["sha256"], str):
        raise ValueError("a tar's name or hash is no text")
    if shard["count"] and not _TAR_NAME.fullmatch(shard["file"]):
        raise ValueError(f"{shard['file']!r} is no tar's name")


def index_digest(index: dict[str, Any]) -> str:
    """sha256 of an index's content, without the digest itself."""
    content = {name: value for name, value in index.items() if name != DIGEST}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def read_shards(directory: str | os.PathLike[str], kind: str | None = None) -> Iterator[Sample]:
    """All samples of a finished shard directory, in the order they were written.

    ``kind``: what the record must say ("shards" from extract, "training-shards" from shard); None takes either.
    Raises BolidError. Every tar is compared with the index before its samples are returned, and the number of people at
    the end.
    """
    persons, people = read_index(directory)["persons"], set[str]()
    for path, layout in iter_tars(place(directory), kind):
        people.update(key.rpartition("/")[0] for key in layout)
        yield from read_samples(path, layout)
    if len(people) != persons:
        raise BolidError(f"{directory} is damaged: its {INDEX} counts another number of people", _COPY_AGAIN)


class ShardReader:
    """Samples of one or several directories by key, in any order, one in memory at a time.

    Of two samples with one key the first counts. Every tar is compared with its index at the start.
    """

    def __init__(self, *directories: str | os.PathLike[str], kind: str | None = None) -> None:
        self._where: dict[str, tuple[Path, Layout]] = {}
        for directory in directories:
            for path, layout in iter_tars(place(directory), kind):
                for key, members in layout.items():
                    self._where.setdefault(key, (path, {key: members}))

    @property
    def keys(self) -> list[str]:
        """In the order in which they were written."""
        return list(self._where)

    def read(self, keys: Iterable[str]) -> Iterator[Sample]:
        """The samples with these keys, in this order."""
        for key in keys:
            yield from read_samples(*self._where[key])


def group_by_person(samples: Iterable[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """(person, their samples) for runs of samples of one person, which is how training shards are ordered."""
    for person, group in groupby(samples, key=lambda sample: sample.person):
        yield person, list(group)


def iter_tars(directory: Path, kind: str | None) -> Iterator[tuple[Path, Layout]]:
    """Each tar's path and layout, after its hash was compared with the index. Raises BolidError."""
    index = read_index(directory)
    found = index["record"]["kind"]
    if kind is not None and found != kind:
        raise BolidError(
            f"{directory} holds {found}, not {kind}",
            "`bolid extract` makes shards of photos, `bolid shard` makes training shards of those",
        )
    for shard in index["shards"]:
        path = directory / shard["file"]
        if is_remote(path):
            path = fetch(path, shard["sha256"], shard["bytes"])
        try:
            if path.stat().st_size != shard["bytes"] or sha256_once(path, shard["sha256"]) != shard["sha256"]:
                raise BolidError(f"{path} is damaged: it does not match {INDEX}", _COPY_AGAIN)
            layout: Layout = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    layout.setdefault(f"{folder}/{stem}", {})[suffix] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise BolidError(f"cannot read {path}: {error}", _COPY_AGAIN) from error
        if len(layout) != shard["count"]:
            raise BolidError(f"{path} holds {len(layout)} samples, {INDEX} counts {shard['count']}", _COPY_AGAIN)
        yield path, layout


_COPY_AGAIN = "make the shards again, or copy them again"


def sha256_once(path: Path, expected: str) -> str:
    """The hash of a tar, computed once per process and version of the file: training reads it every epoch."""
    status = path.stat()
    known = (str(path.resolve()), status.st_size, status.st_mtime_ns, expected)
    if known not in _CHECKED:
        found = sha256_file(path)
        if found != expected:
            return found
        _CHECKED.add(known)
    return expected


_CHECKED: set[tuple[str, int, int, str]] = set()


def read_samples(path: Path, layout: Layout) -> Iterator[Sample]:
    """The samples of a tar that `layout` names. Raises BolidError for a damaged one."""
    with open(path, "rb") as file:
        for key, members in layout.items():
            contents = {}
            for suffix, (offset, size) in members.items():
                file.seek(offset)
                contents[suffix] = file.read(size)
            yield parse_sample(key, contents, path)


def directory_sha256(directory: str | os.PathLike[str]) -> str:
    """One hash for all samples of a finished directory, for the ``inputs`` of what is made from it."""
    hashes = [shard["sha256"] for shard in read_index(directory)["shards"]]
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()
