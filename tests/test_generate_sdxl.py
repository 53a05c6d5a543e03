"""`generate` on a small SDXL pipeline: the same controls through the SDXL classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from generate_world import PROMPTS, make_pictures, make_world, random_controlnet, read_picture, same, save_lora

import bolid.generate.pose_map
from bolid.backends.diffusion import load_base
from bolid.backends.sampling import Guidance, sample
from bolid.models.families import get_family
from bolid.run import sha256_file
from bolid.scales import parse_guidance, parse_person_guidance

FACES = get_family("tiny").require("face")
FACE_MODEL = sha256_file(FACES / "rec.onnx")
SETTINGS = f"""face = '{FACES}'
[few_steps]
steps = 2
guidance = 0.0
scheduler = 'EulerDiscreteScheduler'
timestep_spacing = 'trailing'
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    return make_world(root, sdxl=True, inputs={"face_model": FACE_MODEL}, settings=SETTINGS)


@pytest.mark.slow
def test_lora_few_steps_and_pose(world, tmp_path, monkeypatch):
    family = get_family(world.family)
    unet = load_base(family).unet
    save_lora(family.few_steps_lora, unet, name="attn1.to_v")
    many = make_pictures(world, tmp_path / "1", profile=world.me)
    few = make_pictures(world, tmp_path / "2", profile=world.me, few_steps=True)
    assert not same(few, many)
    record = read_picture(tmp_path / "2" / "000-a-photo-of-a-woman.png")
    assert record["config"]["steps"] == 2 and record["config"]["guidance"] == 0
    assert not same(make_pictures(world, tmp_path / "3", profile=world.me, lora=[str(family.few_steps_lora)]), many)

    random_controlnet(unet).save_pretrained(family.controlnet)
    monkeypatch.setattr(
        bolid.generate.pose_map, "read_pose", lambda _, family, device: np.full((*family.image_size, 3), 90, np.uint8)
    )
    (tmp_path / "photo.png").write_bytes(b"photo")
    posed = make_pictures(world, tmp_path / "5", profile=world.me, pose_from=tmp_path / "photo.png")
    assert not same(posed, many)
    assert not same(
        make_pictures(world, tmp_path / "6", profile=world.me, pose_from=tmp_path / "photo.png", body_scale=0), posed
    )


class Darker:
    """A loss that moves all of the picture."""

    step, momentum, keeps_noise, weight = 0.15, 0.5, False, parse_person_guidance("1@0.5..1", "face")

    def __call__(self, pixels, latent_size):
        return pixels.mean((1, 2, 3)), pixels.new_ones(len(pixels), 1, *latent_size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_losses(world, tmp_path, dtype):
    """Both text encoders' states and the added conditions go with their rows, the VAE is in single precision."""
    pipe = load_base(get_family(world.family), dtype=dtype)

    def latents(*losses) -> torch.Tensor:
        return sample(
            pipe, PROMPTS, size=(64, 48), steps=4, guidance=Guidance(parse_guidance(3.0)), losses=losses,
            generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        ).float()  # fmt: skip

    plain, guided = latents(), latents(Darker())
    assert guided.isfinite().all() and torch.equal(guided, latents(Darker()))
    # Third of four steps: x0-hat is moved by 0.15, and what the last one makes of that is not far from it.
    assert 0.02 < (guided - plain).square().mean().sqrt() < 1

    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    make_pictures(world, tmp_path, profile=world.me, steps=8, face_guidance=1, dtype=name)
    record = read_picture(tmp_path / "000-a-photo-of-a-woman.png")
    assert record["config"]["face_guidance"] == "1@0.3..0.9" and record["inputs"]["guidance_face"] == FACE_MODEL
