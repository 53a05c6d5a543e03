"""`bolid evaluate`: do generated pictures follow their prompts and keep their person's face and body?"""

from __future__ import annotations

from bolid.evaluate.command import compare, evaluate
from bolid.evaluate.results import Comparison, Difference, Evaluation, Metric

__all__ = ["Comparison", "Difference", "Evaluation", "Metric", "compare", "evaluate"]
