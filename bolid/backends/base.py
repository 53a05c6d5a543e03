"""The frozen Stable Diffusion base, loaded offline from a diffusers directory (SD 1.x, SDXL, and our tiny one).

Everything here is diffusers' own code; this module only pins down devices, layouts and the scaling of latents.
Shapes: N pictures, C latent channels, (h, w) latent positions, L tokens, E channels of the text states.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bolid.errors import BolidError

if TYPE_CHECKING:
    from bolid.families import Family


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers and transformers talk on stderr about things a user cannot act on; keep only their errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        for logging, on in zip((diffusers_logging, transformers_logging), bars, strict=True):
            if on:
                logging.enable_progress_bar()


def load_base(family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The family's diffusers pipeline, frozen, in eval mode, with no safety checker and no progress bar.

    Raises BolidError when the directory is missing (`Family.require`) or is no diffusers pipeline.
    """
    path = family.require("base")
    import diffusers

    if not (path / "model_index.json").is_file():
        raise BolidError(
            f"{path} is not a diffusers pipeline: it has no model_index.json",
            f"the base of family '{family.name}' must be a directory that diffusers' from_pretrained loads",
        )
    with quiet_diffusers():
        try:
            # No safety checker: it would load a second large network, and the tiny family has none to load.
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(path), local_files_only=True, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BolidError(
                f"the base of family '{family.name}' at {path} does not load: {str(error).splitlines()[0]}",
                f"check the files with: bolid models verify {family.name}",
            ) from error
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    with quiet_diffusers():
        return pipe.to(device)


def set_sampler(pipe: Any, settings: Mapping[str, Any]) -> None:
    """Give `pipe` the diffusers scheduler that a family's `defaults` or `few_steps` name, with the base's own schedule.

    `settings`: "scheduler" is a class of diffusers, by default the base's own; what else there is besides "steps" and
    "guidance" goes to it, like "timestep_spacing".
    """
    import diffusers

    chosen = {key: value for key, value in settings.items() if key not in ("steps", "guidance", "scheduler")}
    if "scheduler" not in settings and not chosen:
        return
    scheduler_class = getattr(diffusers, settings.get("scheduler", type(pipe.scheduler).__name__), None)
    if scheduler_class is None:
        raise BolidError(
            f"the family names the scheduler {settings['scheduler']!r}, which diffusers does not have",
            "name a class of diffusers.schedulers, like LCMScheduler or EulerDiscreteScheduler",
        )
    with quiet_diffusers():
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **chosen)


