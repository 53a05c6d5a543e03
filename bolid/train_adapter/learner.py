"""What learns: the branches' parameters with their optimizer, moving average and checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
from bolid.method.optim import adapter_schedule, update_ema
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.precision import LossScaler


class Learner:
    """AdamW (Loshchilov & Hutter 2019) on `parameters`, and the moving average of their values, which is saved.

    All of `parameters` are in the checkpoint and the average; those that require a gradient are trained.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: TrainAdapterConfig, device: str) -> None:
        self.parameters, self.config = dict(parameters), config
        self.trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.scaler = LossScaler(device, config.precision)
        self.recent_loss = torch.full((), math.nan, dtype=torch.float64)  # moving average over 100 steps
        self.step = 0  # steps done

    def start_step(self) -> None:
        """Set the learning rate of the next step and forget the last one's gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * adapter_schedule(
                self.step, self.config.steps, self.config.schedule
            )
        self.optimizer.zero_grad(set_to_none=True)

    def finish_step(self) -> None:
        """Update the weights with the gradients that are there, then their moving average."""
        self.scaler.step(self.optimizer, self.trained, self.config.max_grad_norm)
        self.step += 1
        update_ema(self.average, self.parameters, self.step, self.config.ema)

    def note_loss(self, loss: float) -> float:
        """Take a step's loss into the moving average, which is returned."""
        recent = float(self.recent_loss)
        self.recent_loss.fill_(loss if math.isnan(recent) else 0.99 * recent + 0.01 * loss)
        return float(self.recent_loss)

    def load(self, path: Path, record: dict[str, Any]) -> None:
        """Go on from a checkpoint, if there is one."""
        self.step = load_checkpoint(path, record, self._tensors(), self.optimizer)
        self.scaler.restore()

    def save(self, path: Path, record: dict[str, Any], write: bool) -> None:
        """All processes call; the one that is to `write` does."""
        self.scaler.remember()
        save_checkpoint(path, self.step, record, self._tensors(), self.optimizer, write=write)

    def _tensors(self) -> dict[str, torch.Tensor]:
        averages = {f"average.{name}": value for name, value in self.average.items()}
        return {**self.parameters, **averages, "scaler": self.scaler.state, "recent_loss": self.recent_loss}
