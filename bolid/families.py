"""Model families: which models belong together, where their files are, and which family a command uses.

A family is a directory with one fixed layout (``_LAYOUT``) and a few numbers as data. ``tiny`` is embedded in the
package; the full-size ones live under BOLID_HOME; anyone can write a TOML file of their own (see ``get_family``).
Standard library only.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.run import home, write_atomic

# part -> (path inside the family's directory, what is expected there)
_LAYOUT = {
    "base": ("base", "a diffusers pipeline directory (model_index.json inside)"),
    "pose": ("pose", "a YOLO pose model: model.safetensors and config.json"),
    "face": ("face", "an InsightFace pack: ONNX files"),
    "image_text": ("image_text", "an open_clip model: open_clip_config.json and open_clip_model.safetensors"),
    "body_encoder": ("body-encoder.safetensors", "the body encoder that `bolid train-vae` writes"),
    "face_adapter": ("adapter/face.safetensors", "the face adapter that `bolid train-adapter` writes"),
    "body_adapter": ("adapter/body.safetensors", "the body adapter that `bolid train-adapter` writes"),
    "probe": ("probe", "the body probe that measures generated pictures"),
}

PARTS = tuple(_LAYOUT)

# What a family may have besides. Nothing but the options that ask for it needs it.
_OPTIONAL = {
    "controlnet": ("controlnet", "an openpose ControlNet: config.json and diffusion_pytorch_model.safetensors"),
    "few_steps_lora": ("few-steps.safetensors", "a LoRA that lets the base paint in a few steps (LCM or Lightning)"),
    "body_sliders": ("body-sliders.safetensors", "the sliders measured for this body encoder"),
}
_WORDS = {"controlnet": "ControlNet", "few_steps_lora": "few-step LoRA", "body_sliders": "body sliders"}

# Data, not code: what the full-size families need beside their weights.
_FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd15": {
        "description": "Stable Diffusion 1.5, 512x512",
        "image_size": [512, 512],
        "defaults": {"steps": 30, "guidance": 7.0},
        "few_steps": {"steps": 4, "guidance": 0.0, "scheduler": "LCMScheduler"},  # for LCM-LoRA
    },
    "sdxl": {
        "description": "Stable Diffusion XL 1.0, 1024x1024",
        "image_size": [1024, 1024],
        "defaults": {"steps": 30, "guidance": 5.0},
        # for SDXL-Lightning's LoRA
        "few_steps": {
            "steps": 4,
            "guidance": 0.0,
            "scheduler": "EulerDiscreteScheduler",
            "timestep_spacing": "trailing",
        },
    },
    "sdxl-lightning": {
        "description": "SDXL-Lightning, 4 steps, 1024x1024",
        "image_size": [1024, 1024],
        "defaults": {"steps": 4, "guidance": 0.0, "timestep_spacing": "trailing"},
    },
}

DEFAULT_FAMILY = "tiny"
FAMILY_NAMES = (DEFAULT_FAMILY, *_FULL_SIZE)


@dataclass(frozen=True)
class Family:
    """One set of models that belong together. The paths may not exist: ask ``require`` before loading."""

    name: str
    root: Path
    image_size: tuple[int, int]  # (height, width) of generated pictures, pixels
    base: Path
    pose: Path
    face: Path
    image_text: Path
    body_encoder: Path
    face_adapter: Path
    body_adapter: Path
    probe: Path | None
    view_size: tuple[int, int]  # (height, width) at which the body encoder is shown photos: image_size or finer
    controlnet: Path
    few_steps_lora: Path
    body_sliders: Path
    defaults: dict[str, Any] = field(default_factory=dict)  # steps, guidance, ...: what generate starts from
    few_steps: dict[str, Any] = field(default_factory=dict)  # what --few-steps starts from; empty: not offered
    description: str = ""

    def require(self, part: str) -> Path:
        """The path of ``part`` ("base", "pose", ...), or a BolidError that names the missing file and the way to it."""
        path: Path | None = getattr(self, part)
        if path is not None and (any(path.iterdir()) if path.is_dir() else path.is_file()):
            return path
        location = path if path is not None else self.root / (_LAYOUT | _OPTIONAL)[part][0]
        raise BolidError(
            f"family {self.name!r} has no {_WORDS.get(part, part.replace('_', ' ') + ' model')}: looked for {location}",
            _how_to_get(self.name, part),
        )

    def missing(self) -> list[str]:
        """The parts whose files are not there."""
        absent = []
        for part in _LAYOUT:
            try:
                self.require(part)
            except BolidError:
                absent.append(part)
        return absent


def _how_to_get(family: str, part: str) -> str:
    if part in _OPTIONAL:
        return f"put it there: {_OPTIONAL[part][1]}; examples/tiny_family/ has scripts that make one"
    if family == DEFAULT_FAMILY:
        return "it ships with the package: install bolid again, or train it with the scripts in examples/tiny_family/"
    command = {"body_encoder": "bolid train-vae", "face_adapter": "bolid train-adapter"}.get(part)
    command = command or {"body_adapter": "bolid train-adapter"}.get(part)
    made = f"make it with `{command} --family {family}`, or " if command else ""
    return f"{made}put it there ({_LAYOUT[part][1]}); `bolid models list` shows which families are complete"


def get_family(name: str | None = None) -> Family:
    """The family called ``name``, or the one that is chosen: BOLID_FAMILY, then `bolid models use`, then tiny.

    ``name`` may also be the path of a TOML file::

        image_size = [512, 384]   # of generated pictures: height, width
        view_size = [512, 384]    # of photos as the body encoder sees them; by default the same
        description = "mine"
        [defaults]
        steps = 30
        [few_steps]               # what --few-steps uses, with the LoRA few-steps.safetensors
        steps = 4
        guidance = 0.0
        scheduler = "LCMScheduler"
        [paths]                   # any part may live elsewhere; relative to this file
        base = "../my-base"
    """
    name = name or chosen_family()[0]
    if name == DEFAULT_FAMILY:
        root = Path(__file__).parent / "tiny"
        return _family(name, root, json.loads((root / "family.json").read_text(encoding="utf-8")))
    if name in _FULL_SIZE:
        return _family(name, home() / name, _FULL_SIZE[name])
    if name.endswith(".toml"):
        file = Path(name)
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BolidError(f"cannot read the family file {file}: {error.strerror}", _NAMES_HINT) from error
        except ValueError as error:
            raise BolidError(f"the family file {file} is not valid TOML: {error}", "correct that line") from error
        return _family(str(file), file.parent, data)
    raise BolidError(f"there is no model family called {name!r}", _NAMES_HINT)


_NAMES_HINT = f"choose one of {', '.join(FAMILY_NAMES)}, or give the path of a .toml file"


def _family(name: str, root: Path, data: dict[str, Any]) -> Family:
    size = _size(name, "image_size", data.get("image_size"))
    view = _size(name, "view_size", data.get("view_size", list(size)))
    if any(n % 8 for n in size):
        raise BolidError(f"family {name!r}: image_size is {list(size)}", "both numbers must be multiples of 8")
    if size[0] * view[1] != size[1] * view[0]:
        raise BolidError(
            f"family {name!r}: view_size {list(view)} has other proportions than image_size {list(size)}",
            "make both of the same proportions",
        )
    paths = data.get("paths", {})
    known = _LAYOUT | _OPTIONAL
    if unknown := set(paths) - set(known):
        raise BolidError(f"family {name!r}: unknown path {sorted(unknown)[0]!r}", f"known are: {', '.join(known)}")
    located = {part: root / paths.get(part, default) for part, (default, _) in known.items()}
    return Family(
        name=name,
        root=root,
        image_size=size,
        view_size=view,
        defaults=dict(data.get("defaults", {})),
        few_steps=dict(data.get("few_steps", {})),
        description=str(data.get("description", "")),
        **located,
    )


def _size(name: str, key: str, value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    raise BolidError(f"family {name!r}: {key} is {value!r}", "write [height, width] in pixels")


def chosen_family() -> tuple[str, str]:
    """(name, where the choice comes from: "BOLID_FAMILY", "bolid models use" or "default")."""
    if name := os.environ.get("BOLID_FAMILY"):
        return name, "BOLID_FAMILY"
    try:
        remembered = _memory().read_text(encoding="utf-8").strip()
    except OSError:
        remembered = ""
    return (remembered, "bolid models use") if remembered else (DEFAULT_FAMILY, "default")


def remember_family(name: str) -> Path:
    """Make ``name`` the family of later commands. Returns the file that says so."""
    get_family(name)  # refuses an unknown one
    if name.endswith(".toml"):
        name = str(Path(name).resolve())
    write_atomic(_memory(), name + "\n")
    return _memory()


def _memory() -> Path:
    return home() / "family"


def match_family(option: str | None, recorded: str, artefact: str | os.PathLike[str]) -> Family:
    """The family for a command that reads ``artefact``, which was made with the family ``recorded``.

    The artefact decides; a different family asked for by name is refused, since features of one family mean
    nothing to the models of another.
    """
    if option is not None and option != recorded:
        raise BolidError(
            f"{artefact} was made with family {recorded!r}, but --family is {option!r}",
            f"leave out --family, or make {artefact} again with --family {option}",
        )
    return get_family(recorded)
