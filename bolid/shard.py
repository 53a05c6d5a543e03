"""``bolid shard``: feature shards -> training shards, by person. Twin of the command of this name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bolid.errors import BolidError
from bolid.formats.images import MAX_HASH_DISTANCE, decode_image, difference_hash, encode_png
from bolid.formats.photos import NEAR_DUPLICATE
from bolid.formats.shards import (
    DEFAULT_MAX_BYTES,
    Sample,
    ShardReader,
    ShardWriter,
    directory_sha256,
    read_index,
)
from bolid.formats.storage import alone, place
from bolid.models.families import Family, match_family
from bolid.run import Progress, derive_seed, pick_device, run_record
from bolid.views import person_crop

FEW_PHOTOS = "person with fewer photos than --min-photos"


@dataclass(frozen=True)
class ShardResult:
    """The directories that were written; with a validation share, ``out`` holds ``train/`` and ``val/``."""

    out: list[Path]
    samples: int
    persons: int
    rejected: dict[str, list[str]]  # reason -> keys


def shard(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "shards",
    out: str | os.PathLike[str] = "train",
    *,
    family: str | None = None,
    min_photos: int = 4,
    val_fraction: float = 0.0,
    max_bytes: int = DEFAULT_MAX_BYTES,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> ShardResult:
    """Group the samples of ``shards`` by person, crop them to the family's format and cache their latents.

    Several directories count as one, and a photo in two of them counts once. People with fewer than ``min_photos``
    photos (near-duplicates not counted) are left out. One person's samples lie together in one tar. With
    ``val_fraction`` that share of the people, drawn by ``seed``, goes to ``out/val`` and the others to ``out/train``;
    else all go to ``out``. The same call after a kill goes on where it stopped.

    Raises BolidError for a directory that is not one of finished feature shards, for directories of different families,
    and when nobody is left.
    """
    if min_photos < 2:
        raise BolidError(f"--min-photos is {min_photos}", "give at least 2: a photo is learnt from the others")
    if not 0 <= val_fraction < 1:
        raise BolidError(f"--val-fraction is {val_fraction}", "give a share from 0 to below 1")
    directories = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    families = [read_index(directory)["record"]["family"] for directory in directories]
    if len(set(families)) > 1:
        listed = ", ".join(f"{directory} with {name!r}" for directory, name in zip(directories, families, strict=True))
        raise BolidError(f"these were made with different families: {listed}", "give shards of one family")
    chosen = match_family(family, families[0], directories[0])
    reader = ShardReader(*directories, kind="shards")
    photos = len(reader.keys)
    people, rejected = _select(reader.read(reader.keys), min_photos, photos, progress)
    if not people:
        raise BolidError(
            f"nobody in {' and '.join(map(str, directories))} has {min_photos} photos that differ ({photos} photos)",
            "collect more photos of each, or lower --min-photos",
        )
    parts = _split(sorted(people), val_fraction, seed)
    config = {"min_photos": min_photos, "val_fraction": val_fraction, "max_bytes": max_bytes}
    inputs = {
        f"shards_{number}" if number > 1 else "shards": directory_sha256(directory)
        for number, directory in enumerate(directories, start=1)
    }
    records = {
        part: run_record("training-shards", family=chosen, config={**config, "part": part}, seed=seed, inputs=inputs)
        for part in parts
    }
    with alone(out):
        writers = {part: ShardWriter(place(out) / part, record, max_bytes) for part, record in records.items()}
        return _write(reader, people, rejected, parts, writers, chosen, device, progress)


def _write(
    reader: ShardReader,
    people: dict[str, list[str]],
    rejected: dict[str, str],
    parts: dict[str, list[str]],
    writers: dict[str, ShardWriter],
    family: Family,
    device: str,
    progress: Progress | None,
) -> ShardResult:
    """Write every part that is not complete. ``parts``: name -> its people; ``people``: person -> keys."""
    total, done = sum(map(len, people.values())), 0
    samples = persons = 0
    encoder = None
    for name, writer in writers.items():
        if not writer.complete:
            if encoder is None:
                from bolid.backends.diffusion import LatentEncoder

                encoder = LatentEncoder(family, pick_device(device))
            for key, reason in rejected.items():
                if name != "val" and key not in writer.done_rejects:
                    writer.reject(key, reason)
            for person in parts[name]:
                done += len(people[person])
                if people[person][0] not in writer.done_keys:
                    group = [_crop(sample, family) for sample in reader.read(people[person])]
                    writer.write_group(_with_latents(group, encoder.encode))
                if progress:
                    progress(done, total, person)
        written = writer.close()
        samples += written["samples"]
        persons += written["persons"]
    by_reason: dict[str, list[str]] = {}
    for key, reason in rejected.items():
        by_reason.setdefault(reason, []).append(key)
    return ShardResult([writer.directory for writer in writers.values()], samples, persons, by_reason)


def _select(
    samples: Iterable[Sample], min_photos: int, total: int, progress: Progress | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(person -> keys, key -> why it is left out), in the order of reading."""
    people: dict[str, list[str]] = {}
    hashes: dict[str, list[int]] = {}
    rejected: dict[str, str] = {}
    for number, sample in enumerate(samples):
        known = hashes.setdefault(sample.person, [])
        fingerprint = _fingerprint(sample)
        if any((fingerprint ^ other).bit_count() <= MAX_HASH_DISTANCE for other in known):
            rejected[sample.key] = NEAR_DUPLICATE
        else:
            known.append(fingerprint)
            people.setdefault(sample.person, []).append(sample.key)
        if progress:
            progress(number + 1, total, "comparing photos")
    for person in [person for person, keys in people.items() if len(keys) < min_photos]:
        rejected.update(dict.fromkeys(people.pop(person), FEW_PHOTOS))
    return people, rejected


