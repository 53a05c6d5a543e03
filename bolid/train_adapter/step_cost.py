"""What a training step of the adapters takes, counted on tensors without data: bytes at its height, operations.

On torch's meta device nothing is allocated and nothing computed: every operation only says what it would make
(FakeTensorMode gives such tensors the name of a device, which autocast and attention ask for). So a network of any size
can be counted on any machine, and a small one can be run for real by the same code, which is how the count is tested.
A kernel's own work space is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bolid.method.body_condition import BRANCHES, FACE_DIM, initial_state, install
from bolid.train_adapter.precision import computing, store_frozen


@dataclass(frozen=True)
class StepCost:
    """Of one forward and backward pass. Bytes beside the weights."""

    kept: int  # what the forward pass leaves for the backward pass
    peak: int  # at the height of both, the gradients of what is trained included
    flops: int | None  # floating-point operations, two for a multiplication with its addition; None: not counted


class LiveBytes(TorchDispatchMode):
    """Follows the memory of every tensor that is made inside, from its making to its end: `now` and `peak`, bytes."""

    def __init__(self, outside: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _end(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


@contextlib.contextmanager
def computing_like(device: str, network: torch.nn.Module, precision: str, positions: int) -> Iterator[None]:
    """`computing` as on `device`, whatever device there is.

    CUDA's autocast computes norms in float32; the CPU's, under which the counting runs, does not by itself.
    """
    if torch.device(device).type == "cpu":
        with computing("cpu", precision, positions):
            yield
        return
    half = precision != "fp32"
    norms = [m for m in network.modules() if half and isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),)) for norm in norms]
    try:
        with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16, enabled=half):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def adapted_network(
    settings: dict[str, Any], body_dim: int, *, face_tokens: int, kv_rank: int = 0, precision: str = "fp32",
    gradient_checkpointing: bool = False, learns: Callable[[str], bool] = lambda branch: True,
) -> tuple[Any, list[torch.nn.Parameter]]:  # fmt: skip
    """(UNet of these settings with both branches, as in training; the parameters that learn), on the meta device."""
    from diffusers import UNet2DConditionModel

    from bolid.backends.diffusion import quiet_diffusers

    with quiet_diffusers(), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings).requires_grad_(False).eval()
        states = [
            initial_state(unet, "face", FACE_DIM, tokens=face_tokens, kv_rank=kv_rank),
            initial_state(unet, "body", body_dim, kv_rank=kv_rank),
        ]
        branches = dict(zip(BRANCHES, install(unet, states), strict=True))
        for parameter in [parameter for branch in branches.values() for parameter in branch.values()]:
            parameter.requires_grad_(True)
        store_frozen(unet, precision)
        for name, branch in branches.items():
            for parameter in branch.values():
                parameter.requires_grad_(learns(name))
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, [parameter for parameter in unet.parameters() if parameter.requires_grad]


def pooled_width(settings: Any) -> int:
    """Numbers of SDXL's pooled text state; 0 for a base without."""
    if settings.addition_embed_type != "text_time":
        return 0
    return settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim


def text_state_width(settings: Any, length: int) -> int:
    """Numbers in the text states of a caption of `length` tokens, for a UNet with these settings."""
    return length * settings.cross_attention_dim + pooled_width(settings)


def unet_inputs(unet: Any, latent_shape: Sequence[int], text_length: int, batch: int) -> tuple[Any, ...]:
    """(latents, timesteps, {"encoder_hidden_states", "added_cond_kwargs"}): zeros; for both branches if it has them."""
    settings = unet.config
    added: dict[str, Any] = {}
    if unet.encoder_hid_proj is not None:
        body_dim = unet.encoder_hid_proj.image_projection_layers[1].image_embeds.in_features
        added["image_embeds"] = [torch.zeros(batch, 1, dim) for dim in (FACE_DIM, body_dim)]
    if pooled := pooled_width(settings):
        added |= {"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)}
    text = torch.zeros(batch, text_length, settings.cross_attention_dim)
    latents, timesteps = torch.zeros(batch, *latent_shape), torch.zeros(batch, dtype=torch.long)
    return latents, timesteps, {"encoder_hidden_states": text, "added_cond_kwargs": added}


@contextlib.contextmanager
def without_data(unet: Any) -> Iterator[None]:
    """Inside, FakeTensorMode with `unet`'s parameters in it; nothing for a network that is not on the meta device."""
    if not unet.conv_in.weight.is_meta:
        yield
        return
    places = [(m, name, p) for m in unet.modules() for name, p in m.named_parameters(recurse=False)]
    with FakeTensorMode():
        for module, name, old in places:
            setattr(module, name, torch.nn.Parameter(torch.zeros(old.shape, dtype=old.dtype), old.requires_grad))
        try:
            yield
        finally:
            for module, name, old in places:
                setattr(module, name, old)


def step_cost(
    unet: Any, latent_shape: Sequence[int], text_length: int, batch: int, precision: str, device: str = "cuda",
    flops: bool = False,
) -> StepCost:  # fmt: skip
    """Forward and backward pass of `adapted_network`'s UNet (or of a real one like it, which really computes).

    On `batch` latents (C, h, w), as on a `device` with attention kernels that keep no attention maps.
    """
    from torch.utils.flop_counter import FlopCounterMode

    positions = latent_shape[-2] * latent_shape[-1]
    inputs = (latent_shape, text_length, batch)
    with without_data(unet):
        with LiveBytes(list(unet.parameters())) as live, computing_like(device, unet, precision, positions):
            kept = _pass_through(unet, *inputs, live)
        if not flops:
            return StepCost(kept, live.peak, None)
        # In a pass of its own: what the counter itself holds on to, under checkpointing, would be counted as memory.
        with FlopCounterMode(display=False) as counter, computing_like(device, unet, precision, positions):
            _pass_through(unet, *inputs)
    return StepCost(kept, live.peak, counter.get_total_flops())


def _pass_through(
    unet: Any, latent_shape: Sequence[int], text_length: int, batch: int, live: LiveBytes | None = None
) -> int:
    """Forward and backward; what was live between them."""
    latents, timesteps, conditions = unet_inputs(unet, latent_shape, text_length, batch)
    loss = unet(latents, timesteps, **conditions).sample.float().square().mean()
    kept = live.now if live else 0
    loss.backward()
    for parameter in unet.parameters():
        parameter.grad = None
    return kept
