"""The nodes: what they take, what they give, and which function of BoLID does the work.

A profile travels from node to node as the path of its file. Files are looked for in ComfyUI's own folders alone:
profiles in `input` and `output`, adapters in folders of `models/bolid`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bolid.errors import BolidError
from bolid.formats.parsing import parse_assignments
from bolid.models.families import FAMILY_NAMES, get_family, match_family
from bolid.run import sha256_file

CATEGORY = "BoLID"
OWN_ADAPTER = "the family's own"
CHOSEN_FAMILY = "the chosen one"
PROFILE = "BOLID_PROFILE"
_MAPS = ("depth", "normal", "openpose", "silhouette")


def _with_hint(function: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI shows an error's message: here with what to do about it."""

    @functools.wraps(function)
    def node(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except BolidError as error:
            raise BolidError(f"{error.message}: {error.hint}" if error.hint else error.message) from error

    return node


class LoadProfile:
    """A person's file that `bolid profile` or a node wrote."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (PROFILE, "STRING"), ("profile", "measurements")
    DESCRIPTION = "Load a person: a .safetensors file that `bolid profile` wrote, in ComfyUI's input or output folder."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        return {"required": {"profile": (_profiles(),)}}

    @classmethod
    def IS_CHANGED(cls, profile: str) -> str:  # noqa: D102, N802
        return sha256_file(_profile_path(profile))

    @_with_hint
    def load(self, profile: str) -> tuple[Path, str]:
        """(the file, its measurements as text)."""
        from bolid.formats.profile import load_profile

        path = _profile_path(profile)
        load_profile(path)  # raises for a damaged file here, not in a later node
        return path, _measurements(path)


class ProfileFromImages:
    """Photos of one person to a profile."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES, RETURN_NAMES = (PROFILE, "STRING"), ("profile", "measurements")
    DESCRIPTION = "Make a person's profile from photos: output/bolid/NAME.safetensors. One photo is enough."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        known = {"multiline": True, "default": "", "placeholder": "height=172\nwaist=80±2"}
        return {
            "required": {"images": ("IMAGE",), "name": ("STRING", {"default": "me"}), "family": (_families(),)},
            "optional": {"measurements": ("STRING", known)},
        }

    @_with_hint
    def make(self, images: torch.Tensor, name: str, family: str, measurements: str = "") -> tuple[Path, str]:
        """(the file, its measurements as text)."""
        from bolid.body.profiles import read_known
        from bolid.profile import make_profile

        lines = filter(str.strip, measurements.splitlines())
        known = read_known(parse_assignments(lines, "the line", "height=172"))
        with _pictures(images) as folder:
            result = make_profile([folder], _output(name), known=known or None, family=_family(family))
        return result.path, _measurements(result.path)


class EditProfile:
    """A profile with another body, in centimetres."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = (PROFILE, "STRING"), ("profile", "measurements")
    DESCRIPTION = "Change a body's measurements by so many centimetres (kilograms). The face stays."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        from bolid.body.measurements import MEASUREMENTS

        changes = {
            row.name: ("FLOAT", {"default": 0.0, "min": -60.0, "max": 60.0, "step": 0.5,
                                 "tooltip": f"{row.title}: {row.definition}. Change in {row.unit}."})
            for row in MEASUREMENTS
        }  # fmt: skip
        others = (["stay", "follow"], {"tooltip": "The other measurements: as they are, or as in the population."})
        return {
            "required": {"profile": (PROFILE,), "name": ("STRING", {"default": "edited"}), "others": others, **changes}
        }

    @_with_hint
    def edit(self, profile: Path, name: str, others: str, **changes: float) -> tuple[Path, str]:
        """(the new file, its measurements as text); the profile itself where nothing changes."""
        from bolid.body.measurements import MEASUREMENTS
        from bolid.profile import edit_profile

        texts = {row.name: f"{changes[row.name]:+g}{row.unit}" for row in MEASUREMENTS if changes.get(row.name)}
        if not texts:
            return profile, _measurements(profile)
        made = edit_profile(profile, _output(name), changes=texts, hold=others == "stay")
        return made.path, _measurements(made.path)


class ApplyProfile:
    """The face and the body branch in a model."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Show this person: face and body branch as patches of an SD 1.5 or SDXL model's cross-attentions."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        scale = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.05})
        at = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "profile": (PROFILE,),
                "adapter": ([OWN_ADAPTER, *_adapters()],),
                "face_scale": scale,
                "body_scale": scale,
                "start": ("FLOAT", {"default": 0.0, **at, "tooltip": "Of the sampler's steps: 0 is pure noise."}),
                "end": ("FLOAT", {"default": 1.0, **at, "tooltip": "Of the sampler's steps: 1 is the picture."}),
            },
            "optional": {"mask": ("MASK", {"tooltip": "Where in the picture the person is shown."})},
        }

    @_with_hint
    def apply(
        self,
        model: Any,
        profile: Path,
        adapter: str,
        face_scale: float,
        body_scale: float,
        start: float,
        end: float,
        mask: torch.Tensor | None = None,
    ) -> tuple[Any]:
        """The patched clone. Raises BolidError for files that do not belong together."""
        from bolid.comfyui.branches import apply_branches, make_branch
        from bolid.scales import Scale

        if not start < end:
            raise BolidError(f"the interval {start:g} to {end:g} is empty", "give a start below the end")
        weights = {"face": face_scale, "body": body_scale}
        found = _adapter_branches(profile, adapter, [branch for branch, weight in weights.items() if weight])
        if not found and any(weights.values()):
            raise BolidError(
                f"no adapter for {profile.name}: {adapter!r} has none for its face and body",
                "put face.safetensors and body.safetensors into a folder of models/bolid, and choose that",
            )
        scales = {branch: Scale(weight, weight, weight, start, end) for branch, weight in weights.items()}
        branches = [make_branch(tensors, vector, scales[branch], mask) for branch, tensors, vector in found]
        return (apply_branches(model, branches),)


