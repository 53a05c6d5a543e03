"""What was pulled into a family's folder, and whether the files still agree with the record beside them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.models.checksums import REINSTALL, check_file, fault_of, read_manifest
from bolid.models.families import DEFAULT_FAMILY, Family, get_family, refuse_non_commercial
from bolid.models.sources import CLEAN, OWN_FACE_PACK, published
from bolid.run import Progress


def describe(family: Family, *, commercial: bool = False) -> list[dict[str, Any]]:
    """Every published part of ``family``: what, how big, license, revision, where it lies or is looked for, its state.

    state: "there", "missing", or "refused" for a license that forbids ``commercial`` use.
    """
    written = read_manifest(family.root)
    parts = []
    for listed in published(family.name, commercial):
        entry = written.get(listed.part, {})
        other = CLEAN.get(listed.part)
        source = other if other is not None and entry.get("source") == other.place else listed
        refused = commercial and (not source.commercial or _for_research(family, source.part))
        parts.append(
            {
                "part": source.part,
                "name": source.name,
                "megabytes": source.megabytes,
                "license": source.license,
                "commercial": source.commercial,
                "source": source.place,
                "revision": entry.get("revision", ""),
                "sha256": {name: file["sha256"] for name, file in entry.get("files", {}).items()},
                "where": getattr(family, source.part),
                "optional": source.optional,
                "state": "refused" if refused else "there" if family.has(source.part) else "missing",
                "notice": source.notice,
                "instead": (source.instead or OWN_FACE_PACK) if refused else "",
            }
        )
    return parts


def _for_research(family: Family, part: str) -> bool:
    """Whether what lies there may not be used commercially."""
    try:
        refuse_non_commercial(part, getattr(family, part), family.name)
    except BolidError:
        return True
    return False


def files_of(place: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """The files of a part; of a Hugging Face cache, which may hold more of a repository, those of ``patterns``."""
    if place.is_file():
        return [place]
    files = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = [file.relative_to(place).as_posix() for file in files]
    return [
        file
        for file, name in zip(files, names, strict=True)
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


def verify(name: str, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Look at every file of family ``name``; a row for each part that is there or must be: part, where, state.

    state: "as fetched" (every SHA-256 is that of the first fetch), "as shipped" (of the embedded family), "whole"
    (safetensors files end where they say, but nobody wrote down what was fetched), "missing".
    Raises BolidError for a damaged file: it names the file.
    """
    family = get_family(name)
    written = read_manifest(family.root)
    sources = {source.part: source for source in published(family.name)}
    parts = [part for part in sources if not sources[part].optional or family.has(part)]
    parts += [part for part in family.missing() if part not in parts]
    parts += [part for part in ("base", "pose", "face", "image_text", "body_encoder") if part not in parts]
    parts += [part for part in written if part not in parts and family.has(part)]
    again = REINSTALL if name == DEFAULT_FAMILY else f"remove it, then: bolid models pull {family.name}"
    rows = []
    for number, part in enumerate(parts):
        if progress:
            progress(number, len(parts), part)
        where: Path = getattr(family, part)
        state = "missing"
        if family.has(part):
            files = written.get(part, {}).get("files", {})
            for file, expected in files.items():
                check_file(where if where.is_file() else where / file, expected, again)
            state = ("as shipped" if name == DEFAULT_FAMILY else "as fetched") if files else "whole"
            for file in [] if files else files_of(where):
                if fault := fault_of(file):
                    raise BolidError(fault, again)
        rows.append({"part": part, "where": where, "state": state})
    return rows
