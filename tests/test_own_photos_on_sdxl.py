"""The guide "your own photos on SDXL", typed: photos and a height -> profile -> pictures, nothing trained by the user.

Every part lies in the layout in which it is published: SDXL's folder with fp16 files, a face pack in a zip, a folder of
open_clip, a FaceID-Portrait pickle, a depth ControlNet. The base, the adapter and the ControlNet are small and random.
What looks at photos is the tiny family's, which knows the rendered people of the photos; the body encoder is the
package's own, of masks.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from generate_world import random_controlnet
from PIL import Image
from typer.testing import CliRunner

import bolid.models.convert
from bolid.formats.profile import load_profile, save_profile
from bolid.method.body_condition import initial_state
from bolid.models import families
from bolid.models import pull as models
from bolid.models.families import get_family
from bolid.run import sha256_file
from bolid_cli.main import app

TINY = get_family("tiny")
SIZE = "160x256"  # WIDTHxHEIGHT; SDXL's own sizes take minutes here
PROMPT = "a full body photo of a woman waving, on a beach"


def write_sdxl(folder: Path) -> torch.nn.Module:
    """A small random SDXL whose VAE scales by 8, as published; returns its UNet."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from small_base import make_sdxl_base

    small = StableDiffusionXLPipeline.from_pretrained(make_sdxl_base(folder.parent / "small"))
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=small.text_encoder, text_encoder_2=small.text_encoder_2, tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer_2, unet=small.unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    return pipe.unet


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    """What another machine has downloaded."""
    folder = tmp_path_factory.mktemp("downloads")
    unet = write_sdxl(folder / "stable-diffusion-xl-base-1.0")
    with zipfile.ZipFile(folder / "buffalo_l.zip", "w") as packed:
        packed.write(TINY.face / "det.onnx", "det_10g.onnx")
        packed.write(TINY.face / "rec.onnx", "w600k_r50.onnx")
    shutil.copytree(TINY.image_text, folder / "eva02_large_patch14_clip_224.merged2b_s4b_b131k")
    for part in ("pose", "segmentation"):
        shutil.copytree(getattr(TINY, part), folder / part)
    depth = folder / "controlnet-depth-sdxl-1.0"
    random_controlnet(unet.float(), (8, 8, 8, 16)).half().save_pretrained(depth, variant="fp16")
    state = initial_state(unet.float(), "face", 512, tokens=16)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state["ip_adapter"].items():
        state["ip_adapter"][name] = 3 * torch.randn(tensor.shape, generator=generator).half()
    torch.save(state, folder / "ip-adapter-faceid-portrait_sdxl.bin")
    return folder


def run(*words: str) -> str:
    """A command as typed; its stdout. `seen` of the last call: its stderr."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.stderr
    run.seen = result.stderr
    return result.stdout


def follow_the_body(arguments: list[str], other: np.ndarray, family: families.Family) -> None:
    """`generate --body-from shape` gives another picture than `other`, with the same face branch."""
    shape = ["--body-from", "shape", "--pose", "waving", "--out", "shaped"]
    (picture,) = run("generate", PROMPT, *arguments, *shape).split()
    assert "the body is not used" not in run.seen
    with Image.open(picture) as image:
        record = json.loads(image.text["bolid"])
        assert not np.array_equal(np.asarray(image), other)
    assert record["config"]["body_from"] == "shape" and record["config"]["pose"] == "waving"
    assert record["inputs"]["face_adapter"] == sha256_file(family.face_portrait)


@pytest.mark.slow
def test_the_whole_path(downloads, rendered_people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {**families._FULL_SIZE["sdxl"], "image_size": [256, 160], "sizes": [[256, 160]]}
    monkeypatch.setitem(families._FULL_SIZE, "sdxl", small)
    monkeypatch.setattr(models, "reachable", lambda url: False)
    # The pack of this test stands for buffalo_l.
    monkeypatch.setattr(bolid.models.convert, "PORTRAIT_FACE_MODEL", sha256_file(TINY.face / "rec.onnx"))

    run("models", "pull", "sdxl", "--from", str(downloads))
    run("models", "pull", "sdxl", "--only", "face_portrait", "--from", str(downloads))
    assert "for research only" in run.seen
    run("models", "pull", "sdxl", "--only", "depth_controlnet", "--from", str(downloads))
    run("models", "verify", "sdxl")
    run("models", "use", "sdxl")
    family = get_family()
    assert family.name == "sdxl" and not family.has("face_adapter") and not family.has("body_adapter")
    assert family.body_encoder == families.MASK_ENCODER

    photos = sorted(next(path for path in sorted(rendered_people.iterdir())).glob("*.jpg"))
    Path("me").mkdir()
    for photo in photos:
        shutil.copy(photo, "me")
    Path("me/notes.docx").write_bytes(b"x")
    run("profile", "me", "--height", "172", "--preview", "sheet.png")
    assert "not read: 1 (me/notes.docx)" in run.seen and Path("sheet.png").is_file()
    stature = next(line for line in run.seen.splitlines() if line.startswith("stature"))
    assert abs(float(stature.split()[1]) - 172) < 1
    profile = load_profile("me.safetensors")
    assert profile.face is not None and profile.body is not None and profile.record["family"] == "sdxl"

    arguments = ["--profile", "me.safetensors", "--steps", "2", "--size", SIZE, "--device", "cpu"]
    (picture,) = run("generate", PROMPT, *arguments).split()
    assert "the body is not used: there is no body adapter" in run.seen
    assert "--body-from shape --pose standing needs none" in run.seen
    (without,) = run("generate", PROMPT, *arguments[2:], "--out", "without").split()
    with Image.open(picture) as image:
        record = json.loads(image.text["bolid"])
        pixels = np.asarray(image)
    assert pixels.shape == (256, 160, 3) and not np.array_equal(pixels, np.asarray(Image.open(without)))
    assert record["inputs"]["face_adapter"] == sha256_file(family.face_portrait)

    # The body's depth map, of the picture's size, as depth ControlNets take it.
    run("profile", "export", "me.safetensors", "--maps", "depth", "--size", SIZE, "--out", "maps")
    depth = np.asarray(Image.open("maps/depth.png").convert("L"))
    assert depth.shape == (256, 160) and depth.max() > 240 and (depth == 0).mean() > 0.5

    # The body by that depth map, through the published depth ControlNet; the face as before.
    follow_the_body(arguments, pixels, family)

    # A profile by another pack is refused.
    other = Path("other.safetensors")
    shutil.copy("me.safetensors", other)
    face_model = "0" * 64
    changed = {**profile.record, "inputs": {**profile.record["inputs"], "face_model": face_model}}
    changed.pop("sha256", None)
    save_profile(other, profile.body_mean, profile.body_logvar, profile.face, profile.view_weights, changed)
    result = CliRunner().invoke(app, ["generate", PROMPT, "--profile", str(other), *arguments[2:]])
    assert result.exit_code == 1 and "InsightFace buffalo_l" in result.stderr
