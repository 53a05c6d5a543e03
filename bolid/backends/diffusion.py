"""The frozen Stable Diffusion base (SD 1.x, SDXL, and our tiny one), loaded offline.

From a diffusers directory, or from a single .safetensors file as communities share them. Never from a pickle.

Everything here is diffusers' own code; this module only pins down devices, layouts and the scaling of latents.
Shapes: N pictures, C latent channels, (h, w) latent positions, L tokens, E channels of the text states.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bolid.errors import BolidError
from bolid.formats.tensors import read_header

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from bolid.models.families import Family

SAMPLING = ("steps", "timesteps", "guidance", "face_scale", "body_scale")
"""The keys of a family's `defaults` and `few_steps` that are settings of a call and not of the scheduler."""


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


@contextlib.contextmanager
def loading(what: str, hint: str) -> Iterator[None]:
    """Inside, diffusers loads `what`; whatever goes wrong is a BolidError. It reports wrong files in almost any way."""
    with quiet_diffusers():
        try:
            yield
        except BolidError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BolidError(f"{what} does not load: {reason}", hint) from error


def require_whole(network: torch.nn.Module, path: Path) -> None:
    """BolidError where `path` lacked some of the network's weights: diffusers only logs that, and goes on."""
    if absent := next((name for name, tensor in network.named_parameters() if tensor.is_meta), ""):
        raise BolidError(
            f"{path} is incomplete or of another kind: it has no weights for {absent} of {type(network).__name__}",
            "give the whole of it, or fetch it again",
        )


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The precision of a base: "fp32", "fp16" or "bf16"; "auto" is fp16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        name = "fp16" if torch.device(device).type == "cuda" else "fp32"
    if name not in DTYPES:
        raise BolidError(f"--dtype is {name!r}", f"choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_base(
    family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32, sampler: Mapping[str, Any] | None = None
) -> Any:
    """The family's diffusers pipeline, frozen, in eval mode, with no safety checker and no progress bar.

    The base is a diffusers directory, or one .safetensors file with the configs of `base_config` (or of another
    directory of the same kind). A `unet` that the family has takes the place of the base's own. The VAE stays float32
    whatever `dtype` is: in half precision SDXL's overflows, and others lose detail. `sampler`: the family's `defaults`
    or `few_steps`, whose scheduler (`set_sampler`) takes the place of the base's own, the one that it was trained with.
    Raises BolidError when a file is missing (`Family.require`), damaged, a pickle, or of another kind of base.
    """
    path = family.require("base")
    import diffusers

    settings: dict[str, Any] = {
        # No safety checker, and nothing that prepares pictures for it: it would load a second large network.
        "local_files_only": True, "torch_dtype": dtype, "feature_extractor": None, "safety_checker": None,
        "requires_safety_checker": False,
    }  # fmt: skip
    if path.is_file():
        config = _config_for(family, path)
    elif not (path / "model_index.json").is_file():
        raise BolidError(
            f"{path} is not a diffusers pipeline: it has no model_index.json",
            f"the base of family '{family.name}' must be a directory that diffusers' from_pretrained loads, or a "
            ".safetensors file",
        )
    lightning = family.unet if family.has("unet") or "unet" in family.needs else None
    if lightning is not None:
        family.require("unet")
        if not _is_lora(lightning):
            settings["unet"] = _load_unet(family, lightning, config if path.is_file() else path, dtype)
    verify = f"check the files with: bolid models verify {family.name}"
    with loading(f"the base of family '{family.name}' at {path}", verify):
        if path.is_file():
            index = diffusers.DiffusionPipeline.load_config(str(config), local_files_only=True)
            pipeline = getattr(diffusers, index["_class_name"])
            if not issubclass(pipeline, diffusers.StableDiffusionPipeline):
                del settings["safety_checker"], settings["requires_safety_checker"]
            pipe = pipeline.from_single_file(str(path), config=str(config), **settings)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(path), use_safetensors=True, variant=_variant(path), **settings
            )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.requires_grad_(False).eval()
            require_whole(module, path)
    if lightning is not None and "unet" not in settings:
        load_loras(pipe, [(lightning, 1.0)], family)
        with quiet_diffusers():
            pipe.fuse_lora()
            pipe.unload_lora_weights()
    if dtype != torch.float32:
        with quiet_diffusers():
            pipe.vae.to(torch.float32)
    if sampler is not None:
        set_sampler(pipe, sampler)
    with quiet_diffusers():
        return pipe.to(device)


def offload(pipe: Any, device: str) -> None:
    """Keep each network of `pipe` in main memory but while it computes on `device`: the last thing to do to it."""
    with quiet_diffusers():
        pipe.enable_model_cpu_offload(device=device)


