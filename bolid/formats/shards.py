"""Shards: tar files of samples in WebDataset's layout, and the directory that makes them count.

A directory holds ``shard-000000.tar``, ... and ``index.json``, which is written last: without it the directory is
unfinished. Members of a sample share a key ``<person>/<sha256[:16]>`` (no dot after the slash):

    <key>.jpg           the photo
    <key>.json          width, height, box, person, source, ... (``Sample.meta``)
    <key>.txt           the caption
    <key>.safetensors   every tensor of the sample in one file: at least ``keypoints`` f32 [17, 3] (x, y, confidence;
                        pixels of the stored photo), ``face`` f32 [512] where a face is seen, ``image_embed``,
                        ``view_features``; training shards also hold ``latents`` f16 [2, C, h, w] (mean, std)

Plain ``webdataset`` reads the tars; give it ``.map(decode_sample)``, never its own ``.decode()``, which runs pickles.
Times and owners are left out, so equal samples give equal bytes.

While a directory is being written ``journal.jsonl`` lists the finished tars, synced line by line. A kill costs the tar
in progress and nothing else: the same command makes a ``ShardWriter`` again, skips its ``done_keys`` and
``done_rejects``, and ends with the very bytes of an uninterrupted run.

Every directory may also be a URL of an object store, ``s3://bucket/shards`` (bolid/formats/storage.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.formats.images import decode_image
from bolid.formats.storage import fetch, is_remote, place, remote_errors, send
from bolid.run import canonical_json, disk_errors, sha256_file, sync_directory, write_atomic

__all__ = [
    "Sample", "ShardReader", "ShardWriter", "decode_image", "decode_sample", "group_by_person", "read_index",
    "read_shards", "remove_person", "sample_key", "samples_of",
]  # fmt: skip

INDEX = "index.json"
JOURNAL = "journal.jsonl"
DEFAULT_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sample:
    """One photo of one person, with all that is known of it."""

    key: str
    image: bytes  # JPEG
    meta: dict[str, Any]  # plain JSON; "person" is always there
    caption: str
    tensors: dict[str, np.ndarray]

    @property
    def person(self) -> str:
        return self.meta["person"]


def sample_key(person: str, photo_sha256: str) -> str:
    """The key of a photo: its person, and 16 hex digits of the photo file's hash."""
    return f"{person}/{photo_sha256[:16]}"


# ---------------------------------------------------------------------------------------------------- one sample


def _encode(sample: Sample) -> list[tuple[str, bytes]]:
    from safetensors.numpy import save

    person, slash, name = sample.key.rpartition("/")
    if not slash or not person or not name or "." in name:
        raise ValueError(f"bad sample key {sample.key!r}: expected <person>/<name without dots>")
    tensors = {name: np.ascontiguousarray(value) for name, value in sample.tensors.items()}
    return [
        (f"{sample.key}.jpg", sample.image),
        (f"{sample.key}.json", canonical_json(sample.meta).encode()),
        (f"{sample.key}.safetensors", save(tensors)),
        (f"{sample.key}.txt", sample.caption.encode()),
    ]


def _load_tensors(data: bytes) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    return load(data)


# The only ways in which the members of a sample are read. No pickles.
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode_image,
    "json": json.loads,
    "safetensors": _load_tensors,
    "txt": bytes.decode,
}


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """For plain WebDataset: ``wds.WebDataset(tars).map(decode_sample)``. Members of other kinds stay bytes."""
    return {name: _DECODERS[name](value) if name in _DECODERS else value for name, value in sample.items()}


def _sample(key: str, members: dict[str, bytes], path: Path) -> Sample:
    try:
        meta = json.loads(members["json"])
        meta["person"]
        return Sample(key, members["jpg"], meta, members["txt"].decode(), _load_tensors(members["safetensors"]))
    except Exception as error:  # safetensors' own error class, KeyError, ValueError: all mean the same here
        raise BolidError(
            f"sample {key} in {path} cannot be read: {type(error).__name__}: {error}", "make the shards again"
        ) from error


