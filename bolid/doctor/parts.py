"""The files of a family: which parts are there and whole, what a missing one costs, and which commands can run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bolid.doctor.machine import free_space
from bolid.doctor.rows import NOTE, OK, WRONG, Row, gigabytes
from bolid.errors import BolidError
from bolid.models.checksums import fault_of, read_manifest
from bolid.models.families import DEFAULT_FAMILY, MASK_ENCODER, PARTS, Family, commercial_use
from bolid.models.sources import SOURCES, PublishedPart, published

# Parts without which a family still works, and what needs them.
OPTIONAL = {
    "probe": "body ratios in evaluate",
    "controlnet": "generate --pose-from",
    "depth_controlnet": "generate --body-from shape",
    "face_portrait": "a face without training",
    "few_steps_lora": "generate --few-steps",
    "upscaler": "generate --upscale",
    "body_shape": "centimetres, profile edit, generate --body-from shape",
    "segmentation": "the body encoder of masks",
    "caption": "extract --caption blip2",
    "unet": "a UNet in place of the base's own",
    "base_config": "a base that is a single file",
}
# What a command reads of the family.
COMMANDS = {
    "extract": ("pose", "face", "image_text"),
    "shard": ("base",),
    "train-vae": (),
    "profile": ("pose", "face", "image_text", "body_encoder"),
    "train-adapter": ("base", "body_encoder"),
    "generate, without a person": ("base",),
    "generate --profile": ("base", "body_encoder", "body_adapter"),
    "generate --photo": ("base", "pose", "face", "image_text", "body_encoder", "body_adapter"),
    "generate --body-from shape": ("base", "depth_controlnet", "body_shape"),
    "evaluate": ("pose", "face", "image_text"),
}
# A family of published weights has these once somebody has trained them.
TRAINED = {
    "body_encoder": "bolid train-vae",
    "face_adapter": "bolid train-adapter",
    "body_adapter": "bolid train-adapter",
}
# What does the same without a training, and with which command.
STANDS_IN = {
    "face_adapter": ("face_portrait", "generate"),
    "body_adapter": ("depth_controlnet", "generate --body-from shape"),
}
THERE, MISSING, DAMAGED = "there", "missing", "damaged"


@dataclass(frozen=True)
class Part:
    """One part of a family. ``state``: "there", "missing" or "damaged", then ``why`` says how."""

    name: str
    where: Path
    state: str
    needed: bool  # whether the family counts as unusable without it
    bytes: int = 0  # of what is there
    why: str = ""
    hint: str = ""
    source: PublishedPart | None = None  # where it is published


def look_at(family: Family) -> list[Part]:
    """Every part that the family has, needs, or could have. Headers and sizes are read, no weights.

    `bolid models verify` also compares SHA-256.
    """
    sources = _published(family)
    try:
        manifest = read_manifest(family.root)
    except BolidError:
        manifest = {}
    names = [part for part in dict.fromkeys((*PARTS, *family.needs, *sources, *OPTIONAL)) if hasattr(family, part)]
    parts = []
    for name in names:
        where, source = getattr(family, name), sources.get(name)
        wanted = _needed(family, name, source)
        if not _has(family, name):
            if wanted or source is not None or name in PARTS:
                parts.append(Part(name, where, MISSING, wanted, 0, hint=_hint(family, name, sources), source=source))
            continue
        files = manifest.get(name, {}).get("files", {})
        size, why = examine(name, where, {file: entry.get("size") for file, entry in files.items()})
        hint = f"remove it, then: {_command(family, name, source)}" if why else ""
        parts.append(Part(name, where, DAMAGED if why else THERE, wanted, size, why, hint, source))
    return parts


def _published(family: Family) -> dict[str, PublishedPart]:
    """Part -> where it is published, as far as `bolid models pull` fetches it here."""
    commercial = commercial_use()
    sources = published(family.name, commercial)
    return {source.part: source for source in sources if source.commercial or not commercial}


def _has(family: Family, name: str) -> bool:
    try:
        return family.has(name)
    except OSError:
        return False


def _needed(family: Family, name: str, source: PublishedPart | None) -> bool:
    """A family of published weights needs what `pull` fetches; `tiny` all it ships; one of the user's own a base."""
    if name in family.needs or (source is not None and not source.optional):
        return True
    if family.name in SOURCES:
        return False
    return name == "base" or (family.name == DEFAULT_FAMILY and name in PARTS)


def _command(family: Family, name: str, source: PublishedPart | None) -> str:
    if source is not None:
        return f"bolid models pull {family.name} --only {name}"
    if family.name == DEFAULT_FAMILY:
        return "install bolid again"
    return TRAINED.get(name, "put a whole one there")


def _hint(family: Family, name: str, sources: Mapping[str, PublishedPart]) -> str:
    """What does the same without a training, or else what our own error says about this missing part."""
    other, command = STANDS_IN.get(name, ("", ""))
    if other in sources and family.has(other):
        return f"{command} works without it, by the {other.replace('_', ' ')}"
    if other in sources:
        fetch = f"bolid models pull {family.name} --only {other}"
        return f"{command} works without it: {fetch}; or train one: {TRAINED[name]}"
    try:
        family.require(name)
    except BolidError as error:
        return error.hint.partition("; `bolid models list`")[0]
    return ""


