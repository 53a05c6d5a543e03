"""The joint objective (BoLID Eq. 14): L = L_diff + id_weight L_id + clip_weight L_CLIP, and nothing else.

The terms on x_gen, the generated picture, are in `pixel_losses.py`, the ways to make it in `rollouts.py`; the face
losses, which the paper has not, are added the same way.

Shapes: B batch, B' of its photos that get a picture, (C, h, w) latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import AdapterBatch, AdapterTable
from bolid.train_adapter.denoiser import Denoiser, NoisedBatch
from bolid.train_adapter.pixel_losses import GeneratedPictures, PixelLoss
from bolid.train_adapter.rollouts import Rollout, shows_body

if TYPE_CHECKING:
    import torch


class Objective:
    """L of a batch. Without `pixel_losses` it is L_diff alone, and neither `rollout` nor `decode` is needed."""

    def __init__(
        self, denoiser: Denoiser, table: AdapterTable, config: TrainAdapterConfig,
        pixel_losses: Mapping[str, PixelLoss] | None = None, rollout: Rollout | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.table = denoiser, table
        self.pixel_losses, self.rollout, self.decode = dict(pixel_losses or {}), rollout, decode
        self.weights = {name: float(getattr(config, f"{name}_weight")) for name in self.pixel_losses}
        self.min_snr_gamma = config.min_snr_gamma

    def __call__(self, batch: AdapterBatch, with_pixels: bool = False) -> dict[str, torch.Tensor]:
        """Eq. 14. Scalars: "loss", and `with_pixels` its terms without their weights: "diffusion", "id", "clip", ...

        The terms on x_gen are means over the whole batch, in which photos without a picture count 0.
        """
        from bolid.method import losses

        # L_diff = E || eps - eps_theta(z_t, t, c_tau, c_face, c_body) ||^2
        noised = self.denoiser.add_noise(batch)
        noise_pred = self.denoiser(noised)
        diffusion = losses.loss_diffusion(
            noise_pred, noised.target, noised.alphas_cumprod, self.denoiser.prediction_type, self.min_snr_gamma
        )
        if not with_pixels:
            return {"loss": diffusion}

        # + id_weight L_id + clip_weight L_CLIP (+ face_weight L_face), on x_gen
        loss, terms = diffusion, {}
        x_gen = self.generate(batch, noised, noise_pred)
        for name, pixel_loss in self.pixel_losses.items():
            terms[name] = diffusion.new_zeros(()) if x_gen is None else pixel_loss(x_gen).sum() / len(batch.rows)
            loss = loss + self.weights[name] * terms[name]
        return {"loss": loss, "diffusion": diffusion, **terms}

    def generate(self, batch: AdapterBatch, noised: NoisedBatch, noise_pred: torch.Tensor) -> GeneratedPictures | None:
        """x_gen for the photos that the rollout selects; None if it selects none."""
        import torch

        if self.rollout is None or self.decode is None:
            raise ValueError("losses on pictures need a rollout and a decoder")
        places = self.rollout.select(batch, noised.alphas_cumprod)
        if not len(places):
            return None
        chosen, device = noised.at(places), self.denoiser.device
        rows, on_cpu = batch.rows[places.cpu().numpy()], places.cpu()
        latents = self.rollout(chosen, noise_pred[places])
        people = self.table.owner[rows]
        bodies, faces = self.table.person_bodies[people], self.table.person_faces[people]
        faces = faces * batch.face_embeds[on_cpu].flatten(1).any(1, keepdim=True)
        if self.rollout.new_picture:
            bodies = bodies * shows_body(batch, self.table)[on_cpu, None]
        return GeneratedPictures(
            self.decode, latents, self.table.latents[rows, 0].to(device, torch.float32), rows.tolist(),
            [batch.captions[i] for i in places.tolist()], bodies.to(device), faces.to(device),
            chosen.generators if self.rollout.new_picture else (),
        )  # fmt: skip
