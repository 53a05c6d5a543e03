"""One training step's loss: L = L_diff + id_weight * L_id + clip_weight * L_CLIP (BoLID Eq. 14) of a batch, with
face_weight * L_face and found_weight * L_found beside them, and x_gen, the picture that all but L_diff look at.

The losses themselves are in `method/losses.py`, the networks that look at the picture in `pixel_losses.py`.

Shapes: B batch, D body dimension, (C, h, w) latents.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.train_adapter.config import NO_TARGET, OF_THE_PERSON, TrainAdapterConfig
from bolid.train_adapter.data import WHOLE_BODY, AdapterTable, Batch, TextStates, draw_context, fuse_context

if TYPE_CHECKING:
    import numpy as np
    import torch


SWAPPED_ALPHA_BAR = (0.003, 0.6)  # where a body's outline is still open, and yet to be seen in x0-hat
CALIBRATION_PEOPLE = 600  # who say what a reader sees in photos; their mean is then known to 0.04 of its deviations
FEW_STEPS = 8  # a base that samples in so few is a distilled one


def training_schedule(pipe: Any) -> Any:
    """The base's own noise schedule, as training needs it: add_noise, get_velocity, alphas_cumprod."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


class Objective:
    """L = L_diff + id_weight * L_id + clip_weight * L_CLIP (BoLID Eq. 14) + face_weight * L_face
    + found_weight * L_found of a batch.

    `network` is the UNet as training calls it (compiled, or shared by processes); `pipe.unet` the same weights bare.
    """

    def __init__(
        self, pipe: Any, network: Any, table: AdapterTable, text_states: TextStates, family: Family,
        config: TrainAdapterConfig, device: torch.device, pixels: Any = None,
    ) -> None:  # fmt: skip
        self.network, self.unet, self.table, self.config = network, pipe.unet, table, config
        self.device, self.pixels, self.text_states, self.image_size = device, pixels, text_states, family.image_size
        self.schedule = training_schedule(pipe)
        self.prediction_type: str = self.schedule.config.prediction_type
        self.positions = math.prod(table.latents.shape[-2:])
        x_gen = config.x_gen if pixels is not None else ""
        self.few_steps = few_step_sampler(pipe, family) if x_gen == "few-step" else {}
        self.guidance = family.guidance
        if x_gen == "sampled":
            from diffusers import LCMScheduler

            from bolid.backends.diffusion import sampler

            scheduler = sampler(pipe.scheduler, family.defaults)
            scheduler.set_timesteps(config.x_gen_steps)
            self.sampling_timesteps = scheduler.timesteps.long().to(device)
            self.consistency = isinstance(scheduler, LCMScheduler)
        if x_gen == "swapped":
            low, high = SWAPPED_ALPHA_BAR
            alphas = self.schedule.alphas_cumprod
            self.swapped_timesteps = ((alphas >= low) & (alphas <= high)).nonzero()[:, 0]
        if pixels is not None and config.id_loss in OF_THE_PERSON:
            self.bodies = person_bodies(table)
            if config.id_loss == "sliders":
                rows = photos_of_bodies(table, CALIBRATION_PEOPLE)
                latents = table.latents[rows, 0].to(device).float()
                pixels.calibrate(latents, self.bodies[table.owner[rows]].to(device))
        if pixels is not None and config.faces:
            self.faces = person_faces(table)

    def __call__(self, batch: Batch, with_pixels: bool = False) -> dict[str, torch.Tensor]:
        """Scalars: "loss", what is to be minimised, and its terms without their weights: "diffusion", "id", "clip",
        "face", "found".

        All but L_diff are there `with_pixels`, the last two when they are asked for. They are means over the whole
        batch in which photos below `pixel_alpha_bar` count 0: of much noise nothing can be seen in x_gen.
        """
        import torch

        from bolid.method import losses

        latents, noise, timesteps = (part.to(self.device) for part in self._draw_noise(batch))
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = losses.diffusion_target(self.schedule, latents, noise, timesteps)
        alphas = losses.alpha_bar(self.schedule, timesteps)
        conditions = self._conditions(batch)
        noise_pred = self._predict(self.network, noisy, timesteps, conditions)
        diffusion = losses.loss_diffusion(noise_pred, target, alphas, self.prediction_type, self.config.min_snr_gamma)
        if not with_pixels:
            return {"loss": diffusion}

        clear = torch.nonzero(alphas >= self.config.pixel_alpha_bar)[:, 0]
        if self.config.x_gen in NO_TARGET:
            clear = self._worth_sampling(batch)
        weights = {"id": self.config.id_weight, "clip": self.config.clip_weight}
        optional = {"face": self.config.face_weight, "found": self.config.found_weight}
        weights |= {name: weight for name, weight in optional.items() if weight}
        if not len(clear):
            return {"loss": diffusion, "diffusion": diffusion, **dict.fromkeys(weights, diffusion.new_zeros(()))}
        rows = batch.rows[clear.cpu().numpy()]
        shown = self.table.owner[rows]  # the person that x_gen is to show
        generators = [batch.generators[i] for i in clear.tolist()]
        if self.config.x_gen == "one-step":
            x0 = losses.x0_from_prediction(noise_pred[clear], noisy[clear], alphas[clear], self.prediction_type)
        else:
            conditions = {name: value[clear] for name, value in conditions.items()}
            if self.config.x_gen == "few-step":
                x0 = self._few_steps(noisy[clear], timesteps[clear], conditions, generators)
            elif self.config.x_gen == "sampled":
                x0 = self._sample(conditions, generators)
            else:
                shown, conditions = self._swap(shown, conditions, generators)
                x0 = self._swapped(latents[clear], conditions, generators)
        photos = self.table.latents[rows, 0].to(self.device, torch.float32)
        bodies = faces = None
        if self.config.id_loss in OF_THE_PERSON:
            bodies = self.bodies[shown].to(self.device)
            if self.config.x_gen in NO_TARGET:
                bodies = bodies * self._bodies_to_show(batch).to(self.device)[clear, None]
        if self.config.faces:
            known = batch.face_embeds[clear.cpu()].flatten(1).any(1, keepdim=True)
            faces = (self.faces[shown] * known).to(self.device)
        captions = [batch.captions[i] for i in clear.tolist()]
        windows = generators if self.config.x_gen in NO_TARGET else ()
        seen = self.pixels(x0, photos, rows.tolist(), captions, bodies, faces, windows)
        means = dict(zip(("id", "clip", "face", "found"), (part.sum() / len(latents) for part in seen), strict=True))
        loss = diffusion
        for name, weight in weights.items():
            loss = loss + weight * means[name]
        return {"loss": loss, "diffusion": diffusion, **{name: means[name] for name in weights}}

    def _draw_noise(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents of the photos, drawn from the VAE's posterior, noise [B,C,h,w], and timesteps [B]."""
        import torch

        moments = self.table.latents[batch.rows].float()
        total, shape = self.schedule.config.num_train_timesteps, moments.shape[2:]
        drawn = [
            (torch.randn(2, *shape, generator=g), torch.randint(0, total, (), generator=g)) for g in batch.generators
        ]
        noise = torch.stack([pair for pair, _ in drawn])
        latents = moments[:, 0] + moments[:, 1] * noise[:, 0]
        return latents, noise[:, 1], torch.stack([timestep for _, timestep in drawn])

    def _conditions(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Everything that the UNet is told, [B, ...] each."""
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

    def _predict(
        self, network: Any, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        import torch

        from bolid.train_adapter.precision import compiler_errors, computing

        added: dict[str, Any] = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
        added["image_embeds"] = [conditions["face_embeds"], conditions["body_embeds"]]
        with computing(self.device, self.config.precision, self.positions), compiler_errors():
            return network(
                noisy.to(memory_format=torch.channels_last), timesteps,
                encoder_hidden_states=conditions["prompt_embeds"], added_cond_kwargs=added,
            ).sample.float()  # fmt: skip

    def _few_steps(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor],
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:  # fmt: skip
        """x_gen's latents by a few steps of the distilled base from the noised photo on, the gradient going through
        the last of them (after PuLID, Guo et al. 2024, section 3.2; there from pure noise).

        The photo's own noised latents and not pure noise, so that x_gen shows the pose that its target has.
        """
        import torch

        from bolid.method import losses

        steps, carried, latents = self.config.x_gen_steps, self.config.x_gen_grad_steps, noisy
        with few_step_lora(self.unet, self.few_steps):
            for i in range(steps):
                now, later = (timesteps * left // steps for left in (steps - i, steps - i - 1))
                alphas = losses.alpha_bar(self.schedule, now)
                with torch.set_grad_enabled(i >= steps - carried):
                    # The bare network: DistributedDataParallel wants one pass of its own for each backward.
                    noise_pred = self._predict(self.unet, latents, now, conditions)
                    x0 = losses.x0_from_prediction(noise_pred, latents, alphas, self.prediction_type)
                    if self.few_steps["fresh_noise"]:
                        noise = fresh_noise(x0.shape[1:], generators).to(x0)
                    else:
                        noise = losses.noise_from_x0(x0, latents, alphas)
                    latents = losses.noise_level(x0, noise, losses.alpha_bar(self.schedule, later))
        return x0

    def _worth_sampling(self, batch: Batch) -> torch.Tensor:
        """Places in the batch, [B'], of photos with a caption that says what to show, and a body that can be seen, or
        for L_face and L_found a face."""
        import torch

        told = torch.tensor([bool(caption) for caption in batch.captions])
        worth = self._bodies_to_show(batch)
        if self.config.faces:
            worth |= batch.face_embeds.flatten(1).any(1) & self.table.face[batch.rows].any(1)
        return torch.nonzero(told & worth)[:, 0].to(self.device)

    def _bodies_to_show(self, batch: Batch) -> torch.Tensor:
        """Whether a photo shows a body and the branch is told whose, [B]."""
        return batch.body_embeds.flatten(1).any(1) & (self.table.confidence[batch.rows] >= WHOLE_BODY)

    def _sample(self, conditions: dict[str, torch.Tensor], generators: Sequence[torch.Generator]) -> torch.Tensor:
        """x_gen's latents from pure noise, with the family's guidance (BoLID Eq. 8) and the steps of its sampler: by
        consistency sampling (Song et al. 2023, Algorithm 1) where that is LCM's, else DDIM (Song et al. 2021, Eq. 12).

        `x_gen_grad_steps` of the steps carry the gradient, evenly spaced, the last one always; it goes through what the
        network says in them and not through what it is shown, so it neither explodes nor vanishes over many steps
        (DRTune, Wu et al. 2024). In consistency sampling each step's x0-hat, noised anew, is where the next one begins:
        every one counts for the picture as the last does.
        """
        import torch

        from bolid.method import losses

        latents = fresh_noise(self.table.latents.shape[2:], generators).to(self.device)
        unconditional = self._unconditional(conditions)
        steps, carried = len(self.sampling_timesteps), self.config.x_gen_grad_steps
        with_gradient = {round(steps - 1 - i * (steps - 1) / max(1, carried - 1)) for i in range(carried)}
        path = torch.zeros_like(latents)  # zero, and carries the gradient to the steps before
        for i, timestep in enumerate(self.sampling_timesteps):
            now = timestep.expand(len(latents))
            alphas = losses.alpha_bar(self.schedule, now)
            shown = latents.detach()
            with torch.set_grad_enabled(i in with_gradient):
                if i in self.guidance.steps(steps):
                    noise_pred = self._guided(shown, now, conditions, unconditional)
                else:
                    noise_pred = self._predict(self.unet, shown, now, conditions)
            x0 = losses.x0_from_prediction(noise_pred, latents, alphas, self.prediction_type)
            if self.consistency:
                x0 = x0 + path
                path = x0 - x0.detach()
            if i + 1 == steps:
                break
            later = losses.alpha_bar(self.schedule, self.sampling_timesteps[i + 1].expand_as(now))
            if self.consistency:
                latents = losses.noise_level(x0.detach(), fresh_noise(x0.shape[1:], generators).to(x0), later)
            else:
                latents = losses.noise_level(x0, losses.noise_from_x0(x0, latents, alphas), later)
        return x0

    def _unconditional(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same conditions for the other side of guidance: no text and nobody."""
        from bolid.method.body_condition import null_condition

        nothing, pooled = self.text_states([""])
        unconditional = {**conditions, "prompt_embeds": nothing.expand_as(conditions["prompt_embeds"])}
        unconditional |= {name: null_condition(conditions[name]) for name in ("face_embeds", "body_embeds")}
        if pooled is not None:
            unconditional["text_embeds"] = pooled.expand_as(conditions["text_embeds"])
        return unconditional

    def _guided(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, torch.Tensor],
        unconditional: dict[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """The prediction with guidance (BoLID Eq. 8); its unconditional side carries no gradient."""
        import torch

        noise_pred = self._predict(self.unet, noisy, timesteps, conditions)
        if self.guidance.up > 1:
            with torch.no_grad():
                without = self._predict(self.unet, noisy, timesteps, unconditional)
            noise_pred = without + self.guidance.up * (noise_pred - without)
        return noise_pred

    def _swap(
        self, owners: np.ndarray, conditions: dict[str, torch.Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Somebody else for each of the people `owners` [B'], whom the caption fits too, and the conditions with their
        body and, where one was given, face. Made of some of their photos, as always."""
        import numpy as np
        import torch

        chosen = np.empty_like(owners)
        for i, (owner, generator) in enumerate(zip(owners, generators, strict=True)):
            others = self.table.lookalikes[owner]
            others = others[others != owner] if len(others) > 1 else others
            chosen[i] = others[int(torch.randint(len(others), (), generator=generator))]
        photos = [self.table.people[person] for person in chosen]
        context = draw_context(self.table, photos, self.config, generators)
        body, _, face = (part.to(self.device)[:, None] for part in fuse_context(self.table, *context))
        given = conditions["face_embeds"].flatten(1).any(1)[:, None, None]
        told = conditions["body_embeds"].flatten(1).any(1)[:, None, None]
        return chosen, {**conditions, "body_embeds": body * told, "face_embeds": face * given}

    def _swapped(
        self, latents: torch.Tensor, conditions: dict[str, torch.Tensor], generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """x0-hat, with guidance, of the photos `latents` under noise, the conditions being somebody else's.

        While it samples, the network is shown a body that it began itself, not yet the person's, and has to make it
        theirs. L_diff never shows it that: its noised photos are of the very person. This does, at a fraction of what
        sampling costs.
        """
        import torch

        from bolid.method import losses

        noise = fresh_noise(latents.shape[1:], generators).to(latents)
        places = [int(torch.randint(len(self.swapped_timesteps), (), generator=g)) for g in generators]
        timesteps = self.swapped_timesteps[places].to(self.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        noise_pred = self._guided(noisy, timesteps, conditions, self._unconditional(conditions))
        alphas = losses.alpha_bar(self.schedule, timesteps)
        return losses.x0_from_prediction(noise_pred, noisy, alphas, self.prediction_type)


def fresh_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Normal noise, each photo's from its own generator, [B, *shape] on the CPU."""
    import torch

    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def person_bodies(table: AdapterTable) -> torch.Tensor:
    """The mean of what the body encoder reads in each of a person's photos, weighted by its confidence, [people, D].

    Not the fused Gaussian's mean, which lies nearer to the prior the fewer photos there are: x_gen is one picture, and
    this is what one photo of the person says on average.
    """
    import torch

    bodies = []
    for rows in table.people:
        weight = table.confidence[rows] + 1e-6
        bodies.append((weight[:, None] * table.body_mean[rows]).sum(0) / weight.sum())
    return torch.stack(bodies)


def photos_of_bodies(table: AdapterTable, most: int) -> np.ndarray:
    """A photo that shows most of the body of each of at most so many people, evenly spaced; the rows. Any photo, unless
    somebody has one that does."""
    import numpy as np

    photos = [rows[table.confidence[rows].numpy() >= WHOLE_BODY][:1] for rows in table.people]
    chosen = np.concatenate(photos)
    if not len(chosen):
        chosen = np.array([rows[0] for rows in table.people])
    return chosen[np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int)]


def person_faces(table: AdapterTable) -> torch.Tensor:
    """The mean direction of all faces that are seen of a person, [people, 512]; zeros without any."""
    import torch
    import torch.nn.functional as F

    return F.normalize(torch.stack([table.face[rows].sum(0) for rows in table.people]), dim=-1)


def few_step_sampler(pipe: Any, family: Family) -> dict[str, Any]:
    """How the base takes few steps: {"lora": whether a LoRA makes it able to, "fresh_noise": consistency sampling}.

    Loads the family's few-step LoRA, switched off. Raises BolidError for a base that needs many steps.
    """
    from bolid.backends.diffusion import quiet_diffusers

    settings, lora = family.few_steps, family.few_steps_lora
    if settings and lora.is_file():
        with quiet_diffusers():
            pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="few-steps")
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)
        pipe.unet.disable_adapters()
        return {"lora": True, "fresh_noise": "LCM" in settings.get("scheduler", "")}
    if int(family.defaults.get("steps", 25)) <= FEW_STEPS:
        return {"lora": False, "fresh_noise": "LCM" in type(pipe.scheduler).__name__}
    raise BolidError(
        f"--x-gen few-step: the base of family {family.name!r} takes {family.defaults.get('steps', 25)} steps "
        "and has no few-step LoRA",
        "leave it out, or choose a family like sdxl-lightning",
    )


@contextlib.contextmanager
def few_step_lora(unet: Any, few_steps: dict[str, Any]) -> Iterator[None]:
    """Inside, the few-step LoRA is on, where there is one."""
    if few_steps["lora"]:
        unet.enable_adapters()
    try:
        yield
    finally:
        if few_steps["lora"]:
            unet.disable_adapters()
