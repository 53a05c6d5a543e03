"""Table 1: BoLID, its ablations and the baselines, on held-out people, with paired differences. Writes experiment.md.

    python examples/experiment/table.py --out docs/results
    python examples/experiment/table.py --methods base bolid-8 --people 5     # a quick look

The methods (methods.py) that have to be trained are read from --trained; those that are not there are left out, and
the table says so. Pictures are made where missing or where a model has changed, and scored by the instruments of
figures.py. DreamBooth trains a LoRA for each person, so it has fewer people (--dreambooth) and a table of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from baselines import FILE
from baselines import METHODS as BASELINES
from dreambooth import cost
from figures import add_common, cell, commit, number
from instruments import Readers
from methods import BASE, DREAMBOOTH, EIGHT, EQUAL, METHODS, REAL, WORDS, Maker
from people import dev_people
from pictures import contact_sheet, make_row, people_of
from readings import Difference, Readings

from bolid.errors import BolidError
from bolid.formats.tensors import read_record
from bolid.method.metrics import Interval, holm
from bolid.models.families import get_family
from bolid.run import write_atomic
from bolid.synth.people import sample_person

BODIES, PORTRAITS = 4, 2
WEIGHTS = (FILE, "face.safetensors", "body.safetensors")
Figures = dict[str, dict[str, Interval]]

BODY = {
    "r": ("body by {by}, mean r", "correlation of ten body ratios with the truth over people, mean of the ratios; of "
          f"the reading of a person's {BODIES} full bodies together"),
    "R2": ("body by {by}, mean R2, mean of a person's pictures", "of the same readings"),
    "error": ("body by {by}, mean error in standard deviations", "of the same readings, in standard deviations over "
              "people, mean of the ratios"),
}  # fmt: skip
FACE = {
    "likeness": ("likeness by an outsider", f"cosine with 2 real portraits, 0 without a face, mean of {PORTRAITS} "
                 "portraits"),
    "portraits with a face": ("face found, portraits", f"mean of {PORTRAITS} portraits"),
    "full bodies with a face": ("face found, full bodies", f"mean of {BODIES} full bodies"),
}  # fmt: skip
PICTURE = {
    "text score": ("text score", "cosine of picture and prompt, mean of all six pictures"),
    "pose": ("pose as asked", "share of full bodies"),
    "colours": ("colours as asked", "share of asked colours of clothes, mean of all six pictures"),
    "scene": ("scene as asked", "share of pictures of which a scene is asked"),
    "diversity": ("diversity over the base's", "distance of two pictures of one prompt with other noise"),
    "FID": ("FID", f"of {BODIES} full bodies a person against other renders of the same people"),
    "KID, 1e-3": ("KID, 1e-3", "of the same"),
}  # fmt: skip
COMPARED = ("r", "R2", "likeness", "full bodies with a face", "text score")


@dataclass
class Table:
    """What `markdown` writes. Outer keys are methods, of `differences` the reference first."""

    figures: Figures
    differences: dict[str, dict[str, dict[str, Difference]]]
    facts: dict[str, Any]
    few: Figures = field(default_factory=dict)  # of DreamBooth's people


def columns_of(readers: Sequence[str], parts: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Heading -> figure; those of the body once for each reader."""
    return {
        heading if "{by}" not in name else f"{heading} by {by}": name.format(by=by)
        for heading, (name, _) in parts.items()
        for by in (readers if "{by}" in name else [""])
    }


def lines_of(figures: Figures, columns: dict[str, str]) -> list[str]:
    """A line a method, a column a figure."""
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for method, found in figures.items():
        lines.append(f"| {method} | {' | '.join(cell(found.get(name)) for name in columns.values())} |")
    return lines


