"""The record beside a family's files, and whether a file still agrees with it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json
from bolid.formats.tensors import read_header
from bolid.run import sha256_file

MANIFEST = "models.json"
REINSTALL = "install bolid again; for weights of your own: python examples/tiny_family/checksums.py"


def read_manifest(root: Path) -> dict[str, Any]:
    """What was pulled into a family's folder, or shipped in it: part -> {source, revision, license, files: name ->
    {size, sha256}}.
    """
    path = root / MANIFEST
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BolidError(f"{path} is damaged", "remove it: the next pull writes it anew") from error
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise BolidError(f"{path} is damaged", "remove it: the next pull writes it anew")
    return data


def check_file(file: Path, expected: dict[str, Any], hint: str) -> None:
    """Raises BolidError unless the file has the size and the SHA-256 of its entry in the manifest."""
    if not file.is_file():
        raise BolidError(f"{file} is missing", hint)
    if file.stat().st_size != expected["size"] or sha256_file(file) != expected["sha256"]:
        raise BolidError(f"{file} is not what was recorded: its size or SHA-256 differs", hint)


def fault_of(file: Path) -> str:
    """What is wrong with a file of which no checksum is known, or "": it is empty, or its header or JSON is damaged."""
    try:
        if file.suffix == ".safetensors":
            read_header(file)
        elif file.suffix == ".json":
            parse_json(file.read_bytes())
        elif file.stat().st_size == 0:
            return f"{file} is empty"
    except BolidError as error:
        return error.message
    except ValueError:
        return f"{file} is not JSON"
    return ""


@functools.cache
def check_shipped(root: Path, part: str, path: Path) -> None:
    """Raises BolidError where a file of the embedded family is not the one that was shipped. Once a process; all 38 MB
    take 0.03 s.

    `root`: the family's folder; `path`: the part's place in it.
    """
    files = read_manifest(root).get(part, {}).get("files", {})
    for name, expected in files.items():
        check_file(path if path.is_file() else path / name, expected, REINSTALL)
