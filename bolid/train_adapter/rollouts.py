"""x_gen, the picture that L_id, L_CLIP and the face losses compare: three ways to make it, one class each.

Each way says which photos of a batch get a picture (`select`) and makes its latents (`__call__`).

Shapes: B photos of a batch, B' of them with a picture, (C, h, w) latents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import WHOLE_BODY, AdapterBatch, AdapterTable
from bolid.train_adapter.denoiser import Conditions, Denoiser, NoisedBatch, draw_noise

if TYPE_CHECKING:
    import torch

MAX_FEW_STEPS = 8  # a base that samples in so few steps is a distilled one


class Rollout(Protocol):
    """A way to make x_gen."""

    new_picture: bool  # x_gen is a picture of its own: no photo has its pose

    def select(self, batch: AdapterBatch, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Places [B'] in the batch of the photos that get a picture."""

    def __call__(self, noised: NoisedBatch, noise_pred: torch.Tensor) -> torch.Tensor:
        """x_gen's latents [B',C,h,w], from the selected photos under noise and the UNet's prediction for them."""


def make_rollout(
    pipe: Any, denoiser: Denoiser, table: AdapterTable, family: Family, config: TrainAdapterConfig
) -> Rollout:
    """The way that `config.x_gen` names."""
    if config.x_gen == "one-step":
        return OneStepPrediction(denoiser, config.pixel_alpha_bar)
    if config.x_gen == "few-step":
        return FewStepRollout(pipe, denoiser, family, config)
    return SampledRollout(pipe, denoiser, table, family, config)


