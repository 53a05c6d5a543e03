"""`bolid train-vae`: training shards in, body-encoder.safetensors out (BoLID section 5.2).

One step takes some people and some views of each, in two halves. Each half is fused to z and rebuilds the other half's
bodies (the ELBO). The two halves of a person are matched among the people of the step (InfoNCE).
No measurement of any body is used: a real user has none. The labels are the person folders.

Shapes: N views in the table, P people and M views of each in a step, D body dimension.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.models.families import match_family
from bolid.run import Progress, only_writer, pick_device, run_record, sha256_file
from bolid.train_vae.config import TrainVaeConfig
from bolid.train_vae.data import ViewTable, encode_table, read_views, unused_photos
from bolid.train_vae.distillation import load_teacher
from bolid.train_vae.training import VaeTraining

if TYPE_CHECKING:
    from bolid.method.body_vae import BodyVAE

KIND = "body-encoder"


@dataclass(frozen=True)
class TrainVaeResult:
    """What a training wrote, and how it ended."""

    path: Path
    steps: int
    seconds: float
    people: int
    views: int
    metrics: dict[str, float]  # moving averages over the last steps
    already_done: bool = False  # nothing was trained: `path` is this very training's result
    unused: dict[str, int] = field(default_factory=dict)  # reason -> photos that no step takes


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
    """Train the body encoder on `train`'s shards and write it to `out`.

    The same call after a kill goes on; after the end it returns at once, `already_done`. With `config.schedule`
    "constant", a call with more steps goes on after the end, to the bytes of one training of that length.
    Raises BolidError for a directory that is no finished shard directory, or one with too few people, and where `out`
    is of another training.
    """
    from bolid.formats.checkpoint import check_result
    from bolid.formats.shards import directory_sha256, read_index

    config, out = config or TrainVaeConfig(), Path(out)
    chosen = match_family(family, read_index(train)["record"]["family"], train)
    others = {name: getattr(config, name) for name in ("init", "distill_from") if getattr(config, name)}
    inputs = {"train": directory_sha256(train)} | {name: sha256_file(path) for name, path in others.items()}
    record = run_record(KIND, family=chosen, config=config, seed=seed, inputs=inputs)
    with only_writer(out, folder=False):
        if check_result(out, record, checkpoint_path(out)):
            if config.schedule != "constant":
                checkpoint_path(out).unlink(missing_ok=True)
            return earlier_result(out, config)
        return _train(train, out, config, record, pick_device(device), seed, progress)


def _train(
    train: str | Path, out: Path, config: TrainVaeConfig, record: dict[str, Any], device: str, seed: int,
    progress: Progress | None,
) -> TrainVaeResult:  # fmt: skip
    """Train from the beginning or the checkpoint, and write the encoder."""
    started = time.monotonic()
    table = read_views(train, config.detail, masks=config.view == "mask")
    teacher = None
    if config.distill_from:
        teacher, record["space"] = load_teacher(train, table, config, device)
    training = VaeTraining(table, config, teacher, device, seed)
    training.load(checkpoint_path(out), record)

    saved = time.monotonic()
    while training.step < config.steps:
        # Some views of some people, in two halves each.
        batch = training.draw_batch()

        # Negative ELBO, InfoNCE, distillation.
        terms = training.losses(batch)

        # Update the weights.
        training.update(terms)
        if progress is not None:
            progress(training.step, config.steps, training.summary())
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            training.save_checkpoint(checkpoint_path(out), record)
            saved = time.monotonic()

    metrics = training.rounded_metrics()
    if config.schedule == "constant":  # to go on from, with more steps
        training.save_checkpoint(checkpoint_path(out), record)
    save_encoder(out, training.model.eval(), table, config, {**record, "metrics": metrics}, device)
    if config.schedule != "constant":
        checkpoint_path(out).unlink(missing_ok=True)
    return TrainVaeResult(
        out, config.steps, time.monotonic() - started, len(table.people), len(table.views.keypoints), metrics,
        unused=unused_photos(table.people),
    )  # fmt: skip


def earlier_result(out: Path, config: TrainVaeConfig) -> TrainVaeResult:
    """The result of the training that has been finished before."""
    from bolid.formats.tensors import read_record

    record = read_record(out)
    return TrainVaeResult(
        out, config.steps, 0.0, record["people"], record["views"], record["metrics"], already_done=True
    )


def save_encoder(
    out: Path, model: BodyVAE, table: ViewTable, config: TrainVaeConfig, record: dict[str, Any], device: str
) -> None:
    """Write the encoder and how bodies are distributed over the training people.

    The covariance of fewer people than dimensions is singular: then N(0, I) stays the prior.
    """
    from bolid.backends.body import fit_body_prior, save_body_encoder

    prior = None
    if len(table.people) > config.body_dim:
        encoded = [part.cpu() for part in encode_table(model, table, device)]
        prior = fit_body_prior([part[rows] for part in encoded] for rows in table.people)
    counts = {"people": len(table.people), "views": len(table.views.keypoints)}
    save_body_encoder(out, model, {**record, **counts}, prior)


def checkpoint_path(out: Path) -> Path:
    """Where a training that writes `out` keeps its checkpoint."""
    return out.with_name(f".{out.stem}.checkpoint.safetensors")
