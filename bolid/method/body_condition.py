"""The face and the body branch: two IP-Adapters in diffusers' own layout (BoLID section 5.3).

    Z' = Attn(Q, K_text, V_text) + face_scale * Attn(Q, K_face, V_face) + body_scale * Attn(Q, K_body, V_body)

The attention itself is diffusers' `IPAdapterAttnProcessor2_0`, in training and in generation alike: this file only
says how the branches start, what the null condition is, and how embeds are handed to a pipeline.

Shapes: B batch, D body dimension, F = 512 face dimension, S tokens of a branch, C context channels of the UNet.
A *state* is the dict {"image_proj": {...}, "ip_adapter": {...}} that `load_ip_adapter` takes. In training its key and
value matrices `N.to_k_ip.weight` [hidden, C] may be two thin ones instead, `N.to_k_ip.down.weight` [R, C] and
`N.to_k_ip.up.weight` [hidden, R] of rank R; `merge_kv` multiplies them out for the file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

BRANCHES = ("face", "body")  # the order in every list: adapters, embeds and scales
FACE_DIM = 512
BODY_TOKENS = 4  # fixed by the basic IP-Adapter layout

State = dict[str, dict[str, torch.Tensor]]


def null_condition(embeds: torch.Tensor) -> torch.Tensor:
    """The null condition: zero embeds. Dropout in training and guidance (BoLID Eq. 13) both use this one.

    Zero *embeds*, not zero tokens: LayerNorm's bias makes their tokens differ from zero, and both sides must agree.
    """
    return torch.zeros_like(embeds)


def drop_condition(embeds: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """Replace the rows of `embeds` [B, ...] where `drop` [B] is true by the null condition."""
    keep = drop.view(-1, *[1] * (embeds.ndim - 1)).logical_not()
    return torch.where(keep, embeds, null_condition(embeds))


# ---- how the branches start ---------------------------------------------------------------------------------------


def _cross_attention_sizes(unet: nn.Module) -> list[tuple[str, int, int]]:
    """(number, context channels, hidden channels) of every cross-attention, in the layout's order: 1, 3, 5, ..."""
    modules = dict(unet.named_modules())
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    sizes = []
    for i, name in enumerate(names):
        to_k = modules[name.removesuffix(".processor")].to_k
        sizes.append((str(2 * i + 1), to_k.in_features, to_k.out_features))
    return sizes


