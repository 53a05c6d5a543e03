"""Score a release on the sealed people, by the judge, and log it.

    python examples/experiment/release.py --judge runs/judge --work runs/release

This is the only script that renders the sealed set (people/sealed.json). Each opening is a line of
docs/results/releases.jsonl, written before anything is rendered: date, commit, set, judge, methods. A second line has
the figures. Commit the file. An opened set wears out: score releases with it, and nothing else.

The judge reads body ratios from pictures, as the probe does, but no work has looked through it: another file than the
family's probe, of another architecture and other training renders. Figures, all over people: r, the mean correlation of
the ratios of each person's pictures with the true ones, and its paired differences from base and build-words.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from people import People, read_people
from run import METHODS, WORDS, Bench, arguments, run

from bolid.backends.probe import FILE, BodyProbe
from bolid.errors import BolidError
from bolid.evaluate.protocol import read_protocol
from bolid.formats.images import read_photo
from bolid.method.metrics import Interval, correlation_interval
from bolid.run import sha256_file, write_atomic
from bolid.synth.body import body_ratios
from bolid.synth.people import sample_person

ROOT = Path(__file__).parents[2]
LOG = ROOT / "docs" / "results" / "releases.jsonl"
RELEASED = ("base", WORDS, "bolid-1", "bolid-8")
BASELINES = ("base", WORDS)  # what the others are compared with


class Judge(Protocol):
    """Reads body ratios [N,R], named `ratio_names`, from pictures (uint8 [H,W,3])."""

    ratio_names: tuple[str, ...]

    def predict(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


def release(
    people: People,
    methods: Sequence[str],
    make: Callable[[str], Path],
    judge: Judge,
    log: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Log the opening, make each method's pictures (`make`: method -> folder of <person>/*.png), score and log them.

    `facts` go into both lines, beside the date. Returns the figures.
    """
    opened = {**facts, "set": people.name, "people": len(people.seeds), "methods": list(methods)}
    append(log, {"event": "opened", **opened})
    folders = {method: make(method) for method in methods}
    figures = score(folders, people.seeds, judge)
    append(log, {"event": "scored", **opened, "figures": figures})
    return figures


def score(folders: dict[str, Path], seeds: Sequence[int], judge: Judge) -> dict[str, Any]:
    """method -> {"r": [value, low, high], "r minus BASELINE": [...]}, over the people that all methods have."""
    people = [sample_person(seed) for seed in seeds]
    readings = {method: _readings(folder, [p.name for p in people], judge) for method, folder in folders.items()}
    both = [person for person in people if all(person.name in read for read in readings.values())]
    if len(both) < 5:
        raise BolidError(f"only {len(both)} people have pictures by all methods", "generate the missing ones")
    ratios = [body_ratios(person) for person in both]
    truth = torch.tensor([[one[name] for name in judge.ratio_names] for one in ratios], dtype=torch.float64)
    read = {method: torch.stack([theirs[p.name] for p in both]) for method, theirs in readings.items()}
    figures: dict[str, Any] = {}
    for method, values in read.items():
        figures[method] = {"people": len(both), "r": _rounded(correlation_interval(truth, values))}
        for baseline in BASELINES:
            if baseline in read and method not in BASELINES:
                paired = correlation_interval(truth, values, minus=read[baseline])
                figures[method][f"r minus {baseline}"] = _rounded(paired)
    return figures


def _readings(folder: Path, names: Sequence[str], judge: Judge) -> dict[str, torch.Tensor]:
    """Person -> mean of the judge's readings [R], f64."""
    found = {}
    for name in names:
        if pictures := sorted((folder / name).glob("*.png")):
            values = judge.predict([read_photo(path) for path in pictures])
            found[name] = torch.from_numpy(np.asarray(values)).double().mean(0)
    return found


def _rounded(interval: Interval) -> list[float]:
    return [round(x, 3) for x in interval]


def append(log: Path, entry: dict[str, Any]) -> None:
    """Add a line with the present date to the log, which nothing else changes."""
    before = log.read_text(encoding="utf-8") if log.is_file() else ""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(log, before + json.dumps({"date": date, **entry}) + "\n")


def clean_commit(root: Path = ROOT) -> str:
    """The commit of the working tree. Raises BolidError where it differs from that commit."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        if result.returncode:
            raise BolidError(f"git does not know the commit: {result.stderr.strip()}", "release from a git checkout")
        return result.stdout.strip()

    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise BolidError(f"files differ from the commit: {changed.splitlines()[0]}", "commit first")
    return git("rev-parse", "HEAD")


def open_judge(path: Path, probe: Path) -> tuple[BodyProbe, str]:
    """The judge and its file's hash. Raises BolidError for the `probe` that is used while working."""
    file, known = (place / FILE if place.is_dir() else place for place in (path, probe))
    judge, sha = BodyProbe(file), sha256_file(file)
    if known.is_file() and sha == sha256_file(known):
        raise BolidError("the judge is the probe that is used while working", "train another one for releases")
    return judge, sha


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(work=Path("runs/release"))
    parser.add_argument("--judge", type=Path, required=True, help="a body probe that no work has used")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(RELEASED))
    args = parser.parse_args()
    people, commit = read_people("sealed"), clean_commit()
    if args.people or args.prompts:
        raise BolidError("a release is scored on all people and prompts", "leave out --people and --prompts")
    protocol = replace(read_protocol(), people=tuple(people.seeds))
    bench = Bench(args.work, protocol, args.baselines, args.family, args.adapter)
    judge, sha = open_judge(args.judge, bench.family.require("probe"))
    facts = {"commit": commit, "judge": sha}
    release(people, args.methods, lambda method: run(method, protocol, bench), judge, LOG, facts)
    print(LOG)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
