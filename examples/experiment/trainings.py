"""Trainings with other seeds as a source of variance, beside people.

An interval over people holds for one training. Of methods that were trained several times, the table says how much the
figure changes from training to training, and gives an interval for both sources: 1.96 times the root of the variance of
the mean over people plus the variance over trainings by their number. With three trainings that is rough.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bolid.evaluate.results import DESCRIPTIONS, HIGHER, Comparison, Evaluation, Metric

SEPARATOR = "-training-"
SHOWN = ("text_score", "face_found", "face_similarity", "body_ratio_error", "body_ratio_correlation", "body_auc", "kid")
Z = 1.96


class OverTrainings(NamedTuple):
    """A figure of several trainings."""

    mean: float
    low: float
    high: float
    sd_trainings: float
    se_people: float


def name_of(method: str, training: int) -> str:
    """The folder of a method's pictures by a further training (1, 2, ...)."""
    return f"{method}{SEPARATOR}{training}"


def split(compared: Comparison, methods: Sequence[str]) -> tuple[Comparison, dict[str, list[Evaluation]]]:
    """(the comparison without further trainings, method -> evaluations of all its trainings, of two or more)."""
    extra = [name for name in compared.methods if SEPARATOR in name]
    groups = {
        method: [compared.methods[method], *(compared.methods[n] for n in extra if n.startswith(method + SEPARATOR))]
        for method in methods
        if method in compared.methods and any(name.startswith(method + SEPARATOR) for name in extra)
    }
    rest, differences = (
        {name: value for name, value in part.items() if name not in extra}
        for part in (compared.methods, compared.differences)
    )
    return replace(compared, methods=rest, differences=differences), groups


def over_trainings(metrics: Sequence[Metric]) -> OverTrainings | None:
    """None where a training lacks the figure or its interval."""
    values = [metric.value for metric in metrics if metric.value is not None]
    widths = [m.high - m.low for m in metrics if m.low is not None and m.high is not None]
    if len(values) < max(2, len(metrics)) or len(widths) < len(metrics):
        return None
    mean, sd = statistics.mean(values), statistics.stdev(values)
    error = statistics.mean(widths) / 2 / Z
    reach = Z * (error**2 + sd**2 / len(values)) ** 0.5
    return OverTrainings(mean, mean - reach, mean + reach, sd, error)


def markdown(groups: dict[str, list[Evaluation]]) -> list[str]:
    """The lines of the table; none without methods that were trained several times."""
    if not groups:
        return []
    lines = [
        "Trainings with other seeds. The last interval is for people and trainings together; the table above is of the "
        "first training, and its intervals are over people only.",
        "",
        "| method | figure | each training | mean | sd over trainings | standard error over people | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, evaluations in groups.items():
        for name in SHOWN:
            found = over_trainings([one.metrics[name] for one in evaluations if name in one.metrics])
            if found is None:
                continue
            each = ", ".join(f"{one.metrics[name].value:.3f}" for one in evaluations)
            arrow = "↑" if DESCRIPTIONS[name][0] == HIGHER else "↓"
            lines.append(
                f"| {method} | {name.replace('_', ' ')} {arrow} | {each} | {found.mean:.3f} | {found.sd_trainings:.3f} "
                f"| {found.se_people:.3f} | {found.low:.3f} to {found.high:.3f} |"
            )
    return lines
