"""Photos, shards and profiles of three people, of whom one is to be forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bolid.formats.images import encode_jpeg
from bolid.formats.profile import save_profile
from bolid.formats.shards import ShardWriter
from bolid.scrape.command import scrape

PEOPLE = ("anna", "ben", "carl")


def jpeg(seed: int) -> bytes:
    """A small photo of noise."""
    return encode_jpeg(np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8))


def write_shards(
    make_sample: Callable[..., Any],
    record: Callable[..., dict],
    directory: Path,
    people: tuple[str, ...] = PEOPLE,
    tar: int = 40_000,
) -> Path:
    """A finished directory of three samples of each person. `make_sample`, `record`: the fixtures."""
    writer = ShardWriter(directory, record(), tar)
    for number in range(3):
        for person in people:
            sample = make_sample(person, number)
            sha256 = hashlib.sha256(jpeg(100 * len(person) + number)).hexdigest()
            writer.write(replace(sample, meta={**sample.meta, "sha256": sha256}))
    writer.reject("ben/blurred.jpg", "no person found")
    writer.reject("anna/dark.jpg", "no person found")
    writer.close()
    return directory


def fill(folder: Path, write: partial[Path], record: Callable[..., dict]) -> Path:
    """photos/ of Anna, Ben and Carl, shards/ and train/, and a profile of Anna and one of Ben. `write`: the shards."""
    for number, person in enumerate(PEOPLE):
        (folder / "mine" / person).mkdir(parents=True)
        for photo in range(3):
            (folder / "mine" / person / f"{photo}.jpg").write_bytes(jpeg(10 * number + photo))
    scrape(folder / "mine", out=folder / "photos", min_size=32)
    write(folder / "shards")
    write(folder / "train" / "train", ("anna", "ben"))
    write(folder / "train" / "val", ("carl",))
    for number, name in enumerate(("anna", "ben")):
        inputs = {"photo_000": hashlib.sha256(jpeg(10 * number)).hexdigest()}
        run = record("profile", inputs=inputs)
        save_profile(folder / f"{name}.safetensors", torch.zeros(4), torch.zeros(4), None, torch.ones(1), run)
    return folder
