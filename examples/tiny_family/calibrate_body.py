"""Correct a trained body branch by what its pictures show of people that no model was trained on.

    python examples/tiny_family/calibrate_body.py adapter photos/fresh calibrated/body.safetensors --part 0.4

ADAPTER: a folder with face.safetensors and body.safetensors; PHOTOS: `bolid synth` photos of such people, 8 of each.
Two pictures of each, made as `bolid generate --profile` makes them, are read by the probe. 300 people: 10 minutes on
one core; `--readings FILE.npy` keeps what was read, or takes it from there.

A ridge regression on the body vectors says what can be known of a person: the body ratios r [R] in standard deviations.
Their AXES principal axes p [K] are what people differ in most (build, then lengths). The pictures show A p + b of them.
The branch then sees everybody where their pictures would show p, A^-1 (p - b), reached by the most probable change of
the vector (bolid/method/sliders.py); of what A^-1 stretches, only the part `--part`. All of that is affine, so it goes
into the branch's projection.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from measure import Pictures, person_prompts, profiles

import bolid.synth.people as world
from bolid.backends.probe import BodyProbe
from bolid.formats.adapter import flat_tensors, load_adapter, nested_state_dict, save_adapter
from bolid.method.body_condition import compose_projection
from bolid.method.sliders import Readout, expect, fit_readout, slider_directions
from bolid.models.families import get_family
from bolid.run import derive_seed

AXES = 6
"""Along the others people vary too little (less than 0.1 of a ratio's variance) for anything to be learnt of them."""
PENALTY = 3.0
"""Of the read-out; cross-validated over 300 people, R2 is the same (0.86) from 1 to 10."""


def read_pictures(adapter: Path, people: list[tuple[torch.Tensor, torch.Tensor]], seeds: list[int]) -> np.ndarray:
    """The probe's reading of each person's pictures, their mean, [P, R]."""
    maker, probe = Pictures("face", "body", adapter=adapter), BodyProbe(get_family("tiny").probe)
    order = [probe.ratio_names.index(name) for name in world.RATIO_NAMES]
    readings = []
    for person, seed in zip(people, seeds, strict=True):
        prompts, _ = person_prompts(seed, "prompt", 2, "full body")
        made = maker.make(prompts, [derive_seed(seed, "measure", i) for i in range(2)], *person)
        readings.append(probe.predict(made)[:, order].mean(0))
    return np.stack(readings)


def correction(
    bodies: torch.Tensor, ratios: torch.Tensor, readings: torch.Tensor, part: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix [D, D] and offset [D] that take a body vector to the one whose pictures show what is known of it.

    `bodies` [P, D]; `ratios` and `readings` [P, R]: the truth, and what pictures made of `bodies` show. Float64.
    """
    whole = fit_readout(bodies, ratios, PENALTY)
    axes = torch.linalg.eigh(torch.cov(whole(bodies).T)).eigenvectors.flip(1)[:, :AXES]
    known = Readout(axes.T @ whole.weight, whole.center)
    shown = ((readings - ratios.mean(0)) / ratios.std(0)) @ axes
    shows = expect(known(bodies), shown, torch.ones(len(bodies)).to(bodies))
    inverse = torch.linalg.inv(torch.eye(AXES).to(bodies) + shows.change)
    turn = part * (inverse - torch.eye(AXES).to(bodies)) @ known.weight  # [K, D]
    directions = slider_directions(known, bodies).T  # [D, K]
    offset = directions @ (-inverse @ shows.shift - turn @ known.center)
    return torch.eye(bodies.shape[1]).to(bodies) + directions @ turn, offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=float, default=0.4, help="how much of the difference is stretched away, 0 to 1")
    parser.add_argument("--readings", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    people, ratios, seeds = profiles(args.photos, len(list(args.photos.iterdir())), 8)
    if args.readings and args.readings.exists():
        readings = np.load(args.readings)
    else:
        readings = read_pictures(args.adapter, people, seeds)
        if args.readings:
            np.save(args.readings, readings)
    bodies = torch.stack([body for _, body in people]).double()
    matrix, offset = correction(bodies, torch.from_numpy(ratios), torch.from_numpy(readings).double(), args.part)
    tensors, record = load_adapter(args.adapter / "body.safetensors", "body")
    corrected = compose_projection(nested_state_dict(tensors), matrix, offset)
    record = {**record, "config": {**record["config"], "calibrated": args.part}}
    save_adapter(args.out, flat_tensors(corrected), record)


if __name__ == "__main__":
    main()
