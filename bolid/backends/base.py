"""The frozen Stable Diffusion base, loaded offline from a diffusers directory (SD 1.x, SDXL, and our tiny one).

Everything here is diffusers' own code; this module only pins down devices, layouts and the scaling of latents.
Shapes: N pictures, C latent channels, (h, w) latent positions, L tokens, E channels of the text states.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
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
