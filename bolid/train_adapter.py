"""`bolid train-adapter`: training shards, a body encoder and a frozen base in; adapter/{face,body}.safetensors out.

Both branches are trained together, leave-one-out (BoLID section 3): the photo to be denoised is never part of its own
condition. The body comes from some *other* photos of the person, fused by the frozen body encoder; the face is the
mean over the other photos. So a condition can only say what stays the same from photo to photo: who it is.

Everything random about a photo comes from its place in the run, not from the batch it is in: the same command gives
the same training after a kill, and the same up to rounding when a batch is shared by processes or taken in parts.

Shapes: B batch, N photos in the table, M photos of one person, D body dimension, (C, h, w) latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError, require_not_negative, require_parts
from bolid.families import Family, match_family
from bolid.run import derive_seed, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

Progress = Callable[[int, int, str], None]
CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "id_loss": ("keypoints", "bone-ratios", "body", "sliders"),
    "clip_target": ("text", "image", "both"),
    "x_gen": ("one-step", "few-step", "sampled", "swapped"),
    "branches": ("both", "face", "body"),
}
OF_THE_PERSON = ("body", "sliders")  # kinds of L_id that compare with the person and not with one photo
WHOLE_BODY = 0.6  # confidence of a photo, the mean over its keypoints, from which its caption asks for most of a body
NO_TARGET = ("sampled", "swapped")  # ways to make an x_gen that no photo shows

# Words that name the build. Left out of most captions in training, so that the body is asked of the profile.
BUILD_WORDS = (
    "tall", "short", "small", "petite", "slim", "slender", "thin", "skinny", "lean", "average", "medium", "heavy",
    "heavyset", "stocky", "chubby", "plump", "curvy", "fat", "large", "big", "muscular", "athletic", "broad",
)  # fmt: skip


@dataclass(frozen=True)
class TrainAdapterConfig:
    """Settings of the face and the body branch and their training."""

    steps: int = field(default=4000, metadata={"help": "training steps"})
    batch_size: int = field(default=48, metadata={"help": "photos in a batch, for each process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches that make up one training step"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory for activations, about half as much time again"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW"})
    face_tokens: int = field(default=4, metadata={"help": "tokens of the face branch (the body has 4)"})
    kv_rank: int = field(
        default=0,
        metadata={
            "help": "train each key and value matrix as two thin ones of this rank, multiplied out in the files; "
            "0: as a full one"
        },
    )
    # None by default: min-SNR all but mutes the noisiest steps, and those settle a body's outline.
    min_snr_gamma: float = field(default=0.0, metadata={"help": "gamma of the min-SNR weighting, say 5; 0: none"})
    id_weight: float = field(default=0.0, metadata={"help": "weight of the body identity loss L_id; 0: none"})
    id_loss: str = field(
        default="keypoints",
        metadata={
            "help": "what L_id compares: keypoints, bone-ratios, or what the body encoder sees: body, as its decoder "
            "draws it, or sliders, as the body sliders read it"
        },
    )
    sliders: str = field(default="", metadata={"help": "file of the sliders; by default the family's"})
    readers: str = field(
        default="",
        metadata={
            "help": "folders, separated by commas, each with another pose model (pose/) or body encoder "
            "(body-encoder.safetensors), or both, or for sliders a probe (probe/), that look at the body instead of "
            "the family's for --id-loss body and sliders; L_id is the mean"
        },
    )
    spare_heads: bool = field(
        default=False,
        metadata={"help": "--id-loss body and sliders leave the head's pixels alone: they see them, without gradient"},
    )
    clip_weight: float = field(default=0.0, metadata={"help": "weight of the CLIP loss L_CLIP; 0: none"})
    clip_target: str = field(default="text", metadata={"help": "what L_CLIP compares with: text, image or both"})
    face_weight: float = field(
        default=0.0, metadata={"help": "weight of L_face, how unlike the person's the face is; 0: none"}
    )
    found_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of L_found, how much less surely a large face is to be seen than in the photo with the "
            "same caption; 0: none"
        },
    )
    close_ups: float = field(
        default=0.0,
        metadata={
            "help": "part of each batch that is drawn from the photos with a face and little of a body, which L_face "
            "and L_found need; 0: all as they come"
        },
    )
    x_gen: str = field(
        default="one-step",
        metadata={
            "help": "the picture that these losses look at: one-step, few-step where the base can, sampled: "
            "made from the caption and pure noise, with guidance, or swapped: from a noised photo that is told to be "
            "of somebody else; L_id must be body or sliders for the last two"
        },
    )
    x_gen_steps: int = field(default=4, metadata={"help": "steps of --x-gen few-step and sampled"})
    x_gen_grad_steps: int = field(
        default=1, metadata={"help": "how many carry the gradient: few-step the last, sampled evenly spaced ones"}
    )
    pixel_every: int = field(default=8, metadata={"help": "steps from one with these losses to the next"})
    pixel_alpha_bar: float = field(
        default=0.5, metadata={"help": "least alpha-bar of the photos that they look at, 0 to 1"}
    )
    decoder: str = field(
        default="", metadata={"help": "AutoencoderTiny directory for them; by default the family's, else its VAE"}
    )
    text_dropout: float = field(default=0.1, metadata={"help": "part of the photos trained without their caption"})
    face_dropout: float = field(default=0.3, metadata={"help": "part trained without the face"})
    body_dropout: float = field(default=0.1, metadata={"help": "part trained without the body"})
    all_dropout: float = field(default=0.05, metadata={"help": "part trained without any condition"})
    build_word_dropout: float = field(
        default=0.8, metadata={"help": "part whose caption loses words like tall or slim"}
    )
    text_cache: float = field(
        default=8.0,
        metadata={
            "help": "GiB of main memory for what the text encoders say of each caption, computed once; where it does "
            "not fit, and at 0, they compute at every step"
        },
    )
    max_context: int = field(default=8, metadata={"help": "most other photos that a body is made of"})
    body_sampling: float = field(
        default=0.5, metadata={"help": "part that draws the body from its Gaussian, not its mean"}
    )
    ema: float = field(default=0.999, metadata={"help": "decay of the moving average that is saved; 0: none"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    precision: str = field(
        default="auto",
        metadata={"help": "what the network computes in: fp32, bf16, fp16, or auto: bf16 where the hardware has it"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the network first: a slow start, faster steps"})
    shard_branches: bool = field(
        default=False, metadata={"help": "spread the branches over the processes of accelerate launch (FSDP)"}
    )
    checkpoint_minutes: float = field(default=3.0, metadata={"help": "minutes between checkpoints"})
    sample_every: int = field(default=1000, metadata={"help": "steps between sample sheets; 0: none"})
    tensorboard: bool = field(default=False, metadata={"help": "also write the losses for TensorBoard"})
    init: str = field(default="", metadata={"help": "start from the adapters in this directory"})
    branches: str = field(
        default="both", metadata={"help": "which learn: both, or with --init face or body alone, the other one stays"}
    )

    def __post_init__(self) -> None:
        require_parts(
            self,
            ("text_dropout", "face_dropout", "body_dropout", "all_dropout", "build_word_dropout", "close_ups"),
        )
        if not 0 <= self.pixel_alpha_bar < 1:
            raise BolidError(f"--pixel-alpha-bar is {self.pixel_alpha_bar}", "give 0 (all photos) to below 1 (none)")
        require_not_negative(
            self,
            (
                "id_weight", "clip_weight", "face_weight", "found_weight", "text_cache", "learning_rate",
                "weight_decay",
            ),
        )  # fmt: skip
        if not 0 <= self.ema < 1:
            raise BolidError(f"--ema is {self.ema}", "give 0 (no average) to below 1 (nothing of what is learnt)")
        if not self.max_grad_norm > 0:
            raise BolidError(f"--max-grad-norm is {self.max_grad_norm}", "give more than 0; inf clips nothing")
        if self.kv_rank < 0:
            raise BolidError(f"--kv-rank is {self.kv_rank}", "give a rank, say 64, or 0 for full matrices")
        for name in (
            "steps", "batch_size", "gradient_accumulation_steps", "face_tokens", "max_context", "x_gen_steps",
            "x_gen_grad_steps", "pixel_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise BolidError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "give at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise BolidError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}", f"choose one of {', '.join(choices)}"
                )
        if self.branches != "both" and not self.init:
            raise BolidError(
                f"--branches {self.branches}: there is no other branch that could stay as it is",
                "give --init, a directory with both adapters, or leave it out",
            )
        if self.shard_branches and (self.compile or self.precision == "fp16"):
            raise BolidError(
                f"--shard-branches and {'--compile' if self.compile else '--precision fp16'} do not go together",
                "leave out one of the two" if self.compile else "give --precision bf16",
            )
        if self.x_gen_grad_steps > self.x_gen_steps and self.x_gen in ("few-step", "sampled"):
            raise BolidError(
                f"--x-gen-grad-steps is {self.x_gen_grad_steps}, of {self.x_gen_steps} steps", "give at most as many"
            )
        if self.x_gen in NO_TARGET and (
            (self.id_weight and self.id_loss not in OF_THE_PERSON) or (self.clip_weight and self.clip_target != "text")
        ):
            raise BolidError(
                f"--x-gen {self.x_gen} is a new picture: there is no photo for it to be like",
                "give --id-loss body or sliders and --clip-target text, which compare with the person and the caption",
            )
        if self.sliders and not (self.id_weight and self.id_loss == "sliders"):
            raise BolidError(
                f"--sliders {self.sliders}: nothing reads them",
                "give --id-weight and --id-loss sliders, or leave it out",
            )
        if self.readers and not (self.id_weight and self.id_loss in OF_THE_PERSON):
            raise BolidError(
                f"--readers {self.readers}: nobody asks them",
                "give --id-weight and --id-loss body or sliders, or leave it out",
            )
        if self.spare_heads and not (self.id_weight and self.id_loss in OF_THE_PERSON):
            raise BolidError(
                "--spare-heads: no loss looks at whole bodies", "give --id-weight and --id-loss body or sliders"
            )
        if self.x_gen == "few-step" and self.gradient_checkpointing:
            raise BolidError(
                "--x-gen few-step and --gradient-checkpointing do not go together",
                "the few-step LoRA is only on for some of the passes; leave out one of the two",
            )

    def learns(self, branch: str) -> bool:
        """Whether "face" or "body" is trained."""
        return self.branches in ("both", branch)

    @property
    def pixels(self) -> bool:
        """Whether a loss needs the picture."""
        return bool(self.id_weight or self.clip_weight or self.faces)

    @property
    def faces(self) -> bool:
        """Whether a loss looks at the face."""
        return bool(self.face_weight or self.found_weight)


@dataclass(frozen=True)
class AdapterTable:
    """All that training needs of every photo, in memory."""

    latents: torch.Tensor  # f16 [N, 2, C, h, w], the posterior's mean and std
    captions: list[str]  # N
    body_mean: torch.Tensor  # f32 [N, D], of this one photo
    body_logvar: torch.Tensor  # f32 [N, D]
    confidence: torch.Tensor  # f32 [N]
    face: torch.Tensor  # f32 [N, 512], zeros where none is seen
    people: list[np.ndarray]  # rows of each person, two or more
    names: list[str]  # of the people

    @functools.cached_property
    def owner(self) -> np.ndarray:
        """The person of each row, [N]."""
        import numpy as np

        owner = np.empty(len(self.captions), np.int64)
        for person, rows in enumerate(self.people):
            owner[rows] = person
        return owner

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Everybody's rows, person by person."""
        import numpy as np

        return np.concatenate(self.people)

    @functools.cached_property
    def close_ups(self) -> np.ndarray:
        """The rows that show a face and little of a body."""
        return self.rows[(self.face[self.rows].any(1) & (self.confidence[self.rows] < WHOLE_BODY)).numpy()]

    @functools.cached_property
    def lookalikes(self) -> list[np.ndarray]:
        """For each person those, themselves among them, whom their captions' "woman" or "man" fits as well."""
        import numpy as np

        words = []
        for rows in self.people:
            found = [word for row in rows for word in re.findall(r"\b(wom[ae]n|m[ae]n)\b", self.captions[row].lower())]
            words.append(max(sorted(set(found)), key=found.count).replace("men", "man") if found else "")
        alike = {word: np.array([i for i, other in enumerate(words) if other == word]) for word in set(words)}
        return [alike[word] for word in words]  # shared by all of a word: people times people would not fit


