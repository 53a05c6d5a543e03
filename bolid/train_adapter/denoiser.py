"""The base's UNet with both branches as training calls it: photos are noised (BoLID Eq. 4), noise is predicted.

Shapes: B photos, (C, h, w) latents, L text tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bolid.models.families import Family
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import AdapterBatch, AdapterTable, TextStates

if TYPE_CHECKING:
    import torch

Conditions = dict[str, "torch.Tensor"]
"""Everything that the UNet is conditioned on, [B, ...] each: prompt_embeds, face_embeds, body_embeds; for SDXL also
text_embeds, time_ids."""


def training_schedule(pipe: Any) -> Any:
    """The base's own noise schedule, as training needs it: add_noise, get_velocity, alphas_cumprod."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Normal noise, each photo's from its own generator, [B, *shape] on the CPU."""
    import torch

    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


@dataclass(frozen=True)
class NoisedBatch:
    """Photos under noise, on the device."""

    noisy: torch.Tensor  # z_t [B,C,h,w]
    target: torch.Tensor  # what the UNet should predict [B,C,h,w]: noise, velocity or clean latents
    timesteps: torch.Tensor  # [B]
    alphas_cumprod: torch.Tensor  # [B]
    conditions: Conditions
    generators: Sequence[torch.Generator]  # B

    def at(self, places: torch.Tensor) -> NoisedBatch:
        """Some of the photos, by their places [B'] in the batch."""
        return dataclasses.replace(
            self,
            noisy=self.noisy[places], target=self.target[places], timesteps=self.timesteps[places],
            alphas_cumprod=self.alphas_cumprod[places],
            conditions={name: value[places] for name, value in self.conditions.items()},
            generators=[self.generators[i] for i in places.tolist()],
        )  # fmt: skip


class Denoiser:
    """eps_theta(z_t, t, c_tau, c_face, c_body) of BoLID Eq. 14; for other bases the velocity or the clean latents.

    `network` is the UNet as training calls it (compiled, or shared by processes); `unet` the same weights bare.
    """

    def __init__(
        self, pipe: Any, table: AdapterTable, text_states: TextStates, family: Family, config: TrainAdapterConfig,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.network = self.unet = pipe.unet
        self.latents, self.text_states, self.device = table.latents, text_states, device
        self.precision, self.image_size = config.precision, family.image_size
        self.schedule = training_schedule(pipe)
        self.prediction_type: str = self.schedule.config.prediction_type
        self.latent_shape = tuple(table.latents.shape[2:])
        self.positions = math.prod(self.latent_shape[-2:])

    def add_noise(self, batch: AdapterBatch) -> NoisedBatch:
        """z_t = sqrt(alpha-bar) z_0 + sqrt(1 - alpha-bar) eps (BoLID Eq. 4), z_0 drawn from the VAE's posterior."""
        import torch

        from bolid.method import losses

        moments, total = self.latents[batch.rows].float(), self.schedule.config.num_train_timesteps
        drawn = [
            (torch.randn(2, *self.latent_shape, generator=g), torch.randint(0, total, (), generator=g))
            for g in batch.generators
        ]
        normal = torch.stack([pair for pair, _ in drawn])
        latents = (moments[:, 0] + moments[:, 1] * normal[:, 0]).to(self.device)
        noise, timesteps = normal[:, 1].to(self.device), torch.stack([t for _, t in drawn]).to(self.device)
        return NoisedBatch(
            self.schedule.add_noise(latents, noise, timesteps),
            losses.diffusion_target(self.schedule, latents, noise, timesteps),
            timesteps,
            losses.alpha_bar(self.schedule, timesteps),
            self.conditions(batch),
            batch.generators,
        )

    def conditions(self, batch: AdapterBatch) -> Conditions:
        """Text states, face and body of each photo, on the device."""
        import torch

        prompt_embeds, pooled = self.text_states(batch.captions)
        conditions = {
            "prompt_embeds": prompt_embeds,
            "face_embeds": batch.face_embeds.to(self.device),
            "body_embeds": batch.body_embeds.to(self.device),
        }
        if pooled is not None:  # SDXL: also original size, crop corner and target size
            ids = torch.tensor([[*self.image_size, 0, 0, *self.image_size]], device=self.device, dtype=torch.float32)
            conditions |= {"text_embeds": pooled, "time_ids": ids.repeat(len(pooled), 1)}
        return conditions

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """The same with no text, no face and no body: the other side of guidance (BoLID Eq. 8)."""
        from bolid.method.body_condition import null_condition

        prompt_embeds, pooled = self.text_states([""])
        null = {**conditions, "prompt_embeds": prompt_embeds.expand_as(conditions["prompt_embeds"])}
        null |= {name: null_condition(conditions[name]) for name in ("face_embeds", "body_embeds")}
        if pooled is not None:
            null["text_embeds"] = pooled.expand_as(conditions["text_embeds"])
        return null

    def __call__(self, noised: NoisedBatch) -> torch.Tensor:
        """The prediction for a training step, through `network`. [B,C,h,w]"""
        return self._call(self.network, noised.noisy, noised.timesteps, noised.conditions)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The prediction of the bare UNet: DistributedDataParallel wants one pass of its own for each backward."""
        return self._call(self.unet, noisy, timesteps, conditions)

    def _call(self, network: Any, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        import torch

        from bolid.train_adapter.precision import compiler_errors, computing

        added: dict[str, Any] = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
        added["image_embeds"] = [conditions["face_embeds"], conditions["body_embeds"]]
        with computing(self.device, self.precision, self.positions), compiler_errors():
            return network(
                noisy.to(memory_format=torch.channels_last), timesteps,
                encoder_hidden_states=conditions["prompt_embeds"], added_cond_kwargs=added,
            ).sample.float()  # fmt: skip
