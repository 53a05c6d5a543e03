"""Removing a person from a finished shard directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bolid.formats.shards.reading import Layout, iter_tars, read_index, read_samples
from bolid.formats.shards.writing import TarFile, write_index
from bolid.formats.storage import place
from bolid.run import disk_errors


def samples_of(directory: str | os.PathLike[str], person: str) -> dict[str, str]:
    """Key -> sha256 of the photo ("" where it is not noted), of all samples of ``person`` in a finished directory."""
    found: dict[str, str] = {}
    for path, layout in iter_tars(place(directory), None):
        own = {key: members for key, members in layout.items() if key.rpartition("/")[0] == person}
        found.update((sample.key, str(sample.meta.get("sha256", ""))) for sample in read_samples(path, own))
    return found


def remove_person(directory: str | os.PathLike[str], person: str) -> list[str]:
    """Delete all samples of ``person`` from a finished directory, and their rejected photos from its index.

    Returns the keys. Their tars are written again under new names, then ``index.json`` is replaced, then the old tars
    are deleted. A kill leaves the directory as before or as after, and the same call finishes the work.
    """
    directory = place(directory)
    index = read_index(directory)
    shards: list[dict[str, Any]] = []
    gone: list[str] = []
    people: set[str] = set()
    for shard, (path, layout) in zip(index["shards"], iter_tars(directory, None), strict=True):
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
        # In a flat folder the sources do not name the person; if nobody else is left, all were theirs.
        left = [source for source in sources if people and not source.startswith(f"{person}/")]
        if left:
            rejected[reason] = left
    if gone or rejected != index["rejected"]:
        count = sum(shard["count"] for shard in shards)
        index = {**index, "samples": count, "persons": len(people), "shards": shards, "rejected": rejected}
        write_index(directory, index)
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


def _copy_tar(path: Path, target: Path, layout: Layout) -> dict[str, Any]:
    """Copy these samples of a tar, byte by byte, into a new tar; returns its entry of the index."""
    with disk_errors(target):
        tar = TarFile(target)
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
