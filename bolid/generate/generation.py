"""A run of `bolid generate`: people and networks, checked to belong together, and the loop over the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.generate.adapters import check_belongs, choose_branches, unused_branches
from bolid.generate.control_maps import maps_of_people
from bolid.generate.finishing import Finishing
from bolid.generate.grid import Place
from bolid.generate.identity import Identity, check_comparable, find_people
from bolid.generate.models import Models
from bolid.generate.networks import Networks
from bolid.generate.picture_files import PictureFiles
from bolid.generate.picture_sampler import PictureSampler
from bolid.generate.prompts import encoded_prompts
from bolid.generate.request import Request
from bolid.person import PersonReader
from bolid.run import Progress, sha256_file

if TYPE_CHECKING:
    import numpy as np

    from bolid.backends.sampling import OnStep
    from bolid.generate.guidance import MakeLoss


class Generation:
    """The people and models of a request, loaded and checked to belong together; `run` makes its pictures.

    `inputs`: name -> hash of every file that is the same for all people.
    """

    def __init__(
        self,
        request: Request,
        models: Models | None = None,
        progress: Progress | None = None,
        warn: Callable[[str], None] = lambda text: None,
        on_step: OnStep | None = None,
    ) -> None:
        self.request, self.progress, self.warn, models = request, progress, warn, models or Models()
        reader = functools.partial(models.reader, request.family, request.device, request.force)
        self.people = find_people(request, reader, progress)
        for person in self.people:
            if request.profiles and not person.vectors:
                warn(f"{person.name} is of another family: of it only the 3D body is used, and no face")
        branches = choose_branches(request, self.people)
        for warning in unused_branches(request, self.people, branches):
            warn(warning)
        ranker = _ranker(request, self.people, reader) if request.best_of > 1 else None
        guidance, self.inputs = _guidance(request, self.people, reader)
        maps = maps_of_people(request, self.people)
        if request.pose_from is not None:
            self.inputs["pose_from"] = sha256_file(request.pose_from)
        networks = Networks(request, branches, models)
        for branch, adapter in networks.adapters.items():
            for person in self.people:
                if branch in person.vectors:
                    check_belongs(person, branch, adapter)
        finishing = Finishing(request, models)
        self.inputs |= networks.inputs | finishing.inputs
        self.sampler = PictureSampler(request, self.people, networks, finishing, ranker, guidance, maps, on_step)

    @functools.cached_property
    def batches(self) -> list[list[Place]]:
        """The pictures that are sampled together, of one person and cell each."""
        jobs, size = self.request.jobs, self.request.batch_size
        return [
            [(who, where, *job) for job in jobs[start : start + size]]
            for who in range(len(self.people))
            for where in range(len(self.request.cells))
            for start in range(0, len(jobs), size)
        ]

    def sample_batch(self, batch: Sequence[Place]) -> list[tuple[np.ndarray, int]]:
        """(the picture, its seed) of each place of a batch."""
        who, where = batch[0][:2]
        return self.sampler(who, self.request.cells[where], [place[2:] for place in batch])

    def run(self, sample: Callable[[list[list[Place]]], Iterator[Any]], made: Callable[[Path], None]) -> list[Path]:
        """Each person in each cell, in batches; the paths in that order, and the grid's contact sheet last.

        `sample` gives what `sample_batch` does for each of several batches, by one process or several. `made` is called
        with each path as soon as its batch is there.

        A batch of which a part is done is sampled again as a whole, since rounding depends on what is in it; what is
        done stays as it is.
        """
        encoded = encoded_prompts(self.sampler.networks.pipe, self.request, self.warn)
        files = PictureFiles(self.request, self.people, self.sampler, self.inputs, encoded)
        paths: dict[Place, Path] = {}
        done = {place: path for batch in self.batches for place in batch if (path := files.finished(place))}
        left = [batch for batch in self.batches if not all(place in done for place in batch)]
        results, total = sample(left), sum(map(len, self.batches))
        for batch in self.batches:
            finished = all(place in done for place in batch)
            for place, sampled in zip(batch, [None] * len(batch) if finished else next(results), strict=True):
                paths[place] = done.get(place) or files.save(place, *sampled)
                made(paths[place])
            if self.progress is not None:
                self.progress(len(paths), total, "pictures")
        next(results, None)  # there is none: the processes are let go
        return list(paths.values()) + ([files.save_grid(paths)] if self.request.grid else [])


def _guidance(
    request: Request, people: Sequence[Identity], reader: Callable[[], PersonReader]
) -> tuple[dict[str, MakeLoss], dict[str, str]]:
    """(of "face" and "body" those that some cell has guidance for, the hashes of their models)."""
    from bolid.generate.guidance import guidance_for

    makers, inputs = {}, dict[str, str]()
    for part in request.guided_parts:
        makers[part], used = guidance_for(part, request.family, people, reader, request.device)
        inputs |= used
    return makers, inputs


def _ranker(request: Request, people: Sequence[Identity], reader: Callable[[], PersonReader]) -> PersonReader:
    """What measures the distance of a picture to a person, for --best-of. BolidError where somebody has no body of the
    family's encoder."""
    if not all("body" in person.vectors for person in people):  # before any model is loaded
        raise BolidError(
            "--best-of compares bodies, but nobody is to be shown",
            "add --profile, --photo or --new-person, or leave it out",
        )
    check_comparable("--best-of", people, "body encoder", reader().encoder.space, request.family)
    return reader()
