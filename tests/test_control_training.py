"""The training script of the ControlNet, for a few steps on the small base."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import make_body_encoder, make_family, make_training_shards

import bolid.generate.pose_map
from bolid.formats.checkpoint import save_checkpoint
from bolid.generate import generate
from bolid.models.families import get_family
from bolid.train_adapter.command import train_adapter
from bolid.train_adapter.config import TrainAdapterConfig

SCRIPTS = Path(__file__).parent.parent / "examples" / "tiny_family"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(family, training shards, body encoder, adapters)"""
    root = tmp_path_factory.mktemp("controls")
    family = make_family(root)
    with open(family, "a") as file:
        file.write(f"controlnet = '{root / 'controlnet'}'\n")
    encoder = make_body_encoder(root / "enc.safetensors", family)
    shards = make_training_shards(root / "train", family)
    config = TrainAdapterConfig(steps=2, batch_size=4, face_tokens=2, sample_every=0)
    train_adapter(shards, root / "adapter", config=config, body_encoder=encoder, device="cpu")
    return family, shards, encoder, root / "adapter"


@pytest.fixture
def script(monkeypatch):
    """script("train_x", *arguments) runs it as the command line would, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()

    yield run
    torch.set_num_threads(threads)


class Killed(Exception):
    pass


def kill_after_a_checkpoint(monkeypatch) -> None:
    def save_and_die(path, *arguments):
        save_checkpoint(path, *arguments)
        raise Killed

    monkeypatch.setattr(importlib.import_module("course"), "save_checkpoint", save_and_die)


@pytest.mark.slow
def test_the_controlnet(world, script, monkeypatch, tmp_path):
    family, shards, _, _ = world
    # What three steps have learnt is less than the least 8-bit float, 0.002: stored as it is, it would be nothing.
    options = [shards, "--family", family, "--batch", 4, "--measure", 0, "--steps", 3, "--strength", 1000]
    script("train_controlnet", *options, "--out", tmp_path / "a")
    # It is what `generate --pose-from` looks for, and after three steps it no longer adds zeros.
    (tmp_path / "a" / "export").rename(get_family(family).controlnet)
    monkeypatch.setattr(
        bolid.generate.pose_map,
        "read_pose",
        lambda photo, family, device: np.full((*family.image_size, 3), 200, np.uint8),
    )
    (tmp_path / "photo.png").write_bytes(b"photo")
    posed = generate(["a"], tmp_path / "1", family=family, pose_from=tmp_path / "photo.png", device="cpu")
    plain = generate(["a"], tmp_path / "2", family=family, device="cpu")
    assert not np.array_equal(np.asarray(Image.open(posed[0])), np.asarray(Image.open(plain[0])))
    weights = get_family(family).controlnet / "diffusion_pytorch_model.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_a_checkpoint(patch)
        script("train_controlnet", *options, "--out", tmp_path / "b", "--checkpoint-minutes", 0)
    script("train_controlnet", *options, "--out", tmp_path / "b")
    assert (tmp_path / "b" / "export" / weights.name).read_bytes() == weights.read_bytes()
