"""What `train-adapter` learns from: every photo of the training shards in memory, and the batches drawn from it.

Leave-one-out (BoLID section 3): the photo to be denoised is never part of its own condition. Everything random about a
photo comes from its place in the run, not from the batch it is in.

Shapes: B batch, N photos in the table, M photos of one person, D body dimension, (C, h, w) latents.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.run import Progress, derive_seed, run_differences, run_record
from bolid.train_adapter.config import TrainAdapterConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.formats.shards import Sample

BODIES = "bodies"  # the kind of the file that keeps every photo's Gaussian
WHOLE_BODY = 0.6  # confidence of a photo, the mean over its keypoints, from which it shows most of a body

# Words that name the build. Most captions lose them in training, so that the build comes from the profile.
BUILD_WORDS = (
    "tall", "short", "small", "petite", "slim", "slender", "thin", "skinny", "lean", "average", "medium", "heavy",
    "heavyset", "stocky", "chubby", "plump", "curvy", "fat", "large", "big", "muscular", "athletic", "broad",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterTable:
    """All that training needs of every photo, in memory."""

    latents: torch.Tensor  # f16 [N, 2, C, h, w], the posterior's mean and std
    captions: list[str]  # N
    body_mean: torch.Tensor  # f32 [N, D], of this one photo
    body_logvar: torch.Tensor  # f32 [N, D]
    confidence: torch.Tensor  # f32 [N]
    face: torch.Tensor  # f32 [N, 512], zeros where no face is detected, short where the photo is grey
    people: list[np.ndarray]  # rows of each person, two or more
    names: list[str]  # of the people
    alone: int = 0  # photos that are left out, since they are the only one of their person
    grey: int = 0  # black-and-white photos that show a face

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
    def person_bodies(self) -> torch.Tensor:
        """The mean body of each person's photos, weighted by their confidence, [people, D]: the target of x_gen.

        Not the fused Gaussian's mean, which lies the nearer to the prior the fewer photos there are: x_gen is one
        picture, and this is what one photo of the person gives on average.
        """
        import torch

        bodies = []
        for rows in self.people:
            weight = self.confidence[rows] + 1e-6
            bodies.append((weight[:, None] * self.body_mean[rows]).sum(0) / weight.sum())
        return torch.stack(bodies)

    @functools.cached_property
    def person_faces(self) -> torch.Tensor:
        """The mean direction of each person's face embeddings, [people, 512]; zeros without any."""
        import torch
        import torch.nn.functional as F

        return F.normalize(torch.stack([self.face[rows].sum(0) for rows in self.people]), dim=-1)


def read_table(
    train: str | Path, body_encoder: Any, progress: Progress | None = None, cache: Path | None = None
) -> AdapterTable:
    """Training shards -> latents, captions, each photo's body Gaussian and face.

    The Gaussians are encoded here, unless `save_bodies` has kept them in the file `cache`.
    """
    import numpy as np
    import torch

    from bolid.formats.shards import group_by_person, read_index, read_shards
    from bolid.person import GREY_WEIGHT

    total = read_index(train)["samples"]
    latents, faces, people = [], [], []
    alone = grey = 0
    captions: list[str] = []
    names: list[str] = []
    known = _read_bodies(cache, train, body_encoder)
    bodies: list[tuple[torch.Tensor, ...]] = [] if known is None else [known]
    for name, group in group_by_person(read_shards(train)):
        if len(group) < 2:
            alone += 1
            continue  # nothing to leave one out of
        grey += sum("face" in sample.tensors and bool(sample.meta.get("grey")) for sample in group)
        for sample in group:
            if "latents" not in sample.tensors:
                raise BolidError(f"{train} holds no latents", "give the directory that `bolid shard` writes")
        people.append(np.arange(len(captions), len(captions) + len(group)))
        names.append(name)
        latents += [torch.from_numpy(sample.tensors["latents"]) for sample in group]
        captions += [sample.caption for sample in group]
        faces += [
            sample.tensors.get("face", np.zeros(512, np.float32)) * (GREY_WEIGHT if sample.meta.get("grey") else 1)
            for sample in group
        ]
        if known is None:
            bodies.append(_encode_bodies(group, body_encoder, train))
        if progress is not None:
            progress(len(captions), total, "encoding bodies" if known is None else "reading photos")
    if not people:
        raise nobody_has_two(train)
    mean, logvar, confidence = (torch.cat(parts) for parts in zip(*bodies, strict=True))
    return AdapterTable(
        torch.stack(latents), captions, mean, logvar, confidence, torch.from_numpy(np.stack(faces)), people, names,
        alone, grey,
    )  # fmt: skip


