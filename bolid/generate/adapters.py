"""The face and the body adapter: which of them a request uses, loading them, and whether people belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.generate.identity import Identity
from bolid.generate.request import Request
from bolid.models.families import match_family
from bolid.models.sources import SOURCES
from bolid.run import sha256_file


def choose_branches(request: Request, people: Sequence[Identity]) -> list[str]:
    """The branches to load: those that some picture uses. Raises BolidError for a scale of what is not there."""
    files, used = request.adapter_files, []
    for branch in ("face", "body"):
        given = [cell.scales[branch] for cell in request.cells if branch in cell.scales]
        given = [scale for scale in given if not scale.is_zero]
        without = [person for person in people if branch not in person.vectors]
        if given and without:
            raise _nothing_to_scale(branch, given[0].plain(), without[0])
        if given and not files[branch].is_file():
            raise BolidError(
                f"--{branch}-scale is {given[0].plain()}, but there is no {branch} adapter {files[branch]}",
                f"leave out --{branch}-scale, or make that adapter with: bolid train-adapter",
            )
        # A branch at scale 0 is not even loaded: less to compute, and bit-equal to the base without it.
        default = any(branch not in cell.scales for cell in request.cells)
        if branch == "body" and request.shape_alone:
            default = False
        if given or (len(without) < len(people) and default):
            used.append(branch)
    there = [branch for branch in used if files[branch].is_file()]
    if used and not there:
        request.require_adapter(used[0])
    return there


def unused_branches(request: Request, people: Sequence[Identity], branches: Sequence[str]) -> list[str]:
    """Warnings about what the people have and no picture shows, since there is no adapter for it."""
    warnings = []
    for branch in ("face", "body"):
        off = all(branch in cell.scales and cell.scales[branch].is_zero for cell in request.cells)
        off = off or (branch == "body" and request.uses_shape)
        if branch not in branches and not off and any(branch in person.vectors for person in people):
            missing = f"the {branch} is not used: there is no {branch} adapter {request.adapter_files[branch]}"
            warnings.append(missing + _without_training(branch, request))
    return warnings


def _without_training(branch: str, request: Request) -> str:
    """What shows the face or the body where nobody has trained an adapter; "" where nothing does."""
    if branch == "body":
        return "; --body-from shape --pose standing needs none" if request.family.has("depth_controlnet") else ""
    published = any(source.part == "face_portrait" for source in SOURCES.get(request.family.name, ()))
    return f"; get one: bolid models pull {request.family.name} --only face_portrait" if published else ""


def _nothing_to_scale(branch: str, scale: float | str, person: Identity) -> BolidError:
    if person.name == "nobody":
        return BolidError(
            f"--{branch}-scale is {scale}, but nobody is to be shown",
            "add --profile, --photo or --new-person, or leave out the scale",
        )
    return BolidError(
        f"{person.name} has no {branch}, but --{branch}-scale is {scale}",
        f"leave out --{branch}-scale, or make the profile again with a photo that shows the {branch}",
    )


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that is in a pipeline: its file and sha256, its run record, and the `dim` of the vectors it takes."""

    path: Path
    sha256: str
    record: dict[str, Any]
    dim: int


def load_adapters(pipe: Any, request: Request, branches: Sequence[str]) -> dict[str, LoadedAdapter]:
    """Load the branches into the pipeline. BolidError where one does not fit the base."""
    from bolid.backends.diffusion import quiet_diffusers
    from bolid.formats.adapter import load_adapter, nested_state_dict

    family, states, loaded = request.family, [], {}
    for branch in branches:
        path = request.require_adapter(branch)
        tensors, record = load_adapter(path, branch)
        match_family(family.name, record["family"], path)
        first = "image_proj.proj.weight" if branch == "body" else "image_proj.proj.0.weight"
        states.append(nested_state_dict({name: value.to(pipe.unet.dtype) for name, value in tensors.items()}))
        loaded[branch] = LoadedAdapter(path, sha256_file(path), record, tensors[first].shape[1])
    with quiet_diffusers():
        try:  # all in one call: a second one would replace the first
            pipe.load_ip_adapter(
                states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise BolidError(
                f"the adapter does not fit the base of family '{family.name}'",
                "train it again with: bolid train-adapter",
            ) from error
    return loaded


def check_belongs(person: Identity, branch: str, adapter: LoadedAdapter) -> None:
    """BolidError unless the person's vector means to the adapter what such vectors meant in its training."""
    path, record, dim = adapter.path, adapter.record, adapter.dim
    if branch == "body" and record["inputs"].get("body_encoder") != person.body_encoder:
        raise BolidError(
            f"{person.name} and the body adapter {path} were made with different body encoders",
            "make the profile again with the body encoder that the adapter was trained with",
        )
    trained_with = record["inputs"].get("face_model", "")
    if branch == "face" and trained_with and person.face_model and trained_with != person.face_model:
        pack = record.get("config", {}).get("face_pack")
        raise BolidError(
            f"{person.name} and the face adapter {path} were made with different face models"
            + (f": the adapter's is InsightFace {pack}" if pack else ""),
            "make the profile again with the face model that the adapter was trained with"
            + (": its folder, as `bolid models pull FAMILY --only face` fetches it" if pack else ""),
        )
    if dim != len(person.vectors[branch]):
        raise BolidError(
            f"the {branch} adapter {path} takes {dim} numbers, {person.name} has {len(person.vectors[branch])}",
            "make the profile again with this family",
        )
