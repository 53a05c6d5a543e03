"""`bolid fieldtest`: run every step of the chain, small, and write a report. Twin of the command of this name.

A step that fails ends nothing: those that do not need it still run. The report is written anew, whole, before and after
each step, so that one which takes Python with it leaves a report that says which it was.
"""

from __future__ import annotations

import datetime
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolid.doctor import Diagnosis, diagnose
from bolid.errors import BolidError, out_of_memory
from bolid.fieldtest.measure import Meter, free_memory
from bolid.fieldtest.privacy import Scrubber
from bolid.fieldtest.report import REPORT, write_report
from bolid.fieldtest.results import FAILED, PASSED, RUNNING, SKIPPED, Failure, StepResult
from bolid.fieldtest.steps import STEPS, Bench, Step
from bolid.models.families import get_family
from bolid.run import Progress, disk_errors, home

PROMPT = "a full body photo of a woman waving, in a red short-sleeved top and blue trousers, on a beach"
WORK, PICTURES = "work", "pictures"


@dataclass(frozen=True)
class FieldtestResult:
    """``html`` and ``json``: the report. ``steps``: in the order they ran."""

    html: Path
    json: Path
    steps: tuple[StepResult, ...]

    @property
    def failed(self) -> tuple[StepResult, ...]:
        """The steps that did not pass."""
        return tuple(step for step in self.steps if step.state == FAILED)


def fieldtest(
    family: str | None = None,
    out: str | os.PathLike[str] = "fieldtest",
    *,
    photos: str | os.PathLike[str] | None = None,
    prompt: str = PROMPT,
    steps: int = 10,
    pictures: int = 2,
    include_photos: bool = False,
    keep: bool = False,
    device: str = "auto",
    seed: int = 0,
    show: Callable[[StepResult], None] | None = None,
    progress: Progress | None = None,
) -> FieldtestResult:
    """Run every step of the chain with ``family``'s models and write out/report.html and out/report.json.

    ``photos``: a folder of one person's photos (4 or more), or of several people's; by default people are rendered.
    ``steps``: of the sampler, the family's own where it takes fewer. ``pictures``: of a prompt. ``include_photos``:
    the report shows the photos too. ``keep``: the working files in out/work stay. ``show`` gets each step when it has
    ended. The report has no path, no name of a file or folder of the user's, and no profile; it has the pictures.

    Raises BolidError where ``out`` holds something else. A step that fails is in the result.
    """
    chosen, out = get_family(family), Path(out)
    for name, value in (("steps", steps), ("pictures", pictures)):
        if value < 1:
            raise BolidError(f"--{name} is {value}", "give at least 1")
    if photos is not None and not Path(photos).is_dir():
        raise BolidError(f"{photos} is no folder", "give a folder of photos, or leave it out: people are rendered then")
    _prepare(out)
    folders: dict[str, str | os.PathLike[str]] = {"work": out / WORK, "fieldtest": out, "BOLID_HOME": home()}
    if photos is not None:
        folders["photos"] = photos
    if chosen.name.endswith(".toml"):
        folders["family"] = chosen.root
    given = None if photos is None else Path(photos)
    bench = Bench(chosen, out / WORK, out, given, prompt, steps, pictures, device, seed, progress)
    settings = {"prompt": prompt, "steps": steps, "pictures": pictures, "device": device, "seed": seed}
    settings["photos"] = "rendered people" if photos is None else "the user's"
    run = _Run(bench, Scrubber(folders), settings, include_photos, show)
    try:
        run.all()
    finally:
        if not keep:
            shutil.rmtree(bench.work, ignore_errors=True)
    return FieldtestResult(out / f"{REPORT}.html", out / f"{REPORT}.json", tuple(run.results))


def _prepare(out: Path) -> None:
    """An empty folder, or that of an earlier field test, whose files go."""
    if out.exists() and not out.is_dir():
        raise BolidError(f"--out {out} is a file", "give a folder for the report")
    if out.is_dir() and any(out.iterdir()) and not (out / f"{REPORT}.json").is_file():
        raise BolidError(f"--out {out} holds other files", "give a new folder for the report")
    with disk_errors(out):
        for folder in (out / WORK, out / PICTURES):
            shutil.rmtree(folder, ignore_errors=True)
        (out / WORK).mkdir(parents=True)


class _Run:
    """The steps that have ended, and the report of them."""

    def __init__(
        self,
        bench: Bench,
        scrub: Scrubber,
        settings: dict[str, Any],
        include_photos: bool,
        show: Callable[[StepResult], None] | None,
    ) -> None:
        self.bench, self.scrub, self.settings = bench, scrub, settings
        self.include_photos, self.show = include_photos, show
        self.started = _now()
        self.diagnosis: Diagnosis | None = None
        self.results: list[StepResult] = []

    def all(self) -> None:
        """Run every step. A step is not run where one that it needs has not passed."""
        self.run(Step("doctor", "doctor", self.examine))
        for step in STEPS:
            self.run(step)
        self.write(_now())

    def examine(self, bench: Bench) -> dict[str, Any]:
        """The doctor's page. What it finds wrong fails no step but shows why others fail."""
        self.diagnosis = diagnose(bench.family.name, progress=bench.progress)
        return {"problems": list(self.diagnosis.problems)}

    def run(self, step: Step) -> None:
        """Run one step and write the report, before it and after it."""
        before = list(self.results)
        self.results = [*before, StepResult(step.name, step.title, RUNNING)]
        self.write()
        result = self.result_of(step, {done.name for done in before if done.state == PASSED})
        self.results = [*before, result]
        self.write()
        if self.show is not None:
            self.show(result)

    def result_of(self, step: Step, passed: set[str]) -> StepResult:
        """What the step came to; its error is part of it. An interruption passes through."""
        bench = self.bench
        bench.made.clear()
        measured, figures, failure = Meter(), {}, None
        try:
            if reason := step.without(bench) or _unmet(step, bench, passed):
                return StepResult(step.name, step.title, SKIPPED, reason=reason)
            with measured:
                figures = step.run(bench)
        except Exception as error:
            failure = self.failure_of(error)
        result = StepResult(
            step.name, step.title, FAILED if failure else PASSED, round(measured.seconds, 2), measured.host_peak,
            measured.device_peak, self.scrub.all_of(figures), tuple(bench.made), failure=failure,
        )  # fmt: skip
        free_memory()
        return result

    def failure_of(self, error: Exception) -> Failure:
        """The error as texts. Its frames are let go of, and with them the tensors that they hold."""
        text = "".join(traceback.format_exception(error))
        traceback.clear_frames(error.__traceback__)
        known = error if isinstance(error, BolidError) else out_of_memory(error)
        message, hint = (known.message, known.hint) if known is not None else (str(error), "")
        return Failure(type(error).__name__, self.scrub(message), self.scrub(hint), self.scrub(text))

    def write(self, ended: str = "") -> None:
        """Both files, each whole."""
        import bolid

        data = {
            "kind": "fieldtest",
            "version": 1,
            "bolid": bolid.__version__,
            "family": self.scrub(self.bench.family.name),
            "started": self.started,
            "ended": ended,
            "settings": self.settings,
            "steps": self.results,
            "doctor": self.diagnosis,
        }
        photos = self.bench.person if self.include_photos else []
        write_report(self.bench.out, data, self.scrub, photos)


def _unmet(step: Step, bench: Bench, passed: set[str]) -> str:
    """Why a step cannot run: a step before it has not passed."""
    missing = [name for name in step.needs(bench) if name not in passed]
    return f"it needs {' and '.join(missing)}" if missing else ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