# ------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes a shard directory; the same calls after a kill go on where it stopped.

    ``record``: the run record of the whole directory. A directory that was begun with another record (other photos,
    family or settings) is refused. With ``complete`` there is nothing left to do.

    A caller goes through its photos in a fixed order, skips those in ``done_keys`` and ``done_rejects``, hands the
    rest to ``write`` or ``reject``, and calls ``close``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        record: dict[str, Any],
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self.directory = place(directory)
        self.record = json.loads(canonical_json(record))
        self.max_bytes = max_bytes
        self.done_keys: set[str] = set()
        self.done_rejects: set[str] = set()
        self.complete = False
        self._shards: list[dict[str, Any]] = []  # finished: file, count, bytes, sha256, keys, rejected
        self._open_tar: _TarFile | None = None
        self._rejected: list[list[str]] = []  # [source, reason] since the last finished tar
        self._journal_lines: list[bytes] = []
        if not is_remote(self.directory):
            with disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(".*.tmp*"):
                    leftover.unlink()
        with remote_errors(self.directory):
            self._resume()

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        self.write_group([sample])

    def write_group(self, samples: Sequence[Sample]) -> None:
        """Append samples that must lie in one tar, e.g. all of one person."""
        if not samples:
            return
        members = [member for sample in samples for member in _encode(sample)]
        size = sum(_tar_size(len(data)) for _, data in members)
        if self._open_tar is not None and self._open_tar.size + size > self.max_bytes:
            self._finish_tar()
        with disk_errors(self.directory):
            if self._open_tar is None:
                self._open_tar = _TarFile(self.directory / f"shard-{len(self._shards):06d}.tar")
            try:
                self._open_tar.add(members, [sample.key for sample in samples])
            except OSError:
                self._open_tar.discard()  # gives the space back; resuming makes it again
                self._open_tar = None
                raise

    def reject(self, source: str, reason: str) -> None:
        """Note that ``source`` was left out, and why. Ends up in the index."""
        self._rejected.append([source, reason])

    def close(self) -> dict[str, Any]:
        """Finish the last tar and write ``index.json``; returns the index."""
        if self.complete:
            return read_index(self.directory)
        if self._open_tar is not None or self._rejected:
            self._finish_tar()
        rejected: dict[str, list[str]] = {}
        for shard in self._shards:
            for source, reason in shard["rejected"]:
                rejected.setdefault(reason, []).append(source)
        keys = [key for shard in self._shards for key in shard["keys"]]
        index = {
            "record": self.record,
            "samples": len(keys),
            "persons": len({key.rpartition("/")[0] for key in keys}),
            "shards": [
                {name: shard[name] for name in ("file", "count", "bytes", "sha256")}
                for shard in self._shards
                if shard["count"]
            ],
            "rejected": rejected,
        }
        _write_index(self.directory, index)
        with remote_errors(self.directory):
            (self.directory / JOURNAL).unlink(missing_ok=True)
        self.complete = True
        return index

    def _resume(self) -> None:
        if (self.directory / INDEX).exists():
            index = read_index(self.directory)
            self._check_record(index["record"])
            for shard in index["shards"]:
                self._check_tar(shard)
            (self.directory / JOURNAL).unlink(missing_ok=True)
            self.complete = True
            return
        lines, whole = [], 0
        journal = self.directory / JOURNAL
        if journal.exists():
            raw = journal.read_bytes()
            whole = raw.rfind(b"\n") + 1  # a kill may have cut the last line
            self._journal_lines = raw[:whole].splitlines(keepends=True)
            lines = [json.loads(line) for line in self._journal_lines]
        elif any(self.directory.glob("shard-*.tar")):
            raise BolidError(
                f"{self.directory} holds shards, but neither {INDEX} nor {JOURNAL}",
                "remove that directory, or choose another --out",
            )
        if not lines:
            with disk_errors(journal):
                journal.write_bytes(b"")
            self._journal({"record": self.record})
            return
        self._check_record(lines[0]["record"])
        if not is_remote(journal):
            os.truncate(journal, whole)
        for shard in lines[1:]:
            self._check_tar(shard)
            self._shards.append(shard)
            self.done_keys.update(shard["keys"])
            self.done_rejects.update(source for source, _ in shard["rejected"])

    def _check_tar(self, shard: dict[str, Any]) -> None:
        path = self.directory / shard["file"]
        if shard["count"] and not (path.exists() and path.stat().st_size == shard["bytes"]):
            raise BolidError(
                f"{path} is missing or has changed since it was written",
                f"remove {self.directory} and start again",
            )

    def _check_record(self, record: dict[str, Any]) -> None:
        if record != self.record:
            changed = [name for name in sorted({*record, *self.record}) if record.get(name) != self.record.get(name)]
            raise BolidError(
                f"{self.directory} was written by another run: different {', '.join(changed)}",
                "choose another --out, or remove that directory first",
            )

    def _finish_tar(self) -> None:
        shard: dict[str, Any] = {"file": "", "count": 0, "bytes": 0, "sha256": "", "keys": []}
        if self._open_tar is not None:
            with disk_errors(self.directory):
                shard = self._open_tar.finish()
            self._open_tar = None
        shard["rejected"] = self._rejected
        self._rejected = []
        self._journal(shard)
        self._shards.append(shard)

    def _journal(self, entry: dict[str, Any]) -> None:
        path = self.directory / JOURNAL
        self._journal_lines.append(canonical_json(entry).encode() + b"\n")
        if is_remote(path):  # an object can't be appended to, but is replaced at once
            with remote_errors(path):
                path.write_bytes(b"".join(self._journal_lines))
            return
        with disk_errors(path), open(path, "ab") as file:
            file.write(self._journal_lines[-1])
            file.flush()
            os.fsync(file.fileno())


