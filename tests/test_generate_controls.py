"""`generate`: scales, guidance, LoRAs, few steps and poses."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from generate_world import (
    PROMPTS,
    make_pictures,
    make_world,
    random_controlnet,
    read_picture,
    same,
    save_lora,
    with_adapters,
)
from safetensors.torch import load_file, save_file

import bolid.generate.pose_map
from bolid.backends.diffusion import load_base
from bolid.errors import BolidError
from bolid.generate import generate
from bolid.models.families import get_family
from bolid.run import derive_seed, sha256_file

FEW_STEPS = "[few_steps]\nsteps = 4\nguidance = 0.0\nbody_scale = 1.5\nscheduler = 'LCMScheduler'\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"), settings=FEW_STEPS)


@pytest.mark.slow
def test_guidance_in_an_interval(world, tmp_path):
    whole = make_pictures(world, tmp_path / "a", profile=world.me, guidance="3")
    part = make_pictures(world, tmp_path / "b", profile=world.me, guidance="3@0..0.5")
    assert not same(whole, part) and same(whole, make_pictures(world, tmp_path / "c", profile=world.me))
    records = [read_picture(next((tmp_path / name).glob("*.png")))["config"]["guidance"] for name in ("a", "b")]
    assert records == [3.0, "3@0..0.5"]
    grid = make_pictures(world, tmp_path / "g", profile=world.me, grid=["guidance=1,3@0..0.5"])
    assert same(grid[2:4], part)


@pytest.mark.slow
def test_a_scale_for_each_part_of_the_network(world, tmp_path):
    whole = make_pictures(world, tmp_path / "a", profile=world.faceless)
    parts = make_pictures(world, tmp_path / "b", profile=world.faceless, body_scale="down=1,mid=1,up=1")
    one = [
        make_pictures(world, tmp_path / part, profile=world.faceless, body_scale=f"{part}=1")
        for part in ("down", "mid", "up")
    ]
    assert same(whole, parts)
    assert not any(same(picture, other) for picture in one for other in (whole, make_pictures(world, tmp_path / "0")))
    record = read_picture(tmp_path / "mid" / "000-a-photo-of-a-woman.png")
    assert record["config"]["scales"] == {"body": "down=0,mid=1,up=0"}


@pytest.mark.slow
def test_loras(world, tmp_path):
    pipe = load_base(get_family(world.family))
    a, b = save_lora(tmp_path / "a.safetensors", pipe.unet), save_lora(tmp_path / "b.safetensors", pipe.unet, 1)
    bare, with_me = make_pictures(world, tmp_path / "0"), make_pictures(world, tmp_path / "1", profile=world.me)
    changed = make_pictures(world, tmp_path / "2", lora=[str(a)])
    assert not same(changed, bare)
    assert same(make_pictures(world, tmp_path / "3", lora=[f"{a}:0"]), bare)
    assert same(make_pictures(world, tmp_path / "4", lora=[f"{a}:1.0", f"{b}:0"]), changed)
    assert not same(make_pictures(world, tmp_path / "5", lora=[f"{a}:0.5", f"{b}:-1"]), changed)
    by_peft = save_lora(tmp_path / "peft.safetensors", pipe.unet, prefix="base_model.model.")
    assert same(make_pictures(world, tmp_path / "7", lora=[str(by_peft)]), changed)
    both = make_pictures(world, tmp_path / "6", profile=world.me, lora=[str(a)])
    assert not same(both, with_me) and not same(both, changed)
    record = read_picture(tmp_path / "5" / "000-a-photo-of-a-woman.png")
    assert record["inputs"]["lora_1"] == sha256_file(b) and record["config"]["lora"] == [f"{a}:0.5", f"{b}:-1"]


def test_a_lora_that_does_not_fit(world, tmp_path):
    pipe = load_base(get_family(world.family))
    wide = save_lora(tmp_path / "wide.safetensors", pipe.unet)
    save_file({k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(wide).items()}, wide)
    some = save_lora(tmp_path / "some.safetensors", pipe.unet)
    save_file({k.replace("down_blocks", "side_blocks"): v for k, v in load_file(some).items()}, some)
    bare = save_lora(tmp_path / "bare.safetensors", pipe.unet, prefix="")
    save_file({"weight": torch.ones(2)}, tmp_path / "none.safetensors")
    for file, mark in (("loha", "x.hada_w1_a"), ("lokr", "x.lokr_w1"), ("words", "bundle_emb.me.string_to_param.*")):
        save_file(load_file(bare) | {mark: torch.ones(2)}, tmp_path / f"{file}.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file at all")
    for path, message in (
        (wide, "does not fit the base of family"),
        (some, "does not fit the base of family"),
        (bare, "does not fit the base of family"),
        (tmp_path / "none.safetensors", "is no LoRA"),
        (tmp_path / "loha.safetensors", "is a LoHa"),
        (tmp_path / "lokr.safetensors", "is a LoKr"),
        (tmp_path / "words.safetensors", "is a LoRA with embeddings of new words"),
        (tmp_path / "text.safetensors", "is not a safetensors file"),
        (tmp_path / "absent.safetensors", "there is no LoRA"),
    ):
        with pytest.raises(BolidError, match=message) as error:
            make_pictures(world, tmp_path / "out", lora=[f"{path}:0.5"])
        assert error.value.hint and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_few_steps(world, tmp_path):
    """The family's LoRA, scheduler and body scale, no guidance, no null rows: what diffusers alone makes with them."""
    with pytest.raises(BolidError, match="has no few-step LoRA: looked for .*few.safetensors"):
        make_pictures(world, tmp_path / "none", few_steps=True)
    with pytest.raises(BolidError, match="--guidance is 3 with --few-steps"):
        make_pictures(world, tmp_path / "none", few_steps=True, guidance=3.0)
    with pytest.raises(BolidError, match="--negative has no effect at guidance 0"):
        make_pictures(world, tmp_path / "none", few_steps=True, negative="a hat")
    with pytest.raises(BolidError, match="family 'sdxl-lightning' has no few-step sampler"):
        generate(PROMPTS, tmp_path / "none", few_steps=True, family="sdxl-lightning", device="cpu")
    assert not (tmp_path / "none").exists()
    pipe = load_base(get_family(world.family))
    lora = save_lora(get_family(world.family).few_steps_lora, pipe.unet, seed=5)
    try:
        got = make_pictures(world, tmp_path / "a", profile=world.faceless, few_steps=True, batch_size=1)
        record = read_picture(tmp_path / "a" / "000-a-photo-of-a-woman.png")
        plain = make_pictures(world, tmp_path / "c", profile=world.faceless, few_steps=True, batch_size=1, body_scale=1)
        with pytest.raises(BolidError, match="--steps 60 does not suit the sampler"):
            make_pictures(world, tmp_path / "b", few_steps=True, steps=60)
    finally:
        lora.unlink()
    assert record["config"]["steps"] == 4 and record["config"]["guidance"] == 0 and "few_steps_lora" in record["inputs"]
    assert record["config"]["scales"] == {"body": 1.5}
    save_lora(tmp_path / "few.safetensors", pipe.unet, seed=5)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path, weight_name="few.safetensors")
    with_adapters(world, "body", pipe=pipe)
    for scale, made in ((1.5, got), (1.0, plain)):
        pipe.set_ip_adapter_scale(scale)
        expected = pipe(
            PROMPTS[0], height=64, width=48, num_inference_steps=4, guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0))],
            ip_adapter_image_embeds=[torch.ones(1, 1, 8)],
        ).images[0]  # fmt: skip
        assert np.array_equal(made[0], np.asarray(expected))


