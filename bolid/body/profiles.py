"""The body of a profile: made from photos' body vectors and from measurements, stored in metres, read back.

What people type ("80", "80±2", "-4cm", "+2sd") is read here too. K measurements, P parameters, D body dimension.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bolid.body import shape as shapes
from bolid.body.body_vector import FEW_VIEWS, BodyVectors, load_body_vectors
from bolid.body.measurements import MEASUREMENTS, NAMES
from bolid.body.mesh import MAX_STATURE, MIN_STATURE, PARAMETERS
from bolid.body.shape import Known, Shape, condition, measured, of_sex, population
from bolid.errors import BolidError
from bolid.formats.profile import Profile, ProfileBody

TAPE_SD = 0.01
"""Standard deviation of a tape measurement in metres where none is given; of a scale, 1 kg."""

_USUAL = {"cm": {"cm": "cm", "kg": "kg"}, "in": {"cm": "in", "kg": "lb"}}
_FACTORS = {"cm": {"cm": 1.0, "m": 100.0, "in": 2.54}, "kg": {"kg": 1.0, "lb": 0.45359237}}
"""Of each unit that a measurement may be typed in, to the table's own."""
_WORDS = {"cm": "centimetres", "m": "metres", "mm": "millimetres", "in": "inches", "kg": "kilograms", "lb": "pounds"}
_NUMBER = r"(\d+(?:[.,]\d+)?)"
_SIZE = re.compile(rf"{_NUMBER}(?:\s*(?:±|\+-|\+/-)\s*{_NUMBER})?\s*([a-z]*)")
_FEET = re.compile(r"(\d+)\s*(?:'|′|’|ft)\s*(?:(\d+(?:\.\d+)?)\s*(?:\"|″|”|''|in)?)?")


@dataclass(frozen=True)
class MeasurementRow:
    """One measurement of a profile, in centimetres (kilograms). `percentile`: among people of the same sex."""

    name: str
    title: str
    unit: str
    value: float
    sd: float
    percentile: float
    known: bool


def read_known(texts: Mapping[str, str], units: str = "cm") -> dict[str, Known]:
    """{"waist": "80±2"} -> what is known, in metres (kilograms); `units`: "cm" (and kg) or "in" (and pounds), where the
    text names none itself, like "1.72 m" or 5'8" (feet and inches).

    Raises BolidError for what is no number, for children's sizes, and for what looks like another unit.
    """
    if units not in _USUAL:
        raise BolidError(f"--units is {units!r}", "choose cm (with kg) or in (with pounds)")
    shapes.names_of(texts)
    return {name: _known(name, text, units) for name, text in texts.items()}


def _known(name: str, text: str, units: str) -> Known:
    row = MEASUREMENTS[NAMES.index(name)]
    feet = _FEET.fullmatch(text.strip()) if row.unit == "cm" else None
    match = _SIZE.fullmatch(f"{12 * int(feet[1]) + float(feet[2] or 0)}in" if feet else text.strip())
    value, sd = (float((match[i] or "nan").replace(",", ".")) if match else math.nan for i in (1, 2))
    unit = match[3] if match and match[3] else _USUAL[units][row.unit]
    if unit not in _FACTORS[row.unit] or not 0 < value < math.inf or (match and match[2] and not sd > 0):
        usual = round(row.scale * float(np.median(population().quantiles[:, :, NAMES.index(name)])))
        raise BolidError(
            f"--{name} is {text!r}", f"give {row.unit}, like --{name} {usual}, or {usual}±2 with its uncertainty"
        )
    factor = _FACTORS[row.unit][unit] / row.scale
    known = Known(value * factor, TAPE_SD * (100 / row.scale) if math.isnan(sd) else sd * factor)
    _check_size(name, value, known.value, unit)
    return known


def _check_size(name: str, typed: float, value: float, unit: str) -> None:
    """Refuse what no adult measures, and guess what was meant."""
    row, k = MEASUREMENTS[NAMES.index(name)], NAMES.index(name)
    quantiles = population().quantiles[:, :, k]
    low, high = float(quantiles.min()), float(quantiles.max())
    low, high = low - 0.1 * (high - low), high + 0.6 * (high - low)
    if name == "height":
        low, high = MIN_STATURE, MAX_STATURE
    if low <= value <= high:
        return
    guesses = {**_FACTORS[row.unit], **({"mm": 0.1} if row.unit == "cm" else {})}
    meant = [other for other, size in guesses.items() if low <= typed * size / row.scale <= high and other != unit]
    hint = f"adults here have {name} from {low * row.scale:.0f} to {high * row.scale:.0f} {row.unit}"
    if meant and meant[0] in ("in", "lb"):
        hint = f"it looks like {_WORDS[meant[0]]}: add --units in; {hint}"
    elif meant:
        hint = f"it looks like {_WORDS[meant[0]]}, not {_WORDS[unit]}; {hint}"
    elif name == "height" and 0.4 < value < MIN_STATURE:
        hint = f"that is a child's; the body model knows adults only, from {MIN_STATURE * 100:.0f} cm"
    raise BolidError(f"--{name} {typed:g} is out of an adult's range", hint)