def differences_of(
    reference: str, rivals: dict[str, dict[str, Difference]], columns: dict[str, str]
) -> tuple[list[str], dict[tuple[str, str], float]]:
    """The table of `reference` minus each rival, and (rival, figure) -> its p-value by Holm's correction for all
    differences of the table."""
    tested = [(rival, name) for rival, found in rivals.items() for name in columns.values() if name in found]
    adjusted = dict(zip(tested, holm([rivals[rival][name].p for rival, name in tested]), strict=True))
    lines = [f"| {reference} minus | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for rival, found in rivals.items():
        cells = []
        for name in columns.values():
            one = found.get(name)
            p = adjusted.get((rival, name), 1.0)
            mark = "**" if p <= 0.05 else ""
            cells.append("" if one is None else f"{mark}{cell(one.interval)}{mark} p {p_value(p)}")
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return lines, adjusted


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def headline(table: Table, by: str) -> list[str]:
    """The claims in words, from the figures: BoLID from eight photos against the best trained baseline, words, base."""
    lines = []
    for kind, name in (("Bodies, r", BODY["r"][0].format(by=by)), ("Faces, likeness", FACE["likeness"][0])):
        for reference, how in ((EQUAL, "trained as the others"), (EIGHT, "as it ships, trained longer")):
            against = {m: found[name].interval for m, found in table.differences.get(reference, {}).items()}
            trained = [m for m in BASELINES if m in against and m != "upper-bound"]
            best = [max(trained, key=lambda m, name=name: table.figures[m][name].value)] if trained else []
            differences = [f"{signed(against[m])} over {m}" for m in [*best, WORDS, BASE] if m in against]
            if differences:
                own = cell(table.figures[reference][name])
                lines.append(f"- {kind}, BoLID from eight photos {how}: {own}; {', '.join(differences)}.")
        if (real := table.figures.get(REAL, {}).get(name)) and (words := table.figures.get(WORDS, {}).get(name)):
            lines.append(
                f"- {kind}, of other renders of the same people: {cell(real)}; {real.value - words.value:+.3f} over "
                f"{WORDS}, which is the most that a method can be expected to show."
            )
    if EQUAL not in table.figures and any(m in table.figures for m in BASELINES):
        lines.append(
            f"- **Not trained equally long**: {EQUAL} is not in this table, so BoLID's differences from trained "
            "baselines are of unequal trainings (column `trained`)."
        )
    if lines:
        lines += [
            "",
            "The first method after each figure is the best of the trained baselines by that figure. Where an interval "
            "holds 0, the two do not differ measurably.",
        ]
    return lines


def signed(value: Interval) -> str:
    return f"{value.value:+.3f} ({number(value.low)} to {number(value.high)})"


def markdown(table: Table) -> str:
    facts, readers = table.facts, table.facts["readers"]
    made = [method for method in table.figures if method != REAL]
    many = f"{facts['people']} people"
    lines = [
        "# Table 1: who keeps the person?", "",
        f"Made by `python examples/experiment/table.py`, {facts['date']}, commit {facts['commit']}; nothing in it is "
        "typed by hand.", "",
        f"Family {facts['family']} at {facts['size']} (height x width), which knows rendered people only: the "
        f"*mechanism* of each method is compared, not its published weights. {many} that no training has seen, from "
        f"seed {facts['first']}; of each {BODIES} full bodies and {PORTRAITS} portraits a method, of equal photos, "
        "prompts and noise. Value and 95 % interval over people (jackknife); n is "
        f"{many} in every cell{facts['left out']}.", "",
        *headline(table, readers[0]), "",
        "| method | what it is | simplified | trained |", "|---|---|---|---|",
        *(f"| {m} | {METHODS[m].what} | {METHODS[m].simplified} | {facts['trained'].get(m, '')} |"
          for m in [*made, *(m for m in table.few if m not in table.figures)]),
        f"| {REAL} | other renders of the same people: what the instruments allow | | |",
        *(f"\nLeft out: {method}, which lacks {lack}." for method, lack in facts["lacks"].items()), "",
        "## Body and face", "", *lines_of(table.figures, columns_of(readers, BODY) | columns_of(readers, FACE)), "",
        "## Prompt and picture", "", *lines_of(table.figures, columns_of(readers, PICTURE)), "",
    ]  # fmt: skip
    compared = {h: n for h, n in columns_of(readers, BODY | FACE | PICTURE).items() if h.split(" by ")[0] in COMPARED}
    for reference, rivals in table.differences.items():
        found, _ = differences_of(reference, rivals, compared)
        lines += [
            f"## {reference} minus the others", "",
            "Pairs of equal person, prompt and noise. **Bold**: p at most 0.05; p by Holm's correction for all "
            "differences of this table.", "", *found, "",
        ]  # fmt: skip
    if table.few:
        columns = columns_of(readers, {"error": BODY["error"]} | FACE | {"text score": PICTURE["text score"]})
        lines += [
            "## DreamBooth-LoRA, a training for each person", "",
            f"On the first {facts['few']} people alone; n is {facts['few']} people in every cell. The other columns "
            "are of the same people.", "", *lines_of(table.few, columns), "",
        ]  # fmt: skip
    lines += ["## What is averaged", ""]
    lines += [f"- {heading}: {what}" for heading, (_, what) in {**BODY, **FACE, **PICTURE}.items()]
    lines += ["", "What measured it:", ""] + [f"- {what}: {by}" for what, by in facts["instruments"].items()]
    return "\n".join(lines) + "\n"


def trained_as(maker: Maker, methods: Sequence[str]) -> dict[str, str]:
    """Method -> how its weights were trained, and what they take."""
    found = {}
    for method in methods:
        files = [file for file in METHODS[method].files(maker) if file.name in WEIGHTS]
        if method == DREAMBOOTH:
            found[method] = cost(maker.trained / DREAMBOOTH)
        elif files:
            size = sum(file.stat().st_size for file in files) / 1e6
            how = dict.fromkeys(training(read_record(file)["config"]) for file in files)
            found[method] = f"{'; '.join(how)}; {size:.1f} MB"
    return found


def training(config: dict[str, Any]) -> str:
    """The training that a file's record tells of."""
    steps = config.get("steps_done", config["steps"])  # adapters may be taken before their training's end
    sampled = " on sampled pictures" if config.get("x_gen") == "sampled" else ""
    earlier = ", after earlier trainings" if config.get("init") else ""
    return f"{steps} steps of {config['batch_size']} photos{sampled}{earlier}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, Path("runs/experiment"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dreambooth", type=int, default=4, help="people whom DreamBooth is trained for")
    args = parser.parse_args()
    if args.people < 5 or BASE not in args.methods:
        raise BolidError("too few people or no base to compare with", "give --people 5 or more, and base among them")
    return args