def load_loras(pipe: Any, loras: Sequence[tuple[Path, float]], family: Family) -> None:
    """Lay LoRAs (safetensors file, weight) over the base, through diffusers and peft.

    Raises BolidError for a file that is no LoRA and for one that does not wholly fit: diffusers itself only logs what
    it could not place, and paints without it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise BolidError(f"{path} is not a safetensors file: {error}", "give a LoRA as .safetensors") from error
        expected = sum(any(mark in key for mark in ("lora_A.", "lora_down.", "lora.down.")) for key in tensors)
        if not expected:
            raise BolidError(
                f"{path} is no LoRA: it has no pairs of small matrices",
                "give a file that peft, diffusers or a kohya trainer has written",
            )
        placed, reason = 0, ""
        with quiet_diffusers():
            try:
                pipe.load_lora_weights(tensors, adapter_name=name)
            except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
        for network in (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            for module in network.modules() if network is not None else ():
                placed += isinstance(module, BaseTunerLayer) and name in getattr(module, "lora_A", {})
        if reason or placed < expected:
            raise BolidError(
                f"the LoRA {path} does not fit the base of family '{family.name}'"
                + (f": {reason}" if reason else f": {placed} of its {expected} layers have a place there"),
                "a LoRA works with the kind of base that it was trained on: choose that --family",
            )
    if loras:
        pipe.set_adapters(names, [weight for _, weight in loras])


def add_controlnet(pipe: Any, family: Family) -> Any:
    """The same pipeline (its very networks, whatever is loaded into them) with the family's openpose ControlNet."""
    path = family.require("controlnet")
    from diffusers import AutoPipelineForText2Image, ControlNetModel

    with quiet_diffusers():
        try:
            network = ControlNetModel.from_pretrained(str(path), local_files_only=True, torch_dtype=pipe.unet.dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BolidError(
                f"the ControlNet {path} does not load: {str(error).splitlines()[0]}",
                "it must be a directory that diffusers' ControlNetModel.from_pretrained loads",
            ) from error
        for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
            theirs, own = network.config[key], pipe.unet.config[key]
            if theirs != own and list(np.atleast_1d(theirs)) != list(np.atleast_1d(own)):
                raise BolidError(
                    f"the ControlNet {path} was made for another base: its {key} is {theirs}, the base's {own}",
                    f"give family '{family.name}' a ControlNet trained on its own base",
                )
        network.requires_grad_(False).eval()
        controlled = AutoPipelineForText2Image.from_pipe(pipe, controlnet=network.to(pipe.device))
        controlled.set_progress_bar_config(disable=True)
        return controlled


@contextlib.contextmanager
def remembered_conditions(pipe: Any) -> Iterator[None]:
    """Inside, what text, face and body contribute is computed once a picture and not once a step.

    A condition is the same tensor at every step, so its keys and values are too. Each layer that sees nothing else
    (`to_k`, `to_v`, `to_k_ip`, `to_v_ip` of the cross-attentions, and the projection of embeds to tokens) keeps its
    last result and gives it back when it is handed the very same tensor. The arithmetic stays diffusers', to the bit.
    """
    from diffusers.models.attention_processor import Attention

    layers: list[Any] = []
    for network in (pipe.unet, getattr(pipe, "controlnet", None)):
        if network is None:
            continue
        layers += [layer for layer in (getattr(network, "encoder_hid_proj", None),) if layer is not None]
        for module in network.modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                layers += [module.to_k, module.to_v]
                layers += [*getattr(module.processor, "to_k_ip", ()), *getattr(module.processor, "to_v_ip", ())]
    originals = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = _remember(layer.forward)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.forward = original


def _remember(compute: Callable[..., Any]) -> Callable[..., Any]:
    last: tuple[Any, Any] = (None, None)  # holding the input too, so that no other object can take its identity

    def forward(condition: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        if last[0] is not condition:
            last = (condition, compute(condition, *args, **kwargs))
        return last[1]

    return forward


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c_tau = Gamma_tau(tau) (BoLID section 3): text states [N, L, E] and SDXL's pooled state [N, P] (else None).

    Through the pipeline's own method, so truncation and padding are those of generation.
    """
    with quiet_diffusers():
        encoded = pipe.encode_prompt(
            prompt=list(prompts), device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return encoded[0], encoded[2] if len(encoded) == 4 else None


def to_pixel_values(images: Sequence[np.ndarray], device: str | torch.device, dtype: torch.dtype) -> torch.Tensor:
    """uint8 HWC 0..255 => float NCHW -1..1."""
    batch = torch.from_numpy(np.stack([np.ascontiguousarray(image) for image in images])).to(device)
    return batch.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0


@torch.no_grad()
def encode_latents(pipe_or_vae: Any, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Equal-sized pictures, uint8 HWC => the posterior's (mean, std), f32 [N, 2, C, h, w], times `scaling_factor`.

    An AutoencoderTiny has no posterior: its std is zero, so sampling from these moments gives its latent back.
    """
    vae = getattr(pipe_or_vae, "vae", pipe_or_vae)
    pixel_values = to_pixel_values(images, vae.device, vae.dtype)
    encoded = vae.encode(pixel_values)
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, std = encoded.latents, torch.zeros_like(encoded.latents)
    return torch.stack([mean, std], dim=1).float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe_or_vae: Any, latents: torch.Tensor) -> list[np.ndarray]:
    """Scaled latents [N, C, h, w] => pictures, uint8 HWC 0..255."""
    vae = getattr(pipe_or_vae, "vae", pipe_or_vae)
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    pixels = vae.decode(latents).sample.float()
    pixels = ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


class LatentEncoder:
    """The base's VAE encoder alone, for caching latents in training shards."""

    def __init__(self, family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        import diffusers

        path = family.require("base")
        with quiet_diffusers():
            index = diffusers.DiffusionPipeline.load_config(str(path), local_files_only=True)
            vae_class = getattr(diffusers, index["vae"][1])
            self.vae = vae_class.from_pretrained(str(path), subfolder="vae", local_files_only=True, torch_dtype=dtype)
        self.vae.requires_grad_(False).eval().to(device)

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Equal-sized pictures, uint8 HWC => f16 [N, 2, C, h, w], see `encode_latents`."""
        return encode_latents(self.vae, images).cpu().numpy().astype(np.float16)

    def decode(self, moments: np.ndarray) -> list[np.ndarray]:
        """Moments [N, 2, C, h, w] => pictures of the means, uint8 HWC."""
        return decode_latents(self.vae, torch.from_numpy(np.asarray(moments, np.float32))[:, 0])
