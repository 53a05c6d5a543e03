"""Write bolid/body/population.safetensors: how the synthetic adults' parameters and measurements spread together.

    python examples/tiny_family/make_population.py

The people are those of `bolid synth` with training seeds (SEEDS), measured through the mesh. Their size is not Anny's
own, which runs from 1.3 to 2.4 m: statures are drawn by sex from STATURE, which is chosen, not measured, after adults
in Europe and North America. 1,000 people: half a minute on one core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS, parameters_of
from bolid.body.shape import KIND, POPULATION_FILE, POWERS, measure_body
from bolid.formats.tensors import save_tensors
from bolid.run import derive_seed, run_record
from bolid.synth.people import sample_person

SEEDS = (20000, 21000)
STATURE = {"woman": (1.63, 0.068), "man": (1.76, 0.073)}
"""Mean and standard deviation in metres."""
QUANTILES = 101


def stature_of(seed: int, gender: float) -> float:
    """The stature in metres that stands for a synthetic person's."""
    rng = np.random.default_rng(derive_seed(seed, "stature"))
    mean, sd = STATURE["woman" if gender > 0.5 else "man"]
    return float(rng.normal(mean, sd))


def body_of(seed: int) -> np.ndarray:
    """The parameters [P] of a synthetic person."""
    person = sample_person(seed)
    return parameters_of(person.phenotypes, person.local_changes, stature_of(seed, person.phenotypes["gender"]))


def main() -> None:
    torch.set_num_threads(1)
    bodies = np.stack([body_of(seed) for seed in range(*SEEDS)])
    measurements = np.concatenate([measure_body(part) for part in np.array_split(bodies, len(bodies) // 40)])
    women = bodies[:, PARAMETERS.index("gender")] > 0.5
    steps = np.linspace(0, 1, QUANTILES)
    quantiles = np.stack([np.quantile(measurements[sex], steps, axis=0) for sex in (women, ~women)])
    ratios = measurements / bodies[:, :1] ** POWERS
    line = np.linalg.lstsq(np.concatenate([np.ones((len(bodies), 1)), bodies[:, 1:]], 1), ratios, rcond=None)[0].T
    intercept, slope = line[:, 0], np.concatenate([np.zeros((len(line), 1)), line[:, 1:]], 1)  # none on the stature
    rest = ratios - bodies @ slope.T - intercept
    unexplained = rest.std(0) / ratios.std(0).clip(1e-9)
    print("not linear, standard deviations:", dict(zip(NAMES, unexplained.round(3).tolist(), strict=True)))
    covariance = np.zeros((len(PARAMETERS) + len(NAMES),) * 2)
    covariance[: len(PARAMETERS), : len(PARAMETERS)] = np.cov(bodies.T)
    covariance[len(PARAMETERS) :, len(PARAMETERS) :] = np.cov(rest.T)  # no correlation: least squares
    tensors = {"mean": bodies.mean(0), "covariance": covariance, "slope": slope, "intercept": intercept}
    tensors["quantiles"] = quantiles
    config = {"seeds": SEEDS, "stature": STATURE, "parameters": PARAMETERS}
    record = run_record(KIND, family=None, config=config)
    save_tensors(POPULATION_FILE, {name: torch.from_numpy(value).float() for name, value in tensors.items()}, record)
    print(f"{POPULATION_FILE}: {POPULATION_FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