@dataclass(frozen=True)
class TrainAdapterResult:
    face: Path
    body: Path
    steps: int
    seconds: float
    people: int
    photos: int
    loss: float
    learning_rate: float  # of the last step


@dataclass(frozen=True)
class TrainAdapterPlan:
    """What a training would do and need. Memory in bytes."""

    people: int  # with two photos or more
    photos: int  # of theirs: an epoch
    steps: int
    photos_per_step: int
    steps_per_epoch: float
    epochs: float
    parameters: int  # trained, of the branches that learn
    precision: str
    device: str
    memory: dict[str, int]  # what -> bytes on the device; "total" last
    main_memory: dict[str, int]  # what -> bytes beside a device of its own memory
    memory_available: int | None  # on the device, None where it cannot be asked


# ---- data ---------------------------------------------------------------------------------------------------------


def read_table(train: str | Path, body_encoder: Any, progress: Progress | None = None) -> AdapterTable:
    """Training shards -> latents, captions, each photo's body Gaussian (encoded here, once) and face."""
    import numpy as np
    import torch

    from bolid.formats.shards import decode_image, group_by_person, read_index, read_shards

    total = read_index(train)["samples"]
    latents, faces, people = [], [], []
    captions: list[str] = []
    names: list[str] = []
    bodies: list[tuple[torch.Tensor, ...]] = []
    for name, group in group_by_person(read_shards(train)):
        if len(group) < 2:
            continue  # nothing to leave one out of
        for sample in group:
            if "latents" not in sample.tensors:
                raise BolidError(f"{train} holds no latents", "give the directory that `bolid shard` writes")
        people.append(np.arange(len(captions), len(captions) + len(group)))
        names.append(name)
        latents += [torch.from_numpy(sample.tensors["latents"]) for sample in group]
        captions += [sample.caption for sample in group]
        faces += [sample.tensors.get("face", np.zeros(512, np.float32)) for sample in group]
        features = [sample.tensors.get("view_features") for sample in group] if body_encoder.needs_features else None
        images = [decode_image(sample.image) for sample in group]
        bodies.append(body_encoder.encode(images, [sample.tensors["keypoints"] for sample in group], features))
        if progress is not None:
            progress(len(captions), total, "encoding bodies")
    if not people:
        raise _nobody(train)
    mean, logvar, confidence = (torch.cat(parts) for parts in zip(*bodies, strict=True))
    return AdapterTable(
        torch.stack(latents), captions, mean, logvar, confidence, torch.from_numpy(np.stack(faces)), people, names
    )


