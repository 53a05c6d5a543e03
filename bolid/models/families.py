"""Model families: which models belong together, where their files are, and which family a command uses.

A family is a directory with one fixed layout (``_LAYOUT``) and a few numbers as data. ``tiny`` is embedded in the
package; the full-size ones live under BOLID_HOME; anyone can write a TOML file of their own (see ``get_family``).
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.formats.parsing import parse_json, read_toml
from bolid.models.checksums import check_shipped
from bolid.models.sources import OWN_FACE_PACK, RESEARCH_ONLY_FACE, SOURCES
from bolid.run import home, write_atomic
from bolid.scales import Scale, parse_guidance, parse_size

# part -> (path inside the family's directory, what is expected there)
_LAYOUT = {
    "base": ("base", "a diffusers pipeline directory (model_index.json inside)"),
    "pose": ("pose", "a YOLO pose model: config.json and model.safetensors or model.onnx"),
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
    "face_portrait": ("adapter/face-portrait.safetensors", "a published FaceID-Portrait adapter, converted"),
    "depth_controlnet": ("controlnet-depth", "a depth ControlNet, in the same layout"),
    "few_steps_lora": ("few-steps.safetensors", "a LoRA with which the base samples in a few steps (LCM or Lightning)"),
    "upscaler": ("upscaler.safetensors", "a super-resolution network of RGB pictures that spandrel loads"),
    "body_shape": ("body-shape.safetensors", "what this body encoder's vectors say of the body's shape"),
    "segmentation": ("segmentation", "a segmentation model: config.json and model.safetensors"),
    "unet": ("unet.safetensors", "a UNet checkpoint, or a LoRA, that replaces the base's own UNet"),
    "base_config": ("base-config", "configs and tokenizers of the base, for a base that is a single .safetensors file"),
    "caption": ("caption", "a captioning model in transformers' layout"),
}

ALL_PARTS = (*_LAYOUT, *_OPTIONAL)


def path_of(part: str, folder: Path) -> Path:
    """Where a family whose directory is `folder` has this part."""
    return folder / (_LAYOUT | _OPTIONAL)[part][0]


_WORDS = {
    "controlnet": "ControlNet",
    "face_portrait": "FaceID-Portrait adapter",
    "depth_controlnet": "depth ControlNet",
    "few_steps_lora": "few-step LoRA",
    "body_shape": "body shape",
    "unet": "UNet",
    "base_config": "base configs",
}


def commercial_use() -> bool:
    """Whether only what may be used commercially is to be used: BOLID_COMMERCIAL=1 or `models use --commercial`."""
    if (value := os.environ.get("BOLID_COMMERCIAL")) is not None:
        return value not in ("", "0")
    return _commercial_file().is_file()


def remember_commercial(wanted: bool) -> None:
    """Refuse non-commercial models in later commands too, or no longer."""
    if wanted:
        write_atomic(_commercial_file(), "")
    else:
        _commercial_file().unlink(missing_ok=True)


def _commercial_file() -> Path:
    return home() / "commercial"


def refuse_non_commercial(part: str, path: Path, family: str) -> None:
    """Raise BolidError where ``path`` holds a face pack, face adapter or captioner that is published for research only.

    Packs of one's own pass, whatever family they stand in for: InsightFace's are known by the names of their files.
    """
    source = next((s for s in SOURCES.get(family, ()) if s.part == part), None)
    if part == "face" and path.is_dir() and RESEARCH_ONLY_FACE & {file.name for file in path.iterdir()}:
        name = source.name if source else "InsightFace's published pack"
        raise BolidError(
            f"{name} in {path} is for non-commercial research only, and --commercial is in force", OWN_FACE_PACK
        )
    if source is not None and part in ("caption", "face_portrait") and not source.commercial:
        raise BolidError(f"{source.name} is {source.license}, and --commercial is in force", source.instead)


# [height, width] that SDXL was trained on (arXiv:2307.01952, appendix I), those from 1:2 to 2:1 that people use.
_SDXL_SIZES = [
    [1024, 1024], [1152, 896], [1216, 832], [1344, 768], [1536, 640],
    [896, 1152], [832, 1216], [768, 1344], [640, 1536],
]  # fmt: skip
# Data, not code: what the full-size families need beside their weights.
_FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd15": {
        "description": "Stable Diffusion 1.5, 512x512",
        "image_size": [512, 512],
        "sizes": [[512, 512], [640, 448], [448, 640], [768, 512], [512, 768]],
        "defaults": {"steps": 30, "guidance": 7.0},
        "few_steps": {"steps": 4, "guidance": 0.0, "scheduler": "LCMScheduler"},  # for LCM-LoRA
    },
    "sdxl": {
        "description": "Stable Diffusion XL 1.0, 1024x1024",
        "image_size": [1024, 1024],
        "sizes": _SDXL_SIZES,
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
        "sizes": _SDXL_SIZES,
        "needs": ["unet"],
        "defaults": {
            "steps": 4,
            "guidance": 0.0,
            "scheduler": "EulerDiscreteScheduler",
            "timestep_spacing": "trailing",
        },
    },
}

_SHARED = Path(__file__).parent.parent / "masks"
MASK_ENCODER, MASK_SHAPE = _SHARED / "body-encoder.safetensors", _SHARED / "body-shape.safetensors"
"""The body encoder of masks, which suits every family, and what its vectors say of the body's shape."""

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
    view_size: tuple[int, int]  # (height, width) of photos for the body encoder: image_size or finer
    controlnet: Path
    face_portrait: Path
    depth_controlnet: Path
    few_steps_lora: Path
    upscaler: Path
    body_shape: Path
    segmentation: Path
    unet: Path
    base_config: Path
    caption: Path
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) that the base was trained on; image_size is one of them
    needs: tuple[str, ...] = ()  # parts that others may lack, but not this family
    defaults: dict[str, Any] = field(default_factory=dict)  # steps, guidance, ...: what generate starts from
    few_steps: dict[str, Any] = field(default_factory=dict)  # what --few-steps starts from; empty: not offered
    wardrobe: tuple[dict[str, Any], ...] = ()  # clothes that a prompt must name; see `dressed`
    description: str = ""

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The default sampler's timesteps, where the family names them; else empty: the sampler's own."""
        return tuple(int(t) for t in self.defaults.get("timesteps", ()))

    @property
    def steps(self) -> int:
        """The default number of denoising steps."""
        return len(self.timesteps) or int(self.defaults.get("steps", 30))

    @property
    def schedule(self) -> int | tuple[int, ...]:
        """What the default sampler is set to: its timesteps where the family names them, else the number of steps."""
        return self.timesteps or self.steps

    @property
    def guidance(self) -> Scale:
        """The default guidance scale and its interval of the steps."""
        return parse_guidance(self.defaults.get("guidance", 5.0), f"the guidance of family {self.name!r}")

    def dressed(self, prompt: str) -> str:
        """``prompt`` with clothes where it names none: the tiny base was trained on captions that name clothes, and
        generates people without any otherwise.

        Each entry of ``wardrobe`` is a kind of clothes: where none of its ``words`` is in the prompt, and none of
        ``unless`` either, its ``default`` goes behind the first clause.
        """
        found = set(re.findall(r"[a-z-]+", prompt.lower()))
        absent = [kind["default"] for kind in self.wardrobe if not found & {*kind["words"], *kind.get("unless", ())}]
        if not absent:
            return prompt
        first, comma, rest = prompt.partition(",")
        return f"{first}, in {' and '.join(absent)}{comma}{rest}"

    def require(self, part: str) -> Path:
        """The path of ``part`` ("base", "pose", ...), or a BolidError that names the missing file and the way to it."""
        path: Path | None = getattr(self, part)
        if path is not None and self.has(part):
            if self.name == DEFAULT_FAMILY and path.is_relative_to(self.root):
                check_shipped(self.root, part, path)
            if commercial_use():
                refuse_non_commercial(part, path, self.name)
            return path
        location = path if path is not None else path_of(part, self.root)
        raise BolidError(
            f"family {self.name!r} has no {_WORDS.get(part, part.replace('_', ' ') + ' model')}: looked for {location}",
            _how_to_get(self, part),
        )

    def missing(self) -> list[str]:
        """The parts whose files are not there."""
        return [part for part in (*_LAYOUT, *self.needs) if not self.has(part)]

    def has(self, part: str) -> bool:
        """Whether there is something where ``part`` is looked for."""
        path: Path | None = getattr(self, part)
        try:
            return path is not None and (any(path.iterdir()) if path.is_dir() else path.is_file())
        except OSError:  # a name that no file can have, a folder that may not be read
            return False

    def with_mask_encoder(self) -> Family:
        """The same family with the body encoder of masks in place of its own."""
        return replace(self, body_encoder=MASK_ENCODER, body_shape=MASK_SHAPE)

    def with_base(self, base: str | os.PathLike[str] | None) -> Family:
        """The same family on another base of its kind (a community checkpoint or a diffusers folder); None: itself.

        Where that base is a single file, its configs and tokenizers are the family's own.
        """
        if base is None:
            return self
        config = self.base_config if self.has("base_config") else self.base
        return replace(self, base=Path(base), base_config=config)

    def with_size(self, size: str | None) -> Family:
        """The same family with ``size``, "WIDTHxHEIGHT", as its picture size, or itself for None.

        Raises BolidError for a size that the base was not trained on.
        """
        if size is None:
            return self
        allowed = self.sizes or (self.image_size,)
        wanted = None
        with contextlib.suppress(BolidError):
            wanted = parse_size(size)
        if wanted is None or wanted not in allowed:
            raise BolidError(
                f"--size is {size!r}: family {self.name!r} was not trained on that",
                "give WIDTHxHEIGHT, one of " + ", ".join(f"{w}x{h}" for h, w in allowed),
            )
        return replace(self, image_size=wanted)


def _how_to_get(found: Family, part: str) -> str:
    family = found.name
    sources = {source.part: source for source in SOURCES.get(family, ())}
    if part in sources:
        what = (_LAYOUT | _OPTIONAL)[part][1]
        others = [one.part for one in sources.values() if not (one.optional or one.part == part or found.has(one.part))]
        more = f" (and {', '.join(others)}, missing too, without --only)" if others else ""
        return f"get it with `bolid models pull {family} --only {part}`{more}, or put it there ({what})"
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

    ``name`` may also be a folder with a family.json, laid out like the embedded family's, or the path of a TOML file::

        image_size = [512, 384]   # of generated pictures: height, width
        view_size = [512, 384]    # of photos as the body encoder sees them; by default the same
        description = "mine"
        [defaults]
        steps = 30
        guidance = 5.0            # or "5@0..0.75": in the first three quarters of the steps
        timesteps = [999, 700, 250] # instead of steps, for samplers that take them
        [few_steps]               # what --few-steps uses, with the LoRA few-steps.safetensors
        steps = 4
        guidance = 0.0
        body_scale = 1.25         # what --body-scale is if not given, by default 1; face_scale likewise
        scheduler = "LCMScheduler"
        [[wardrobe]]              # a kind of clothes that prompts must name, or the default is added
        words = ["top"]
        default = "a white short-sleeved top"
        [paths]                   # any part may live elsewhere; relative to this file
        base = "../my-base"
    """
    name = name or chosen_family()[0]
    if name == DEFAULT_FAMILY:
        root = Path(__file__).parent.parent / "tiny"
        return _family(name, root, parse_json((root / "family.json").read_bytes()))
    if name in _FULL_SIZE:
        return _family(name, home() / name, _FULL_SIZE[name])
    if (described := Path(name) / "family.json").is_file():
        return _family(str(Path(name)), Path(name), _read_description(described))
    if name.endswith(".toml"):
        return _family(str(Path(name)), Path(name).parent, read_toml(name, "family file", _NAMES_HINT))
    raise BolidError(f"there is no model family called {name!r}", _NAMES_HINT)


