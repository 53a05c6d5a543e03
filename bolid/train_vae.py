"""`bolid train-vae`: training shards in, body-encoder.safetensors out (BoLID section 5.2).

One step: some people, some views of each. The views are split in two; each half is fused to z and has to rebuild the
other half's bodies (the ELBO), and the two halves have to find each other among the people of the step.
No measurement of any body is used: a real user has none. The labels are the person folders.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError, require_not_negative, require_parts
from bolid.models.families import match_family
from bolid.run import Progress, derive_seed, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.method.body_vae import BodyVAE, Views

KIND = "body-encoder"


@dataclass(frozen=True)
class TrainVaeConfig:
    """Settings of the body encoder and its training."""

    steps: int = field(default=3000, metadata={"help": "training steps"})
    people: int = field(default=64, metadata={"help": "people in a step"})
    views: int = field(default=4, metadata={"help": "photos of each person in a step, at least 2"})
    body_dim: int = field(default=64, metadata={"help": "dimensions of the body vector"})
    view: str = field(default="crop", metadata={"help": "what a photo is seen by: crop, pooled or both"})
    width: int = field(default=24, metadata={"help": "channels of the crop network's first layer"})
    detail: float = field(default=1.0, metadata={"help": "how finely a photo's parts are sampled: 1, 1.5 or 2"})
    direct: bool = field(default=True, metadata={"help": "a linear way past the network's head"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of AdamW"})
    kl_weight: float = field(default=0.005, metadata={"help": "weight of the KL term once warmed up"})
    kl_warmup: float = field(
        default=0.2, metadata={"help": "part of the training over which the KL weight grows from 0"}
    )
    # At 0.1 InfoNCE dominates z, and a read-out of proportions is worse (by trial).
    reconstruction_weight: float = field(default=1.0, metadata={"help": "weight of rebuilding held-out views"})
    identity_weight: float = field(default=1.0, metadata={"help": "weight of telling people apart (InfoNCE)"})
    grey: float = field(default=0.3, metadata={"help": "part of the training views without colour"})
    hide_head: float = field(default=0.0, metadata={"help": "part of the training views with the head hidden"})
    checkpoint_minutes: float = field(default=2.0, metadata={"help": "minutes between checkpoints"})
    init: str = field(default="", metadata={"help": "start from this body encoder, of the same shape"})
    anchor: str = field(default="", metadata={"help": "stay in the space of this body encoder"})
    anchor_weight: float = field(default=5.0, metadata={"help": "weight of staying there"})
    spoil: float = field(default=0.0, metadata={"help": "part of the training views blurred or half hidden"})

    def __post_init__(self) -> None:
        if self.views < 2:
            raise BolidError(f"--views is {self.views}", "a view must have another one to be told from: at least 2")
        if self.people < 2:
            raise BolidError(f"--people is {self.people}", "telling people apart needs at least 2 of them in a step")
        if self.view not in ("crop", "pooled", "both"):
            raise BolidError(f"--view is {self.view!r}", "choose crop, pooled or both")
        if self.detail not in (1.0, 1.5, 2.0):
            raise BolidError(f"--detail is {self.detail}", "choose 1, 1.5 or 2")
        if self.steps < 1:
            raise BolidError(f"--steps is {self.steps}", "give at least 1")
        weights = ("kl_weight", "reconstruction_weight", "identity_weight", "anchor_weight")
        require_not_negative(self, ("learning_rate", "weight_decay", *weights))
        require_parts(self, ("kl_warmup", "grey", "hide_head", "spoil"))


@dataclass(frozen=True)
class ViewTable:
    """All training views in memory, the patches as uint8: about 8 KB each (at detail 1). N views, sorted by person."""

    views: Views
    people: list[np.ndarray]  # rows of each person


@dataclass(frozen=True)
class TrainVaeResult:
    path: Path
    steps: int
    seconds: float
    people: int
    views: int
    metrics: dict[str, float]


def read_views(train: str | Path, detail: float = 1.0) -> ViewTable:
    """Training shards -> the patches and keypoints of every view."""
    import numpy as np
    import torch

    from bolid.formats.shards import decode_image, group_by_person, read_shards
    from bolid.method.body_vae import Views, view_crop

    parts: list[Views] = []
    people, count = [], 0
    for _person, samples in group_by_person(read_shards(train)):
        people.append(np.arange(count, count + len(samples)))
        count += len(samples)
        pictures = ((decode_image(sample.image), sample.tensors["keypoints"]) for sample in samples)
        cut = [view_crop(image, keypoints, detail=detail) for image, keypoints in pictures]
        features = [sample.tensors[name] for sample in samples if (name := "view_features") in sample.tensors]
        parts.append(
            pack(
                np.stack([crop for crop, _ in cut]),
                np.stack([inside for _, inside in cut]),
                np.stack(features) if len(features) == len(samples) else None,
            )
        )
    if not parts:
        empty = torch.empty(0)
        return ViewTable(Views(empty, empty, empty, empty), [])
    pooled = [part.features for part in parts if part.features is not None]
    views = Views(
        torch.cat([part.torso for part in parts]),
        torch.cat([part.bust for part in parts]),
        torch.cat([part.limb for part in parts]),
        torch.cat([part.keypoints for part in parts]),
        torch.cat(pooled) if len(pooled) == len(parts) else None,
    )
    return ViewTable(views, people)


def pack(crops: np.ndarray, keypoints: np.ndarray, features: np.ndarray | None) -> Views:
    """Views whose patches are uint8, 0 where not seen (else 1..255): a quarter of the memory."""
    import torch

    from bolid.method.body_vae import Views, make_views, seen_patches

    def packed(patch: torch.Tensor) -> torch.Tensor:
        return (((patch + 1) * 127).round().add(1).clamp(1, 255) * seen_patches(patch)).to(torch.uint8)

    views = make_views(torch.from_numpy(crops), torch.from_numpy(keypoints))
    pooled = None if features is None else torch.from_numpy(features)
    return Views(packed(views.torso), packed(views.bust), packed(views.limb), views.keypoints, pooled)


def unpack(views: Views, rows: torch.Tensor) -> Views:
    """The rows of packed views, as the network takes them."""
    from bolid.method.body_vae import Views, seen_patches

    def unpacked(patch: torch.Tensor) -> torch.Tensor:
        patch = patch[rows].float()
        return ((patch - 1) / 127 - 1) * seen_patches(patch)

    features = None if views.features is None else views.features[rows].float()
    return Views(unpacked(views.torso), unpacked(views.bust), unpacked(views.limb), views.keypoints[rows], features)


def train_vae(
    train: str | Path = "train",
    out: str | Path = "body-encoder.safetensors",
    *,
    config: TrainVaeConfig | None = None,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainVaeResult:
    """Train the body encoder on `train`'s shards and write it to `out`. The same call after a kill goes on.

    Raises BolidError for a directory that is no finished shard directory, or one with too few people, and where `out`
    is of another training.
    """
    from bolid.backends.body import BodyEncoder, population_of, save_body_encoder
    from bolid.formats.checkpoint import check_result
    from bolid.formats.shards import directory_sha256, read_index

    config = config or TrainVaeConfig()
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    others = {name: getattr(config, name) for name in ("init", "anchor") if getattr(config, name)}
    inputs = {"train": directory_sha256(train)} | {name: sha256_file(path) for name, path in others.items()}
    record = run_record(KIND, family=chosen, config=config, seed=seed, inputs=inputs)
    check_result(out, record)
    table = read_views(train, config.detail)
    device, anchor = pick_device(device), None
    if config.anchor:
        space = BodyEncoder(config.anchor, device)
        record["space"] = space.space
        seen = space.model.detail
        anchor = space, table if seen == config.detail else read_views(train, seen)
    started = time.monotonic()
    model, metrics = fit(table, config, record, Path(out), anchor, device=device, seed=seed, progress=progress)
    # Of fewer people than dimensions the covariance knows nothing of most directions: then N(0, I) stays the prior.
    people = None
    if len(table.people) > config.body_dim:
        encoded = [part.cpu() for part in encode_table(model, table, device)]
        people = population_of([part[rows] for part in encoded] for rows in table.people)
    save_body_encoder(out, model, {**record, "metrics": metrics}, people)
    checkpoint_path(Path(out)).unlink(missing_ok=True)
    return TrainVaeResult(
        Path(out), config.steps, time.monotonic() - started, len(table.people), len(table.views.keypoints), metrics
    )


def checkpoint_path(out: Path) -> Path:
    return out.with_name(f".{out.stem}.checkpoint.safetensors")


def fit(
    table: ViewTable,
    config: TrainVaeConfig,
    record: dict[str, Any],
    out: Path,
    anchored: tuple[BodyEncoder, ViewTable] | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[BodyVAE, dict[str, float]]:
    """The training loop: the table's views -> (model, the last steps' mean losses).

    `anchored`: the encoder whose space is to be kept, on `device`, and the same photos as it sees them.
    """
    import torch

    from bolid.backends.body import read_body_encoder
    from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
    from bolid.method import body_vae as bv

    people = [rows for rows in table.people if len(rows) >= 2]
    if len(people) < 2:
        raise BolidError(
            f"the training shards hold {len(people)} people with two photos or more",
            "the body encoder learns from several photos of several people: collect more, then run extract and shard",
        )
    n_people, n_views = min(config.people, len(people)), config.views
    torch.manual_seed(derive_seed(seed, "train-vae", "init"))
    feature_dim = 0 if table.views.features is None else table.views.features.shape[-1]
    if config.view != "crop" and not feature_dim:
        raise BolidError("the training shards hold no image-text features", "use --view crop, or run extract again")
    model = bv.BodyVAE(
        config.body_dim, width=config.width, view=config.view, feature_dim=feature_dim, direct=config.direct,
        detail=config.detail,
    )  # fmt: skip
    if config.init:
        first, _, told = read_body_encoder(config.init)
        if model.direct is not None:  # one that has no such way starts without, as it were
            first.setdefault("direct.weight", model.direct.weight.detach())
        try:
            detail = told.get("config", {}).get("detail", 1.0)
            model.load_state_dict(bv.at_detail(first, detail, config.detail))
        except RuntimeError as error:
            raise BolidError(
                f"--init {config.init} is a body encoder of another shape", "give its --body-dim, --width and --view"
            ) from error
    model = model.to(device, memory_format=torch.channels_last).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    anchor = None
    if anchored:
        space, seen = anchored
        if space.body_dim != config.body_dim or space.model.feature_dim not in (0, feature_dim):
            raise BolidError(
                f"--anchor {config.anchor} has a space of {space.body_dim} dimensions and looks at {space.model.view}",
                "give its --body-dim, and shards of the family that it was trained with",
            )
        anchor = Anchor(space.model, seen, device)
    state = dict(model.state_dict(keep_vars=True))
    step = load_checkpoint(checkpoint_path(out), record, state, optimizer)

    saved = time.monotonic()
    recent: dict[str, float] = {}
    while step < config.steps:
        generator = torch.Generator().manual_seed(derive_seed(seed, "train-vae", step))
        rows, in_a = _draw(people, n_people, n_views, generator, seed, step)
        views = bv.augment(
            unpack(table.views, rows), generator, grey=config.grey, hide_head=config.hide_head, spoil=config.spoil
        )
        views = views.to(device)
        noise = torch.randn(2, n_people, config.body_dim, generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)

        mean, logvar = (part.view(n_people, n_views, -1) for part in model.encode(views))
        confidence = bv.view_confidence(views.keypoints).view(n_people, n_views)
        in_a = in_a.to(device)
        half_a = bv.fuse(mean, logvar, confidence * in_a)
        half_b = bv.fuse(mean, logvar, confidence * ~in_a)
        # Each half rebuilds the *other* half's views: leave-one-out, a view is never in its own context.
        z_a, z_b = (m + (0.5 * v).exp() * e for (m, v), e in zip((half_a, half_b), noise, strict=True))
        z = torch.where(in_a[..., None], z_b[:, None], z_a[:, None]).flatten(0, 1)
        reconstruction = bv.loss_reconstruction(model, z, views).mean()
        kl = (bv.kl_divergence(*half_a) + bv.kl_divergence(*half_b)).mean() / 2
        identity, found = bv.loss_identity(half_a, half_b)
        kl_weight = config.kl_weight * min(1.0, step / max(1.0, config.kl_warmup * config.steps))
        loss = config.reconstruction_weight * reconstruction + kl_weight * kl + config.identity_weight * identity
        now = {"reconstruction": reconstruction, "kl": kl, "identity": identity, "found": found}
        if anchor is not None:
            now["anchor"] = (anchor.loss(half_a[0], rows, in_a) + anchor.loss(half_b[0], rows, ~in_a)) / 2
            loss = loss + config.anchor_weight * now["anchor"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1

        for name, value in ((name, float(value.detach())) for name, value in now.items()):
            recent[name] = 0.9 * recent.get(name, value) + 0.1 * value
        if not torch.isfinite(loss):
            raise BolidError(f"the training diverged at step {step}", "lower --learning-rate")
        if progress is not None:
            progress(step, config.steps, " ".join(f"{name} {value:.3f}" for name, value in recent.items()))
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            save_checkpoint(checkpoint_path(out), step, record, state, optimizer)
            saved = time.monotonic()
    return model.eval(), {name: round(value, 4) for name, value in recent.items()}


def encode_table(model: BodyVAE, table: ViewTable, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean, logvar [N, D] and confidence [N] of every view, on `device`."""
    import torch

    from bolid.method.body_vae import view_confidence

    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(table.views.keypoints)).split(256):
            views = unpack(table.views, rows).to(device)
            parts.append((*model.encode(views), view_confidence(views.keypoints)))
    mean, logvar, confidence = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, logvar, confidence


