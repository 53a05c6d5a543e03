"""L_diff, the denoising loss (BoLID Eq. 14, first term).

Shapes: B batch, C latent channels, (h, w) latent positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def alpha_bar(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """The schedule's cumulative alpha at `timesteps` [B] (BoLID Eq. 4), f32 [B]."""
    return scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]


def diffusion_target(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the base's UNet predicts for these noised latents: noise, velocity or the clean latents. [B,C,h,w]"""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def min_snr_weight(alphas_cumprod: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Min-SNR weight of each timestep (Hang et al. 2023, Eq. 8 and section 3.4), [B].

    It is min(SNR, gamma) on the error of x0; dividing by what turns that into the error of the network's own
    output gives the weight here. `gamma` = 0 switches the weighting off.
    """
    if gamma <= 0:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-8)
    clipped = snr.clamp_max(gamma)
    if prediction_type == "epsilon":
        return clipped / snr.clamp_min(1e-8)  # |x0 error|^2 = |noise error|^2 / SNR
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)  # |x0 error|^2 = |v error|^2 / (SNR + 1)
    return clipped


def loss_diffusion(
    noise_pred: torch.Tensor, target: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str, gamma: float
) -> torch.Tensor:
    """L_diff = E || eps - eps_theta(z_t, t, c_tau, c_face, c_body) ||^2, min-SNR weighted (BoLID Eq. 14). Scalar."""
    error = F.mse_loss(noise_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return (min_snr_weight(alphas_cumprod, prediction_type, gamma) * error).mean()
