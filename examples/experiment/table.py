"""The experiment's table, in one command: every method over the frozen protocol, scored side by side.

    python examples/experiment/table.py --work runs/experiment --baselines runs/baselines

Generates missing pictures (run.py), compares all methods with the base by `bolid evaluate`'s own
functions, and writes docs/results/experiment.md and .json, and report.html beside the pictures. Of a smaller run
(--people, --prompts, --methods) the tables go beside the pictures too. When only some methods have changed:

    python examples/experiment/table.py --methods base bolid-1 bolid-8 \\
        --earlier docs/results/experiment.json --out docs/results

generates those alone and takes the others from that file, if both have equal figures of the first method. Methods that
were trained again with other seeds: --trainings, folders like that of --baselines (trainings.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baselines import METHODS as BASELINES
from dreambooth import cost
from run import BASE_ALONE, DREAMBOOTH, EQUAL, METHODS, OWN_ADAPTERS, WORDS, Bench, arguments, run
from trainings import markdown as trainings_table
from trainings import name_of, split

from bolid.errors import BolidError
from bolid.evaluate.command import compare
from bolid.evaluate.protocol import Protocol, read_protocol
from bolid.evaluate.results import DESCRIPTIONS, HIGHER, Comparison, Difference, Evaluation, Metric
from bolid.formats.tensors import read_record
from bolid.run import canonical_json, write_atomic

ROOT = Path(__file__).parents[2]
GUIDED_BY = "`--face-guidance 1 --body-guidance 1`"
WHAT = {
    "base": "the frozen base, no photo",
    WORDS: "the frozen base, the true build in words, no photo",
    "ip-adapter": "IP-Adapter, image embedding of 1 photo",
    "ip-adapter-attention": "IP-Adapter, self-attention over 8 photos",
    "photomaker": "PhotoMaker's mechanism, 8 photos (4 are stacked)",
    "instantid": "InstantID's mechanism, 1 face, and where the base has it",
    "pulid": "PuLID's mechanism, 1 face",
    "upper-bound": "the true body ratios through IP-Adapter's layers, no photo",
    "bolid-1": "BoLID, 1 photo",
    EQUAL: "BoLID, 8 photos, trained as long as the baselines",
    "bolid-8": "BoLID, 8 photos",
    "bolid-1-guided": f"bolid-1 with {GUIDED_BY}",
    "bolid-8-guided": f"bolid-8 with {GUIDED_BY}",
    "bolid-8-mean": "bolid-8, the plain mean of the views instead of the product of experts",
    "bolid-8-no-confidence": "bolid-8, every view of full confidence",
    "bolid-8-no-id": f"{EQUAL} without L_id",
    "bolid-8-no-clip": f"{EQUAL} without L_CLIP",
    DREAMBOOTH: "DreamBooth-LoRA with prior preservation, 8 photos",
}


RIVALS = {  # baseline -> methods that the table subtracts it from, in pairs
    "bolid-8": ("bolid-8-mean", "bolid-8-no-confidence"),
    EQUAL: ("bolid-8-no-id", "bolid-8-no-clip"),
    WORDS: ("bolid-1", "bolid-8"),
    "ip-adapter-attention": (EQUAL, "bolid-8"),
    "photomaker": (EQUAL, "bolid-8"),
    "instantid": (EQUAL, "bolid-8"),
    "pulid": (EQUAL, "bolid-8"),
}


def with_earlier(compared: Comparison, earlier: dict[str, Any]) -> Comparison:
    """The comparison, with missing methods from the `earlier` figures of an experiment.json.

    Raises BolidError unless both have equal figures of the first method: then protocol, base and evaluators are equal.
    """
    first = compared.baseline
    known = {name: _evaluation(figures) for name, figures in earlier["methods"].items()}
    if _comparable(known[first]) != _comparable(compared.methods[first]):
        raise BolidError(
            f"the earlier figures of {first} are not those of now", "make all methods anew, without --earlier"
        )
    lacking = [name for name in known if name not in compared.methods]
    methods = compared.methods | {name: known[name] for name in lacking}
    differences = compared.differences | {name: _difference(earlier["differences"][name]) for name in lacking}
    order = [name for name in METHODS if name in methods]
    return replace(compared, methods={name: methods[name] for name in order}, differences=differences)


def _evaluation(data: dict[str, Any]) -> Evaluation:
    return Evaluation(**{**data, "metrics": {name: Metric(**metric) for name, metric in data["metrics"].items()}})


def _difference(data: dict[str, Any]) -> dict[str, Difference]:
    """In the order of DESCRIPTIONS, like the other table."""
    return {name: Difference(**data[name]) for name in DESCRIPTIONS if name in data}


def _comparable(evaluation: Evaluation) -> dict[str, tuple[Any, ...]]:
    """The figures to the digits that the table shows: equal on other machines too."""
    return {
        name: (metric.n, metric.measured_by, None if metric.value is None else round(metric.value, 3) + 0)
        for name, metric in evaluation.metrics.items()
    }


def markdown(
    compared: Comparison,
    protocol: Protocol,
    trained: dict[str, str],
    against: Sequence[Comparison] = (),
    made: Sequence[str] | None = None,
    variance: Sequence[str] = (),
) -> str:
    """The tables: figures of `compared`, and of each of `against` the differences from its first method.

    `made`: the methods whose pictures were generated now; the others are from an earlier run. `variance`: the lines of
    the table of trainings.
    """
    methods = list(compared.methods)
    made = methods if made is None else made
    first = compared.methods[methods[0]]
    some = "" if list(made) == list(METHODS) else f" --methods {' '.join(made)}"
    rest = [name for name in methods if name not in made]
    lines = [
        "# The experiment: who keeps the body?",
        "",
        f"Made by `python examples/experiment/table.py{some}`; nothing in it is typed by hand.",
        *([f"From an earlier run, by `--earlier`, are {', '.join(rest)}."] if rest else []),
        f"{first.people} synthetic people that no model was trained on, {len(protocol.prompts)} prompts each, "
        f"{protocol.pictures} pictures of each, equal seeds; {first.references} held-out photos.",
        "The protocol is `bolid/evaluate/protocol.json`.",
        "",
        "| method | what it is | trained |",
        "|---|---|---|",
        *(f"| {name} | {WHAT[name]} | {trained.get(name, '')} |" for name in methods),
        "",
        "Value and 95 % interval (people are resampled). ↑ more is better, ↓ less is better. **Bold**: "
        f"differs from {compared.baseline}, in pairs; p at most 0.05 with Holm's correction for the methods that were "
        "generated together.",
        "",
        f"| figure | {' | '.join(methods)} | n |",
        f"|---|{'---|' * len(methods)}---|",
    ]
    for name in first.metrics:
        cells = [_cell(compared, method, name) for method in methods]
        counts = "/".join(dict.fromkeys(str(compared.methods[m].metrics[name].n) for m in methods))
        lines.append(f"| {_label(name)} | {' | '.join(cells)} | {counts} |")
    for other in against:
        lines += ["", *_differences(other)]
    if variance:
        lines += ["", *variance]
    lines += ["", *_notes(compared)]
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    return f"{name.replace('_', ' ')} {'↑' if DESCRIPTIONS[name][0] == HIGHER else '↓'}"


def _differs(difference: Difference | None) -> bool:
    """Whether it is significant; of an earlier run without p-values, whether the interval leaves out 0."""
    if difference is None or difference.low is None or difference.high is None:
        return False
    return difference.differs if difference.p is not None else difference.low > 0 or difference.high < 0


def _cell(compared: Comparison, method: str, name: str) -> str:
    metric: Metric = compared.methods[method].metrics[name]
    if metric.value is None:
        return "–"
    interval = "" if metric.low is None else f" ({metric.low:.3f} to {metric.high:.3f})"
    differs = _differs(compared.differences.get(method, {}).get(name))
    return (f"**{metric.value:.3f}**" if differs else f"{metric.value:.3f}") + interval


def _differences(against: Comparison) -> list[str]:
    """The other methods minus the first, over pairs, with intervals."""
    methods = list(against.differences)
    lines = [
        f"How much more than {against.baseline}, over pairs of equal person, prompt and noise. **Bold**: p at most "
        "0.05 with Holm's correction.",
        "",
        f"| figure | {' | '.join(methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    for name in against.differences[methods[0]]:
        cells = []
        for method in methods:
            one = against.differences[method].get(name)
            if one is None or one.value is None or one.low is None:
                cells.append("–")
                continue
            mark = "**" if _differs(one) else ""
            cells.append(f"{mark}{one.value:+.3f}{mark} ({one.low:+.3f} to {one.high:+.3f})")
        if set(cells) != {"–"}:
            lines.append(f"| {_label(name)} | {' | '.join(cells)} |")
    return lines


def _notes(compared: Comparison) -> list[str]:
    first = next(iter(compared.methods.values()))
    lines = ["What the figures are, and what measured them:", ""]
    for name, metric in first.metrics.items():
        note = f" ({metric.note})" if metric.note else ""
        lines.append(f"- {name.replace('_', ' ')}: {DESCRIPTIONS[name][1]}; {metric.measured_by}{note}")
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is compared with"
    )
    parser.add_argument(
        "--earlier", type=Path, help="experiment.json of an earlier run, for the methods not in --methods"
    )
    parser.add_argument("--trainings", type=Path, nargs="*", default=[], help="like --baselines, by other seeds")
    parser.add_argument("--out", type=Path, help="folder of experiment.md and .json; by default docs/results/, or WORK")
    args = parser.parse_args()
    protocol = read_protocol(args.people, args.prompts)
    whole = protocol.whole and args.methods == list(METHODS)
    bench = Bench(args.work, protocol, args.baselines, args.family, args.adapter)
    out = args.out or (ROOT / "docs" / "results" if whole else bench.work)
    folders = []
    for method in args.methods:
        print(f"pictures of {method}", file=sys.stderr, flush=True)
        folders.append(run(method, protocol, bench))
    again = [method for method in args.methods if method in (*BASELINES, *OWN_ADAPTERS)]
    others = [
        run(method, protocol, Bench(args.work, protocol, place, args.family), name_of(method, number))
        for number, place in enumerate(args.trainings, 1)
        for method in again
    ]
    print("scoring", file=sys.stderr, flush=True)
    base = bench.work / "pictures" / "base" if "base" in args.methods else None
    compared = compare(
        [*folders, *others], bench.work / "photos", base=base,
        html=bench.work / "report.html", family=bench.family.name,
    )  # fmt: skip
    compared, trained_again = split(compared, again)
    made = dict(zip(args.methods, folders, strict=True))
    against = {}
    for peer, rivals in RIVALS.items():
        if peer in made and (theirs := [made[rival] for rival in rivals if rival in made]):
            against[peer] = compare([made[peer], *theirs], bench.work / "photos", family=bench.family.name)
    trained = {}
    for name in args.methods:
        if name in BASE_ALONE:
            continue
        if name == DREAMBOOTH:
            trained[name] = cost(bench.work / DREAMBOOTH)
            continue
        file = bench.baseline_file(name) if name in BASELINES else bench.adapter_of(name) / "body.safetensors"
        config = read_record(file)["config"]
        photos = config["batch_size"] * config.get("gradient_accumulation_steps", 1) * config.get("processes", 1)
        # Adapters may have been taken from a training before its end.
        trained[name] = f"{config.get('steps_done', config['steps'])} steps of {photos}"
        source = {"sampled": " on sampled pictures", "swapped": " on photos with somebody else's body as the condition"}
        trained[name] += source.get(config.get("x_gen"), "")
        if config.get("init"):
            trained[name] += ", after earlier trainings"
    if args.earlier:
        earlier = json.loads(args.earlier.read_text(encoding="utf-8"))
        compared = with_earlier(compared, earlier)
        trained = {**earlier["trained"], **trained}
        for peer, pairs in earlier.get("against", {}).items():
            kept = {name: _difference(data) for name, data in pairs.items() if name not in args.methods}
            if peer not in against and kept:
                against[peer] = Comparison(peer, {}, kept)
    text = markdown(compared, protocol, trained, list(against.values()), args.methods, trainings_table(trained_again))
    figures = {**json.loads(canonical_json(compared)), "trained": trained}
    figures["against"] = {peer: json.loads(canonical_json(other))["differences"] for peer, other in against.items()}
    write_atomic(out / "experiment.md", text)
    write_atomic(out / "experiment.json", json.dumps(figures, indent=1) + "\n")
    print(out / "experiment.md")


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
