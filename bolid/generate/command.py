"""`bolid generate`: prompts in, pictures of people out (BoLID section 5.3), through a stock diffusers pipeline.

Who a person is comes from a profile, from one photo, or from the prior (an invented person); with none of them it is
the null body, and the pictures are those of the plain base, bit for bit: no adapter is loaded then.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import Family, get_family, match_family
from bolid.person import PersonReader
from bolid.run import (
    Progress,
    atomic_path,
    canonical_json,
    derive_seed,
    disk_errors,
    pick_device,
    run_differences,
    run_record,
    sha256_file,
)
from bolid.scales import Scale, parse_grid, parse_guidance, parse_lora, parse_person_guidance, parse_scale

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from bolid.generate.guidance import Guide, Guiding

PathLike = str | os.PathLike[str]
KIND = "picture"
GRID_KIND = "grid"
GRID_FILE = "grid.png"


@dataclass(frozen=True)
class Identity:
    """Whom to show. `vectors`: branch -> f32 [dim]; a branch that is not there is not used."""

    vectors: dict[str, torch.Tensor]
    body_encoder: str  # the sha256 that names its space, "" for nobody
    face_model: str  # sha256 of the recogniser, "" where it is not known
    inputs: dict[str, str]  # for the run record
    name: str
    folder: str = ""  # of this person's pictures, where there are several people


@dataclass(frozen=True)
class Cell:
    """The settings of one call of the pipeline; a grid has several. `scales`: branch -> Scale, those asked for."""

    scales: dict[str, Scale]
    steps: int
    guidance: Scale
    towards: dict[str, Scale]  # "face", "body" -> how strongly pictures are drawn towards it
    seed: int
    values: dict[str, str]  # axis of the grid -> the value as written


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
) -> list[Path]:
    """Write `n` pictures of each prompt to `out` and return their paths.

    At most one of `profile`, `reference` (a photo) and `new_person` (a seed); with several profiles each person's
    pictures are made in calls of their own and go to a folder of the profile's name. `adapter`: a directory with
    face.safetensors, body.safetensors or both, by default the family's. `face_scale`, `body_scale`: numbers, or texts
    as in `bolid.scales`; by default the family's, which is 1 if it says nothing else, for every branch that the
    person and the adapter have. `lora`: FILE or FILE:WEIGHT. `pose_from`: a photo whose pose the pictures take, through
    the family's ControlNet. `few_steps`: with the family's few-step LoRA and no guidance. `steps` and `guidance` are by
    default the family's; guidance may have a stretch, as in "2.5@0..0.75". `face_guidance`, `body_guidance`: how
    strongly a step draws the picture towards the person's face and body, by the gradient of the family's face model and
    of its body encoder; 1 is usual, in `bolid.scales.PERSON_STRETCH` where no stretch is given. `grid`: texts like
    "body-scale=0,0.5,1"; the pictures of each combination go to a folder of their own, and the last path returned is
    one sheet of all.
    `best_of`: so many are painted of each picture, and the one is written whose body, and face where one is shown,
    looks most like the person's to the family's own models. `base`: another base of the family's kind, a .safetensors
    checkpoint or a diffusers folder. `size`: "WIDTHxHEIGHT", one that the base was trained on. `dtype`: fp32, fp16,
    bf16, or auto: fp16 on CUDA; the VAE stays in fp32. `offload`: networks leave the accelerator while they do not
    compute. A picture depends on the seed and its place in the list of prompts, not on `batch_size`, the other people
    or the grid; its run is in the PNG's text chunk `bolid`. Pictures of other commands that lie in `out` are kept: what
    would have such a one's name gets _2, _3, ... behind it. Where a prompt names no clothes the family may add some
    (`Family.dressed`); the record has that as `painted`.
    Raises BolidError for settings that make no sense and for files that do not belong together.
    """
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise BolidError(
            "no prompt given", 'say what to show, for example: bolid generate "a full body photo of a woman"'
        )
    lora, grid = lora or (), grid or ()
    profiles = [] if profile is None else [profile] if isinstance(profile, str | os.PathLike) else list(profile)
    if sum((bool(profiles), reference is not None, new_person is not None)) > 1:
        raise BolidError(
            "more than one person given",
            "choose one of --profile, --reference and --new-person; --profile may be given several times",
        )
    chosen = _family(family, profiles, adapter).with_base(base).with_size(size)
    sampler = chosen.defaults
    if few_steps:
        if not chosen.few_steps:
            raise BolidError(
                f"family '{chosen.name}' has no few-step sampler for --few-steps",
                "leave it out, or choose a family that has one: tiny, sd15, sdxl",
            )
        sampler = chosen.few_steps
    _check_numbers(n=n, best_of=best_of, batch_size=batch_size)
    plain = Cell(
        scales={
            branch: parse_scale(value, f"--{branch}-scale")
            for branch, value in (("face", face_scale), ("body", body_scale))
            if value is not None
        },
        steps=int(sampler.get("steps", 30)) if steps is None else steps,
        guidance=parse_guidance(sampler.get("guidance", 5.0) if guidance is None else guidance),
        towards={
            "face": parse_person_guidance(face_guidance, "face"),
            "body": parse_person_guidance(body_guidance, "body"),
        },
        seed=seed,
        values={},
    )
    cells = [_cell(plain, values) for values in parse_grid(grid)]
    for cell in cells:
        _check_cell(cell, negative, few_steps)
    pose_weight = parse_scale(pose_scale, "--pose-scale")
    if not pose_weight.is_uniform:
        raise BolidError(f"--pose-scale is {pose_scale}", "it has no parts: give a number, a stretch or 1@0..0.5")
    loras = [parse_lora(text) for text in lora]
    device = pick_device(device)
    guided = {part for cell in cells for part, weight in cell.towards.items() if not weight.is_zero}
    if offload and device == "cpu":
        raise BolidError("--offload spares the memory of an accelerator, and there is none", "leave it out")
    if offload and guided:
        raise BolidError(
            f"--{min(guided)}-guidance needs all networks at once, which --offload takes apart",
            "leave one of the two out",
        )
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BolidError(f"--out {out} is a file", "give a folder for the pictures")

    import numpy as np
    import torch

    from bolid.backends.diffusion import add_controlnet, choose_dtype, load_base, load_loras
    from bolid.backends.diffusion import offload as offload_networks

    files = _adapter_files(chosen, adapter)
    reader = functools.cache(lambda: PersonReader(chosen, device))
    people = _people(chosen, files, profiles, reference, new_person, reader, progress)
    branches = _branches(chosen, files, people, cells)
    judge = _judge(chosen, people, reader) if best_of > 1 else None
    inputs: dict[str, str] = {f"lora_{i}": sha256_file(path) for i, (path, _) in enumerate(loras)}
    guiding = {part: _guide(part, chosen, people, reader, device) for part in sorted(guided)}
    for _, used in guiding.values():
        inputs |= used
    extra: dict[str, Any] = {}
    if pose_from is not None:
        from bolid.generate.pose_map import read_pose

        chosen.require("controlnet")
        extra = _pose_arguments(read_pose(pose_from, chosen, device), pose_weight)
        inputs["pose_from"] = sha256_file(pose_from)
    if few_steps:
        few_steps_lora = chosen.require("few_steps_lora")
        loras.insert(0, (few_steps_lora, 1.0))
        inputs["few_steps_lora"] = sha256_file(few_steps_lora)
    pipe = load_base(chosen, "cpu" if offload else device, choose_dtype(dtype, device), sampler)
    _check_sampler(pipe, cells)
    load_loras(pipe, loras, chosen)
    if branches:
        inputs |= _load_adapters(pipe, chosen, files, branches, people)
    if pose_from is not None:
        pipe = add_controlnet(pipe, chosen)
    if offload:
        offload_networks(pipe, device)

    asked = {"negative": negative, "lora": list(lora), "few_steps": few_steps, "best_of": best_of}
    if base is not None:
        asked["base"] = Path(base).name
    if pose_from is not None:
        asked |= {"pose_from": Path(pose_from).name, "pose_scale": pose_weight.plain()}
    nulls = {
        branch: torch.zeros_like(next(person.vectors[branch] for person in people if branch in person.vectors))
        for branch in branches
    }
    usual = {branch: parse_scale(sampler.get(f"{branch}_scale", 1.0), f"{branch}_scale") for branch in branches}
    jobs = [(index, number) for index in range(len(prompts)) for number in range(n)]
    digits = max(3, len(str(len(prompts) - 1)))
    total = len(people) * len(cells) * len(jobs)
    made: dict[tuple[int, int, int, int], Path] = {}  # (person, cell, prompt, number)
    for who, person in enumerate(people):
        for where, cell in enumerate(cells):
            folder = out / person.folder
            for axis, value in cell.values.items():
                folder /= f"{axis}={value}"
            # At scale 0 diffusers leaves a branch out, as if it were not loaded.
            scales = [
                cell.scales.get(branch, usual[branch]) if branch in person.vectors else Scale(0, 0, 0)
                for branch in branches
            ]
            vectors = [person.vectors.get(branch, nulls[branch]) for branch in branches]
            shown = {b: scale.plain() for b, scale in zip(branches, scales, strict=True) if not scale.is_zero}
            comparable = judge and "face" in shown and person.face_model == judge.view_reader.faces.sha256
            face = person.vectors["face"] if comparable else None  # what --best-of compares beside the body
            settings = {
                "steps": cell.steps, "guidance": cell.guidance.plain(), "scales": shown, "person": person.name,
                **asked,
            }  # fmt: skip
            towards = {part: weight for part, weight in cell.towards.items() if not weight.is_zero}
            settings |= {f"{part}_guidance": weight.plain() for part, weight in towards.items()}
            guides = [guiding[part][0](person.vectors[part].to(device), weight) for part, weight in towards.items()]
            for start in range(0, len(jobs), batch_size):
                batch = jobs[start : start + batch_size]
                texts = [chosen.dressed(prompts[index]) for index, _ in batch]
                best: dict[int, tuple[float, int, Image.Image]] = {}  # place in the batch -> distance, seed, picture
                for candidate in range(best_of):
                    # The first is the one that is painted without `best_of`.
                    other = ("candidate", candidate) if candidate else ()
                    seeds = [derive_seed(cell.seed, "generate", *job, *other) for job in batch]
                    painted = _paint(pipe, chosen, texts, seeds, vectors, scales, cell, negative, extra, guides)
                    distances = [0.0] * len(batch)
                    if judge is not None:
                        arrays = [np.asarray(picture) for picture in painted]
                        distances = judge.distances(arrays, person.vectors["body"], face)
                    for i, found in enumerate(zip(distances, seeds, painted, strict=True)):
                        if i not in best or found[0] < best[i][0]:
                            best[i] = found
                for i, (index, number) in enumerate(batch):
                    _, picture_seed, picture = best[i]
                    config = {"prompt": prompts[index], **settings}
                    if texts[i] != prompts[index]:
                        config["painted"] = texts[i]
                    record = run_record(
                        KIND, family=chosen, config=config, seed=picture_seed, inputs={**person.inputs, **inputs}
                    )
                    name = f"{index:0{digits}d}-{_slug(prompts[index])}{f'-{number}' if n > 1 else ''}.png"
                    made[who, where, index, number] = _save(folder / name, picture, record)
                if progress is not None:
                    progress(len(made), total, "pictures")
    paths = list(made.values())
    if grid:
        sheet = _grid_sheet(made, people, cells, prompts, n)
        config = {"prompts": prompts, "grid": list(grid), "people": [person.name for person in people], **asked}
        everybody = {
            name if len(people) == 1 else f"{name}_{person.folder}": sha
            for person in people
            for name, sha in person.inputs.items()
        }
        record = run_record(GRID_KIND, family=chosen, config=config, seed=seed, inputs={**everybody, **inputs})
        paths.append(_save(out / GRID_FILE, sheet, record))
    return paths


def save_picture(path: Path, picture: Any, record: dict[str, Any]) -> None:
    """A PNG that carries its run record in the text chunk `bolid`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("bolid", canonical_json(record))
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def _save(path: Path, picture: Any, record: dict[str, Any]) -> Path:
    """Write to `path`, or, where a picture of another command lies there, to the same with _2, _3, ...: nothing is
    lost, and the same command writes the same files. Returns where."""
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))
    place = next(place for place in itertools.chain([path], numbered) if _claim(place) or _is_of_run(place, record))
    try:
        save_picture(place, picture, record)
    except BaseException:
        if not place.stat().st_size:
            place.unlink()
        raise
    return place


