"""How a network learns: the learning-rate schedule and the moving average of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch


def cosine_schedule(step: int, steps: int, *, warmup: float, floor: float) -> float:
    """The learning rate of a step as a fraction of the highest: a linear warm-up, then a cosine (Loshchilov & Hutter
    2017, Eq. 5, without restarts).

    `step`: from 0 to `steps` - 1. `warmup`: steps of the warm-up, at least 1. `floor`: the fraction at the end.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def constant_schedule(step: int, *, warmup: float) -> float:
    """As `cosine_schedule`, but it stays at the highest after the warm-up: it does not depend on how long the training
    is to be, so a finished one can go on.
    """
    return min(1.0, (step + 1) / (warmup + 1))


def adapter_schedule(step: int, steps: int, schedule: str = "cosine") -> float:
    """The adapters' learning rate at a step, as a fraction of the highest.

    "cosine": `cosine_schedule` with 100 steps of warm-up, or 5 % of them if that is less, down to 2 %. "constant":
    `constant_schedule` with 100 steps of warm-up, whatever `steps` is.
    """
    if schedule == "constant":
        return constant_schedule(step, warmup=100.0)
    return cosine_schedule(step, steps, warmup=max(1.0, min(100.0, 0.05 * steps)), floor=0.02)


def update_ema(
    average: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], step: int, decay: float
) -> None:
    """Move `average` towards `parameters`, in place. `step`: steps done, from 1 on; early averages are shorter."""
    decay = min(decay, step / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)


@contextlib.contextmanager
def ema_weights(parameters: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the network computes with the moving average of its weights."""
    _exchange(parameters, average)
    try:
        yield
    finally:
        _exchange(parameters, average)


def _exchange(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in ours.items():
            kept = tensor.detach().clone()
            tensor.copy_(theirs[name])  # in place: FSDP knows its parameters by their memory
            theirs[name].copy_(kept)
