"""`bolid doctor`: one page about this machine, its libraries and one family. Twin of the command of this name.

No weights are loaded and no network is asked. The first sections are there within two seconds; importing the libraries
takes longer and comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bolid.doctor.libraries import LIBRARIES, device_rows, import_rows, package_rows, try_imports, versions
from bolid.doctor.machine import environment, machine
from bolid.doctor.parts import command_rows, look_at, part_rows
from bolid.doctor.rows import WRONG, Row
from bolid.models.families import Family, get_family
from bolid.models.sources import SOURCES
from bolid.run import Progress

Section = Callable[[str, Sequence[Row]], None]
"""How a section is shown as soon as it is known: (title, rows)."""


@dataclass(frozen=True)
class Diagnosis:
    """The page. ``usable``: nothing that the family needs is missing or broken; else ``problems`` says what is."""

    family: str
    version: str
    usable: bool
    problems: tuple[str, ...]
    sections: dict[str, tuple[Row, ...]]


def diagnose(
    family: str | None = None,
    *,
    quick: bool = False,
    show: Section | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look at this machine, the installed libraries and ``family`` (by default the one in use).

    ``quick``: versions alone, without importing the libraries. ``show`` gets each section when it is known.
    Raises BolidError for a family that does not exist; what is missing or broken is no error but a row.
    """
    import bolid

    chosen = get_family(family)
    sections: dict[str, tuple[Row, ...]] = {}

    def add(title: str, rows: Iterable[Row]) -> None:
        sections[title] = tuple(rows)
        if show is not None:
            show(title, sections[title])

    parts = look_at(chosen)
    add("Machine", machine())
    add("Environment", environment())
    add(f"Family {chosen.name}", part_rows(chosen, parts))
    add("Commands", command_rows(chosen, parts))
    add("Packages", package_rows(versions()))
    if not quick:
        answers = _imports(progress)
        add("Libraries", import_rows(answers))
        add("Device", device_rows(answers, _base_megabytes(chosen)))
    problems = tuple(
        f"{title}: {row.name}: {row.value}" for title, rows in sections.items() for row in rows if row.state == WRONG
    )
    return Diagnosis(chosen.name, bolid.__version__, not problems, problems, sections)


def _imports(progress: Progress | None) -> list[dict[str, Any]]:
    answers = []
    for answer in try_imports():
        answers.append(answer)
        if progress is not None and "module" in answer:
            done = sum("module" in one for one in answers)
            progress(done, len(LIBRARIES), f"importing libraries: {answer['module']}")
    return answers


def _base_megabytes(family: Family) -> int:
    """Of the published base and UNet; 0 where none is published."""
    sources = SOURCES.get(family.name, ())
    return sum(source.megabytes for source in sources if source.part in ("base", "unet") and not source.optional)
