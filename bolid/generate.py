"""`bolid generate`: prompts in, pictures of one person out (BoLID section 5.3), through a stock diffusers pipeline.

Who the person is comes from a profile, from one photo, or from the prior (an invented person); with none of them it is
the null body, and the pictures are those of the plain base, bit for bit: no adapter is loaded then.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.families import Family, get_family, match_family
from bolid.person import read_person
from bolid.run import atomic_path, canonical_json, derive_seed, pick_device, run_record, sha256_file

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]
KIND = "picture"


@dataclass(frozen=True)
class Identity:
    """Whom to show. `vectors`: branch -> f32 [dim]; a branch that is not there is not used."""

    vectors: dict[str, torch.Tensor]
    body_encoder: str  # sha256, "" for nobody
    inputs: dict[str, str]  # for the run record
    name: str


def generate(
    prompts: Sequence[str],
    out: str | os.PathLike[str] = "generated",
    *,
    profile: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    new_person: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    face_scale: float | None = None,
    body_scale: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    n: int = 1,
    batch_size: int = 8,
    family: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `n` pictures of each prompt to `out` and return their paths.

    At most one of `profile`, `reference` (a photo) and `new_person` (a seed). `face_scale` is by default 1 where a face
    is known. `adapter`: a directory with face.safetensors and body.safetensors, by default the family's. `steps` and
    `guidance` are by default the family's. A picture depends on the seed and its place in the list of prompts, not on
    `batch_size`; its run is in the PNG's text chunk `bolid`.
    Raises BolidError for settings that make no sense and for files that do not belong together.
    """
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise BolidError(
            "no prompt given", 'say what to show, for example: bolid generate "a full body photo of a woman"'
        )
    if sum(choice is not None for choice in (profile, reference, new_person)) > 1:
        raise BolidError(
            "more than one person given",
            "choose one of --profile, --reference and --new-person; run once for each person",
        )
    chosen = _family(family, profile, adapter)
    steps = int(chosen.defaults.get("steps", 30)) if steps is None else steps
    guidance = float(chosen.defaults.get("guidance", 5.0)) if guidance is None else guidance
    _check_numbers(steps=steps, n=n, batch_size=batch_size)
    _check_scales(guidance=guidance, body_scale=body_scale, face_scale=face_scale)
    device = pick_device(device)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BolidError(f"--out {out} is a file", "give a folder for the pictures")

    from bolid.backends.base import load_base, quiet_diffusers
    from bolid.method.body_condition import build_ip_adapter_image_embeds

    files = _adapter_files(chosen, adapter)
    person = _identity(chosen, files, profile, reference, new_person, device, progress)
    if face_scale and person.body_encoder and "face" not in person.vectors:
        raise BolidError(
            f"{person.name} has no face, but --face-scale is {face_scale}",
            "leave out --face-scale, or make the profile again with a photo that shows the face",
        )
    wanted = {"face": 1.0 if face_scale is None else face_scale, "body": body_scale}
    # A branch at scale 0 is not even loaded: less to compute, and bit-equal to the base without it.
    scales = {branch: scale for branch, scale in wanted.items() if branch in person.vectors and scale != 0}
    pipe = load_base(chosen, device)
    inputs = dict(person.inputs)
    if scales:
        inputs |= _load_adapters(pipe, chosen, files, list(scales), person)
        pipe.set_ip_adapter_scale(list(scales.values()))
    vectors = [person.vectors[branch] for branch in scales]
    if "timestep_spacing" in chosen.defaults:
        pipe.scheduler = pipe.scheduler.from_config(
            pipe.scheduler.config, timestep_spacing=chosen.defaults["timestep_spacing"]
        )

    settings = {"steps": steps, "guidance": guidance, "negative": negative, "scales": scales, "person": person.name}
    jobs = [(index, number) for index in range(len(prompts)) for number in range(n)]
    digits = max(3, len(str(len(prompts) - 1)))
    height, width = chosen.image_size
    paths = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        seeds = [derive_seed(seed, "generate", index, number) for index, number in batch]
        extra: dict[str, Any] = {}
        if vectors:
            # diffusers leaves guidance out at 1 and below; the null rows must be there exactly when it does not.
            embeds = build_ip_adapter_image_embeds(vectors, guidance=guidance > 1, batch=len(batch))
            extra["ip_adapter_image_embeds"] = [e.to(pipe.device, pipe.unet.dtype) for e in embeds]
        with quiet_diffusers():
            pictures = pipe(
                [prompts[index] for index, _ in batch], height=height, width=width, num_inference_steps=steps,
                guidance_scale=guidance, negative_prompt=[negative] * len(batch) if guidance > 1 else None,
                generator=_generators(seeds), output_type="pil", **extra,
            ).images  # fmt: skip
        for (index, number), picture_seed, picture in zip(batch, seeds, pictures, strict=True):
            record = run_record(
                KIND, family=chosen, config={"prompt": prompts[index], **settings}, seed=picture_seed, inputs=inputs
            )
            path = out / f"{index:0{digits}d}-{_slug(prompts[index])}{f'-{number}' if n > 1 else ''}.png"
            save_picture(path, picture, record)
            paths.append(path)
        if progress is not None:
            progress(len(paths), len(jobs), "pictures")
    return paths


def save_picture(path: Path, picture: Any, record: dict[str, Any]) -> None:
    """A PNG that carries its run record in the text chunk `bolid`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("bolid", canonical_json(record))
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def read_prompts(lines: Sequence[str]) -> list[str]:
    """One prompt a line; empty lines and those that begin with # do not count."""
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