def what_is_learnt(table: AdapterTable) -> list[str]:
    """What each branch has to learn from, and what it does not use; a line each."""
    rows, total = table.rows, len(table.rows)
    has_face = table.face.any(1).numpy()
    with_two = sum(has_face[own].sum() >= 2 for own in table.people)
    captioned = sum(bool(table.captions[row]) for row in rows)
    lines = [
        f"{total} photos of {len(table.people)} people; {len(table.close_ups)} are close-ups",
        f"face branch: {has_face[rows].sum()} photos show a face; {with_two} people have two or more such",
        f"body branch: {int((table.confidence[rows] >= WHOLE_BODY).sum())} photos show most of a body",
        f"text: {captioned} photos have a caption",
    ]
    if table.alone:
        lines.append(f"not used: {table.alone} photos, each the only one of its person")
    if table.grey:
        lines.append(f"{table.grey} faces are from black-and-white photos and count a tenth")
    if not with_two:
        lines.append("warning: nobody has two photos with a face, so the face branch learns nothing")
    if not captioned:
        lines.append("warning: no photo has a caption: prompts will not be followed well; see bolid extract --caption")
    return lines


def save_bodies(cache: Path, table: AdapterTable, train: str | Path, body_encoder: Any) -> None:
    """Keep every photo's Gaussian in a file for the next start of a training."""
    parts = {"mean": table.body_mean, "logvar": table.body_logvar, "confidence": table.confidence}
    save_tensors(cache, parts, _bodies_record(train, body_encoder))


def _read_bodies(
    cache: Path | None, train: str | Path, body_encoder: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(mean [N, D], logvar [N, D], confidence [N]) of these shards by this encoder, if the file `cache` has them."""
    if cache is None or not cache.exists():
        return None
    try:
        parts, found = load_tensors(cache, BODIES)
    except BolidError:  # damaged: they are encoded again
        return None
    if run_differences(found, _bodies_record(train, body_encoder)):
        return None
    return parts["mean"], parts["logvar"], parts["confidence"]


def _bodies_record(train: str | Path, body_encoder: Any) -> dict[str, Any]:
    from bolid.formats.shards import directory_sha256

    inputs = {"train": directory_sha256(train), "body_encoder": body_encoder.sha256}
    config = {"device": str(body_encoder.device).partition(":")[0]}
    return run_record(BODIES, family=body_encoder.record["family"], config=config, inputs=inputs)


def _encode_bodies(
    group: Sequence[Sample], body_encoder: BodyEncoder, train: str | Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean, logvar [M, D] and confidence [M] of a person's samples."""
    from bolid.formats.images import decode_image
    from bolid.method.mask_views import MaskView

    if body_encoder.needs_masks:
        masks = [MaskView.of_tensors(sample.tensors) for sample in group]
        found = [mask for mask in masks if mask is not None]
        if len(found) < len(masks):
            raise BolidError(
                f"{train} holds no masks, which {body_encoder.path} encodes",
                "run extract and shard again with a family that has a segmentation model",
            )
        return body_encoder.encode_masks(found)
    features = [sample.tensors.get("view_features") for sample in group] if body_encoder.needs_features else None
    images = [decode_image(sample.image) for sample in group]
    return body_encoder.encode(images, [sample.tensors["keypoints"] for sample in group], features)


def nobody_has_two(train: str | Path) -> BolidError:
    """The error for shards without anybody to learn from."""
    return BolidError(
        f"nobody in {train} has two photos",
        "the adapters learn a person's photo from their other photos: collect at least two each",
    )


def without_build(caption: str) -> str:
    """The caption without the words that name the build."""
    # Not "short-sleeved" and not "short hair".
    return re.sub(rf"\b(?:{'|'.join(BUILD_WORDS)})\b(?![- ](?:sleeve|hair))\s*", "", caption)


def caption_texts(captions: Iterable[str]) -> list[str]:
    """Every text that training on these captions can need."""
    captions = set(captions)
    return sorted({"", *captions, *map(without_build, captions)})


class TextStates:
    """The captions' text states [N, L, E] and SDXL's pooled ones: each computed once and kept in main memory, or, where
    they would take more than `limit` bytes, computed at each call.

    `precision`: what the network computes in. They are kept in that, to which it would convert them anyway.
    """

    def __init__(self, pipe: Any, captions: list[str], *, limit: float = 2**33, precision: str = "fp32") -> None:
        import torch

        from bolid.backends.diffusion import DTYPES, encode_prompts

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


@dataclass(frozen=True)
class AdapterBatch:
    """The photos of a batch and what each is conditioned on."""

    rows: np.ndarray  # [B] the photos to be denoised
    context: torch.Tensor  # [B, M] rows of the table that the body is made of
    present: torch.Tensor  # bool [B, M] which of them count
    captions: list[str]  # [B], "" where the text is dropped
    body_embeds: torch.Tensor  # [B, 1, D], null where dropped
    face_embeds: torch.Tensor  # [B, 1, 512]
    generators: Sequence[torch.Generator]  # [B] what else is random about each photo is drawn from these


def draw_batch(
    table: AdapterTable, rows: np.ndarray, config: TrainAdapterConfig, generators: Sequence[torch.Generator]
) -> AdapterBatch:
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
    return AdapterBatch(
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
    """The photos of batch `number`, rows of the table [B]. The first `close_up_fraction` of them are close-ups."""
    rows = table.rows[batch_rows(len(table.rows), config.batch_size, number, seed)]
    if close := round(config.close_up_fraction * config.batch_size):
        own = derive_seed(seed, "close-ups")  # an order of their own
        rows[:close] = table.close_ups[batch_rows(len(table.close_ups), close, number, own)]
    return rows
