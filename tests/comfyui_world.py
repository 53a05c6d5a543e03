"""A small world for ComfyUI, made and used by a Python that has it; COMFYUI_PATH names ComfyUI's folder.

    python comfyui_world.py FOLDER

makes ComfyUI's base directory: a random checkpoint of SD 1.5's architecture with two levels instead of four and a tiny
autoencoder, an adapter with both branches, a profile.

    python comfyui_world.py FOLDER compare

prints, as JSON, how far ComfyUI's predictions with the nodes are from those of diffusers with the adapter files.
`orders` instead of `compare` lists the cross-attentions of the full-size architectures.
"""

# ruff: noqa: E402 (ComfyUI reads the command line when it is imported)
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ARGUMENTS = sys.argv[1:]
FOLDER = Path(ARGUMENTS[0])
sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(FOLDER)]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bolid.comfyui.branches import cross_attentions
from bolid.comfyui.nodes import ApplyProfile
from bolid.formats.adapter import flat_tensors, load_adapter, nested_state_dict, save_adapter
from bolid.formats.profile import save_profile
from bolid.method.body_condition import build_ip_adapter_image_embeds, initial_state
from bolid.run import run_record

CONFIG = {
    "sample_size": 8, "block_out_channels": (320, 640), "layers_per_block": 1, "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "attention_head_dim": 8,
}  # fmt: skip
COMFY_CONFIG = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
}  # fmt: skip
BODY_DIM, FACE_TOKENS = 12, 4
INPUTS = {"body_encoder": "e" * 64, "face_model": "f" * 64}


def make_world() -> None:
    torch.manual_seed(0)
    for name in ("models/checkpoints", "models/bolid/test", "input", "output", "custom_nodes"):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    unet = UNet2DConditionModel(**CONFIG)
    unet.save_pretrained(FOLDER / "unet")
    state = unet.state_dict()
    names = comfy.utils.unet_to_diffusers(COMFY_CONFIG)
    tensors = {f"model.diffusion_model.{ours}": state[theirs] for theirs, ours in names.items() if theirs in state}
    if len(tensors) != len(state):
        raise ValueError("not every tensor of the UNet has a name in ComfyUI")
    tensors |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text_encoder().items()}
    autoencoder = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    tensors |= {f"first_stage_model.{name}": started(value) for name, value in autoencoder.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, FOLDER / "models/checkpoints/small.safetensors")
    for branch, dim in (("face", 512), ("body", BODY_DIM)):
        nested = initial_state(unet, branch, dim, **({"tokens": FACE_TOKENS} if branch == "face" else {}))
        for name, tensor in nested["ip_adapter"].items():
            nested["ip_adapter"][name] = 0.1 * torch.randn(tensor.shape)
        record = run_record(f"{branch}-adapter", family="sd15", inputs=INPUTS)
        save_adapter(FOLDER / f"models/bolid/test/{branch}.safetensors", flat_tensors(nested), record)
    face = torch.nn.functional.normalize(torch.randn(512), dim=0)
    record = run_record("profile", family="sd15", inputs=INPUTS)
    save_profile(
        FOLDER / "input/me.safetensors", torch.randn(BODY_DIM), torch.zeros(BODY_DIM), face, torch.ones(1), record
    )


def started(tensor: torch.Tensor) -> torch.Tensor:
    """A layer's weights: ComfyUI leaves them as the memory was."""
    if tensor.ndim < 2:
        return torch.ones_like(tensor) if tensor.ndim == 0 else torch.zeros_like(tensor)
    return torch.randn(tensor.shape) / tensor[0].numel() ** 0.5


def text_encoder() -> dict[str, torch.Tensor]:
    """CLIP ViT-L's text encoder, random, in half precision."""
    width, layers = 768, 12

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape)).half()

    found = {
        "embeddings.token_embedding.weight": random(49408, width),
        "embeddings.position_embedding.weight": random(77, width),
    }
    norms = ["final_layer_norm"] + [f"encoder.layers.{i}.layer_norm{j}" for i in range(layers) for j in (1, 2)]
    for name in norms:
        found |= {f"{name}.weight": torch.ones(width).half(), f"{name}.bias": torch.zeros(width).half()}
    for i in range(layers):
        sizes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for name, size in (sizes | {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}).items():
            found[f"encoder.layers.{i}.{name}.weight"] = random(*size)
            found[f"encoder.layers.{i}.{name}.bias"] = random(size[0])
    return found


class Diffusers:
    """The same UNet with both branches, as diffusers loads and scales them."""

    def __init__(self) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(FOLDER / "unet")
        files = [FOLDER / f"models/bolid/test/{branch}.safetensors" for branch in ("face", "body")]
        states = [nested_state_dict(load_adapter(f, f.stem)[0]) for f in files]
        self.unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
        profile = load_file(FOLDER / "input/me.safetensors")
        self.embeds = build_ip_adapter_image_embeds([profile["face"], profile["body_mean"]], guidance=True)

    @torch.no_grad()
    def predict(self, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor, scales: list[float]) -> torch.Tensor:
        """eps of [uncond, cond]."""
        for processor in self.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = list(scales)
        return self.unet(z, t, text, added_cond_kwargs={"image_embeds": self.embeds}).sample


