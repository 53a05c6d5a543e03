"""The face and the body branch as patches of the cross-attentions of ComfyUI's own SD and SDXL models.

    Z' = Attn(Q, K_text, V_text) + face_scale * Attn(Q, K_face, V_face) + body_scale * Attn(Q, K_body, V_body)

(BoLID section 5.3.) Text, LoRAs, ControlNets and samplers stay ComfyUI's. Keys and values of a person are computed
once, here, so the adapter's weights never reach the accelerator.

Shapes: D vector, S tokens, C channels of a token, H channels of the attention, N rows of a batch, P latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bolid.errors import BolidError
from bolid.scales import Scale

PARTS = {"input": "down", "output": "up", "middle": "mid"}
"""ComfyUI's blocks, in the order in which diffusers lists its attention processors, and the parts of `Scale`."""

Layer = tuple[str, int, int]
"""A cross-attention: its block, the block's number, and its place in the block."""


@dataclass(frozen=True)
class Branch:
    """One branch for one person. `keys_values`: K and V [2, S, H] of each cross-attention: the null condition's, then
    the person's."""

    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    scale: Scale
    mask: torch.Tensor | None = None  # f32 [1, height, width] in 0..1: where the person is shown


def make_branch(
    tensors: Mapping[str, torch.Tensor], vector: torch.Tensor, scale: Scale, mask: torch.Tensor | None = None
) -> Branch:
    """The branch of an adapter file (`bolid.formats.adapter`) for a person's vector [D]."""
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    tokens = project(weights, torch.stack([torch.zeros_like(vector), vector]).float())
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("ip_adapter.")})
    return Branch(
        [
            (tokens @ weights[f"ip_adapter.{i}.to_k_ip.weight"].T, tokens @ weights[f"ip_adapter.{i}.to_v_ip.weight"].T)
            for i in numbers
        ],
        scale,
        mask,
    )


def project(weights: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Tokens [N, S, C] of vectors [N, D]: the basic projection (body) or FaceID "portrait" (face)."""
    norm = {name: weights[f"image_proj.norm.{name}"] for name in ("weight", "bias")}
    if "image_proj.proj.weight" in weights:
        tokens = F.linear(vectors, weights["image_proj.proj.weight"], weights["image_proj.proj.bias"])
    else:
        hidden = F.gelu(F.linear(vectors, weights["image_proj.proj.0.weight"], weights["image_proj.proj.0.bias"]))
        tokens = F.linear(hidden, weights["image_proj.proj.2.weight"], weights["image_proj.proj.2.bias"])
    channels = len(norm["weight"])
    return F.layer_norm(tokens.view(len(vectors), -1, channels), (channels,), **norm)


def cross_attentions(unet: Any) -> list[tuple[Layer, int]]:
    """(layer, its channels H) of each cross-attention of ComfyUI's UNetModel, in the order of an adapter's numbers."""
    blocks = {"input": unet.input_blocks, "output": unet.output_blocks, "middle": [unet.middle_block]}
    found = []
    for name in PARTS:
        for number, block in enumerate(blocks[name]):
            for module in block:
                for place, layer in enumerate(getattr(module, "transformer_blocks", ())):
                    found.append(((name, number, place), layer.attn2.to_q.weight.shape[0]))
    return found


def apply_branches(model: Any, branches: Sequence[Branch]) -> Any:
    """A clone of ComfyUI's MODEL whose cross-attentions have the branches too; other patches of them stay.

    Raises BolidError for a model without SD's UNet, and for an adapter of another base.
    """
    unet = getattr(model.model, "diffusion_model", None)
    if not hasattr(unet, "input_blocks") or not hasattr(unet, "middle_block"):
        raise BolidError("this model is no SD 1.5 or SDXL: it has no UNet", "load a checkpoint of the adapter's base")
    layers = cross_attentions(unet)
    for branch in branches:
        widths = [key.shape[-1] for key, _ in branch.keys_values]
        if widths != [width for _, width in layers]:
            raise BolidError(
                f"the adapter is for another base: it has {len(widths)} cross-attentions of {_range(widths)} channels, "
                f"the model {len(layers)} of {_range([width for _, width in layers])}",
                "load a checkpoint of the base that the adapter was trained on",
            )
    patched = model.clone()
    replaced = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for i, (layer, _) in enumerate(layers):
        before = replaced.get(layer, replaced.get(layer[:2]))
        own = [(branch.scale, branch.mask, *branch.keys_values[i]) for branch in branches]
        patched.set_model_attn2_replace(BranchAttention(PARTS[layer[0]], own, before), *layer)
    return patched


def _range(widths: Sequence[int]) -> str:
    return f"{min(widths)} to {max(widths)}" if widths else "no"


class BranchAttention:
    """The cross-attention of one layer. `before`: the patch that was there, or None for ComfyUI's own attention."""

    def __init__(
        self,
        part: str,
        branches: Sequence[tuple[Scale, torch.Tensor | None, torch.Tensor, torch.Tensor]],
        before: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.part, self.branches, self.before = part, branches, before
        self._cached: tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]] = (None, [])

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Z' [N, P, H] of Q [N, P, H] and the text's K and V [N, L, H]."""
        from comfy.ldm.modules.attention import optimized_attention

        heads, precision = options["n_heads"], options.get("attn_precision")
        if self.before is not None:
            z = self.before(q, k, v, options)
        else:
            z = optimized_attention(q, k, v, heads, attn_precision=precision)
        rows = _rows(len(q), options.get("cond_or_uncond") or [0])
        for (scale, mask, _, _), (key, value) in zip(self.branches, self._on(q), strict=True):
            if weight := weight_now(scale, self.part, options):
                shown = optimized_attention(q, key[rows], value[rows], heads, attn_precision=precision)
                if mask is not None:
                    shown = shown * at_positions(mask, q.shape[1], options["original_shape"][-2:]).to(q)
                z = z + weight * shown
        return z

    def _on(self, q: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values where q is, in its precision."""
        place = q.device, q.dtype
        if self._cached[0] != place:
            self._cached = place, [(key.to(*place), value.to(*place)) for _, _, key, value in self.branches]
        return self._cached[1]


def at_positions(mask: torch.Tensor, count: int, size: Sequence[int]) -> torch.Tensor:
    """A mask [1, height, width] at the `count` positions of an attention, [1, P, 1]; `size`: (h, w) of the latents."""
    height, width = size
    while height * width > count:  # every level of the UNet halves both, rounding up
        height, width = -(-height // 2), -(-width // 2)
    return F.interpolate(mask[:1, None].float(), (height, width), mode="area").reshape(1, -1, 1)


def _rows(count: int, kinds: Sequence[int]) -> list[int]:
    """For each row of the batch 1 (the person) or 0 (the null condition). ComfyUI's kinds are 0 (cond) and 1 (uncond),
    one for each equal part of the batch."""
    return [int(kind == 0) for kind in kinds for _ in range(count // len(kinds))]


def weight_now(scale: Scale, part: str, options: Mapping[str, Any]) -> float:
    """A scale's weight in a part of the UNet at the current step, by the noise level `sigmas` in `sample_sigmas`."""
    schedule, now = options.get("sample_sigmas"), options.get("sigmas")
    step, total = 0, 1
    if schedule is not None and now is not None and len(schedule) > 1:
        total = len(schedule) - 1
        # A sampler may evaluate between two levels: that belongs to the step that began last.
        begun = int((schedule[:-1] >= float(now.max()) * (1 - 1e-5)).sum())
        step = max(0, begun - 1)
    weight = scale.at(step, total)
    return weight[part] if isinstance(weight, dict) else weight
