"""The shape head beside c_body: accuracy and calibration, into docs/results/.

    python examples/tiny_family/measure_readings.py photos/val --work runs/body-shape --out docs/results/shape-head.md

The people are held out: neither encoder, head, population nor fit knows them. The stature is given exactly, so nothing
is left of the scale. The shape is the posterior mean, before the mesh ties residuals to parameters (measure_shape.py
does all of it and takes twenty times as long). Intervals: 95 %, bootstrap over people.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from fit_body_shape import Encoded, encode, truth_of
from measure_shape import HEAD, NOMINAL, interval

from bolid.backends.body import BodyEncoder
from bolid.body.body_vector import BodyVectors, ShapeReadings, load_body_vectors, load_readings
from bolid.body.measurements import MEASUREMENTS, NAMES
from bolid.body.mesh import body_model, vertex_distances
from bolid.body.shape import POWERS, population, within_bounds
from bolid.errors import BolidError
from bolid.models.families import get_family
from bolid.run import derive_seed, write_atomic

SETS = ("one upright photo", "four photos", "eight photos")
SOURCES = ("c_body", "head")
Results = dict[tuple[str, str], np.ndarray]  # of photos and source: [people, 2 + 2 K]


def photos_of(person: Encoded) -> dict[str, list[int]]:
    """The rows of a person's photos in each of SETS; the first is empty where no photo is upright."""
    order = np.random.default_rng(derive_seed(person.seed, "measure-readings")).permutation(len(person.mean)).tolist()
    return dict(zip(SETS, (person.upright()[:1], order[:4], order), strict=True))


def read(person: Encoded, rows: list[int], model: BodyVectors | ShapeReadings) -> tuple[np.ndarray, np.ndarray]:
    """Mean [S] and covariance [S, S] of the state."""
    prior = population().shape
    if isinstance(model, BodyVectors):
        return model.posterior(prior, *person.fused(rows))
    return model.vectors.posterior(prior, *person.fused(rows, model.head))


def measure(people: Sequence[Encoded], models: Mapping[str, BodyVectors | ShapeReadings]) -> Results:
    """PVE-T-SC in mm of all vertices and of those below the chin, errors [K] and standard deviations [K] in metres."""
    start, body = population(), body_model()
    below = body.canonical[:, 2] < HEAD
    rows_of = np.concatenate([start.slope, np.eye(len(NAMES))], 1)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for person in people:
        truth, sizes = truth_of(person.seed)
        rest, size = body.rest(truth[None])[0], truth[0] ** POWERS
        for photos, rows in photos_of(person).items():
            for source, model in models.items() if rows else ():
                state, covariance = read(person, rows, model)
                parameters = state[: len(truth)].copy()
                parameters[0], state[0] = truth[0], 0
                slope = rows_of * size[:, None]
                slope[:, 0] = 0
                off = slope @ state + start.intercept * size - sizes
                sd = np.sqrt(np.einsum("ks,st,kt->k", slope, covariance, slope).clip(1e-12))
                distance = 1000 * vertex_distances(body.rest(within_bounds(parameters)[None])[0], rest)
                row = np.concatenate([[distance.mean(), distance[below].mean()], off, sd])
                found.setdefault((photos, source), []).append(row)
    return {key: np.stack(rows) for key, rows in found.items()}


def report(results: Results, facts: str) -> str:
    """The Markdown page."""
    count = len(NAMES)
    heads = [f"{photos}, {source}" for photos, source in results]
    rule = "|---|" + "---|" * len(heads)
    lines = [
        "# The head that reads shapes, beside c_body", "",
        "Made by `examples/tiny_family/measure_readings.py`, which says how.", "",
        facts,
        "Mean absolute error in cm (weight: kg), with 95 % intervals over people.",
        "`profile` uses the head for three photos or more.", "",
        "| measurement | " + " | ".join(heads) + " |", rule,
    ]  # fmt: skip
    for k, row in enumerate(MEASUREMENTS):
        if row.name != "height":
            cells = [
                "{:.2f} [{:.2f}, {:.2f}]".format(*interval(row.scale * abs(r[:, 2 + k]))) for r in results.values()
            ]
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    for column, title in enumerate(("PVE-T-SC, mm, all vertices", "PVE-T-SC, mm, below the chin")):
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*interval(r[:, column])) for r in results.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("| people | " + " | ".join(str(len(r)) for r in results.values()) + " |")
    lines += ["", "Head minus c_body, paired over people, PVE-T-SC of all vertices in mm:", ""]
    for photos in SETS:
        pair = [results[photos, source] for source in SOURCES]
        lines.append("- {}: {:.2f} [{:.2f}, {:.2f}]".format(photos, *interval(pair[1][:, 0] - pair[0][:, 0])))
    z = [abs(r[:, 3 : 2 + count]) / r[:, 3 + count :] for r in results.values()]
    lines += ["", "## Reliability: within the central interval of so much probability, all measurements", ""]
    lines += ["| nominal | " + " | ".join(heads) + " |", rule]
    for nominal in NOMINAL:
        width = NormalDist().inv_cdf(0.5 + nominal / 2)
        cells = ["{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * v for v in interval(part <= width))) for part in z]
        lines.append(f"| {100 * nominal:.0f} % | " + " | ".join(cells) + " |")
    lines += ["", "Within ±1 standard deviation (68 % is right), each measurement:", ""]
    lines += ["| measurement | " + " | ".join(heads) + " |", rule]
    for k, row in enumerate(MEASUREMENTS[1:]):
        lines.append(f"| {row.title} | " + " | ".join(f"{100 * (part[:, k] <= 1).mean():.0f} %" for part in z) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--body-shape", type=Path, help="by default the tiny family's")
    parser.add_argument("--work", type=Path, default=Path("runs/body-shape"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/shape-head.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = get_family("tiny")
    encoder = BodyEncoder(family.require("body_encoder"))
    file = args.body_shape or family.require("body_shape")
    vectors, readings = load_body_vectors(file, encoder.space), load_readings(file, encoder.space)
    if readings is None:
        raise BolidError(f"{file} holds no head", "fit it with --head-photos: fit_body_shape.py")
    people = encode(args.photos, encoder, args.work)
    config = vectors.record["config"]
    facts = (
        f"{len(people)} held-out synthetic people. Both were fitted on {config['people']} others; the head was trained "
        f"on these and {config['head']['people']} more."
    )
    page = report(measure(people, dict(zip(SOURCES, (vectors, readings), strict=True))), facts)
    write_atomic(args.out, page)
    print(page)


if __name__ == "__main__":
    main()
