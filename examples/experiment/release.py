"""Score a release on the sealed people, by the judge, and log it.

    python examples/experiment/release.py --work runs/release

This is the only script that renders the sealed set (people/sealed.json). Each opening is a line of
docs/results/releases.jsonl, written before anything is rendered: date, commit, set, judge, methods. A second line has
the figures. Commit the file. An opened set wears out: score releases with it, and nothing else.

The judge (judge/) reads body ratios from pictures, as the probe does, but no work has looked through it: it is of
another architecture and other training renders. Figures, all over people, of the mean reading of each person's
pictures: r, the mean correlation of the ratios with the true ones, and its paired differences from base and
build-words; R2; that of one photo over that of eight. "real photos" are the held-out photos, read as if generated: what
the judge itself allows. `bolid bench` by the judge gives the rest of the figures, and a report.
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
from judge.network import FILE, Judge
from people import People, read_people
from run import METHODS, WORDS, Bench, arguments, run

from bolid.errors import BolidError
from bolid.evaluate.bench import bench as run_bench
from bolid.evaluate.protocol import read_protocol
from bolid.formats.images import read_photo
from bolid.method.metrics import Interval, correlation_interval, jackknife_interval, r2_scores
from bolid.run import sha256_file, write_atomic
from bolid.synth.body import body_ratios
from bolid.synth.people import sample_person

ROOT = Path(__file__).parents[2]
LOG = ROOT / "docs" / "results" / "releases.jsonl"
ONE, EIGHT = "bolid-1", "bolid-8"
RELEASED = ("base", WORDS, ONE, EIGHT)
BASELINES = ("base", WORDS)  # what the others are compared with


class Reader(Protocol):
    """Reads body ratios [N,R], named `ratio_names`, from pictures (uint8 [H,W,3])."""

    ratio_names: tuple[str, ...]

    def predict(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


def release(
    people: People,
    methods: Sequence[str],
    make: Callable[[str], Path],
    score: Callable[[dict[str, Path]], dict[str, Any]],
    log: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Log the opening, make each method's pictures (`make`: method -> folder of <person>/*.png), `score` and log them.

    `facts` go into both lines, beside the date. Returns the figures.
    """
    opened = {**facts, "set": people.name, "people": len(people.seeds), "methods": list(methods)}
    append(log, {"event": "opened", **opened})
    folders = {method: make(method) for method in methods}
    figures = score(folders)
    append(log, {"event": "scored", **opened, "figures": figures})
    return figures


def body_figures(folders: dict[str, Path], seeds: Sequence[int], judge: Reader) -> dict[str, Any]:
    """method -> {"r": [value, low, high], "r minus BASELINE": [...], "R2": [...]}, over the people that all have."""
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
        figures[method]["R2"] = _rounded(_jackknife(lambda rows, v=values: _r2(truth[rows], v[rows]), len(both)))
        for baseline in BASELINES:
            if baseline in read and method not in BASELINES:
                paired = correlation_interval(truth, values, minus=read[baseline])
                figures[method][f"r minus {baseline}"] = _rounded(paired)
    if {ONE, EIGHT} <= read.keys():
        one, eight = read[ONE], read[EIGHT]
        kept = _jackknife(lambda rows: _r2(truth[rows], one[rows]) / _r2(truth[rows], eight[rows]), len(both))
        figures[ONE][f"R2 over that of {EIGHT}"] = _rounded(kept)
    return figures


def _r2(truth: torch.Tensor, values: torch.Tensor) -> float:
    """Mean over the ratios."""
    return float(r2_scores(truth, values).mean())


def _jackknife(statistic: Callable[[torch.Tensor], float], people: int) -> Interval:
    """A statistic of rows of people, and its interval."""
    rows = torch.arange(people)
    left_out = torch.tensor([statistic(rows[rows != person]) for person in rows])
    return jackknife_interval(statistic(rows), left_out)


def _readings(folder: Path, names: Sequence[str], judge: Reader) -> dict[str, torch.Tensor]:
    """Person -> mean of the judge's readings [R], f64."""
    found = {}
    for name in names:
        if pictures := sorted([*(folder / name).glob("*.png"), *(folder / name).glob("*.jpg")]):
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


def all_figures(bench: Bench, people: People, judge: Judge, folders: dict[str, Path]) -> dict[str, Any]:
    """The judge's figures, and those of `bolid bench` by the judge: method -> metric -> [value, low, high]."""
    held_out = bench.work / "held-out"
    for person in people.seeds:
        bench.protocol.held_out_photos(held_out, person)
    found = body_figures({**folders, "real photos": held_out}, people.seeds, judge)
    name = f"judge {judge.record['sha256'][:12]}"  # readings of photos are kept under it
    compared = run_bench(
        list(folders.values()), reference=bench.work / "photos", body_reader=(name, judge),
        html=bench.work / "report.html", family=bench.family.name,
    )  # fmt: skip
    table = {
        method: {name: [m.value, m.low, m.high] for name, m in result.metrics.items() if m.value is not None}
        for method, result in {**compared.methods, **compared.bounds}.items()
    }
    return {"judge": found, "bench": table}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(work=Path("runs/release"))
    parser.add_argument("--judge", type=Path, default=FILE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(RELEASED))
    args = parser.parse_args()
    people, commit = read_people("sealed"), clean_commit()
    if args.people or args.prompts:
        raise BolidError("a release is scored on all people and prompts", "leave out --people and --prompts")
    protocol = replace(read_protocol(), people=tuple(people.seeds))
    bench = Bench(args.work, protocol, args.baselines, args.family, args.adapter)
    judge, facts = Judge(args.judge), {"commit": commit, "judge": sha256_file(args.judge)}

    def score(folders: dict[str, Path]) -> dict[str, Any]:
        return all_figures(bench, people, judge, folders)

    release(people, args.methods, lambda method: run(method, protocol, bench), score, LOG, facts)
    print(LOG)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
