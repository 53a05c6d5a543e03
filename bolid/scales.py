"""Settings of the sampling as text and as values: scales, guidance, grids, picture sizes and LoRA files.

    0.7                   everywhere, in every step
    down=0.5,mid=1,up=1   for each part of the UNet; a part that is not named is at 0, as in diffusers
    0.2..0.8              1, in the interval from 20 % to 80 % of the sampling (0: pure noise, 1: the finished picture)
    down=0.5,up=1@0..0.5  both

Guidance is written like a scale without parts: 2.5, or 2.5@0..0.75. So is guidance to a person's face or body, which
has the interval PERSON_INTERVAL where none is given.

Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from bolid.errors import BolidError

PARTS = ("down", "mid", "up")
GRID_AXES = ("body-scale", "face-scale", "guidance", "face-guidance", "body-guidance", "steps", "seed")
# x0-hat shows a face or a body by then, and steps are left that remove what guidance adds beside it.
PERSON_INTERVAL = {"face": (0.3, 0.9), "body": (0.5, 0.9)}
_SCALE_HINT = "give a number of 0 or more, parts like down=0.5,mid=1,up=1, an interval like 0.2..0.8, or 1@0.2..0.8"
_GUIDANCE_HINT = "give a number of 0 or more, or one with an interval, like 2.5@0..0.75"


@dataclass(frozen=True)
class Scale:
    """The weight of a condition or a guidance: one for each part of the UNet, in an interval of the sampling."""

    down: float = 1.0
    mid: float = 1.0
    up: float = 1.0
    start: float = 0.0
    end: float = 1.0  # 0 <= start < end <= 1

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 everywhere."""
        return self.down == self.mid == self.up == 0

    @property
    def is_uniform(self) -> bool:
        """Whether all parts have the same weight."""
        return self.down == self.mid == self.up

    @property
    def value(self) -> float:
        """The one weight of a uniform scale."""
        return self.up

    def steps(self, total: int) -> range:
        """The steps of `total` in its interval: those that begin there."""
        return range(math.ceil(self.start * total - 1e-9), math.ceil(self.end * total - 1e-9))

    def at(self, step: int, total: int) -> float | dict[str, float]:
        """The weight at a step, in the form that diffusers' `set_ip_adapter_scale` takes."""
        if step not in self.steps(total):
            return 0.0
        return self.up if self.is_uniform else {"down": self.down, "mid": self.mid, "up": self.up}

    def plain(self) -> float | str:
        """For records and labels: a number where it is one, else the text that `parse_scale` reads."""
        weights = f"{self.up:g}" if self.is_uniform else f"down={self.down:g},mid={self.mid:g},up={self.up:g}"
        if (self.start, self.end) == (0.0, 1.0):
            return self.up if self.is_uniform else weights
        return f"{weights}@{self.start:g}..{self.end:g}"


def parse_scale(value: float | str | Scale, option: str, hint: str = _SCALE_HINT) -> Scale:
    """A scale as written (see the top of this file). Raises BolidError, which names `option`, for anything else."""
    if isinstance(value, Scale):
        return value
    text = str(value).strip()
    weights, at, interval = text.partition("@")
    if not at and ".." in text:
        weights, interval = "1", text
    error = BolidError(f"{option} is {value}", hint)
    numbers: dict[str, float]
    if "=" in weights:
        pairs = [item.split("=", 1) for item in weights.split(",")]
        if any(len(pair) != 2 or pair[0].strip() not in PARTS for pair in pairs):
            raise error
        numbers = dict.fromkeys(PARTS, 0.0) | {name.strip(): _number(number, error) for name, number in pairs}
        if len({name.strip() for name, _ in pairs}) < len(pairs):
            raise error
    else:
        numbers = dict.fromkeys(PARTS, _number(weights, error))
    start, end = 0.0, 1.0
    if at or interval:
        first, dots, last = interval.partition("..")
        if not dots:
            raise error
        start, end = _number(first, error), _number(last, error)
        if not start < end <= 1:
            raise BolidError(
                f"{option} is {value}: the interval {start:g}..{end:g} is empty",
                "an interval of the sampling is two numbers from 0 to 1, the smaller first",
            )
    return Scale(**numbers, start=start, end=end)


def parse_guidance(value: float | str, option: str = "--guidance") -> Scale:
    """Guidance as written: a number, or one with the interval of the sampling in which it counts."""
    text = str(value)
    if "=" in text or ("@" not in text and ".." in text):
        raise BolidError(f"{option} is {value}", _GUIDANCE_HINT)
    return parse_scale(value, option, _GUIDANCE_HINT)


def parse_person_guidance(value: float | str, part: str, option: str = "") -> Scale:
    """Guidance to a person's `part`, "face" or "body", as written; PERSON_INTERVAL where it names no interval."""
    scale = parse_guidance(value, option or f"--{part}-guidance")
    start, end = PERSON_INTERVAL[part]
    return scale if "@" in str(value) else replace(scale, start=start, end=end)


def _number(text: str, error: BolidError) -> float:
    try:
        number = float(text)
    except ValueError:
        raise error from None
    if not (math.isfinite(number) and number >= 0):
        raise error
    return number


def parse_grid(options: Sequence[str]) -> list[dict[str, str]]:
    """`["body-scale=0,1", "guidance=2,4"]` -> one {axis: value} for each cell, the first axis varying slowest.

    Without options there is one cell that changes nothing. Raises BolidError for an axis that is unknown or twice.
    """
    axes: dict[str, list[str]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        name, values = name.strip(), [value.strip() for value in text.split(",")]
        if name not in GRID_AXES:
            raise BolidError(f"--grid {option}: {name!r} is no axis", f"choose one of {', '.join(GRID_AXES)}")
        if not equals or not all(values):
            raise BolidError(f"--grid {option} lacks values", f"write them after =, like {name}=0,0.5,1")
        if name in axes:
            raise BolidError(f"--grid {name} is given twice", f"write all its values in one: {name}=a,b,c")
        if len(set(values)) < len(values):
            raise BolidError(f"--grid {option} names a value twice", "leave one of them out")
        axes[name] = values
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """A picture's size as written, `WIDTHxHEIGHT` in pixels -> (height, width), as arrays have it.

    Raises BolidError for anything else; whether a model takes that size is not checked here.
    """
    width, _, height = text.strip().lower().partition("x")
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", width) or not re.fullmatch(r"0*[1-9][0-9]{0,4}", height):
        raise BolidError(f"{option} is {text!r}", "give WIDTHxHEIGHT in pixels, like 832x1216")
    return int(height), int(width)


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT` -> (file, weight). Raises BolidError when there is no such file."""
    path, colon, last = text.rpartition(":")
    file, weight = Path(text), 1.0
    if colon and not file.exists():
        try:
            file, weight = Path(path), float(last)
        except ValueError:
            pass
    if not file.is_file():
        raise BolidError(f"there is no LoRA {file}", "write --lora FILE, or --lora FILE:WEIGHT")
    if not math.isfinite(weight):
        raise BolidError(f"--lora {text}: the weight is {weight}", "give a number, like FILE:0.8")
    return file, weight
