"""Score a release on the sealed people, by the judge, and log it.

    python examples/experiment/release.py --work runs/release
    python examples/experiment/release.py --dry-run --people 6      # on people of the dev set: no opening

This is the only script that renders the sealed set (people/sealed.json). Each opening is a line of
docs/results/releases.jsonl, written before anything is rendered: date, commit, set, judge, methods. A second line has
the figures, which are those of figures.py; releases.md beside it shows them. Commit both. An opened set wears out:
score releases with it, and nothing else.

The judge (judge/) reads body ratios from pictures, as the probe does, but no work has looked through it: it is of
another architecture and other training renders. A second reader goes by masks (mask_reader.py). `real` are other
renders of the same people: what the readers themselves allow. A dry run logs beside its pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from figures import ASKED, add_common, cell, commit
from instruments import Readers
from methods import BASE, BOTH, EIGHT, METHODS, ONE, WORDS, Maker
from people import People, dev_people, read_people
from pictures import make_row, people_of
from readings import Readings

from bolid.errors import BolidError
from bolid.method.metrics import Interval
from bolid.models.families import get_family
from bolid.run import sha256_file, write_atomic

ROOT = Path(__file__).parents[2]
LOG = ROOT / "docs" / "results" / "releases.jsonl"
RELEASED = (BASE, WORDS, ONE, EIGHT, BOTH)
BODIES, PORTRAITS = 4, 2

SHOWN = (
    "body by judge, mean r", "r by judge minus base's", "body by masks, mean r", "r by masks minus build-words's",
    "body by masks, mean R2, mean of a person's pictures", "likeness by an outsider", "text score", "FID",
)  # fmt: skip
"""Figures of the page beside those that the project set itself."""

Figures = dict[str, dict[str, Sequence[float]]]
"""Method -> figure -> value, low, high."""


def release(
    people: People,
    methods: Sequence[str],
    make: Callable[[str], Path],
    score: Callable[[dict[str, Path]], Figures],
    log: Path,
    facts: dict[str, Any],
) -> Figures:
    """Log the opening, make each method's pictures (`make`: method -> folder of <person>/*.png), `score` and log them.

    `facts` go into both lines, beside the date. Returns the figures, rounded.
    """
    opened = {**facts, "set": people.name, "people": len(people.seeds), "methods": list(methods)}
    append(log, {"event": "opened", **opened})
    found = score({method: make(method) for method in methods})
    figures: Figures = {
        method: {name: [round(x, 3) for x in value] for name, value in theirs.items()}
        for method, theirs in found.items()
    }
    append(log, {"event": "scored", **opened, "figures": figures})
    return figures


def append(log: Path, entry: dict[str, Any]) -> None:
    """Add a line with the present date to the log, which nothing else changes."""
    before = log.read_text(encoding="utf-8") if log.is_file() else ""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(log, before + json.dumps({"date": date, **entry}) + "\n")


def page(log: Path) -> str:
    """The scored releases of a log, the last one first, as markdown."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [
        "# Releases, on the sealed people", "",
        f"Written by `examples/experiment/release.py` from {log.name}, where all figures are; nothing in it is typed "
        "by hand. Nothing is trained, fitted or chosen on these people, and only this script renders them. "
        f"Openings in the log: {sum(entry['event'] == 'opened' for entry in entries)}. Value and 95 % interval over "
        "people.",
    ]  # fmt: skip
    for entry in reversed([entry for entry in entries if entry["event"] == "scored"]):
        figures, methods = entry["figures"], list(entry["figures"])
        lines += [
            "", f"## {entry['date'][:10]}, commit {entry['commit'][:7]}", "",
            f"Family {entry['family']}; {entry['people']} people, of each {BODIES} full-body pictures and {PORTRAITS} "
            "portraits a column, equal prompts and noise.", "",
            *(f"- {method}: {METHODS[method].what if method in METHODS else 'other renders of the same people'}"
              for method in methods),
            "", f"| figure | asked | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}",
        ]  # fmt: skip
        for name in dict.fromkeys([*SHOWN, *ASKED]):
            cells = [cell(Interval(*figures[m][name])) if name in figures[m] else "" for m in methods]
            lines.append(f"| {name} | {ASKED.get(name, '')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, Path("runs/release"))
    parser.add_argument("--dry-run", action="store_true", help="on the dev people that --first and --people name")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(RELEASED))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.dry_run and any(getattr(args, name) != parser.get_default(name) for name in ("first", "people")):
        raise BolidError("a release is scored on all sealed people", "leave out --first and --people, or --dry-run")
    if not args.judge.is_file():
        raise BolidError(f"there is no judge: looked for {args.judge}", "python examples/experiment/judge/train.py")
    family = get_family(args.family)
    maker, readers = Maker(family, args.trained, args.adapter), Readers(family, args.judge)
    for method in args.methods:  # before the set is opened
        if lack := maker.lacks(method):
            raise BolidError(f"{method} lacks {lack}", "give --trained, or other --methods")
    if args.dry_run:
        chosen, log = replace(read_people("dev"), seeds=dev_people(args.first, args.people)), args.work / LOG.name
        facts = {"commit": commit()}
    else:
        chosen, log, facts = read_people("sealed"), LOG, {"commit": clean_commit()}
    facts |= {"family": family.name, "judge": sha256_file(args.judge), "models": maker.models(BOTH)}
    begun, loaded = time.process_time(), {}

    def make(method: str) -> Path:
        if not loaded:
            loaded.update(people_of(chosen.seeds, args.work / "photos", BODIES, PORTRAITS))
        print(f"{time.process_time() - begun:.0f} s of CPU: pictures of {method}", file=sys.stderr, flush=True)
        return make_row(maker, method, loaded, args.work / "pictures")

    def score(folders: dict[str, Path]) -> Figures:
        print(f"{time.process_time() - begun:.0f} s of CPU: scoring", file=sys.stderr, flush=True)
        return Readings(readers, loaded, folders).figures()

    release(chosen, args.methods, make, score, log, facts)
    write_atomic(log.with_suffix(".md"), page(log))
    print(log)
    print(f"{time.process_time() - begun:.0f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
