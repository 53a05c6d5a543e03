"""The frozen protocol of protocol.json: people, prompts and seeds. `make_benchmark` writes its photos and requests.

No model was trained on these people: they are validation people. Each has `conditioning` photos, which a method may
use, and `held_out` photos, which no method may use and against which all are scored. The first conditioning photo and
all held-out photos show the whole body; the other conditioning photos are the person's next photos, of any framing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bolid.errors import BolidError
from bolid.run import Progress, write_atomic
from bolid.synth.people import build_words, sample_person

FILE = Path(__file__).with_name("protocol.json")
HELD_OUT_START = 100  # photo numbers, far above those of conditioning photos
VALIDATION = range(100_000, 200_000)
CONDITIONING, REFERENCE, REQUESTS = "conditioning", "reference", "requests.csv"
FACTS = "benchmark.json"


@dataclass(frozen=True)
class Protocol:
    """The protocol, or a part of it."""

    seed: int
    photo_size: tuple[int, int]  # height, width
    conditioning: int
    held_out: int
    pictures: int  # of each prompt
    people: tuple[int, ...]
    prompts: tuple[str, ...]

    def prompts_for(self, person: int) -> list[str]:
        """The prompts with the person's gender word, and no word for the build: that must come from the photos."""
        who = build_words(sample_person(person))["gender_word"]
        return [prompt.format(who=who) for prompt in self.prompts]

    def picture_seed(self, person: int) -> int:
        """The seed for `generate`: equal for all methods, different for every person."""
        return self.seed * 1_000_000 + person

    def conditioning_photos(self, folder: Path, person: int) -> list[Path]:
        """Render folder/<person>/*.jpg where missing: what a method may use, in order."""
        from bolid.synth.render import write_photos

        paths = write_photos(folder, person, 1, size=self.photo_size, framing="full body")
        return paths + write_photos(folder, person, self.conditioning - 1, size=self.photo_size, start=1)

    def held_out_photos(self, folder: Path, person: int) -> list[Path]:
        """Render folder/<person>/*.jpg where missing: what pictures are scored against."""
        from bolid.synth.render import write_photos

        size = self.photo_size
        return write_photos(folder, person, self.held_out, size=size, start=HELD_OUT_START, framing="full body")


def read_protocol(max_people: int = 0, max_prompts: int = 0, file: Path = FILE) -> Protocol:
    """The protocol, or its first so many people and prompts (0: all)."""
    data = json.loads(file.read_text(encoding="utf-8"))
    if strangers := [person for person in data["people"] if person not in VALIDATION]:
        raise BolidError(f"{file} names the person {strangers[0]}", "take validation people only: 100,000 to 199,999")
    chosen = tuple(data["people"][: max_people or None]), tuple(data["prompts"][: max_prompts or None])
    size = (int(data["photo_size"][0]), int(data["photo_size"][1]))
    return Protocol(data["seed"], size, data["conditioning"], data["held_out"], data["pictures"], *chosen)


class Benchmark(NamedTuple):
    """What `make_benchmark` wrote. `digest`: SHA-256 of the photos' pixels; equal digests, equal photos."""

    folder: Path
    people: int
    photos: int
    requests: int
    digest: str


def make_benchmark(
    out: str | os.PathLike[str], *, max_people: int = 0, max_prompts: int = 0, progress: Progress | None = None
) -> Benchmark:
    """Write a benchmark folder: conditioning/ and reference/ (<person>/*.jpg), requests.csv, benchmark.json.

    requests.csv has a row for each picture that a method shall make: picture (its name), person, prompt, seed. A method
    reads conditioning/ only. Photos that are there are kept.

    Args:
        out: the folder.
        max_people: only the first so many people; 0: all.
        max_prompts: only the first so many prompts; 0: all.
        progress: called with (done, total, text).

    Raises:
        BolidError: `out` is a file.
    """
    from bolid.formats.images import read_photo

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BolidError(f"{out} is a file", "give a folder for the benchmark")
    protocol = read_protocol(max_people, max_prompts)
    paths: list[Path] = []
    for done, person in enumerate(protocol.people):
        if progress is not None:
            progress(done, len(protocol.people), "rendering people")
        given = protocol.conditioning_photos(out / CONDITIONING, person)
        for path in given:  # no method shall read the truth
            path.with_suffix(".json").unlink(missing_ok=True)
        paths += given + protocol.held_out_photos(out / REFERENCE, person)
    rows = requests(protocol)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["picture", "person", "prompt", "seed"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / REQUESTS, text.getvalue())
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(read_photo(path)).tobytes() for path in paths)).hexdigest()
    facts = {"people": protocol.people, "prompts": protocol.prompts, "photos": len(paths), "digest": digest}
    write_atomic(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return Benchmark(out, len(protocol.people), len(paths), len(rows), digest)


def requests(protocol: Protocol) -> list[dict[str, str | int]]:
    """A row for each picture that a method shall make."""
    return [
        {
            "picture": f"{sample_person(person).name}/{index:03d}-{number}.png",
            "person": sample_person(person).name,
            "prompt": prompt,
            "seed": protocol.picture_seed(person) + 1000 * index + number,
        }
        for person in protocol.people
        for index, prompt in enumerate(protocol.prompts_for(person))
        for number in range(protocol.pictures)
    ]
