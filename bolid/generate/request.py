"""The request to `bolid generate`: parsed, checked, and laid out in the cells of a grid. Loads no model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.images import printable
from bolid.formats.pictures import FORMATS
from bolid.generate.shape_map import ADAPTER, BODY_FROM, BOTH, POSE, SHAPE, SHAPE_ALONE, check_pose
from bolid.models.families import Family, get_family, match_family
from bolid.run import LARGEST_SEED, derive_seed, pick_device
from bolid.scales import Scale, parse_grid, parse_guidance, parse_lora, parse_person_guidance, parse_scale

PathLike = str | os.PathLike[str]
WITH_POSE = BOTH
"""Where bodies come from where a --pose is given: what kept them better (docs/results/family.md)."""
PICTURE_SEED = 2**32
"""A seed of this or more is one picture's own, from its record: the first picture is sampled with it as it stands."""


@dataclass(frozen=True)
class Cell:
    """The settings of a cell of the grid. Without a grid there is one."""

    scales: dict[str, Scale]  # branch -> lambda, of those that are given
    steps: int
    timesteps: tuple[int, ...]  # of the steps, where the family names them; else the sampler's own
    guidance: Scale
    person_guidance: dict[str, Scale]  # "face", "body" -> weight of its guidance loss
    seed: int
    values: dict[str, str]  # axis of the grid -> the value as written

    def at(self, values: dict[str, str]) -> Cell:
        """The cell of the grid with these `values`, in everything else like this one."""
        cell = replace(self, scales=dict(self.scales), person_guidance=dict(self.person_guidance), values=values)
        for axis, value in values.items():
            part, _, kind = axis.rpartition("-")
            if kind == "scale":
                cell.scales[part] = parse_scale(value, f"--grid {axis}")
            elif axis == "guidance":
                cell = replace(cell, guidance=parse_guidance(value, "--grid guidance"))
            elif kind == "guidance":
                cell.person_guidance[part] = parse_person_guidance(value, part, f"--grid {axis}")
            elif not value.isdecimal():
                raise BolidError(f"--grid {axis} has the value {value!r}", "give a whole number")
            else:
                cell = replace(
                    cell, **({"steps": int(value), "timesteps": ()} if axis == "steps" else {"seed": int(value)})
                )
        return cell

    def check(self, negative: str, few_steps: bool, guidance_given: bool) -> None:
        """BolidError where the settings contradict each other or an interval that was given covers no step."""
        check_positive(steps=self.steps)
        if not 0 <= self.seed <= LARGEST_SEED:
            raise BolidError(f"--seed is {self.seed}", f"give 0 to {LARGEST_SEED}")
        if few_steps and self.guidance.value > 1:
            raise BolidError(
                f"--guidance is {self.guidance.value:g} with --few-steps",
                "the few-step sampler has its guidance built in: leave one of the two out",
            )
        if negative and self.guidance.value <= 1:
            raise BolidError(
                f"--negative has no effect at guidance {self.guidance.value:g}",
                "leave it out, or give a --guidance above 1" if not few_steps else "leave it out with --few-steps",
            )
        intervals = {f"{branch}-scale": (scale, self.steps) for branch, scale in self.scales.items()}
        if guidance_given:
            intervals["guidance"] = (self.guidance, self.steps)
        for part, weight in self.person_guidance.items():  # never in the last step, see LossGuidance
            intervals[f"{part}-guidance"] = (weight, self.steps - 1)
        for name, (scale, last) in intervals.items():
            if not scale.is_zero and scale.steps(self.steps).start >= min(scale.steps(self.steps).stop, last):
                steps = f"{self.steps} steps" if last == self.steps else f"{self.steps} steps but the last"
                raise BolidError(
                    f"--{name} {scale.plain()} covers none of the {steps}", "give a longer interval, or more --steps"
                )


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, and what they mean. `check` raises BolidError for those that make no sense."""

    prompts: tuple[str, ...]
    out: Path
    profiles: tuple[PathLike, ...]
    photo: PathLike | None
    new_person: int | None
    adapter: PathLike | None
    face_scale: float | str | None
    body_scale: float | str | None
    lora: tuple[str, ...]
    pose_from: PathLike | None
    pose_scale: float | str
    body_from: str | None
    pose: str | None
    shape_scale: float | str
    few_steps: bool
    steps: int | None
    guidance: float | str | None
    face_guidance: float | str
    body_guidance: float | str
    negative: str
    n: int
    best_of: int
    batch_size: int
    grid: tuple[str, ...]
    family_name: str | None
    base: PathLike | None
    size: str | None
    upscale: int
    refine_face: bool
    dtype: str
    offload: bool
    device_name: str
    seed: int | None
    force: bool
    format: str = "png"

    def check(self) -> None:
        """Everything that can be known without a model. BolidError names the first thing that is wrong."""
        if not self.prompts:
            raise BolidError(
                "no prompt given", 'say what to show, for example: bolid generate "a full body photo of a woman"'
            )
        if sum((bool(self.profiles), self.photo is not None, self.new_person is not None)) > 1:
            raise BolidError(
                "more than one person given",
                "choose one of --profile, --photo and --new-person; --profile may be given several times",
            )
        if self.few_steps and not self.family.few_steps:
            raise BolidError(
                f"family '{self.family.name}' has no few-step sampler for --few-steps",
                "leave it out, or choose a family that has one: tiny, sd15, sdxl",
            )
        if self.upscale not in (1, 2, 4):
            raise BolidError(f"--upscale is {self.upscale}", "give 2 or 4")
        check_positive(n=self.n, best_of=self.best_of, batch_size=self.batch_size)
        for cell in self.cells:
            cell.check(self.negative, self.few_steps, self.guidance is not None or "guidance" in cell.values)
        if not self.pose_weight.is_uniform:
            raise BolidError(
                f"--pose-scale is {self.pose_scale}", "it has no parts: give a number, an interval or 1@0..0.5"
            )
        self._check_body_from()
        _ = self.loras
        if self.format not in FORMATS:
            raise BolidError(f"--format is {self.format!r}", f"choose {', '.join(FORMATS)}")
        if self.offload and self.device == "cpu":
            raise BolidError("--offload spares the memory of an accelerator, and there is none", "leave it out")
        if self.offload and self.guided_parts:
            raise BolidError(
                f"--{self.guided_parts[0]}-guidance needs all networks at once, which --offload takes apart",
                "leave one of the two out",
            )
        if self.out.exists() and not self.out.is_dir():
            raise BolidError(f"--out {self.out} is a file", "give a folder for the pictures")

    def _check_body_from(self) -> None:
        """BolidError for settings of the 3D body that contradict each other."""
        if self.body_from is not None and self.body_from not in BODY_FROM:
            raise BolidError(f"--body-from is {self.body_from!r}", f"choose one of {', '.join(BODY_FROM)}")
        if self.pose is not None:
            check_pose(self.pose)
            if self.pose_from is not None or self.body_from == ADAPTER:
                other = "--pose-from" if self.pose_from is not None else "--body-from adapter"
                raise BolidError(f"--pose is given with {other}", "leave one of the two out")
        if not self.uses_shape:
            return
        if self.shape_alone and any("body" in cell.scales for cell in self.cells):
            raise BolidError(
                "--body-scale is given with --body-from shape, which does without the body branch",
                "leave it out, or give --body-from both",
            )
        if not self.shape_weight.is_uniform:
            raise BolidError(
                f"--shape-scale is {self.shape_scale}", "it has no parts: give a number, an interval or 1@0..0.5"
            )

    @property
    def uses_shape(self) -> bool:
        """Whether pictures follow the depth map of the 3D body."""
        return self.body_from in (SHAPE, BOTH) or (self.body_from is None and self.pose is not None)

    @property
    def shape_alone(self) -> bool:
        """Whether the body branch stays out."""
        return (self.body_from or (WITH_POSE if self.pose is not None else ADAPTER)) == SHAPE

    @cached_property
    def shape_weight(self) -> Scale:
        """The scale of the depth ControlNet, with its interval."""
        return parse_scale(self.shape_scale, "--shape-scale")

    @cached_property
    def family(self) -> Family:
        """The family that the profiles, or else the adapter, were made with; else the one given or chosen."""
        from bolid.formats.tensors import read_record

        made = list(self.profiles)
        if self.adapter is not None:
            made += [path for path in _files_in(self.adapter).values() if path.is_file()]
        name = self.family_name
        if self.shape_alone and name is not None:  # a 3D body belongs to no family
            made = made[len(self.profiles) :]
        instead = SHAPE_ALONE if self.profiles else ""
        family = match_family(name, read_record(made[0])["family"], made[0], instead) if made else get_family(name)
        return family.with_base(self.base).with_size(self.size)

    @property
    def adapter_files(self) -> dict[str, Path]:
        """Branch -> the file of its adapter, there or not: of --adapter, else the family's."""
        if self.adapter is not None:
            return _files_in(self.adapter)
        return {"face": getattr(self.family, self._face_part), "body": self.family.body_adapter}

    @property
    def _face_part(self) -> str:
        """The family's own face adapter; where it has none, the published one."""
        published = not self.family.has("face_adapter") and self.family.has("face_portrait")
        return "face_portrait" if published else "face_adapter"

    def require_adapter(self, branch: str) -> Path:
        """The adapter of a branch. BolidError says how to get one that is not there."""
        if self.adapter is None:
            return self.family.require("body_adapter" if branch == "body" else self._face_part)
        path = self.adapter_files[branch]
        if not path.is_file():
            raise BolidError(f"there is no {branch} adapter {path}", "make it with: bolid train-adapter")
        return path

    @property
    def sampler(self) -> dict[str, Any]:
        """The family's settings of the sampling, those of its few-step sampler with --few-steps."""
        return self.family.few_steps if self.few_steps else self.family.defaults

    @cached_property
    def cells(self) -> list[Cell]:
        """Of the grid, the first axis varying slowest; without a grid there is one."""
        scales = {"face": self.face_scale, "body": self.body_scale}
        guidance = self.sampler.get("guidance", 5.0) if self.guidance is None else self.guidance
        timesteps = tuple(int(t) for t in self.sampler.get("timesteps", ()))
        cell = Cell(
            scales={b: parse_scale(value, f"--{b}-scale") for b, value in scales.items() if value is not None},
            steps=len(timesteps) or int(self.sampler.get("steps", 30)) if self.steps is None else self.steps,
            timesteps=timesteps if self.steps in (None, len(timesteps)) else (),
            guidance=parse_guidance(guidance),
            person_guidance={
                "face": parse_person_guidance(self.face_guidance, "face"),
                "body": parse_person_guidance(self.body_guidance, "body"),
            },
            seed=self.seed or 0,
            values={},
        )
        return [cell.at(values) for values in parse_grid(self.grid)]

    @cached_property
    def pose_weight(self) -> Scale:
        """The scale of the ControlNet, with its interval."""
        return parse_scale(self.pose_scale, "--pose-scale")

    @property
    def control_part(self) -> str | None:
        """The family's part whose ControlNet the pictures follow; None without one."""
        if self.uses_shape:
            return "depth_controlnet"
        return None if self.pose_from is None else "controlnet"

    @property
    def control_weight(self) -> Scale:
        """The scale of that ControlNet."""
        return self.shape_weight if self.uses_shape else self.pose_weight

    @cached_property
    def loras(self) -> list[tuple[Path, float]]:
        """(file, weight) of each LoRA."""
        return [parse_lora(text) for text in self.lora]

    @cached_property
    def device(self) -> str:
        """The torch device."""
        return pick_device(self.device_name)

    @property
    def guided_parts(self) -> list[str]:
        """Those of "body" and "face" that some cell has guidance for."""
        weights = [item for cell in self.cells for item in cell.person_guidance.items()]
        return sorted({part for part, weight in weights if not weight.is_zero})

    @cached_property
    def jobs(self) -> list[tuple[int, int]]:
        """(prompt, number) of each picture of a person and a cell."""
        return [(index, number) for index in range(len(self.prompts)) for number in range(self.n)]

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the request that is the same in every picture's record."""
        settings: dict[str, Any] = {
            "negative": self.negative, "lora": list(self.lora), "few_steps": self.few_steps, "best_of": self.best_of,
            "size": "{1}x{0}".format(*self.family.image_size),
        }  # fmt: skip
        if self.upscale != 1:
            settings["upscale"] = self.upscale
        if self.refine_face:
            settings["refine_face"] = True
        if self.dtype != "auto":
            settings["dtype"] = self.dtype
        if self.base is not None:
            settings["base"] = printable(Path(self.base).name)
        if self.pose_from is not None:
            settings |= {"pose_from": printable(Path(self.pose_from).name), "pose_scale": self.pose_weight.plain()}
        if self.uses_shape:
            settings |= {"body_from": SHAPE if self.shape_alone else BOTH, "shape_scale": self.shape_weight.plain()}
            settings |= {} if self.pose_from is not None else {"pose": self.pose or POSE}
        return settings

    def file_name(self, index: int, number: int) -> str:
        """Of a picture: its place in the list, and the prompt's first words."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompts[index].lower()).strip("-")[:48].strip("-") or "picture"
        digits = max(3, len(str(len(self.prompts) - 1)))
        return f"{index:0{digits}d}-{words}{f'-{number}' if self.n > 1 else ''}.{self.format}"


def picture_seed(seed: int, index: int, number: int, candidate: int = 0) -> int:
    """The seed of one picture's noise, which its record gives: `--seed` with it makes that very picture first.

    `index`: of the prompt; `number`: which of `n`; `candidate`: which of `best_of`.
    """
    if seed >= PICTURE_SEED and index == number == candidate == 0:
        return seed
    return derive_seed(seed, "generate", index, number, *(("candidate", candidate) if candidate else ()))


def _files_in(adapter: PathLike) -> dict[str, Path]:
    return {branch: Path(adapter) / f"{branch}.safetensors" for branch in ("face", "body")}


def check_positive(**numbers: int) -> None:
    """BolidError, naming the option, for a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
            raise BolidError(f"{option} is {value}", "give at least 1")