def _read_description(file: Path) -> dict[str, Any]:
    """What a family.json says. Raises BolidError where it is no JSON object."""
    try:
        data = parse_json(file.read_bytes())
    except ValueError as error:
        raise BolidError(f"{file} is damaged: {error}", "write a JSON object like that of bolid/tiny") from error
    if not isinstance(data, dict):
        raise BolidError(f"{file} holds no JSON object", "write one like that of bolid/tiny")
    return data


_NAMES_HINT = f"choose one of {', '.join(FAMILY_NAMES)}, or give a folder with a family.json or a .toml file"


# entry of a family file -> its type, and what to write
_ENTRIES: dict[str, tuple[type, str]] = {
    "image_size": (list, "write [height, width] in pixels"),
    "view_size": (list, "write [height, width] in pixels"),
    "sizes": (list, "write [[height, width], ...]"),
    "needs": (list, 'write a list of parts, like ["unet"]'),
    "wardrobe": (list, "write [[wardrobe]] tables"),
    "defaults": (dict, "write a [defaults] table"),
    "few_steps": (dict, "write a [few_steps] table"),
    "paths": (dict, "write a [paths] table of texts"),
    "description": (str, "write a text in quotes"),
}


def _check_entries(name: str, data: dict[str, Any]) -> None:
    """Raises BolidError for an unknown entry, and for one of another type."""
    if unknown := sorted(set(data) - set(_ENTRIES)):
        raise BolidError(f"family {name!r}: unknown entry {unknown[0]!r}", f"known are: {', '.join(_ENTRIES)}")
    for key, value in data.items():
        kind, hint = _ENTRIES[key]
        texts = value.values() if key == "paths" and isinstance(value, dict) else value if key == "needs" else ()
        if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
            raise BolidError(f"family {name!r}: {key} is {value!r}", hint)
    if unknown := sorted(set(data.get("needs", ())) - set(ALL_PARTS)):
        raise BolidError(f"family {name!r}: it needs {unknown[0]!r}", f"known parts are: {', '.join(ALL_PARTS)}")


