"""The body that a page shows and moves: sliders in centimetres, and the mannequin as a GLB file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bolid.body.profiles import MeasurementRow, table
from bolid.body.shape import Shape, edit, population
from bolid.errors import BolidError
from bolid.profile import body_of

_SKIN, _SUIT = (0.58, 0.50, 0.43), (0.25, 0.27, 0.28)  # linear light, as glTF has it
_lock = threading.Lock()  # Anny is used by one thread at a time


@dataclass(frozen=True)
class Slider:
    """A measurement that can be moved, in centimetres (kilograms)."""

    name: str
    title: str
    unit: str
    low: float
    high: float


def sliders() -> tuple[Slider, ...]:
    """One a measurement, from the least to the most of the population's adults, a little beyond."""
    from bolid.body.measurements import MEASUREMENTS

    quantiles = population().quantiles
    low, high = quantiles.min((0, 1)), quantiles.max((0, 1))
    room = 0.05 * (high - low)
    return tuple(
        Slider(row.name, row.title, row.unit, float(np.floor(a * row.scale)), float(np.ceil(b * row.scale)))
        for row, a, b in zip(MEASUREMENTS, low - room, high + room, strict=True)
    )


def edited_shape(profile: Path, wanted: Mapping[str, float], hold: bool) -> tuple[Shape, tuple[MeasurementRow, ...]]:
    """The shape of a profile with these measurements, in centimetres (kilograms).

    Raises BolidError for a profile without a shape, and where there is no such body.
    """
    with _lock:
        shape, rows = body_of(profile)
    scale = {row.name: 1.0 if row.unit == "kg" else 100.0 for row in rows}
    if unknown := wanted.keys() - scale.keys():
        raise BolidError(f"there is no measurement {min(unknown)!r}", f"the measurements are {', '.join(scale)}")
    if not wanted:
        return shape, rows
    with _lock:
        shape = edit(shape, {name: value / scale[name] for name, value in wanted.items()}, hold=hold)
        return shape, table(shape)


def write_mannequin(shape: Shape, path: Path) -> Path:
    """The shape at rest, in a suit, as a GLB file."""
    from bolid.body.export import export_mesh
    from bolid.body.mannequin import smoothed, suit
    from bolid.body.measurements import measuring_tape
    from bolid.body.shape import within_bounds

    with _lock:
        tape = measuring_tape()
        model = tape.model
        body = smoothed(tape, model.rest(within_bounds(shape.mean)[None])[0])
        covered = suit(model.canonical, model.arm)[:, None]
        return export_mesh(path, body, model.faces, np.array(_SKIN) + covered * (np.array(_SUIT) - _SKIN))
