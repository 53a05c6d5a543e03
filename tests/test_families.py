from __future__ import annotations

import pytest

from bolid.errors import BolidError
from bolid.models import families
from bolid.run import home


def test_tiny_is_the_default():
    family = families.get_family()
    assert family.name == "tiny" and families.chosen_family() == ("tiny", "default")
    assert all(side % 8 == 0 for side in family.image_size)
    assert family.steps == len(family.timesteps) == 6 and family.guidance.value == 0


def test_guidance_may_have_an_interval(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('image_size = [64, 48]\n[defaults]\nguidance = "3@0..0.5"\n')
    guidance = families.get_family(str(file)).guidance
    assert guidance.up == 3 and list(guidance.steps(4)) == [0, 1]
    file.write_text("image_size = [64, 48]\n")
    assert families.get_family(str(file)).guidance.plain() == 5.0
    file.write_text('image_size = [64, 48]\n[defaults]\nguidance = "much"\n')
    with pytest.raises(BolidError, match="the guidance of family '.*mine.toml' is much"):
        _ = families.get_family(str(file)).guidance


def test_order_of_choice(monkeypatch):
    families.remember_family("sd15")
    assert families.get_family().name == "sd15"
    monkeypatch.setenv("BOLID_FAMILY", "sdxl")
    assert families.get_family().name == "sdxl"
    assert families.get_family("sdxl-lightning").name == "sdxl-lightning"


def test_unknown_family():
    with pytest.raises(BolidError, match="no model family called 'huge'") as caught:
        families.get_family("huge")
    assert "tiny" in caught.value.hint and "sdxl" in caught.value.hint
    with pytest.raises(BolidError):
        families.remember_family("huge")
    assert families.get_family().name == "tiny"


def test_missing_weights_name_the_file_and_the_way_to_it():
    family = families.get_family("sdxl")
    with pytest.raises(BolidError, match="family 'sdxl' has no pose model: looked for .*sdxl/pose") as caught:
        family.require("pose")
    assert "model.safetensors" in caught.value.hint
    assert "(and base, segmentation, face, image_text, missing too, without --only)" in caught.value.hint
    with pytest.raises(BolidError) as caught:
        family.require("body_adapter")
    assert "bolid train-adapter --family sdxl" in caught.value.hint
    assert "base" in family.missing()
    base = home() / "sdxl" / "base"
    base.mkdir(parents=True)
    with pytest.raises(BolidError):  # an empty directory is not a model
        family.require("base")
    (base / "model_index.json").write_text("{}")
    assert family.require("base") == base


def test_full_size_families_have_a_body_encoder_of_masks_until_one_is_trained():
    family = families.get_family("sdxl")
    assert family.require("body_encoder") == families.MASK_ENCODER and "body_encoder" not in family.missing()
    assert family.body_shape == families.MASK_SHAPE
    own = home() / "sdxl" / "body-encoder.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(families.get_family("tiny").body_encoder.read_bytes())
    assert families.get_family("sdxl").body_encoder == own
    assert families.get_family("tiny").body_encoder != families.MASK_ENCODER


def test_parts_that_a_family_may_lack():
    """They are asked for by the options that need them only, and do not make a family incomplete."""
    family = families.get_family("sdxl")
    for part, words in (
        ("controlnet", "ControlNet"),
        ("few_steps_lora", "few-step LoRA"),
        ("depth_controlnet", "depth ControlNet"),
    ):
        assert part not in family.missing()
        with pytest.raises(BolidError, match=f"family 'sdxl' has no .*{words}: looked for .*sdxl/") as caught:
            family.require(part)
        assert "put it there" in caught.value.hint
    assert family.few_steps["guidance"] == 0 and families.get_family("sdxl-lightning").few_steps == {}


def test_family_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('image_size = [512, 384]\n[defaults]\nsteps = 4\n[paths]\nbase = "../elsewhere"\n')
    family = families.get_family(str(file))
    assert family.image_size == (512, 384) and family.defaults == {"steps": 4}
    assert family.view_size == (512, 384)
    assert family.base == tmp_path / "../elsewhere" and family.pose == tmp_path / "pose"
    for text, message in (
        ("image_size = [512", "not valid TOML"),
        ("image_size = [511, 384]", r"image_size is \[511, 384\]"),
        ("image_size = [512, 384]\nview_size = [512, 512]", "has other proportions than image_size"),
        ("image_size = [512, 384]\n[paths]\nbas = 'x'", "unknown path 'bas'"),
    ):
        file.write_text(text)
        with pytest.raises(BolidError, match=message):
            families.get_family(str(file))
    with pytest.raises(BolidError, match="cannot read the family file"):
        families.get_family(str(tmp_path / "absent.toml"))


def test_an_artefact_of_another_family_is_refused():
    assert families.match_family(None, "tiny", "shards/").name == "tiny"
    with pytest.raises(BolidError, match="shards/ was made with family 'tiny', but --family is 'sdxl'"):
        families.match_family("sdxl", "tiny", "shards/")


@pytest.mark.parametrize(
    ("prompt", "generated"),
    [
        ("a man", "a man, in a white short-sleeved top and blue trousers"),
        ("a woman, on a beach", "a woman, in a white short-sleeved top and blue trousers, on a beach"),
        ("A portrait of a man, in the snow", "A portrait of a man, in a white short-sleeved top, in the snow"),
        ("a man in a red long-sleeved top, in a room", "a man in a red long-sleeved top, in blue trousers, in a room"),
        ("a man in green SHORTS on top", "a man in green SHORTS on top"),
        ("a woman, in a stopwatch", "a woman, in a white short-sleeved top and blue trousers, in a stopwatch"),
    ],
)
def test_nobody_is_generated_undressed(prompt, generated):
    assert families.get_family("tiny").dressed(prompt) == generated


def test_a_wardrobe_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("image_size = [64, 48]\n[[wardrobe]]\nwords = ['coat']\ndefault = 'a coat'\n")
    assert families.get_family(str(file)).dressed("a man") == "a man, in a coat"
    # A base that has seen the world dresses people itself.
    assert families.get_family("sdxl").dressed("a man") == "a man"
    file.write_text("image_size = [64, 48]\n[[wardrobe]]\nwords = ['coat']\n")
    with pytest.raises(BolidError, match="wardrobe has"):
        families.get_family(str(file))
