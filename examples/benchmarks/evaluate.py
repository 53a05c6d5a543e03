"""How fast FID is, next to torchmetrics and torch-fidelity, from the same features.

    python examples/benchmarks/evaluate.py                # 5,000 x 2,048 features on each side: about 3 minutes
    python examples/benchmarks/evaluate.py 500 2048       # fewer pictures than features

Each takes both feature matrices in batches of 250, as they would come from an extractor, and ends with the figure; the
others' way is their own, update and compute or features, statistics and metric. One thread for all, set before any of
them loads. Prints the figures, the times, and how many times as long the others take.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

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

from bolid.method.distributions import FeatureStatistics, frechet_distance

BATCH = 250


def ours(a: torch.Tensor, b: torch.Tensor) -> float:
    sides = []
    for x in (a, b):
        side = FeatureStatistics(x.shape[1])
        for part in x.split(BATCH):
            side.update(part)
        sides.append(side)
    return frechet_distance(*sides)


def torchmetrics(a: torch.Tensor, b: torch.Tensor) -> float:
    extractor = nn.Identity()
    extractor.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
    for x, real in ((a, True), (b, False)):
        for part in x.split(BATCH):
            metric.update(part, real=real)
    return float(metric.compute())


def torch_fidelity(a: torch.Tensor, b: torch.Tensor) -> float:
    sides = [fid_features_to_statistics(torch.cat(x.split(BATCH))) for x in (a, b)]
    return fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]


def main() -> None:
    count, size = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (5000, 2048)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    # Correlated features off zero, with a spectrum that falls as that of real ones does.
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -2, size)[:, None] / size**0.5
    a, b = (torch.randn(count, size, generator=generator) @ mix + 0.4 for _ in range(2))
    b = b * 1.1 + 0.02
    times: dict[str, float] = {}
    ways: list[Callable[[torch.Tensor, torch.Tensor], float]] = [ours, torchmetrics, torch_fidelity]
    for way in ways:
        way(a[:300, :32], b[:300, :32])  # the first call loads libraries
        clock, processor = time.perf_counter(), time.process_time()
        value = way(a, b)
        clock, times[way.__name__] = time.perf_counter() - clock, time.process_time() - processor
        spent = f"{times[way.__name__]:7.2f} s of processor, {clock:7.2f} s"
        print(f"{way.__name__:15} FID {value:.9g}   {spent}", flush=True)
    for name in ("torchmetrics", "torch_fidelity"):
        print(f"{name} takes {times[name] / times['ours']:.1f} times as long as ours ({count} x {size}, one thread)")


if __name__ == "__main__":
    main()
