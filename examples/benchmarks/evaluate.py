"""How fast FID is, next to torchmetrics and torch-fidelity, from the same features.

    python examples/benchmarks/evaluate.py                # 5,000 x 2,048 features on each side: about two minutes
    python examples/benchmarks/evaluate.py 500 2048       # fewer pictures than features

Each takes the feature matrices in batches of 250, as they would come from an extractor, and ends with the figure; the
others' way is their own, update and compute or features, statistics and metric. One thread for all, set before any of
them loads. Prints the figures, the times (medians of five rounds), and how many times as long the others take: for
everything, and with the statistics of the reference kept from an earlier time, as all three can.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}

import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from bolid.method.distributions import frechet_distance
from bolid.method.feature_statistics import FeatureStatistics

BATCH = 250
ROUNDS = 5


class Ours:
    name = "bolid"

    def side(self, x: torch.Tensor) -> FeatureStatistics:
        side = FeatureStatistics(x.shape[1])
        for part in x.split(BATCH):
            side.update(part)
        return side

    def reference(self, x: torch.Tensor) -> FeatureStatistics:
        """What is kept for the next comparison."""
        return FeatureStatistics.from_tensors(self.side(x).tensors())

    def against(self, reference: FeatureStatistics, x: torch.Tensor) -> float:
        return frechet_distance(reference, self.side(x))


class TorchMetrics:
    name = "torchmetrics"

    def side(self, x: torch.Tensor) -> FrechetInceptionDistance:
        extractor = nn.Identity()
        extractor.num_features = x.shape[1]
        metric = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
        for part in x.split(BATCH):
            metric.update(part, real=True)
        return metric

    reference = side

    def against(self, reference: FrechetInceptionDistance, x: torch.Tensor) -> float:
        for part in x.split(BATCH):
            reference.update(part, real=False)
        return float(reference.compute())


class TorchFidelity:
    name = "torch-fidelity"

    def side(self, x: torch.Tensor) -> dict:
        return fid_features_to_statistics(torch.cat(x.split(BATCH)))

    reference = side

    def against(self, reference: dict, x: torch.Tensor) -> float:
        return fid_statistics_to_metric(self.side(x), reference, verbose=False)["frechet_inception_distance"]


def main() -> None:
    count, size = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (5000, 2048)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    # Correlated features off zero, with a spectrum that falls as that of real ones does.
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -2, size)[:, None] / size**0.5
    a, b = (torch.randn(count, size, generator=generator) @ mix + 0.4 for _ in range(2))
    b = b * 1.1 + 0.02
    print(f"{count} x {size} features on both sides, one thread, seconds of processor")
    ways = (Ours(), TorchMetrics(), TorchFidelity())
    rounds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    figures: dict[str, float] = {}
    for way in ways:
        way.against(way.reference(a[:300, :32]), b[:300, :32])  # the first call loads libraries
    for way in ways * ROUNDS:
        start = time.process_time()
        figures[way.name] = way.against(way.side(a), b)
        middle = time.process_time()
        reference = way.reference(a)
        ready = time.process_time()
        again = way.against(reference, b)
        rounds[way.name].append((middle - start, time.process_time() - ready))
        assert abs(again - figures[way.name]) < 1e-5 * again
    times = {name: [statistics.median(seconds) for seconds in zip(*each, strict=True)] for name, each in rounds.items()}
    for name, (whole, ready) in times.items():
        print(f"{name:15} FID {figures[name]:.9g}   {whole:6.2f} in all, {ready:6.2f} with the reference ready")
    for way in ways[1:]:
        whole, ready = (theirs / ours for theirs, ours in zip(times[way.name], times["bolid"], strict=True))
        print(f"{way.name} takes {whole:.1f} times as long in all, {ready:.1f} times with the reference ready")


if __name__ == "__main__":
    main()