class ShapeMaps:
    """A profile's body as pictures for ControlNets."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",) * 4, _MAPS
    DESCRIPTION = "The person's 3D body in a pose, as depth, normal, openpose and silhouette for ControlNets."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        from bolid.body.mesh import poses

        side = {"min": 64, "max": 4096, "step": 8}
        return {
            "required": {
                "profile": (PROFILE,),
                "pose": (list(poses()), {"default": "standing"}),
                "width": ("INT", {"default": 832, **side}),
                "height": ("INT", {"default": 1216, **side}),
                "turn": ("FLOAT", {"default": 0.0, "min": -180.0, "max": 180.0, "step": 5.0, "tooltip": "Degrees."}),
            }
        }

    @_with_hint
    def draw(self, profile: Path, pose: str, width: int, height: int, turn: float) -> tuple[torch.Tensor, ...]:
        """The four maps, f32 [1, H, W, 3] in 0..1."""
        from bolid.body.maps import control_maps
        from bolid.body.mesh import body_model
        from bolid.body.shape import within_bounds
        from bolid.profile import body_of

        body = within_bounds(body_of(profile)[0].mean)
        maps = control_maps(body_model(), body, _MAPS, pose=pose, size=(height, width), turn=turn)
        return tuple(torch.from_numpy(maps[name])[None].float() / 255 for name in _MAPS)


class Evaluate:
    """Scores of pictures of a person."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "evaluate", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("figures",)
    DESCRIPTION = "Score pictures: do they follow the prompt, and are face and body those of the reference photos?"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: D102, N802
        prompt = ("STRING", {"multiline": True, "default": ""})
        return {
            "required": {"images": ("IMAGE",), "references": ("IMAGE",), "prompt": prompt, "family": (_families(),)},
            "optional": {"profile": (PROFILE,)},
        }

    @_with_hint
    def evaluate(
        self, images: torch.Tensor, references: torch.Tensor, prompt: str, family: str, profile: Path | None = None
    ) -> dict[str, Any]:
        """A table as text: metric, value, its 95 % interval, n."""
        from bolid.evaluate import evaluate
        from bolid.run import canonical_json

        with _pictures(images) as folder, _pictures(references) as photos:
            rows = [{"file": path.name, "prompt": prompt} for path in sorted(folder.iterdir())]
            (folder / "prompts.jsonl").write_text("\n".join(map(canonical_json, rows)), encoding="utf-8")
            profiles = [] if profile is None else [profile]
            found = evaluate(folder, photos, profiles=profiles, family=_family(family))
        lines = [
            f"{name}: {m.value:.3f}" + (f" ({m.low:.3f} to {m.high:.3f})" if m.low is not None else "") + f", n {m.n}"
            for name, m in (found.metrics if found else {}).items()
            if m.value is not None
        ]
        return {"ui": {"text": lines}, "result": ("\n".join(lines),)}


