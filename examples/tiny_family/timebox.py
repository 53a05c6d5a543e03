"""A training that lasts a given number of minutes: learning rate, moving average, checkpoints, a line a minute.

On a CPU these are minutes of computing, which others on the machine do not shorten; on a GPU, minutes of the clock.

    box = TimeBox({"unet": unet}, optimizer, out, minutes=60)
    while box.running():
        loss = ...
        box.update(loss)

The same command resumes from OUT/checkpoint.pt. Under torchrun the processes average their gradients.
"""

from __future__ import annotations

import copy
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class TimeBox:
    """Trains `networks` with `optimizer` for so many minutes, earlier runs included; `average` holds their moving
    averages. `others`: further objects with a state_dict that a checkpoint must hold (a discriminator, say).
    `flat`: the fraction of the time at the full learning rate; a half cosine down to 2 % follows.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        out: Path,
        *,
        minutes: float,
        device: str = "cpu",
        flat: float = 0.0,
        warmup: int = 100,
        decay: float = 0.998,
        seed: int = 0,
        others: dict[str, nn.Module | torch.optim.Optimizer] | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.networks, self.optimizer, self.out, self.seed = networks, optimizer, out, seed
        self.seconds, self.flat, self.warmup, self.decay = minutes * 60, flat, warmup, decay
        self.lr = [group["lr"] for group in optimizer.param_groups]
        self.average = {name: copy.deepcopy(network).eval() for name, network in networks.items()}
        self.parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
        self.averaged = [p for network in self.average.values() for p in network.parameters() if p.requires_grad]
        averages = {f"average_{name}": network for name, network in self.average.items()}
        self._saved = {**networks, **averages, "optimizer": optimizer, **(others or {})}
        self._now = time.process_time if torch.device(device).type == "cpu" else time.monotonic
        self.step, self.spent = 0, 0.0
        if (checkpoint := out / "checkpoint.pt").exists():
            state = torch.load(checkpoint, weights_only=True, map_location="cpu")
            for name, item in self._saved.items():
                item.load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
        self._resumed, self._began = self.spent, self._now() - self.spent
        self._last: dict[str, float] = {}
        self._means: dict[str, list[torch.Tensor]] = {}

    @property
    def fraction(self) -> float:
        """Of the time that is over, 0..1."""
        return min(1.0, self.spent / self.seconds)

    def running(self) -> bool:
        """Whether there is time for another step; sets its learning rate."""
        self.spent = self._clock()
        falling = max(0.0, (self.fraction - self.flat) / max(1e-9, 1 - self.flat))
        factor = min(1.0, (self.step + 1) / self.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * falling)))
        for group, lr in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = lr * factor
        return self.spent < self.seconds

    def rng(self) -> np.random.Generator:
        """This step's random numbers: the same after a resume, others in each process."""
        return np.random.default_rng([self.seed, self.step, RANK])

    def update(self, loss: torch.Tensor | None = None, **means: torch.Tensor | float) -> None:
        """One step of the optimizer down `loss` (None: the gradients are there already) and what is due after it.
        `means`: what the next line reports as means over the last 200 steps."""
        if loss is not None:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if WORLD > 1:
            average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.decay, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)
        self.step += 1
        for name, value in means.items():
            self._means[name] = [*self._means.get(name, [])[-199:], torch.as_tensor(value).detach()]

    def due(self, what: str, minutes: float) -> bool:
        """Whether so many minutes have passed since this was last True for `what`; in the first process only."""
        if self.spent - self._last.setdefault(what, self._resumed) < minutes * 60 or RANK > 0:
            return False
        self._last[what] = self.spent
        return True

    def save(self) -> None:
        state = {name: item.state_dict() for name, item in self._saved.items()}
        temporary = self.out / "checkpoint.tmp"
        torch.save(state | {"step": self.step, "spent": self.spent}, temporary)
        temporary.replace(self.out / "checkpoint.pt")

    def line(self, **more: float | str) -> str:
        """Time, step, the means of the last 200 steps, and `more`."""
        means = {name: round(float(torch.stack(values).float().mean()), 4) for name, values in self._means.items()}
        return f"{self.spent / 60:.1f} min, step {self.step}: " + ", ".join(
            f"{name} {value}" for name, value in {**means, **more}.items()
        )

    def _clock(self) -> float:
        """The first process's clock: with clocks of their own the processes would stop at different steps."""
        clock = torch.tensor(self._now() - self._began, dtype=torch.float64)
        if WORLD > 1:
            distributed.broadcast(clock, src=0)
        return float(clock)


def average_gradients(parameters: list[torch.Tensor]) -> None:
    """The mean of all processes' gradients, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / WORLD)
