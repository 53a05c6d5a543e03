"""The one command for a family's figures: its second reader, its recogniser, its statistics and its table."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bolid.errors import BolidError
from bolid.method.metrics import Interval
from bolid.models.families import get_family
from bolid.synth.people import RATIO_NAMES, sample_person

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
import figures
import fisher_faces
import instruments
import mask_reader
import methods
import pictures
import readings


def test_prompts_are_the_same_each_time_and_name_no_build():
    person = sample_person(100_000)
    asked, again = (pictures.wanted(person, 3, 2) for _ in range(2))
    assert asked == again and len({one.seed for one in asked}) == len(asked)
    assert [one.name for one in asked] == ["full-0", "full-1", "full-2", "portrait-0", "portrait-1", "full-0-again"]
    assert asked[-1].prompt == asked[0].prompt
    gender = "woman" if person.phenotypes["gender"] > 0.5 else "man"
    for one in asked:
        words = one.prompt.replace(",", "").split()
        assert gender in words and not set(words) & {"tall", "short", "slim", "heavy", "muscular"}


def test_no_man_is_asked_for_in_a_skirt():
    men = [seed for seed in range(100_000, 100_040) if sample_person(seed).phenotypes["gender"] <= 0.5]
    prompts = [one.prompt for seed in men for one in pictures.wanted(sample_person(seed), 4, 0)]
    assert len(prompts) > 40 and not any("skirt" in prompt for prompt in prompts)


def test_pictures_are_kept_until_prompt_or_model_changes(tmp_path):
    class Maker:
        calls: list[list[str]] = []
        hashes = {"base": "a"}

        def models(self, method):
            return self.hashes

        def make(self, method, who, photos, asked):
            self.calls.append([one.name for one in asked])
            return [np.zeros((8, 6, 3), np.uint8) for _ in asked]

    maker, asked = Maker(), [pictures.Wanted("full-0", "a", {}, 1), pictures.Wanted("full-1", "b", {}, 2)]
    for _ in range(2):
        folder = pictures.make_row(maker, "base", {100_000: (None, asked)}, tmp_path)
    assert maker.calls == [["full-0", "full-1"]] and len(list(folder.glob("p100000/*.png"))) == 2
    changed = [asked[0], pictures.Wanted("full-1", "c", {}, 2)]
    pictures.make_row(maker, "base", {100_000: (None, changed)}, tmp_path)
    assert maker.calls[1:] == [["full-1"]]
    maker.hashes = {"base": "b"}
    pictures.make_row(maker, "base", {100_000: (None, changed)}, tmp_path)
    assert maker.calls[2:] == [["full-0", "full-1"]]


def test_a_person_who_cannot_be_read_is_left_out(tmp_path, capsys):
    class Maker:
        def models(self, method):
            return {}

        def make(self, method, who, photos, asked):
            raise BolidError("no body", "")

    folder = pictures.make_row(Maker(), "bolid-1", {100_000: (None, [pictures.Wanted("full-0", "a", {}, 1)])}, tmp_path)
    assert not (folder / "p100000").exists() and "leaves out p100000: no body" in capsys.readouterr().err


def people_who_differ(count: int = 12, pictures: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of people who differ in two of forty directions; much more changes from picture to picture."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(count), pictures)
    vectors = rng.normal(size=(len(owners), 40)) * np.linspace(0.1, 3, 40)
    vectors[:, :2] += rng.normal(size=(count, 2))[owners] * 3
    return vectors.astype(np.float32), owners


def test_fisher_faces_find_what_differs_between_people():
    vectors, owners = people_who_differ()
    mean, weight = fisher_faces.fit(vectors, owners)
    found = fisher_faces.accepted(fisher_faces.unit((vectors - mean) @ weight[:, :2]), owners)
    plain = fisher_faces.accepted(fisher_faces.unit(vectors - vectors.mean(0)), owners)
    assert found["cosine, one person"] > 0.9 > plain["cosine, one person"]
    assert found["accepted at 1 % false accepts"] > plain["accepted at 1 % false accepts"] + 0.3


def test_a_changed_face_is_a_picture():
    image = np.random.default_rng(0).integers(0, 256, (256, 192, 3)).astype(np.uint8)
    landmarks = np.array([[80, 80], [110, 80], [95, 98], [84, 112], [106, 112]], np.float32)
    face = fisher_faces.changed(image, landmarks, np.random.default_rng(1))
    assert face.shape == (fisher_faces.SIDE, fisher_faces.SIDE, 3) and face.min() >= 0 and face.max() <= 1


def test_dinov2_reads_the_whole_picture(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, "image_size": 224}
    Dinov2Model(Dinov2Config(patch_size=56, **sizes)).save_pretrained(tmp_path)
    dark = np.zeros((60, 40, 3), np.uint8)
    feet = dark.copy()
    feet[-8:] = 255
    found = instruments.Dino(tmp_path).encode([dark, feet, dark])
    assert found.shape == (3, 16) and torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])


def test_ridge_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(400, 8, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    y = x @ true + 2 + 0.01 * torch.randn(400, 3, generator=generator)
    weight, bias = mask_reader.ridge(x, y, torch.arange(400) // 4)
    assert torch.allclose(weight, true, atol=0.02) and torch.allclose(bias, torch.full((3,), 2.0).double(), atol=0.02)


def some_readings(people: int = 12, noise: float = 0.0) -> readings.Readings:
    """Readings of made-up pictures: the body is read with `noise`, a third of the faces is found."""
    rng, found = np.random.default_rng(0), object.__new__(readings.Readings)
    found.people = dict.fromkeys(range(people))
    found.truth = rng.normal(size=(people, len(RATIO_NAMES)))
    found.by_skin = rng.permutation(people)

    class Reader:
        ratio_names = RATIO_NAMES

        def ratios(self, read):
            return read.mean(1)

    class Instruments:
        bodies = {"judge": Reader()}

    found.readers = Instruments()

    asked = {name: np.ones((people, 4)) for name in ("pose", "colours", "scene", "framing")}

    def row(scale: float) -> readings.Row:
        read = found.truth[:, None] + scale * rng.normal(size=(people, 4, len(RATIO_NAMES)))
        return readings.Row(
            {"judge": read}, np.ones((people, 4)), np.tile([1.0, 0.0, 0.0], (people, 1)),
            {"an outsider": np.full((people, 3), 0.2)}, {"an outsider": np.full((people, 3), 0.1)}, asked,
            {"FID": torch.randn(4 * people, 8)}, np.full(people, 2.0), np.full(people, 0.1),
            np.full((people, 6), 0.5 - scale / 100),
        )  # fmt: skip

    found.rows = {"base": row(3), "build-words": row(2), "bolid-1": row(noise), "bolid-8": row(noise), "real": row(0)}
    return found


@pytest.mark.slow
def test_figures_of_perfect_pictures_are_perfect():
    found = some_readings().figures()
    eight = found["bolid-8"]
    for name in ("body by judge, mean R2, mean of a person's pictures", "body by judge, mean R2, one picture"):
        assert eight[name].value == pytest.approx(1)
        assert found["base"][name].value < 0
    assert eight["arm by judge, R2"].value == pytest.approx(1)
    assert eight["face found, portraits"].value == pytest.approx(1 / 3)
    for label in ("", " beyond strangers"):
        assert eight[f"likeness by an outsider{label}, over real photos'"].value == pytest.approx(1)
    assert eight["face found, darkest over lightest"].value == pytest.approx(1)
    assert eight["diversity over the base's"].value == pytest.approx(1)
    assert eight["pose as asked, minus the base's"].value == 0
    assert found["bolid-1"]["R2 by judge over that of bolid-8"].value == pytest.approx(1)


def test_a_method_is_compared_in_pairs():
    found = some_readings(noise=0.5).differences("bolid-8", "base")
    r, text = found["body by judge, mean r"], found["text score"]
    assert r.interval.low > 0 and r.p < 0.01
    assert text.interval.value == pytest.approx(0.025) and found["likeness by an outsider"].p == 1
    same = some_readings().differences("bolid-8", "bolid-1")
    assert same["body by judge, mean R2, mean of a person's pictures"].interval.value == pytest.approx(0)


def test_the_error_is_in_standard_deviations():
    found = some_readings().figures()
    name = "body by judge, mean error in standard deviations"
    assert found["bolid-8"][name].value == pytest.approx(0) and found["base"][name].value > 1


def test_the_mean_of_pictures_is_read_better_than_one():
    eight = some_readings(noise=0.5).figures()["bolid-8"]
    mean, one = (eight[f"body by judge, mean R2, {of}"] for of in ("mean of a person's pictures", "one picture"))
    assert mean.value > one.value + 0.05 and mean.low < mean.value < mean.high


def test_faces_that_are_not_found_count_as_unlike():
    face, other = np.array([1.0, 0]), np.array([0.6, 0.8])
    assert readings.likeness_of({"x": face}, [{"x": face}, {"x": other}], "x") == pytest.approx(0.8)
    assert readings.likeness_of({}, [{"x": face}], "x") == 0
    assert np.isnan(readings.likeness_of({"x": face}, [{}, {}], "x"))


def test_the_table_has_a_line_for_every_figure():
    found = {"base": {"FID": Interval(0.71234, 0.6, 0.8)}, "bolid-8": {"new": Interval(12.345, np.nan, np.nan)}}
    facts = {
        "date": "2026-11-30", "commit": "abc", "family": "tiny", "size": [256, 192], "people": 3, "first": 100_000,
        "bodies": 2, "portraits": 1, "lacks": {"bolid-1": "an adapter"}, "seconds": 0.5,
        "instruments": {"FID": "a tower"},
    }  # fmt: skip
    text = figures.table(found, facts)
    assert "| FID |  | 0.712 (0.600 to 0.800) |  |" in text and "| new |  |  | 12.3 |" in text
    assert "bolid-1, which lacks an adapter" in text and "- FID: a tower" in text


def test_every_goal_has_a_figure():
    names = {name for found in some_readings().figures().values() for name in found}
    assert set(figures.ASKED) <= names


def test_a_method_says_which_files_it_lacks(tmp_path):
    maker = methods.Maker(get_family("tiny"), tmp_path)
    assert maker.lacks("base") == maker.lacks("bolid-8") == maker.lacks("shape-8") == ""
    assert maker.lacks("ip-adapter") == str(tmp_path / "ip-adapter" / "image.safetensors")
    assert "bolid/body.safetensors" in maker.lacks("bolid-8-equal")


def test_pictures_depend_on_the_models_of_their_method_alone(tmp_path):
    maker = methods.Maker(get_family("tiny"), tmp_path)
    base, eight, both = (maker.models(method) for method in ("base", "bolid-8", "bolid-8-both"))
    assert base.items() < eight.items() < both.items()
    assert "adapter/body.safetensors" in eight and "adapter/body.safetensors" not in base
    assert any("controlnet-depth" in name for name in both)
    assert "training" in maker.models("dreambooth-lora")


def test_a_family_can_be_a_folder(tmp_path):
    own = get_family("tiny").root
    shutil.copy(own / "family.json", tmp_path)
    family = get_family(str(tmp_path))
    assert family.root == tmp_path and family.image_size == get_family("tiny").image_size
    assert family.missing()  # nothing else is there
    (tmp_path / "family.json").write_text("[1]")
    with pytest.raises(BolidError, match="no JSON object"):
        get_family(str(tmp_path))
    (tmp_path / "family.json").write_text("{")
    with pytest.raises(BolidError, match="is damaged"):
        get_family(str(tmp_path))


@pytest.mark.slow
def test_the_command_measures_the_embedded_family(tmp_path, monkeypatch, capsys):
    words = ["--family", "tiny", "--people", "3", "--bodies", "2", "--portraits", "1", "--rows", "base", "bolid-8"]
    monkeypatch.setattr(sys, "argv", ["figures.py", *words, "--work", str(tmp_path)])
    figures.main()
    found = json.loads((tmp_path / "family.json").read_text())
    assert set(found["figures"]) == {"base", "bolid-8", "real"}
    assert "face found, portraits" in capsys.readouterr().out
