"""What `evaluate` gives back: figures with their intervals, of one folder of pictures or of several side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bolid.evaluate.pictures import Picture, Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Metric:
    """One figure: its value (None where it could not be measured), its interval, and what is behind it."""

    value: float | None
    n: int
    measured_by: str
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    pictures: int
    references: int  # held-out photos
    people: int
    metrics: dict[str, Metric]
    ratios: dict[str, dict[str, float]]
    """Body ratios by name: {"true", "pictures"}, means over people; empty without ground truth."""
    held_out: dict[str, Any]
    """{"excluded": reference photos that had made the profile, "checked": whether the pictures or --profile told}."""
    notes: list[str]
    rejected: dict[str, list[str]]


@dataclass
class Scored:
    """A folder's pictures with all that was measured of each; what the report draws from."""

    name: str
    source: Source
    pictures: list[Picture]
    people: list[str]
    scores: dict[str, torch.Tensor]  # name -> f64 [N], nan where not measured
    per_person: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> person -> value
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Difference:
    """Another method's figure minus the first one's, over pairs of equal person and prompt."""

    value: float | None
    low: float | None
    high: float | None
    pairs: int
    paired_by: str  # "picture" or "person"


@dataclass(frozen=True)
class Comparison:
    baseline: str
    methods: dict[str, Evaluation]
    differences: dict[str, dict[str, Difference]]  # method -> metric