class _TarFile:
    """A tar under a temporary name; ``finish`` syncs, hashes and renames it, or sends it where it belongs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if is_remote(path):
            descriptor, name = tempfile.mkstemp(prefix="bolid-", suffix=".tar")
            os.close(descriptor)
            self.temporary = Path(name)
        else:
            self.temporary = path.with_name(f".{path.name}.tmp")
        self.size = 0
        self.keys: list[str] = []
        self._tar = tarfile.open(self.temporary, "w", format=tarfile.PAX_FORMAT)

    def add(self, members: list[tuple[str, bytes]], keys: list[str]) -> None:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 unless set
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            self.size += _tar_size(len(data))
        self.keys += keys

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._tar.fileobj.close()  # type: ignore[union-attr]  # not _tar.close(), which would write again
        self.temporary.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        self._tar.close()
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())
        result = {
            "file": self.path.name,
            "count": len(self.keys),
            "bytes": self.temporary.stat().st_size,
            "sha256": sha256_file(self.temporary),
            "keys": self.keys,
        }
        if is_remote(self.path):
            send(self.temporary, self.path)
            self.temporary.unlink()
        else:
            os.replace(self.temporary, self.path)
            sync_directory(self.path.parent)
        return result


def _tar_size(length: int) -> int:
    """Bytes a member takes: one header block and its padded data."""
    return 512 + (length + 511) // 512 * 512


# -------------------------------------------------------------------------------------------- taking somebody out


def samples_of(directory: str | os.PathLike[str], person: str) -> dict[str, str]:
    """Key -> sha256 of the photo ("" where it is not noted), of all samples of ``person`` in a finished directory."""
    found: dict[str, str] = {}
    for path, layout in _tars(place(directory), None):
        own = {key: members for key, members in layout.items() if key.rpartition("/")[0] == person}
        found.update((sample.key, str(sample.meta.get("sha256", ""))) for sample in _read(path, own))
    return found


def remove_person(directory: str | os.PathLike[str], person: str) -> list[str]:
    """Take all samples of ``person`` out of a finished directory, and their rejected photos out of its index.

    Returns the keys. The tars concerned are written anew beside the old ones, under new names; then ``index.json`` is
    replaced, which makes it count; then the old tars are deleted. After a kill the directory is as before or as after,
    and the same call finishes the work.
    """
    directory = place(directory)
    index = read_index(directory)
    shards: list[dict[str, Any]] = []
    gone: list[str] = []
    people: set[str] = set()
    for shard, (path, layout) in zip(index["shards"], _tars(directory, None), strict=True):
        keys = [key for key in layout if key.rpartition("/")[0] != person]
        people.update(key.rpartition("/")[0] for key in keys)
        gone += [key for key in layout if key.rpartition("/")[0] == person]
        if len(keys) == len(layout):
            shards.append(shard)
        elif keys:
            target = _unused_name(directory / shard["file"])
            written = _copy_tar(path, target, {key: layout[key] for key in keys})
            shards.append({name: written[name] for name in ("file", "count", "bytes", "sha256")})
    rejected = {}
    for reason, sources in index["rejected"].items():
        # Of a flat folder the sources do not name the person; when nobody else is left they all were theirs.
        left = [source for source in sources if people and not source.startswith(f"{person}/")]
        if left:
            rejected[reason] = left
    if gone or rejected != index["rejected"]:
        count = sum(shard["count"] for shard in shards)
        index = {**index, "samples": count, "persons": len(people), "shards": shards, "rejected": rejected}
        _write_index(directory, index)
    listed = {shard["file"] for shard in shards}
    for path in [*directory.glob("shard-*.tar"), *directory.glob(".shard-*.tar.tmp")]:
        if path.name not in listed:
            path.unlink()
    return gone


def _unused_name(path: Path) -> Path:
    """shard-000003.tar -> shard-000003-1.tar, -2 and so on."""
    stem = path.stem.split("-")
    number = int(stem[2]) + 1 if len(stem) > 2 else 1
    return path.with_name(f"{stem[0]}-{stem[1]}-{number}.tar")


def _copy_tar(path: Path, target: Path, layout: _Layout) -> dict[str, Any]:
    """These samples of a tar, byte by byte, in a tar of their own."""
    with disk_errors(target):
        tar = _TarFile(target)
        try:
            with open(path, "rb") as file:
                for key, members in layout.items():
                    contents = []
                    for suffix, (offset, size) in members.items():
                        file.seek(offset)
                        contents.append((f"{key}.{suffix}", file.read(size)))
                    tar.add(contents, [key])
            return tar.finish()
        except OSError:
            tar.discard()
            raise


def _write_index(directory: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if is_remote(directory):
        with remote_errors(directory):
            (directory / INDEX).write_bytes(text.encode())
    else:
        write_atomic(directory / INDEX, text)


# ------------------------------------------------------------------------------------------------------- reading

_Layout = dict[str, dict[str, tuple[int, int]]]  # key -> member kind -> (offset, size)


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
        index = json.loads(path.read_text(encoding="utf-8"))
        index["record"]["kind"], index["shards"], index["rejected"], index["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BolidError(f"{path} is not the index of a shard directory", "make the shards again") from error
    return index


def read_shards(directory: str | os.PathLike[str], kind: str | None = None) -> Iterator[Sample]:
    """All samples of a finished shard directory, in the order they were written.

    ``kind``: what the record must say ("shards" from extract, "training-shards" from shard); None takes either.
    Every tar is checked against the index before its samples come out. Raises BolidError.
    """
    for path, layout in _tars(place(directory), kind):
        yield from _read(path, layout)


class ShardReader:
    """Samples of one or several directories by key, in any order, one in memory at a time; of two with one key the
    first. Every tar is checked once, at the start.
    """

    def __init__(self, *directories: str | os.PathLike[str], kind: str | None = None) -> None:
        self._where: dict[str, tuple[Path, _Layout]] = {}
        for directory in directories:
            for path, layout in _tars(place(directory), kind):
                for key, members in layout.items():
                    self._where.setdefault(key, (path, {key: members}))

    @property
    def keys(self) -> list[str]:
        """In the order in which they were written."""
        return list(self._where)

    def read(self, keys: Iterable[str]) -> Iterator[Sample]:
        """The samples with these keys, in this order."""
        for key in keys:
            yield from _read(*self._where[key])


def group_by_person(samples: Iterable[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """(person, their samples) for runs of samples of one person, which is how training shards are ordered."""
    for person, group in groupby(samples, key=lambda sample: sample.person):
        yield person, list(group)


def _tars(directory: Path, kind: str | None) -> Iterator[tuple[Path, _Layout]]:
    """Each tar, checked, with key -> member kind -> (offset, size)."""
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
            if path.stat().st_size != shard["bytes"] or _sha256_once(path, shard["sha256"]) != shard["sha256"]:
                raise BolidError(f"{path} is damaged: it does not match {INDEX}", _COPY_AGAIN)
            layout: _Layout = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    layout.setdefault(f"{folder}/{stem}", {})[suffix] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise BolidError(f"cannot read {path}: {error}", _COPY_AGAIN) from error
        yield path, layout


_COPY_AGAIN = "make the shards again, or copy them again"


def _sha256_once(path: Path, expected: str) -> str:
    """Hash a tar once per process and version of the file: training reads the same tars every epoch."""
    status = path.stat()
    known = (str(path.resolve()), status.st_size, status.st_mtime_ns, expected)
    if known not in _CHECKED:
        found = sha256_file(path)
        if found != expected:
            return found
        _CHECKED.add(known)
    return expected


_CHECKED: set[tuple[str, int, int, str]] = set()


def _read(path: Path, layout: _Layout) -> Iterator[Sample]:
    with open(path, "rb") as file:
        for key, members in layout.items():
            contents = {}
            for suffix, (offset, size) in members.items():
                file.seek(offset)
                contents[suffix] = file.read(size)
            yield _sample(key, contents, path)


def directory_sha256(directory: str | os.PathLike[str]) -> str:
    """One hash for all samples of a finished directory, for the ``inputs`` of what is made from it."""
    hashes = [shard["sha256"] for shard in read_index(directory)["shards"]]
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()
