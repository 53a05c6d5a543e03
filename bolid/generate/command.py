"""`bolid generate`: prompts in, pictures of people out (BoLID section 5.3).

Who a person is comes from a profile, from one photo, or from the prior (an invented person); with none of them it is
the null body, and the pictures are those of the plain base, bit for bit: no adapter is loaded then.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.generate.adapters import LoadedAdapter, check_belongs, choose_branches, load_adapters
from bolid.generate.grid import Place, grid_sheet
from bolid.generate.identity import Identity, check_comparable, find_people
from bolid.generate.models import Models
from bolid.generate.prompts import split_at_limit, unsupported_syntax
from bolid.generate.request import Cell, PathLike, Request, picture_seed
from bolid.generate.saving import save_beside
from bolid.person import PersonReader
from bolid.run import Progress, canonical_json, run_record, sha256_file
from bolid.scales import Scale, parse_scale

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.backends.loss_guidance import GuidanceLoss
    from bolid.backends.sampling import Control, OnStep
    from bolid.generate.guidance import MakeLoss

KIND = "picture"
GRID_KIND = "grid"
GRID_FILE = "grid.png"


def generate(
    prompts: Sequence[str],
    out: PathLike = "generated",
    *,
    profile: PathLike | Sequence[PathLike] | None = None,
    reference: PathLike | None = None,
    new_person: int | None = None,
    adapter: PathLike | None = None,
    face_scale: float | str | None = None,
    body_scale: float | str | None = None,
    lora: Sequence[str] | None = None,
    pose_from: PathLike | None = None,
    pose_scale: float | str = 1.0,
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
    family: str | None = None,
    base: PathLike | None = None,
    size: str | None = None,
    dtype: str = "auto",
    offload: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    models: Models | None = None,
    on_step: OnStep | None = None,
) -> list[Path]:
    """Write `n` pictures of each prompt to `out` and return their paths.

    Person: at most one of `profile`, `reference` (a photo) and `new_person` (a seed). With several profiles each
    person's pictures go to a folder of the profile's name. `adapter`: a directory with face.safetensors,
    body.safetensors or both, by default the family's.
    Strength: `face_scale`, `body_scale`: numbers, or texts as in `bolid.scales`; by default the family's, else 1, for
    every branch that the person and the adapter have. `face_guidance`, `body_guidance`: the weight of the loss towards
    the person's face and body whose gradient each step follows; 1 is usual, in `bolid.scales.PERSON_INTERVAL` where no
    interval is given.
    Base: `base`: another base of the family's kind, a .safetensors checkpoint or a diffusers folder. `lora`: FILE or
    FILE:WEIGHT. `pose_from`: a photo whose pose the pictures take, through the family's ControlNet. `size`:
    "WIDTHxHEIGHT", one that the base was trained on. `dtype`: fp32, fp16, bf16, or auto: fp16 on CUDA; the VAE stays in
    fp32. `offload`: networks leave the accelerator while they do not compute.
    Sampling: `few_steps`: with the family's few-step LoRA and no guidance. `steps` and `guidance` are by default the
    family's; guidance may have an interval, as in "2.5@0..0.75". `negative`: what not to show. `best_of`: so many
    candidates of each picture are sampled, and the one is written whose body, and face where one is shown, is nearest
    to the person's by the family's own models.
    Grid: `grid`: texts like "body-scale=0,0.5,1"; the pictures of each combination go to a folder of their own, and the
    last path returned is a contact sheet of all.
    A picture depends on the seed and its place in the list of prompts, not on `batch_size`, the other people or the
    grid; its record is in the PNG's text chunk `bolid`, and the record's seed makes that picture again where it is the
    first prompt's. Pictures of other commands in `out` are kept: a name that is taken gets _2, _3, ... behind it. Where
    a prompt names no clothes the family may add some (`Family.dressed`), and the text encoder may read less of it than
    was written: the record has the text that was encoded as `encoded_prompt`, and `warn` is called with the words lost.
    `models`: networks that stay loaded from call to call. `on_step`: see `bolid.backends.sampling.OnStep`.
    Raises BolidError for settings that make no sense, for files that do not belong together, and for pictures that are
    no pictures (not finite, or of one colour).
    """
    request = Request(
        prompts=tuple(prompt.strip() for prompt in prompts if prompt.strip()), out=Path(out),
        profiles=() if profile is None else (profile,) if isinstance(profile, str | os.PathLike) else tuple(profile),
        reference=reference, new_person=new_person, adapter=adapter, face_scale=face_scale, body_scale=body_scale,
        lora=tuple(lora or ()), pose_from=pose_from, pose_scale=pose_scale, few_steps=few_steps, steps=steps,
        guidance=guidance, face_guidance=face_guidance, body_guidance=body_guidance, negative=negative, n=n,
        best_of=best_of, batch_size=batch_size, grid=tuple(grid or ()), family_name=family, base=base, size=size,
        dtype=dtype, offload=offload, device_name=device, seed=seed,
    )  # fmt: skip
    request.check()
    return _Generation(request, models or Models(), progress, warn, on_step).run()


class _Generation:
    """The people and models of a request, loaded and checked to belong together; `run` makes its pictures."""

    def __init__(
        self,
        request: Request,
        models: Models,
        progress: Progress | None,
        warn: Callable[[str], None] | None,
        on_step: OnStep | None,
    ) -> None:
        self.request, self.family, self.progress = request, request.family, progress
        self.models, self.on_step = models, on_step
        reader = functools.partial(models.reader, request.family, request.device)
        self.people = find_people(request, reader, progress)
        self.branches = choose_branches(request, self.people)
        self.ranker = _ranker(request, self.people, reader) if request.best_of > 1 else None
        self.inputs = {f"lora_{i}": sha256_file(path) for i, (path, _) in enumerate(request.loras)}
        self.guidance = self._guidance(reader)
        self.pose = self._pose()
        self.pipe, adapters = models.pipe(self._networks(), self._load_pipe)
        self._check_steps(self.pipe)
        for branch, adapter in adapters.items():
            self._check_people(branch, adapter)
            self.inputs[f"{branch}_adapter"] = adapter.sha256
        if request.few_steps:
            self.inputs["few_steps_lora"] = sha256_file(self.family.require("few_steps_lora"))
        self.controls = self._controls()
        self.encoded = {prompt: self._encoded(prompt, warn) for prompt in (*request.prompts, request.negative)}

    def _guidance(self, reader: Callable[[], PersonReader]) -> dict[str, MakeLoss]:
        """Of "face" and "body", those that some cell has guidance for."""
        from bolid.generate.guidance import guidance_for

        makers = {}
        for part in self.request.guided_parts:
            makers[part], used = guidance_for(part, self.family, self.people, reader, self.request.device)
            self.inputs |= used
        return makers

    def _pose(self) -> np.ndarray | None:
        """The pose map of --pose-from, uint8 [H,W,3]."""
        if self.request.pose_from is None:
            return None
        from bolid.generate import pose_map

        self.family.require("controlnet")
        self.inputs["pose_from"] = sha256_file(self.request.pose_from)
        return pose_map.read_pose(self.request.pose_from, self.family, self.request.device)

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

    def _controls(self) -> list[Control]:
        """The ControlNet that follows the pose map, if there is one."""
        if self.pose is None:
            return []
        from PIL import Image

        from bolid.backends.attention import cache_conditions
        from bolid.backends.diffusion import load_controlnet
        from bolid.backends.sampling import Control

        def load() -> Any:
            network = load_controlnet(self.pipe, self.family)
            cache_conditions(network)
            return network

        network = self.models.controlnet(self._networks(), load)
        return [Control(network, Image.fromarray(self.pose), self.request.pose_weight)]

    def _encoded(self, prompt: str, warn: Callable[[str], None] | None) -> str:
        """The text that the encoder reads for a prompt: with the family's clothes where it names none, and cut."""
        text = self.family.dressed(prompt) if prompt in self.request.prompts else prompt
        read, lost = split_at_limit(self.pipe, text)
        if warn is not None:
            for warning in unsupported_syntax(prompt):
                warn(warning)
            if lost:
                warn(f"the text encoder reads no more than {read!r}; it does not read {lost!r}")
        return read

    def run(self) -> list[Path]:
        """Each person in each cell, in batches; the paths in that order, and the grid's contact sheet last."""
        request, made = self.request, dict[Place, Path]()
        total = len(self.people) * len(request.cells) * len(request.jobs)
        for who, person in enumerate(self.people):
            for where, cell in enumerate(request.cells):
                folder = request.out.joinpath(person.folder, *(f"{axis}={v}" for axis, v in cell.values.items()))
                for start in range(0, len(request.jobs), request.batch_size):
                    jobs = request.jobs[start : start + request.batch_size]
                    for job, (picture, seed) in zip(jobs, self._best(person, cell, jobs), strict=True):
                        record = self._record(person, cell, job[0], seed)
                        path = save_beside(folder / request.file_name(*job), picture, record)
                        made[who, where, *job] = path
                    if self.progress is not None:
                        self.progress(len(made), total, "pictures")
        return list(made.values()) + ([self._save_grid(made)] if request.grid else [])

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

    def _sample(
        self, person: Identity, cell: Cell, jobs: Sequence[tuple[int, int]], seeds: Sequence[int]
    ) -> list[np.ndarray]:
        """One picture a job, uint8 [H,W,3]."""
        import torch

        from bolid.backends.diffusion import decode_latents
        from bolid.backends.sampling import sample

        request, pipe, scales = self.request, self.pipe, self._scales(person, cell)
        latents = sample(
            pipe, [self.family.dressed(request.prompts[index]) for index, _ in jobs], size=self.family.image_size,
            steps=cell.steps, guidance=cell.guidance, negative=request.negative,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same on every device
            vectors=[self._vector(person, branch) for branch in self.branches],
            scales=[scales.get(branch, Scale(0, 0, 0)) for branch in self.branches],
            controls=self.controls, losses=self._losses(person, cell), on_step=self.on_step,
        )  # fmt: skip
        finite = latents.isfinite().flatten(1).all(1).tolist()
        pictures = decode_latents(pipe, latents)
        pipe.maybe_free_model_hooks()  # with --offload: the last network leaves the accelerator too
        for (index, _), picture, fine in zip(jobs, pictures, finite, strict=True):
            if not fine or picture.std() == 0:
                raise BolidError(
                    f"sampling {request.prompts[index]!r} of {person.name} gave no picture: "
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

    def _record(self, person: Identity, cell: Cell, index: int, seed: int) -> dict[str, Any]:
        """The run record of a picture of the prompt `index`."""
        prompt = self.request.prompts[index]
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
        record = run_record(GRID_KIND, family=self.family, config=config, seed=request.seed, inputs=inputs)
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
