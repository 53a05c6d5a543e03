"""``bolid extract``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bolid_cli._console import (
    DeviceOption,
    Engine,
    EngineOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    choose_family,
    emit_json,
    emit_paths,
    note,
    print_rejected,
    print_unread,
    progress_bar,
)
from bolid_cli._options import configurable


class PersonRule(StrEnum):
    """Choices of --select-person."""

    main = "main"
    only = "only"


@configurable
def extract(
    photos: Annotated[
        Path, typer.Argument(help="Folder of <person>/*.jpg, or WebDataset tars: data/{00000..00012}.tar.")
    ] = Path("photos"),
    out: Annotated[str, typer.Option("--out", "-o", help="Shard directory to write, or its s3:// URL.")] = "shards",
    caption: Annotated[
        str,
        typer.Option(
            metavar="none|sidecar|blip2|MODEL",
            help="Captions: none; sidecar: the .txt beside a photo; or, for photos without one, the family's BLIP-2 or "
            "a model of transformers (a folder, or a name in the Hugging Face cache).",
        ),
    ] = "sidecar",
    select_person: Annotated[
        PersonRule,
        typer.Option(help="Where a photo shows several people: use the main one, or only photos of one person."),
    ] = PersonRule.main,
    workers: Annotated[
        int, typer.Option(help="Processes. The result is the same for any number.", min=1, max=4096)
    ] = 1,
    engine: EngineOption = Engine.local,
    max_side: Annotated[
        int, typer.Option(help="Reduce larger photos to this many pixels.", min=64, hidden=True)
    ] = 1536,
    max_bad: Annotated[
        float,
        typer.Option(
            help="Fail when more than this fraction of the photos, and more than one, is rejected.", min=0, max=1
        ),
    ] = 0.05,
    force: ForceOption = False,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the family's models on photos: pose, face, image features, caption.

    Captions come from a .txt or .caption beside each photo, and with --caption from a model where there is none. Photos
    that cannot be used are listed with the reason, here and in the index.json of the shard directory. After an
    interruption the same command goes on where it stopped. Started by torchrun or srun, several processes share the
    photos and the first one writes. The result is the same in all cases.
    """
    import bolid.extract
    import bolid.workers

    quiet = quiet or not bolid.workers.this_rank().leads
    chosen = choose_family(family, quiet)

    try:
        with progress_bar(quiet) as progress:
            result = bolid.extract.extract(
                photos,
                out,
                family=chosen.name,
                select_person=select_person.value,
                workers=workers,
                engine=engine.value,
                max_side=max_side,
                max_bad=max_bad,
                caption=caption,
                force=force,
                device=device,
                progress=progress,
            )
    except bolid.extract.TooManyRejected as error:
        print_rejected(error.rejected, quiet)
        raise
    if result is None:  # rank 0 reports
        return
    print_rejected(result.rejected, quiet)
    print_unread(result.unread, quiet)
    note(f"{result.samples} photos of {result.persons} people", quiet)
    if result.unused_people:
        few, number = ", ".join(result.unused_people[:5]), len(result.unused_people)
        note(f"{number} people have no photo that could be used: {few}{', ...' if number > 5 else ''}", quiet)
    if result.unnamed:
        note(
            f"{result.unnamed} photos name no person and count as one each: name them in the samples' json "
            '("person": ...) or in their keys (<person>/<name>)',
            quiet,
        )
    if result.warning:
        note(f"warning: {result.warning}")
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.out])
