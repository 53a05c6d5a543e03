"""Adapters in diffusers' own IP-Adapter layout, so that plain ``pipe.load_ip_adapter`` and ComfyUI read them too.

Keys: ``image_proj.*`` (the projection from an embedding to tokens) and ``ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight``
(one pair a cross-attention layer, numbered in the order of ``list(unet.attn_processors)``). The run record is in the
metadata, which other programs ignore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

BRANCHES = ("face", "body")


def adapter_kind(branch: str) -> str:
    """The record's kind: "face-adapter" or "body-adapter"."""
    if branch not in BRANCHES:
        raise ValueError(f"branch is face or body, not {branch!r}")
    return f"{branch}-adapter"


def save_adapter(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write one branch. ``tensors``: flat keys as above; ``record``: of kind ``adapter_kind(branch)``."""
    _check_layout(path, tensors)
    save_tensors(path, tensors, record)


def load_adapter(path: str | os.PathLike[str], branch: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(flat tensors, record) of one branch. Raises BolidError for another branch, a foreign or a damaged file."""
    tensors, record = load_tensors(path, adapter_kind(branch))
    _check_layout(path, tensors)
    return tensors, record


def read_portrait_adapter(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Flat tensors, f16, of a published IP-Adapter FaceID-Portrait file (`ip-adapter-faceid-portrait_sd15.bin`).

    Such a file is a pickle, which could run anything. torch reads it by its restricted reader (`weights_only=True`),
    which builds tensors and plain containers and refuses the rest. Its layout is that of our face branch: a
    projection of 512 numbers to some tokens, and a pair of matrices a cross-attention layer.
    Raises BolidError for a damaged file, for one that holds anything else, and for other kinds of IP-Adapter.
    """
    import torch

    if "unnorm" in os.fspath(path):
        raise BolidError(f"{path} takes embeddings that are not normalised", "take the file without _unnorm")
    try:
        nested = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BolidError(f"there is no {path}", "give a file like ip-adapter-faceid-portrait_sd15.bin") from None
    except Exception as error:  # pickle's own class, which nothing here may import, and zip files' of all kinds
        if "GLOBAL" in str(error):
            raise BolidError(
                f"{path} is refused: it holds more than tensors",
                "fetch the file from its publisher's own repository; nothing of it was run",
            ) from error
        raise BolidError(f"{path} is damaged or no torch file", "fetch it again") from error
    parts = [nested.get(name) for name in ("image_proj", "ip_adapter")] if isinstance(nested, dict) else []
    if len(parts) != 2 or not all(isinstance(part, dict) and part for part in parts):
        raise BolidError(f"{path} is no IP-Adapter", "give a file like ip-adapter-faceid-portrait_sd15.bin")
    flat = flat_tensors({part: nested[part] for part in ("image_proj", "ip_adapter")})
    if not all(isinstance(value, torch.Tensor) for value in flat.values()):
        raise BolidError(f"{path} is no IP-Adapter: it holds more than tensors", "fetch it again")
    _check_portrait(path, flat)
    return {name: value.half().contiguous() for name, value in flat.items()}


def _check_portrait(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """BolidError unless these are 512 numbers -> tokens of the width of every `to_{k,v}_ip`, and nothing else."""
    expected = {f"image_proj.{name}" for name in (*(f"proj.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")),
                                                  "norm.weight", "norm.bias")}  # fmt: skip
    projection = {name for name in tensors if name.startswith("image_proj.")}
    pairs = {name for name in tensors if name.startswith("ip_adapter.")}
    if any("lora" in name for name in pairs) or "image_proj.proj.0.weight" not in projection:
        raise BolidError(
            f"{path} is another kind of IP-Adapter than FaceID-Portrait",
            "its LoRA and its CLIP features are not supported: give ip-adapter-faceid-portrait_sd15.bin or _sdxl.bin",
        )
    width = tensors["image_proj.norm.weight"].shape[0] if projection == expected else 0
    first, last = (tensors[f"image_proj.proj.{i}.weight"] if width else None for i in (0, 2))
    fits = width and first is not None and last is not None and first.shape[1] == 512 and not last.shape[0] % width
    layers = {name.removesuffix(f".to_{kind}_ip.weight") for name in pairs for kind in "kv"}
    wanted = {f"{layer}.to_{kind}_ip.weight" for layer in layers if layer.count(".") == 1 for kind in "kv"}
    if not fits or pairs != wanted or any(tensors[name].shape[1] != width for name in pairs):
        raise BolidError(f"{path} has not the layout of FaceID-Portrait", "fetch it again from its publisher")


def nested_state_dict(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"image_proj": {...}, "ip_adapter": {...}}: the form in which ``load_ip_adapter`` takes a state dict."""
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor
    return nested


def flat_tensors(nested: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The inverse of `nested_state_dict`."""
    return {f"{part}.{name}": tensor for part, tensors in nested.items() for name, tensor in tensors.items()}


def _check_layout(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    for prefix in ("image_proj.", "ip_adapter."):
        if not any(key.startswith(prefix) for key in tensors):
            raise BolidError(
                f"{path} is no IP-Adapter: it has no {prefix}* tensors", "make it with bolid train-adapter"
            )
    if foreign := [key for key in tensors if not key.startswith(("image_proj.", "ip_adapter."))]:
        raise BolidError(
            f"{path} has a tensor outside the IP-Adapter layout: {foreign[0]!r}", "make it with bolid train-adapter"
        )