def body_prior(sex: str | None = None) -> Shape:
    """The population's shape, of one sex if it is known."""
    people = population().shape
    return of_sex(people, sex) if sex else people


def body_from_measurements(known: Mapping[str, Known], sex: str | None = None) -> Shape:
    """Somebody of whom only measurements are known."""
    return condition(body_prior(sex), known)


def body_from_vector(
    vectors: BodyVectors,
    body_mean: np.ndarray,
    body_logvar: np.ndarray,
    views: int,
    *,
    people: tuple[np.ndarray, np.ndarray] | None = None,
    known: Mapping[str, Known] | None = None,
    sex: str | None = None,
) -> tuple[Shape, Shape]:
    """(what photos say, what photos and measurements say) of the shape. `people`: the encoder's population [D], [D, D].

    `body_mean`, `body_logvar` [D] as a profile of so many `views` has them.
    """
    within = people if views <= FEW_VIEWS else None
    seen = vectors.shape_of(body_prior(sex), body_mean, body_logvar, within)
    return seen, condition(seen, known or {})


def stored(shape: Shape) -> ProfileBody:
    """The tensors that a profile keeps of a shape."""
    sizes = measured(shape)
    parts = (shape.mean, shape.covariance, sizes.values, sizes.covariance)
    return ProfileBody(*(part.astype(np.float32) for part in parts))


def shape_stored(body: ProfileBody, record: Mapping[str, Any]) -> Shape:
    """The shape that a profile with this record keeps. Raises BolidError for one of another body model."""
    known = {name: Known(*entry) for name, entry in record["config"].get("known", {}).items()}
    mean, covariance = (part.astype(np.float64) for part in body[:2])
    if mean.shape != (len(PARAMETERS),) or len(covariance) != len(PARAMETERS) + len(NAMES):
        raise BolidError("the profile's body is of another body model", "make the profile again: bolid profile")
    return Shape(mean, covariance, known)


def shape_in(profile: Profile, vectors: str | os.PathLike[str] | None) -> Shape:
    """The shape of a profile: as stored, else inferred from its body vector by `vectors` (a family's `body_shape`).

    Raises BolidError where neither is there.
    """
    if profile.body is not None:
        return shape_stored(profile.body, profile.record)
    if vectors is None:
        raise BolidError(
            "the profile holds no body, and its family's encoder knows no shape",
            "fit one: examples/tiny_family/fit_body_shape.py; or give measurements",
        )
    model = load_body_vectors(vectors, profile.record["inputs"].get("body_encoder", ""))
    mean, logvar = profile.body_mean.double().numpy(), profile.body_logvar.double().numpy()
    return body_from_vector(model, mean, logvar, FEW_VIEWS + 1)[0]


def table(shape: Shape, body: ProfileBody | None = None) -> tuple[MeasurementRow, ...]:
    """The measurements of a shape, as stored (`body`) or measured now."""
    if body is None:
        body = stored(shape)
    values, covariance = (part.astype(np.float64) for part in body[2:])
    sd = np.sqrt(np.diag(covariance).clip(0))
    ranks = population().percentile(values, float(shape.mean[PARAMETERS.index("gender")]))
    return tuple(
        MeasurementRow(
            row.name, row.title, row.unit, value * row.scale, error * row.scale, rank, row.name in shape.known
        )
        for row, value, error, rank in zip(MEASUREMENTS, values.tolist(), sd.tolist(), ranks.tolist(), strict=True)
    )


def exact_targets(changes: Mapping[str, str]) -> tuple[str, ...]:
    """The measurements that are set to a value and not changed by one: {"waist": "80cm"}."""
    return tuple(name for name, text in changes.items() if text.strip()[:1] not in ("+", "-"))


def read_targets(shape: Shape, changes: Mapping[str, str]) -> dict[str, float]:
    """{"waist": "-4cm", "inseam": "+2sd", "hip": "101cm"} -> the wanted measurements in metres (kilograms).

    With a sign it is a change, without one the measurement itself. "sd" is that of the population within one sex.
    """
    shapes.names_of(changes)
    now, spread = shapes.measure_body(shape.mean[None])[0], population().spread()
    targets = {}
    for name, text in changes.items():
        row, k = MEASUREMENTS[NAMES.index(name)], NAMES.index(name)
        match = re.fullmatch(r"([+-]?)(\d+(?:\.\d+)?)\s*(cm|in|kg|lb|sd)", text.strip())
        allowed = {"cm": ("cm", "in", "sd"), "kg": ("kg", "lb", "sd")}[row.unit]
        if not match or match[3] not in allowed or (match[3] == "sd" and not match[1]):
            raise BolidError(
                f"--set {name}={text} sets nothing",
                f"write a change, like {name}=-4{row.unit} or {name}=+2sd, or the new value, like {name}=80{row.unit}",
            )
        sign, number, unit = match[1], float(match[2]), match[3]
        size = spread[k] if unit == "sd" else {"cm": 0.01, "in": 0.0254, "kg": 1.0, "lb": 0.45359237}[unit]
        change = number * size * (-1 if sign == "-" else 1)
        targets[name] = float(now[k] + change) if sign else change
    return targets
