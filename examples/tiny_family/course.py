"""The course of a training: its rate, its moving average, a line a minute, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bolid.formats.checkpoint import load_checkpoint, save_checkpoint


class Course:
    """AdamW with a linear warm-up and a cosine down to 2 % of `lr`, and a moving average of the weights.

    `parameters`: what is trained; `average`: tensors of the same names, which follow them with the decay `ema` (less at
    first). `record`: the run's; with the same one and the same `checkpoint` a training goes on where it was stopped.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        average: Mapping[str, torch.Tensor],
        record: dict[str, Any],
        checkpoint: Path,
        *,
        steps: int,
        lr: float,
        weight_decay: float,
        warmup: int,
        ema: float,
        checkpoint_minutes: float,
    ) -> None:
        self.parameters, self.average = dict(parameters), dict(average)
        self.record, self.checkpoint = record, checkpoint
        self.steps, self.lr, self.warmup, self.ema = steps, lr, warmup, ema
        self.checkpoint_minutes = checkpoint_minutes
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=weight_decay, fused=True)
        self._tensors = {**self.parameters, **{f"average.{name}": value for name, value in self.average.items()}}
        self.step = load_checkpoint(checkpoint, record, self._tensors, self.optimizer)
        self._started = self._saved = self._told = time.monotonic()
        self._losses: list[float] = []

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimizer down this loss, and what is due after it."""
        rate = min(1.0, (self.step + 1) / self.warmup)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema, self.step / (self.step + 10))
        with torch.no_grad():
            now = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)
        self._losses = [*self._losses[-199:], float(loss.detach())]
        if time.monotonic() - self._told > 60 or self.step == self.steps:
            self._told = time.monotonic()
            minutes, mean = (self._told - self._started) / 60, sum(self._losses) / len(self._losses)
            print(f"step {self.step}, {minutes:.1f} min, loss {mean:.4f}", flush=True)
        if time.monotonic() - self._saved > 60 * self.checkpoint_minutes:
            save_checkpoint(self.checkpoint, self.step, self.record, self._tensors, self.optimizer)
            self._saved = time.monotonic()

    def finished(self) -> None:
        """The result is written: the checkpoint is not needed any more."""
        self.checkpoint.unlink(missing_ok=True)
