"""``bolid evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bolid.errors import BolidError
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    Engine,
    EngineOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    SeedOption,
    WorkersOption,
    choose_family,
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
    from bolid.evaluate.results import Comparison, Evaluation, Metric


class Features(StrEnum):
    """Choices of --features."""

    auto = "auto"
    inception = "inception"
    tower = "tower"


@configurable
def evaluate(
    generated: Annotated[
        list[Path] | None,
        typer.Argument(help="Folder or shard directory of pictures; with --compare several.", show_default="generated"),
    ] = None,
    reference: Annotated[
        Path, typer.Option(help="Photos of the person, or <person>/*.jpg of several; or a shard directory.")
    ] = Path("photos"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare several methods' folders with the first.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Table of file, prompt, person, seed (CSV or JSONL). Default: prompts.csv in the folder."),
    ] = None,
    profiles: Annotated[
        list[Path] | None,
        typer.Option("--profile", metavar="FILE", help="Profile of the person, where the pictures' records lack it."),
    ] = None,
    conditioning: Annotated[
        Path | None,
        typer.Option(help="Photos that made the profile, if --reference does not hold them too.", hidden=True),
    ] = None,
    without_adapter: Annotated[
        Path | None,
        typer.Option(help="Pictures of the same prompts and seeds without adapter, to measure disturbance."),
    ] = None,
    features: Annotated[
        Features, typer.Option(help="Network for FID, KID and IS; tower is the family's image encoder.", hidden=True)
    ] = Features.auto,
    html: Annotated[Path | None, typer.Option(help="Write a report: one page that needs no other file.")] = None,
    workers: WorkersOption = 1,
    engine: EngineOption = Engine.local,
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score generated pictures: do they follow the prompts, and are face and body the person's?

    Prompts come from the pictures' run records, a table beside them, or captions in shards. Photos that made the
    profile are excluded from the reference. The table goes to standard error; JSON goes to standard output when that is
    a pipe or a file, or with --json. Started by torchrun or srun, several processes share the pictures and the first
    one writes.
    """
    folders = generated or [Path("generated")]
    if len(folders) > 1 and not compare:
        raise BolidError(f"{len(folders)} folders given", "add --compare to compare them")
    import bolid.evaluate
    from bolid.workers import this_rank

    quiet = quiet or not this_rank().leads
    chosen = choose_family(family, quiet)

    options: dict[str, Any] = {
        "prompts": prompts, "profiles": profiles, "conditioning": conditioning,
        "without_adapter": without_adapter, "features": features.value, "html": html, "family": chosen.name,
        "device": device, "seed": seed, "workers": workers, "engine": engine.value,
    }  # fmt: skip
    found: Evaluation | Comparison | None
    with progress_bar(quiet) as progress:
        if compare:
            found = bolid.evaluate.compare(folders, reference, progress=progress, **options)
        else:
            found = bolid.evaluate.evaluate(folders[0], reference, progress=progress, **options)
    if found is None:  # rank 0 reports
        return
    if isinstance(found, bolid.evaluate.Comparison):
        _print_comparison(found, quiet)
    else:
        _print_evaluation(found, quiet)
    if html is not None:
        note(f"report: {html}", quiet)
    if as_json or not sys.stdout.isatty():
        emit_json(found)


def _print_evaluation(result: Evaluation, quiet: bool) -> None:
    print_rejected(result.rejected, quiet)
    measured = {name: metric for name, metric in result.metrics.items() if metric.value is not None}
    marks = _marks(measured.values())
    rows = [(name, m.value, m.low, m.high, m.n, marks[m.measured_by]) for name, m in measured.items()]
    print_table(("metric", "value", "from", "to", "n", "by"), rows, quiet)
    _print_notes(result, marks, quiet)
    if result.ratios:
        note("", quiet)
        ratios = [
            (name, r["true"], r["pictures"], f"{r['pictures'] / r['true'] - 1:+.1%}")
            for name, r in result.ratios.items()
        ]
        print_table(("ratio", "true", "pictures", "off by"), ratios, quiet)
    if result.measurements:
        note("", quiet)
        sizes = [(name, m["true"], m["pictures"], m["error"], m["floor"]) for name, m in result.measurements.items()]
        print_table(("measurement, cm (kg)", "true", "pictures", "error", "floor"), sizes, quiet)
    _print_protocol(result, quiet)


def _print_comparison(compared: Comparison, quiet: bool) -> None:
    first = compared.methods[compared.baseline]
    for result in compared.methods.values():
        print_rejected(result.rejected, quiet)
    names = [
        name for name in first.metrics if any(r.metrics[name].value is not None for r in compared.methods.values())
    ]
    marks = _marks(first.metrics[name] for name in names)
    rows = [
        (
            name,
            *(result.metrics[name].value for result in compared.methods.values()),
            marks[first.metrics[name].measured_by],
        )
        for name in names
    ]
    print_table(("metric", *compared.methods, "by"), rows, quiet)
    _print_notes(first, marks, quiet)
    note(
        f"\nDifferences from {compared.baseline}, paired; *: p at most 0.05 with Holm's correction for all of them:",
        quiet,
    )
    print_differences(compared, quiet)
    _print_protocol(first, quiet)


def _marks(metrics: Iterable[Metric]) -> dict[str, str]:
    """What measured something -> a letter: the names are too long for a table."""
    return {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys(metric.measured_by for metric in metrics))}


def _print_notes(result: Evaluation, marks: dict[str, str], quiet: bool) -> None:
    note("", quiet)
    for name, mark in marks.items():
        note(f"{mark}: {name}", quiet)
    print_metric_notes(result.metrics, quiet)


def _print_protocol(result: Evaluation, quiet: bool) -> None:
    excluded, checked = result.held_out["excluded"], result.held_out["checked"]
    if excluded:
        note(f"\n{excluded} reference photos made the profile and were left out; {result.references} remain", quiet)
    elif not checked:
        note("\nnot known which photos made the profile: give --profile, or be sure that none is in --reference", quiet)
    for text in result.notes:
        note(text, quiet)
