"""``bolid inspect``: what is in a file or directory that BoLID has written. Reads headers only, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.shards import INDEX, JOURNAL, read_index, read_shards
from bolid.formats.storage import is_remote, place
from bolid.formats.tensors import load_tensors, read_header, read_record

_NOT_OURS = "give a shard directory, a .safetensors file, an adapter directory or a picture that `bolid` has written"


def inspect(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, Any]:
    """A plain description: always ``path``, ``kind`` and ``record``, and what else there is to say of that kind.

    ``verify`` reads everything and compares it with the checksums. Raises BolidError for what is not ours or damaged.
    """
    path = place(path)
    if is_remote(path):
        return _shards(path, verify)
    if not path.exists():
        raise BolidError(f"there is no {path}", _NOT_OURS)
    if path.is_dir():
        return _directory(path, verify)
    with open(path, "rb") as file:
        start = file.read(12)
    if start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (start[:4] == b"RIFF" and start[8:] == b"WEBP"):
        return _picture(path)
    return _tensors(path, verify)


def _directory(path: Path, verify: bool) -> dict[str, Any]:
    parts = sorted([*path.glob("*.safetensors"), *path.glob(f"*/{INDEX}")])
    if (path / INDEX).exists() or (path / JOURNAL).exists() or not parts:
        return _shards(path, verify)
    # An adapter (face and body beside each other), or training shards split into train/ and val/.
    inside = [inspect(part.parent if part.name == INDEX else part, verify=verify) for part in parts]
    return {"path": path, "kind": "directory", "record": None, "contents": inside}


def _shards(path: Path, verify: bool) -> dict[str, Any]:
    index = read_index(path)
    if verify:
        for _ in read_shards(path):
            pass
    return {
        "path": path,
        "kind": index["record"]["kind"],
        "record": index["record"],
        "samples": index["samples"],
        "persons": index["persons"],
        "tars": len(index["shards"]),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
        "rejected": {reason: len(sources) for reason, sources in index["rejected"].items()},
        "verified": verify,
    }


def _tensors(path: Path, verify: bool) -> dict[str, Any]:
    record = read_record(path)
    if verify:
        load_tensors(path, record["kind"])
    header = read_header(path)
    tensors = {
        name: {"dtype": entry["dtype"], "shape": entry["shape"]}
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }
    return {
        "path": path,
        "kind": record["kind"],
        "record": record,
        "bytes": path.stat().st_size,
        "tensors": tensors,
        "verified": verify,
    }


def _picture(path: Path) -> dict[str, Any]:
    from bolid.formats.images import open_image
    from bolid.formats.pictures import picture_record

    data = path.read_bytes()
    record = picture_record(data, str(path))
    if record is None or "kind" not in record:
        raise BolidError(f"{path} is a picture, but not one that BoLID has made: it carries no run", _NOT_OURS)
    with open_image(data) as image:
        width, height = image.size
    return {"path": path, "kind": record["kind"], "record": record, "width": width, "height": height}
