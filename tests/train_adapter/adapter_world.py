"""The small world of the tests of `train-adapter`, and what they ask of a training's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from small_base import make_body_encoder, make_family, make_training_shards

from bolid.formats.adapter import load_adapter
from bolid.method.body_condition import BRANCHES
from bolid.train_adapter import TrainAdapterConfig, train_adapter

CONFIG = TrainAdapterConfig(
    steps=4, batch_size=3, face_tokens=2, sample_every=0, checkpoint_minutes=0.0, learning_rate=0.05
)


class Killed(Exception):
    pass


@dataclasses.dataclass
class World:
    family: str
    train: Path
    encoder: Path


def make_world(root: Path, sdxl: bool = False, models: dict[str, Path] | None = None, levels: int = 2) -> World:
    """A random base, three people of four photos and a random body encoder; `models` beside the base."""
    family = make_family(root, sdxl=sdxl, levels=levels)
    with open(family, "a") as file:
        file.write("".join(f"{name} = '{path}'\n" for name, path in (models or {}).items()))
    return World(
        family, make_training_shards(root / "train", family), make_body_encoder(root / "enc.safetensors", family)
    )


def run(world, out, config=CONFIG, **more):
    return train_adapter(world.train, out, config=config, body_encoder=world.encoder, device="cpu", seed=5, **more)


def command(world, out, *more: str) -> list[str]:
    """Arguments of `bolid train-adapter` that say the same as `run`."""
    options = {**dataclasses.asdict(CONFIG), "body_encoder": world.encoder, "out": out, "device": "cpu", "seed": 5}
    words = ["train-adapter", str(world.train), "--json", *more]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def adapters(out) -> torch.Tensor:
    """All trained numbers of a folder, in one vector."""
    parts = [load_adapter(out / f"{branch}.safetensors", branch)[0] for branch in BRANCHES]
    return torch.cat([value.float().flatten() for part in parts for _, value in sorted(part.items())])


def apart(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """The distance of two trainings' results, relative to how far they have moved."""
    return float((a - b).norm() / (a - start).norm())


def kill_at(step: int):
    def progress(done, total, text):
        if text.startswith("loss") and done == step:
            raise Killed

    return progress
