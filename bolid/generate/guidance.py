"""Guides draw a picture towards a person while it is painted, by the gradient of what frozen networks see in it.

Classifier guidance with a face model or a body encoder, without any training (FreeDoM, Yu et al. 2023,
arXiv:2303.09833): in the steps of a stretch of the denoising, x0-hat is moved down the gradient. Not in the paper.
Shapes: N pictures, C latent channels, (h, w) latent positions, D body dimension, R sliders.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import LCMScheduler

from bolid.backends.diffusion import map_tensors
from bolid.backends.face import DifferentiableFaces
from bolid.backends.pose import PoseModel, weights_file
from bolid.errors import BolidError
from bolid.formats.sliders import load_sliders
from bolid.method import losses
from bolid.method.sliders import reading_distance
from bolid.run import sha256_file

if TYPE_CHECKING:
    from bolid.backends.body import BodyEncoder
    from bolid.models.families import Family
    from bolid.scales import Scale


class Guide(Protocol):
    """What draws towards a person. `weight`: during which part of the denoising, and how strongly."""

    @property
    def step(self) -> float:
        """How far a weight of 1 moves x0-hat in a step, in root mean squares of latents (about 1)."""

    @property
    def weight(self) -> Scale: ...

    @property
    def momentum(self) -> float:
        """How much of the direction of the step before counts beside the gradient's own (Polyak 1964)."""

    @property
    def keeps_noise(self) -> bool:
        """Whether what is moved keeps its noise where the sampler would noise x0-hat anew (`_noise_kept`)."""

    def look(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(how unlike the person pictures [N,3,H,W] in -1..1 are, [N], with a gradient; how much of each latent
        position is to be moved, 0..1, [N,1,h,w])."""


@dataclass(frozen=True)
class FaceGuide:
    """Towards a `face` [512], L2-normed, with L_face and L_found; what is of the body stays."""

    faces: DifferentiableFaces
    face: torch.Tensor
    weight: Scale
    step: float = 0.15
    momentum: float = 0.5
    keeps_noise: bool = True
    found_weight: float = 0.5  # of L_found beside L_face: without a face to be seen nothing can say whose it is

    def look(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, score, landmarks = self.faces.look(pixels)
        unlike = losses.loss_face(embeds, self.face[None])
        unlike = unlike + self.found_weight * losses.loss_found(score, torch.ones_like(score))
        return unlike, heads(landmarks, pixels.shape[2:], latent_size)


@dataclass(frozen=True)
class BodyGuide:
    """Towards a `body` [D], by a `readout` [R, D] of what a body encoder says of the picture; the less of the body can
    be seen, the less far."""

    encoder: BodyEncoder
    pose: PoseModel
    readout: torch.Tensor
    view_size: tuple[int, int]
    body: torch.Tensor
    weight: Scale
    step: float = 0.05
    # With either of these bodies come out no more like the person (examples/tiny_family/LEARNT.md).
    momentum: float = 0.0
    keeps_noise: bool = False

    def look(self, pixels: torch.Tensor, latent_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        mean, _, sure = self.encoder.read_pixels(pixels, self.pose, self.view_size)
        unlike = reading_distance(mean @ self.readout.T, self.body[None] @ self.readout.T)
        return unlike, sure.detach()[:, None, None, None].expand(-1, 1, *latent_size)


Guiding = tuple[Callable[..., Guide], dict[str, str]]
"""What makes a guide of a vector and its `weight`; name -> sha256 of the models that it looks with."""


def towards_faces(family: Family, device: str = "cpu") -> Guiding:
    """With the family's face model. Raises BolidError when there is none, or none with a gradient."""
    # The small ones too: in a full-body picture that is the face, and none is to be made of something larger.
    faces = DifferentiableFaces(family.require("face"), device, small_too=True)
    used = {"guide_face": faces.sha256, "guide_face_detector": faces.detector_sha256}
    return functools.partial(FaceGuide, faces), used


def towards_bodies(family: Family, encoder: BodyEncoder, device: str = "cpu") -> Guiding:
    """With the family's body `encoder`, its sliders and the pose model. Raises BolidError when one is missing or passes
    no gradient."""
    pose, sliders = PoseModel(family.require("pose"), device), family.require("body_sliders")
    if encoder.needs_features or not pose.differentiable:
        raise BolidError(
            f"--body-guidance needs a gradient, which the models of family '{family.name}' do not give",
            "it takes a body encoder trained with --view crop, and a pose model in safetensors",
        )
    used = {
        "guide_body_encoder": encoder.sha256,
        "guide_pose": sha256_file(weights_file(family.pose)),
        "guide_body_sliders": sha256_file(sliders),
    }
    readout = load_sliders(sliders, encoder.space).readout.to(device)
    return functools.partial(BodyGuide, encoder, pose, readout, family.view_size), used


@contextlib.contextmanager
def guided_by(pipe: Any, guides: Sequence[Guide], pictures: int) -> Iterator[None]:
    """For one call of `pipe` that paints so many `pictures`, all of one person.

    A guide counts in the stretch of its weight, but never in the last step: its x0-hat is the picture, and would keep
    what only pleases a network. What the UNet says is changed so that x0-hat, whatever the sampler makes of it, lies
    step * weight further down the gradient, with momentum. That is taken with respect to z_t, through the UNet, so that
    what it asks for is what the UNet can paint; of the rows with the prompt alone, where guidance has others too.
    """
    if not guides:
        yield
        return
    forward, steps = pipe.unet.forward, itertools.count()
    slopes = [torch.zeros(())] * len(guides)
    keep: list[torch.Tensor] = []  # where noise stays in this step, if anywhere
    schedule, prediction_type = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type

    def towards(sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any, **others: Any) -> Any:
        step = next(steps)
        active = [i for i, guide in enumerate(guides) if step in guide.weight.steps(pipe.num_timesteps)]
        if not active or step == pipe.num_timesteps - 1:
            return forward(sample, timestep, encoder_hidden_states, **others)

        def rows(wanted: slice) -> Any:
            inputs = (sample, encoder_hidden_states, others)
            return map_tensors(inputs, lambda part: part[wanted] if part.ndim and len(part) == len(sample) else part)

        alphas = schedule[torch.as_tensor(timestep).long().cpu()].to(sample.device).expand(pictures)
        with torch.enable_grad():
            noisy, states, more = rows(slice(-pictures, None))
            noisy = noisy.detach().requires_grad_()
            prediction = forward(noisy, timestep, states, **more)[0]
            x0 = losses.x0_from_prediction(prediction.float(), noisy.float(), alphas, prediction_type)
            pixels = pipe.vae.decode((x0 / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample.float()
            moved = x0.detach()
            for i in active:
                guide = guides[i]
                unlike, where = guide.look(pixels.clamp(-1, 1), x0.shape[2:])
                (slope,) = torch.autograd.grad(unlike.sum(), noisy, retain_graph=i != active[-1])
                slopes[i] = _of_length_one(slope.float()) + guide.momentum * slopes[i].to(slope.device)
                moved = moved - guide.step * guide.weight.up * _of_length_one(slopes[i], where)
                if guide.keeps_noise:
                    keep[:] = [where.detach() * min(guide.weight.up, 1.0)]
        wanted = losses.prediction_from_x0(moved, noisy.detach().float(), alphas, prediction_type)
        answer = [wanted.to(prediction.dtype)]
        if len(sample) > pictures:  # the rows without the prompt, in front
            rest, states, more = rows(slice(None, -pictures))
            answer.insert(0, forward(rest, timestep, states, **more)[0] + answer[0] - prediction.detach())
        return (torch.cat(answer),)

    pipe.unet.forward = towards
    try:
        with _noise_kept(pipe.scheduler, keep):
            yield
    finally:
        pipe.unet.forward = forward


@contextlib.contextmanager
def _noise_kept(scheduler: Any, keep: list[torch.Tensor]) -> Iterator[None]:
    """LCM's sampler noises x0-hat anew in each step, and what a guide has drawn goes under in it. So where `keep`
    [N,1,h,w], taken out in each step, is 1, the noise is what the step took for noise in z_t, as in DDIM's sampler
    (Song et al. 2020, arXiv:2010.02502, Eq. 12 with sigma 0), and between 0 and 1 a mixture of the same variance.
    Other samplers keep it anyway, or are left as they are."""
    if not isinstance(scheduler, LCMScheduler):
        yield
        return
    plain_step = scheduler.step

    @functools.wraps(plain_step)  # pipelines look at its parameters
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *others: Any, **options: Any) -> Any:
        answer = plain_step(model_output, timestep, sample, *others, **options)
        if not keep:
            return answer
        where, x0 = keep.pop(), answer[1].float()
        alpha, next_alpha = (
            scheduler.alphas_cumprod[int(t)].to(x0) for t in (timestep, scheduler.timesteps[scheduler.step_index])
        )
        fresh = (answer[0].float() - next_alpha.sqrt() * x0) / (1 - next_alpha).sqrt()
        known = (sample.float() - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        noise = (1 - where.square()).sqrt() * fresh + where * known
        return ((next_alpha.sqrt() * x0 + (1 - next_alpha).sqrt() * noise).to(answer[0].dtype), answer[1])

    scheduler.step = step
    try:
        yield
    finally:
        scheduler.step = plain_step


def _of_length_one(slope: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """`slope` [N,C,h,w] by `where` [N,1,h,w], the root of its mean square there 1."""
    where = torch.ones_like(slope[:, :1]) if where is None else where
    mean = (where * slope.square()).mean((1, 2, 3), keepdim=True) / where.mean((1, 2, 3), keepdim=True)
    return where * slope / mean.sqrt().clamp_min(1e-12)


REACH = 3.0  # around a face's middle, in mean distances of its landmarks from there: about the height of a face


def heads(landmarks: torch.Tensor, size: Sequence[int], latent_size: Sequence[int]) -> torch.Tensor:
    """How near each latent position is to the face with these `landmarks` [N,5,2] in pixels of pictures of `size` (H,
    W): 1 at its middle, falling as a Gaussian with a deviation of REACH, [N,1,h,w]."""
    middle = landmarks.mean(dim=1)
    spread = (landmarks - middle[:, None]).norm(dim=2).mean(dim=1).clamp_min(1e-3)
    y, x = (
        (torch.arange(positions).to(landmarks) + 0.5) * pixels / positions
        for positions, pixels in zip(latent_size, size, strict=True)
    )
    away = (y[:, None] - middle[:, 1, None, None]).square() + (x - middle[:, 0, None, None]).square()
    return (-away / (2 * (REACH * spread[:, None, None]).square())).exp()[:, None]