def main() -> None:
    args, begun = arguments(), time.process_time()
    torch.set_num_threads(1)
    family = get_family(args.family)
    maker, readers = Maker(family, args.trained, args.adapter), Readers(family, args.judge)
    people = people_of(dev_people(args.first, args.people), args.work / "photos", BODIES, PORTRAITS)
    few = dict(list(people.items())[: args.dreambooth])
    lacks = {method: lack for method in args.methods if (lack := maker.lacks(method))}
    folders = {}
    for method in (m for m in METHODS if m in args.methods and m not in lacks):
        print(f"{time.process_time() - begun:.0f} s of CPU: pictures of {method}", file=sys.stderr, flush=True)
        some = few if method == DREAMBOOTH else people
        folders[method] = make_row(maker, method, some, args.work / "pictures")
    contact_sheet(folders, list(few), args.work / "sheet.png")
    print(f"{time.process_time() - begun:.0f} s of CPU: scoring", file=sys.stderr, flush=True)
    everywhere = {method: folder for method, folder in folders.items() if method != DREAMBOOTH}
    readings, few_figures = Readings(readers, people, everywhere), {}
    if DREAMBOOTH in folders:
        beside = [m for m in (BASE, WORDS, "ip-adapter", DREAMBOOTH, EQUAL, EIGHT) if m in folders]
        few_figures = Readings(readers, few, {method: folders[method] for method in beside}).figures()
    gone = [sample_person(seed).name for seed in people if seed not in readings.people]
    facts = {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "family": family.name,
        "size": list(family.image_size), "people": len(readings.people), "first": args.first, "few": len(few),
        "left out": f" (without {', '.join(gone)}, for whom a method failed)" if gone else "", "lacks": lacks,
        "readers": list(readers.bodies), "instruments": readers.instruments,
        "trained": trained_as(maker, list(folders)), "models": {method: maker.models(method) for method in folders},
    }  # fmt: skip
    differences = {
        reference: {m: readings.differences(reference, m) for m in everywhere if m != reference}
        for reference in (EQUAL, EIGHT)
        if reference in everywhere
    }
    table = Table(readings.figures(), differences, facts, few_figures)
    out = args.out or args.work
    write_atomic(out / "experiment.md", markdown(table))
    figures = {"figures": table.figures, "differences": differences, "dreambooth": few_figures, **facts}
    write_atomic(out / "experiment.json", json.dumps(figures, indent=1) + "\n")
    print(f"{time.process_time() - begun:.0f} s of CPU: {out / 'experiment.md'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
