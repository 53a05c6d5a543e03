"""``bolid evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bolid_cli._render import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    choose_family,
    emit_json,
    note,
    print_rejected,
    print_table,
    progress_bar,
)


def evaluate(
    generated: Annotated[Path, typer.Argument(help="Folder of generated pictures.")] = Path("generated"),
    reference: Annotated[Path, typer.Option(help="Folder of photos of the person.")] = Path("photos"),
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score generated pictures: do they follow the prompts, and is the body the person's?

    Prompts are read from the pictures' own run records. For synthetic people the ground truth beside the photos counts.
    """
    chosen = choose_family(family, quiet)
    import bolid.evaluate

    with progress_bar(quiet) as progress:
        result = bolid.evaluate.evaluate(generated, reference, family=chosen.name, device=device, progress=progress)
    print_rejected(result.rejected, quiet)
    rows = [(name, m.value, m.n, m.measured_by, m.note) for name, m in result.metrics.items()]
    print_table(("metric", "value", "n", "measured by", "note"), rows, quiet)
    if result.ratios:
        note("", quiet)
        ratios = [
            (name, r["true"], r["pictures"], f"{r['pictures'] / r['true'] - 1:+.1%}")
            for name, r in result.ratios.items()
        ]
        print_table(("ratio", "true", "pictures", "off by"), ratios, quiet)
    if as_json:
        emit_json(result)
