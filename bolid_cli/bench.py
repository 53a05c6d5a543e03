"""``bolid bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bolid_cli._console import (
    DeviceOption,
    Engine,
    EngineOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    SeedOption,
    WorkersOption,
    choose_family,
    emit,
    emit_json,
    note,
    print_differences,
    print_metric_notes,
    print_rejected,
    print_table,
    progress_bar,
)
from bolid_cli._options import configurable

if TYPE_CHECKING:
    from bolid.evaluate.results import Comparison, Metric


@configurable
def bench(
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of pictures, one a method; or tables (CSV, JSONL) of picture, person, prompt, seed, method.",
        ),
    ] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What `bolid bench make` wrote: photos, people, prompts."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Own photos of the people instead: <person>/*.jpg, given to no method.", show_default=False),
    ] = None,
    conditioning: Annotated[
        Path | None, typer.Option(help="The photos that the methods were given, for copies.", show_default=False)
    ] = None,
    recognisers: Annotated[
        list[Path] | None,
        typer.Option(
            "--recogniser",
            metavar="FOLDER",
            help="InsightFace pack that no method used; several are averaged. Default: the family's.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report: one page that needs no other file.")] = None,
    workers: WorkersOption = 1,
    engine: EngineOption = Engine.local,
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Benchmark methods: do their pictures keep the person's body and face, and follow the prompt?

    Any method on any base takes part: it reads the benchmark's photos and makes the pictures that its requests.csv
    lists. Two more columns have the figures of real photos of the person, and of strangers (chance). The table goes to
    standard error; JSON goes to standard output when that is a pipe or a file, or with --json. Started by torchrun or
    srun, several processes share the pictures and the first one writes.
    """
    import bolid.evaluate
    from bolid.workers import this_rank

    quiet = quiet or not this_rank().leads
    chosen = choose_family(family, quiet)

    with progress_bar(quiet) as progress:
        compared = bolid.evaluate.bench(
            pictures or [],
            benchmark,
            reference=reference,
            conditioning=conditioning,
            recognisers=recognisers or (),
            html=html,
            family=chosen.name,
            device=device,
            seed=seed,
            workers=workers,
            engine=engine.value,
            progress=progress,
        )
    if compared is None:  # rank 0 reports
        return
    _print(compared, quiet)
    if html is not None:
        note(f"report: {html}", quiet)
    if as_json or not sys.stdout.isatty():
        emit_json(compared)


def make(
    out: Annotated[Path, typer.Argument(help="Folder for photos and requests.")] = Path("benchmark"),
    max_people: Annotated[int, typer.Option(help="Only the first so many people; 0: all 24.", min=0)] = 0,
    max_prompts: Annotated[int, typer.Option(help="Only the first so many prompts; 0: all five.", min=0)] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Render the benchmark's people from their seeds, and list the pictures that a method shall make.

    A method reads OUT/conditioning and OUT/requests.csv, and writes each picture under the name that it has there.
    Equal digests mean equal photos.
    """
    import bolid.evaluate

    with progress_bar(quiet) as progress:
        made = bolid.evaluate.make_benchmark(out, max_people=max_people, max_prompts=max_prompts, progress=progress)
    note(f"{made.people} people, {made.photos} photos, {made.requests} pictures to make", quiet)
    note(f"digest of the photos: {made.digest}", quiet)
    if as_json:
        emit_json(made._asdict())
    else:
        emit(str(made.folder))


def _print(compared: Comparison, quiet: bool) -> None:
    """A table with the methods, real photos and strangers side by side, then the differences."""
    from bolid.evaluate.results import GROUPS

    columns = {**compared.methods, **compared.bounds}
    for result in columns.values():
        print_rejected(result.rejected, quiet)
    first = compared.methods[compared.baseline].metrics
    rows = []
    for heading, names in GROUPS.items():
        for name in names:
            metrics = [result.metrics[name] for result in columns.values() if name in result.metrics]
            if any(metric.value is not None for metric in metrics):
                rows.append((heading, name, *map(_shown, metrics), first[name].n))
                heading = ""
    print_table(("", "metric", *columns, "n"), rows, quiet)
    note("\nvalue ± half of the 95 % interval; n: pictures or people of the first method", quiet)
    if compared.differences:
        note(f"\nDifferences from {compared.baseline}, paired; *: p at most 0.05 with Holm's correction:", quiet)
        print_differences(compared, quiet)
    note("", quiet)
    print_metric_notes(first, quiet)


def _shown(metric: Metric) -> str:
    """Three digits, and half the width of the interval."""
    if metric.value is None:
        return "-"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} ±{(metric.high - metric.low) / 2:.3f}"