def _nobody(train: str | Path) -> BolidError:
    return BolidError(
        f"nobody in {train} has two photos",
        "the adapters learn a person's photo from their other photos: collect at least two each",
    )


def without_build(caption: str) -> str:
    """The caption without the words that name the build."""
    # Not "short-sleeved" and not "short hair".
    return re.sub(rf"\b(?:{'|'.join(BUILD_WORDS)})\b(?![- ](?:sleeve|hair))\s*", "", caption)


def caption_texts(captions: Iterable[str]) -> list[str]:
    """Every text that training on these captions can ask for."""
    captions = set(captions)
    return sorted({"", *captions, *map(without_build, captions)})


class TextStates:
    """The captions' text states [N, L, E] and SDXL's pooled ones: each computed once and kept in main memory, or, where
    they would take more than `limit` bytes, computed at each call.

    `precision`: what the network computes in. They are kept in that, to which it would convert them anyway.
    """

    def __init__(self, pipe: Any, captions: list[str], *, limit: float = 2**33, precision: str = "fp32") -> None:
        import torch

        from bolid.backends.base import DTYPES, encode_prompts

        self._encode, self._device = lambda texts: encode_prompts(pipe, texts), pipe.device
        texts, dtype = caption_texts(captions), DTYPES[precision]
        first = [part[0] for part in self._encode([""]) if part is not None]
        self._kept: list[torch.Tensor] = []
        if len(texts) * sum(part.numel() for part in first) * dtype.itemsize <= limit:
            self._row = {text: row for row, text in enumerate(texts)}
            self._kept = [torch.empty(len(texts), *part.shape, dtype=dtype) for part in first]
            for start in range(0, len(texts), 64):  # always the same 64 together: rounding may depend on it
                encoded = self._encode(texts[start : start + 64])
                for kept, part in zip(self._kept, encoded, strict=False):
                    kept[start : start + 64] = part

    @property
    def cached(self) -> bool:
        """Whether the text encoders are not needed any more."""
        return bool(self._kept)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(text states, pooled states or None) on the pipeline's device."""
        if not self._kept:
            return self._encode(texts)
        rows = [self._row[text] for text in texts]
        states = [kept[rows].to(self._device) for kept in self._kept]
        return states[0], states[1] if len(states) > 1 else None


