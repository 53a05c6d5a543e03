from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import make_body_encoder, make_family, make_training_shards

from bolid.backends.base import load_base
from bolid.errors import BolidError
from bolid.families import get_family
from bolid.formats.profile import save_profile
from bolid.generate import generate, read_prompts
from bolid.run import derive_seed, run_record, sha256_file
from bolid.train_adapter import TrainAdapterConfig, train_adapter

PROMPTS = ["a photo of a woman", "a man on a beach"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(family, adapter folder, profile with a face, profile without)"""
    root = tmp_path_factory.mktemp("generate")
    family = make_family(root)
    encoder = make_body_encoder(root / "enc.safetensors", family)
    shards = make_training_shards(root / "train", family)
    config = TrainAdapterConfig(steps=3, batch_size=4, face_tokens=2, sample_every=0, learning_rate=0.5)
    train_adapter(shards, root / "adapter", config=config, body_encoder=encoder, device="cpu")
    face = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)
    inputs = {"body_encoder": sha256_file(encoder), "photo_000": "ab" * 32}
    record = run_record("profile", family=family, inputs=inputs)
    for name, own in (("me", face), ("faceless", None)):
        save_profile(root / f"{name}.safetensors", torch.ones(8), torch.zeros(8), own, torch.ones(1), record)
    return family, root / "adapter", root / "me.safetensors", root / "faceless.safetensors"


def paint(world, out, **options):
    options = {"adapter": world[1], "family": world[0], "device": "cpu", "seed": 4} | options
    return [np.asarray(Image.open(path)) for path in generate(PROMPTS, out, **options)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_scale_0_is_the_bare_base_bit_for_bit(world, tmp_path):
    nobody = paint(world, tmp_path / "a")
    assert same(nobody, paint(world, tmp_path / "b", profile=world[2], face_scale=0.0, body_scale=0.0))
    pipe = load_base(get_family(world[0]))
    bare = pipe(
        PROMPTS, height=64, width=48, num_inference_steps=2, guidance_scale=3.0, negative_prompt=["", ""],
        generator=[torch.Generator().manual_seed(derive_seed(4, "generate", i, 0)) for i in (0, 1)], output_type="pil",
    ).images  # fmt: skip
    assert same(nobody, [np.asarray(image) for image in bare])


def test_scale_0_equals_the_base_with_the_adapter_loaded_too(world, tmp_path):
    """Not only because nothing is loaded: diffusers' own processors add nothing at scale 0."""
    pipe = load_base(get_family(world[0]))
    arguments = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "np"}
    bare = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), **arguments).images
    pipe.load_ip_adapter([str(world[1])], subfolder=[""], weight_name=["body.safetensors"], image_encoder_folder=None)
    embeds = [torch.stack([torch.zeros(8), torch.ones(8)])[:, None]]
    for scale, equal in ((0.0, True), (1.0, False)):
        pipe.set_ip_adapter_scale([scale])
        picture = pipe(
            PROMPTS[0], generator=torch.Generator().manual_seed(1), ip_adapter_image_embeds=embeds, **arguments
        ).images
        assert np.array_equal(picture, bare) == equal


def test_every_way_of_naming_a_person_changes_the_picture(world, tmp_path):
    nobody = paint(world, tmp_path / "0")
    me = paint(world, tmp_path / "1", profile=world[2])
    faceless = paint(world, tmp_path / "2", profile=world[3])
    invented = [paint(world, tmp_path / f"3{i}", new_person=i) for i in (1, 1, 2)]
    assert not same(me, nobody) and not same(faceless, nobody) and not same(me, faceless)
    assert same(invented[0], invented[1]) and not same(invented[0], invented[2])
    assert same(faceless, paint(world, tmp_path / "4", profile=world[2], face_scale=0.0))