def _claim(path: Path) -> bool:
    """Whether `path` was free. It is an empty file now, and no other process takes it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def _is_of_run(path: Path, record: dict[str, Any]) -> bool:
    """Whether the same command has made the picture at `path`."""
    from bolid.formats.images import picture_record

    try:
        there = picture_record(path.read_bytes(), str(path))
    except BolidError:  # not to be read: nothing of ours
        return False
    return there is not None and not run_differences(there, record)


def read_prompts(lines: Sequence[str]) -> list[str]:
    """One prompt a line; empty lines and those that begin with # do not count."""
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


# ---- one call -----------------------------------------------------------------------------------------------------


def _paint(
    pipe: Any,
    family: Family,
    prompts: list[str],
    seeds: list[int],
    vectors: list[torch.Tensor],
    scales: list[Scale],
    cell: Cell,
    negative: str,
    extra: dict[str, Any],
    guides: list[Guide],
) -> list[Image.Image]:
    """One picture a prompt, all of one person. `vectors`, `scales`: of each loaded branch, in the order of loading."""
    from bolid.backends.diffusion import paint, remembered_conditions
    from bolid.generate.guidance import guided_by
    from bolid.method.body_condition import build_ip_adapter_image_embeds

    # diffusers leaves guidance out at 1 and below; the null rows must be there exactly when it does not.
    guided = cell.guidance.up > 1
    extra = dict(extra)
    if vectors:
        embeds = build_ip_adapter_image_embeds(vectors, guidance=guided)
        extra["ip_adapter_image_embeds"] = [e.to(pipe.device, pipe.unet.dtype) for e in embeds]
        extra["callback_on_step_end"] = _follow_scales(pipe, scales)
    height, width = family.image_size
    with remembered_conditions(pipe), guided_by(pipe, guides, len(prompts)):
        return paint(
            pipe, prompts, height=height, width=width, num_inference_steps=cell.steps, guidance=cell.guidance,
            negative_prompt=[negative] * len(prompts) if guided else None, generator=_generators(seeds),
            output_type="pil", **extra,
        )  # fmt: skip


