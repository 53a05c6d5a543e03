"""``bolid shard``."""

from __future__ import annotations

from typing import Annotated

import typer

from bolid_cli._console import (
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
from bolid_cli._options import configurable


@configurable
def shard(
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            help="Shard directories that `bolid extract` has written, or their s3:// URLs.", show_default="shards"
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Directory of training shards to write, or its s3:// URL.")
    ] = "train",
    family: FamilyOption = None,
    min_photos: Annotated[int, typer.Option(help="Leave out people with fewer different photos.", min=2)] = 4,
    val_fraction: Annotated[
        float, typer.Option(help="Hold out this fraction of the people: write OUT/train and OUT/val.", min=0, max=0.99)
    ] = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make training shards: by person, cut to the family's format, latents cached.

    Several shard directories count as one. Near-duplicate photos of a person are dropped. After an interruption the
    same command goes on where it stopped.
    """
    import bolid.shard

    with progress_bar(quiet) as progress:
        result = bolid.shard.shard(
            shards or "shards",
            out,
            family=family,
            min_photos=min_photos,
            val_fraction=val_fraction,
            seed=seed,
            device=device,
            progress=progress,
        )
    for reason, keys in result.rejected.items():
        people = {key.rpartition("/")[0] for key in keys}
        note(f"left out {len(keys)} photos of {len(people)} people: {reason}", quiet)
    note(f"{result.samples} photos of {result.persons} people", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths(result.out)
