"""``bolid fieldtest``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bolid.errors import BolidError
from bolid.models.families import FAMILY_NAMES, get_family
from bolid_cli._console import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    emit_json,
    emit_paths,
    note,
    progress_bar,
)

if TYPE_CHECKING:
    from bolid.fieldtest import StepResult


def fieldtest(
    family: Annotated[
        str | None,
        typer.Argument(
            metavar="FAMILY",
            help=f"{', '.join(FAMILY_NAMES)}, or a .toml file. Default: BOLID_FAMILY, `bolid models use`, tiny.",
            show_default=False,
        ),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Argument(
            metavar="PHOTOS",
            help="Folder of 4 photos or more of one person. Default: people are rendered.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html and report.json.")] = Path(
        "fieldtest"
    ),
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the pictures show. Default: a woman, waving.", show_default=False)
    ] = "a full body photo of a woman waving, in a red short-sleeved top and blue trousers, on a beach",
    steps: Annotated[int, typer.Option(help="Sampling steps; the family's own where it takes fewer.", min=1)] = 10,
    pictures: Annotated[int, typer.Option(help="Pictures of the prompt.", min=1, max=100)] = 2,
    include_photos: Annotated[
        bool, typer.Option("--include-photos", help="Show the photos in the report. Without it there is none.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the working files, in OUT/work.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run every step of the chain, small, with FAMILY's models, and write a report to attach to an issue.

    One training step of each kind, two pictures of each way to generate. A step that fails does not end the run. The
    report has times, peak memory, versions, the pictures, and what failed with its traceback; it has no photo and no
    path of yours. Exit status 1 when a step failed.
    """
    import bolid.fieldtest

    chosen = get_family(family)
    with progress_bar(quiet) as progress:
        result = bolid.fieldtest.fieldtest(
            chosen.name,
            out,
            photos=photos,
            prompt=prompt,
            steps=steps,
            pictures=pictures,
            include_photos=include_photos,
            keep=keep,
            device=device,
            seed=seed,
            show=lambda step: _show(step, quiet),
            progress=progress,
        )
    if as_json:
        emit_json({"html": result.html, "json": result.json, "steps": result.steps})
    else:
        emit_paths([result.html, result.json])
    if result.failed:
        raise BolidError(
            f"{len(result.failed)} of {len(result.steps)} steps failed: "
            + ", ".join(step.name for step in result.failed),
            f"{result.html} says why; attach it to an issue once you have looked at it",
        )


def _show(step: StepResult, quiet: bool) -> None:
    seconds = f"{step.seconds:7.1f} s" if step.state in ("passed", "failed") else " " * 9
    memory = f"{step.host_peak / 1e9:5.1f} GB" if step.host_peak else " " * 8
    on_device = f", {step.device_peak / 1e9:.1f} GB on the device" if step.device_peak else ""
    note(f"{step.state:8} {seconds} {memory}  {step.title}{on_device}", quiet)
    if step.reason:
        note(f"{'':29}{step.reason}", quiet)
    if step.failure:
        note(f"{'':29}{step.failure.kind}: {step.failure.message}", quiet)
        if step.failure.hint:
            note(f"{'':29}hint: {step.failure.hint}", quiet)
