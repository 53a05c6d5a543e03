"""One setting of a command: its default, help line, choices or range, and where `--help` shows it.

A command's settings are a frozen dataclass whose fields `setting` makes and whose `__post_init__` calls
`check_settings`. The command line, `--config FILE.toml` and the library read the same table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bolid.errors import BolidError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `open_low`, `open_high`: without the end itself. Never NaN."""

    low: float
    high: float
    hint: str  # what to give instead
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


AT_LEAST_1 = Range(1, math.inf, "give at least 1", open_high=True)
NOT_NEGATIVE = Range(0, math.inf, "give 0 (off) or more", open_high=True)
PROBABILITY = Range(0, 1, "it is a probability: give 0 to 1")
FRACTION = Range(0, 1, "it is a fraction: give 0 to 1")


def setting(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] = (),
    within: Range | None = None,
    group: str = "",
    advanced: bool = False,
) -> Any:
    """A field of a settings dataclass.

    `text`: its help line; `group`: its heading in `--help`; `advanced`: not shown there.
    """
    metadata: dict[str, Any] = {"help": text, "group": group, "advanced": advanced}
    if choices:
        metadata["choices"] = tuple(choices)
    if within is not None:
        metadata["range"] = within
    return dataclasses.field(default=default, metadata=metadata)


def option_name(name: str) -> str:
    """The option of a field: --batch-size of batch_size."""
    return f"--{name.replace('_', '-')}"


def check_settings(settings: Any) -> None:
    """Raises BolidError for the first field that is none of its choices or outside its range."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices, allowed = field.metadata.get("choices"), field.metadata.get("range")
        if choices and value not in choices:
            raise BolidError(f"{option_name(field.name)} is {value!r}", f"choose one of {', '.join(map(str, choices))}")
        if allowed is not None and value not in allowed:
            raise BolidError(f"{option_name(field.name)} is {value}", allowed.hint)
