"""``bolid train-vae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolid.train_vae import TrainVaeConfig
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    SeedOption,
    emit_json,
    emit_paths,
    note,
    progress_bar,
)
from bolid_cli._options import config_options


@config_options(TrainVaeConfig)
def train_vae(
    config: TrainVaeConfig,
    train: Annotated[
        str, typer.Argument(help="Training shards that `bolid shard` has written, or their s3:// URL.")
    ] = "train",
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("body-encoder.safetensors"),
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the body encoder: photos of a person -> one vector for their body.

    The person folders are the only labels. After an interruption the same command goes on where it stopped.
    """
    import bolid.train_vae

    with progress_bar(quiet) as progress:
        result = bolid.train_vae.train_vae(
            train, out, config=config, family=family, device=device, seed=seed, progress=progress
        )
    losses = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
    if result.already_done:
        more = "give more --steps" if config.schedule == "constant" else "give --init with this file, and another --out"
        note(f"already done: to train on, {more}", quiet)
    note(f"{result.steps} steps on {result.views} photos of {result.people} people: {losses}", quiet)
    for reason, number in result.unused.items():
        note(f"not used: {number} photos: {reason}", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.path])