def compare() -> dict[str, float]:
    model = comfy.sd.load_checkpoint_guess_config(
        str(FOLDER / "models/checkpoints/small.safetensors"), output_vae=False, output_clip=False
    )[0]
    theirs, profile = Diffusers(), FOLDER / "input/me.safetensors"

    def applied(face: float, body: float, start: float = 0.0, end: float = 1.0, base=model, mask=None):
        return ApplyProfile().apply(base, profile, "test", face, body, start, end, mask)[0]

    generator = torch.Generator().manual_seed(1)
    noise, text = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(2, 77, 768, generator=generator)
    sampling = model.model.model_sampling
    found = {}
    for face, body in ((0.7, 1.2), (0.0, 1.0), (1.0, 0.0)):
        patched = applied(face, body)
        comfy.model_management.load_models_gpu([patched])
        for sigma in (0.1, 1.0, 12.0):
            sigmas = torch.full((2,), sigma)
            options = {**patched.model_options["transformer_options"], "cond_or_uncond": [1, 0], "sigmas": sigmas}
            with torch.no_grad():
                x0 = patched.model.apply_model(noise * sigma, sigmas, c_crossattn=text, transformer_options=options)
            ours = (noise * sigma - x0) / sigma
            z = sampling.calculate_input(sigmas, noise * sigma)
            wanted = theirs.predict(z, sampling.timestep(sigmas)[0], text, [face, body])
            plain = theirs.predict(z, sampling.timestep(sigmas)[0], text, [0.0, 0.0])
            found[f"{face} {body} at {sigma}"] = float((ours - wanted).abs().max())
            found[f"effect of {face} {body} at {sigma}"] = float((plain - wanted).abs().max())

    # A mask of nothing is the bare model; two halves of one person are the person.
    half = torch.zeros(1, 64, 48)
    half[:, :32] = 1
    sigmas, z = torch.full((2,), 1.0), sampling.calculate_input(torch.full((2,), 1.0), noise)
    for name, patched, scales in (
        ("mask of nothing", applied(0.7, 1.2, mask=torch.zeros(1, 64, 48)), [0.0, 0.0]),
        ("two halves", applied(0.7, 1.2, mask=1 - half, base=applied(0.7, 1.2, mask=half)), [0.7, 1.2]),
    ):
        comfy.model_management.load_models_gpu([patched])
        options = {**patched.model_options["transformer_options"], "cond_or_uncond": [1, 0], "sigmas": sigmas}
        with torch.no_grad():
            x0 = patched.model.apply_model(noise, sigmas, c_crossattn=text, transformer_options=options)
        wanted = theirs.predict(z, sampling.timestep(sigmas)[0], text, scales)
        found[name] = float((noise - x0 - wanted).abs().max())

    # A whole sampling with guidance, the branches in the first half of the steps; by both, and twice in a row.
    steps, cfg = 4, 5.0
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    cond, uncond = [[text[1:], {}]], [[text[:1], {}]]
    for name, patched, scales in (
        ("sampled", applied(0.7, 1.2, 0.0, 0.5), [0.7, 1.2]),
        ("sampled, applied twice", applied(0.4, 0.2, 0.0, 0.5, applied(0.3, 1.0, 0.0, 0.5)), [0.7, 1.2]),
    ):
        ours = comfy.sample.sample(
            patched, noise[:1], steps, cfg, "euler", "normal", cond, uncond, torch.zeros(1, 4, 8, 6), seed=3
        )
        z = sampling.noise_scaling(sigmas[0], noise[:1], torch.zeros(1, 4, 8, 6), True)
        for step in range(steps):
            both = sampling.calculate_input(sigmas[step : step + 1], z).repeat(2, 1, 1, 1)
            weights = scales if step < steps / 2 else [0.0, 0.0]
            u, c = theirs.predict(both, sampling.timestep(sigmas[step]), text, weights).chunk(2)
            z = z + (u + cfg * (c - u)) * (sigmas[step + 1] - sigmas[step])
        wanted = model.model.process_latent_out(z)
        found[name] = float((ours - wanted).abs().max() / wanted.abs().max())
    return found


FULL_SIZE: dict[str, tuple[dict, dict]] = {
    "sd15": (
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
         "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768,
         "num_heads": 8},
    ),
    "sdxl": (
        {"cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
         "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
         "context_dim": 2048, "num_head_channels": 64, "use_linear_in_transformer": True,
         "num_classes": "sequential", "adm_in_channels": 2816},
    ),
}  # fmt: skip
"""Architecture -> its arguments in diffusers and in ComfyUI."""


def orders() -> dict[str, list]:
    """Of each full-size architecture, without weights: [the cross-attentions in an adapter's order, as ComfyUI's own
    table of names has them; the same by `cross_attentions`]."""
    found = {}
    for name, (theirs, ours) in FULL_SIZE.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**theirs)
        names = comfy.utils.unet_to_diffusers(ours)
        wanted = []
        for processor in unet.attn_processors:
            if processor.endswith("attn2.processor"):
                block, *rest = names[processor.replace(".processor", ".to_q.weight")].split(".")
                number = 0 if block == "middle_block" else int(rest[0])
                place = int(rest[rest.index("transformer_blocks") + 1])
                width = unet.get_submodule(processor.removesuffix(".processor")).to_q.weight.shape[0]
                wanted.append([[block.split("_")[0], number, place], width])
        model = UNetModel(
            image_size=32, in_channels=4, model_channels=320, out_channels=4, use_spatial_transformer=True,
            device="meta", operations=comfy.ops.disable_weight_init, **{k: list(v) if isinstance(v, list) else v
                                                                        for k, v in ours.items()},
        )  # fmt: skip
        found[name] = [wanted, cross_attentions(model)]
    return found


if __name__ == "__main__":
    if ARGUMENTS[1:] == ["compare"]:
        print(json.dumps(compare()))
    elif ARGUMENTS[1:] == ["orders"]:
        print(json.dumps(orders()))
    else:
        make_world()