# ---- who ----------------------------------------------------------------------------------------------------------


def _identity(
    family: Family,
    files: dict[str, Path],
    profile: str | os.PathLike[str] | None,
    reference: str | os.PathLike[str] | None,
    new_person: int | None,
    device: str,
    progress: Progress | None,
) -> Identity:
    import torch

    if profile is not None:
        from bolid.formats.profile import load_profile

        person = load_profile(profile)
        match_family(family.name, person.record["family"], profile)
        vectors = {"body": person.body_mean} | ({"face": person.face} if person.face is not None else {})
        encoder_sha = person.record["inputs"].get("body_encoder", "")
        # The photos too: `evaluate` must not score a picture against a photo that it could have copied.
        photos = {name: sha for name, sha in person.record["inputs"].items() if name.startswith("photo_")}
        inputs = {"profile": sha256_file(profile), **photos}
        return Identity(vectors, encoder_sha, inputs, f"the profile {Path(profile).name}")
    if reference is not None:
        from bolid.backends.body import BodyEncoder

        encoder = BodyEncoder(family.require("body_encoder"), device)
        seen = read_person([reference], encoder, family, device=device, progress=progress)
        vectors = {"body": seen.body_mean} | ({"face": seen.face} if seen.face is not None else {})
        return Identity(vectors, encoder.sha256, {"reference": seen.sha256[0]}, f"the photo {Path(reference).name}")
    if new_person is not None:
        # c_body drawn from the prior N(0, I): somebody who does not exist, the same in every prompt.
        from bolid.formats.adapter import load_adapter

        tensors, record = load_adapter(_require_adapter(family, files, "body"), "body")
        generator = torch.Generator().manual_seed(derive_seed(new_person, "new-person"))
        body = torch.randn(tensors["image_proj.proj.weight"].shape[1], generator=generator)
        return Identity({"body": body}, record["inputs"]["body_encoder"], {}, f"new person {new_person}")
    return Identity({}, "", {}, "nobody")


def _family(
    option: str | None, profile: str | os.PathLike[str] | None, adapter: str | os.PathLike[str] | None
) -> Family:
    """The family that the profile, or else the adapter, was made with; else the one asked for or chosen."""
    from bolid.formats.tensors import read_record

    made = [profile] if profile is not None else []
    if adapter is not None:
        made += [path for path in _files_in(adapter).values() if path.is_file()]
    return match_family(option, read_record(made[0])["family"], made[0]) if made else get_family(option)


# ---- adapters -----------------------------------------------------------------------------------------------------


def _adapter_files(family: Family, adapter: str | os.PathLike[str] | None) -> dict[str, Path]:
    if adapter is None:
        return {"face": family.face_adapter, "body": family.body_adapter}
    return _files_in(adapter)


def _files_in(adapter: str | os.PathLike[str]) -> dict[str, Path]:
    return {branch: Path(adapter) / f"{branch}.safetensors" for branch in ("face", "body")}


def _require_adapter(family: Family, files: dict[str, Path], branch: str) -> Path:
    if files[branch] == getattr(family, f"{branch}_adapter"):
        return family.require(f"{branch}_adapter")
    if not files[branch].is_file():
        raise BolidError(f"there is no {branch} adapter {files[branch]}", "make it with: bolid train-adapter")
    return files[branch]


def _load_adapters(
    pipe: Any, family: Family, files: dict[str, Path], branches: list[str], person: Identity
) -> dict[str, str]:
    """Load the branches into the pipeline in one call (a second would replace the first); returns their hashes."""
    from bolid.backends.base import quiet_diffusers
    from bolid.formats.adapter import load_adapter, nested_state_dict

    states, inputs = [], {}
    for branch in branches:
        path = _require_adapter(family, files, branch)
        tensors, record = load_adapter(path, branch)
        match_family(family.name, record["family"], path)
        first = "image_proj.proj.weight" if branch == "body" else "image_proj.proj.0.weight"
        dim = tensors[first].shape[1]
        if branch == "body" and record["inputs"].get("body_encoder") != person.body_encoder:
            raise BolidError(
                f"{person.name} and the body adapter {path} were made with different body encoders",
                "make the profile again with the body encoder that the adapter was trained with",
            )
        if dim != len(person.vectors[branch]):
            raise BolidError(
                f"the {branch} adapter {path} takes {dim} numbers, {person.name} has {len(person.vectors[branch])}",
                "make the profile again with this family",
            )
        states.append(nested_state_dict({name: value.to(pipe.unet.dtype) for name, value in tensors.items()}))
        inputs[f"{branch}_adapter"] = sha256_file(path)
    with quiet_diffusers():
        try:
            pipe.load_ip_adapter(
                states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise BolidError(
                f"the adapter does not fit the base of family '{family.name}'",
                "train it again with: bolid train-adapter",
            ) from error
    return inputs


# ---- small things -------------------------------------------------------------------------------------------------


def _generators(seeds: list[int]) -> list[torch.Generator]:
    """One a picture, on the CPU: the same noise on every device and in every batch."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
            raise BolidError(f"{option} is {value}", "give at least 1")


def _check_scales(**scales: float | None) -> None:
    for name, value in scales.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BolidError(f"--{name.replace('_', '-')} is {value}", "give a number of 0 or more")
