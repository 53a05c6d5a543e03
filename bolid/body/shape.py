"""A person's shape as a Gaussian over the body's parameters, and what measurements tell of it.

The prior is the synthetic population (`population()`). A measurement y = m(x) + noise is conditioned on by
Gauss-Newton: m is measured on the mesh, its slope is the population's, and the most probable x within the
parameters' bounds is sought. The posterior covariance is that of the last step (Laplace).

Shapes: P parameters (`mesh.PARAMETERS`), K measurements (`measurements.MEASUREMENTS`). Metres and kilograms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bolid.body.measurements import NAMES, measuring_tape
from bolid.body.mesh import PARAMETERS, body_model, bounds
from bolid.errors import BolidError

POPULATION_FILE = Path(__file__).parent / "population.safetensors"
"""Written by examples/tiny_family/make_population.py."""
KIND = "body-population"

_POWERS = np.array([3.0 if name == "weight" else 1.0 for name in NAMES])  # of the stature, that measurements grow by

SEXES = {"woman": 0.925, "man": 0.075}
"""Anny's `gender` parameter of women and men in the population (mean; they spread by SEX_SD)."""
SEX_SD = 0.0433

IMPLAUSIBLE = 1e-6
"""Measurements that so small a fraction of the population would exceed in distance contradict each other."""

_STEPS = 8
_CLOSE = 5e-4  # metres (kilograms): Gauss-Newton stops when no measurement moves by more


class Known(NamedTuple):
    """A measurement that somebody took: metres (kilograms), and its standard deviation."""

    value: float
    sd: float


@dataclass(frozen=True)
class Shape:
    """N(mean [P], covariance [P, P]) over the parameters, and the measurements that went into it."""

    mean: np.ndarray
    covariance: np.ndarray
    known: Mapping[str, Known] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a shape measures: values [K] in metres (kilograms), and their covariance [K, K]."""

    values: np.ndarray
    covariance: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation of each measurement, [K]."""
        return np.sqrt(np.diag(self.covariance).clip(0))


@dataclass(frozen=True)
class Population:
    """The synthetic adults. `mean`, `covariance`: of the P parameters and the K measurements together, [P + K].

    `slope` [K, P]: of the measurements over stature (the weight over its cube) on the parameters. `quantiles`
    [2, Q, K]: of each measurement at equal steps from 0 to 1, of women and of men.
    """

    mean: np.ndarray
    covariance: np.ndarray
    slope: np.ndarray
    quantiles: np.ndarray
    record: dict[str, Any]

    @property
    def shape(self) -> Shape:
        """How the parameters spread."""
        return Shape(self.mean[: len(PARAMETERS)], self.covariance[: len(PARAMETERS), : len(PARAMETERS)])

    def spread(self) -> np.ndarray:
        """Standard deviation [K] of each measurement within one sex, the mean of both."""
        low, high = (self.quantiles[:, self._at(q)] for q in (0.1587, 0.8413))
        return ((high - low) / 2).mean(0)

    def percentile(self, values: np.ndarray, gender: float | None = None) -> np.ndarray:
        """Where measurements [K] lie among people of the same sex, 0..100 each, [K].

        `gender`: Anny's parameter (1: woman). Between 0.3 and 0.7, or None: among both sexes.
        """
        steps = np.linspace(0, 100, self.quantiles.shape[1])
        chosen = [0, 1] if gender is None or 0.3 < gender < 0.7 else [0] if gender > 0.5 else [1]
        columns = range(self.quantiles.shape[2])
        ranks = [[np.interp(values[k], self.quantiles[sex, :, k], steps) for k in columns] for sex in chosen]
        return np.mean(ranks, axis=0)

    def _at(self, quantile: float) -> int:
        return round(quantile * (self.quantiles.shape[1] - 1))


@functools.cache
def population() -> Population:
    """The synthetic population that ships with BoLID."""
    from bolid.formats.tensors import load_tensors

    tensors, record = load_tensors(POPULATION_FILE, KIND)
    names = ("mean", "covariance", "slope", "quantiles")
    return Population(*(tensors[name].double().numpy() for name in names), record)


