"""``bolid train-adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bolid.train_adapter.config import TrainAdapterConfig
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    SeedOption,
    emit_json,
    emit_paths,
    note,
    print_table,
    progress_bar,
)
from bolid_cli._options import config_options


@config_options(TrainAdapterConfig)
def train_adapter(
    config: TrainAdapterConfig,
    train: Annotated[
        str, typer.Argument(help="Training shards that `bolid shard` has written, or their s3:// URL.")
    ] = "train",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for face.safetensors and body.safetensors.")] = Path(
        "adapter"
    ),
    body_encoder: Annotated[
        Path | None, typer.Option(help="Body encoder that `bolid train-vae` has written. Default: the family's.")
    ] = None,
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    stop_after: Annotated[
        int | None,
        typer.Option(
            help="Write the adapters as they are after so many steps, and stop. Typed again without it, the training "
            "goes on. The learning rate falls over all --steps, so adapters of an earlier step are noisy."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the training would do and need, and train nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the face and the body branch on a frozen base, each photo conditioned on the person's other photos.

    Two IP-Adapter files that plain diffusers loads. The folder also gets log.jsonl, loss.png and contact sheets
    of samples. After an interruption the same command goes on where it stopped, and ends with the same bytes.
    On several devices: accelerate launch -m bolid_cli.main train-adapter ...
    """
    import os

    import bolid.train_adapter

    if dry_run:
        plan = bolid.train_adapter.plan_training(
            train, config=config, body_encoder=body_encoder, family=family, device=device
        )
        if as_json:
            emit_json(plan)
        else:
            _print_plan(plan, quiet)
        return
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first one talks
        quiet = True
    with progress_bar(quiet) as progress:
        result = bolid.train_adapter.train_adapter(
            train, out, config=config, body_encoder=body_encoder, family=family, device=device, seed=seed,
            stop_after=stop_after, progress=progress, say=lambda text: note(text, quiet),
        )  # fmt: skip
    if result.already_done:
        more = (
            "give more --steps" if config.schedule == "constant" else "give --init with this folder, and another --out"
        )
        note(f"already done: to train on, {more}", quiet)
    note(
        f"{result.steps} steps on {result.photos} photos of {result.people} people in {result.seconds:.0f} s, "
        f"loss {result.loss:.4f}",
        quiet,
    )
    if result.steps < config.steps:
        note(
            f"that is {result.steps} of {config.steps}; the learning rate, at most {config.learning_rate:.2g}, is at "
            f"{result.learning_rate:.2g}: the higher it still is, the noisier the weights",
            quiet,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.face, result.body])


def _print_plan(plan: Any, quiet: bool) -> None:
    rows: list[tuple[str, str]] = [
        ("people with two photos or more", f"{plan.people:,}"),
        ("photos, an epoch", f"{plan.photos:,}"),
        ("photos in a step", f"{plan.photos_per_step:,}"),
        ("steps in an epoch", f"{plan.steps_per_epoch:,.1f}"),
        ("steps", f"{plan.steps:,}"),
        ("epochs", f"{plan.epochs:,.1f}"),
        ("parameters that are trained", f"{plan.parameters:,}"),
        ("computed in", f"{plan.precision} on {plan.device}"),
        *((f"memory, {name}", f"{size / 2**20:,.0f} MiB") for name, size in plan.memory.items()),
    ]
    rows += [(f"main memory, {name}", f"{size / 2**20:,.0f} MiB") for name, size in plan.main_memory.items()]
    if plan.memory_available is not None:
        rows.append(("memory, free now", f"{plan.memory_available / 2**20:,.0f} MiB"))
    print_table(("", "about"), rows, quiet)
