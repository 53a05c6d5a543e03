"""One sample of a shard: a photo, its record, its caption and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bolid.errors import BolidError
from bolid.formats.images import decode_image
from bolid.formats.parsing import parse_json
from bolid.run import canonical_json

_PNG = b"\x89PNG"  # how such a file begins


@dataclass(frozen=True)
class Sample:
    """One photo of one person, with its record, caption and tensors."""

    key: str
    image: bytes  # JPEG, or PNG
    meta: dict[str, Any]  # plain JSON; "person" is always there
    caption: str
    tensors: dict[str, np.ndarray]

    @property
    def person(self) -> str:
        """Whose photo it is."""
        return str(self.meta["person"])


def sample_key(person: str, photo_sha256: str) -> str:
    """The key of a photo: its person, and 16 hex digits of the photo file's hash."""
    return f"{person}/{photo_sha256[:16]}"


def encode_sample(sample: Sample) -> list[tuple[str, bytes]]:
    """(file name, content) of a sample's members. Raises ValueError for a key that does not fit the layout."""
    from safetensors.numpy import save

    person, slash, name = sample.key.rpartition("/")
    if not slash or not person or not name or "." in name:
        raise ValueError(f"bad sample key {sample.key!r}: expected <person>/<name without dots>")
    tensors = {name: np.ascontiguousarray(value) for name, value in sample.tensors.items()}
    return [
        (f"{sample.key}.{'png' if sample.image.startswith(_PNG) else 'jpg'}", sample.image),
        (f"{sample.key}.json", canonical_json(sample.meta).encode()),
        (f"{sample.key}.safetensors", save(tensors)),
        (f"{sample.key}.txt", sample.caption.encode()),
    ]


def _load_tensors(data: bytes) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    return load(data)


# The only decoders of a sample's members: no pickles.
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode_image,
    "png": decode_image,
    "json": parse_json,
    "safetensors": _load_tensors,
    "txt": bytes.decode,
}


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of plain WebDataset, decoded: ``wds.WebDataset(tars).map(decode_sample)``. Other members stay bytes."""
    return {name: _DECODERS[name](value) if name in _DECODERS else value for name, value in sample.items()}


def parse_sample(key: str, members: dict[str, bytes], path: Path) -> Sample:
    """The sample with these members of the tar at `path`. Raises BolidError for a damaged one."""
    try:
        meta = parse_json(members["json"])
        meta["person"]
        image = members["png"] if "png" in members else members["jpg"]
        return Sample(key, image, meta, members["txt"].decode(), _load_tensors(members["safetensors"]))
    except Exception as error:  # safetensors' own class, KeyError, ValueError: all mean the same here
        raise BolidError(
            f"sample {key} in {path} cannot be read: {type(error).__name__}: {error}", "make the shards again"
        ) from error
