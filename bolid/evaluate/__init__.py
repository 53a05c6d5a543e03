"""`bolid evaluate`: do generated pictures follow their prompts and keep their person's face and body?"""

from __future__ import annotations

from bolid.evaluate.bench import bench
from bolid.evaluate.command import compare, evaluate
from bolid.evaluate.protocol import Benchmark, make_benchmark
from bolid.evaluate.results import Comparison, Difference, Evaluation, Metric

__all__ = [
    "Benchmark", "Comparison", "Difference", "Evaluation", "Metric", "bench", "compare", "evaluate", "make_benchmark",
]  # fmt: skip
