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


def nested_state_dict(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"image_proj": {...}, "ip_adapter": {...}}: the form in which ``load_ip_adapter`` takes a state dict."""
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor
    return nested


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
