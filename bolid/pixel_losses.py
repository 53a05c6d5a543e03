"""L_id and L_CLIP of a training step (BoLID Eq. 14): what frozen networks see in x_gen, with gradient.

x_gen's latents are decoded, and the family's pose and image-text models read the picture. Its target is the photo that
was to be denoised, read the same way from its own latents, so that a perfect prediction costs exactly nothing. With
`id_loss` "body" or "sliders" the body encoder reads it too, and the target is what it says of the person.

Shapes: B photos, C latent channels, (h, w) latent positions, D body dimension, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.families import Family
from bolid.run import sha256_file
from bolid.train_adapter import OF_THE_PERSON

if TYPE_CHECKING:
    import torch

    from bolid.backends.face import DifferentiableFaces

TINY_DECODER = "tiny-decoder"  # an AutoencoderTiny directory beside a family's other models


class PixelLosses:
    """The losses or some of them: `id_loss` is "keypoints", "bone-ratios", "body", "sliders" or ""; `clip_target`
    "text", "image", "both" or ""; `face`: L_face too. "body" and "sliders" need the `body_encoder`, "sliders" also the
    file `sliders` (by default the family's), measured for it.

    `vae`: of the base; `decoder`: directory of an AutoencoderTiny for the same latents, which is several times faster.
    By default the family's `tiny-decoder`, and without one the base's own VAE. `inputs`: name -> sha256 of the models
    that the losses depend on. Raises BolidError when the family lacks a model.
    """

    def __init__(
        self, family: Family, vae: Any, *, id_loss: str, clip_target: str, decoder: str = "", device: str = "cpu",
        body_encoder: Any = None, sliders: str = "", face: bool = False,
    ) -> None:  # fmt: skip
        import torch

        from bolid.backends.face import DifferentiableFaces
        from bolid.backends.image_text import WEIGHTS, ImageTextModel
        from bolid.backends.pose import PoseModel, weights_file
        from bolid.formats.sliders import load_sliders

        self.id_loss, self.clip_target, self.view_size = id_loss, clip_target, family.view_size
        self.body_encoder = body_encoder
        if id_loss in OF_THE_PERSON and body_encoder.needs_features:
            raise BolidError(
                f"--id-loss {id_loss}: {body_encoder.path} looks at image-text features, which pass no gradient",
                "give a body encoder trained with --view crop",
            )
        self.inputs: dict[str, str] = {}
        self.vae = vae
        if folder := find_decoder(family, decoder):
            self.vae = _load_decoder(folder, vae, device)
            self.inputs["decoder"] = sha256_file(sorted(folder.glob("*.safetensors"))[0])
        if id_loss:
            path = family.require("pose")
            self.pose = PoseModel(path, device)
            if not self.pose.differentiable:
                raise BolidError(
                    f"L_id needs a gradient, which a pose model in ONNX has not ({path})",
                    "take one in safetensors: bolid models convert yolo11n-pose.pt",
                )
            self.inputs["pose"] = sha256_file(weights_file(path))
        if id_loss == "sliders":
            file = Path(sliders) if sliders else family.require("body_sliders")
            self.readout = load_sliders(file, body_encoder.space).readout.to(device)
            self.inputs["body_sliders"] = sha256_file(file)
        if clip_target:
            path = family.require("image_text")
            self.image_text = ImageTextModel(path, device)
            self.inputs["image_text"] = sha256_file(path / WEIGHTS)
        self.faces: DifferentiableFaces | None = None
        if face:
            self.faces = DifferentiableFaces(family.require("face"), device)
            self.inputs["face"] = self.faces.sha256
        self.vae.to(memory_format=torch.channels_last)  # a third less time for most of what these losses cost
        self._targets: dict[int, tuple[torch.Tensor, ...]] = {}
        self._texts: dict[str, torch.Tensor] = {}

    def __call__(
        self, latents: torch.Tensor, targets: torch.Tensor, rows: Sequence[int], captions: Sequence[str],
        bodies: torch.Tensor | None = None, faces: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """(L_id [B], L_CLIP [B], L_face [B]) of x_gen's `latents` [B,C,h,w] against the photos' own, `targets`; 0 for
        what is off.

        `rows` name the photos: what is seen in a target is remembered. `bodies` [B, D]: what x_gen's body is to be
        like, for "body" and "sliders"; `faces` [B, 512], L2-normed: and its face. Zeros are for nobody. A photo with
        an empty caption has no text to be like, and what is not recognised as a person counts little: L_id is weighted
        by the scores.
        """
        import torch

        from bolid.method import losses

        zero = latents.new_zeros(len(latents))
        if not len(latents):
            return zero, zero, zero
        pixels = self._decode(latents)
        seen = self._read(pixels)
        target: list[torch.Tensor] = []
        if self.id_loss not in ("", *OF_THE_PERSON) or self.clip_target not in ("", "text"):
            target = [torch.stack(parts) for parts in zip(*map(self._target, rows, targets), strict=True)]
        identity, clip, face = zero, zero, zero
        if self.id_loss:
            keypoints, _box, score = seen[:3]
            if self.id_loss in OF_THE_PERSON:
                error, seen_well = self._body_distance(pixels, keypoints, bodies)
            elif self.id_loss == "keypoints":
                error = losses.loss_keypoints(keypoints, target[0], target[1][:, 3] - target[1][:, 1])
                seen_well = target[2]
            else:
                error, seen_well = losses.loss_bone_ratios(keypoints, target[0]), target[2]
            identity = error * score.detach() * seen_well
        if self.clip_target:
            parts = []
            if self.clip_target != "image":
                has_text = torch.tensor([bool(caption) for caption in captions], device=latents.device)
                texts = torch.stack([self._text(caption) for caption in captions])
                parts.append(losses.loss_clip(seen[-1], texts) * has_text)
            if self.clip_target != "text":
                parts.append(losses.loss_clip(seen[-1], target[-1]))
            clip = torch.stack(parts).mean(0)
        if self.faces is not None and faces is not None:
            embeddings, there = self.faces(pixels)
            face = losses.loss_face(embeddings, faces) * there * faces.any(1)
        return identity, clip, face

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in -1..1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def _read(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keypoints, box and score for L_id, then the embedding for L_CLIP."""
        seen = self.pose.best_person(pixels) if self.id_loss else ()
        return (*seen, self.image_text.encode_pixels(pixels)) if self.clip_target else seen

    def _body_distance(
        self, pixels: torch.Tensor, keypoints: torch.Tensor, bodies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the pictures' bodies are from `bodies` [B, D], and how well they can be seen, 0 for nobody, both [B].

        The body encoder is shown the pictures as finely as it is shown photos.
        """
        import torch.nn.functional as F

        from bolid.method.body_vae import body_distance, view_confidence
        from bolid.method.sliders import reading_distance

        scale = self.view_size[0] / pixels.shape[2]
        if scale != 1:
            pixels = F.interpolate(pixels, self.view_size, mode="bilinear", antialias=scale < 1)
        keypoints = keypoints * keypoints.new_tensor([scale, scale, 1])
        mean, views = self.body_encoder.encode_pixels(pixels, keypoints)
        if self.id_loss == "sliders":
            distance = reading_distance(self.readout, mean, bodies)
        else:
            distance = body_distance(self.body_encoder.model, mean, bodies, views)
        return distance, view_confidence(views.keypoints).detach() * bodies.any(1)

    def _target(self, row: int, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Read one at a time: the numbers must not depend on what shares the batch, or a resumed run would differ."""
        import torch

        if row not in self._targets:
            with torch.no_grad():
                self._targets[row] = tuple(part[0] for part in self._read(self._decode(latents[None])))
        return self._targets[row]

    def _text(self, caption: str) -> torch.Tensor:
        if caption not in self._texts:
            self._texts[caption] = self.image_text.encode_text([caption])[0]
        return self._texts[caption]


def find_decoder(family: Family, decoder: str) -> Path | None:
    """The directory of the tiny decoder that is asked for, or the family's; None: decode with the base's VAE."""
    folder = Path(decoder) if decoder else family.root / TINY_DECODER
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    if decoder:
        raise BolidError(
            f"--decoder {decoder} holds no AutoencoderTiny",
            "give a directory with its config.json and safetensors weights, or leave it out to decode with the VAE",
        )
    return None


def _load_decoder(folder: Path, vae: Any, device: str) -> Any:
    from diffusers import AutoencoderTiny

    from bolid.backends.base import loading, require_whole

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