def _follow_scales(pipe: Any, scales: list[Scale]) -> Callable[..., dict[str, Any]]:
    """Set the branches' scales for the first step; the callback sets them for each later one where they change."""
    current: list[float | dict[str, float]] = []

    def follow(step: int, total: int) -> None:
        wanted = [scale.at(step, total) for scale in scales]
        if wanted != current:
            pipe.set_ip_adapter_scale(wanted)
            current[:] = wanted

    def callback(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        follow(step + 1, pipe.num_timesteps)
        return {}

    follow(0, 1_000_000)  # how many steps there will be is only known inside; the first one starts at 0 in any case
    return callback


def _pose_arguments(pose: Any, weight: Scale) -> dict[str, Any]:
    from PIL import Image

    return {
        "image": Image.fromarray(pose),
        "controlnet_conditioning_scale": weight.up,
        "control_guidance_start": weight.start,
        "control_guidance_end": weight.end,
    }


def _grid_sheet(
    made: dict[tuple[int, int, int, int], Path], people: list[Identity], cells: list[Cell], prompts: list[str], n: int
) -> Image.Image:
    """Columns: the first axis of the grid. Rows: people, prompts and the other axes, where there are several."""
    from PIL import Image

    from bolid.contact_sheet import contact_sheet

    first, *others = cells[0].values
    columns = list(dict.fromkeys(cell.values[first] for cell in cells))
    rows: dict[str, list[list[Image.Image]]] = {}
    for who, person in enumerate(people):
        for index, prompt in enumerate(prompts):
            for where, cell in enumerate(cells):
                words = [person.folder, prompt if len(prompts) > 1 else ""]
                words += [f"{axis} {cell.values[axis]}" for axis in others]
                # Numbered, because two prompts may read the same; the number is taken off again.
                label = f"{who} {index} " + "\n".join(word for word in words if word)
                row = rows.setdefault(label, [[] for _ in columns])
                for number in range(n):
                    with Image.open(made[who, where, index, number]) as picture:
                        row[columns.index(cell.values[first])].append(picture.convert("RGB"))
    labels = [label.split(" ", 2)[2] for label in rows]
    return contact_sheet(list(rows.values()), labels, [f"{first} {value}" for value in columns])


# ---- who ----------------------------------------------------------------------------------------------------------


def _people(
    family: Family,
    files: dict[str, Path],
    profiles: Sequence[PathLike],
    reference: PathLike | None,
    new_person: int | None,
    reader: Callable[[], PersonReader],
    progress: Progress | None,
) -> list[Identity]:
    import torch

    if profiles:
        folders = [Path(path).stem if len(profiles) > 1 else "" for path in profiles]
        if twice := [name for name in folders if name and folders.count(name) > 1]:
            raise BolidError(
                f"two profiles are called {twice[0]}: their pictures could not be told apart", "rename one of them"
            )
        return [_from_profile(family, path, folder) for path, folder in zip(profiles, folders, strict=True)]
    if reference is not None:
        seen = reader().read([reference], progress)
        vectors = {"body": seen.body_mean} | ({"face": seen.face} if seen.face is not None else {})
        name = f"the photo {Path(reference).name}"
        return [Identity(vectors, reader().encoder.space, seen.face_model, {"reference": seen.sha256[0]}, name)]
    if new_person is not None:
        # c_body drawn from the prior N(0, I): somebody who does not exist, the same in every prompt.
        from bolid.formats.adapter import load_adapter

        tensors, record = load_adapter(_require_adapter(family, files, "body"), "body")
        generator = torch.Generator().manual_seed(derive_seed(new_person, "new-person"))
        body = torch.randn(tensors["image_proj.proj.weight"].shape[1], generator=generator)
        return [Identity({"body": body}, record["inputs"]["body_encoder"], "", {}, f"new person {new_person}")]
    return [Identity({}, "", "", {}, "nobody")]


def _judge(family: Family, people: list[Identity], reader: Callable[[], PersonReader]) -> PersonReader:
    """What says how near a picture is to a person. BolidError where somebody has no body of its kind."""
    if not all("body" in person.vectors for person in people):  # before any model is loaded
        raise BolidError(
            "--best-of compares bodies, but nobody is to be shown",
            "add --profile, --reference or --new-person, or leave it out",
        )
    _check_encoder("--best-of", people, reader().encoder.space, family)
    return reader()


def _guide(
    part: str, family: Family, people: list[Identity], reader: Callable[[], PersonReader], device: str
) -> Guiding:
    """What makes guides to people's "face" or "body". BolidError where somebody has none, or one that the family's
    models do not know."""
    from bolid.generate.guidance import towards_bodies, towards_faces

    option = f"--{part}-guidance"
    for person in people:
        if not person.vectors:
            raise BolidError(
                f"{option} needs a person, but nobody is to be shown", "add --profile or --reference, or leave it out"
            )
        if part not in person.vectors:
            raise BolidError(
                f"{option} needs a {part}, and {person.name} has none",
                f"leave it out, or make the profile from photos that show the {part}",
            )
    if part == "body":
        _check_encoder(option, people, reader().encoder.space, family)
        return towards_bodies(family, reader().encoder, device)
    guide, used = towards_faces(family, device)
    for person in people:
        if person.face_model not in ("", used["guide_face"]):
            raise _by_another(option, person, "face model", family)
    return guide, used


def _check_encoder(option: str, people: list[Identity], space: str, family: Family) -> None:
    for person in people:
        if person.body_encoder != space:
            raise _by_another(option, person, "body encoder", family)


def _by_another(option: str, person: Identity, model: str, family: Family) -> BolidError:
    return BolidError(
        f"{option}: {person.name} was made with another {model} than that of family '{family.name}'",
        "make the profile again with: bolid profile",
    )


def _from_profile(family: Family, path: PathLike, folder: str) -> Identity:
    from bolid.formats.profile import load_profile

    person = load_profile(path)
    match_family(family.name, person.record["family"], path)
    vectors = {"body": person.body_mean} | ({"face": person.face} if person.face is not None else {})
    made_with = person.record["inputs"]
    # The photos too: `evaluate` must not score a picture against a photo that it could have copied.
    photos = {name: sha for name, sha in made_with.items() if name.startswith("photo_")}
    inputs = {"profile": sha256_file(path), **photos}
    name = f"the profile {Path(path).name}"
    encoder, face_model = made_with.get("body_encoder", ""), made_with.get("face_model", "")
    return Identity(vectors, encoder, face_model, inputs, name, folder)


def _family(option: str | None, profiles: Sequence[PathLike], adapter: PathLike | None) -> Family:
    """The family that the profiles, or else the adapter, were made with; else the one asked for or chosen."""
    from bolid.formats.tensors import read_record

    made = list(profiles)
    if adapter is not None:
        made += [path for path in _files_in(adapter).values() if path.is_file()]
    return match_family(option, read_record(made[0])["family"], made[0]) if made else get_family(option)


# ---- adapters -----------------------------------------------------------------------------------------------------


def _adapter_files(family: Family, adapter: PathLike | None) -> dict[str, Path]:
    if adapter is None:
        return {"face": family.face_adapter, "body": family.body_adapter}
    return _files_in(adapter)


def _files_in(adapter: PathLike) -> dict[str, Path]:
    return {branch: Path(adapter) / f"{branch}.safetensors" for branch in ("face", "body")}


def _require_adapter(family: Family, files: dict[str, Path], branch: str) -> Path:
    if files[branch] == getattr(family, f"{branch}_adapter"):
        return family.require(f"{branch}_adapter")
    if not files[branch].is_file():
        raise BolidError(f"there is no {branch} adapter {files[branch]}", "make it with: bolid train-adapter")
    return files[branch]


def _branches(family: Family, files: dict[str, Path], people: list[Identity], cells: list[Cell]) -> list[str]:
    """The branches to load: those that some picture uses. Raises BolidError for a weight of what is not there."""
    used = []
    for branch in ("face", "body"):
        asked = [cell.scales[branch] for cell in cells if branch in cell.scales and not cell.scales[branch].is_zero]
        without = [person for person in people if branch not in person.vectors]
        if asked and without:
            if without[0].name == "nobody":
                raise BolidError(
                    f"--{branch}-scale is {asked[0].plain()}, but nobody is to be shown",
                    "add --profile, --reference or --new-person, or leave out the scale",
                )
            raise BolidError(
                f"{without[0].name} has no {branch}, but --{branch}-scale is {asked[0].plain()}",
                f"leave out --{branch}-scale, or make the profile again with a photo that shows the {branch}",
            )
        if asked and not files[branch].is_file():
            raise BolidError(
                f"--{branch}-scale is {asked[0].plain()}, but there is no {branch} adapter {files[branch]}",
                f"leave out --{branch}-scale, or make that adapter with: bolid train-adapter",
            )
        # A branch at scale 0 is not even loaded: less to compute, and bit-equal to the base without it.
        if asked or (len(without) < len(people) and any(branch not in cell.scales for cell in cells)):
            used.append(branch)
    there = [branch for branch in used if files[branch].is_file()]
    if used and not there:
        _require_adapter(family, files, used[0])
    return there


def _load_adapters(
    pipe: Any, family: Family, files: dict[str, Path], branches: list[str], people: list[Identity]
) -> dict[str, str]:
    """Load the branches into the pipeline in one call (a second would replace the first); returns their hashes."""
    from bolid.backends.diffusion import quiet_diffusers
    from bolid.formats.adapter import load_adapter, nested_state_dict

    states, inputs = [], {}
    for branch in branches:
        path = _require_adapter(family, files, branch)
        tensors, record = load_adapter(path, branch)
        match_family(family.name, record["family"], path)
        first = "image_proj.proj.weight" if branch == "body" else "image_proj.proj.0.weight"
        dim = tensors[first].shape[1]
        for person in people:
            _check_belongs(person, branch, path, record, dim)
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


def _check_belongs(person: Identity, branch: str, path: Path, record: dict[str, Any], dim: int) -> None:
    """BolidError unless the person's vector means to this adapter what it meant in its training."""
    if branch not in person.vectors:
        return
    if branch == "body" and record["inputs"].get("body_encoder") != person.body_encoder:
        raise BolidError(
            f"{person.name} and the body adapter {path} were made with different body encoders",
            "make the profile again with the body encoder that the adapter was trained with",
        )
    trained_with = record["inputs"].get("face_model", "")
    if branch == "face" and trained_with and person.face_model and trained_with != person.face_model:
        raise BolidError(
            f"{person.name} and the face adapter {path} were made with different face models",
            "make the profile again with the face model that the adapter was trained with",
        )
    if dim != len(person.vectors[branch]):
        raise BolidError(
            f"the {branch} adapter {path} takes {dim} numbers, {person.name} has {len(person.vectors[branch])}",
            "make the profile again with this family",
        )


# ---- small things -------------------------------------------------------------------------------------------------


def _cell(base: Cell, values: dict[str, str]) -> Cell:
    """A cell of the grid: `base` but for what `values` say."""
    scales, guidance, towards = dict(base.scales), base.guidance, dict(base.towards)
    numbers = {"steps": base.steps, "seed": base.seed}
    for axis, value in values.items():
        if axis.endswith("-scale"):
            scales[axis.removesuffix("-scale")] = parse_scale(value, f"--grid {axis}")
            continue
        if axis == "guidance":
            guidance = parse_guidance(value, "--grid guidance")
            continue
        if axis.endswith("-guidance"):
            part = axis.removesuffix("-guidance")
            towards[part] = parse_person_guidance(value, part, f"--grid {axis}")
            continue
        try:
            numbers[axis] = int(value)
        except ValueError:
            raise BolidError(f"--grid {axis} has the value {value!r}", "give a whole number") from None
    return Cell(scales, numbers["steps"], guidance, towards, numbers["seed"], values)


def _check_cell(cell: Cell, negative: str, few_steps: bool) -> None:
    _check_numbers(steps=cell.steps)
    if cell.seed < 0:
        raise BolidError(f"--seed is {cell.seed}", "give 0 or more")
    if few_steps and cell.guidance.up > 1:
        raise BolidError(
            f"--guidance is {cell.guidance.up:g} with --few-steps",
            "the few-step sampler has its guidance built in: leave one of the two out",
        )
    if negative and cell.guidance.up <= 1:
        raise BolidError(
            f"--negative has no effect at guidance {cell.guidance.up:g}",
            "leave it out, or give a --guidance above 1" if not few_steps else "leave it out with --few-steps",
        )
    stretches = {f"{branch}-scale": scale for branch, scale in cell.scales.items()}
    stretches |= {"guidance": cell.guidance} | {f"{part}-guidance": weight for part, weight in cell.towards.items()}
    for name, scale in stretches.items():
        if not scale.is_zero and not scale.steps(cell.steps):
            raise BolidError(
                f"--{name} {scale.plain()} covers none of the {cell.steps} steps",
                "give a longer stretch, or more --steps",
            )


def _check_sampler(pipe: Any, cells: list[Cell]) -> None:
    for steps in {cell.steps for cell in cells}:
        try:
            pipe.scheduler.set_timesteps(steps)
        except ValueError as error:
            raise BolidError(f"--steps {steps} does not suit the sampler: {error}", "give fewer") from error


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
