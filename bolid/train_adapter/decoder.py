"""x_gen's latents -> pixels, with gradient: by the base's VAE, or several times faster by an AutoencoderTiny."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.run import sha256_file

if TYPE_CHECKING:
    import torch

TINY_DECODER = "tiny-decoder"  # an AutoencoderTiny directory beside a family's other models


class LatentDecoder:
    """Decodes with `folder`, an AutoencoderTiny directory; by default the family's, and without one with `vae`.

    `inputs`: {"decoder": sha256} unless it is the base's VAE. Raises BolidError for a directory that does not fit.
    """

    def __init__(self, family: Family, vae: Any, folder: str = "", device: str = "cpu") -> None:
        import torch

        self.vae, self.inputs = vae, dict[str, str]()
        if found := find_decoder(family, folder):
            self.vae = load_decoder(found, vae, device)
            self.inputs["decoder"] = sha256_file(sorted(found.glob("*.safetensors"))[0])
        self.vae.to(memory_format=torch.channels_last)  # a third less time for most of what the pixel losses cost

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,C,h,w] => [B,3,H,W] in -1..1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.float().clamp(-1, 1)


def find_decoder(family: Family, decoder: str) -> Path | None:
    """The directory of the tiny decoder that is named, or the family's; None: decode with the base's VAE."""
    folder = Path(decoder) if decoder else family.root / TINY_DECODER
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    if decoder:
        raise BolidError(
            f"--decoder {decoder} holds no AutoencoderTiny",
            "give a directory with its config.json and safetensors weights, or leave it out to decode with the VAE",
        )
    return None


def load_decoder(folder: Path, vae: Any, device: str) -> Any:
    """A frozen AutoencoderTiny for `vae`'s latents. Raises BolidError for a damaged directory or other latents."""
    from diffusers import AutoencoderTiny

    from bolid.backends.diffusion import loading, require_whole

    wanted = "it must be a directory that diffusers' AutoencoderTiny.from_pretrained loads"
    with loading(f"the tiny decoder in {folder}", wanted):
        decoder = AutoencoderTiny.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    require_whole(decoder, folder)
    if decoder.config.latent_channels != vae.config.latent_channels:
        raise BolidError(
            f"the tiny decoder in {folder} takes {decoder.config.latent_channels} latent channels, "
            f"the base has {vae.config.latent_channels}",
            "give one that was made for this base's latents",
        )
    return decoder.requires_grad_(False).eval().to(device)
