"""Measure the body sliders: how a body vector must change so that the legs get longer and nothing else does.

    python examples/tiny_family/measure_sliders.py photos/val --unmix 24 --out bolid/tiny/body-sliders.safetensors
    python examples/tiny_family/measure_sliders.py photos/val --check 12     # do generated bodies follow?

People come as photos with their truth beside them, and go the way of `bolid profile` through the real body encoder.
Take people that the encoder was not trained on: it knows its own too well. Run it again whenever the body encoder
changes, since the file is refused with any other. 160 people with 8 photos: 3 minutes on one core.

A ridge regression reads the ratios of SLIDERS off the vectors; its penalty is the best of PENALTIES by cross-validation
over people, and its R2 is stored; what has less than MIN_R2 becomes no slider. What makes a direction of it:
bolid/method/sliders.py. Girths are no sliders of their own: they follow the build (their correlation with it is 0.8 to
0.9), and torso follows the legs (-0.8). `--every-ratio` reads them all, for `train-adapter --id-loss sliders`.

`--check N` makes pictures of the first N of these people at -2 to 2 on every slider, same prompts and noise, and lets
the probe read them: per slider the mean reading of its own ratio at each value, whether that grows all the way, and the
largest change of another slider's ratio as a part of its own. The probe is not the pose model, and it has errors of its
own (bolid/tiny/probe/README.md).

`--unmix N` does the same before, at -2 and 2, with the last N people and other prompts, and takes a part (UNMIXED) of
what the pictures change in other ratios out of the directions (`remove_crosstalk`): longer legs of the body bring a
smaller head in the pictures. So it fits one adapter, the family's; run it again when that changes. 24 people, 3
pictures each: 6 minutes; as many checked: 12.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from measure_body_encoder import encode_people

import bolid.synth.people as world
from bolid.backends.body import BodyEncoder, fuse_views
from bolid.errors import BolidError
from bolid.formats.sliders import Sliders, load_sliders, save_sliders
from bolid.method.sliders import cross_validated_r2, fit_readout, remove_crosstalk, slider_directions, standardise
from bolid.models.families import get_family
from bolid.run import run_record, sha256_file

SLIDERS = {"legs": "leg", "arms": "arm", "head": "head", "shoulders": "shoulder_breadth", "build": "volume"}
"""Slider -> the ratio that it moves."""
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MIN_R2 = 0.2
"""The encoder knows too little of a ratio below this: its slider would move noise."""
UNMIXED = 0.7
"""A part: all of it leads far from where people are, and legs then follow by 0.47 of what is asked, not by 0.62."""
VALUES = (-2.0, -1.0, 0.0, 1.0, 2.0)


def measure(photos: Path, encoder: BodyEncoder, wanted: dict[str, str]) -> tuple[Sliders, torch.Tensor]:
    """The sliders `wanted` (name -> ratio), and the body vectors [P, D] that they were measured from."""
    people, ratios, names = encode_people(photos, encoder)
    bodies = torch.stack([fuse_views(*views)[0] for views in people])
    ratios = ratios[:, [names.index(ratio) for ratio in wanted.values()]]
    target = torch.from_numpy(ratios)
    scores = {penalty: cross_validated_r2(bodies, target, penalty) for penalty in PENALTIES}
    penalty = max(scores, key=lambda p: float(scores[p].mean()))
    r2 = dict(zip(wanted, scores[penalty].tolist(), strict=True))
    kept = [name for name in wanted if r2[name] >= MIN_R2]
    for name in wanted:
        if name not in kept:
            print(f"no slider for {name}: R2 {r2[name]:.2f} is below {MIN_R2}", file=sys.stderr)
    if not kept:
        raise BolidError("this body encoder knows no ratio well enough for a slider", "train it longer")
    ratios = ratios[:, [list(wanted).index(name) for name in kept]]
    readout = standardise(fit_readout(bodies, torch.from_numpy(ratios), penalty), bodies)
    config = {
        "ratios": [wanted[name] for name in kept],
        "mean": ratios.mean(0).tolist(),
        "std": ratios.std(0, ddof=1).tolist(),
        "people": len(people),
        "penalty": penalty,
    }
    record = run_record("body-sliders", family="tiny", config=config, inputs=encoder.inputs)
    directions = slider_directions(readout, bodies)
    sliders = Sliders(
        tuple(kept), directions.float(), readout.weight.float(), readout.center.float(),
        tuple(round(r2[name], 4) for name in kept), record,
    )  # fmt: skip
    return sliders, bodies


def read_pictures(
    sliders: Sliders, bodies: torch.Tensor, each: int, values: tuple[float, ...], first_prompt: int
) -> np.ndarray:
    """What the probe reads of every slider's ratio in `each` pictures of each of the `bodies` [P, D] with each slider
    at each of the `values`: the means over pictures, in standard deviations of the population, [slider, value, ratio].
    """
    from measure import Pictures, random_prompt

    from bolid.backends.probe import BodyProbe

    maker, probe = Pictures("body"), BodyProbe(get_family("tiny").probe)
    order = [probe.ratio_names.index(ratio) for ratio in sliders.record["config"]["ratios"]]
    mean, std = (np.array(sliders.record["config"][name]) for name in ("mean", "std"))
    prompts = [random_prompt(first_prompt + i, framing="full body")[0] for i in range(each)]

    @functools.cache
    def read(slider: int, value: float) -> np.ndarray:
        made = []
        for body in bodies:
            made += maker.make(prompts, list(range(each)), body + value * sliders.directions[slider])
        return (probe.predict(made)[:, order].mean(0) - mean) / std

    # At 0 the sliders are all alike.
    return np.stack([[read(i if value else 0, value) for value in values] for i in range(len(sliders.names))])


def unmix(sliders: Sliders, bodies: torch.Tensor, each: int) -> Sliders:
    """The `sliders` with UNMIXED of what pictures of these `bodies` [P, D] change in other ratios taken out."""
    ends = read_pictures(sliders, bodies, each, (VALUES[0], VALUES[-1]), first_prompt=160_000)
    response = torch.from_numpy(ends[:, 1] - ends[:, 0]) / (VALUES[-1] - VALUES[0])
    inputs = {**sliders.record["inputs"], "body_adapter": sha256_file(get_family("tiny").require("body_adapter"))}
    config = {"unmixed": {"part": UNMIXED, "response": [[round(float(v), 3) for v in row] for row in response]}}
    record = {**sliders.record, "inputs": inputs, "config": {**sliders.record["config"], **config}}
    return replace(
        sliders, directions=remove_crosstalk(sliders.directions.double(), response, UNMIXED).float(), record=record
    )


def check(sliders: Sliders, bodies: torch.Tensor, each: int) -> dict[str, dict]:
    """Per slider: the readings of its ratio at VALUES (standard deviations, mean over pictures), and of the others."""
    figures = {}
    for index, (name, readings) in enumerate(
        zip(sliders.names, read_pictures(sliders, bodies, each, VALUES, first_prompt=150_000), strict=True)
    ):
        change = readings[-1] - readings[0]
        others = np.abs(np.delete(change, index)).max()
        figures[name] = {
            "readings": [round(float(value), 3) for value in readings[:, index]],
            "monotone": bool((np.diff(readings[:, index]) > 0).all()),
            "moved per standard deviation asked": round(float(change[index] / (VALUES[-1] - VALUES[0])), 3),
            "largest other change, as a part of its own": round(float(others / abs(change[index])), 3),
            "changes": dict(zip(sliders.names, (round(float(value), 3) for value in change), strict=True)),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    parser.add_argument("--out", type=Path, help="write the sliders here")
    parser.add_argument("--every-ratio", action="store_true", help="one for each ratio, as --id-loss sliders wants")
    parser.add_argument("--unmix", type=int, default=0, metavar="N", help="by pictures of the last N people")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="by pictures of the first N people")
    parser.add_argument("--each", type=int, default=4, help="pictures of each of them at each value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder"))
    wanted = {name: name for name in world.RATIO_NAMES} if args.every_ratio else SLIDERS
    sliders, bodies = measure(args.photos, encoder, wanted)
    if args.unmix + args.check > len(bodies):
        parser.error(f"--unmix and --check want {args.unmix + args.check} people, there are {len(bodies)}")
    if args.unmix:
        sliders = unmix(sliders, bodies[-args.unmix :], args.each)
    # Standing at 1 on one slider and at 0 on the others is rarer than 1 on one: how far out that is.
    directions, covariance = sliders.directions.double(), torch.cov(bodies.double().T)
    out = torch.einsum("rd,de,re->r", directions, torch.linalg.pinv(covariance), directions).sqrt()
    figures = {
        name: {"R2": r2, "distance of 1 from the middle, in the population's own measure": round(float(distance), 2)}
        for name, r2, distance in zip(sliders.names, sliders.r2, out, strict=True)
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = args.out or Path(scratch) / "sliders.safetensors"
        save_sliders(file, sliders)
        sliders = load_sliders(file, encoder.space)
    if args.check:
        for name, entry in check(sliders, bodies[: args.check], args.each).items():
            figures[name] |= entry
    print(json.dumps({**figures, "people": len(bodies), "penalty": sliders.record["config"]["penalty"]}, indent=1))


if __name__ == "__main__":
    main()
