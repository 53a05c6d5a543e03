"""A person's shape as a Gaussian over the body's parameters, and what measurements tell of it.

The state s = (x, u) holds the P parameters x and, for each of the K measurements over stature, the residual u that a
line through the population does not explain: m(x) / stature = a + B x + u. Lines then carry uncertainty between
parameters and measurements, the bent rest included. The prior is the synthetic population (`population()`).

A tape's reading y = m(x) + noise is conditioned on by Gauss-Newton through the mesh: the most probable x within the
parameters' bounds is sought. The posterior covariance is that of the last step (Laplace).

Shapes: P parameters (`mesh.PARAMETERS`), K measurements (`measurements.MEASUREMENTS`), S = P + K. Metres, kilograms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bolid.body.measurements import MEASUREMENTS, NAMES, measuring_tape
from bolid.body.mesh import PARAMETERS, body_model, bounds
from bolid.errors import BolidError

POPULATION_FILE = Path(__file__).parent / "population.safetensors"
"""Written by examples/tiny_family/make_population.py."""
KIND = "body-population"

POWERS = np.array([3.0 if name == "weight" else 1.0 for name in NAMES])  # of the stature, that measurements grow by

SEXES = {"woman": 0.925, "man": 0.075}
"""Anny's `gender` parameter of women and men in the population (mean; they spread by SEX_SD)."""
SEX_SD = 0.0433

IMPLAUSIBLE = 1e-6
"""Measurements that so small a fraction of the population would exceed in distance contradict each other."""

_STEPS = 12
_CLOSE = 5e-4  # metres (kilograms): Gauss-Newton stops when no measurement moves by more


class Known(NamedTuple):
    """A measurement that somebody took: metres (kilograms), and its standard deviation."""

    value: float
    sd: float


@dataclass(frozen=True)
class Shape:
    """The most probable parameters `mean` [P], the state's `covariance` [S, S], and the measurements that went in."""

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
    """The synthetic adults. `mean` [P]: of the parameters. `covariance` [S, S]: of the state.

    `slope` [K, P], `intercept` [K]: of the measurements over stature (the weight over its cube) on the parameters.
    `quantiles` [2, Q, K]: of each measurement at equal steps from 0 to 1, of women and of men.
    """

    mean: np.ndarray
    covariance: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    quantiles: np.ndarray
    record: dict[str, Any]

    @property
    def shape(self) -> Shape:
        """How the bodies spread."""
        return Shape(self.mean, self.covariance)

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
    from bolid.formats.tensors import load_arrays

    tensors, record = load_arrays(POPULATION_FILE, KIND)
    names = ("mean", "covariance", "slope", "intercept", "quantiles")
    return Population(**{name: tensors[name].astype(np.float64) for name in names}, record=record)


def of_sex(shape: Shape, sex: str) -> Shape:
    """The shape of a woman or a man: conditioned on Anny's `gender`. Raises BolidError for another word."""
    if sex not in SEXES:
        raise BolidError(f"--sex is {sex!r}", f"choose {' or '.join(SEXES)}, or leave it out")
    row = np.zeros((1, len(shape.covariance)))
    row[0, PARAMETERS.index("gender")] = 1.0
    off = np.array([SEXES[sex] - shape.mean[PARAMETERS.index("gender")]])
    change, covariance = _linear_update(shape.covariance, row, off, np.array([SEX_SD]))
    return replace(shape, mean=shape.mean + change[: len(PARAMETERS)], covariance=covariance)


