"""The frozen protocol of protocol.json: people, prompts and seeds.

No model was trained on these people: they are validation people. Each has `conditioning` photos, which a method may
use, and `held_out` photos, which no method may use and against which all are scored. The first conditioning photo and
all held-out photos show the whole body; the other conditioning photos are the person's next photos, of any framing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bolid.errors import BolidError
from bolid.synth.people import build_words, sample_person

FILE = Path(__file__).with_name("protocol.json")
HELD_OUT_START = 100  # photo numbers, far above those of conditioning photos
VALIDATION = range(100_000, 200_000)


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
    whole: bool  # nothing was left out

    def prompts_for(self, person: int) -> list[str]:
        """The prompts with the person's gender word, and no word for the build: that must come from the photos."""
        who = build_words(sample_person(person))["gender_word"]
        return [prompt.format(who=who) for prompt in self.prompts]

    def picture_seed(self, person: int) -> int:
        """The seed for `generate`: equal for all methods, different for every person."""
        return self.seed * 1_000_000 + person

    def photos(self, folder: Path) -> dict[str, list[Path]]:
        """Render folder/<person>/*.jpg where missing; returns person's name -> conditioning photos, in order."""
        from bolid.synth.render import write_photos

        found = {}
        for person in self.people:
            paths = write_photos(folder, person, 1, size=self.photo_size, framing="full body")
            paths += write_photos(folder, person, self.conditioning - 1, size=self.photo_size, start=1)
            write_photos(folder, person, self.held_out, size=self.photo_size, start=HELD_OUT_START, framing="full body")
            found[sample_person(person).name] = paths
        return found


def read_protocol(people: int = 0, prompts: int = 0, file: Path = FILE) -> Protocol:
    """The protocol, or its first so many people and prompts (0: all)."""
    data = json.loads(file.read_text(encoding="utf-8"))
    if strangers := [person for person in data["people"] if person not in VALIDATION]:
        raise BolidError(f"{file} names the person {strangers[0]}", "take validation people only: 100,000 to 199,999")
    chosen = tuple(data["people"][: people or None]), tuple(data["prompts"][: prompts or None])
    whole = len(chosen[0]) == len(data["people"]) and len(chosen[1]) == len(data["prompts"])
    size = (int(data["photo_size"][0]), int(data["photo_size"][1]))
    return Protocol(data["seed"], size, data["conditioning"], data["held_out"], data["pictures"], *chosen, whole)