def of_sex(shape: Shape, sex: str) -> Shape:
    """The shape of a woman or a man: conditioned on Anny's `gender`. Raises BolidError for another word."""
    if sex not in SEXES:
        raise BolidError(f"--sex is {sex!r}", f"choose {' or '.join(SEXES)}, or leave it out")
    row = np.zeros((1, len(PARAMETERS)))
    row[0, PARAMETERS.index("gender")] = 1.0
    mean, covariance = _linear_update(shape, row, np.array([SEXES[sex]]), np.array([SEX_SD]))
    return replace(shape, mean=mean, covariance=covariance)


def _linear_update(shape: Shape, rows: np.ndarray, values: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance after observing rows @ x = values, each with its sd."""
    cross = shape.covariance @ rows.T
    gain = np.linalg.solve(rows @ cross + np.diag(sd**2), cross.T).T
    mean = shape.mean + gain @ (values - rows @ shape.mean)
    covariance = shape.covariance - gain @ cross.T
    return mean, (covariance + covariance.T) / 2


def within_bounds(parameters: np.ndarray) -> np.ndarray:
    """The nearest parameters [..., P] that are an adult's body."""
    return np.clip(parameters, *bounds())


def measure_body(parameters: np.ndarray) -> np.ndarray:
    """The measurements [B, K] of bodies with parameters [B, P], through the mesh."""
    return measuring_tape().measure(body_model().rest(within_bounds(parameters)))


def jacobian(parameters: np.ndarray) -> np.ndarray:
    """d measurements / d parameters [K, P] at [P].

    The slope is the population's, by regression of measurement over stature: it looks across the kinks that Anny's
    parameters have, and costs nothing. The stature scales the mesh, so its own column follows from the measurements.
    """
    at = within_bounds(parameters)
    columns = population().slope * at[0] ** _POWERS[:, None]
    columns[:, 0] = _POWERS * measure_body(at[None])[0] / at[0]
    return columns


def measured(shape: Shape) -> Measured:
    """What a shape measures, and how surely: linearised at its mean."""
    slope = jacobian(shape.mean)
    return Measured(measure_body(shape.mean[None])[0], slope @ shape.covariance @ slope.T)


# ---- conditioning -------------------------------------------------------------------------------------------------


def condition(shape: Shape, known: Mapping[str, Known]) -> Shape:
    """The shape of somebody of whom these measurements are known too. Keys are names of MEASUREMENTS.

    Raises BolidError where no adult body of the population comes near to all of them.
    """
    if not known:
        return shape
    mean, slope, distance = _most_probable(shape, known)
    from scipy.stats import chi2

    if chi2.sf(distance, len(known)) < IMPLAUSIBLE:
        raise _contradiction(shape, known, slope, math.sqrt(distance))
    rows = [NAMES.index(name) for name in known]
    sd = np.array([entry.sd for entry in known.values()])
    _, covariance = _linear_update(shape, slope[rows], np.zeros(len(rows)), sd)
    return Shape(mean, covariance, {**shape.known, **known})


def _most_probable(shape: Shape, known: Mapping[str, Known]) -> tuple[np.ndarray, np.ndarray, float]:
    """The most probable parameters [P] within their bounds, the slope [K, P] there, and the squared distance: of the
    parameters from the shape and of the measurements from what is known, each in its standard deviations.
    """
    from scipy.optimize import lsq_linear

    rows = [NAMES.index(name) for name in known]
    target, sd = (np.array([entry[i] for entry in known.values()]) for i in (0, 1))
    scale = np.sqrt(np.diag(shape.covariance)) + 1e-6
    whiten = np.linalg.inv(np.linalg.cholesky(shape.covariance + np.diag((1e-4 * scale) ** 2)))
    low, high = bounds()
    at = within_bounds(shape.mean)
    slope = jacobian(at)
    for _ in range(_STEPS):
        reading = measure_body(at[None])[0][rows]
        matrix = np.concatenate([whiten, slope[rows] / sd[:, None]])
        wanted = np.concatenate([whiten @ shape.mean, (target - reading + slope[rows] @ at) / sd])
        found = np.clip(lsq_linear(matrix, wanted, (low - 1e-9, high + 1e-9)).x, low, high)
        moved = np.abs(slope[rows] @ (found - at)).max()
        at = found
        if moved < _CLOSE:
            break
    residual = (measure_body(at[None])[0][rows] - target) / sd
    return at, jacobian(at), float(np.sum((whiten @ (at - shape.mean)) ** 2) + np.sum(residual**2))


def _contradiction(shape: Shape, known: Mapping[str, Known], slope: np.ndarray, distance: float) -> BolidError:
    """What is refused, and the most that is plausible of the measurement that fits the others least."""
    expected, spread, off = {}, {}, {}
    for name in known:
        others = {other: entry for other, entry in known.items() if other != name}
        mean, covariance = shape.mean, shape.covariance
        if others:
            rows = slope[[NAMES.index(other) for other in others]]
            target = np.array([entry.value for entry in others.values()])
            reading = measure_body(shape.mean[None])[0][[NAMES.index(other) for other in others]]
            sd = np.array([entry.sd for entry in others.values()])
            mean, covariance = _linear_update(shape, rows, target - reading + rows @ shape.mean, sd)
        row, k = slope[NAMES.index(name)], NAMES.index(name)
        expected[name] = measure_body(mean[None])[0][k]
        spread[name] = math.sqrt(row @ covariance @ row)
        off[name] = abs(known[name].value - expected[name]) / math.hypot(spread[name], known[name].sd)
    worst = max(off, key=lambda name: off[name])
    given = ", ".join(said(name, entry.value) for name, entry in known.items())
    low, high = (expected[worst] + sign * 2.5 * spread[worst] for sign in (-1, 1))
    beside = ", ".join(said(name, entry.value) for name, entry in known.items() if name != worst)
    return BolidError(
        f"no adult body of the population has {given}: {distance:.1f} standard deviations off",
        f"{'with ' + beside + ', ' if beside else ''}{worst} is plausible from {said(worst, low, False)} "
        f"to {said(worst, high, False)}; check the numbers and --units",
    )


def said(name: str, value: float, named: bool = True) -> str:
    """A measurement as people say it, like "waist 80 cm"; `value` in metres (kilograms)."""
    from bolid.body.measurements import MEASUREMENTS

    row = MEASUREMENTS[NAMES.index(name)]
    text = f"{value * row.scale:.0f} {row.unit}"
    return f"{name} {text}" if named else text


# ---- editing ------------------------------------------------------------------------------------------------------

HELD = ("height", "inseam", "arm", "shoulders", "head")
GIRTHS = ("chest", "waist", "hip", "thigh", "upper-arm", "neck")


def edit(shape: Shape, targets: Mapping[str, float], *, hold: bool = True) -> Shape:
    """The shape moved to these measurements (metres, kilograms): the most probable change in the population.

    With `hold` the other lengths and girths stay (the weight follows; where the weight is set, the girths follow).
    Raises BolidError where no body comes near to it.
    """
    now = measure_body(shape.mean[None])[0]
    kept = set(HELD) | (set() if "weight" in targets else set(GIRTHS)) if hold else set[str]()
    known = {name: Known(value, 0.002) for name, value in targets.items()}
    known |= {name: Known(float(now[NAMES.index(name)]), 0.004) for name in NAMES if name in kept - set(targets)}
    spread = population().shape.covariance.copy()
    gender = PARAMETERS.index("gender")  # nobody's sex changes
    spread[gender], spread[:, gender] = 0, 0
    mean, _, _ = _most_probable(Shape(shape.mean, spread), known)
    found = measure_body(mean[None])[0]
    for name, value in targets.items():
        reached = found[NAMES.index(name)]
        if abs(reached - value) > 0.01:
            raise BolidError(
                f"no body like this one has {said(name, value)}: the nearest is {said(name, reached)}",
                "ask for less, or let the other measurements follow: --hold none",
            )
    return Shape(mean, shape.covariance, shape.known)


# ---- what people type ---------------------------------------------------------------------------------------------


def draw(shape: Shape, count: int, seed: int) -> np.ndarray:
    """`count` bodies [count, P] from the Gaussian, within the bounds."""
    rng = np.random.default_rng(seed)
    return within_bounds(rng.multivariate_normal(shape.mean, shape.covariance, count, method="eigh"))


def names_of(names: Iterable[str]) -> Sequence[int]:
    """Rows of measurements by name. Raises BolidError for an unknown one."""
    for name in names:
        if name not in NAMES:
            raise BolidError(f"there is no measurement {name!r}", f"the measurements are {', '.join(NAMES)}")
    return [NAMES.index(name) for name in names]
