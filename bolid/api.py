"""The chain as functions: photos -> profile -> pictures, and the training of the models behind it.

    from pathlib import Path

    from bolid import api

    photos = sorted(Path("photos/anna").glob("*.jpg"))
    me = api.make_profile(photos[:3], "anna.safetensors")
    print(f"{me.photos} photos, uncertainty {me.uncertainty:.2f} (1: nothing known)")
    prompts = ["a full body photo of a woman waving", "a portrait of a woman, smiling"]
    for picture in api.generate(prompts, "pictures", profile=me.path, seed=1):
        print(picture)

Every function takes and returns paths and plain values, writes what the command of its name writes, and raises
``BolidError`` with a message and a hint. ``progress`` is called with (done, total, text).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.run import prepare_environment

if TYPE_CHECKING:
    from bolid.evaluate import bench, compare, evaluate
    from bolid.extract import extract
    from bolid.generate import generate
    from bolid.inspect import inspect
    from bolid.profile import (
        edit_profile,
        export_maps,
        export_profile,
        make_profile,
        mix_profiles,
        picture_profile,
        show_profile,
    )
    from bolid.scrape import scrape
    from bolid.shard import shard
    from bolid.train_adapter import TrainAdapterConfig, train_adapter
    from bolid.train_vae import TrainVaeConfig, train_vae

_HOMES = {
    "scrape": "bolid.scrape",
    "extract": "bolid.extract",
    "shard": "bolid.shard",
    "TrainVaeConfig": "bolid.train_vae",
    "train_vae": "bolid.train_vae",
    "make_profile": "bolid.profile",
    "mix_profiles": "bolid.profile",
    "edit_profile": "bolid.profile",
    "show_profile": "bolid.profile",
    "picture_profile": "bolid.profile",
    "export_profile": "bolid.profile",
    "export_maps": "bolid.profile",
    "TrainAdapterConfig": "bolid.train_adapter",
    "train_adapter": "bolid.train_adapter",
    "generate": "bolid.generate",
    "evaluate": "bolid.evaluate",
    "compare": "bolid.evaluate",
    "bench": "bolid.evaluate",
    "inspect": "bolid.inspect",
}

__all__ = [
    "BolidError", "TrainAdapterConfig", "TrainVaeConfig", "bench", "compare", "edit_profile", "evaluate",
    "export_maps", "export_profile", "extract", "generate", "inspect", "make_profile", "mix_profiles",
    "picture_profile", "scrape", "shard", "show_profile", "train_adapter", "train_vae",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The function, from the module of its command, which is loaded at the first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    prepare_environment()  # before torch loads
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