def _family(name: str, root: Path, data: dict[str, Any]) -> Family:
    _check_entries(name, data)
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
    family = Family(
        name=name,
        root=root,
        image_size=size,
        view_size=view,
        sizes=tuple(_size(name, "sizes", size) for size in data.get("sizes", [])),
        needs=tuple(data.get("needs", [])),
        defaults=dict(data.get("defaults", {})),
        few_steps=dict(data.get("few_steps", {})),
        wardrobe=tuple(_clothes(name, kind) for kind in data.get("wardrobe", [])),
        description=str(data.get("description", "")),
        **located,
    )
    # Nobody has trained a body encoder for the published families; this one needs no training on their pictures.
    return family.with_mask_encoder() if name in _FULL_SIZE and not family.has("body_encoder") else family


def _size(name: str, key: str, value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    raise BolidError(f"family {name!r}: {key} is {value!r}", "write [height, width] in pixels")


def _clothes(name: str, kind: Any) -> dict[str, Any]:
    if isinstance(kind, dict) and kind.get("words") and isinstance(kind.get("default"), str):
        lists = kind["words"], kind.get("unless", [])
        if all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
            return kind
    raise BolidError(f"family {name!r}: wardrobe has {kind!r}", "give each kind of clothes its words and a default")


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
    """Make ``name`` the family of later commands. Returns the file that remembers it."""
    get_family(name)  # refuses an unknown one
    if name not in FAMILY_NAMES:
        name = str(Path(name).resolve())
    write_atomic(_memory(), name + "\n")
    return _memory()


def _memory() -> Path:
    return home() / "family"


def match_family(option: str | None, recorded: str, artefact: str | os.PathLike[str], instead: str = "") -> Family:
    """The family for a command that reads ``artefact``, which was made with the family ``recorded``.

    The artefact decides. Another family given by name is refused, since features of one family mean
    nothing to the models of another. ``instead``: what else can be done, for the hint.
    """
    if option is not None and option != recorded:
        raise BolidError(
            f"{artefact} was made with family {recorded!r}, but --family is {option!r}",
            f"leave out --family, or make {artefact} again with --family {option}"
            + (f"; or {instead}" * bool(instead)),
        )
    return get_family(recorded)
