"""``bolid train-adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolid.train_adapter import TrainAdapterConfig
from bolid_cli._config import config_options
from bolid_cli._render import (  # fmt: skip
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


@config_options(TrainAdapterConfig)
def train_adapter(
    config: TrainAdapterConfig,
    train: Annotated[Path, typer.Argument(help="Training shards that `bolid shard` has written.")] = Path("train"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for face.safetensors and body.safetensors.")] = Path(
        "adapter"
    ),
    body_encoder: Annotated[
        Path | None, typer.Option(help="Body encoder that `bolid train-vae` has written. Default: the family's.")
    ] = None,
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the face and the body branch on a frozen base, each photo conditioned on the person's other photos.

    Two IP-Adapter files that plain diffusers loads. The folder also gets log.jsonl and sheets of sample pictures.
    After an interruption the same command goes on where it stopped, and ends with the same bytes.
    """
    import bolid.train_adapter

    with progress_bar(quiet) as progress:
        result = bolid.train_adapter.train_adapter(
            train, out, config=config, body_encoder=body_encoder, family=family, device=device, seed=seed,
            progress=progress,
        )  # fmt: skip
    note(
        f"{result.steps} steps on {result.photos} photos of {result.people} people in {result.seconds:.0f} s, "
        f"loss {result.loss:.4f}",
        quiet,
    )
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.face, result.body])