def _variant(path: Path) -> str | None:
    """ "fp16" for a directory that holds the half-precision files only, as `bolid models pull` fetches them."""
    vae = path / "vae"
    return "fp16" if not any(vae.glob("*model.safetensors")) and any(vae.glob("*.fp16.safetensors")) else None


def _header(path: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of a safetensors file; BolidError for a truncated one and for anything else."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise BolidError(
            f"{path} is a pickle, which could run anything: it is not loaded", "get the same weights as .safetensors"
        )
    try:
        header = read_header(path)
    except BolidError as error:
        raise BolidError(error.message, "fetch it again; it must be a .safetensors file") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _is_lora(path: Path) -> bool:
    return any("lora" in name for name in _header(path))


def _config_for(family: Family, path: Path) -> Path:
    """The directory with configs and tokenizers for the single-file base `path`; BolidError for one of another kind.

    The kind shows in the width of the text states that its cross-attentions take: 768 in SD 1.x, 2048 in SDXL.
    """
    shapes = _header(path)
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2}
    if len(widths) != 1 or not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise BolidError(
            f"{path} is no Stable Diffusion checkpoint: it has no model.diffusion_model.* with cross-attention",
            "give an all-in-one checkpoint as .safetensors, or a diffusers directory",
        )
    config = family.base_config if family.base_config.is_dir() else family.require("base_config")
    try:
        expected = json.loads((config / "unet" / "config.json").read_text(encoding="utf-8"))["cross_attention_dim"]
    except (OSError, ValueError, KeyError) as error:
        raise BolidError(
            f"{config} has no unet/config.json, so {path} cannot be read",
            f"bolid models pull {family.name} --only base_config",
        ) from error
    if widths != {expected}:
        raise BolidError(
            f"{path} is another kind of base than family '{family.name}': its text states have {widths.pop()} "
            f"channels, not {expected}",
            "choose the family that it was made from: 768 is sd15, 2048 is sdxl",
        )
    return config


