"""What another seed of the training changes: methods of Table 1, each trained several times. Writes seeds.md.

    python examples/experiment/seeds.py --seeds 3 --out docs/results

--trained holds the methods trained with seed 0 (README.md), the folder beside it whose name ends in -1 those trained
with seed 1, and so on. People, photos, prompts and noise are those of Table 1, whose intervals are over people, of one
training; this says how much another training differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from figures import add_common, commit, number
from instruments import Readers
from methods import EQUAL, METHODS, Maker
from people import dev_people
from pictures import make_row, people_of
from readings import Readings
from table import BODIES, BODY, FACE, PICTURE, PORTRAITS, columns_of

from bolid.errors import BolidError
from bolid.method.metrics import Interval
from bolid.models.families import get_family
from bolid.run import write_atomic

RIVAL = "ip-adapter"
COMPARED = columns_of(
    ("judge", "masks"),
    {
        "r": BODY["r"],
        "likeness": FACE["likeness"],
        "full bodies with a face": FACE["full bodies with a face"],
        "text score": PICTURE["text score"],
    },
)
Figures = dict[str, dict[str, Interval]]


def name_of(method: str, seed: int) -> str:
    return f"{method}, seed {seed}"


def beside(folder: Path, seed: int) -> Path:
    """Where that seed's are; seed 0's are in `folder` itself."""
    return folder.with_name(f"{folder.name}-{seed}") if seed else folder


def lines_of(figures: Figures, methods: Sequence[str], seeds: int) -> list[str]:
    """A line a method and figure: each training's value, their mean, both spreads."""
    names = " | ".join(f"seed {seed}" for seed in range(seeds))
    lines = [f"| method | figure | {names} | mean | deviation over trainings | half of the interval over people |"]
    lines.append("|---|---|" + "---|" * (seeds + 3))
    for method in methods:
        for heading, name in COMPARED.items():
            found = [figures[name_of(method, seed)][name] for seed in range(seeds)]
            values = [one.value for one in found]
            half = float(np.mean([(one.high - one.low) / 2 for one in found]))
            cells = [*values, float(np.mean(values)), float(np.std(values, ddof=1)), half]
            lines.append(f"| {method} | {heading} | {' | '.join(map(number, cells))} |")
    return lines


def difference_lines(readings: Readings, seeds: int) -> list[str]:
    """BoLID's training minus the rival's, for all pairs of seeds."""
    lines = [
        f"| figure | mean of {seeds * seeds} pairs of trainings | least | most | pairs whose interval is above 0 |"
    ]
    lines.append("|---|---|---|---|---|")
    pairs = [
        readings.differences(name_of(EQUAL, ours), name_of(RIVAL, theirs))
        for ours in range(seeds)
        for theirs in range(seeds)
    ]
    for heading, name in COMPARED.items():
        found = [pair[name].interval for pair in pairs if name in pair]
        values = [one.value for one in found]
        above = sum(one.low > 0 for one in found)
        cells = " | ".join(number(value) for value in (float(np.mean(values)), min(values), max(values)))
        lines.append(f"| {heading} | {cells} | {above} |")
    return lines


def markdown(readings: Readings, figures: Figures, methods: Sequence[str], facts: dict[str, Any]) -> str:
    seeds = facts["seeds"]
    lines = [
        "# What another seed of the training changes", "",
        f"Made by `python examples/experiment/seeds.py`, {facts['date']}, commit {facts['commit']}; nothing in it is "
        "typed by hand.", "",
        f"Methods of [Table 1](experiment.md), each trained {seeds} times with another seed, otherwise equally "
        f"(`equal.toml`). {facts['people']} people from seed {facts['first']}, equal photos, prompts and noise.", "",
        *lines_of(figures, methods, seeds), "",
        "A deviation is one standard deviation; half of an interval is about two standard errors. The intervals of "
        "Table 1 are over people alone.", "",
    ]  # fmt: skip
    if {EQUAL, RIVAL} <= set(methods):
        lines += [
            f"## {EQUAL} minus {RIVAL}", "", "Pairs of equal person, prompt and noise; the interval is over people.",
            "", *difference_lines(readings, seeds), "",
        ]  # fmt: skip
    lines += ["What measured it:", ""] + [f"- {what}: {by}" for what, by in facts["instruments"].items()]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, Path("runs/experiment"))
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings there are of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[RIVAL, EQUAL])
    args = parser.parse_args()
    if args.people < 5 or args.seeds < 2:
        raise BolidError("too few people or trainings", "give --people 5 or more, and --seeds 2 or more")
    return args


def main() -> None:
    args, begun = arguments(), time.process_time()
    torch.set_num_threads(1)
    family = get_family(args.family)
    readers = Readers(family, args.judge)
    people = people_of(dev_people(args.first, args.people), args.work / "photos", BODIES, PORTRAITS)
    folders = {}
    for seed in range(args.seeds):
        maker = Maker(family, beside(args.trained, seed))
        for method in args.methods:
            if lack := maker.lacks(method):
                raise BolidError(f"{method} lacks {lack}", "train it first: README.md")
            print(f"{time.process_time() - begun:.0f} s of CPU: {name_of(method, seed)}", file=sys.stderr, flush=True)
            pictures = beside(args.work / "pictures", seed)  # of seed 0: Table 1's
            folders[name_of(method, seed)] = make_row(maker, method, people, pictures)
    readings = Readings(readers, people, folders)
    figures = readings.figures()
    facts = {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "people": len(readings.people),
        "first": args.first, "seeds": args.seeds, "instruments": readers.instruments,
    }  # fmt: skip
    out = args.out or args.work
    write_atomic(out / "seeds.md", markdown(readings, figures, args.methods, facts))
    write_atomic(out / "seeds.json", json.dumps({"figures": figures, **facts}, indent=1) + "\n")
    print(f"{time.process_time() - begun:.0f} s of CPU: {out / 'seeds.md'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
