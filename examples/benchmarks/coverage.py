"""Do the 95 % intervals of `evaluate` cover the truth 95 % of the time? A simulation; writes coverage.md beside itself.

    python examples/benchmarks/coverage.py --trials 400

Each trial draws people, pictures and features from distributions whose truth is known and makes the interval as
`evaluate` makes it. The truth of FID is its expectation at this number of pictures (it is biased by that number), so
the mean over the trials; that of KID too, which has no bias; that of extrapolated FID is FID at infinitely many.
"Width" is the mean width of the intervals over that of an ideal one, 2 * 1.96 standard deviations of the value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from bolid.method.distributions import frechet_extrapolated, frechet_interval, kernel_distance
from bolid.method.feature_statistics import FeatureStatistics
from bolid.method.metrics import Interval, bootstrap_mean, correlation_interval
from bolid.run import write_atomic

F64 = torch.float64
Trial = Callable[[torch.Generator], Interval]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def mean_trial(people: int, pictures: int) -> Trial:
    """The mean of scores; pictures of one person are alike. The truth is 0."""

    def trial(generator: torch.Generator) -> Interval:
        scores = normal(generator, people, 1) + normal(generator, people, pictures)
        owners = torch.arange(people).repeat_interleave(pictures)
        return bootstrap_mean(scores.flatten(), owners, seed=int(torch.randint(2**31, (1,), generator=generator)))

    return trial


def correlation_trial(people: int, r: float, other: float | None = None) -> Trial:
    """Ten ratios, correlated among each other; with `other`, the paired difference of two methods."""

    def trial(generator: torch.Generator) -> Interval:
        mix = 0.5 * normal(torch.Generator().manual_seed(1), 10, 10) + torch.eye(10, dtype=F64)
        mix = mix / mix.norm(dim=0)
        truth = normal(generator, people, 10) @ mix

        def predicted(rho: float) -> torch.Tensor:
            return rho * truth + math.sqrt(1 - rho**2) * (normal(generator, people, 10) @ mix)

        return correlation_interval(truth, predicted(r), None if other is None else predicted(other))

    return trial


def feature_trial(measure: Callable[..., Interval], pictures: int, photos: int, features: int, shift: float) -> Trial:
    """Pictures and photos from two Gaussians, `shift` apart in every feature."""

    def trial(generator: torch.Generator) -> Interval:
        scale = torch.linspace(0.5, 1.5, features, dtype=F64)
        sides = []
        for count, offset in ((pictures, shift), (photos, 0.0)):
            statistics = FeatureStatistics(features)
            statistics.update(normal(generator, count, features) * scale + offset)
            sides.append(statistics)
        return measure(*sides)

    return trial


def coverage(trial: Trial, truth: float | None, trials: int) -> tuple[float, float]:
    """(share of the intervals that hold the truth, their width over the ideal one). None: the mean of the values."""
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([trial(generator) for _ in range(trials)], dtype=F64)
    value, low, high = found.unbind(1)
    aim = float(value.mean()) if truth is None else truth
    covered = ((low <= aim) & (aim <= high)).double().mean()
    return float(covered), float((high - low).mean() / (2 * 1.96 * value.std()))


def cases() -> dict[str, tuple[Trial, float | None]]:
    found: dict[str, tuple[Trial, float | None]] = {
        "mean, 8 people, 10 pictures each": (mean_trial(8, 10), 0.0),
        "mean, 24 people, 10 pictures each": (mean_trial(24, 10), 0.0),
        "correlation 0.9, 24 people": (correlation_trial(24, 0.9), 0.9),
        "correlation 0.5, 24 people": (correlation_trial(24, 0.5), 0.5),
        "correlation, 0.9 minus 0.5, paired, 24 people": (correlation_trial(24, 0.9, 0.5), 0.4),
    }
    for features, shift in ((12, 0.3), (48, 0.15)):
        size = f"240 pictures, 144 photos, {features} features"
        found[f"FID, {size}"] = (feature_trial(frechet_interval, 240, 144, features, shift), None)
        found[f"extrapolated FID, {size}"] = (
            feature_trial(frechet_extrapolated, 240, 144, features, shift), features * shift**2
        )  # fmt: skip
        found[f"KID, {size}"] = (feature_trial(kernel_distance, 240, 144, features, shift), None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--only", default="", help="only the cases whose name begins with this")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    lines = [
        "# Do the intervals cover?",
        "",
        f"Made by `python examples/benchmarks/coverage.py --trials {args.trials}`. A 95 % interval should hold the",
        "truth in 93 to 97 % of the trials. Width: over that of an ideal interval.",
        "",
        "| figure | covers | width |",
        "|---|---|---|",
    ]
    for name, (trial, truth) in cases().items():
        if name.startswith(args.only):
            covered, width = coverage(trial, truth, args.trials)
            lines.append(f"| {name} | {covered:.3f} | {width:.2f} |")
            print(lines[-1], flush=True)
    write_atomic(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
