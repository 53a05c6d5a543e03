"""All figures of a family on held-out people, with intervals, in one command and one table, family.md.

    python examples/experiment/figures.py --people 24 --out docs/results
    python examples/experiment/figures.py --family FOLDER --people 3 --bodies 2 --portraits 1   # a quick look

Renders photos of people of the dev set, makes the pictures of each row (a method of methods.py) where they are
missing, and scores them (instruments.py, readings.py). `--family`: a name, a folder with a family.json, or a .toml
file. Pictures, a contact sheet and the table stay in --work; what is there is not made again.

Every interval is 95 %, over people, by the jackknife. A mean over pictures weighs people equally. `real`: other renders
of the same people, which say what the instruments allow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from instruments import JUDGE_FILE, Readers
from methods import BASE, BOTH, EIGHT, METHODS, ONE, SHAPE, TRAINED, WORDS, Maker, seconds_a_picture
from people import dev_people, read_people
from pictures import contact_sheet, make_row, people_of
from readings import Readings

from bolid.errors import BolidError
from bolid.method.metrics import Interval
from bolid.models.families import get_family
from bolid.run import write_atomic
from bolid.synth.people import sample_person

ASKED = {
    "body by judge, mean R2, mean of a person's pictures": "0.78", "body by judge, mean R2, one picture": "0.60",
    "arm by judge, R2": "0.60", "head by judge, R2": "0.60", "r by judge minus build-words's": "0.25",
    "R2 by judge over that of bolid-8": "0.93", "face found, portraits": "0.97", "face found, full bodies": "0.85",
    "likeness by an outsider, over real photos'": "0.50", "pose as asked": "0.97", "colours as asked": "0.97",
    "scene as asked": "0.97", "framing as asked": "0.97", "edges over the renders'": "0.9 to 1.1",
    "diversity over the base's": "0.85", "likeness by an outsider, darkest over lightest": "0.9",
    "face found, darkest over lightest": "0.9",
}  # fmt: skip
"""What the project set itself for bolid-8 (bolid-1 for its share of bolid-8)."""

ROWS = (BASE, WORDS, ONE, EIGHT, SHAPE, BOTH)


def table(figures: dict[str, dict[str, Interval]], facts: dict[str, Any]) -> str:
    """Markdown: a line a figure, a column a row."""
    columns = list(figures)
    fullest = sorted(figures.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for found in fullest for name in found))
    lines = [
        "# What the family's pictures keep of people",
        "",
        f"Made by `examples/experiment/figures.py`, {facts['date']}, commit {facts['commit']}; nothing in it is typed "
        "by hand.",
        "",
        f"Family {facts['family']} at {facts['size']} (height x width). {facts['people']} held-out synthetic people "
        f"from seed {facts['first']}; of each {facts['bodies']} full-body pictures and {facts['portraits']} portraits "
        "a column, equal prompts and noise. Value and 95 % interval over people.",
        "",
        *(f"- {row}: {METHODS[row].what if row in METHODS else 'other renders of the same people'}" for row in columns),
        *(f"- left out: {row}, which lacks {lack}" for row, lack in facts["lacks"].items()),
        "",
        f"| figure | asked | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for name in names:
        cells = " | ".join(cell(figures[row].get(name)) for row in columns)
        lines.append(f"| {name} | {ASKED.get(name, '')} | {cells} |")
    if facts["seconds"] is not None:
        lines += ["", f"One picture of {EIGHT}, models loaded: {facts['seconds']:.2f} s of one core."]
    lines += ["", "What measured it:", ""] + [
        f"- {what}: {instrument}" for what, instrument in facts["instruments"].items()
    ]
    return "\n".join(lines) + "\n"


def cell(found: Interval | None) -> str:
    if found is None or np.isnan(found.value):
        return ""
    if np.isnan(found.low):
        return number(found.value)
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def number(value: float) -> str:
    """Three digits behind the point at most."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def commit(root: Path = Path(__file__).parent) -> str:
    """The short commit of a repository; with "+" where something is changed. "" without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "--untracked-files=no").strip()
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def add_common(parser: argparse.ArgumentParser, work: Path) -> None:
    """The options that all tables have."""
    parser.add_argument(
        "--family", help="a name, a folder with a family.json or a .toml file; by default the chosen one"
    )
    parser.add_argument("--adapter", type=Path, help="a folder with other branches than the family's")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="what baselines.py has written")
    parser.add_argument("--judge", type=Path, default=JUDGE_FILE, help="another judge's file")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--first", type=int, default=read_people("dev").seeds.start, help="seed of the first person")
    parser.add_argument("--work", type=Path, default=work, help="photos and pictures")
    parser.add_argument("--out", type=Path, help="folder of the table; by default WORK")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, Path("runs/figures"))
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(ROWS))
    parser.add_argument("--bodies", type=int, default=4, help="full-body pictures of each person")
    parser.add_argument("--portraits", type=int, default=2, help="of each person")
    args = parser.parse_args()
    if args.people < 3 or args.bodies < 2 or args.portraits < 1:
        raise BolidError("too few pictures for any figure", "give --people 3, --bodies 2 and --portraits 1 at least")
    return args


def main() -> None:
    args, begun = arguments(), time.process_time()
    torch.set_num_threads(1)
    family = get_family(args.family)
    maker, readers = Maker(family, args.trained, args.adapter), Readers(family, args.judge)
    people = people_of(dev_people(args.first, args.people), args.work / "photos", args.bodies, args.portraits)
    lacks = {row: lack for row in args.rows if (lack := maker.lacks(row))}
    chosen = [row for row in METHODS if row in args.rows and row not in lacks]
    folders = {}
    for row in chosen:
        print(f"{time.process_time() - begun:.0f} s of CPU: pictures of {row}", file=sys.stderr, flush=True)
        folders[row] = make_row(maker, row, people, args.work / "pictures")
    seconds = seconds_a_picture(maker, *people[args.first], sample_person(args.first))
    contact_sheet(folders, list(people), args.work / "sheet.png")
    print(f"{time.process_time() - begun:.0f} s of CPU: scoring", file=sys.stderr, flush=True)
    readings = Readings(readers, people, folders)
    figures = readings.figures()
    facts = {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "family": family.name,
        "size": list(family.image_size), "people": len(readings.people), "first": args.first, "bodies": args.bodies,
        "portraits": args.portraits, "lacks": lacks, "seconds": seconds, "instruments": readers.instruments,
        "models": {row: maker.models(row) for row in chosen},
    }  # fmt: skip
    out = args.out or args.work
    write_atomic(out / "family.md", table(figures, facts))
    write_atomic(out / "family.json", json.dumps({"figures": figures, **facts}, indent=1) + "\n")
    print(table(figures, facts))
    print(f"{time.process_time() - begun:.0f} s of CPU: {out / 'family.md'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
