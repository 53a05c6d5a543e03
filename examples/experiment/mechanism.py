"""What the trained baselines share: the data, the draw of a batch, and the training loop.

A baseline is a `Mechanism`: it puts trainable layers beside the frozen base, says how the base predicts with them, and
what it is given of a person when it generates. All have the same base, shards, steps, batches, learning rate, drop-out
and leave-one-out as `bolid train-adapter`, with its functions and defaults; only the condition differs. The condition
comes from *other* photos of the person than the target: conditioned on the target itself, a method learns to copy.

Shapes: B batch, M photos, E image embedding, F = 512 face embedding, R body ratios, L tokens of the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_words import population

from bolid.backends.diffusion import load_base, quiet_diffusers
from bolid.backends.sampling import Control, Text
from bolid.errors import BolidError
from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
from bolid.formats.shards import directory_sha256, group_by_person, read_index, read_shards
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method import losses
from bolid.method.optim import adapter_schedule, update_ema
from bolid.models.families import Family, get_family
from bolid.run import derive_seed, run_record
from bolid.synth.body import body_ratios
from bolid.synth.people import RATIO_NAMES, sample_person
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.data import TextStates, batch_rows, without_build
from bolid.train_adapter.denoiser import training_schedule
from bolid.train_adapter.precision import choose_precision, computing, store_frozen
from bolid.train_adapter.setup import base_sha256

KIND = "image-adapter"
FILE = "image.safetensors"
FACE = 512


# ---- data ---------------------------------------------------------------------------------------------------------


class Table:
    """The photos of people with two or more: latents, image embeddings, faces (zero where none is found), keypoints
    (x and y in 0..1 of the picture) and captions."""

    def __init__(self, train: Path) -> None:
        latents, embeds, faces, keypoints = [], [], [], []
        self.captions: list[str] = []
        self.people: list[np.ndarray] = []  # rows of each person
        self.names: list[str] = []  # of each person
        for name, group in group_by_person(read_shards(train)):
            if len(group) < 2:
                continue
            if any("latents" not in part.tensors or "image_embed" not in part.tensors for part in group):
                raise BolidError(f"{train} holds no latents or no image embeddings", "give what `bolid shard` writes")
            self.people.append(np.arange(len(self.captions), len(self.captions) + len(group)))
            self.names.append(name)
            for part in group:
                self.captions.append(part.caption)
                latents.append(torch.from_numpy(part.tensors["latents"]))
                embeds.append(torch.from_numpy(part.tensors["image_embed"]))
                faces.append(torch.from_numpy(part.tensors.get("face", np.zeros(FACE, np.float32))))
                size = np.array([part.meta["width"], part.meta["height"], 1], np.float32)
                keypoints.append(torch.from_numpy(part.tensors["keypoints"] / size))
        if not self.people:
            raise BolidError(f"nobody in {train} has two photos", "collect at least two of each person")
        self.latents, self.embeds = torch.stack(latents), torch.stack(embeds).float()
        self.faces, self.keypoints = torch.stack(faces).float(), torch.stack(keypoints).float()
        self.owner = np.concatenate([np.full(len(rows), person) for person, rows in enumerate(self.people)])

    @cached_property
    def ratios(self) -> torch.Tensor:
        """The true body ratios of each person, standardised, [people, R]; people are seeds of `bolid synth`."""
        with torch.autocast("cpu", enabled=False):
            return torch.stack([true_ratios(name) for name in self.names])


def true_ratios(name: str) -> torch.Tensor:
    """A person's body ratios from the truth, in standard deviations of the population, f32 [R]."""
    mean, spread = population()
    found = body_ratios(sample_person(int(name.removeprefix("p"))))
    return torch.tensor((np.array([found[key] for key in RATIO_NAMES]) - mean) / spread, dtype=torch.float32)


