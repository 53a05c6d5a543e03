"""The work of the page: people from photos, their bodies, pictures and reports, in one work folder.

Everything that is read and written lies in that folder. The models are loaded once; one client uses them at a time.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.formats.profile import load_profile
from bolid.generate.models import Models
from bolid.models.families import Family, get_family
from bolid.profile import ProfileResult, edit_profile, make_profile
from bolid.run import pick_device, sha256_file, write_atomic
from bolid.ui import body_sliders
from bolid.ui.people import People, check_name
from bolid.ui.photos import delete_folder, draw_detections, faded_photo, own_folder, uploaded
from bolid.ui.pictures import GeneratedPicture, Job, PictureGenerator, PictureRequest, SamplingProgress, Subject
from bolid.views import View

if TYPE_CHECKING:
    from PIL import Image

    from bolid.body.profiles import MeasurementRow
    from bolid.body.shape import Shape
    from bolid.person import PhotoReport

SYNTHETIC = range(200_000, 300_000)
"""Seeds of synthetic people that no model was trained on."""
MAX_CELLS = 48  # pictures of a grid
_SHOWN = 200  # files for clients that are kept
_STOPPED = 1000  # names of jobs that were stopped, which are kept
_PHOTOS = 8  # of a synthetic person
_INVENTED = ("height", "inseam", "shoulders", "chest", "waist", "hip")  # measurements that make a body


@dataclass(frozen=True)
class PhotoDetection:
    """A photo with what the models detected in it: box, skeleton and face."""

    picture: Image.Image
    name: str
    report: PhotoReport
    reason: str  # why it was left out, or ""


@dataclass(frozen=True)
class NewPerson:
    """A new person: the name, the detections in each photo, and the profile."""

    name: str
    detections: tuple[PhotoDetection, ...]
    result: ProfileResult


class Workspace:
    """The work folder with its people and pictures, and the models."""

    def __init__(self, folder: str | os.PathLike[str], family: str | None = None, device: str = "auto") -> None:
        self.folder = Path(folder)
        self.uploads, self._lock = own_folder(self.folder / "uploads")
        self.people = People(self.folder)
        self.poses = self.folder / "poses"
        self.family: Family = get_family(family)
        # Of a large base there is room for one.
        models = Models(most=3 if self.family.name == "tiny" else 1)
        self.generator = PictureGenerator(
            self.family, family or self.family.name, pick_device(device), models, self.people.pictures
        )
        self.jobs: dict[str, _RunningJob] = {}
        self._stopped: dict[str, float] = {}  # name -> jobs of it end that were requested until then
        self._count, self._counting = itertools.count(), threading.Lock()

    # ---- people

    def create_profile(
        self, name: str, photos: Sequence[str | Path], known: Mapping[str, str] | None = None, sex: str | None = None
    ) -> NewPerson:
        """A new profile from uploaded photos, measurements as people type them, or both."""
        from bolid.body.profiles import read_known

        name, files = check_name(name), uploaded(photos, self.uploads)
        wanted = read_known({key: str(text) for key, text in (known or {}).items() if str(text or "").strip()})
        views: dict[Path, View | str] = {}
        with self.generator.lock:
            reader = self.generator.models.reader(self.family, self.generator.device)
            reader.on_view = views.__setitem__
            try:
                result = make_profile(files, self._profile(), known=wanted, sex=sex or None, reader=reader)
            except BolidError as error:
                raise BolidError(_without_folders(error.message, files), error.hint) from error
            finally:
                reader.on_view = None
        return NewPerson(self.people.add(name, result.path).stem, self._detections(result, views), result)

    def _profile(self) -> Path:
        """Where a profile is written before it has a name."""
        return self.scratch("profile.safetensors")

    def _detections(self, result: ProfileResult, views: Mapping[Path, View | str]) -> tuple[PhotoDetection, ...]:
        detections = []
        for report in result.reports:
            view = views.get(report.photo)
            picture = draw_detections(view) if isinstance(view, View) else faded_photo(report.photo)
            reason = _without_folders(report.rejected, [report.photo])
            detections.append(PhotoDetection(picture, report.photo.name, report, reason))
        return tuple(detections)

    def create_synthetic(self, name: str, seed: int) -> NewPerson:
        """A profile of a synthetic person, from photos that are rendered first."""
        from bolid.synth.render import write_photos

        if seed not in SYNTHETIC:
            raise BolidError(f"the seed is {seed}", f"give one from {SYNTHETIC.start} to {SYNTHETIC.stop - 1}")
        check_name(name)  # before the work
        photos = write_photos(self.uploads / "synthetic", seed, _PHOTOS, size=self._photo_size)
        person = self.create_profile(name, photos)
        write_atomic(self.people.seed_file(person.name), str(seed))
        return person

    def create_invented(self, name: str, seed: int) -> NewPerson:
        """A profile of somebody with the measurements of a random adult, and no face."""
        from bolid.body.measurements import NAMES
        from bolid.body.shape import draw, measure_body, population

        usual, far = population().mean, draw(population().shape, 1, seed)
        sizes = measure_body(usual + 0.7 * (far - usual))[0]  # extremes are rare
        known = {n: f"{100 * sizes[NAMES.index(n)]:.1f}" for n in _INVENTED}
        return self.create_profile(name, [], known)

    def open_profile(self, file: Path) -> str:
        """Take in an uploaded profile; the name that it got."""
        (file,) = uploaded([file], self.uploads)
        try:
            load_profile(file)
        except BolidError as error:
            raise BolidError(_without_folders(error.message, [file]), error.hint) from error
        name = re.sub(r"[^\w .-]", " ", file.stem)[:40].strip(" .-") or "Somebody"
        copy = self._profile()  # the upload stays the client's
        shutil.copyfile(file, copy)
        return self.people.add(name, copy).stem

    def delete(self, name: str) -> int:
        """Delete a person and the pictures of this person; how many pictures."""
        return self.people.delete(name, self.uploads.parent)

    def subjects(self, names: Sequence[str]) -> list[Subject]:
        """The people of these names; without any, nobody in particular."""
        if not names:
            return [Subject()]
        found = []
        for name in dict.fromkeys(names):
            path = self.people.path(name)
            branches = {"body"} if load_profile(path).face is None else {"body", "face"}
            found.append(Subject(name, path, frozenset(branches)))
        return found

    # ---- bodies

    def shape(
        self, name: str, wanted: Mapping[str, float], hold: bool = True
    ) -> tuple[Shape, Sequence[MeasurementRow]]:
        """A person's body with these measurements, and all that it measures then."""
        return body_sliders.edited_shape(self.people.path(name), wanted, hold)

    def mannequin(self, shape: Shape) -> Path:
        """A GLB file of a shape."""
        return body_sliders.write_mannequin(shape, self.scratch("mannequin.glb"))

    def edit(self, name: str, wanted: Mapping[str, float], hold: bool, new_name: str) -> str:
        """Save the person with these measurements under a new name; the name that it got."""
        if not wanted:
            raise BolidError("no measurement is changed", "move a slider first")
        check_name(new_name)
        changes = {key: f"{value:.2f}{'kg' if key == 'weight' else 'cm'}" for key, value in wanted.items()}
        edited = self._profile()
        edit_profile(self.people.path(name), edited, changes=changes, hold=hold)
        return self.people.add(new_name, edited).stem

    # ---- pictures

    def pictures(
        self, job_name: str, request: PictureRequest, names: Sequence[str], requested_at: float = 0.0
    ) -> Iterator[SamplingProgress | GeneratedPicture]:
        """The pictures of a request, as they come. Raises Cancelled after `stop(job_name)`; `requested_at`: see it."""
        with self.job(job_name, requested_at) as job:
            yield from self.generator.generate(job, request, self.subjects(names))

    def keep_pose(self, photo: Path) -> Path:
        """An uploaded photo of a pose, kept so that the command of a picture finds it."""
        (photo,) = uploaded([photo], self.uploads)
        kept = self.poses / f"{sha256_file(photo)[:16]}{photo.suffix.lower()}"
        if not kept.exists():
            write_atomic(kept, photo.read_bytes())
        return kept

    def grid(
        self, job_name: str, prompt: str, names: Sequence[str], axes: Mapping[str, str], requested_at: float = 0.0
    ) -> Iterator[SamplingProgress | str]:
        """A contact sheet over values of settings, like {"body-scale": "0, 1"}; its path comes last."""
        request = PictureRequest(prompt.strip())
        request.check()
        values = {axis: [text.strip() for text in texts.split(",") if text.strip()] for axis, texts in axes.items()}
        total = max(1, len(names)) * math.prod(map(len, values.values()))
        if total > MAX_CELLS:
            raise BolidError(f"the grid has {total} pictures", f"give fewer values: {MAX_CELLS} pictures at most")
        grid = [f"{axis}={','.join(texts)}" for axis, texts in values.items()]
        with self.job(job_name, requested_at) as job:
            yield from self.generator.grid(job, request, self.subjects(names), grid, total)

    def report(self, name: str, photos: Sequence[str | Path]) -> str:
        """How near a person's pictures come, by photos that did not make the profile: the report of `evaluate`."""
        from bolid.evaluate import evaluate
        from bolid.synth.render import write_photos

        profile, seed = self.people.path(name), self.people.seed_file(name)
        pictures = self.people.pictures / profile.stem
        if not any(pictures.glob("*.png")):
            raise BolidError(f"there is no picture of {name} yet", "make some in the tab Picture")
        folder = self.scratch("reference")
        files = uploaded(photos, self.uploads)
        if not files and seed.is_file():
            files = write_photos(
                folder.parent / "rendered", int(seed.read_text()), 4, size=self._photo_size, start=_PHOTOS
            )
        if not files:
            raise BolidError("no photo to compare with", "give photos of this person that did not make the profile")
        folder.mkdir()
        for number, file in enumerate(files):
            shutil.copyfile(file, folder / f"{number:03d}{file.suffix.lower()}")
        page = folder.parent / "report.html"
        with self.generator.lock:
            evaluate(
                pictures,
                folder,
                profiles=[profile],
                html=page,
                family=self.generator.family_name,
                device=self.generator.device,
            )
        return page.read_text(encoding="utf-8")

    @property
    def _photo_size(self) -> tuple[int, int]:
        """(height, width) of rendered photos."""
        height, width = self.family.view_size
        return (2 * height, 2 * width) if height <= 256 else (512, 384)

    def job(self, name: str, requested_at: float = 0.0) -> _RunningJob:
        """`with workspace.job(name) as job`: so that `stop(name)` finds it."""
        return _RunningJob(self, name, requested_at)

    def stop(self, name: str, until: float = math.inf) -> bool:
        """End the job of this name within a step, and those that have not begun as soon as they do.

        `until`: only jobs with a `requested_at` up to then, by the client's clock. Returns whether one was running.
        """
        with self._counting:
            self._stopped[name] = until
            while len(self._stopped) > _STOPPED:
                del self._stopped[next(iter(self._stopped))]  # the oldest
            running = self.jobs.get(name)
        if running is None or running.requested_at > until:
            return False
        running.job.stop()
        return True

    def scratch(self, name: str) -> Path:
        """A new file for a client, which is gone when the page ends or many others were made."""
        with self._counting:
            number = next(self._count)
        shown = self.uploads / "shown"
        shutil.rmtree(shown / str(number - _SHOWN), ignore_errors=True)
        (shown / str(number)).mkdir(parents=True)
        return shown / str(number) / name

    def close(self) -> None:
        """Delete the uploads."""
        delete_folder(self.uploads, self._lock)

    def warm_up(self) -> None:
        """Load the models, so that the first picture does not wait for them."""
        names = self.people.names()
        with self.generator.lock:
            self.generator.models.reader(self.family, self.generator.device)
        job, request = Job(), PictureRequest("a photo of a person", steps=1, guidance=1.0)
        for _ in self.generator.generate(job, request, self.subjects(names[:1]), self.uploads / "warm"):
            pass


class _RunningJob:
    """A job that can be found by its name while it lasts."""

    def __init__(self, workspace: Workspace, name: str, requested_at: float) -> None:
        self.workspace, self.name, self.requested_at, self.job = workspace, name, requested_at, Job()

    def __enter__(self) -> Job:
        with self.workspace._counting:
            self.workspace.jobs[self.name] = self
            if self.requested_at <= self.workspace._stopped.get(self.name, -math.inf):
                self.job.stop()
        return self.job

    def __exit__(self, *_: object) -> None:
        with self.workspace._counting:
            self.workspace.jobs.pop(self.name, None)
            if self.workspace._stopped.get(self.name) == math.inf:  # no other job will have this name
                del self.workspace._stopped[self.name]


def _without_folders(text: str, files: Sequence[Path]) -> str:
    """A message that names uploaded files by their names alone."""
    for file in files:
        text = text.replace(str(file), file.name)
    return text