def _linear_update(
    covariance: np.ndarray, rows: np.ndarray, off: np.ndarray, sd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Change of the mean, and covariance, after observing rows @ state, `off` from what was expected, with its sd."""
    cross = covariance @ rows.T
    gain = np.linalg.solve(rows @ cross + np.diag(sd**2), cross.T).T
    after = covariance - gain @ cross.T
    return gain @ off, (after + after.T) / 2


def within_bounds(parameters: np.ndarray) -> np.ndarray:
    """The nearest parameters [..., P] that are an adult's body."""
    return np.clip(parameters, *bounds())


def measure_body(parameters: np.ndarray) -> np.ndarray:
    """The measurements [B, K] of bodies with parameters [B, P], through the mesh."""
    return measuring_tape().measure(body_model().rest(within_bounds(parameters)))


def residuals(parameters: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """u [..., K] of bodies with parameters [..., P] and measurements [..., K]."""
    people = population()
    return sizes / parameters[..., :1] ** POWERS - parameters @ people.slope.T - people.intercept


def jacobian(parameters: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """d measurements / d state [K, S] at the parameters [P], whose measurements are `sizes` [K] (by default measured).

    The slope is the population's; what it leaves out is in the residuals. The stature scales the mesh, so its column
    follows from the measurements.
    """
    at = within_bounds(parameters)
    size = at[0] ** POWERS
    columns = population().slope * size[:, None]
    columns[:, 0] = POWERS * (measure_body(at[None])[0] if sizes is None else sizes) / at[0]
    return np.concatenate([columns, np.diag(size)], 1)


def measured(shape: Shape) -> Measured:
    """The measurements of a shape with their uncertainty: linearised at its mean."""
    values = measure_body(shape.mean[None])[0]
    slope = jacobian(shape.mean, values)
    return Measured(values, slope @ shape.covariance @ slope.T)


# ---- conditioning -------------------------------------------------------------------------------------------------


def condition(shape: Shape, known: Mapping[str, Known]) -> Shape:
    """The shape of somebody of whom these measurements are known too. Keys are names of MEASUREMENTS.

    Raises BolidError where no adult body of the population comes near to all of them.
    """
    if not known:
        return shape
    from scipy.stats import chi2

    rows = names_of(known)
    target, sd = (np.array([entry[i] for entry in known.values()]) for i in (0, 1))
    start = state_of(shape.mean)
    found = most_probable(start, shape.covariance, known)
    sizes = measure_body(found[None])[0]
    slope, reading = jacobian(found, sizes)[rows], sizes[rows]
    off = (
        target - reading + slope @ (np.concatenate([found, residuals(found, sizes)]) - start)
    )  # from what the shape expects
    expected = slope @ shape.covariance @ slope.T + np.diag(sd**2)
    distance = max(float(off @ np.linalg.solve(expected, off)), float(np.sum(((reading - target) / sd) ** 2)))
    if chi2.sf(distance, len(known)) < IMPLAUSIBLE:
        raise _contradiction(shape, known, slope, math.sqrt(distance))
    _, covariance = _linear_update(shape.covariance, slope, np.zeros(len(rows)), sd)
    return Shape(found, covariance, {**shape.known, **known})


def state_of(parameters: np.ndarray) -> np.ndarray:
    """The state [S] of a body with parameters [P]."""
    return np.concatenate([parameters, residuals(parameters, measure_body(parameters[None])[0])])


def most_probable(state: np.ndarray, covariance: np.ndarray, known: Mapping[str, Known]) -> np.ndarray:
    """The parameters [P], within their bounds, of the most probable body under N(state, covariance) and what is known.

    A body's residuals follow from its parameters, so the mesh decides. Gauss-Newton; how residuals change with
    parameters is learnt on the way (Broyden 1965), and a step that makes it worse is halved.
    """
    from scipy.optimize import lsq_linear

    rows, count = names_of(known), len(PARAMETERS)
    target, sd = (np.array([entry[i] for entry in known.values()]) for i in (0, 1))
    sigma = np.sqrt(np.diag(covariance).clip(0))
    whiten = np.linalg.inv(np.linalg.cholesky(covariance + np.diag(np.maximum(1e-4 * sigma, 1e-6) ** 2)))
    low, high = bounds()
    at = within_bounds(state[:count])
    sizes, bend = measure_body(at[None])[0], np.zeros((len(NAMES), count))

    def misfit(body: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [whiten @ (np.concatenate([body, residuals(body, sizes)]) - state), (sizes[rows] - target) / sd]
        )

    off = misfit(at, sizes)
    for _ in range(_STEPS):
        slope = jacobian(at, sizes)[:, :count] + at[0] ** POWERS[:, None] * bend
        matrix = np.concatenate([whiten @ np.concatenate([np.eye(count), bend]), slope[rows] / sd[:, None]])
        step = lsq_linear(matrix, matrix @ at - off, (low - 1e-9, high + 1e-9)).x - at
        for part in (1.0, 0.5, 0.25):
            body = np.clip(at + part * step, low, high)
            moved = measure_body(body[None])[0]
            after = misfit(body, moved)
            change = (body - at) / np.maximum(sigma[:count], 1e-6)
            wrong = residuals(body, moved) - residuals(at, sizes) - bend @ (body - at)
            bend = bend + np.outer(wrong, change / np.maximum(sigma[:count], 1e-6)) / max(float(change @ change), 1e-12)
            if after @ after <= off @ off:
                break
        else:
            break
        done = float(np.abs(moved - sizes).max()) < _CLOSE
        at, sizes, off = body, moved, after
        if done:
            break
    return at


def _contradiction(shape: Shape, known: Mapping[str, Known], slope: np.ndarray, distance: float) -> BolidError:
    """What is refused, and the most that is plausible of the measurement that fits the others least."""
    expected, spread, off = {}, {}, {}
    entries, now = list(known.values()), measure_body(shape.mean[None])[0][names_of(known)]
    for i, name in enumerate(known):
        others = [j for j in range(len(entries)) if j != i]
        change, covariance = np.zeros(len(shape.covariance)), shape.covariance
        if others:
            off_others = np.array([entries[j].value - now[j] for j in others])
            sd = np.array([entries[j].sd for j in others])
            change, covariance = _linear_update(shape.covariance, slope[others], off_others, sd)
        expected[name] = now[i] + float(slope[i] @ change)
        spread[name] = math.sqrt(slope[i] @ covariance @ slope[i])
        off[name] = abs(known[name].value - expected[name]) / math.hypot(spread[name], known[name].sd)
    worst = max(off, key=lambda name: off[name])
    given = ", ".join(_with_unit(name, entry.value) for name, entry in known.items())
    low, high = (expected[worst] + sign * 2.5 * spread[worst] for sign in (-1, 1))
    beside = ", ".join(_with_unit(name, entry.value) for name, entry in known.items() if name != worst)
    return BolidError(
        f"no adult body of the population has {given}: {distance:.1f} standard deviations off",
        f"{'with ' + beside + ', ' if beside else ''}{worst} is plausible from {_with_unit(worst, low, False)} "
        f"to {_with_unit(worst, high, False)}; check the numbers and --units",
    )


def _with_unit(name: str, value: float, named: bool = True) -> str:
    """A measurement with its unit, like "waist 80 cm"; `value` in metres (kilograms)."""
    row = MEASUREMENTS[NAMES.index(name)]
    text = f"{value * row.scale:.0f} {row.unit}"
    return f"{name} {text}" if named else text


# ---- editing ------------------------------------------------------------------------------------------------------

_EXACT = 0.002  # standard deviation in metres (kilograms) of a measurement that an edit reaches
HELD = ("height", "inseam", "arm", "shoulders", "head")
GIRTHS = ("chest", "waist", "hip", "thigh", "upper-arm", "neck")


def edit(shape: Shape, targets: Mapping[str, float], *, hold: bool = True, exact: Sequence[str] = ()) -> Shape:
    """The shape moved to these measurements (metres, kilograms): the most probable change in the population.

    With `hold` the other lengths and girths stay (the weight follows; where the weight is set, the girths follow).
    Without, all follow; the stature only where a length is set. The covariance stays, but that of `exact` measurements
    and of what goes with them.
    Raises BolidError where no body comes near to it.
    """
    now = measure_body(shape.mean[None])[0]
    kept = {"height"} if targets.keys() <= {*GIRTHS, "weight"} else set[str]()
    if hold:
        kept = {*HELD, *(() if "weight" in targets else GIRTHS)}
    known = {name: Known(value, _EXACT) for name, value in targets.items()}
    known |= {name: Known(float(now[NAMES.index(name)]), 0.004) for name in NAMES if name in kept - set(targets)}
    spread = population().covariance.copy()
    gender = PARAMETERS.index("gender")  # nobody's sex changes
    spread[gender], spread[:, gender] = 0, 0
    mean = most_probable(state_of(shape.mean), spread, known)
    found = measure_body(mean[None])[0]
    for name, value in targets.items():
        reached = found[NAMES.index(name)]
        if abs(reached - value) > 0.01:
            raise BolidError(
                f"no body like this one has {_with_unit(name, value)}: the nearest is {_with_unit(name, reached)}",
                "ask for less, or let the other measurements follow: --hold none",
            )
    covariance = shape.covariance
    if exact:
        rows = jacobian(mean, found)[names_of(exact)]
        _, covariance = _linear_update(covariance, rows, np.zeros(len(rows)), np.full(len(rows), _EXACT))
    return Shape(mean, covariance, {name: known for name, known in shape.known.items() if name not in targets})


# ---- helpers ---------------------------------------------------------------------------------------------


def draw(shape: Shape, count: int, seed: int) -> np.ndarray:
    """`count` bodies [count, P] from the Gaussian of the parameters, within the bounds."""
    count_of = len(PARAMETERS)
    rng = np.random.default_rng(seed)
    return within_bounds(
        rng.multivariate_normal(shape.mean, shape.covariance[:count_of, :count_of], count, method="eigh")
    )


def names_of(names: Iterable[str]) -> Sequence[int]:
    """The rows of measurements, by name. Raises BolidError for an unknown one."""
    for name in names:
        if name not in NAMES:
            words = [row.name if row.name in row.title else f"{row.name} ({row.title})" for row in MEASUREMENTS]
            raise BolidError(f"there is no measurement {name!r}", f"the measurements are {', '.join(words)}")
    return [NAMES.index(name) for name in names]
