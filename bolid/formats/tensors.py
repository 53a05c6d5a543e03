"""Named tensors with a run record: a safetensors file whose one metadata key ``bolid`` is canonical JSON.

One key, because safetensors writes several in random order, and equal files would then hash differently. safetensors
refuses a truncated file but not a flipped bit, so the record carries one digest of itself and the tensors together,
which loading checks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json
from bolid.run import FORMAT_VERSION, canonical_json, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

METADATA_KEY = "bolid"
DIGEST = "sha256"  # of record and tensors
OLD_DIGEST = "tensors_sha256"  # of the tensors alone, in files of versions up to 0.1
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    record: Mapping[str, Any],
) -> None:
    """Write ``tensors`` and ``record`` (see ``bolid.run.run_record``) to ``path``, all or nothing.

    Equal tensors and records give equal bytes.
    """
    import torch
    from safetensors.torch import save

    on_cpu = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in tensors.items()}
    record = {name: value for name, value in record.items() if name not in (DIGEST, OLD_DIGEST)}
    record[DIGEST] = _digest(on_cpu, record)
    write_atomic(path, save(on_cpu, metadata={METADATA_KEY: canonical_json(record)}))


def load_tensors(
    path: str | os.PathLike[str], kind: str | Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, record) of a file of ours of the given kind (or one of several).

    Raises BolidError for a missing, damaged or foreign file, another kind, and a newer format.
    """
    return _load(path, kind, _torch_reader)


def load_arrays(
    path: str | os.PathLike[str], kind: str | Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `load_tensors`, but NumPy arrays, and torch is not loaded. NumPy has no bfloat16: such files are refused."""
    return _load(path, kind, _numpy_reader)


def _torch_reader(path: str | os.PathLike[str]) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _numpy_reader(path: str | os.PathLike[str]) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def _load(
    path: str | os.PathLike[str], kind: str | Iterable[str], reader: Callable[[str | os.PathLike[str]], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    record = read_record(path)
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    if record["kind"] not in kinds:
        raise BolidError(
            f"{path} is of kind {record['kind']!r}, not {' or '.join(map(repr, kinds))}",
            "look at it with `bolid inspect`, and give a file of the right kind",
        )
    from safetensors import SafetensorError

    try:
        tensors = reader(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if DIGEST in record:
        whole = _digest(tensors, record) == record[DIGEST]
    else:
        whole = _digest(tensors, None) == record.get(OLD_DIGEST)
    if not whole:
        raise _damaged(path, "its content does not match the checksum it carries")
    return tensors, record


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The run record of a safetensors file of ours. Reads the header only, without torch."""
    metadata = read_header(path).get("__metadata__", {})
    try:
        record: dict[str, Any] = parse_json(metadata[METADATA_KEY])
        kind, version = record["kind"], record["version"]
    except (KeyError, TypeError, ValueError):
        raise BolidError(
            f"{path} is a safetensors file, but not one of BoLID's: it has no {METADATA_KEY!r} metadata",
            "give a file that a `bolid` command has written",
        ) from None
    if not isinstance(kind, str) or not isinstance(version, int) or version > FORMAT_VERSION:
        raise BolidError(
            f"{path} has format version {version!r}; this program reads up to {FORMAT_VERSION}",
            "install a newer bolid",
        )
    family, config, inputs = (record.get(name) for name in ("family", "config", "inputs"))
    texts = inputs.items() if isinstance(inputs, dict) else [(None,)]
    whole = (family is None or isinstance(family, str)) and isinstance(config, dict)
    if not whole or not all(isinstance(text, str) for pair in texts for text in pair):
        raise _damaged(path, "its record lacks a family, settings or inputs")
    return record


def check_finite(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor | np.ndarray], limit: float = 1e4
) -> None:
    """Raises BolidError for a tensor with a value that is no number, or larger than `limit`."""
    for name, tensor in tensors.items():
        if not bool((abs(tensor) <= limit).all()):  # False for nan, too
            raise BolidError(
                f"{path} cannot be used: {name} has values that are no numbers or far too large", "make it again"
            )


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of any safetensors file: tensor name -> {dtype, shape, data_offsets}, ``__metadata__``."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if 2 <= length <= _MAX_HEADER else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BolidError(f"cannot read {path}: {error.strerror}", "check the path") from error
    try:
        header: dict[str, Any] = parse_json(raw)
        data_end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
        whole = isinstance(header, dict) and 8 + length + data_end == size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise BolidError(f"{path} is not a safetensors file", _wanted(path)) from None
    if not whole:
        raise _damaged(path, f"it has {size} bytes where its header announces {8 + length + data_end}")
    return header


def _wanted(path: Path) -> str:
    from bolid.formats.images import PHOTO_SUFFIXES

    if path.suffix.lower() in PHOTO_SUFFIXES:
        return f"of a photo, make a profile: bolid profile {path}; or give generate the photo itself: --photo {path}"
    return "give a file that a `bolid` command has written"


def _digest(tensors: Mapping[str, torch.Tensor | np.ndarray], record: Mapping[str, Any] | None) -> str:
    """sha256 of tensors (arrays have that of equal tensors) and of a record without its digest."""
    digest = hashlib.sha256()
    if record is not None:
        digest.update(canonical_json({name: value for name, value in record.items() if name != DIGEST}).encode())
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(canonical_json([name, f"torch.{dtype}", list(tensor.shape)]).encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Any) -> Any:
    """The data of a tensor on the CPU, or of an array."""
    if hasattr(tensor, "tobytes"):
        return tensor.tobytes()
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _damaged(path: str | os.PathLike[str], why: str) -> BolidError:
    return BolidError(f"{path} is damaged: {why}", "make or copy it again")
