"""What a network is computed in while it trains: autocast, attention kernels, loss scaling and torch.compile's errors.

What is trained, its gradients and the optimizer's state are float32 throughout.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bolid.errors import BolidError


def choose_precision(name: str, device: str) -> str:
    """fp32, bf16 or fp16 for `device`; "auto" is bf16 where the hardware multiplies it, else fp32.

    Raises BolidError for fp16 elsewhere than on CUDA: its gradients need a range that only loss scaling there gives.
    """
    kind = torch.device(device).type
    if name == "fp16" and kind != "cuda":
        raise BolidError(f"--precision fp16 does not train on {kind}", "give --precision bf16 or fp32")
    if name != "auto":
        return name
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


@contextlib.contextmanager
def attention_kernel(device: torch.device, precision: str, positions: int) -> Iterator[None]:
    """Forward and backward pass run inside this (a checkpointed block computes again in the backward pass).

    In bf16 on the CPU torch's flash attention has a slow backward pass (measured: 29 % of a small network's step).
    Plain matrix products are faster where the attention maps are small enough to be kept. In fp32 they are not.
    `positions`: of the latents, h * w.
    """
    if device.type == "cpu" and precision == "bf16" and positions <= 1024:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@contextlib.contextmanager
def computing(device: torch.device | str, precision: str = "auto", positions: int = 0) -> Iterator[None]:
    """The network's forward pass runs inside this: autocast, and `attention_kernel`."""
    device = torch.device(device)
    precision = choose_precision(precision, str(device))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
        with attention_kernel(device, precision, positions):
            yield


def store_frozen(network: torch.nn.Module, precision: str) -> None:
    """Keep frozen layers in the precision that autocast would convert them to at every step: the same numbers.

    Norms, which autocast leaves alone, and everything that is trained stay float32.
    """
    if precision == "fp32":
        return
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(torch.bfloat16 if precision == "bf16" else torch.float16)


class LossScaler:
    """fp16's loss scaling; in the other precisions a plain backward pass and step. `state` is for the checkpoint."""

    def __init__(self, device: str, precision: str) -> None:
        self._scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        self.state = torch.zeros(2, dtype=torch.float64)
        self.remember()

    def remember(self) -> None:
        """Write the scaler's state into `state`."""
        if state := self._scaler.state_dict():
            self.state[0], self.state[1] = state["scale"], state["_growth_tracker"]

    def restore(self) -> None:
        """Take the scaler's state from `state`."""
        if state := self._scaler.state_dict():
            state |= {"scale": float(self.state[0]), "_growth_tracker": int(self.state[1])}
            self._scaler.load_state_dict(state)

    def backward(self, loss: torch.Tensor) -> None:
        """The backward pass of the scaled loss."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], max_grad_norm: float) -> None:
        """Clip the gradients to the norm and take a step; fp16 skips one whose gradients overflow."""
        self._scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self._scaler.step(optimizer)
        self._scaler.update()


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """A failure of torch.compile (mostly: no C++ compiler) as an error that says what to do; its warnings silenced."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch._dynamo")
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise BolidError(
            f"torch.compile failed: {str(error).splitlines()[0]}", "install a C++ compiler, or leave out --compile"
        ) from error
