"""A run of `bolid generate`: people and networks, checked to belong together, and the loop over the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.generate.adapters import (
    LoadedAdapter,
    check_belongs,
    choose_branches,
    load_adapters,
    unused_branches,
)
from bolid.generate.grid import Place, grid_sheet
from bolid.generate.identity import Identity, check_comparable, find_people
from bolid.generate.models import Models
from bolid.generate.parameters import parameters_text
from bolid.generate.prompts import split_at_limit, unsupported_syntax
from bolid.generate.request import Cell, Request, picture_seed
from bolid.generate.saving import find_finished, save_beside
from bolid.person import PersonReader
from bolid.run import Progress, canonical_json, run_record, sha256_file
from bolid.scales import Scale, parse_scale

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.loss_guidance import GuidanceLoss
    from bolid.backends.sampling import Control, OnStep
    from bolid.backends.upscale import Upscaler
    from bolid.generate.guidance import MakeLoss
    from bolid.generate.refine import FaceRefiner

KIND = "picture"
GRID_KIND = "grid"
GRID_FILE = "grid.png"


class Generation:
    """The people and models of a request, loaded and checked to belong together; `run` makes its pictures."""

    def __init__(
        self,
        request: Request,
        models: Models | None = None,
        progress: Progress | None = None,
        warn: Callable[[str], None] = lambda text: None,
        on_step: OnStep | None = None,
    ) -> None:
        self.request, self.family, self.progress = request, request.family, progress
        self.models, self.on_step = models or Models(), on_step
        reader = functools.partial(self.models.reader, request.family, request.device, request.force)
        self.people = find_people(request, reader, progress)
        for person in self.people:
            if request.profiles and not person.vectors:
                warn(f"{person.name} is of another family: of it only the 3D body is used, and no face")
        self.branches = choose_branches(request, self.people)
        for warning in unused_branches(request, self.people, self.branches):
            warn(warning)
        self.ranker = _ranker(request, self.people, reader) if request.best_of > 1 else None
        self.inputs = {f"lora_{i}": sha256_file(path) for i, (path, _) in enumerate(request.loras)}
        if request.base is not None and Path(request.base).is_file():
            self.inputs["base"] = sha256_file(request.base)
        self.guidance = self._guidance(reader)
        self.maps = self._maps()
        self.pipe, adapters = self.models.pipe(self._networks(), self._load_pipe)
        self._check_steps(self.pipe)
        for branch, adapter in adapters.items():
            self._check_people(branch, adapter)
            self.inputs[f"{branch}_adapter"] = adapter.sha256
        if request.few_steps:
            self.inputs["few_steps_lora"] = sha256_file(self.family.require("few_steps_lora"))
        self.control_network = self._control_network()
        self.upscaler, self.refiner = self._upscaler(), self._refiner()
        self.encoded: dict[str, str] = {}

    def _guidance(self, reader: Callable[[], PersonReader]) -> dict[str, MakeLoss]:
        """Of "face" and "body", those that some cell has guidance for."""
        from bolid.generate.guidance import guidance_for

        makers = {}
        for part in self.request.guided_parts:
            makers[part], used = guidance_for(part, self.family, self.people, reader, self.request.device)
            self.inputs |= used
        return makers

    def _maps(self) -> list[np.ndarray] | None:
        """What a ControlNet follows, uint8 [H,W,3], of each person: the 3D body's depth, or the pose of a photo."""
        request, family = self.request, self.family
        if not request.uses_shape and request.pose_from is None:
            return None
        family.require(self._control_part)
        if request.pose_from is not None:
            self.inputs["pose_from"] = sha256_file(request.pose_from)
            if not request.uses_shape:
                from bolid.generate import pose_map

                return [pose_map.read_pose(request.pose_from, family, request.device)] * len(self.people)
        from bolid.generate.shape_map import POSE, depth_picture
        from bolid.views import person_in_photo

        points, size = None, family.image_size
        if request.pose_from is not None:
            points = person_in_photo(request.pose_from, family, request.device)[1].keypoints
        return [depth_picture(person.shape(), request.pose or POSE, size, points) for person in self.people]

    @property
    def _control_part(self) -> str:
        return "depth_controlnet" if self.request.uses_shape else "controlnet"

    def _networks(self) -> Hashable:
        """What a pipeline is known by: the files in it, as they are now, and how they are loaded."""
        request, family = self.request, self.family
        files = [family.base, family.unet, *(path for path, _ in request.loras)]
        files += [request.adapter_files[branch] for branch in self.branches]
        states = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.exists())
        weights = tuple(weight for _, weight in request.loras)
        how = (request.device, request.dtype, request.offload, request.few_steps, canonical_json(request.sampler))
        return (family.name, str(family.root), states, weights, tuple(self.branches), *how)

    def _load_pipe(self) -> tuple[Any, dict[str, LoadedAdapter]]:
        """The base with its LoRAs and adapters, ready to sample; and the adapters."""
        from bolid.backends.attention import cache_conditions
        from bolid.backends.diffusion import choose_dtype, load_base, load_loras
        from bolid.backends.diffusion import offload as offload_networks

        request, loras = self.request, list(self.request.loras)
        if request.few_steps:
            loras.insert(0, (self.family.require("few_steps_lora"), 1.0))
        dtype = choose_dtype(request.dtype, request.device)
        pipe = load_base(self.family, "cpu" if request.offload else request.device, dtype, request.sampler)
        load_loras(pipe, loras, self.family)
        adapters = load_adapters(pipe, request, self.branches) if self.branches else {}
        cache_conditions(pipe.unet)
        if request.offload:
            offload_networks(pipe, request.device)
        return pipe, adapters

    def _check_steps(self, pipe: Any) -> None:
        for steps in {cell.steps for cell in self.request.cells}:
            try:
                pipe.scheduler.set_timesteps(steps)
            except ValueError as error:
                raise BolidError(f"--steps {steps} does not suit the sampler: {error}", "give fewer") from error

    def _check_people(self, branch: str, adapter: LoadedAdapter) -> None:
        for person in self.people:
            if branch in person.vectors:
                check_belongs(person, branch, adapter)

    def _control_network(self) -> Any:
        """The ControlNet, if there is something to follow."""
        if self.maps is None:
            return None
        from bolid.backends.attention import cache_conditions
        from bolid.backends.diffusion import load_controlnet

        def load() -> Any:
            network = load_controlnet(self.pipe, self.family, self._control_part)
            cache_conditions(network)
            return network

        return self.models.controlnet(self._networks(), self._control_part, load)

    def _controls(self, person: Identity) -> list[Control]:
        """The ControlNet with the person's map."""
        if self.maps is None:
            return []
        from PIL import Image

        from bolid.backends.sampling import Control

        number = next(i for i, other in enumerate(self.people) if other is person)
        picture = Image.fromarray(self.maps[number])
        weight = self.request.shape_weight if self.request.uses_shape else self.request.pose_weight
        return [Control(self.control_network, picture, weight)]

    def _upscaler(self) -> Upscaler | None:
        """What enlarges the pictures for --upscale."""
        if self.request.upscale == 1:
            return None
        from bolid.backends.upscale import Upscaler

        path, device = self.family.require("upscaler"), self.request.device
        self.inputs["upscaler"] = sha = sha256_file(path)
        return self.models.keep(("upscaler", sha, device), lambda: Upscaler(path, device))

    def _refiner(self) -> FaceRefiner | None:
        """What looks at faces again for --refine-face."""
        if not self.request.refine_face:
            return None
        from bolid.backends.people import face_detector, pose_detector
        from bolid.generate.refine import FaceRefiner

        family, device = self.family, self.request.device

        def load() -> FaceRefiner:
            faces, pose = face_detector(family.require("face"), device), pose_detector(family.require("pose"), device)
            return FaceRefiner(faces, pose, family.image_size)

        refiner = self.models.keep(("refiner", family.name, family.root, device), load)
        self.inputs["refine_face"] = refiner.faces.sha256
        return refiner

    def read_prompts(self, warn: Callable[[str], None]) -> None:
        """Find what the text encoder reads of each prompt: with the family's clothes where it names none, and cut."""
        texts = {self.request.negative: self.request.negative}
        texts |= {prompt: self.family.dressed(prompt) for prompt in self.request.prompts}
        for prompt, text in texts.items():
            self.encoded[prompt], lost = split_at_limit(self.pipe, text)
            for warning in unsupported_syntax(prompt):
                warn(warning)
            if lost:
                warn(f"the text encoder reads no more than {self.encoded[prompt]!r}; it does not read {lost!r}")

    def run(self, sample: Callable[[list[list[Place]]], Iterator[Any]], made: Callable[[Path], None]) -> list[Path]:
        """Each person in each cell, in batches; the paths in that order, and the grid's contact sheet last.

        `sample` gives what `sample_batch` does for each of several batches, by one process or several. `made` is called
        with each path as soon as its batch is there.

        A batch of which a part is done is sampled again as a whole, since rounding depends on what is in it; what is
        done stays as it is.
        """
        paths: dict[Place, Path] = {}
        done = {place: path for batch in self.batches for place in batch if (path := self._finished(place))}
        left = [batch for batch in self.batches if not all(place in done for place in batch)]
        results, total = sample(left), sum(map(len, self.batches))
        for batch in self.batches:
            finished = all(place in done for place in batch)
            for place, sampled in zip(batch, [None] * len(batch) if finished else next(results), strict=True):
                paths[place] = done.get(place) or self._save(place, *sampled)
                made(paths[place])
            if self.progress is not None:
                self.progress(len(paths), total, "pictures")
        next(results, None)  # there is none: the processes are let go
        return list(paths.values()) + ([self._save_grid(paths)] if self.request.grid else [])

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
        person, cell, jobs = self.people[who], self.request.cells[where], [place[2:] for place in batch]
        return self._enlarged(person, cell, jobs, self._best(person, cell, jobs))

    def _path(self, place: Place) -> Path:
        who, where, *job = place
        folders = (f"{axis}={value}" for axis, value in self.request.cells[where].values.items())
        return self.request.out.joinpath(self.people[who].folder, *folders, self.request.file_name(*job))

    def _finished(self, place: Place) -> Path | None:
        """The picture where this very command has made it before."""
        cell, job = self.request.cells[place[1]], place[2:]
        if not (path := self._path(place)).exists():
            return None
        seeds = [picture_seed(cell.seed, *job, candidate) for candidate in range(self.request.best_of)]
        return find_finished(path, [self._record(place, seed) for seed in seeds])

    def _save(self, place: Place, picture: np.ndarray, seed: int) -> Path:
        record = self._record(place, seed)
        return save_beside(
            self._path(place), picture, record, parameters_text(record, type(self.pipe.scheduler).__name__)
        )

    def _best(self, person: Identity, cell: Cell, jobs: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, int]]:
        """(the picture, its seed) of each job: of `best_of` candidates the nearest to the person."""
        scales = self._scales(person, cell)
        face = None  # what candidates are compared by beside the body
        if self.ranker and scales.get("face") and person.face_model == self.ranker.view_reader.faces.sha256:
            face = person.vectors["face"]
        best: list[tuple[float, np.ndarray, int]] = []
        for candidate in range(self.request.best_of):
            seeds = [picture_seed(cell.seed, *job, candidate) for job in jobs]
            pictures = self._sample(person, cell, jobs, seeds)
            distances = [0.0] * len(jobs)
            if self.ranker is not None:
                distances = self.ranker.distances(pictures, person.vectors["body"], face)
            found = list(zip(distances, pictures, seeds, strict=True))
            best = [min(pair, key=lambda each: each[0]) for pair in zip(best or found, found, strict=True)]
        return [(picture, seed) for _, picture, seed in best]

    def _enlarged(
        self, person: Identity, cell: Cell, jobs: Sequence[tuple[int, int]], found: list[tuple[np.ndarray, int]]
    ) -> list[tuple[np.ndarray, int]]:
        """The pictures enlarged, with their faces looked at again."""
        pictures, seeds = [picture for picture, _ in found], [seed for _, seed in found]
        if self.upscaler is not None:
            pictures = self.upscaler(pictures, self.request.upscale)
        if self.refiner is not None:
            prompts = [self._text(index) for index, _ in jobs]
            pictures = self.refiner(pictures, prompts, seeds, functools.partial(self._resample, person, cell))
        return list(zip(pictures, seeds, strict=True))

    def _text(self, index: int) -> str:
        """Prompt number `index` as it is encoded."""
        return self.family.dressed(self.request.prompts[index])

    def _sample(
        self, person: Identity, cell: Cell, jobs: Sequence[tuple[int, int]], seeds: Sequence[int]
    ) -> list[np.ndarray]:
        """One picture a job, uint8 [H,W,3]."""
        scales = self._scales(person, cell)
        return self._pictures(
            person, cell, [self._text(index) for index, _ in jobs], seeds,
            scales=[scales.get(branch, Scale(0, 0, 0)) for branch in self.branches],
            controls=self._controls(person), losses=self._losses(person, cell),
        )  # fmt: skip

    def _resample(
        self,
        person: Identity,
        cell: Cell,
        crops: list[np.ndarray],
        prompts: list[str],
        seeds: list[int],
        strength: float,
    ) -> list[np.ndarray]:
        """Portraits of `person`, sampled again from `crops`; there is no body in them."""
        from bolid.backends.diffusion import encode_latents
        from bolid.backends.sampling import Start

        scales = self._scales(person, cell)
        none = Scale(0, 0, 0)
        return self._pictures(
            person, cell, prompts, seeds, latents=Start(encode_latents(self.pipe, crops)[:, 0], strength),
            scales=[scales.get(branch, none) if branch == "face" else none for branch in self.branches],
        )  # fmt: skip

    def _pictures(
        self, person: Identity, cell: Cell, prompts: Sequence[str], seeds: Sequence[int], **options: Any
    ) -> list[np.ndarray]:
        """Pictures, uint8 [H,W,3], of `person` by `sample` with these `options`."""
        import torch

        from bolid.backends.diffusion import decode_latents
        from bolid.backends.sampling import sample

        pipe = self.pipe
        latents = sample(
            pipe, prompts, size=self.family.image_size, steps=cell.timesteps or cell.steps, guidance=cell.guidance,
            negative=self.request.negative,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same on every device
            vectors=[self._vector(person, branch) for branch in self.branches], on_step=self.on_step, **options,
        )  # fmt: skip
        finite = latents.isfinite().flatten(1).all(1).tolist()
        pictures = decode_latents(pipe, latents)
        pipe.maybe_free_model_hooks()  # with --offload: the last network leaves the accelerator too
        for prompt, picture, fine in zip(prompts, pictures, finite, strict=True):
            if not fine or picture.std() == 0:
                raise BolidError(
                    f"sampling {prompt!r} of {person.name} gave no picture: "
                    + ("its pixels are all the same" if fine else "its numbers are not finite"),
                    "check the base (bolid models verify), --lora and --adapter; in half precision try --dtype fp32",
                )
        return pictures

    def _scales(self, person: Identity, cell: Cell) -> dict[str, Scale]:
        """Branch -> lambda, of those that the person has and that are not at 0."""
        default = {branch: self.request.sampler.get(f"{branch}_scale", 1.0) for branch in self.branches}
        scales = {b: cell.scales.get(b, parse_scale(default[b], f"{b}_scale")) for b in self.branches}
        return {b: scale for b, scale in scales.items() if b in person.vectors and not scale.is_zero}

    def _vector(self, person: Identity, branch: str) -> torch.Tensor:
        """The person's, or zeros: a branch is loaded because some person has a vector for it."""
        import torch

        known = next(other.vectors[branch] for other in self.people if branch in other.vectors)
        return person.vectors.get(branch, torch.zeros_like(known))

    def _losses(self, person: Identity, cell: Cell) -> list[GuidanceLoss]:
        """Of the person's face and body, with the cell's weights."""
        weights = {part: weight for part, weight in cell.person_guidance.items() if not weight.is_zero}
        return [
            self.guidance[part](person.vectors[part].to(self.request.device), weight)
            for part, weight in weights.items()
        ]

    def _record(self, place: Place, seed: int) -> dict[str, Any]:
        """The run record of a picture."""
        person, cell, prompt = self.people[place[0]], self.request.cells[place[1]], self.request.prompts[place[2]]
        config: dict[str, Any] = {
            "prompt": prompt, "steps": cell.steps, "guidance": cell.guidance.plain(), "person": person.name,
            "scales": {branch: scale.plain() for branch, scale in self._scales(person, cell).items()},
            **self.request.settings,
        }  # fmt: skip
        for part, weight in cell.person_guidance.items():
            if not weight.is_zero:
                config[f"{part}_guidance"] = weight.plain()
        for name, text in (("prompt", prompt), ("negative", self.request.negative)):
            if self.encoded[text] != text:
                config[f"encoded_{name}"] = self.encoded[text]
        return run_record(KIND, family=self.family, config=config, seed=seed, inputs={**person.inputs, **self.inputs})

    def _save_grid(self, made: dict[Place, Path]) -> Path:
        request, people = self.request, self.people
        sheet = grid_sheet(request, people, made)
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
        record = run_record(GRID_KIND, family=self.family, config=config, seed=request.seed or 0, inputs=inputs)
        return save_beside(request.out / GRID_FILE, sheet, record)


def _ranker(request: Request, people: Sequence[Identity], reader: Callable[[], PersonReader]) -> PersonReader:
    """What measures the distance of a picture to a person, for --best-of. BolidError where somebody has no body of the
    family's encoder."""
    if not all("body" in person.vectors for person in people):  # before any model is loaded
        raise BolidError(
            "--best-of compares bodies, but nobody is to be shown",
            "add --profile, --reference or --new-person, or leave it out",
        )
    check_comparable("--best-of", people, "body encoder", reader().encoder.space, request.family)
    return reader()
