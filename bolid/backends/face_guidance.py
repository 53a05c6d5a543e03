"""Pictures drawn towards a person's face while they are painted, by the gradient of what the face model sees.

Classifier guidance with a face model, without any training (FreeDoM, Yu et al. 2023, arXiv:2303.09833): in each step of
a stretch of the denoising, x0-hat is moved against the gradient of L_face and L_found. Not in the paper.
Shapes: N pictures, C latent channels, (h, w) latent positions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bolid.method import losses

if TYPE_CHECKING:
    from bolid.backends.face import DifferentiableFaces
    from bolid.controls import Scale

STEP = 0.1  # how far a weight of 1 moves x0-hat in a step, in root mean squares of latents (about 1)
REACH = 3.0  # around the face's middle, in mean distances of its landmarks from there: about the height of a face
FOUND_WEIGHT = 0.5  # of L_found beside L_face: without a face to be seen the face model cannot say whose it is


@contextlib.contextmanager
def face_guidance_during(
    pipe: Any, faces: DifferentiableFaces, face: torch.Tensor, weight: Scale, pictures: int
) -> Iterator[None]:
    """For one call of `pipe` that paints so many `pictures`, all of the person whose `face` [512] it is, in the stretch
    of `weight`. Never in the last step: its x0-hat is the picture, and would keep what only pleases the network.

    What the UNet says is changed so that x0-hat, whatever the sampler makes of it, lies STEP times the weight further
    down the gradient. That is taken with respect to z_t, through the UNet, so that what it asks for is what the UNet
    can paint; of the rows with the prompt alone, where guidance has others too.
    """
    forward, steps = pipe.unet.forward, itertools.count()
    schedule, prediction_type = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type

    def towards(sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **others: Any) -> Any:
        step = next(steps)
        last = step == pipe.num_timesteps - 1
        if last or step not in weight.steps(pipe.num_timesteps):
            return forward(sample, timestep, encoder_hidden_states, **others)
        inputs = (sample, encoder_hidden_states, others)
        alphas = schedule[torch.as_tensor(timestep).long().cpu()].to(sample.device).expand(pictures)
        with torch.enable_grad():
            noisy = sample[-pictures:].detach().requires_grad_()
            _, states, more = _rows(inputs, slice(-pictures, None), len(sample))
            prediction = forward(noisy, timestep, states, **more)[0]
            x0 = losses.x0_from_prediction(prediction.float(), noisy.float(), alphas, prediction_type)
            pixels = pipe.vae.decode((x0 / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample.float()
            embeds, score, landmarks = faces.look(pixels.clamp(-1, 1))
            unlike = losses.loss_face(embeds, face[None])
            unlike = unlike + FOUND_WEIGHT * losses.loss_found(score, torch.ones_like(score))
            (slope,) = torch.autograd.grad(unlike.sum(), noisy)
        around = heads(landmarks, pixels.shape[2:], x0.shape[2:])
        square = (around * slope.float().square()).mean(dim=(1, 2, 3), keepdim=True)
        mean = square / around.mean(dim=(1, 2, 3), keepdim=True)
        moved = x0.detach() - STEP * weight.up * around * slope.float() / mean.sqrt().clamp_min(1e-12)
        wanted = losses.prediction_from_x0(moved, noisy.detach().float(), alphas, prediction_type)
        answer = [wanted.to(prediction.dtype)]
        if len(sample) > pictures:  # the rows without the prompt, in front
            rest, states, more = _rows(inputs, slice(None, -pictures), len(sample))
            answer.insert(0, forward(rest, timestep, states, **more)[0] + answer[0] - prediction.detach())
        return (torch.cat(answer),)

    pipe.unet.forward = towards
    try:
        yield
    finally:
        pipe.unet.forward = forward


def heads(landmarks: torch.Tensor, size: Sequence[int], latent_size: Sequence[int]) -> torch.Tensor:
    """How near each latent position is to the face with these `landmarks` [N,5,2] in pixels of pictures of `size` (H,
    W): 1 at its middle, falling as a Gaussian with a deviation of REACH, [N,1,h,w]. What is of the body stays."""
    middle = landmarks.mean(dim=1)
    spread = (landmarks - middle[:, None]).norm(dim=2).mean(dim=1).clamp_min(1e-3)
    y, x = (
        (torch.arange(positions).to(landmarks) + 0.5) * pixels / positions
        for positions, pixels in zip(latent_size, size, strict=True)
    )
    away = (y[:, None] - middle[:, 1, None, None]).square() + (x - middle[:, 0, None, None]).square()
    return (-away / (2 * (REACH * spread[:, None, None]).square())).exp()[:, None]


def _rows(value: Any, rows: slice, of: int) -> Any:
    """`value` with the `rows` of each tensor in it that has `of` of them."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == of else value
    if isinstance(value, dict):
        return {name: _rows(part, rows, of) for name, part in value.items()}
    return type(value)(_rows(part, rows, of) for part in value) if isinstance(value, list | tuple) else value
