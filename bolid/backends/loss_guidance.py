"""Guidance by losses on x0-hat: sampling moves the picture down the gradient of what frozen networks measure in it.

Training-free, as FreeDoM (Yu et al. 2023, arXiv:2303.09833); not in the paper.
Shapes: N pictures, C latent channels, (h, w) latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import LCMScheduler

from bolid.method import losses

if TYPE_CHECKING:
    from bolid.scales import Scale


class GuidanceLoss(Protocol):
    """A loss on pictures that is small where they are as wanted."""

    @property
    def weight(self) -> Scale:
        """How strongly it counts, and in which interval of the sampling."""

    @property
    def step(self) -> float:
        """How far a weight of 1 moves x0-hat in a step, in root mean squares of latents (about 1)."""

    @property
    def momentum(self) -> float:
        """The weight of the step before's direction beside the gradient's own (Polyak 1964)."""

    @property
    def keeps_noise(self) -> bool:
        """Whether the noise stays where x0-hat is moved, with a sampler that draws it anew (`keep_noise`)."""

    def __call__(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss [N] of pictures [N,3,H,W] in -1..1, differentiable; where x0-hat may be moved, 0..1, [N,1,h,w])."""


class LossGuidance:
    """Guidance by several losses in one run of the sampling, of pictures of one person. It keeps their momentum.

    A loss counts in the interval of its weight, but never in the last step: that step's x0-hat is the picture, which
    would keep what only pleases a network.
    """

    def __init__(self, guidance_losses: Sequence[GuidanceLoss], vae: Any, scheduler: Any) -> None:
        self.losses, self.vae, self.scheduler = list(guidance_losses), vae, scheduler
        self.directions = [torch.zeros(()) for _ in self.losses]

    def active(self, step: int, steps: int) -> list[int]:
        """The numbers of the losses that count in `step` of `steps`."""
        if step == steps - 1:
            return []
        return [i for i, loss in enumerate(self.losses) if step in loss.weight.steps(steps)]

    def move(
        self, predict: Callable[[torch.Tensor], torch.Tensor], z_t: torch.Tensor, t: Any, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(the prediction with the condition, the one for an x0-hat further down the gradient, where noise stays).

        The gradient is taken with respect to `z_t`, through the UNet, so that it stays within what the UNet can make.
        """
        alphas = losses.alpha_bar(self.scheduler, torch.as_tensor(t).long()).to(z_t.device).expand(len(z_t))
        kind, kept = self.scheduler.config.prediction_type, None
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            prediction = predict(z_t)
            x0 = losses.x0_from_prediction(prediction.float(), z_t.float(), alphas, kind)
            latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
            pixels = self.vae.decode(latents).sample.float().clamp(-1, 1)
            moved = x0.detach()
            for i in active:
                loss = self.losses[i]
                value, where = loss(pixels, x0.shape[2:])
                (slope,) = torch.autograd.grad(value.sum(), z_t, retain_graph=i != active[-1])
                direction = _normalized(slope.float()) + loss.momentum * self.directions[i].to(slope.device)
                self.directions[i] = direction
                moved = moved - loss.step * loss.weight.value * _normalized(direction, where)
                if loss.keeps_noise:
                    kept = where.detach() * min(loss.weight.value, 1.0)
        wanted = losses.prediction_from_x0(moved, z_t.detach().float(), alphas, kind)
        return prediction.detach(), wanted.to(prediction.dtype), kept


def keep_noise(
    scheduler: Any, t: Any, z_t: torch.Tensor, stepped: Sequence[torch.Tensor], where: torch.Tensor
) -> torch.Tensor:
    """z_{t-1} with the noise of `z_t` where `where` [N,1,h,w] is 1, and between 0 and 1 with a mixture.

    `stepped`: (z_{t-1}, x0-hat) of the step that `scheduler` has just taken from `t`. LCM's step draws new noise, in
    which what guidance has moved is lost; the noise of `z_t` is what DDIM's step keeps (Song et al. 2020,
    arXiv:2010.02502, Eq. 12 with sigma 0).
    Mixtures have the variance of either. The steps of other samplers are left as they are.
    """
    if not isinstance(scheduler, LCMScheduler):
        return stepped[0]
    x0 = stepped[1].float()
    alpha, next_alpha = (
        scheduler.alphas_cumprod[int(time)].to(x0) for time in (t, scheduler.timesteps[scheduler.step_index])
    )
    fresh = (stepped[0].float() - next_alpha.sqrt() * x0) / (1 - next_alpha).sqrt()
    known = (z_t.float() - alpha.sqrt() * x0) / (1 - alpha).sqrt()
    noise = (1 - where.square()).sqrt() * fresh + where * known
    return (next_alpha.sqrt() * x0 + (1 - next_alpha).sqrt() * noise).to(stepped[0].dtype)


def _normalized(slope: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """`slope` [N,C,h,w] times `where` [N,1,h,w], scaled so that its root mean square there is 1."""
    where = torch.ones_like(slope[:, :1]) if where is None else where
    mean = (where * slope.square()).mean((1, 2, 3), keepdim=True) / where.mean((1, 2, 3), keepdim=True)
    return where * slope / mean.sqrt().clamp_min(1e-12)
