"""What a generated picture says of itself: to `generate --like`, to `inspect`, and to other programs."""

from __future__ import annotations

import numpy as np
import pytest
from generate_world import PROMPTS, make_pictures, make_world, read_picture, same
from PIL import Image
from sd_parsers import ParserManager

from bolid.errors import BolidError
from bolid.formats.images import decode_image
from bolid.formats.pictures import picture_record, record_of_whole, write_picture
from bolid.generate import generate
from bolid.generate.parameters import parameters_text
from bolid.inspect import inspect


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


def record(**config):
    settings = {
        "prompt": "a woman, smiling", "steps": 12, "guidance": "2.5@0.5..1", "person": "the profile me.safetensors",
        "scales": {"body": "0.7@0..0.5"}, "negative": "blurred: all", "lora": [], "size": "96x128",
    }  # fmt: skip
    packages = {"bolid": "0.2"}
    return {"kind": "picture", "family": "tiny", "seed": 2**40, "config": {**settings, **config}, "packages": packages}


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_other_programs_read_the_settings(tmp_path, format):
    path = tmp_path / f"a.{format}"
    for prompt in ("a woman, smiling", "eine Frau in Köln, 女", "two\nlines, Steps: 1, Seed: 2"):
        given = record(prompt=prompt)
        write_picture(path, Image.new("RGB", (96, 128), "red"), given, parameters_text(given, "DDIMScheduler"))
        found = ParserManager().parse(path)
        [sampler] = found.samplers
        assert found.generator.value == "AUTOMATIC1111"
        assert sampler.name == "DDIM" and found.full_prompt == prompt and found.full_negative_prompt == "blurred: all"
        assert sampler.parameters == {"cfg_scale": "2.5", "seed": str(2**40), "steps": "12"}
        assert sampler.model.name == "tiny"
        wanted = {"Size": "96x128", "Guidance interval": "0.5..1", "Person": "me", "Body scale": "0.7@0..0.5"}
        assert wanted.items() <= found.metadata.items() and found.metadata["Version"] == "bolid 0.2"
        assert picture_record(path.read_bytes()) == record_of_whole(path) == given
        assert inspect(path)["record"] == given and inspect(path)["width"] == 96


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_damaged_pictures_have_no_record(tmp_path, format):
    path = tmp_path / f"a.{format}"
    noise = np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8)
    write_picture(path, Image.fromarray(noise), record())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert record_of_whole(path) is None
    with pytest.raises(BolidError, match="is damaged"):
        decode_image(path.read_bytes()) if format == "webp" else picture_record(path.read_bytes())  # webp: EXIF is last
    Image.fromarray(noise).save(path)
    assert record_of_whole(path) is None and picture_record(path.read_bytes()) is None
    path.write_bytes(b"")
    assert record_of_whole(path) is None and record_of_whole(tmp_path / "none.png") is None
    if format == "jpg":
        with pytest.raises(BolidError, match="do not fit into a .jpg file"):
            write_picture(tmp_path / "b.jpg", Image.new("RGB", (8, 8)), record(prompt="x" * 70_000))


@pytest.mark.slow
def test_a_picture_is_made_again_from_itself_alone(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.safetensors").write_bytes(world.me.read_bytes())
    options = {"adapter": world.adapter, "device": "cpu"}
    made = generate(
        PROMPTS, "a", profile="me.safetensors", seed=4, n=2, batch_size=1, steps=3, guidance="2@0.5..1", body_scale=0.5,
        negative="a hat", **options,
    )  # fmt: skip
    for number, path in enumerate(made):
        [again] = generate(out=f"b{number}", like=path, **options)
        assert again.read_bytes() == path.read_bytes()
    [other] = generate(out="c", like=made[0], seed=8, **options)
    old, new = read_picture(made[0]), read_picture(other)
    assert new["config"] == old["config"] and new["seed"] != old["seed"]
    assert other.read_bytes() != made[0].read_bytes()
    [plain] = generate(["a dog"], "d", like=made[0], steps=1, guidance=1.5, negative="", new_person=3, **options)
    config = read_picture(plain)["config"]
    assert (config["prompt"], config["steps"], config["guidance"]) == ("a dog", 1, 1.5)
    assert config["person"] == "new person 3" and config["scales"] == {"body": 0.5}
    jpeg, *_ = generate(out="e", like=made[1], format="jpg", n=2, **options)
    assert generate(out="f", like=jpeg, **options)[0].read_bytes() == made[1].read_bytes()


def test_like_nobody_and_an_invented_person(world, tmp_path):
    for number, options in enumerate(({}, {"new_person": 7})):
        common = {"family": world.family, "adapter": world.adapter, "device": "cpu"}
        [path] = generate(PROMPTS[:1], tmp_path / str(number), seed=3, **options, **common)
        [again] = generate(out=tmp_path / f"{number}-again", like=path, adapter=world.adapter, device="cpu")
        assert same(*([np.asarray(Image.open(p))] for p in (path, again)))


def test_what_is_missing_for_a_like_picture_is_named(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me.safetensors").write_bytes(world.me.read_bytes())
    options = {"adapter": world.adapter, "device": "cpu", "steps": 1}
    (tmp_path / "pictures").mkdir()
    [path] = generate(PROMPTS[:1], "pictures", profile="me.safetensors", **options)
    (tmp_path / "me.safetensors").write_bytes(world.faceless.read_bytes())
    with pytest.raises(BolidError, match="me.safetensors is not the file that .* was made with") as error:
        generate(out="a", like=path, **options)
    assert "--profile" in error.value.hint
    (tmp_path / "me.safetensors").unlink()
    with pytest.raises(BolidError, match="was made with me.safetensors, which is neither here nor beside") as error:
        generate(out="a", like=path, **options)
    assert error.value.hint == "say where it is: --profile FILE"
    assert generate(out="a", like=path, profile=world.faceless, **options)
    [sheet] = generate(PROMPTS[:1], "g", family=world.family, device="cpu", grid=["steps=1"])[-1:]
    with pytest.raises(BolidError, match="not one picture but a grid"):
        generate(out="b", like=sheet)
    Image.new("RGB", (8, 8)).save("plain.png")
    with pytest.raises(BolidError, match="carries no settings"):
        generate(out="b", like="plain.png")
    with pytest.raises(BolidError, match="cannot read none.png"):
        generate(out="b", like="none.png")
    with pytest.raises(BolidError, match="--format is 'gif'"):
        make_pictures(world, tmp_path / "c", format="gif")
