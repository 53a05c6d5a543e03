"""``bolid scrape --forget``: everything of one person out of photos, shards and profiles."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.formats.photos import DATABASE, PhotoFolder, same_name
from bolid.formats.profile import KIND
from bolid.formats.shards import INDEX, JOURNAL, remove_person, samples_of
from bolid.formats.tensors import read_record
from bolid.run import Progress, sha256_file


@dataclass(frozen=True)
class ForgetResult:
    """What was deleted."""

    person: str
    photos: list[Path]
    samples: dict[str, list[str]]  # shard directory -> keys
    profiles: list[Path]


def forget(
    person: str,
    out: str | os.PathLike[str] = "photos",
    also: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | None = None,
) -> ForgetResult:
    """Delete a person's photos in ``out``, their samples in shards, and the profiles made of their photos.

    ``person``: the name, or the folder. Shards are looked for in ``shards`` and ``train``, profiles in the working
    directory; ``also`` names other shard directories, profiles, or folders of them. A profile is known by the hashes of
    its photos. The person will not be collected into ``out`` again.

    Raises BolidError when there is nothing of them, and, before anything is deleted, for an unfinished shard directory.
    """
    shards = _finished_shards(also)
    everybody = _everybody(Path(out))
    collected = _folder_of(person, everybody)
    folder = collected or person
    photos = _files_of(Path(out) / folder) if collected else []
    hashes = {_original_hash(path) if path.suffix == ".json" else sha256_file(path) for path in photos}
    samples = {}
    for number, directory in enumerate(shards):
        if progress:
            progress(number, len(shards), str(directory))
        if found := samples_of(directory, folder):
            samples[str(directory)] = list(found)
            hashes.update(found.values())
    candidates = sorted({profile for place in (".", *also) for profile in _profiles(Path(place))})
    profiles = [path for path in candidates if (hashes - {""}).intersection(_profile_inputs(path))]
    if not collected and not samples and not profiles:
        _write_tables_again(Path(out), person)
        near = difflib.get_close_matches(person, sorted({*everybody, *everybody.values()}))
        raise BolidError(
            f"there is nothing of {person!r} in {out}, nor in shards or profiles here",
            f"perhaps you mean {', '.join(near)}" if near else "people.csv says who is there; --also names more places",
        )
    # In this order the same call finds what is left after a kill: the photos' hashes lead to the profiles.
    for path in profiles:
        path.unlink(missing_ok=True)
    for directory in shards:
        remove_person(directory, folder)
    if collected:
        with PhotoFolder(out) as kept:
            kept.forget(folder)
            kept.write_tables()
    return ForgetResult(everybody.get(folder, person), photos, samples, profiles)


def _finished_shards(also: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The shard directories here and in `also`. BolidError where a place is missing or a directory is unfinished."""
    for place in map(Path, also):
        if not place.exists():
            raise BolidError(f"there is no {place}", "--also takes shard directories, profiles, or folders of them")
    shards = [directory for place in ("shards", "train", *also) for directory in _shard_directories(Path(place))]
    for directory in shards:
        if not (directory / INDEX).exists():
            raise BolidError(
                f"{directory} is unfinished, so nobody can be taken out of it",
                "run the command that writes it again, or remove it; then repeat this one (nothing was deleted yet)",
            )
    return shards


def _folder_of(person: str, everybody: dict[str, str]) -> str:
    """The folder of a person, given by it or by the name; "" where there is nobody. BolidError for several."""
    if person in everybody:
        return person
    meant = sorted(
        folder for folder, name in everybody.items() if same_name(person) in (same_name(name), same_name(folder))
    )
    if len(meant) > 1:
        raise BolidError(f"several people are called {person!r}: {', '.join(meant)}", "give one of these folders")
    return meant[0] if meant else ""


def _write_tables_again(out: Path, person: str) -> None:
    """After a kill between the database and the tables, these still name whom the database has forgotten."""
    if (out / DATABASE).is_file():
        with PhotoFolder(out) as photos:
            if photos.is_forgotten(person):
                photos.write_tables()


def _everybody(out: Path) -> dict[str, str]:
    """Folder -> name of the people in a photo folder."""
    if not out.is_dir():
        return {}
    found = {path.name: path.name for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if (out / DATABASE).is_file():
        with PhotoFolder(out) as photos:
            found.update(photos.people())
    return found


def _files_of(folder: Path) -> list[Path]:
    return [] if folder.is_symlink() else sorted(path for path in folder.rglob("*") if path.is_file())


def _shard_directories(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    found = [place, *sorted(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())]
    return [path for path in found if (path / INDEX).is_file() or (path / JOURNAL).is_file()]


def _profiles(place: Path) -> list[Path]:
    if place.is_file():
        return [place] if place.suffix == ".safetensors" else []
    return sorted(place.glob("*.safetensors"))


def _profile_inputs(path: Path) -> list[str]:
    """Hashes of the photos that a profile was made of; none for other files."""
    try:
        record = read_record(path)
    except BolidError:
        return []
    if record.get("kind") != KIND:
        return []
    return [value for key, value in record.get("inputs", {}).items() if key.startswith("photo")]


def _original_hash(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("sha256")
        return found if isinstance(found, str) else ""
    except (OSError, ValueError, AttributeError):
        return ""
