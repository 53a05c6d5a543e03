"""The three sets of people in people/*.json: dev, calibration and sealed; and who shipped files were made with.

A person is a seed of `bolid synth`. Trainings take seeds below 100,000. `mentions` finds the seeds of a set in the text
of records, cards and scripts; a test fails where one names the sealed set. people/shipped.json lists the people of
each shipped file, which a test asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolid.errors import BolidError

FOLDER = Path(__file__).with_name("people")
TRAINING = range(100_000)

_NUMBER = r"(?<![\w.])p?(\d{1,3}(?:[_,]\d{3})+|\d+)(?!\w|\.\d)"
_BETWEEN = r"\s*(?::|\.\.|,|-|–|\bto\b)\s*"


@dataclass(frozen=True)
class People:
    """One set."""

    name: str
    purpose: str
    seeds: range


def read_people(name: str, folder: Path = FOLDER) -> People:
    """The set called `name`. Raises BolidError for an unknown name and for a damaged file."""
    file = folder / f"{name}.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        first, count = int(data["first"]), int(data["count"])
        return People(str(data["name"]), str(data["purpose"]), range(first, first + count))
    except FileNotFoundError as error:
        raise BolidError(f"there is no set of people called {name!r}", f"look into {folder}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BolidError(f"{file} is damaged: {error}", "it needs name, purpose, first and count") from error


def dev_people(first: int, count: int) -> range:
    """Seeds of the dev set. Raises BolidError for others."""
    dev, chosen = read_people("dev").seeds, range(first, first + count)
    if not set(chosen) <= set(dev):
        raise BolidError("these people are not of the dev set", f"they are {dev}")
    return chosen


@dataclass(frozen=True)
class MadeWith:
    """The people behind a shipped file: use (trained, fitted, calibrated, chosen) -> their seeds. `unknown`: the uses
    of people of whom no record has the seeds. `source`: where the seeds are from."""

    seeds: dict[str, tuple[range, ...]]
    unknown: frozenset[str]
    source: str


USES = ("trained", "fitted", "calibrated", "chosen")


def read_shipped(file: Path = FOLDER / "shipped.json") -> dict[str, MadeWith]:
    """Path of a shipped file -> the people it was made with. Raises BolidError for a damaged list."""
    found = {}
    try:
        for path, entry in json.loads(file.read_text(encoding="utf-8")).items():
            lists = {use: [None] if entry[use] is None else entry[use] for use in USES if use in entry}
            seeds = {use: tuple(range(*pair) for pair in pairs if pair is not None) for use, pairs in lists.items()}
            unknown = frozenset(use for use, pairs in lists.items() if None in pairs)
            found[path] = MadeWith(seeds, unknown, str(entry["from"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BolidError(
            f"{file} is damaged: {error}", "an entry has from, and a list of seeds for each use"
        ) from error
    return found


def mentions(text: str, people: People) -> list[str]:
    """Where `text` names a seed of the set (600000, 600_000, 600,000, p600000), a range of seeds that reaches into it
    (599990:600010, range(0, 700000), {"first": ..., "count": ...}), or the set itself in quotes or as a file."""
    found = [match[0] for match in re.finditer(_NUMBER, text) if _number(match[1]) in people.seeds]
    for match in re.finditer(rf"{_NUMBER}{_BETWEEN}{_NUMBER}", text):
        if _overlap(_number(match[1]), _number(match[2]), people.seeds):
            found.append(match[0])
    found += re.findall(rf"[\"']{people.name}[\"']|\b{people.name}\.json\b", text)
    try:
        data = json.loads(text)
    except ValueError:
        return found
    for node in _objects(data):
        first, count = node.get("first"), node.get("count")
        if isinstance(first, int) and isinstance(count, int) and _overlap(first, first + count, people.seeds):
            found.append(f"first {first}, count {count}")
    return found


def _number(digits: str) -> int:
    return int(digits.replace("_", "").replace(",", ""))


def _overlap(start: int, stop: int, seeds: range) -> bool:
    return start < seeds.stop and stop > seeds.start


def _objects(data: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects inside `data`."""
    if isinstance(data, dict):
        yield data
    for child in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _objects(child)
