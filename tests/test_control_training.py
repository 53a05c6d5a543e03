"""The training scripts of the few-step LoRA and the ControlNet, for a few steps on the small base."""

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
from bolid.formats.tensors import load_tensors
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
        file.write(
            f"controlnet = '{root / 'controlnet'}'\nfew_steps_lora = '{root / 'few.safetensors'}'\n"
            "[few_steps]\nsteps = 4\nguidance = 0.0\nscheduler = 'LCMScheduler'\noriginal_inference_steps = 25\n"
        )
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
def test_the_few_step_lora(world, script, monkeypatch, tmp_path):
    family, shards, encoder, adapter = world
    options = [shards, "--family", family, "--adapter", adapter, "--body-encoder", encoder, "--rank", 2, "--batch", 4]
    script("train_few_steps", *options, "--steps", 3, "--out", tmp_path / "a")
    tensors, record = load_tensors(tmp_path / "a" / "few-steps.safetensors", "few-steps-lora")
    assert all(key.startswith("unet.") and ("lora_A" in key or "lora_B" in key) for key in tensors)
    assert not any("encoder_hid_proj" in key or "_ip" in key for key in tensors)  # the base, not the adapters
    assert any(tensor.abs().sum() > 0 for key, tensor in tensors.items() if "lora_B" in key)
    assert {"face_adapter", "body_adapter", "train"} <= set(record["inputs"])
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        assert sheet.size == (len(importlib.import_module("train_base").SHEET) * 48, 2 * 64)
    # It is what `generate --few-steps` looks for.
    get_family(family).few_steps_lora.write_bytes((tmp_path / "a" / "few-steps.safetensors").read_bytes())
    pictures = generate(["a"], tmp_path / "g", adapter=adapter, new_person=1, few_steps=True, device="cpu")
    assert len(pictures) == 1
    # Killed after its first checkpoint and started again: the same to the bit.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after_a_checkpoint(patch)
        script("train_few_steps", *options, "--steps", 3, "--out", tmp_path / "b", "--checkpoint-minutes", 0)
    assert (tmp_path / "b" / ".checkpoint.safetensors").exists()
    script("train_few_steps", *options, "--steps", 3, "--out", tmp_path / "b")
    files = [tmp_path / name / "few-steps.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_prediction_means(monkeypatch):
    """Noise the latents, predict perfectly, get the latents back."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    clean_and_noise = importlib.import_module("train_few_steps").clean_and_noise
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 8, 6, generator=generator) for _ in range(2))
    alphas = torch.tensor([0.9, 0.5, 0.1])
    a, b = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    noisy = a * clean + b * noise
    for kind, perfect in (("epsilon", noise), ("v_prediction", a * noise - b * clean)):
        x0, eps = clean_and_noise(perfect, noisy, alphas, kind)
        assert torch.allclose(x0, clean, atol=1e-4) and torch.allclose(eps, noise, atol=1e-4)


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