def _linear(out_features: int, in_features: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """torch's own initialisation of a linear layer, from a generator of ours."""
    bound = 1 / math.sqrt(in_features)
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return {"weight": weight, "bias": bias}


def initial_state(
    unet: nn.Module, branch: str, dim: int, *, tokens: int = BODY_TOKENS, hidden_mult: int = 1, seed: int = 0,
    kv_rank: int = 0,
) -> State:  # fmt: skip
    """An untrained branch that changes nothing: every `to_v_ip` is zero, so its attention adds exactly 0.

    Gradients still reach `to_v_ip` (they need only the tokens), and from the first step on everything else.
    body: the basic layout, one linear layer [4C, D] and a norm. face: the FaceID "portrait" layout, two linear
    layers with a GELU between and a norm, `tokens` tokens, hidden width `hidden_mult` * F.
    `kv_rank`: keys and values through two thin matrices of that rank; 0: through full ones.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = _cross_attention_sizes(unet)
    context = sizes[0][1]
    layers: dict[str, dict[str, torch.Tensor]]
    if branch == "body":
        layers = {"proj": _linear(BODY_TOKENS * context, dim, generator)}
    elif branch == "face":
        layers = {
            "proj.0": _linear(dim * hidden_mult, dim, generator),
            "proj.2": _linear(tokens * context, dim * hidden_mult, generator),
        }
    else:
        raise ValueError(f"a branch is one of {BRANCHES}, not {branch!r}")
    layers["norm"] = {"weight": torch.ones(context), "bias": torch.zeros(context)}
    image_proj = {f"{layer}.{name}": value for layer, values in layers.items() for name, value in values.items()}
    ip_adapter = {}
    for number, context_dim, hidden_dim in sizes:
        if kv_rank:
            # Such that up @ down has entries of the variance that a full matrix starts with, 1 / (3 C).
            bound = math.sqrt(3 / kv_rank)
            up = torch.empty(hidden_dim, kv_rank).uniform_(-bound, bound, generator=generator)
            for name, start in (("to_k_ip", up), ("to_v_ip", torch.zeros(hidden_dim, kv_rank))):
                ip_adapter[f"{number}.{name}.down.weight"] = _linear(kv_rank, context_dim, generator)["weight"]
                ip_adapter[f"{number}.{name}.up.weight"] = start
            continue
        ip_adapter[f"{number}.to_k_ip.weight"] = _linear(hidden_dim, context_dim, generator)["weight"]
        ip_adapter[f"{number}.to_v_ip.weight"] = torch.zeros(hidden_dim, context_dim)
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


# ---- keys and values of low rank ----------------------------------------------------------------------------------


def largest_kv_rank(unet: nn.Module) -> int:
    """The largest rank at which two thin matrices hold less than the full one, in every cross-attention of `unet`."""
    return min((c * hidden - 1) // (c + hidden) for _, c, hidden in _cross_attention_sizes(unet))


def factorise_kv(state: State, rank: int) -> State:
    """The same branch with keys and values of rank `rank`: the nearest there is (Eckart and Young, 1936).

    `down` gets orthonormal rows, so that training can move even a matrix of zeros.
    """
    ip_adapter = {}
    for name, weight in state["ip_adapter"].items():
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        ip_adapter[name.replace(".weight", ".down.weight")] = vh[:rank].contiguous()
        ip_adapter[name.replace(".weight", ".up.weight")] = u[:, :rank] * s[:rank]
    return {"image_proj": state["image_proj"], "ip_adapter": ip_adapter}


def merge_kv(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A branch's tensors by name, its thin matrices multiplied out: `up @ down` under the stock layout's name."""
    merged = {}
    for name, tensor in tensors.items():
        if name.endswith(".down.weight"):
            stem = name.removesuffix(".down.weight")
            merged[f"{stem}.weight"] = tensors[f"{stem}.up.weight"] @ tensor
        elif not name.endswith(".up.weight"):
            merged[name] = tensor
    return merged


def _thin(down: torch.Tensor, up: torch.Tensor) -> nn.Sequential:
    """up @ down @ x."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, weight in (("down", down), ("up", up)):
        layers[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layers[name].weight = nn.Parameter(weight.detach().clone())
    return nn.Sequential(layers)


def _full_shapes(state: State) -> State:
    """For diffusers' loader: `state` with zeros that take no memory in place of thin matrices."""
    ip_adapter = {}
    for name, tensor in state["ip_adapter"].items():
        if name.endswith(".down.weight"):
            stem = name.removesuffix(".down.weight")
            hidden = state["ip_adapter"][f"{stem}.up.weight"].shape[0]
            ip_adapter[f"{stem}.weight"] = tensor.new_zeros(1, 1).expand(hidden, tensor.shape[1])
        elif not name.endswith(".up.weight"):
            ip_adapter[name] = tensor
    return {"image_proj": state["image_proj"], "ip_adapter": ip_adapter}


# ---- into a UNet and out again ------------------------------------------------------------------------------------


def install(unet: nn.Module, states: list[State]) -> list[dict[str, nn.Parameter]]:
    """Put branches into `unet` through diffusers' own loader and return their parameters under the layout's names.

    Returns one dict per state, {"image_proj.norm.weight": Parameter, ..., "ip_adapter.1.to_k_ip.weight": ...}. Being
    the very tensors of the UNet, they are what to train and, through `merge_kv`, what to export.
    """
    unet._load_ip_adapter_weights([_full_shapes(state) for state in states], low_cpu_mem_usage=False)
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
    unet.encoder_hid_proj.to(device, dtype)
    processors = [p for name, p in unet.attn_processors.items() if not name.endswith("attn1.processor")]
    for index in range(len(states)):
        for i, processor in enumerate(processors):
            for kind, layers in (("to_k_ip", processor.to_k_ip), ("to_v_ip", processor.to_v_ip)):
                number, weights = 2 * i + 1, states[index]["ip_adapter"]
                if (down := weights.get(f"{number}.{kind}.down.weight")) is not None:
                    layers[index] = _thin(down, weights[f"{number}.{kind}.up.weight"])
                layers[index].to(device, dtype)
    return branch_parameters(unet, len(states))


def branch_parameters(unet: nn.Module, count: int) -> list[dict[str, nn.Parameter]]:
    """The parameters of the first `count` branches that are installed in `unet`, under the layout's names."""
    processors = [p for name, p in unet.attn_processors.items() if not name.endswith("attn1.processor")]
    parameters = []
    for index in range(count):
        branch: dict[str, nn.Parameter] = {}
        for name, parameter in unet.encoder_hid_proj.image_projection_layers[index].named_parameters():
            branch["image_proj." + _layout_name(name)] = parameter
        for i, processor in enumerate(processors):
            for kind, layers in (("to_k_ip", processor.to_k_ip), ("to_v_ip", processor.to_v_ip)):
                for name, parameter in layers[index].named_parameters():
                    branch[f"ip_adapter.{2 * i + 1}.{kind}.{name}"] = parameter
        parameters.append(branch)
    return parameters


def _layout_name(name: str) -> str:
    """diffusers' name of an image projection's parameter -> its name in an IP-Adapter file."""
    for ours, theirs in (("proj.0", "ff.net.0.proj"), ("proj.2", "ff.net.2"), ("proj", "image_embeds")):
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    return name


# ---- embeds for a pipeline ----------------------------------------------------------------------------------------


def build_ip_adapter_image_embeds(embeds: list[torch.Tensor], *, guidance: bool, batch: int = 1) -> list[torch.Tensor]:
    """One person's vectors, a list of [dim] -> `ip_adapter_image_embeds` for a call of a pipeline.

    With guidance each entry is [2 * batch, 1, dim], the null condition first; without it [batch, 1, dim].
    Leave `batch` at 1 for a pipeline, however many prompts it gets: it repeats the rows for each of them itself. With
    `batch` rows it would make batch^2 of them, and every prompt attends to its person's tokens `batch` times over: the
    same result but for rounding, for much more work. A bare UNet wants one row for each of its inputs.
    Two misuses give wrong pictures and no error in diffusers, and are refused here (ValueError):
    - several identities in one call: with more than one picture per prompt, diffusers repeats the embeds as
      a, b, a, b but the prompts as a, a, b, b, so people swap places. Call once per person instead.
    - negative and positive rows handed over with guidance off: both are then read as pictures of the person.
      So this takes bare vectors and adds the null rows itself, exactly when `guidance` is on.
    """
    result = []
    for vector in embeds:
        if vector.ndim != 1:
            raise ValueError(
                f"give one vector [dim] per branch, of one person and without null rows, not {list(vector.shape)}"
            )
        positive = vector[None, None].expand(batch, 1, -1)
        result.append(torch.cat([null_condition(positive), positive]) if guidance else positive.contiguous())
    return result
