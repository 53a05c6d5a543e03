"""`generate` on a small SDXL pipeline: the same controls through the SDXL classes."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_base import make_sdxl_base

import bolid.generate.pose_map
from bolid.backends.diffusion import add_controlnet, load_base, remembered_conditions
from bolid.formats.adapter import save_adapter
from bolid.formats.profile import save_profile
from bolid.generate.command import generate
from bolid.generate.guidance import guided_by
from bolid.method.body_condition import initial_state
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record, sha256_file
from bolid.scales import parse_person_guidance

PROMPT = "a photo of a woman"
FACE = get_family("tiny").require("face")
FACE_MODEL = sha256_file(FACE / "rec.onnx")
INPUTS = {"body_encoder": "e" * 64, "face_model": FACE_MODEL}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(family, adapter folder, profile)"""
    root = tmp_path_factory.mktemp("sdxl")
    base = make_sdxl_base(root)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    family = root / "small-xl.toml"
    family.write_text(
        "image_size = [64, 48]\n[defaults]\nsteps = 4\nguidance = 3.0\n[few_steps]\nsteps = 2\nguidance = 0.0\n"
        f"scheduler = 'EulerDiscreteScheduler'\ntimestep_spacing = 'trailing'\n"
        f"[paths]\nbase = '{base}'\nface = '{FACE}'\n"
    )
    record = run_record("profile", family=str(family), inputs=INPUTS)
    face = torch.nn.functional.normalize(torch.ones(512), dim=0)
    save_profile(root / "me.safetensors", torch.ones(8), torch.zeros(8), face, torch.ones(1), record)
    generator = torch.Generator().manual_seed(0)
    for branch, dim in (("face", 512), ("body", 8)):
        state = initial_state(unet, branch, dim)
        for name, tensor in state["ip_adapter"].items():
            if "to_v_ip" in name:
                state["ip_adapter"][name] = torch.randn(tensor.shape, generator=generator)
        flat = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
        record = run_record(f"{branch}-adapter", family=str(family), inputs=INPUTS)
        save_adapter(root / "adapter" / f"{branch}.safetensors", flat, record)
    return str(family), root / "adapter", root / "me.safetensors"


def paint(world, out, **options):
    options = {"profile": world[2], "adapter": world[1], "device": "cpu", "seed": 4} | options
    return [np.asarray(Image.open(path)) for path in generate([PROMPT], out, **options)]


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_diffusers_alone_paints(world, tmp_path):
    """Both branches, their keys and values computed once, a stretch of the denoising: to the bit."""
    pipe = load_base(get_family(world[0]))
    pipe.load_ip_adapter(
        [str(world[1])] * 2, subfolder=["", ""], weight_name=["face.safetensors", "body.safetensors"],
        image_encoder_folder=None,
    )  # fmt: skip
    face = torch.nn.functional.normalize(torch.ones(512), dim=0)
    embeds = [torch.stack([torch.zeros_like(v), v])[:, None] for v in (face, torch.ones(8))]

    def plain(callback=None):
        pipe.set_ip_adapter_scale([1.0, 1.0])
        generator = torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0))
        return pipe(
            PROMPT, negative_prompt="", height=64, width=48, num_inference_steps=4, guidance_scale=3.0,
            generator=generator, ip_adapter_image_embeds=embeds, callback_on_step_end=callback, output_type="pil",
        ).images[0]  # fmt: skip

    def off_after_two(pipe, step, timestep, arguments):
        if step == 1:
            pipe.set_ip_adapter_scale([1.0, 0.0])
        return arguments

    whole = np.asarray(plain())
    with remembered_conditions(pipe):
        assert np.array_equal(np.asarray(plain()), whole)
    assert equal(paint(world, tmp_path / "1"), [whole])
    half = np.asarray(plain(off_after_two))
    assert equal(paint(world, tmp_path / "2", body_scale="0..0.5"), [half]) and not np.array_equal(half, whole)
    assert not equal(paint(world, tmp_path / "3", body_scale="down=1"), [whole])


def test_lora_few_steps_and_pose(world, tmp_path, monkeypatch):
    family = get_family(world[0])
    pipe = load_base(family)
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1.to_v"):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    save_file(tensors, family.few_steps_lora)
    many = paint(world, tmp_path / "1")
    few = paint(world, tmp_path / "2", few_steps=True)
    assert not equal(few, many)
    record = json.loads(Image.open(tmp_path / "2" / "000-a-photo-of-a-woman.png").text["bolid"])
    assert record["config"]["steps"] == 2 and record["config"]["guidance"] == 0
    assert not equal(paint(world, tmp_path / "3", lora=[str(family.few_steps_lora)]), many)

    network = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16))
    network.save_pretrained(family.controlnet)
    assert type(add_controlnet(pipe, family)).__name__ == "StableDiffusionXLControlNetPipeline"
    monkeypatch.setattr(
        bolid.generate.pose_map, "read_pose", lambda _, family, device: np.full((*family.image_size, 3), 90, np.uint8)
    )
    (tmp_path / "photo.png").write_bytes(b"photo")
    assert equal(paint(world, tmp_path / "4", pose_from=tmp_path / "photo.png"), many)  # untrained: adds zeros
    for name, parameter in network.named_parameters():
        if "controlnet_" in name:
            parameter.data.fill_(0.05)
    network.save_pretrained(family.controlnet)
    posed = paint(world, tmp_path / "5", pose_from=tmp_path / "photo.png")
    assert not equal(posed, many)
    assert not equal(paint(world, tmp_path / "6", pose_from=tmp_path / "photo.png", body_scale=0), posed)


class Darker:
    """A guide that sees all of the picture."""

    step, momentum, keeps_noise, weight = 0.15, 0.5, False, parse_person_guidance("1@0.5..1", "face")

    def look(self, pixels, latent_size):
        return pixels.mean((1, 2, 3)), pixels.new_ones(len(pixels), 1, *latent_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guides(world, tmp_path, dtype):
    """Both text encoders' states and the added conditions go with their rows, the VAE is in single precision."""
    pipe = load_base(get_family(world[0]), dtype=dtype)

    def latents(*guides) -> torch.Tensor:
        with guided_by(pipe, guides, 2):
            return pipe(
                [PROMPT] * 2, height=64, width=48, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
                generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            ).images.float()  # fmt: skip

    plain, guided = latents(), latents(Darker())
    assert guided.isfinite().all() and torch.equal(guided, latents(Darker()))
    # Third of four steps: x0-hat is moved by 0.15, and what the last one makes of that is not far from it.
    assert 0.02 < (guided - plain).square().mean().sqrt() < 1

    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    paint(world, tmp_path, steps=8, face_guidance=1, dtype=name)
    record = json.loads(Image.open(tmp_path / "000-a-photo-of-a-woman.png").text["bolid"])
    assert record["config"]["face_guidance"] == "1@0.3..0.9" and record["inputs"]["guide_face"] == FACE_MODEL