class Anchor:
    """Another body encoder whose space is to be kept: what it reads in the views of a person that a fused body did not
    come from is what that body should be. So it also learns how far to trust few views, and bad ones.
    """

    def __init__(self, model: BodyVAE, table: ViewTable, device: str) -> None:
        import torch

        self.model = model
        mean, logvar, confidence = encode_table(model, table, device)
        self.precision = torch.exp(-logvar) * confidence[:, None]  # [N, D]
        self.weighted = self.precision * mean  # [N, D]
        self.whole = self.precision.new_empty(len(self.precision), 2, self.precision.shape[1])  # of a row's person
        for rows in table.people:
            self.whole[rows] = torch.stack([self.weighted[rows].sum(0), self.precision[rows].sum(0)])
        bodies = torch.stack([self.whole[rows[0], 0] / (1 + self.whole[rows[0], 1]) for rows in table.people])
        self.variance = bodies.var(0)

    def loss(self, body_mean: torch.Tensor, rows: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Mean squared error of body_mean [P, D], in variances of the population. `rows` [P * M] of the table are the
        step's views, `used` [P, M] says which of them body_mean came from.
        """
        rows = rows.view(used.shape).to(self.whole.device)
        again = (rows[:, :, None] == rows[:, None, :]).tril(-1).any(2)  # someone with few photos gives some twice
        counted = (used & ~again)[..., None]
        weighted, precision = self.whole[rows[:, 0]].unbind(1)
        weighted = weighted - (self.weighted[rows] * counted).sum(1)
        precision = precision - (self.precision[rows] * counted).sum(1)
        target = weighted / (1 + precision)
        return ((body_mean - target).square() / self.variance).mean()


def _draw(
    people: list[np.ndarray], n_people: int, n_views: int, generator: torch.Generator, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's views: rows [n_people * n_views] of the table, and which belong to half a, [n_people, n_views].

    People come from a seeded permutation of each epoch. Someone with fewer photos than `n_views` gives some twice,
    but always in the same half: no photo is in both.
    """
    import numpy as np
    import torch

    per_epoch = len(people) // n_people
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng(derive_seed(seed, "train-vae", "epoch", epoch)).permutation(len(people))
    rows, in_a = [], []
    for person in order[position * n_people : (position + 1) * n_people]:
        own = people[person][torch.randperm(len(people[person]), generator=generator).numpy()][:n_views]
        split = int(torch.randint(1, len(own), (1,), generator=generator))
        repeat = np.arange(n_views) % len(own)
        rows.append(own[repeat])
        in_a.append(repeat < split)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.stack(in_a))


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 1 %."""
    warmup = max(1.0, 0.03 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
