"""`bolid generate`: prompts in, pictures of people out (BoLID section 5.3).

Who a person is comes from a profile, from one photo, or from the prior (an invented person); with none of them it is
the null body, and the pictures are those of the plain base, bit for bit: no adapter is loaded then.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid import workers as sharing
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
from bolid.generate.like import request_like
from bolid.generate.models import Models
from bolid.generate.parameters import parameters_text
from bolid.generate.prompts import split_at_limit, unsupported_syntax
from bolid.generate.request import Cell, PathLike, Request, picture_seed
from bolid.generate.saving import find_finished, save_beside
from bolid.person import PersonReader
from bolid.run import Progress, canonical_json, run_record, sha256_file
from bolid.scales import Scale, parse_scale
from bolid.workers import EngineName

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


def generate(
    prompts: Sequence[str] | None = None,
    out: PathLike = "generated",
    *,
    like: PathLike | None = None,
    profile: PathLike | Sequence[PathLike] | None = None,
    reference: PathLike | None = None,
    new_person: int | None = None,
    adapter: PathLike | None = None,
    face_scale: float | str | None = None,
    body_scale: float | str | None = None,
    lora: Sequence[str] | None = None,
    pose_from: PathLike | None = None,
    pose_scale: float | str = 1.0,
    body_from: str | None = None,
    pose: str | None = None,
    shape_scale: float | str = 1.0,
    few_steps: bool = False,
    steps: int | None = None,
    guidance: float | str | None = None,
    face_guidance: float | str = 0.0,
    body_guidance: float | str = 0.0,
    negative: str = "",
    n: int = 1,
    best_of: int = 1,
    batch_size: int = 8,
    grid: Sequence[str] | None = None,
    format: str = "png",
    family: str | None = None,
    base: PathLike | None = None,
    size: str | None = None,
    upscale: int = 1,
    refine_face: bool = False,
    dtype: str = "auto",
    offload: bool = False,
    device: str = "auto",
    seed: int | None = None,
    force: bool = False,
    workers: int = 1,
    engine: EngineName = "local",
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    made: Callable[[Path], None] | None = None,
    models: Models | None = None,
    on_step: OnStep | None = None,
) -> list[Path]:
    """Write `n` pictures of each prompt to `out` and return their paths.

    `like`: a picture of `generate` whose settings are used where none are given here: prompt, person, sampling, and the
    seed. Without a `seed` that picture is made again, with one it is varied.
    Person: at most one of `profile`, `reference` (a photo; with `force` also a photograph for `tiny`) and `new_person`
    (a seed). With several profiles each person's pictures go to a folder of the profile's name. `adapter`: a directory
    with face.safetensors, body.safetensors or both, by default the family's.
    Strength: `face_scale`, `body_scale`: numbers, or texts as in `bolid.scales`; by default the family's, else 1, for
    every branch that the person and the adapter have. `body_from`: "adapter", the body branch; "shape", the depth map
    of the person's 3D body in a `pose` (`bolid.body.mesh.poses`, or that of `pose_from`) through the family's depth
    ControlNet, whose weight is `shape_scale`; or "both". By default "adapter", with a `pose` "both". A profile of
    another family has a 3D body too. `face_guidance`, `body_guidance`: the weight of the loss towards
    the person's face and body whose gradient each step follows; 1 is usual, in `bolid.scales.PERSON_INTERVAL` where no
    interval is given.
    Base: `base`: another base of the family's kind, a .safetensors checkpoint or a diffusers folder. `lora`: FILE or
    FILE:WEIGHT. `pose_from`: a photo whose pose the pictures take, through the family's ControlNet. `size`:
    "WIDTHxHEIGHT", one that the base was trained on. `dtype`: fp32, fp16, bf16, or auto: fp16 on CUDA; the VAE stays in
    fp32. `offload`: networks leave the accelerator while they do not compute.
    Afterwards: `upscale`: 2 or 4 times larger, by the family's upscaler. `refine_face`: small faces are sampled again,
    larger (`bolid.generate.refine`).
    Sampling: `few_steps`: with the family's few-step LoRA and no guidance. `steps` and `guidance` are by default the
    family's; guidance may have an interval, as in "2.5@0..0.75". `negative`: what not to show. `best_of`: so many
    candidates of each picture are sampled, and the one is written whose body, and face where one is shown, is nearest
    to the person's by the family's own models.
    Grid: `grid`: texts like "body-scale=0,0.5,1"; the pictures of each combination go to a folder of their own, and the
    last path returned is a contact sheet of all.
    `format`: "png", "jpg" or "webp".
    A picture depends on the seed (0 where none is given) and its place in the list of prompts, not on `batch_size`, the
    other people or the grid. The file carries its record, and settings that other programs read
    (`bolid.formats.pictures`); the record's seed makes that picture again where it is the first prompt's. Pictures of
    other commands in `out` are kept: a name that is taken gets _2, _3, ... behind it. Where a prompt names no clothes
    the family may add some (`Family.dressed`), and the text encoder may read less of it than was written: the record
    has the text that was encoded as `encoded_prompt`, and `warn` is called with the words lost.
    Processes: `workers` of this machine, or with `engine` "ray" as many actors of Ray; the processes that torchrun or a
    SLURM step has started share the pictures too: the first one writes, the others return []. The files are the same
    for any number of processes of as many CPU threads. A finished picture is not made again. `made` is called with each
    path as it comes. `models`: networks that stay loaded from call to call. `on_step`: see
    `bolid.backends.sampling.OnStep`.
    Raises BolidError for settings that make no sense, for files that do not belong together, and for pictures that are
    no pictures (not finite, or of one colour).
    """
    request = Request(
        prompts=tuple(prompt.strip() for prompt in prompts or () if prompt.strip()), out=Path(out),
        profiles=() if profile is None else (profile,) if isinstance(profile, str | os.PathLike) else tuple(profile),
        reference=reference, new_person=new_person, adapter=adapter, face_scale=face_scale, body_scale=body_scale,
        lora=tuple(lora or ()), pose_from=pose_from, pose_scale=pose_scale, body_from=body_from, pose=pose,
        shape_scale=shape_scale, few_steps=few_steps, steps=steps, guidance=guidance, face_guidance=face_guidance,
        body_guidance=body_guidance, negative=negative, n=n, best_of=best_of, batch_size=batch_size,
        grid=tuple(grid or ()), family_name=family, base=base, size=size, upscale=upscale, refine_face=refine_face,
        dtype=dtype, offload=offload, device_name=device, seed=seed, force=force, format=format,
    )  # fmt: skip
    with sharing.start(engine, workers) as run:
        if run is None:
            return []
        recorded: dict[str, str] = {}
        if like is not None:
            request, recorded = request_like(like, request)
        request.check()
        # The actors of Ray compute; here the models only say what belongs together.
        away = engine == "ray"
        warn = warn or (lambda text: None)
        here = replace(request, device_name="cpu", offload=False) if away else request
        generation = _Generation(here, models, progress, warn, on_step)
        generation.read_prompts(warn)
        for name in sorted(recorded.keys() & generation.inputs.keys()):
            if generation.inputs[name] != recorded[name]:
                warn(f"the {name.replace('_', ' ')} is another than that of {like}: the picture will differ")
        work = _Sampling(request, request.device, None if away else generation)
        return generation.run(functools.partial(run, work), made or (lambda path: None))


@dataclass(frozen=True)
class _Sampling:
    """The sampling of a batch, as `bolid.workers` takes it to other processes, which load the models themselves."""

    request: Request
    device: str
    generation: _Generation | None = None  # in the process that has loaded it
    threads: int | None = None
    round: int = 1

    def load(self) -> sharing.Process:
        """The function that samples a batch of places."""
        generation = self.generation or _Generation(replace(self.request, device_name=self.device))
        return generation.sample_batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sampling, (self.request, self.device)


class _Generation:
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

        path = self.family.require("upscaler")
        self.inputs["upscaler"] = sha256_file(path)
        return Upscaler(path, self.request.device)

    def _refiner(self) -> FaceRefiner | None:
        """What looks at faces again for --refine-face."""
        if not self.request.refine_face:
            return None
        from bolid.backends.people import face_detector, pose_detector
        from bolid.generate.refine import FaceRefiner

        faces = face_detector(self.family.require("face"), self.request.device)
        pose = pose_detector(self.family.require("pose"), self.request.device)
        self.inputs["refine_face"] = faces.sha256
        return FaceRefiner(faces, pose, self.family.image_size)

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
            pictures = self.refiner(pictures, prompts, seeds, functools.partial(self._repaint, person, cell))
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

    def _repaint(
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
