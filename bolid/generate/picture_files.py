"""Where a request's pictures lie, and the records in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolid.generate.grid import Place, grid_sheet
from bolid.generate.identity import Identity
from bolid.generate.parameters import parameters_text
from bolid.generate.picture_sampler import PictureSampler
from bolid.generate.request import Request, picture_seed
from bolid.generate.saving import find_finished, save_beside
from bolid.run import run_record

KIND = "picture"
GRID_KIND = "grid"
GRID_FILE = "grid.png"


@dataclass(frozen=True)
class PictureFiles:
    """The files of a request's pictures, and the records in them.

    `inputs`: name -> hash, the same in every record; `encoded`: prompt -> what the text encoder reads of it.
    """

    request: Request
    people: Sequence[Identity]
    sampler: PictureSampler
    inputs: Mapping[str, str]
    encoded: Mapping[str, str]

    def finished(self, place: Place) -> Path | None:
        """The picture where this very command has made it before."""
        cell, job = self.request.cells[place[1]], place[2:]
        if not (path := self._path(place)).exists():
            return None
        seeds = [picture_seed(cell.seed, *job, candidate) for candidate in range(self.request.best_of)]
        return find_finished(path, [self._record(place, seed) for seed in seeds])

    def save(self, place: Place, picture: Any, seed: int) -> Path:
        """Write a picture, uint8 [H,W,3]."""
        record, scheduler = self._record(place, seed), self.sampler.networks.pipe.scheduler
        return save_beside(self._path(place), picture, record, parameters_text(record, type(scheduler).__name__))

    def save_grid(self, made: dict[Place, Path]) -> Path:
        """Write the contact sheet of the pictures in `made`."""
        request, people = self.request, self.people
        config = {
            "prompts": request.prompts, "grid": request.grid, "people": [person.name for person in people],
            **request.settings,
        }  # fmt: skip
        everybody = {
            name if len(people) == 1 else f"{name}_{person.folder}": sha
            for person in people
            for name, sha in person.inputs.items()
        }
        inputs = {**everybody, **self.inputs}
        record = run_record(GRID_KIND, family=request.family, config=config, seed=request.seed or 0, inputs=inputs)
        return save_beside(request.out / GRID_FILE, grid_sheet(request, people, made), record)

    def _path(self, place: Place) -> Path:
        who, where, *job = place
        folders = (f"{axis}={value}" for axis, value in self.request.cells[where].values.items())
        return self.request.out.joinpath(self.people[who].folder, *folders, self.request.file_name(*job))

    def _record(self, place: Place, seed: int) -> dict[str, Any]:
        """The run record of a picture."""
        request, person, cell = self.request, self.people[place[0]], self.request.cells[place[1]]
        prompt = request.prompts[place[2]]
        config: dict[str, Any] = {
            "prompt": prompt, "steps": cell.steps, "guidance": cell.guidance.plain(), "person": person.name,
            "scales": {branch: scale.plain() for branch, scale in self.sampler.scales(person, cell).items()},
            **request.settings,
        }  # fmt: skip
        for part, weight in cell.person_guidance.items():
            if not weight.is_zero:
                config[f"{part}_guidance"] = weight.plain()
        for name, text in (("prompt", prompt), ("negative", request.negative)):
            if self.encoded[text] != text:
                config[f"encoded_{name}"] = self.encoded[text]
        inputs = {**person.inputs, **self.inputs}
        return run_record(KIND, family=request.family, config=config, seed=seed, inputs=inputs)
