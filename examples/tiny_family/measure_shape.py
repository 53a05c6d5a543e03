"""How near the body of a profile comes to the truth, in centimetres and millimetres: docs/results/body-shape.md.

    python examples/tiny_family/measure_shape.py photos/val --work runs/body-shape --out docs/results/body-shape.md

The people are held out: neither the encoder, the population nor the fit of p(shape | c_body) knows them. Photos do not
show size, so each gets a stature (make_population.stature_of), known with a standard deviation of 0.5 cm. Tapes err by
1 cm. PVE-T-SC is the mean distance of vertices in the pose at rest after both bodies are centred and scaled to one
size. Intervals: 95 %, bootstrap over people.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from fit_body_shape import Encoded, encode
from make_population import body_of

from bolid.backends.body import BodyEncoder
from bolid.body.body_vector import FEW, BodyVectors, ShapeReadings, load_body_vectors, load_readings
from bolid.body.measurements import MEASUREMENTS, NAMES
from bolid.body.mesh import body_model, vertex_distances
from bolid.body.shape import Known, Shape, condition, measure_body, measured, population, within_bounds
from bolid.errors import BolidError
from bolid.models.families import get_family
from bolid.run import derive_seed, write_atomic

STATURE_SD, TAPE_SD = 0.005, 0.01
NOMINAL = (0.50, 0.68, 0.90, 0.95)
TAPES = ("waist", "hip", "inseam")
HEAD = 0.862
"""Canonical height above which vertices are of the head: they are more than a third of all."""


def cases(
    vectors: BodyVectors, readings: ShapeReadings | None
) -> dict[str, Callable[[Encoded, np.ndarray, np.random.Generator], Shape | None]]:
    """What is known -> the shape made of it; None where a person has no such photo. As `bolid profile` does it."""
    prior = population().shape

    def stature(truth: np.ndarray, rng: np.random.Generator) -> dict[str, Known]:
        return {"height": Known(truth[0] + rng.normal(0, STATURE_SD), STATURE_SD)}

    def tapes(truth: np.ndarray, rng: np.random.Generator) -> dict[str, Known]:
        noise = {name: truth[NAMES.index(name)] + rng.normal(0, TAPE_SD) for name in TAPES}
        return {name: Known(value, TAPE_SD) for name, value in noise.items()}

    def photos(person: Encoded, rows: Sequence[int]) -> Shape:
        rows = list(rows)
        if readings is not None and len(rows) > FEW:
            return readings.vectors.shape_of(prior, *person.fused(rows, readings.head))
        return vectors.shape_of(prior, *person.fused(rows))

    def some(count: int) -> Callable[..., Shape | None]:
        def make(person: Encoded, truth: np.ndarray, rng: np.random.Generator) -> Shape | None:
            rows = rng.permutation(len(person.mean))[:count]
            return condition(photos(person, rows), stature(truth, rng))

        return make

    def upright(person: Encoded, truth: np.ndarray, rng: np.random.Generator) -> Shape | None:
        rows = person.upright()
        return condition(photos(person, [rows[0]]), stature(truth, rng)) if rows else None

    return {
        "nothing but the stature": lambda person, truth, rng: condition(prior, stature(truth, rng)),
        "one upright photo, stature": upright,
        "four photos, stature": some(4),
        "eight photos, stature": some(8),
        "three tapes (waist, hip, inseam), stature": lambda person, truth, rng: condition(
            prior, {**stature(truth, rng), **tapes(truth, rng)}
        ),
        "eight photos, three tapes, stature": lambda person, truth, rng: condition(
            photos(person, range(len(person.mean))), {**stature(truth, rng), **tapes(truth, rng)}
        ),
    }


def measure(
    people: Sequence[Encoded], vectors: BodyVectors, readings: ShapeReadings | None
) -> dict[str, dict[str, np.ndarray]]:
    """Per case: errors [n, K] in metres, whether within one sd [n, K], and PVE-T-SC of all vertices and of the body."""
    model = body_model()
    below = model.canonical[:, 2] < HEAD
    results: dict[str, dict[str, list]] = {}
    for person in people:
        truth = body_of(person.seed)
        sizes, rest = measure_body(truth[None])[0], model.rest(truth[None])[0]
        for name, make in cases(vectors, readings).items():
            try:
                shape = make(person, sizes, np.random.default_rng(derive_seed(person.seed, "measure-shape", name)))
            except BolidError:  # refused as a contradiction: the table's number of people shows it
                continue
            if shape is None:
                continue
            found = measured(shape)
            off, sd = found.values - sizes, found.sd
            distance = vertex_distances(model.rest(within_bounds(shape.mean)[None])[0], rest)
            entry = results.setdefault(name, {"off": [], "sd": [], "pve": [], "below": []})
            entry["off"].append(off)
            entry["sd"].append(sd)
            entry["pve"].append(1000 * distance.mean())
            entry["below"].append(1000 * distance[below].mean())
    return {name: {key: np.array(values) for key, values in entry.items()} for name, entry in results.items()}


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of values over people [n, ...], and its 95 % interval."""
    per_person = values.reshape(len(values), -1).mean(1)
    rng = np.random.default_rng(seed)
    means = per_person[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return float(per_person.mean()), *np.quantile(means, (0.025, 0.975)).tolist()


def report(results: dict[str, dict], people: int, facts: str) -> str:
    """The Markdown page."""
    lines = [
        "# The body of a profile, measured",
        "",
        "Made by `examples/tiny_family/measure_shape.py`, which says how.",
        "",
        f"{people} held-out synthetic people. {facts}",
        "Mean absolute error in cm (weight: kg), with 95 % intervals over people.",
        "",
        "| measurement | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for k, row in enumerate(MEASUREMENTS):
        cells = []
        for entry in results.values():
            mean, low, high = interval(np.abs(entry["off"][:, k]) * row.scale)
            cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    for title, key in (("PVE-T-SC, mm, all vertices", "pve"), ("PVE-T-SC, mm, below the chin", "below")):
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*interval(entry[key])) for entry in results.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("| people | " + " | ".join(str(len(entry["pve"])) for entry in results.values()) + " |")
    lines += ["", "## Of what is given as ±1 standard deviation, how much is within (68 % is right)", ""]
    head = ["| " + " | ".join(["{}", *results]) + " |", "|---|" + "---|" * len(results)]
    lines += [head[0].format("measurement"), head[1]]
    z = {name: np.abs(entry["off"]) / entry["sd"] for name, entry in results.items()}
    for k, row in enumerate(MEASUREMENTS):
        lines.append(
            f"| {row.title} | " + " | ".join(f"{100 * (part[:, k] <= 1).mean():.0f} %" for part in z.values()) + " |"
        )
    lines += ["", "## Reliability: within the central interval of so much probability, over all measurements", ""]
    lines += [head[0].format("nominal"), head[1]]
    for nominal in NOMINAL:
        widths = NormalDist().inv_cdf(0.5 + nominal / 2)
        cells = [
            "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * v for v in interval(part <= widths))) for part in z.values()
        ]
        lines.append(f"| {100 * nominal:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--people", type=int)
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    parser.add_argument("--body-shape", type=Path, help="by default the tiny family's")
    parser.add_argument("--c-body", action="store_true", help="read the shape off c_body, without the head")
    parser.add_argument("--work", type=Path, default=Path("runs/body-shape"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/body-shape.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = get_family("tiny")
    encoder = BodyEncoder(args.body_encoder or family.require("body_encoder"))
    file = args.body_shape or family.require("body_shape")
    vectors = load_body_vectors(file, encoder.space)
    people = encode(args.photos, encoder, args.work)[: args.people]
    readings = None if args.c_body else load_readings(file, encoder.space)
    results = measure(people, vectors, readings)
    # How well c_body follows from the shape: R2 of the vectors of all photos.
    none = np.zeros_like(population().covariance)
    known = np.stack([person.fused(range(len(person.mean)))[0] for person in people])
    made = np.stack([vectors.vector_of(Shape(body_of(person.seed), none))[0] for person in people])
    r2 = 1 - ((known - made) ** 2).sum() / ((known - known.mean(0)) ** 2).sum()
    facts = (
        f"What photos say of the shape was fitted on {vectors.record['config']['people']} others. c_body of the true "
        f"shape explains {100 * r2:.0f} % of the variance of the vectors of eight photos."
    )
    write_atomic(args.out, report(results, len(people), facts))
    print(json.dumps({name: interval(entry["pve"]) for name, entry in results.items()}, indent=1))


if __name__ == "__main__":
    main()
