"""How the branches learn: the learning-rate schedule, and computing with the moving average."""

from __future__ import annotations

import math
from typing import Any

from bolid.train_adapter.config import TrainAdapterConfig


def learning_rate(step: int, config: TrainAdapterConfig) -> float:
    """Of a step, from 0 on: up over the first 100 steps (or 5 %), then along a cosine down to 2 % of the highest."""
    warmup = max(1.0, min(100.0, 0.05 * config.steps))
    if step < warmup:
        return config.learning_rate * ((step + 1) / (warmup + 1))
    progress = (step - warmup) / max(1.0, config.steps - warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class swapped:
    """`with swapped(parameters, average):` the network computes with the moving average."""

    def __init__(self, parameters: dict[str, Any], average: dict[str, Any]) -> None:
        self.parameters, self.average = parameters, average

    def _swap(self) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                # In place: FSDP knows its parameters by their memory.
                kept = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()