def _load_unet(family: Family, path: Path, config: Path, dtype: torch.dtype) -> Any:
    """A UNet of the base's configuration with the weights in `path`, in diffusers' layout."""
    import diffusers
    from safetensors.torch import load_file

    found = _header(path)
    with quiet_diffusers(), torch.device("meta"):
        settings = diffusers.UNet2DConditionModel.load_config(str(config), subfolder="unet", local_files_only=True)
        unet = diffusers.UNet2DConditionModel.from_config(settings)
    expected = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise BolidError(
            f"{path} does not fit the base of family '{family.name}': {wrong} is {found.get(wrong, 'missing')} where "
            f"the base has {expected.get(wrong, 'nothing')}",
            "give a UNet in diffusers' layout, or a LoRA, that was trained from this kind of base",
        )
    unet.load_state_dict({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, assign=True)
    return unet


def set_sampler(pipe: Any, settings: Mapping[str, Any]) -> None:
    """Give `pipe` the `sampler` that a family's `defaults` or `few_steps` name."""
    pipe.scheduler = sampler(pipe.scheduler, settings)


def sampler(own: Any, settings: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that a family's `defaults` or `few_steps` name, with the schedule of the base's `own`.

    `settings`: "scheduler" is a class of diffusers, by default the base's own; what else there is besides SAMPLING goes
    to it, like "timestep_spacing".
    """
    import diffusers

    chosen = {key: value for key, value in settings.items() if key not in (*SAMPLING, "scheduler")}
    if "scheduler" not in settings and not chosen:
        return own
    scheduler_class = getattr(diffusers, settings.get("scheduler", type(own).__name__), None)
    if scheduler_class is None:
        raise BolidError(
            f"the family names the scheduler {settings['scheduler']!r}, which diffusers does not have",
            "name a class of diffusers.schedulers, like LCMScheduler or EulerDiscreteScheduler",
        )
    with quiet_diffusers():
        return scheduler_class.from_config(own.config, **chosen)


_NO_LORA = {".hada_": "a LoHa", ".lokr_": "a LoKr", "bundle_emb.": "a LoRA with embeddings of new words in it"}
"""Parts of tensor names -> what a file with them is, which diffusers does not load for these bases."""
_PEFT = "base_model.model."  # peft's own prefix, where it wraps a UNet


def _read_lora(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA, by names that diffusers takes. BolidError, saying what it is, for another file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BolidError(f"{path} is not a safetensors file: {error}", "give a LoRA as .safetensors") from error
    for mark, kind in _NO_LORA.items():
        if any(mark in name for name in tensors):
            raise BolidError(
                f"{path} is {kind} ({mark.strip('.')}*), which is not supported",
                "give a plain LoRA: pairs of lora_A and lora_B, or of lora_down and lora_up",
            )
    if not any("lora" in name for name in tensors):
        raise BolidError(
            f"{path} is no LoRA: it has no pairs of small matrices",
            "give a file that peft, diffusers or a kohya trainer has written",
        )
    return {f"unet.{name.removeprefix(_PEFT)}" if name.startswith(_PEFT) else name: t for name, t in tensors.items()}


def load_loras(pipe: Any, loras: Sequence[tuple[Path, float]], family: Family) -> None:
    """Add LoRAs (safetensors file, weight) to the base, through diffusers and peft.

    Raises BolidError for a file that is no LoRA and for one that does not wholly fit: diffusers itself only logs what
    it could not place, and goes on without it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        tensors = _read_lora(path)
        expected = sum(any(mark in key for mark in ("lora_A.", "lora_down.", "lora.down.")) for key in tensors)
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


_CONTROLNET_FILE = "diffusion_pytorch_model.safetensors"


def load_controlnet(pipe: Any, family: Family, part: str = "controlnet") -> ControlNetModel:
    """A ControlNet of the family, frozen, in `pipe`'s precision and on its device.

    `part`: "controlnet", the openpose one, or "depth_controlnet". Published ones may be there in half precision alone.
    Raises BolidError for one that is missing, damaged, or made for another kind of base.
    """
    path = family.require(part)
    from diffusers import ControlNetModel

    wanted = "it must be a directory that diffusers' ControlNetModel.from_pretrained loads, with safetensors weights"
    with loading(f"the ControlNet {path}", wanted):
        network = ControlNetModel.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, torch_dtype=pipe.unet.dtype,
            variant="fp16" if not (path / _CONTROLNET_FILE).exists() else None,
        )  # fmt: skip
    require_whole(network, path)
    for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
        theirs, own = network.config[key], pipe.unet.config[key]
        if theirs != own and list(np.atleast_1d(theirs)) != list(np.atleast_1d(own)):
            raise BolidError(
                f"the ControlNet {path} was made for another base: its {key} is {theirs}, the base's {own}",
                f"give family '{family.name}' a ControlNet trained on its own base",
            )
    return network.requires_grad_(False).eval().to(pipe._execution_device)


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c_tau = Gamma_tau(tau) (BoLID section 3): text states [N, L, E] and SDXL's pooled state [N, P] (else None).

    Through the pipeline's own method, so truncation and padding are those of diffusers.
    """
    with quiet_diffusers():
        encoded = pipe.encode_prompt(
            prompt=list(prompts), device=pipe._execution_device, num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )  # fmt: skip
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
    """Scaled latents [N, C, h, w] => pictures, uint8 HWC 0..255, rounded as diffusers rounds them."""
    vae = getattr(pipe_or_vae, "vae", pipe_or_vae)
    # Where `offload` has moved the VAE away, it computes on another device than it lies on.
    latents = latents.to(getattr(pipe_or_vae, "_execution_device", vae.device), vae.dtype)
    latents = latents / vae.config.scaling_factor
    if (mean := getattr(vae.config, "latents_mean", None)) and (std := getattr(vae.config, "latents_std", None)):
        mean, std = (latents.new_tensor(part).view(1, -1, 1, 1) for part in (mean, std))
        latents = latents * std + mean
    pixels = vae.decode(latents).sample.float()
    pixels = ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


class LatentEncoder:
    """The base's VAE encoder alone, for caching latents in training shards."""

    def __init__(self, family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        import diffusers

        path = family.require("base")
        verify = f"check the files with: bolid models verify {family.name}"
        with loading(f"the VAE of family '{family.name}' in {path}", verify):
            if path.is_file():
                config = _config_for(family, path)
                self.vae = diffusers.AutoencoderKL.from_single_file(
                    str(path), config=str(config), subfolder="vae", local_files_only=True, torch_dtype=dtype
                )
            else:
                index = diffusers.DiffusionPipeline.load_config(str(path), local_files_only=True)
                self.vae = getattr(diffusers, index["vae"][1]).from_pretrained(
                    str(path), subfolder="vae", local_files_only=True, torch_dtype=dtype, use_safetensors=True,
                    variant=_variant(path),
                )  # fmt: skip
        require_whole(self.vae, path)
        self.vae.requires_grad_(False).eval().to(device)

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Equal-sized pictures, uint8 HWC => f16 [N, 2, C, h, w], see `encode_latents`."""
        return encode_latents(self.vae, images).cpu().numpy().astype(np.float16)

    def decode(self, moments: np.ndarray) -> list[np.ndarray]:
        """Moments [N, 2, C, h, w] => pictures of the means, uint8 HWC."""
        return decode_latents(self.vae, torch.from_numpy(np.asarray(moments, np.float32))[:, 0])
