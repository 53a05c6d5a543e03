"""Damage to files, and what a reader makes of it: refused, read as before, or one of the failures that are counted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bolid.errors import BolidError

SCALE = float(os.environ.get("BOLID_CAMPAIGN", "1"))  # 1: the part in CI
SLOW = 10.0  # seconds of one core for a file of some kilobytes: a hang

# What a reader of JSON, TOML or CSV may not expect.
ODD = (
    "null", "true", "-1", "0", "1e999", "NaN", "9" * 30, "0.5", "[]", "{}", '""', '"\\ud800"', '"x"', "[[[]]]",
    '"' + "a" * 300 + '"', '"\\u0000"', '"../../x"', "inf", '"\u202e"', "[1, null]", '{"a": 1}',
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null')


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one kind of damage that disks, transfers and people do."""
    size, kind = len(data), int(rng.integers(9))
    at = int(rng.integers(size))
    run = int(min(size - at, rng.integers(1, max(2, size // 4))))
    if kind == 0:  # flipped bits, as many as 8
        changed = bytearray(data)
        for place in rng.integers(0, size, int(rng.integers(1, 9))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind in (2, 3):
        return data[:at] + (b"\x00" if kind == 2 else b"\xff") * run + data[at + run :]
    if kind == 4:
        return data[:at] + rng.bytes(run) + data[at + run :]
    if kind == 5:
        return data[:at] + data[at + run :]
    if kind == 6:
        return data[:at] + data[at : at + run] + data[at:]
    if kind == 7:  # the beginning, where headers are
        head = bytearray(data)
        head[int(rng.integers(min(size, 64)))] = int(rng.integers(256))
        return bytes(head)
    return data + rng.bytes(int(rng.integers(1, 200)))


def mutated_text(data: bytes, rng: np.random.Generator) -> bytes:
    """JSON, TOML or CSV with a value replaced by an odd one, an entry left out or doubled; or damaged as any file."""
    kind = int(rng.integers(4))
    if kind == 0:
        return mutated(data, rng)
    if kind == 1:
        lines = data.split(b"\n")
        place = int(rng.integers(len(lines)))
        lines[place : place + 1] = [lines[place]] * int(rng.choice([0, 2]))
        return b"\n".join(lines)
    tokens = list(_TOKEN.finditer(data))
    if not tokens:
        return mutated(data, rng)
    token = tokens[int(rng.integers(len(tokens)))]
    odd = ODD[int(rng.integers(len(ODD)))].encode()
    return data[: token.start()] + odd + data[token.end() :]


@dataclass
class Tally:
    """What came of the damaged files of one kind."""

    name: str
    tried: int = 0
    refused: int = 0
    same: int = 0  # read as before, or with nothing to protect it
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        bad = len(self.failures)
        return f"campaign: {self.name}: {self.tried} tried, {self.refused} refused, {self.same} read, {bad} failed"


def damage(
    name: str,
    data: bytes,
    read: Callable[[bytes], Any],
    *,
    tries: int,
    text: bool = False,
    truth: Any = None,
    seed: int = 0,
) -> None:
    """Read `tries` (times the campaign's scale) damaged versions of `data`.

    `read` must return, or raise BolidError with a hint. With `truth`, what it returns must be that: a file with a
    checksum is never read wrong. Anything else fails, with the seeds of the failures.
    """
    tally = Tally(name)
    for number in range(max(1, round(tries * SCALE))):
        rng = np.random.default_rng([seed, number])
        changed = (mutated_text if text else mutated)(data, rng)
        if changed == data:
            continue
        tally.tried += 1
        started = time.process_time()
        try:
            value = read(changed)
        except BolidError as error:
            tally.refused += 1
            if not error.message:
                tally.failures.append(f"{number}: an error without a message")
        except Exception as error:  # what a user would see as a fault of ours
            tally.failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if truth is not None and value != truth:
                tally.failures.append(f"{number}: read wrong, without a word")
            else:
                tally.same += 1
        if time.process_time() - started > SLOW:
            tally.failures.append(f"{number}: took more than {SLOW:g} s")
    print(tally)
    assert not tally.failures, f"{tally}\n" + "\n".join(tally.failures[:20])
