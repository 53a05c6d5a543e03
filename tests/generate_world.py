"""What the tests of `bolid generate` share: a random base with both branches and two profiles, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from small_base import make_body_encoder, make_family

from bolid.formats.adapter import flat_tensors, save_adapter
from bolid.formats.profile import save_profile
from bolid.generate import generate
from bolid.method.body_condition import initial_state
from bolid.models.families import get_family
from bolid.run import run_record, sha256_file

PROMPTS = ["a photo of a woman", "a man on a beach"]
BODY = torch.ones(8)
FACE = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)


class World(NamedTuple):
    family: str
    adapter: Path  # folder
    me: Path  # a profile of FACE and BODY
    faceless: Path  # one of BODY


def make_world(root: Path, sdxl: bool = False, inputs: dict[str, str] | None = None, settings: str = "") -> World:
    """`settings`: lines for the family's file. `inputs`: for the records of adapters and profiles."""
    family = make_family(root, sdxl=sdxl)
    encoder = make_body_encoder(root / "enc.safetensors", family)
    with open(family, "a") as file:
        paths = {"body_encoder": encoder, "controlnet": root / "controlnet", "few_steps_lora": root / "few.safetensors"}
        file.write("".join(f"{name} = '{path}'\n" for name, path in paths.items()) + settings)
    inputs = {"body_encoder": sha256_file(encoder), **(inputs or {})}
    unet = diffusers.UNet2DConditionModel.from_pretrained(get_family(family).base, subfolder="unet")
    generator = torch.Generator().manual_seed(0)
    for branch, dim in (("face", 512), ("body", 8)):
        state = initial_state(unet, branch, dim, tokens=2) if branch == "face" else initial_state(unet, branch, dim)
        for name, tensor in state["ip_adapter"].items():
            if "to_v_ip" in name:
                state["ip_adapter"][name] = torch.randn(tensor.shape, generator=generator)
        record = run_record(f"{branch}-adapter", family=family, inputs=inputs)
        save_adapter(root / "adapter" / f"{branch}.safetensors", flat_tensors(state), record)
    record = run_record("profile", family=family, inputs={**inputs, "photo_000": "ab" * 32})
    for name, face in (("me", FACE), ("faceless", None)):
        save_profile(root / f"{name}.safetensors", BODY, torch.zeros(8), face, torch.ones(1), record)
    return World(family, root / "adapter", root / "me.safetensors", root / "faceless.safetensors")


def make_pictures(world: World, out: Path, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[np.ndarray]:
    """By `generate`, with the world's adapters and seed 4."""
    options = {"adapter": world.adapter, "family": world.family, "device": "cpu", "seed": 4} | options
    return [np.asarray(Image.open(path)) for path in generate(prompts, out, **options)]


def read_picture(path: Path) -> dict:
    """The run record of a PNG."""
    with Image.open(path) as picture:
        return json.loads(picture.text["bolid"])


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def with_adapters(world: World, *branches: str, pipe: Any = None) -> Any:
    """The base with branches (by default both) as diffusers alone loads them."""
    from bolid.backends.diffusion import load_base

    pipe, branches = pipe or load_base(get_family(world.family)), branches or ("face", "body")
    pipe.load_ip_adapter(
        [str(world.adapter)] * len(branches), subfolder=[""] * len(branches),
        weight_name=[f"{branch}.safetensors" for branch in branches], image_encoder_folder=None,
    )  # fmt: skip
    return pipe


def random_controlnet(unet: Any, channels: Sequence[int] = (8, 8, 16)) -> Any:
    """A ControlNet for a UNet without branches, whose residuals are not 0. `channels`: one more than the times that
    the VAE halves a picture."""
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=tuple(channels))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def save_lora(
    path: Path, unet: Any, seed: int = 0, name: str = "attn2.to_q", rank: int = 2, prefix: str = "unet."
) -> Path:
    """A LoRA on every layer of that name, as peft writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, module in unet.named_modules():
        if key.endswith(name):
            out, inside = module.weight.shape[:2]
            tensors[f"{prefix}{key}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
            tensors[f"{prefix}{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    save_file(tensors, path)
    return path