def draw_context(
    table: Table, rows: np.ndarray, most: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row 1 to `most` *other* photos of its person: rows [B, most], and a mask of valid ones, bool."""
    context = torch.zeros(len(rows), most, dtype=torch.long)
    present = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, row in enumerate(rows):
        mates = table.people[table.owner[row]]
        others = mates[mates != row]
        count = int(torch.randint(1, min(most, len(others)) + 1, (1,), generator=generator))
        context[i, :count] = torch.from_numpy(others[torch.randperm(len(others), generator=generator)[:count].numpy()])
        present[i, :count] = True
    return context, present


@dataclass
class Draw:
    """One batch of a training step."""

    step: int
    rows: np.ndarray  # [B] the photos to be denoised
    context: torch.Tensor  # [B, M] rows of the person's other photos
    present: torch.Tensor  # bool [B, M]
    drop_image: torch.Tensor  # bool [B]: the condition is the null condition
    captions: list[str]  # "" where the text is dropped
    text: torch.Tensor  # [B, L, E]
    noisy: torch.Tensor
    timesteps: torch.Tensor
    generator: torch.Generator


@dataclass
class Person:
    """What a method is given of a person when it generates."""

    name: str
    embeds: torch.Tensor  # [M, E], unit length
    faces: torch.Tensor  # [M, F]; zero where no face is found
    head_keypoints: list[np.ndarray] = field(default_factory=list)
    """[17, 3] (0..1, 0..1, confidence) of each picture to be made, from the base's own picture of the prompt."""


class Mechanism:
    """A baseline. `pipe`: the base, which it changes; `size`: E. `parameters`: what is trained and stored, by name."""

    most = 1  # photos of a person at once
    parameters: dict[str, torch.nn.Parameter]

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        self.pipe, self.family, self.unet, self.size = pipe, family, pipe.unet, size

    def predict(self, table: Table, draw: Draw) -> torch.Tensor:
        """The base's prediction for the noisy latents, with the person as the condition. [B,C,h,w]"""
        raise NotImplementedError

    def extra_loss(self, table: Table, draw: Draw) -> torch.Tensor | None:
        """A further loss of this step."""
        return None

    def text(self, prompts: Sequence[str], person: Person) -> Text:
        """The text's condition of pictures."""
        return list(prompts)

    def vectors(self, person: Person) -> list[torch.Tensor]:
        """The vectors of the branches that are loaded."""
        return []

    def controls(self, person: Person) -> list[Control]:
        """ControlNets and their pictures."""
        return []


# ---- training -----------------------------------------------------------------------------------------------------


def train_method(
    method: str,
    build: Callable[[Any, Family, int, int], Mechanism],
    train: Path,
    out: Path,
    *,
    config: TrainAdapterConfig,
    seed: int = 0,
    family: str | None = None,
) -> Path:
    """Train one baseline and write out/image.safetensors. The same call after a kill goes on."""
    chosen = get_family(family or read_index(train)["record"]["family"])
    table = Table(train)
    pipe = load_base(chosen, "cpu")
    pipe.unet.to(memory_format=torch.channels_last)
    text_states = TextStates(pipe, table.captions)
    if text_states([""])[1] is not None:
        raise BolidError(f"the base of family {chosen.name} is an SDXL", "this baseline is for SD 1.x bases")
    with quiet_diffusers():
        mechanism = build(pipe, chosen, table.embeds.shape[1], derive_seed(seed, method))
    parameters = mechanism.parameters
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    inputs = {"train": directory_sha256(train), "base": base_sha256(chosen)}
    steps = config.steps
    settings = {"method": method, "embedding_size": table.embeds.shape[1], **asdict(config)}
    record = run_record(KIND, family=chosen, config=settings, seed=seed, inputs=inputs)
    tensors = {**parameters, **{f"average.{name}": value for name, value in average.items()}}
    checkpoint = out / ".checkpoint.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    step = load_checkpoint(checkpoint, record, tensors, optimizer)
    schedule, positions = training_schedule(pipe), math.prod(table.latents.shape[-2:])
    store_frozen(pipe.unet, choose_precision(config.precision, "cpu"))
    saved = started = time.monotonic()
    recent = math.nan
    while step < steps:
        draw, target = draw_step(table, mechanism.most, config, schedule, text_states, step, seed, method)
        alphas = losses.alpha_bar(schedule, draw.timesteps)
        with computing("cpu", config.precision, positions):
            prediction, more = mechanism.predict(table, draw), mechanism.extra_loss(table, draw)
        loss = losses.loss_diffusion(
            prediction.float(), target, alphas, schedule.config.prediction_type, config.min_snr_gamma
        )
        if more is not None:
            loss = loss + more
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * adapter_schedule(step, config.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        step += 1
        update_ema(average, parameters, step, config.ema)
        value = float(loss.detach())
        recent = value if math.isnan(recent) else 0.99 * recent + 0.01 * value
        if not math.isfinite(recent):
            raise BolidError(f"the training diverged at step {step}", "take fewer steps, or another seed")
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            save_checkpoint(checkpoint, step, record, tensors, optimizer)
            saved = time.monotonic()
            print(f"{method}: step {step}, loss {recent:.4f}, {saved - started:.0f} s", flush=True)
    save_tensors(out / FILE, {name: value.half() for name, value in average.items()}, record)
    checkpoint.unlink(missing_ok=True)
    return out / FILE


def draw_step(
    table: Table, most: int, config: TrainAdapterConfig, schedule: Any, text_states: TextStates, step: int, seed: int,
    method: str,
) -> tuple[Draw, torch.Tensor]:  # fmt: skip
    """The batch of a step and what the UNet shall predict, both decided by the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, method, step))
    usable = np.concatenate(table.people)
    rows = usable[batch_rows(len(usable), config.batch_size, step, seed)]
    most = min(most, config.max_context, max(map(len, table.people)) - 1)
    context, present = draw_context(table, rows, most, generator)
    dropped = torch.rand(4, len(rows), generator=generator)
    drop_all = dropped[0] < config.all_dropout
    drop_text, drop_image = drop_all | (dropped[1] < config.text_dropout), drop_all | (dropped[2] < config.body_dropout)
    lose_build = (dropped[3] < config.build_word_dropout) & ~drop_image
    captions = [
        "" if no_text else without_build(table.captions[row]) if no_build else table.captions[row]
        for row, no_text, no_build in zip(rows, drop_text.tolist(), lose_build.tolist(), strict=True)
    ]
    moments = table.latents[rows].float()
    latents = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(rows),), generator=generator)
    noisy = schedule.add_noise(latents, noise, timesteps).to(memory_format=torch.channels_last)
    target = losses.diffusion_target(schedule, latents, noise, timesteps)
    text = text_states(captions)[0]
    return Draw(step, rows, context, present, drop_image, captions, text, noisy, timesteps, generator), target


# ---- use ----------------------------------------------------------------------------------------------------------


class Trained:
    """A trained baseline in its family's pipeline, ready to sample."""

    def __init__(
        self, path: Path, build: Callable[[Any, Family, int, int], Mechanism], family: Family | None = None
    ) -> None:
        tensors, self.record = load_tensors(path, KIND)
        self.family = family or get_family(self.record["family"])
        self.pipe: Any = load_base(self.family, sampler=self.family.defaults)
        self.size = int(self.record["config"]["embedding_size"])
        with quiet_diffusers():
            self.mechanism = build(self.pipe, self.family, self.size, 0)
        if missing := self.mechanism.parameters.keys() ^ tensors.keys():
            raise BolidError(f"{path} is of another version of its method: {min(missing)}", "train it again")
        with torch.no_grad():
            for name, parameter in self.mechanism.parameters.items():
                parameter.requires_grad_(False).copy_(tensors[name])