def examine(name: str, place: Path, sizes: dict[str, int | None] | None = None) -> tuple[int, str]:
    """(bytes of a part, "" or why it is damaged). ``sizes``: file -> bytes, as written down by `bolid models pull`."""
    files = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file() or p.is_symlink()]
    total, why = 0, ""
    for file in files:
        try:
            total += file.stat().st_size
            why = why or fault_of(file).replace(str(file), file.name)
        except OSError as error:
            lost = file.is_symlink() and not file.exists()
            fault = "points to a file that is gone" if lost else f"cannot be read: {error.strerror}"
            why = why or f"{file.name} {fault}"
    for file_name, expected in (sizes or {}).items():
        file = place if place.is_file() else place / file_name
        if not file.is_file():
            why = why or f"{file_name} is missing"
        elif expected is not None and file.stat().st_size != expected:
            why = why or f"{file_name} has {file.stat().st_size} bytes; {expected} were fetched"
    return total, why or _missing_file(name, place)


def _missing_file(name: str, place: Path) -> str:
    """A file without which the part cannot be loaded."""
    if place.is_file():
        return ""
    if name == "base":
        try:
            index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "model_index.json is missing or damaged"
        for folder, loaded in index.items():
            if isinstance(loaded, list) and all(loaded) and not (place / folder).is_dir() and folder != "unet":
                return f"the folder {folder} is missing"
    if name == "face" and not any(place.glob("*.onnx")):
        return "no .onnx file in it"
    if name == "pose" and not (place / "config.json").is_file():
        return "config.json is missing"
    if name == "image_text" and not (place / "open_clip_config.json").is_file():
        return "open_clip_config.json is missing"
    return ""


# ---------------------------------------------------------------------------------------------------------- as rows


def part_rows(family: Family, parts: list[Part]) -> list[Row]:
    """The parts as lines of the page, and whether the missing ones fit on the disk."""
    rows = [_part_row(part) for part in parts]
    missing = [part.source for part in parts if part.state != THERE and part.source and part.needed]
    if missing:
        needed = sum(source.megabytes for source in missing) * 10**6
        free = free_space(family.root)
        text = f"{gigabytes(needed)} (approximately)"
        if free is not None and free < needed:
            advice = f"only {gigabytes(free)} free at {family.root}: set BOLID_HOME"
            rows.append(Row("to be fetched", text, WRONG, advice))
        else:
            rows.append(Row("to be fetched", text, NOTE, f"bolid models pull {family.name}"))
    return rows


def _part_row(part: Part) -> Row:
    details = {
        "part": part.name, "state": part.state, "where": str(part.where), "needed": part.needed, "bytes": part.bytes,
        "why": part.why,
    }  # fmt: skip
    if part.source:
        details |= {"megabytes": part.source.megabytes, "license": part.source.license, "source": part.source.name}
    if part.state == THERE:
        return Row(part.name, f"there, {gigabytes(part.bytes)}", details=details)
    if part.state == DAMAGED:
        return Row(part.name, f"damaged: {part.why}", WRONG, part.hint, details)
    costs = f", {part.source.megabytes} MB, {part.source.license}" if part.source else ""
    wanted = "" if part.needed else f"; only for {OPTIONAL[part.name]}" if part.name in OPTIONAL else ""
    return Row(part.name, f"missing{costs}{wanted}", WRONG if part.needed else NOTE, part.hint, details)


def command_rows(family: Family, parts: list[Part]) -> list[Row]:
    """Which commands can run with these parts."""
    there = {part.name for part in parts if part.state == THERE}
    sources, rows = _published(family), []
    masks = ("segmentation",) if family.body_encoder == MASK_ENCODER else ()
    for command, needs in COMMANDS.items():
        more = masks if {"pose", "body_encoder"} <= {*needs} else ()
        lacking = [part for part in (*needs, *more, *family.needs) if part not in there]
        if "body_adapter" in lacking:  # one branch is enough
            lacking.remove("body_adapter")
            if not {"face_adapter", "face_portrait"} & there:
                lacking.append("face_portrait" if "face_portrait" in sources else "body_adapter")
        details = {"command": command, "runs": not lacking, "lacks": lacking}
        if not lacking:
            rows.append(Row(command, "runs", OK, "", details))
            continue
        words = " and ".join(", ".join(part.replace("_", " ") for part in lacking).rsplit(", ", 1))
        rows.append(Row(command, f"lacks the {words}", NOTE, ", then ".join(_ways(family, lacking, sources)), details))
    return rows


def _ways(family: Family, lacking: Sequence[str], sources: Mapping[str, PublishedPart]) -> list[str]:
    """The commands, one after the other, that get these parts."""
    pull = f"bolid models pull {family.name}"
    fetched = [part for part in lacking if part in sources]
    ways = [pull] if any(not sources[part].optional for part in fetched) else []
    ways += [f"{pull} --only {part}" for part in fetched if sources[part].optional]
    return [*ways, *dict.fromkeys(TRAINED[part] for part in lacking if part in TRAINED and part not in sources)]
