"""The request for another picture like one that `generate` has made: its record's settings where none are given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.generate.request import PathLike, Request
from bolid.run import sha256_file
from bolid.scales import parse_scale


def request_like(picture: PathLike, given: Request) -> tuple[Request, dict[str, str]]:
    """(the request that makes `picture` again, changed by what is `given`; the inputs that its record names).

    A setting counts as given where it is not its default. Without a seed the picture comes out again; with one it is
    another of the same settings. Files are looked for under their recorded names: as written, and beside the picture.
    Raises BolidError for a picture without a record, and for a file that cannot be found or is another one.
    """
    picture = Path(picture)
    record = _record_of(picture)
    recorded = _fields(record, picture, given)
    new_person = given.profiles or given.photo is not None or given.new_person is not None
    if not new_person:
        recorded |= _person(record, picture)
    request = replace(given, **{name: value for name, value in recorded.items() if _is_default(given, name)})
    if new_person:  # somebody else may have no face: what is the family's default stays the default
        scales = {branch: getattr(request, f"{branch}_scale") for branch in ("face", "body")}
        usual = {b: parse_scale(request.sampler.get(f"{b}_scale", 1.0), b).plain() for b in scales}
        others: dict[str, Any] = {f"{b}_scale": None for b, scale in scales.items() if scale in (usual[b], 0.0)}
        request = replace(request, **others)
    return request, record["inputs"]


_DEFAULTS = {
    "few_steps": False, "best_of": 1, "dtype": "auto", "pose_scale": 1.0, "shape_scale": 1.0, "upscale": 1,
    "refine_face": False,
} | dict.fromkeys(
    ("face_guidance", "body_guidance"), 0.0
)  # of the others: None or empty  # fmt: skip


def _is_default(given: Request, name: str) -> bool:
    value = getattr(given, name)
    return str(value) == str(_DEFAULTS[name]) if name in _DEFAULTS else value in (None, (), "")


def _record_of(picture: Path) -> dict[str, Any]:
    from bolid.formats.pictures import picture_record

    try:
        record = picture_record(picture.read_bytes(), str(picture))
    except OSError as error:
        raise BolidError(f"cannot read {picture}: {error.strerror}", "check the path and its permissions") from error
    hint = "give a picture that `bolid generate` wrote and no other program has saved again"
    if record is None:
        raise BolidError(f"--like {picture}: the picture carries no settings", hint)
    config = record.get("config")
    if record.get("kind") != "picture" or not isinstance(config, dict) or "prompt" not in config:
        raise BolidError(f"--like {picture}: that is not one picture but a {record.get('kind')}", hint)
    return record


def _fields(record: dict[str, Any], picture: Path, given: Request) -> dict[str, Any]:
    """The settings in a record, by the request's names."""
    config, inputs = record["config"], record["inputs"]
    again = given.seed is None
    found: dict[str, Any] = {
        "prompts": (config["prompt"],), "steps": config["steps"], "guidance": config["guidance"],
        "negative": config["negative"], "few_steps": config["few_steps"], "size": config.get("size"),
        "best_of": 1 if again else config["best_of"], "seed": record["seed"], "family_name": record["family"],
        "dtype": config.get("dtype", "auto"),
        "face_scale": config["scales"].get("face", 0.0), "body_scale": config["scales"].get("body", 0.0),
        "face_guidance": config.get("face_guidance", 0.0), "body_guidance": config.get("body_guidance", 0.0),
        "upscale": config.get("upscale", 1), "refine_face": config.get("refine_face", False),
        "body_from": config.get("body_from"), "pose": config.get("pose"),
        "shape_scale": config.get("shape_scale", given.shape_scale),
    }  # fmt: skip
    if "base" in config and given.base is None:
        found["base"] = _find(config["base"], inputs.get("base"), picture, "--base")
    if config["lora"] and not given.lora:
        found["lora"] = tuple(
            _lora(text, inputs.get(f"lora_{number}"), picture) for number, text in enumerate(config["lora"])
        )
    if "pose_from" in config and given.pose_from is None:
        found["pose_from"] = _find(config["pose_from"], inputs.get("pose_from"), picture, "--pose-from")
        found["pose_scale"] = config["pose_scale"]
    return found


def _person(record: dict[str, Any], picture: Path) -> dict[str, Any]:
    """Who is shown, by the request's names."""
    name, inputs = str(record["config"].get("person", "nobody")), record["inputs"]
    if name.startswith("the profile "):
        return {"profiles": (_find(name.removeprefix("the profile "), inputs["profile"], picture, "--profile"),)}
    if name.startswith("the photo "):
        return {"photo": _find(name.removeprefix("the photo "), inputs.get("photo"), picture, "--photo")}
    if match := re.fullmatch(r"new person (\d+)", name):
        return {"new_person": int(match[1])}
    return {}


def _lora(text: str, sha256: str | None, picture: Path) -> str:
    path, colon, weight = text.rpartition(":")
    if not colon or not re.fullmatch(r"-?\d*\.?\d+", weight):
        path, weight = text, "1"
    return f"{_find(path, sha256, picture, '--lora')}:{weight}"


def _find(name: str, sha256: str | None, picture: Path, option: str) -> Path:
    """The file of that name and content: as written, or in the picture's folder or the one above."""
    places = [Path(name), *(folder / Path(name).name for folder in picture.resolve().parents[:3])]
    there = [place for place in places if place.exists()]
    for place in there:
        if sha256 is None or (place.is_file() and sha256_file(place) == sha256):
            return place
    if there:
        raise BolidError(
            f"{there[0]} is not the file that {picture} was made with: it has changed since",
            f"give {option} to use it all the same, or the old one",
        )
    raise BolidError(
        f"{picture} was made with {Path(name).name}, which is neither here nor beside the picture",
        f"say where it is: {option} FILE",
    )
