"""`bolid generate`: prompts in, pictures of people out (BoLID section 5.3).

Who a person is comes from a profile, from one photo, or from the prior (an invented person). With none of them no
adapter is loaded, and the pictures are those of the plain base, bit for bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid import workers as sharing
from bolid.generate.generation import Generation
from bolid.generate.like import request_like
from bolid.generate.models import Models
from bolid.generate.request import PathLike, Request
from bolid.run import Progress
from bolid.workers import EngineName

if TYPE_CHECKING:
    from bolid.backends.sampling import OnStep


def generate(
    prompts: Sequence[str] | None = None,
    out: PathLike = "generated",
    *,
    like: PathLike | None = None,
    profile: PathLike | Sequence[PathLike] | None = None,
    photo: PathLike | None = None,
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

    A picture depends on its settings, the seed and its place in the list of prompts. It does not depend on
    `batch_size`, the other people or the grid. The file carries its record, and settings that other programs read
    (`bolid.formats.pictures`). A finished picture is not made again. Pictures of other commands in `out` are kept: a
    name that is taken gets _2, _3, ... behind it.

    The person: at most one of `profile`, `photo` and `new_person`.
        profile: a profile, or several: each person's pictures then go to a folder of the profile's name.
        photo: a photo of the person; with `force` also a photograph for `tiny`.
        new_person: the seed of an invented person.
        adapter: a directory with face.safetensors, body.safetensors or both; by default the family's.
        face_scale, body_scale: strength of the branches, a number or a text as in `bolid.scales`. By default the
            family's, else 1, for every branch that the person and the adapter have.
        body_from: "adapter", the body branch; "shape", the depth map of the person's 3D body through the family's depth
            ControlNet; or "both". By default "adapter", with a `pose` "both". A profile of another family has a 3D body
            too.
        pose: of that body (`bolid.body.mesh.poses`); without it that of `pose_from`. shape_scale: weight of the depth.
        pose_from: a photo whose pose the pictures take, through the family's ControlNet. pose_scale: its weight.
        face_guidance, body_guidance: weight of the loss (distance to the person) in each step. 1 is usual.
            Without an interval it counts in `bolid.scales.PERSON_INTERVAL`.
    The sampling:
        like: a picture of `generate`, whose settings are used where none are given here. Without a `seed` that picture
            is made again, with one it is varied.
        seed: 0 by default. The seed in a picture's record makes that picture again as the first prompt's.
        steps, guidance: by default the family's. Guidance may have an interval, as in "2.5@0..0.75".
        negative: what not to show. few_steps: the family's few-step LoRA, without guidance.
        base: another base of the family's kind, a .safetensors checkpoint or a diffusers folder.
        lora: FILE or FILE:WEIGHT. size: "WIDTHxHEIGHT", one that the base was trained on.
        dtype: fp32, fp16, bf16, or auto: fp16 on CUDA. The VAE stays in fp32.
        offload: networks leave the accelerator while they do not compute.
        best_of: so many candidates of each picture are sampled. The one is written whose body, and face where one is
            shown, is nearest to the person's by the family's own models.
        grid: texts like "body-scale=0,0.5,1". The pictures of each combination go to a folder of their own, and the
            last path returned is a contact sheet of all.
    Afterwards:
        upscale: 2 or 4 times larger, by the family's upscaler.
        refine_face: small faces are sampled again, larger (`bolid.generate.refine`).
        format: "png", "jpg" or "webp".
    The run:
        warn: called with what a user should know, like the words of a prompt that the text encoder does not read.
        made: called with each path as it comes. on_step: see `bolid.backends.sampling.OnStep`.
        models: networks that stay loaded from call to call.
        workers, engine: processes of this machine, or with "ray" actors of Ray. Processes that torchrun or a SLURM step
            has started share the pictures too: the first one writes, the others return []. The files are the same for
            any number of processes of as many CPU threads.

    Raises BolidError for settings that make no sense, for files that do not belong together, and for pictures that are
    no pictures (not finite, or of one colour).
    """
    request = Request(
        prompts=tuple(prompt.strip() for prompt in prompts or () if prompt.strip()), out=Path(out),
        profiles=() if profile is None else (profile,) if isinstance(profile, str | os.PathLike) else tuple(profile),
        photo=photo, new_person=new_person, adapter=adapter, face_scale=face_scale, body_scale=body_scale,
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
        generation = Generation(here, models, progress, warn, on_step)
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
    generation: Generation | None = None  # in the process that has loaded it
    threads: int | None = None
    round: int = 1

    def load(self) -> sharing.Process:
        """The function that samples a batch of places."""
        generation = self.generation or Generation(replace(self.request, device_name=self.device))
        return generation.sample_batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sampling, (self.request, self.device)