# ---- one batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    rows: np.ndarray  # [B] the photos to be denoised
    context: torch.Tensor  # [B, M] rows of the table that the body is made of
    present: torch.Tensor  # bool [B, M] which of them count
    captions: list[str]  # [B], "" where the text is dropped
    body_embeds: torch.Tensor  # [B, 1, D], null where dropped
    face_embeds: torch.Tensor  # [B, 1, 512]
    generators: Sequence[torch.Generator]  # [B] what else is random about each photo is drawn from these


def draw_batch(
    table: AdapterTable, rows: np.ndarray, config: TrainAdapterConfig, generators: Sequence[torch.Generator]
) -> Batch:
    """Conditions for the photos `rows`, each from other photos of its person only (leave-one-out)."""
    import torch

    from bolid.method.body_condition import drop_condition

    mates = [table.people[table.owner[row]] for row in rows]
    context, present = draw_context(
        table, [own[own != row] for own, row in zip(mates, rows, strict=True)], config, generators
    )
    noise = torch.empty(len(rows), table.body_mean.shape[1])
    coins = torch.empty(len(rows), 6)
    for i, generator in enumerate(generators):
        torch.randn(noise.shape[1:], generator=generator, out=noise[i])
        torch.rand(coins.shape[1:], generator=generator, out=coins[i])

    mean, logvar, face = fuse_context(table, context, present)
    sampled = coins[:, :1] < config.body_sampling
    body = torch.where(sampled, mean + (0.5 * logvar).exp() * noise, mean)

    drop_all = coins[:, 1] < config.all_dropout
    drop_text = drop_all | (coins[:, 2] < config.text_dropout)
    drop_face = drop_all | (coins[:, 3] < config.face_dropout)
    drop_body = drop_all | (coins[:, 4] < config.body_dropout)
    lose_build = (coins[:, 5] < config.build_word_dropout) & ~drop_body
    captions = []
    for row, no_text, no_build in zip(rows, drop_text.tolist(), lose_build.tolist(), strict=True):
        caption = table.captions[row]
        captions.append("" if no_text else without_build(caption) if no_build else caption)
    return Batch(
        rows, context, present, captions,
        drop_condition(body[:, None], drop_body), drop_condition(face[:, None], drop_face), generators,
    )  # fmt: skip