def _fingerprint(sample: Sample) -> int:
    """The photo's difference hash, as extract has noted it; else it is computed."""
    try:
        return int(sample.meta["dhash"], 16)
    except (KeyError, TypeError, ValueError):
        return difference_hash(decode_image(sample.image, name=sample.key))


def _split(people: Sequence[str], val_fraction: float, seed: int) -> dict[str, list[str]]:
    """Directory below --out -> people. Who is held out depends on the seed and the names alone."""
    if val_fraction == 0:
        return {"": list(people)}
    drawn = sorted(people, key=lambda person: derive_seed(seed, "split", person))
    count = min(len(people) - 1, max(1, round(val_fraction * len(people))))
    held_out = set(drawn[:count])
    if count < 1:
        raise BolidError("one person cannot be split into training and validation", "leave out --val-fraction")
    return {"train": [p for p in people if p not in held_out], "val": [p for p in people if p in held_out]}


def _crop(sample: Sample, family: Family) -> tuple[Sample, np.ndarray]:
    """(the sample, cropped, without latents yet; the picture to encode into latents).

    The sample's picture and keypoints have the family's ``view_size``, the body encoder's input. The other picture has
    the same window in ``image_size``, the base's output.
    """
    size = family.view_size
    image = decode_image(sample.image, name=sample.key)
    person = np.array(sample.meta["box"], np.float32), sample.tensors["keypoints"]
    cut, box, keypoints = person_crop(image, *person, size)
    picture = cut if family.image_size == size else person_crop(image, *person, family.image_size)[0]
    meta = {**sample.meta, "width": size[1], "height": size[0], "box": [round(float(side), 2) for side in box]}
    for name in ("face_box", "others", "dhash"):  # of the whole photo
        meta.pop(name, None)
    tensors = {**sample.tensors, "keypoints": keypoints}
    return Sample(sample.key, encode_png(cut), meta, sample.caption, tensors), picture


def _with_latents(
    group: Sequence[tuple[Sample, np.ndarray]], encode: Callable[[list[np.ndarray]], np.ndarray]
) -> list[Sample]:
    """Adds ``latents`` f16 [2, C, h, w], the posterior's mean and deviation, times the VAE's scaling factor."""
    latents = encode([image for _, image in group])
    return [
        replace(sample, tensors={**sample.tensors, "latents": np.asarray(moments, np.float16)})
        for (sample, _), moments in zip(group, latents, strict=True)
    ]
