"""Writing a shard directory so that a kill costs no more than the tar in progress."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json
from bolid.formats.shards.reading import (
    DIGEST,
    INDEX,
    JOURNAL,
    check_tar_entry,
    index_digest,
    read_index,
    sha256_once,
)
from bolid.formats.shards.samples import Sample, encode_sample
from bolid.formats.storage import is_remote, place, remote_errors, send
from bolid.run import canonical_json, disk_errors, sha256_file, sync_directory, sync_file, write_atomic

DEFAULT_MAX_BYTES = 256 * 2**20
# What a killed writer leaves, and nothing else.
_LEFTOVER = re.compile(r"\.shard-\d{6,}(-\d+)?\.tar\.tmp|\.index(-\d+)?\.bolid-tmp\.json")


class ShardWriter:
    """Writes a shard directory; the same calls after a kill go on where it stopped.

    ``record``: the run record of the whole directory. BolidError for a directory that was begun with another record
    (other photos, family or settings). ``complete``: the directory is finished.

    A caller takes its photos in a fixed order, skips those in ``done_keys`` and ``done_rejects``, passes the others to
    ``write`` or ``reject``, and calls ``close``.
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
        self._open_tar: TarFile | None = None
        self._rejected: list[list[str]] = []  # [source, reason] since the last finished tar
        self._journal_lines: list[bytes] = []
        if not is_remote(self.directory):
            with disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                for path in self.directory.iterdir():
                    if _LEFTOVER.fullmatch(path.name):
                        path.unlink()
        with remote_errors(self.directory):
            self._resume()

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        self.write_group([sample])

    def write_group(self, samples: Sequence[Sample]) -> None:
        """Append samples that must lie in one tar, e.g. all of one person."""
        if not samples:
            return
        members = [member for sample in samples for member in encode_sample(sample)]
        size = sum(_tar_size(len(data)) for _, data in members)
        if self._open_tar is not None and self._open_tar.size + size > self.max_bytes:
            self._finish_tar()
        with disk_errors(self.directory):
            if self._open_tar is None:
                self._open_tar = TarFile(self.directory / f"shard-{len(self._shards):06d}.tar")
            try:
                self._open_tar.add(members, [sample.key for sample in samples])
            except OSError:
                self._open_tar.discard()  # frees its space; resuming writes it again
                self._open_tar = None
                raise

    def reject(self, source: str, reason: str) -> None:
        """Note in the index that ``source`` is left out, and why."""
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
        write_index(self.directory, index)
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
            lines = _parse_journal(journal, self._journal_lines)
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
        if not shard["count"]:
            return
        whole = path.exists() and path.stat().st_size == shard["bytes"]
        if whole and not is_remote(path):
            whole = sha256_once(path, shard["sha256"]) == shard["sha256"]
        if not whole:
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
        if is_remote(path):  # an object cannot be appended to, but is replaced at once
            with remote_errors(path):
                path.write_bytes(b"".join(self._journal_lines))
            return
        with disk_errors(path), open(path, "ab") as file:
            file.write(self._journal_lines[-1])
            file.flush()
            os.fsync(file.fileno())


class TarFile:
    """A tar under a temporary name; ``finish`` syncs, hashes and renames it, or sends it to its store."""

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
        """Append files that belong to the samples with these keys."""
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 unless set
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            self.size += _tar_size(len(data))
        self.keys += keys

    def discard(self) -> None:
        """Close and remove the temporary file."""
        with contextlib.suppress(OSError):
            self._tar.fileobj.close()  # type: ignore[union-attr]  # not _tar.close(), which would write again
        self.temporary.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Put the tar in its place; returns its entry of the index, with its keys."""
        self._tar.close()
        sync_file(self.temporary)
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


def _parse_journal(path: Path, lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The journal's entries: the record first, then one a tar. Raises BolidError for a damaged line."""
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            if number == 1:
                whole = isinstance(entry["record"], dict)
            else:
                check_tar_entry(entry)
                whole = isinstance(entry["keys"], list) and all(isinstance(key, str) for key in entry["keys"])
                whole = whole and all(isinstance(text, str) for pair in entry["rejected"] for text in pair)
                whole = whole and all(len(pair) == 2 for pair in entry["rejected"])
            if not whole:
                raise ValueError("an entry of another form")
        except (ValueError, KeyError, TypeError) as error:
            raise BolidError(
                f"line {number} of {path} is damaged: {error}", f"remove {path.parent} and start again"
            ) from error
        entries.append(entry)
    return entries


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Write ``index.json`` with a checksum of its content; it makes the directory count."""
    index = {**index, DIGEST: index_digest(index)}
    text = json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if is_remote(directory):
        with remote_errors(directory):
            (directory / INDEX).write_bytes(text.encode())
    else:
        write_atomic(directory / INDEX, text)
