"""Pictures for a page: the request, the progress, the pictures, and the command line that makes each again."""

from __future__ import annotations

import itertools
import queue
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.body.mesh import poses
from bolid.errors import BolidError
from bolid.formats.pictures import picture_record
from bolid.generate import generate
from bolid.generate.models import Models
from bolid.generate.request import picture_seed
from bolid.run import LARGEST_SEED

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.models.families import Family

MAX_PICTURES = 16
MAX_PROMPT = 2000  # characters
UPSCALES = (1, 2, 4)
NOBODY = "nobody"
_PREVIEWS = 0.2  # of the time, at most, goes to previews
_PAUSE = 0.2  # seconds between two steps that are reported, so that slow clients do not fall behind


class Cancelled(Exception):
    """A client has stopped the sampling."""


@dataclass(frozen=True)
class PictureRequest:
    """A prompt and settings. None: the family's default. Scales of branches that a person lacks are left out."""

    prompt: str
    face_scale: float | None = None
    body_scale: float | None = None
    number: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    few_steps: bool = False
    pose_from: Path | None = None
    pose: str = ""
    """One of `bolid.body.mesh.poses`, for those who have a body; "": as the prompt says."""
    upscale: int = 1
    refine_face: bool = False

    def check(self) -> None:
        """Raises BolidError for settings that are wrong, or would take too long."""
        if not any(letter.isalnum() for letter in self.prompt):
            raise BolidError("no prompt given", "write one, like: a full body photo of a woman on a beach")
        if len(self.prompt) + len(self.negative) > MAX_PROMPT:
            raise BolidError(f"the prompt is longer than {MAX_PROMPT} characters", "make it shorter")
        if not 1 <= self.number <= MAX_PICTURES:
            raise BolidError(f"{self.number} pictures are asked for", f"ask for 1 to {MAX_PICTURES}")
        for name, value in (("face strength", self.face_scale), ("body strength", self.body_scale)):
            if value is not None and not 0 <= value <= 3:
                raise BolidError(f"the {name} is {value}", "give a number from 0 to 3")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise BolidError(f"the seed is {self.seed}", f"give a whole number from 0 to {LARGEST_SEED}")
        if self.steps is not None and not 1 <= self.steps <= 200:
            raise BolidError(f"{self.steps} steps are asked for", "ask for 1 to 200")
        if self.upscale not in UPSCALES:
            raise BolidError(f"upscale is {self.upscale}", f"choose one of {', '.join(map(str, UPSCALES))}")
        if self.pose and self.pose not in poses():
            raise BolidError(f"there is no pose {self.pose!r}", f"choose one of {', '.join(poses())}")
        if self.pose and self.pose_from is not None:
            raise BolidError("a pose and a photo of a pose are given", "leave one of the two out")

    def options(self, family: Family, branches: set[str]) -> dict[str, Any]:
        """The arguments of `generate` that are not the defaults, for a person who has these `branches`."""
        sampler = family.few_steps if self.few_steps else family.defaults
        options: dict[str, Any] = {}
        for branch, scale in (("face", self.face_scale), ("body", self.body_scale)):
            if branch in branches and scale is not None and scale != float(sampler.get(f"{branch}_scale", 1.0)):
                options[f"{branch}_scale"] = scale
        for name in ("steps", "guidance", "pose_from"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.negative:
            options["negative"] = self.negative
        if self.pose and branches:  # nobody in particular has no body to be posed
            options["pose"] = self.pose
        if self.upscale != 1:
            options["upscale"] = self.upscale
        for name in ("few_steps", "refine_face"):
            if getattr(self, name):
                options[name] = True
        return options


@dataclass(frozen=True)
class SamplingProgress:
    """The progress of a job. `preview`: uint8 [H, W, 3], now and then."""

    done: int
    total: int
    step: int
    steps: int
    preview: np.ndarray | None = None


@dataclass(frozen=True)
class GeneratedPicture:
    """A finished picture, whose person is `who`; the request and the command line that make it again."""

    path: Path
    who: str
    request: PictureRequest
    command: str

    @property
    def record(self) -> dict[str, Any]:
        """The run record in the PNG."""
        return picture_record(self.path.read_bytes(), self.path.name) or {}


@dataclass(frozen=True)
class Subject:
    """A person to generate: a name, a profile (none: nobody in particular), and the branches that it has."""

    name: str = NOBODY
    profile: Path | None = None
    branches: frozenset[str] = frozenset()


class Job:
    """Work on the models in a thread of its own, which ends within a step after `stop`."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        """End it. Finished pictures stay."""
        self._stop.set()

    def check(self) -> None:
        """Raises Cancelled after `stop`."""
        if self._stop.is_set():
            raise Cancelled

    def events(self, work: Any) -> Iterator[Any]:
        """What `work(emit)` emits, as it comes; then what it raised is raised here."""
        waiting: queue.Queue[tuple[str, Any]] = queue.Queue()

        def run() -> None:
            try:
                work(lambda event: waiting.put(("event", event)))
                waiting.put(("end", None))
            except BaseException as error:  # goes on in the thread that reads
                waiting.put(("error", error))

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                kind, value = waiting.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:  # nobody listens any more, or it is done
            self.stop()


class PictureGenerator:
    """Generates pictures with models that stay loaded, for one client at a time."""

    def __init__(self, family: Family, family_name: str, device: str, models: Models, pictures: Path) -> None:
        """`family_name`: as `--family` takes it."""
        self.family, self.family_name, self.device = family, family_name, device
        self.models, self.pictures = models, pictures
        self.lock = threading.Lock()  # of the models

    def generate(
        self, job: Job, request: PictureRequest, subjects: list[Subject], out: Path | None = None
    ) -> Iterator[SamplingProgress | GeneratedPicture]:
        """Generate the pictures of each subject, one at a time, into pictures/NAME."""
        request.check()
        total = len(subjects) * request.number

        def work(emit: Any) -> None:
            done = 0
            with self.lock:
                for subject in subjects:
                    for number in range(request.number):
                        job.check()
                        seed = picture_seed(request.seed, 0, number)
                        callback = StepCallback(
                            job,
                            self.models,
                            lambda *step: emit(SamplingProgress(done, total, *step)),  # noqa: B023
                        )
                        options = request.options(self.family, set(subject.branches))
                        path = self._one(request.prompt, subject, seed, options, out, callback)
                        done += 1
                        command = self.command(request.prompt, subject, seed, options)
                        emit(GeneratedPicture(path, subject.name, replace(request, number=1, seed=seed), command))

        yield from job.events(work)

    def grid(
        self, job: Job, request: PictureRequest, subjects: list[Subject], grid: list[str], total: int
    ) -> Iterator[SamplingProgress | str]:
        """A contact sheet of the `grid`, as `generate` has it, of so many pictures in `total`; its path comes last."""
        profiles = [subject.profile for subject in subjects if subject.profile is not None]

        def work(emit: Any) -> None:
            done = itertools.count(-1)
            began = [next(done)]  # the first step of a picture counts it

            def report(step: int, steps: int, preview: np.ndarray | None) -> None:
                if step == 1:
                    began[0] = next(done)
                emit(SamplingProgress(began[0], total, step, steps, preview))

            with self.lock:
                job.check()
                paths = generate(
                    [request.prompt], self.pictures / "grids", profile=profiles or None, grid=grid, device=self.device,
                    family=None if profiles else self.family_name, models=self.models,
                    on_step=StepCallback(job, self.models, report),
                )  # fmt: skip
            emit(str(paths[-1]))

        yield from job.events(work)

    def _one(
        self, prompt: str, subject: Subject, seed: int, options: dict[str, Any], out: Path | None, on_step: StepCallback
    ) -> Path:
        folder = (self.pictures if out is None else out) / subject.name
        family = None if subject.profile is not None else self.family_name
        (path,) = generate(
            [prompt], folder, profile=subject.profile, family=family, device=self.device, seed=seed,
            models=self.models, on_step=on_step, **options,
        )  # fmt: skip
        return path

    def command(self, prompt: str, subject: Subject, seed: int, options: dict[str, Any]) -> str:
        """The line that makes a picture again."""
        words = ["bolid", "generate", prompt]
        words += ["--profile", str(subject.profile)] if subject.profile is not None else ["--family", self.family_name]
        for name, value in options.items():
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, f"{value:g}" if isinstance(value, float) else str(value)]
        words += ["--seed", str(seed)]
        if prompt.startswith("-"):
            words = [*words[:2], *words[3:], "--", prompt]
        return shlex.join(words)


class StepCallback:
    """The callback of each step: stops a job, and reports its progress now and then, with a preview.

    A picture's first and last steps are always reported.
    """

    def __init__(self, job: Job, models: Models, report: Any) -> None:
        self.job, self.models, self.report = job, models, report
        self._next, self._preview = 0.0, None  # when the next preview is due, and the last one
        self._reported = 0.0  # when a step was reported last

    def __call__(self, step: int, steps: int, x0: torch.Tensor) -> None:
        """As `bolid.backends.sampling.OnStep`. Raises Cancelled."""
        self.job.check()
        began = time.monotonic()
        if 1 < step < steps and began < self._reported + _PAUSE:
            return
        self._reported = began
        if began >= self._next and step < steps and (pipe := self.models.current) is not None:
            from bolid.backends.diffusion import decode_latents

            self._preview = decode_latents(pipe, x0[:1])[0]
            ended = time.monotonic()
            self._next = ended + (ended - began) * (1 / _PREVIEWS - 1)
        self.report(step, steps, self._preview)