class OneStepPrediction:
    """x0-hat: the clean latents that the UNet's prediction amounts to (BoLID Eq. 5 solved for x0).

    Only where alpha-bar is at least `min_alpha_bar`: under much noise x0-hat shows nothing.
    """

    new_picture = False

    def __init__(self, denoiser: Denoiser, min_alpha_bar: float) -> None:
        self.denoiser, self.min_alpha_bar = denoiser, min_alpha_bar

    def select(self, batch: AdapterBatch, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Places [B'] of the photos that get a picture."""
        import torch

        return torch.nonzero(alphas_cumprod >= self.min_alpha_bar)[:, 0]

    def __call__(self, noised: NoisedBatch, noise_pred: torch.Tensor) -> torch.Tensor:
        """x_gen's latents [B',C,h,w]."""
        from bolid.method import losses

        return losses.x0_from_prediction(noise_pred, noised.noisy, noised.alphas_cumprod, self.denoiser.prediction_type)


class FewStepRollout(OneStepPrediction):
    """A few steps of the distilled base, the gradient through the last of them (after PuLID, Guo et al. 2024, section
    3.2).

    PuLID starts from pure noise; here the noised photo is the start, so that x_gen has the pose of its target.
    Loads the family's few-step LoRA, if it has one. Raises BolidError for a base that needs many steps.
    """

    def __init__(self, pipe: Any, denoiser: Denoiser, family: Family, config: TrainAdapterConfig) -> None:
        super().__init__(denoiser, config.pixel_alpha_bar)
        self.steps, self.grad_steps = config.x_gen_steps, config.x_gen_grad_steps
        self.has_lora = bool(family.few_steps) and family.few_steps_lora.is_file()
        if self.has_lora:
            _add_disabled_lora(pipe, family)
            scheduler = family.few_steps.get("scheduler", "")
        elif family.steps <= MAX_FEW_STEPS:
            scheduler = family.defaults.get("scheduler") or type(pipe.scheduler).__name__
        else:
            raise BolidError(
                f"--x-gen few-step: the base of family {family.name!r} takes {family.steps} steps "
                "and has no few-step LoRA",
                "leave it out, or choose a family like sdxl-lightning",
            )
        self.consistency = "LCM" in scheduler  # each step's x0-hat is noised anew

    def __call__(self, noised: NoisedBatch, noise_pred: torch.Tensor) -> torch.Tensor:
        """x_gen's latents [B',C,h,w]."""
        import torch

        from bolid.method import losses

        denoiser, latents = self.denoiser, noised.noisy
        with self._lora():
            for i in range(self.steps):
                now, later = (noised.timesteps * left // self.steps for left in (self.steps - i, self.steps - i - 1))
                alphas = losses.alpha_bar(denoiser.schedule, now)
                with torch.set_grad_enabled(i >= self.steps - self.grad_steps):
                    noise_pred = denoiser.predict(latents, now, noised.conditions)
                    x0 = losses.x0_from_prediction(noise_pred, latents, alphas, denoiser.prediction_type)
                    if self.consistency:
                        noise = draw_noise(x0.shape[1:], noised.generators).to(x0)
                    else:
                        noise = losses.noise_from_x0(x0, latents, alphas)
                    latents = losses.noise_level(x0, noise, losses.alpha_bar(denoiser.schedule, later))
        return x0

    @contextlib.contextmanager
    def _lora(self) -> Iterator[None]:
        """Inside, the few-step LoRA is on, where there is one."""
        if self.has_lora:
            self.denoiser.unet.enable_adapters()
        try:
            yield
        finally:
            if self.has_lora:
                self.denoiser.unet.disable_adapters()


def _add_disabled_lora(pipe: Any, family: Family) -> None:
    """The family's few-step LoRA in the UNet: frozen, and off for L_diff."""
    from bolid.backends.diffusion import quiet_diffusers

    lora = family.few_steps_lora
    with quiet_diffusers():
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="few-steps")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    pipe.unet.disable_adapters()


class SampledRollout:
    """A picture from pure noise, with the family's guidance (BoLID Eq. 8) and the steps of its sampler: consistency
    sampling (Song et al. 2023, Algorithm 1) where that is LCM's, else DDIM (Song et al. 2021, Eq. 12).

    `x_gen_grad_steps` of the steps carry the gradient, evenly spaced, the last one always. It goes through what the
    network predicts in them and not through its input, so it neither explodes nor vanishes over many steps (DRTune, Wu
    et al. 2024). In consistency sampling each step's x0-hat, noised anew, is the next step's start: every one counts
    for the picture as the last does.

    Only for photos with a caption whose picture a loss can judge: of a whole body, or of a face if `config.faces`.
    """

    new_picture = True

    def __init__(
        self, pipe: Any, denoiser: Denoiser, table: AdapterTable, family: Family, config: TrainAdapterConfig
    ) -> None:
        from diffusers import LCMScheduler

        from bolid.backends.diffusion import sampler

        self.denoiser, self.table, self.faces = denoiser, table, config.faces
        self.guidance, self.grad_steps = family.guidance, config.x_gen_grad_steps
        scheduler = sampler(pipe.scheduler, family.defaults)
        if config.x_gen_steps == len(family.timesteps):
            scheduler.set_timesteps(timesteps=list(family.timesteps))
        else:
            scheduler.set_timesteps(config.x_gen_steps)
        self.timesteps = scheduler.timesteps.long().to(denoiser.device)
        self.consistency = isinstance(scheduler, LCMScheduler)

    def select(self, batch: AdapterBatch, alphas_cumprod: torch.Tensor) -> torch.Tensor:
        """Places [B'] of the photos that get a picture."""
        import torch

        captioned = torch.tensor([bool(caption) for caption in batch.captions])
        judged = shows_body(batch, self.table)
        if self.faces:
            judged |= batch.face_embeds.flatten(1).any(1) & self.table.face[batch.rows].any(1)
        return torch.nonzero(captioned & judged)[:, 0].to(alphas_cumprod.device)

    def __call__(self, noised: NoisedBatch, noise_pred: torch.Tensor) -> torch.Tensor:
        """x_gen's latents [B',C,h,w]."""
        return self.sample(noised.conditions, noised.generators)

    def sample(self, conditions: Conditions, generators: Any) -> torch.Tensor:
        """The latents [B',C,h,w] of pictures of these conditions, their noise from `generators` [B']."""
        import torch

        from bolid.method import losses

        denoiser, steps = self.denoiser, len(self.timesteps)
        latents = draw_noise(denoiser.latent_shape, generators).to(denoiser.device)
        null = denoiser.null_conditions(conditions)
        path = torch.zeros_like(latents)  # zero, and carries the gradient to the steps before
        for i, timestep in enumerate(self.timesteps):
            now = timestep.expand(len(latents))
            alphas = losses.alpha_bar(denoiser.schedule, now)
            with torch.set_grad_enabled(i in self._steps_with_gradient()):
                noise_pred = self._guided(i, latents.detach(), now, conditions, null)
            x0 = losses.x0_from_prediction(noise_pred, latents, alphas, denoiser.prediction_type)
            if self.consistency:
                x0 = x0 + path
                path = x0 - x0.detach()
            if i + 1 == steps:
                break
            later = losses.alpha_bar(denoiser.schedule, self.timesteps[i + 1].expand_as(now))
            if self.consistency:
                latents = losses.noise_level(x0.detach(), draw_noise(x0.shape[1:], generators).to(x0), later)
            else:
                latents = losses.noise_level(x0, losses.noise_from_x0(x0, latents, alphas), later)
        return x0

    def _steps_with_gradient(self) -> set[int]:
        steps, carried = len(self.timesteps), self.grad_steps
        return {round(steps - 1 - i * (steps - 1) / max(1, carried - 1)) for i in range(carried)}

    def _guided(
        self, i: int, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, null: Conditions
    ) -> torch.Tensor:
        """Step `i`'s prediction with guidance (BoLID Eq. 8), whose unconditional side carries no gradient."""
        import torch

        noise_pred = self.denoiser.predict(noisy, timesteps, conditions)
        if self.guidance.up > 1 and i in self.guidance.steps(len(self.timesteps)):
            with torch.no_grad():
                without = self.denoiser.predict(noisy, timesteps, null)
            noise_pred = without + self.guidance.up * (noise_pred - without)
        return noise_pred


def shows_body(batch: AdapterBatch, table: AdapterTable) -> torch.Tensor:
    """Which photos show a whole body and are conditioned on one, bool [B]."""
    return batch.body_embeds.flatten(1).any(1) & (table.confidence[batch.rows] >= WHOLE_BODY)
