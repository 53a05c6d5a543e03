"""Sampling: text, face and body in, latents of pictures out. The loop is `denoise`.

Networks and schedulers are diffusers'. Without losses on the person the latents are those of its pipelines, to the bit.
Shapes: N pictures, C latent channels, (h, w) latent positions, L tokens, E channels of the text states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from bolid.backends.attention import conditions_cached
from bolid.backends.diffusion import encode_prompts, quiet_diffusers
from bolid.backends.loss_guidance import GuidanceLoss, LossGuidance, keep_noise
from bolid.errors import BolidError
from bolid.method import losses as formulas
from bolid.method.body_condition import build_ip_adapter_image_embeds
from bolid.scales import Scale

if TYPE_CHECKING:
    from diffusers import ControlNetModel

Text = Sequence[str] | tuple[torch.Tensor, torch.Tensor | None]
"""Prompts, or what `encode_prompts` makes of them."""

OnStep = Callable[[int, int, torch.Tensor], None]
"""Called after each step with (steps done, of how many, x0-hat [N,C,h,w]). What it raises ends the sampling."""


@dataclass(frozen=True)
class Condition:
    """What the UNet is conditioned on, a row for each picture."""

    text: torch.Tensor  # [N,L,E], c_tau
    added: dict[str, Any] = field(default_factory=dict)
    """SDXL's "text_embeds" [N,P] and "time_ids" [N,6]; the branches' vectors, "image_embeds", a list of [N,1,D]."""

    def then(self, other: Condition) -> Condition:
        """The rows of this one, then those of `other`."""
        added = {}
        for name, mine in self.added.items():
            theirs = other.added[name]
            both = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)] if isinstance(mine, list) else None
            added[name] = torch.cat([mine, theirs]) if both is None else both
        return Condition(torch.cat([self.text, other.text]), added)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598). At a scale of 1 or less there is none."""

    scale: Scale
    negative: str | Text = ""  # the prompts it leads away from: one for all pictures, or one each


@dataclass(frozen=True)
class Control:
    """A ControlNet (Zhang et al. 2023, arXiv:2302.05543) and the picture that it follows."""

    network: ControlNetModel
    image: Any  # PIL, uint8 or float [0, 1]: one for all pictures, or one each; [N,3,H,W] in 0..1 in `denoise`
    scale: Scale = field(default_factory=Scale)


@dataclass(frozen=True)
class Start:
    """Pictures to change: they get as much noise as the last `strength` of the steps take away (SDEdit, Meng et al.
    2022, arXiv:2108.01073)."""

    pictures: torch.Tensor  # latents [N,C,h,w]
    strength: float  # 0..1, above 0


