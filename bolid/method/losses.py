"""The joint objective L = L_diff + id_weight * L_id + clip_weight * L_CLIP (BoLID Eq. 14) and what its terms need.

L_diff compares the UNet's predictions; L_id and L_CLIP compare features of x_gen, the generated picture, that frozen
networks compute. Those networks are elsewhere; here are the formulas.

Shapes: B batch, C latent channels, (h, w) latent positions, K = 17 COCO keypoints, E embedding dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bolid.method.keypoints import BODY, BONES, SCALE_BONES

MAX_FACE_SCORE = 0.75  # a face detector's score above which L_det does not push


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


# ---- x_gen --------------------------------------------------------------------------------------------------------


def x0_from_prediction(
    noise_pred: torch.Tensor, noisy: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """x0-hat, the clean latents that a prediction amounts to: z_t = sqrt(a) x0 + sqrt(1 - a) eps (BoLID Eq. 5) solved
    for x0, with a = alpha-bar [B]. For v-prediction x0 = sqrt(a) z_t - sqrt(1 - a) v (Salimans & Ho 2022). [B,C,h,w]
    """
    a = alphas_cumprod.view(-1, 1, 1, 1).to(noisy)
    if prediction_type == "epsilon":
        return (noisy - (1 - a).sqrt() * noise_pred) / a.sqrt()
    if prediction_type == "v_prediction":
        return a.sqrt() * noisy - (1 - a).sqrt() * noise_pred
    if prediction_type == "sample":
        return noise_pred
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def prediction_from_x0(
    x0: torch.Tensor, noisy: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The prediction that amounts to x0-hat: the inverse of `x0_from_prediction`. [B,C,h,w]"""
    if prediction_type == "sample":
        return x0
    noise = noise_from_x0(x0, noisy, alphas_cumprod)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = alphas_cumprod.view(-1, 1, 1, 1).to(noisy)
        return a.sqrt() * noise - (1 - a).sqrt() * x0
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def noise_level(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """z_t = sqrt(a) x0 + sqrt(1 - a) eps, with a = alpha-bar [B] (BoLID Eq. 5). [B,C,h,w]"""
    a = alphas_cumprod.view(-1, 1, 1, 1).to(latents)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def noise_from_x0(x0: torch.Tensor, noisy: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The noise that `noisy` holds beside `x0` (BoLID Eq. 5 solved for eps); a below 1. [B,C,h,w]"""
    a = alphas_cumprod.view(-1, 1, 1, 1).to(noisy)
    return (noisy - a.sqrt() * x0) / (1 - a).clamp_min(1e-8).sqrt()


# ---- L_id ---------------------------------------------------------------------------------------------------------


def loss_keypoints(predicted: torch.Tensor, target: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
    """L_id of the paper: the 12 body keypoints of x_gen against the target's own (BoLID Eq. 14, second term). [B]

    `predicted`, `target` [B,K,3] (pixels, pixels, confidence), `height` [B] of the target's body in pixels. The mean
    over the keypoints of their squared distance in heights, weighted by both confidences; those carry no gradient,
    or else being unsure would pay.
    """
    predicted, target = predicted[:, BODY], target[:, BODY]
    weight = predicted[..., 2].detach() * target[..., 2].detach()
    error = (predicted[..., :2] - target[..., :2]).square().sum(-1) / height.clamp_min(1).square()[:, None]
    return (weight * error).sum(-1) / weight.sum(-1).clamp_min(1e-6)


def loss_bone_ratios(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_id without its flaw: lengths of BONES over torso + thigh + shin, which shifting and scaling do not change. [B]

    Comparing keypoints rewards copying the pose; proportions stay the person's. `predicted`, `target` [B,K,3] (pixels,
    pixels, confidence). The mean squared difference of the ratios, each weighted by the least confident keypoint that
    it needs in either picture; confidences carry no gradient.
    """
    confidence = torch.minimum(predicted[..., 2], target[..., 2]).detach()
    weights: list[torch.Tensor] = []
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    for pairs in BONES.values():
        weight = torch.stack([torch.minimum(confidence[:, i], confidence[:, j]) for i, j in pairs], -1)
        for points, lengths in ((predicted[..., :2], ours), (target[..., :2], theirs)):
            length = torch.stack([(points[:, i] - points[:, j]).norm(dim=-1) for i, j in pairs], -1)
            lengths.append((weight * length).sum(-1) / weight.sum(-1).clamp_min(1e-6))
        weights.append(weight.mean(-1))
    bones = list(BONES)
    yardstick = [bones.index(name) for name in SCALE_BONES]
    weight = torch.stack(weights, -1)
    weight = weight * weight[:, yardstick].amin(-1, keepdim=True)
    ratios = []
    for lengths in (ours, theirs):
        length = torch.stack(lengths, -1)
        ratios.append(length / length[:, yardstick].sum(-1, keepdim=True).clamp_min(1e-3))
    return (weight * (ratios[0] - ratios[1]).square()).sum(-1) / weight.sum(-1).clamp_min(1e-6)


# ---- L_CLIP -------------------------------------------------------------------------------------------------------


def loss_clip(image_embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    """L_CLIP = 1 - cos(image, target), the target being the text's or the photo's embedding (BoLID Eq. 14, third
    term; section 1.1 speaks of both). [B] from [B,E], 0 to 2.
    """
    return 1 - F.cosine_similarity(image_embeds, target_embeds, dim=-1)


def loss_face(face_embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    """L_face = 1 - cos(face of x_gen, the person's), not in the paper (PuLID's ID loss, Guo et al. 2024, section 3.2).

    [B] from [B,512], 0 to 2.
    """
    return 1 - F.cosine_similarity(face_embeds, target_embeds, dim=-1)


def loss_face_detection(score: torch.Tensor, photo_score: torch.Tensor) -> torch.Tensor:
    """L_det = max(0, log min(photo_score, MAX_FACE_SCORE) - log score), not in the paper.

    A face detector's score of x_gen against that of the photo with the same caption. [B] from scores [B], 0..1.
    """
    return (photo_score.clamp_max(MAX_FACE_SCORE).log() - score.clamp_min(1e-4).log()).clamp_min(0)
