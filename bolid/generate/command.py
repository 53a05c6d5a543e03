"""`bolid generate`: prompts in, pictures of people out (BoLID section 5.3).

Who a person is comes from a profile, from one photo, or from the prior (an invented person); with none of them it is
the null body, and the pictures are those of the plain base, bit for bit: no adapter is loaded then.
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
        generation = Generation(here, models, progress, warn, on_step)
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
    generation: Generation | None = None  # in the process that has loaded it
    threads: int | None = None
    round: int = 1

    def load(self) -> sharing.Process:
        """The function that samples a batch of places."""
        generation = self.generation or Generation(replace(self.request, device_name=self.device))
        return generation.sample_batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sampling, (self.request, self.device)