@torch.no_grad()
def denoise(
    pipe: Any,
    latents: torch.Tensor,
    condition: Condition,
    null: Condition | None = None,
    *,
    guidance: Scale,
    scales: Sequence[Scale] = (),
    controls: Sequence[Control] = (),
    losses: Sequence[GuidanceLoss] = (),
    generators: Sequence[torch.Generator] = (),
    first: int = 0,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """z_T -> z_0, [N,C,h,w], by the timesteps that `pipe.scheduler` is set to, from number `first` on.

    `condition`, `null`: (c_tau, c_face, c_body) and what takes their place in the unconditional prediction, for
    `guidance` above 1. `scales`: lambda_face, lambda_body, of each branch that is loaded; as they are set where none is
    given. `guidance`, scales, controls and `losses` count in the steps of their intervals.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    timesteps, w = scheduler.timesteps[first:], guidance.value
    steps = len(timesteps)
    unconditional = condition if null is None else null
    both, guided_steps = unconditional.then(condition), range(0) if null is None else guidance.steps(steps)
    person = LossGuidance(losses, pipe.vae, scheduler)
    options = pipe.prepare_extra_step_kwargs(list(generators) or None, eta=0.0)
    current: list[float | dict[str, float]] = []

    def predict(z_t: torch.Tensor, t: Any, step: int, given: Condition) -> torch.Tensor:
        """eps_theta(z_t, t, given), or v where the base predicts velocities."""
        residuals = _control_residuals(controls, z_t, t, step, steps, given)
        return unet(z_t, t, given.text, added_cond_kwargs=given.added, **residuals, return_dict=False)[0]

    for step, t in enumerate(timesteps):
        if scales and (wanted := [scale.at(step, steps) for scale in scales]) != current:
            pipe.set_ip_adapter_scale(wanted)
            current = wanted
        z_t = scheduler.scale_model_input(latents, t)
        guided, kept = step in guided_steps, None
        if active := person.active(step, steps):
            plain, cond, kept = person.move(partial(predict, t=t, step=step, given=condition), z_t, t, active)
            uncond = predict(z_t, t, step, unconditional) + cond - plain if guided else cond
        elif guided:
            uncond, cond = predict(torch.cat([z_t, z_t]), t, step, both).chunk(2)
        else:
            cond = predict(z_t, t, step, condition)

        # Classifier-free guidance: BoLID Eq. 13 with this w, Eq. 8 with w - 1. `uncond` lacks text, face and body.
        prediction = uncond + w * (cond - uncond) if guided else cond

        stepped = scheduler.step(prediction, t, latents, **options, return_dict=False)
        latents = stepped[0] if kept is None else keep_noise(scheduler, t, latents, stepped, kept)
        if on_step is not None:
            on_step(step + 1, steps, _predicted_x0(scheduler, prediction, z_t, t))
    return latents


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Text,
    *,
    size: tuple[int, int],
    steps: int | Sequence[int],
    guidance: Guidance,
    generators: Sequence[torch.Generator],
    vectors: Sequence[torch.Tensor] = (),
    scales: Sequence[Scale] = (),
    controls: Sequence[Control] = (),
    losses: Sequence[GuidanceLoss] = (),
    latents: torch.Tensor | Start | None = None,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Latents [N,C,h,w] of one picture a prompt, all of one person; `decode_latents` makes pictures of them.

    `pipe`: what `load_base` gives, with adapters, LoRAs and a sampler as they are wanted. `size`: (height, width),
    pixels. `steps`: how many, or their timesteps, where the sampler takes them. `generators`: one a picture.
    `vectors`: c_face [512] and c_body [D], of each branch that is loaded, in that order. `latents`: pure noise
    [N,C,h,w], by default drawn from the generators, or the pictures to start from. The rest: see `denoise`.
    Raises BolidError for a base that takes the guidance scale as an input: its sampler is another one.
    """
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise BolidError(
            "this base takes the guidance scale as an input of its UNet, which is not supported",
            "give the base that it was distilled from, or its few-step LoRA",
        )
    device, count = pipe._execution_device, len(generators)  # not pipe.device: see offload
    guided, negative = guidance.scale.value > 1, guidance.negative
    embeds = [e.to(device, pipe.unet.dtype) for e in build_ip_adapter_image_embeds(list(vectors), guidance=guided)]
    condition, null = _condition(pipe, prompts, count, size, [embed[-1:] for embed in embeds]), None
    if guided:
        negative = [negative] * count if isinstance(negative, str) else negative
        null = _condition(pipe, negative, count, size, [embed[:1] for embed in embeds])
    wanted = {"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": list(steps)}
    pipe.scheduler.set_timesteps(**wanted, device=device)
    channels, generators, first = pipe.unet.config.in_channels, list(generators), 0
    if isinstance(latents, Start):
        first = _first_step(pipe.scheduler, latents.strength)
        noise = randn_tensor(latents.pictures.shape, generator=generators, device=device, dtype=condition.text.dtype)
        level = pipe.scheduler.timesteps[first : first + 1]
        latents = pipe.scheduler.add_noise(latents.pictures.to(noise), noise, level)
    else:
        latents = pipe.prepare_latents(count, channels, *size, condition.text.dtype, device, generators, latents)
    controls = [_prepared(control, size, count, device) for control in controls]
    with quiet_diffusers(), conditions_cached(pipe.unet, *(control.network for control in controls)):
        return denoise(
            pipe, latents, condition, null, guidance=guidance.scale, scales=scales, controls=controls, losses=losses,
            generators=generators, first=first, on_step=on_step,
        )  # fmt: skip


def _first_step(scheduler: Any, strength: float) -> int:
    """The number of the step from which on the last `strength` (0..1] of the steps remain, at least one."""
    steps, order = scheduler.num_inference_steps, getattr(scheduler, "order", 1)
    first = (steps - max(1, min(int(steps * strength), steps))) * order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return first


def _predicted_x0(scheduler: Any, prediction: torch.Tensor, z_t: torch.Tensor, t: Any) -> torch.Tensor:
    """x0-hat [N,C,h,w]: the latents that a prediction at `t` amounts to."""
    alphas = formulas.alpha_bar(scheduler, torch.as_tensor(t).long()).to(z_t.device).expand(len(z_t))
    return formulas.x0_from_prediction(prediction.float(), z_t.float(), alphas, scheduler.config.prediction_type)


def _condition(pipe: Any, text: Text, count: int, size: tuple[int, int], embeds: Sequence[torch.Tensor]) -> Condition:
    """The condition of `count` pictures: their text, SDXL's sizes, and the branches' `embeds`, [1,1,D] each."""
    given = text if isinstance(text, tuple) and isinstance(text[0], torch.Tensor) else encode_prompts(pipe, text)
    device, dtype = pipe._execution_device, pipe.unet.dtype
    if len(given[0]) != count:
        raise ValueError(f"{len(given[0])} prompts for {count} pictures")
    states, pooled = (None if part is None else part.to(device, dtype) for part in given)
    added: dict[str, Any] = {}
    if pooled is not None:  # SDXL: the size of the original and of the target, and where the crop began
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=device)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(count, 1)}
    if embeds:
        added["image_embeds"] = [embed.repeat(count, 1, 1) for embed in embeds]
    return Condition(states, added)


def _prepared(control: Control, size: tuple[int, int], count: int, device: Any) -> Control:
    """The same with its picture as the network's input, [N,3,H,W] in 0..1."""
    from diffusers.image_processor import VaeImageProcessor

    height, width = size
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    image = processor.preprocess(control.image, height=height, width=width)
    image = image.repeat_interleave(count // len(image), dim=0).to(device, control.network.dtype)
    return Control(control.network, image, control.scale)


@torch.no_grad()
def _control_residuals(
    controls: Sequence[Control], z_t: torch.Tensor, t: Any, step: int, steps: int, given: Condition
) -> dict[str, Any]:
    """What the ControlNets add to the UNet's skip connections in this step, summed."""
    down, middle = None, None
    for control in controls:
        if step not in control.scale.steps(steps) or control.scale.is_zero:
            continue
        more, last = control.network(
            z_t, t, given.text, torch.cat([control.image] * (len(z_t) // len(control.image))), control.scale.value,
            added_cond_kwargs=given.added, return_dict=False,
        )  # fmt: skip
        down = more if down is None else [a + b for a, b in zip(down, more, strict=True)]
        middle = last if middle is None else middle + last
    if down is None:
        return {}
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