def draw_context(
    table: AdapterTable, photos: Sequence[np.ndarray], config: TrainAdapterConfig,
    generators: Sequence[torch.Generator],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One photo or more of each of the sets of rows `photos`: (rows of the table [B, M], bool [B, M] which count)."""
    import torch

    most = min(config.max_context, max(map(len, table.people)) - 1)
    context = torch.zeros(len(photos), most, dtype=torch.long)
    present = torch.zeros(len(photos), most, dtype=torch.bool)
    for i, (rows, generator) in enumerate(zip(photos, generators, strict=True)):
        count = int(torch.randint(1, min(most, len(rows)) + 1, (1,), generator=generator))
        chosen = rows[torch.randperm(len(rows), generator=generator)[:count].numpy()]
        context[i, :count] = torch.from_numpy(chosen)
        present[i, :count] = True
    return context, present


def fuse_context(
    table: AdapterTable, context: torch.Tensor, present: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bodies' Gaussians, mean and logvar [B, D], and the faces [B, 512] of photos [B, M] of the table."""
    import torch.nn.functional as F

    from bolid.method.body_vae import fuse

    mean, logvar = fuse(table.body_mean[context], table.body_logvar[context], table.confidence[context] * present)
    # The mean of unit vectors, unit length again; stays zero, the null condition, where no photo shows the face.
    return mean, logvar, F.normalize((table.face[context] * present[..., None]).sum(1), dim=-1)


def fused_bodies(table: AdapterTable) -> torch.Tensor:
    """Everybody's c_body, of all their photos, [people, D]."""
    import torch

    photos = [torch.from_numpy(rows)[None] for rows in table.people]
    return torch.cat([fuse_context(table, rows, torch.ones_like(rows))[0] for rows in photos])


def photo_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One generator for each photo from the `first` of the whole run on: its place in the run is its seed."""
    import torch

    places = range(first, first + count)
    return [torch.Generator().manual_seed(derive_seed(seed, "train-adapter", "photo", place)) for place in places]


def batch_rows(total: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Rows of batch number `step`: consecutive pieces of one seeded permutation an epoch, [batch]."""
    import numpy as np

    position = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(position // total):
        order = np.random.default_rng(derive_seed(seed, "train-adapter", "epoch", int(epoch))).permutation(total)
        here = position // total == epoch
        rows[here] = order[position[here] % total]
    return rows


def draw_rows(table: AdapterTable, config: TrainAdapterConfig, number: int, seed: int) -> np.ndarray:
    """The photos of batch `number`, rows of the table: as they come, or the first of them close-ups."""
    rows = table.rows[batch_rows(len(table.rows), config.batch_size, number, seed)]
    if close := round(config.close_ups * config.batch_size):
        own = derive_seed(seed, "close-ups")  # an order of their own
        rows[:close] = table.close_ups[batch_rows(len(table.close_ups), close, number, own)]
    return rows


# ---- training -----------------------------------------------------------------------------------------------------


def train_adapter(
    train: str | Path = "train",
    out: str | Path = "adapter",
    *,
    config: TrainAdapterConfig | None = None,
    body_encoder: str | Path | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> TrainAdapterResult:
    """Train both branches, or one, on `train`'s shards and write both to `out`. The same call after a kill goes on.

    `stop_after`: write them as they are after so many of the steps (their records have that as "steps_done") and stop;
    a call without it goes on from there. Also in `out`: log.jsonl and loss.png (the losses), samples/ (sheets of
    pictures), and while it runs a checkpoint.
    Several processes that `accelerate launch` starts share the work; the main one writes.
    Raises BolidError when shards, body encoder and family do not belong together, and where `out` holds another
    training's adapter.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from bolid.backends.base import load_base, quiet_diffusers
    from bolid.backends.body import BodyEncoder
    from bolid.formats.adapter import adapter_kind, load_adapter, nested_state_dict, save_adapter
    from bolid.formats.checkpoint import STEPS_DONE, check_result, load_checkpoint, save_checkpoint, whole
    from bolid.formats.shards import directory_sha256, read_index
    from bolid.method.body_condition import (
        BRANCHES,
        FACE_DIM,
        branch_parameters,
        factorise_kv,
        initial_state,
        install,
        merge_kv,
    )
    from bolid.objective import Objective
    from bolid.pixel_losses import PixelLosses
    from bolid.precision import LossScaler, attention_kernel, choose_precision, computing, store_frozen
    from bolid.sharding import shard_branches

    config, out = config or TrainAdapterConfig(), Path(out)
    if stop_after is not None and stop_after < 1:
        raise BolidError(f"--stop-after is {stop_after}", "give at least 1")
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder = BodyEncoder(body_encoder or chosen.require("body_encoder"))
    match_family(chosen.name, encoder.record["family"], encoder.path)

    device = pick_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")  # autocast is ours: see bolid/precision.py
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BolidError(
            f"train-adapter does not run under accelerate's {accelerator.distributed_type.value}",
            "run accelerate launch with --multi_gpu, and train-adapter with --shard-branches",
        )
    to, processes, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    config = dataclasses.replace(config, precision=choose_precision(config.precision, str(to)))
    set_seed(derive_seed(seed, "train-adapter") % 2**32)
    encoder.to(str(to))
    pipe = load_base(chosen, str(to))
    pixels = None
    if config.pixels:
        pixels = PixelLosses(
            chosen, pipe.vae, id_loss=config.id_loss if config.id_weight else "",
            clip_target=config.clip_target if config.clip_weight else "", decoder=config.decoder, device=str(to),
            body_encoder=encoder, sliders=config.sliders, readers=config.readers,
            spare_heads=config.spare_heads, face=bool(config.face_weight), found=bool(config.found_weight),
        )  # fmt: skip
    inputs = {"train": directory_sha256(train), **encoder.inputs, "base": base_sha256(chosen)}
    if pixels is not None:
        inputs |= pixels.inputs
    if config.init:
        inputs |= {f"init_{branch}": sha256_file(Path(config.init) / f"{branch}.safetensors") for branch in BRANCHES}
    settings = {**dataclasses.asdict(config), "processes": processes}
    # The vectors of one face recogniser mean nothing to an adapter that was trained with another's.
    inputs_of = {"face": inputs | face_model_sha256(chosen), "body": inputs}
    records = {
        b: run_record(adapter_kind(b), family=chosen, config=settings, seed=seed, inputs=inputs_of[b]) for b in BRANCHES
    }
    for branch in BRANCHES:
        check_result(out / f"{branch}.safetensors", records[branch])
    table = read_table(train, encoder, progress if main else None)
    channels, expected = table.latents.shape[2], pipe.unet.config.in_channels
    if channels != expected:
        raise BolidError(
            f"the shards' latents have {channels} channels, the base takes {expected}",
            "run shard again with this family",
        )
    if round(config.close_ups * config.batch_size) and not len(table.close_ups):
        raise BolidError(
            f"--close-ups {config.close_ups}: no photo in {train} shows a face and little of a body",
            "collect portraits too, or leave it out",
        )
    check_kv_rank(pipe.unet, config, chosen)
    text_states = TextStates(pipe, table.captions, limit=config.text_cache * 2**30, precision=config.precision)
    objective = Objective(pipe, pipe.unet, table, text_states, chosen, config, to, pixels)
    if text_states.cached:
        for name in ("text_encoder", "text_encoder_2"):
            if hasattr(pipe, name):
                setattr(pipe, name, None)
    with quiet_diffusers():
        unet = pipe.unet.to(memory_format=torch.channels_last)

    if config.init:
        states = [nested_state_dict(load_adapter(Path(config.init) / f"{b}.safetensors", b)[0]) for b in BRANCHES]
        states = [{part: {k: v.float() for k, v in values.items()} for part, values in s.items()} for s in states]
        if config.kv_rank:
            learns = map(config.learns, BRANCHES)
            states = [factorise_kv(s, config.kv_rank) if learn else s for s, learn in zip(states, learns, strict=True)]
    else:
        start = functools.partial(initial_state, unet, kv_rank=config.kv_rank)
        states = [
            start("face", FACE_DIM, tokens=config.face_tokens, seed=derive_seed(seed, "face")),
            start("body", encoder.body_dim, seed=derive_seed(seed, "body")),
        ]
    with quiet_diffusers():
        branches = dict(zip(BRANCHES, install(unet, states), strict=True))
    for of_branch in branches.values():
        for parameter in of_branch.values():
            parameter.requires_grad_(True)
    store_frozen(unet, config.precision)  # the base alone: a branch that does not learn is saved as exactly as it came
    sharded = config.shard_branches and processes > 1
    if sharded:
        shard_branches(unet, to.type)
        branches = dict(zip(BRANCHES, branch_parameters(unet, len(BRANCHES)), strict=True))
    parameters = {f"{branch}.{name}": p for branch, ps in branches.items() for name, p in ps.items()}
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for name, parameter in parameters.items():
        parameter.requires_grad_(config.learns(name.partition(".")[0]))
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    scaler = LossScaler(to.type, config.precision)
    checkpoint, record = out / ".checkpoint.safetensors", {**records["face"], "kind": "adapter"}
    tensors = {**parameters, **{f"average.{name}": value for name, value in average.items()}, "scaler": scaler.state}
    step = load_checkpoint(checkpoint, record, tensors, optimizer)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    if step > last:
        raise BolidError(f"--stop-after is {stop_after}, and {out} is at step {step}", "give more, or leave it out")
    scaler.restore()
    network = unet if sharded else accelerator.prepare(unet)
    objective.network = torch.compile(network) if config.compile else network

    started = saved = time.monotonic()
    recent = float("nan")
    log = _Log(out, step, config.tensorboard) if main else None
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        terms: dict[str, torch.Tensor] = {}
        parts = config.gradient_accumulation_steps
        for part in range(parts):
            number = (step * parts + part) * processes + accelerator.process_index  # of this batch, in the whole run
            rows = draw_rows(table, config, number, seed)
            generators = photo_generators(seed, number * config.batch_size, config.batch_size)
            batch = draw_batch(table, rows, config, generators)
            with contextlib.ExitStack() as stack:
                if part < parts - 1:
                    stack.enter_context(accelerator.no_sync(network))
                values = objective(batch, with_pixels=config.pixels and step % config.pixel_every == 0)
                stack.enter_context(attention_kernel(to, config.precision, objective.positions))
                scaler.backward(values["loss"] / parts)
            for name, value in values.items():
                terms[name] = terms.get(name, 0) + value.detach() / parts
        scaler.step(optimizer, trained, config.max_grad_norm)
        step += 1
        decay = min(config.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)

        # The main process says when a checkpoint is due; branches that are spread over all are put together by all.
        due = main and time.monotonic() - saved > 60 * config.checkpoint_minutes
        told = torch.stack([*terms.values(), torch.tensor(float(due), device=to)])
        *means, due = accelerator.reduce(told, "mean").tolist()
        if not math.isfinite(means[0]):
            raise BolidError(f"the training diverged at step {step}", "lower --learning-rate")
        recent = means[0] if math.isnan(recent) else 0.99 * recent + 0.01 * means[0]
        if log is not None:
            log.write(step, dict(zip(terms, means, strict=True)))
            if progress is not None:
                progress(step, config.steps, f"loss {recent:.4f}")
        if log is None and not sharded:
            continue
        if config.sample_every and (step % config.sample_every == 0 or step == last):
            sheet = out / "samples" / f"step-{step:06d}.png" if log is not None else None
            with computing(to, config.precision, objective.positions), swapped(parameters, average):
                sample_sheet(pipe, chosen, table, text_states, sheet, seed)
            if log is not None:
                log.draw()
        if due:
            if log is not None:
                log.flush()
            scaler.remember()
            save_checkpoint(checkpoint, step, record, tensors, optimizer, write=main)
            saved = time.monotonic()

    if step < config.steps:
        scaler.remember()
        save_checkpoint(checkpoint, step, record, tensors, optimizer, write=main)
        records = {b: {**r, "config": {**r["config"], STEPS_DONE: step}} for b, r in records.items()}
    paths = {branch: out / f"{branch}.safetensors" for branch in BRANCHES}
    average = {name: whole(tensor) for name, tensor in average.items()}
    if log is not None:
        log.close()
        for branch in BRANCHES:
            flat = merge_kv({name: average[f"{branch}.{name}"] for name in branches[branch]})
            save_adapter(paths[branch], {name: tensor.half() for name, tensor in flat.items()}, records[branch])
        if step == config.steps:
            checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return TrainAdapterResult(
        paths["face"], paths["body"], step, time.monotonic() - started, len(table.people),
        len(table.captions), recent, learning_rate(step - 1, config),
    )  # fmt: skip


# ---- what it would take -------------------------------------------------------------------------------------------


def plan_training(
    train: str | Path = "train",
    *,
    config: TrainAdapterConfig | None = None,
    body_encoder: str | Path | None = None,
    family: str | None = None,
    device: str = "auto",
) -> TrainAdapterPlan:
    """What `train_adapter` would do with the same arguments, without loading a weight or training anything.

    The activations are counted on a network without data (`step_cost`); they, and so the total, are an estimate, and
    without the networks of L_id and L_CLIP. Raises BolidError like the training.
    """
    import os

    import torch
    from diffusers import UNet2DConditionModel

    from bolid.backends.base import DTYPES
    from bolid.backends.body import KIND
    from bolid.formats.shards import group_by_person, read_index, read_shards
    from bolid.formats.tensors import load_tensors
    from bolid.precision import choose_precision
    from bolid.step_cost import adapted_network, step_cost, text_state_width

    config, device = config or TrainAdapterConfig(), pick_device(device)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    encoder_path = body_encoder or chosen.require("body_encoder")
    record = load_tensors(encoder_path, KIND)[1]
    match_family(chosen.name, record["family"], encoder_path)
    people = photos = 0
    texts: set[str] = set()
    shape: tuple[int, ...] = ()
    for _person, group in group_by_person(read_shards(train)):
        if len(group) > 1:
            people, photos = people + 1, photos + len(group)
            texts.update(sample.caption for sample in group)
            if "latents" not in group[0].tensors:
                raise BolidError(f"{train} holds no latents", "give the directory that `bolid shard` writes")
            shape = group[0].tensors["latents"].shape
    if not people:
        raise _nobody(train)

    base, size = chosen.require("base"), lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    settings, length = UNet2DConditionModel.load_config(str(base), subfolder="unet"), _text_length(base)
    unet, branches = adapted_network(
        settings, record["config"]["body_dim"], face_tokens=config.face_tokens, kv_rank=config.kv_rank,
        precision=config.precision, gradient_checkpointing=config.gradient_checkpointing, learns=config.learns,
    )  # fmt: skip
    check_kv_rank(unet, config, chosen)
    cost = step_cost(unet, shape[1:], length, config.batch_size, config.precision, device)
    states = len(caption_texts(texts)) * text_state_width(unet.config, length) * DTYPES[config.precision].itemsize
    cached = states <= config.text_cache * 2**30
    memory = {
        "base network": size(unet.parameters()) - size(branches),
        "VAE": _stored_parameters(base, "vae") * 4,
        "text encoders": 0 if cached else _stored_parameters(base, "text_encoder", "text_encoder_2") * 4,
        "adapters: weights, two moments, average": 4 * size(branches),
        "activations and gradients of a batch": cost.peak,
    }
    main_memory = {"latents": photos * math.prod(shape) * 2, "text states": states if cached else 0}
    if device == "cpu":
        memory, main_memory = memory | main_memory, {}
    memory["total"] = sum(memory.values())
    available = None
    if device.startswith("cuda"):
        available = torch.cuda.mem_get_info(device)[0]
    elif device == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_step = config.batch_size * config.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    return TrainAdapterPlan(
        people, photos, config.steps, per_step, photos / per_step, config.steps * per_step / photos,
        sum(parameter.numel() for parameter in branches), config.precision, device, memory, main_memory, available,
    )  # fmt: skip


def _text_length(base: Path) -> int:
    """Tokens that the text encoder takes."""
    file = base / "tokenizer" / "tokenizer_config.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("model_max_length", 77)) if file.is_file() else 77


def _stored_parameters(base: Path, *parts: str) -> int:
    """Parameters of some parts of a pipeline directory, from the files' headers."""
    from bolid.formats.tensors import read_header

    return sum(
        math.prod(entry["shape"])
        for part in parts
        for file in sorted((base / part).glob("*.safetensors"))[:1]
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    )


# ---- small parts of the training ----------------------------------------------------------------------------------


def check_kv_rank(unet: Any, config: TrainAdapterConfig, family: Family) -> None:
    """BolidError for a --kv-rank that saves nothing on this base."""
    from bolid.method.body_condition import largest_kv_rank

    if config.kv_rank > (largest := largest_kv_rank(unet)):
        raise BolidError(
            f"--kv-rank is {config.kv_rank}: two matrices of that rank are larger than the full one of some layer of "
            f"family '{family.name}'",
            f"give at most {largest}, or 0 for full matrices",
        )


def base_sha256(family: Family) -> str:
    """The hash of the base's UNet weights, for the record."""
    base = family.require("base")
    files = [family.unet] if family.has("unet") else [base] if base.is_file() else []
    files = files or sorted((base / "unet").glob("*.safetensors"))
    return sha256_file(files[0]) if files else ""


def face_model_sha256(family: Family) -> dict[str, str]:
    """{"face_model": hash of the family's face recogniser}, or nothing for a family without one."""
    if "face" in family.missing():
        return {}
    from bolid.backends.face import FaceModel

    return {"face_model": FaceModel(family.face).sha256}


def learning_rate(step: int, config: TrainAdapterConfig) -> float:
    """Of a step, from 0 on: up over the first 100 steps (or 5 %), then along a cosine down to 2 % of the highest."""
    warmup = max(1.0, min(100.0, 0.05 * config.steps))
    if step < warmup:
        return config.learning_rate * ((step + 1) / (warmup + 1))
    progress = (step - warmup) / max(1.0, config.steps - warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class swapped:
    """`with swapped(parameters, average):` the network computes with the moving average."""

    def __init__(self, parameters: dict[str, Any], average: dict[str, Any]) -> None:
        self.parameters, self.average = parameters, average

    def _swap(self) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                # In place: FSDP knows its parameters by their memory.
                kept = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()


class _Log:
    """log.jsonl, one line a step: {"step", "loss", ...}; loss.png, its curve; and TensorBoard's files if wanted.

    On resuming, what is past the checkpoint is dropped. Raises BolidError when the package tensorboard is missing.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self.path, self.lines = out / "log.jsonl", list[str]()
        self.writer = _tensorboard_writer(out / "tensorboard", step) if tensorboard else None
        out.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text().splitlines()[:step] if self.path.exists() and step else []
        self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        self.lines.append(json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}))
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)
        if len(self.lines) >= 100:
            self.flush()

    def flush(self) -> None:
        with self.path.open("a") as file:
            file.write("".join(line + "\n" for line in self.lines))
        self.lines = []

    def draw(self) -> None:
        self.flush()
        loss_curve(self.path, self.path.with_name("loss.png"))

    def close(self) -> None:
        self.draw()
        if self.writer is not None:
            self.writer.close()


def _tensorboard_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BolidError(
            "--tensorboard needs the package tensorboard, which is not installed",
            "pip install 'bolid[tensorboard]', or leave it out: log.jsonl and loss.png hold the same numbers",
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def loss_curve(log: Path, path: Path) -> None:
    """A picture of log.jsonl's losses over the steps: each as measured, faint, and averaged over 2 % of the run."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bolid.run import atomic_path

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    figure = Figure(figsize=(8, 2.5 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(max(1, len(names)), 1, squeeze=False)[:, 0], names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = np.array([s for s, _ in points]), np.array([v for _, v in points])
        window = max(1, len(values) // 50)
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.6)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.4)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})


def sample_sheet(
    pipe: Any,
    family: Family,
    table: AdapterTable,
    text_states: TextStates,
    path: Path | None,
    seed: int,
    steps: int = 12,
) -> None:
    """A contact sheet: three captions down; across: no profile, then three people (their first photo in front). With
    the family's sampler and guidance, as `generate` paints, but in no more than `steps` steps.

    Without a path it is made and not kept: where branches are spread over processes, all of them have to compute.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from bolid.backends.base import decode_latents, paint, set_sampler
    from bolid.method.body_condition import build_ip_adapter_image_embeds
    from bolid.method.body_vae import fuse
    from bolid.run import atomic_path

    trained_with = pipe.scheduler
    set_sampler(pipe, family.defaults)
    steps = min(steps, int(family.defaults.get("steps", steps)))
    picks = np.random.default_rng(derive_seed(seed, "sheet")).permutation(len(table.people))[:3]
    captions = [without_build(table.captions[table.people[p][-1]]) for p in picks]
    guidance = family.guidance
    height, width = family.image_size
    pipe.vae.enable_slicing()  # decodes one picture at a time: a large one takes gigabytes
    # Told what the texts say and what the noise is, the pipeline needs no text encoder and rounds no latents.
    texts: dict[str, torch.Tensor] = {}
    for sign, told in (("", captions), ("negative_", [""] * len(captions))):
        states, pooled = text_states(told)
        texts[f"{sign}prompt_embeds"] = states.float()
        if pooled is not None:
            texts[f"{sign}pooled_prompt_embeds"] = pooled.float()
    columns = []
    for person in (None, *picks):
        if person is None:
            body, face, front = torch.zeros_like(table.body_mean[0]), torch.zeros_like(table.face[0]), None
            pipe.set_ip_adapter_scale([0.0, 0.0])
        else:
            rows = torch.from_numpy(table.people[person])
            body = fuse(table.body_mean[rows][None], table.body_logvar[rows][None], table.confidence[rows][None])[0][0]
            face = F.normalize(table.face[rows].sum(0), dim=-1)
            front = decode_latents(pipe, table.latents[rows[:1], 0].float())[0]
            pipe.set_ip_adapter_scale([1.0, 1.0])
        embeds = build_ip_adapter_image_embeds([face, body], guidance=guidance.up > 1)
        generators = [torch.Generator().manual_seed(derive_seed(seed, "sheet", i)) for i in range(len(captions))]
        noise = torch.stack([torch.randn(table.latents.shape[2:], generator=generator) for generator in generators])
        pictures = paint(
            pipe, **texts, height=height, width=width, num_inference_steps=steps, guidance=guidance,
            generator=generators, latents=noise.to(pipe.device),
            ip_adapter_image_embeds=[e.to(pipe.device) for e in embeds], output_type="np",
        )  # fmt: skip
        column = [np.zeros((height, width, 3), np.uint8) if front is None else front]
        columns.append(np.concatenate([*column, *(pictures * 255).round().astype(np.uint8)], axis=0))
    pipe.set_ip_adapter_scale([1.0, 1.0])
    pipe.scheduler = trained_with
    if path is not None:
        with atomic_path(path) as temporary:
            Image.fromarray(np.concatenate(columns, axis=1)).save(temporary, "PNG")
