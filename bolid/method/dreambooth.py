"""DreamBooth (Ruiz et al., arXiv:2208.12242): the loss on a person's photos and its prior preservation.

    Eq. 9    E [ w_t |x0-hat(z_t, c) - x|^2 ]
    Eq. 10   Eq. 9 + lambda E [ w_t' |x0-hat(z_t', c_pr) - x_pr|^2 ]

x is a photo of the person and c a prompt with a rare identifier ("a photo of a q woman"); x_pr is a picture that the
frozen base made of the class prompt c_pr ("a photo of a woman"). Without the second term the whole class drifts to the
person. A baseline trains with them (examples/experiment/dreambooth.py); BoLID's adapters do not.

Shapes: B batch, C latent channels, (h, w) latent positions.
"""

from __future__ import annotations

import torch

from bolid.method.losses import x0_from_prediction


def loss_reconstruction(x0_hat: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """DreamBooth's diffusion loss (BoLID Eq. 9): w_t |x0-hat - x|^2, a mean over positions and batch. Scalar.

    `x0_hat`, `x` [B,C,h,w], `weights` w_t [B]. With w_t = alpha-bar / (1 - alpha-bar) it is the plain loss on the noise
    (Ho et al. 2020, Eq. 14).
    """
    error = (x0_hat.float() - x.float()).square().mean(dim=(1, 2, 3))
    return (weights * error).mean()


def snr_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """w_t of the loss on the noise: the signal-to-noise ratio alpha-bar / (1 - alpha-bar), [B]."""
    return alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-8)


def loss_dreambooth(
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    x: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    is_prior: torch.Tensor,
    *,
    prediction_type: str,
    prior_weight: float = 1.0,
) -> torch.Tensor:
    """DreamBooth's loss with prior preservation (BoLID Eq. 10), of a batch with both kinds of samples. Scalar.

    `prediction`, `noisy`, `x` [B,C,h,w]: the network's output, z_t and the clean latents; `alphas_cumprod` [B].
    `is_prior` bool [B]: which are the base's own pictures of the class. `prior_weight` is lambda; each kind's loss is a
    mean over its own samples. Without prior samples this is Eq. 9. Raises ValueError without photos.
    """
    if bool(is_prior.all()):
        raise ValueError("the batch has no photo of the person")
    x0_hat = x0_from_prediction(prediction, noisy, alphas_cumprod, prediction_type)
    weights = snr_weights(alphas_cumprod)
    loss = loss_reconstruction(x0_hat[~is_prior], x[~is_prior], weights[~is_prior])
    if bool(is_prior.any()):
        loss = loss + prior_weight * loss_reconstruction(x0_hat[is_prior], x[is_prior], weights[is_prior])
    return loss