@pytest.mark.slow
def test_a_pose_from_a_photo(world, tmp_path, monkeypatch):
    """Through the ControlNet variant of the pipeline, with the person's branches still in place."""
    poses = {"a.png": 60, "b.png": 200}
    for name in poses:
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(
        bolid.generate.pose_map,
        "read_pose",
        lambda photo, family, device: np.full((*family.image_size, 3), poses[photo.name], np.uint8),
    )
    with pytest.raises(BolidError, match="has no ControlNet: looked for .*controlnet"):
        make_pictures(world, tmp_path / "0", pose_from=tmp_path / "a.png")
    family = get_family(world.family)
    unet = load_base(family).unet
    network = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    network.save_pretrained(family.controlnet)
    me = make_pictures(world, tmp_path / "1", profile=world.me)
    # An untrained one adds zeros.
    assert same(me, make_pictures(world, tmp_path / "2", profile=world.me, pose_from=tmp_path / "a.png"))
    network = random_controlnet(unet)
    network.save_pretrained(family.controlnet)
    a = make_pictures(world, tmp_path / "3", profile=world.me, pose_from=tmp_path / "a.png")
    b = make_pictures(world, tmp_path / "4", profile=world.me, pose_from=tmp_path / "b.png")
    assert not same(a, me) and not same(a, b)
    assert not same(a, make_pictures(world, tmp_path / "5", pose_from=tmp_path / "a.png"))
    assert same(
        me, make_pictures(world, tmp_path / "6", profile=world.me, pose_from=tmp_path / "a.png", pose_scale=0.0)
    )
    half = make_pictures(world, tmp_path / "7", profile=world.me, pose_from=tmp_path / "a.png", pose_scale="1@0..0.5")
    assert not same(half, a) and not same(half, me)
    record = read_picture(tmp_path / "7" / "000-a-photo-of-a-woman.png")
    assert record["config"]["pose_scale"] == "1@0..0.5" and record["inputs"]["pose_from"]
    with pytest.raises(BolidError, match="--pose-scale is up=1"):
        make_pictures(world, tmp_path / "8", pose_from=tmp_path / "a.png", pose_scale="up=1")
    other = diffusers.ControlNetModel.from_config({**network.config, "cross_attention_dim": 16})
    other.save_pretrained(family.controlnet)
    with pytest.raises(BolidError, match="was made for another base: its cross_attention_dim is 16"):
        make_pictures(world, tmp_path / "9", pose_from=tmp_path / "a.png")