NODE_CLASS_MAPPINGS = {
    "BolidLoadProfile": LoadProfile,
    "BolidProfileFromImages": ProfileFromImages,
    "BolidEditProfile": EditProfile,
    "BolidApplyProfile": ApplyProfile,
    "BolidShapeMaps": ShapeMaps,
    "BolidEvaluate": Evaluate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "BolidLoadProfile": "Load Profile (BoLID)",
    "BolidProfileFromImages": "Profile from Images (BoLID)",
    "BolidEditProfile": "Edit Profile, cm (BoLID)",
    "BolidApplyProfile": "Apply Profile to SD/SDXL (BoLID)",
    "BolidShapeMaps": "Shape Maps (BoLID)",
    "BolidEvaluate": "Evaluate (BoLID)",
}


# ---- files, in ComfyUI's folders ----------------------------------------------------------------------------------


def _profiles() -> list[str]:
    """Files of profiles, those of the output folder with ComfyUI's mark."""
    import folder_paths

    places = {"": folder_paths.get_input_directory(), " [output]": folder_paths.get_output_directory()}
    return [
        path.relative_to(place).as_posix() + mark
        for mark, place in places.items()
        for path in sorted(Path(place).rglob("*.safetensors"))
        if not path.name.startswith(".")
    ]


def _profile_path(name: str) -> Path:
    import folder_paths

    path = Path(folder_paths.get_annotated_filepath(name))
    roots = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    if not any(path.resolve().is_relative_to(Path(root).resolve()) for root in roots):
        raise BolidError(f"{name} is not in ComfyUI's input or output folder", "copy the profile there")
    return path


def _adapter_root() -> Path:
    import folder_paths

    return Path(folder_paths.models_dir) / "bolid"


def _adapters() -> list[str]:
    """Folders of `models/bolid` with a face or a body adapter in them."""
    files = sorted([*_adapter_root().rglob("face.safetensors"), *_adapter_root().rglob("body.safetensors")])
    return list(dict.fromkeys(file.parent.relative_to(_adapter_root()).as_posix() for file in files))


def _output(name: str) -> Path:
    """Where a new profile goes. Raises BolidError for a name that is a path."""
    import folder_paths

    if not re.fullmatch(r"\w[\w .-]{0,80}", name):
        raise BolidError(f"the name {name!r} names no file", "give letters, digits, - and _")
    return Path(folder_paths.get_output_directory()) / "bolid" / f"{name}.safetensors"


def _families() -> list[str]:
    return [CHOSEN_FAMILY, *FAMILY_NAMES]


def _family(name: str) -> str | None:
    return None if name == CHOSEN_FAMILY else name


@contextlib.contextmanager
def _pictures(images: torch.Tensor) -> Iterator[Path]:
    """A folder that holds the pictures of an IMAGE, f32 [N, H, W, 3] in 0..1, as PNG; it goes afterwards."""
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="bolid-") as folder:
        for number, image in enumerate((images[..., :3] * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu().numpy()):
            Image.fromarray(np.ascontiguousarray(image)).save(Path(folder) / f"{number:04d}.png")
        yield Path(folder)


# ---- what they have in common -------------------------------------------------------------------------------------


def _measurements(path: Path) -> str:
    from bolid.profile import show_profile

    try:
        rows = show_profile(path)
    except BolidError as error:  # an encoder that knows no shape
        return error.message
    return "\n".join(f"{row.title}: {row.value:.1f} ± {row.sd:.1f} {row.unit}" for row in rows)


def _adapter_branches(
    profile: Path, adapter: str, wanted: Sequence[str]
) -> list[tuple[str, dict[str, torch.Tensor], torch.Tensor]]:
    """(branch, tensors of its file, the person's vector) of the wanted branches that both have."""
    from bolid.formats.adapter import load_adapter
    from bolid.generate.adapters import LoadedAdapter, check_belongs
    from bolid.generate.identity import identity_of

    person, family = identity_of(profile)
    found = []
    for branch in wanted:
        path = Path(getattr(get_family(family), f"{branch}_adapter"))
        if adapter != OWN_ADAPTER:
            path = _adapter_root() / adapter / f"{branch}.safetensors"
        if branch not in person.vectors or not path.is_file():
            continue
        tensors, record = load_adapter(path, branch)
        match_family(family, record["family"], path)
        dim = tensors["image_proj.proj.weight" if branch == "body" else "image_proj.proj.0.weight"].shape[1]
        check_belongs(person, branch, LoadedAdapter(path, sha256_file(path), record, dim))
        found.append((branch, tensors, person.vectors[branch]))
    return found