def test_a_picture_depends_on_its_place_and_not_on_the_batch(world, tmp_path):
    """The same noise in every batch; the pictures agree up to the last bit of rounding."""
    one = paint(world, tmp_path / "a", profile=world[2], n=2, batch_size=1)
    many = paint(world, tmp_path / "b", profile=world[2], n=2, batch_size=3)
    assert len(one) == 4
    for a, b in zip(one, many, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_without_guidance_there_are_no_negative_rows(world, tmp_path):
    """Guidance 1 and below: diffusers takes the embeds as they are, so null rows would be a second person."""
    pipe = load_base(get_family(world[0]))
    pipe.load_ip_adapter([str(world[1])], subfolder=[""], weight_name=["body.safetensors"], image_encoder_folder=None)
    expected = pipe(
        PROMPTS[0], height=64, width=48, num_inference_steps=2, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0)),
        ip_adapter_image_embeds=[torch.ones(1, 1, 8)],
    ).images[0]  # fmt: skip
    got = paint(world, tmp_path / "a", profile=world[3], guidance=0.0)
    assert np.abs(got[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_each_png_carries_its_run(world, tmp_path):
    paths = generate(PROMPTS, tmp_path, profile=world[2], adapter=world[1], device="cpu", n=2, steps=1, seed=9)
    assert [path.name for path in paths[:2]] == ["000-a-photo-of-a-woman-0.png", "000-a-photo-of-a-woman-1.png"]
    with Image.open(paths[3]) as picture:
        record = json.loads(picture.text["bolid"])
    assert record["kind"] == "picture" and record["family"] == world[0] and record["config"]["steps"] == 1
    assert record["config"]["prompt"] == PROMPTS[1] and record["config"]["scales"] == {"face": 1.0, "body": 1.0}
    assert record["seed"] == derive_seed(9, "generate", 1, 1)
    assert record["inputs"]["profile"] == sha256_file(world[2])
    assert record["inputs"]["photo_000"] == "ab" * 32  # for evaluate, which must not score against that photo
    assert record["inputs"]["body_adapter"] == sha256_file(world[1] / "body.safetensors")


def test_prompt_files_may_have_comments():
    assert read_prompts(["a photo", "", "  # not this", "two "]) == ["a photo", "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"n": 0}, "^-n is 0"),
        ({"body_scale": float("nan")}, "--body-scale is nan"),
        ({"guidance": -1.0}, "--guidance is -1"),
        ({"profile": "a", "new_person": 1}, "more than one person"),
        ({"device": "warp9"}, "warp9"),
    ],
)
def test_settings_that_make_no_sense(world, tmp_path, options, message):
    with pytest.raises(BolidError, match=message):
        generate(PROMPTS, tmp_path / "out", family=world[0], **{"device": "cpu", **options})
    assert not (tmp_path / "out").exists()


def test_no_prompt(world, tmp_path):
    with pytest.raises(BolidError, match="no prompt"):
        generate(["  "], tmp_path, family=world[0])


def test_a_face_is_asked_of_a_profile_without_one(world, tmp_path):
    with pytest.raises(BolidError, match="has no face, but --face-scale is 1.0"):
        generate(PROMPTS, tmp_path, profile=world[3], adapter=world[1], face_scale=1.0, device="cpu")


def test_files_that_do_not_belong_together(world, tmp_path):
    family, adapter, me, _ = world
    with pytest.raises(BolidError, match="was made with family"):
        generate(PROMPTS, tmp_path, profile=me, adapter=adapter, family="tiny", device="cpu")
    record = run_record("profile", family=family, inputs={"body_encoder": "0" * 64})
    save_profile(tmp_path / "old.safetensors", torch.ones(8), torch.zeros(8), None, torch.ones(1), record)
    with pytest.raises(BolidError, match="different body encoders") as error:
        generate(PROMPTS, tmp_path, profile=tmp_path / "old.safetensors", adapter=adapter, device="cpu")
    assert "make the profile again" in error.value.hint
    with pytest.raises(BolidError, match="is of kind"):
        generate(PROMPTS, tmp_path, profile=adapter / "body.safetensors", adapter=adapter, device="cpu")
    with pytest.raises(BolidError, match="there is no face adapter"):
        generate(PROMPTS, tmp_path, profile=me, adapter=tmp_path / "none", device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(BolidError, match="is a file"):
        generate(PROMPTS, tmp_path / "file", family=family, device="cpu")
