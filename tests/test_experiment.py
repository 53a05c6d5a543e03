"""The experiment's own parts: the frozen protocol, the baselines, the methods and Table 1, on a small world."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_base import make_family, make_training_shards

from bolid.errors import BolidError
from bolid.evaluate import protocol
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method.metrics import Interval
from bolid.models.families import get_family
from bolid.synth.people import RATIO_NAMES, sample_person

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
import baselines
import build_words
import mechanism
import methods
import pictures
import seeds
import table
from readings import Difference

SIMPLE = ("ip-adapter", "ip-adapter-attention")
SHORT = baselines.equal_settings(steps=3, batch_size=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(training shards, family, folder with both baselines, trained for 3 steps)."""
    root = tmp_path_factory.mktemp("experiment")
    family = make_family(root)
    train = make_training_shards(root / "train", family)
    for method in SIMPLE:
        baselines.train_baseline(method, train, root / "baselines" / method, config=SHORT)
    return train, family, root / "baselines"


def test_the_protocol_is_frozen_and_takes_validation_people_only(tmp_path):
    whole = protocol.read_protocol()
    assert len(whole.people) == 24 and len(set(whole.people)) == 24 and len(whole.prompts) == 5
    assert all(100_000 <= person < 200_000 for person in whole.people)
    some = protocol.read_protocol(max_people=2, max_prompts=1)
    assert some.people == whole.people[:2] and some.prompts == whole.prompts[:1]
    assert all(" woman " in p or " man " in p for p in whole.prompts_for(whole.people[0]))
    bad = tmp_path / "protocol.json"
    bad.write_text(protocol.FILE.read_text().replace("190000", "200000"))
    with pytest.raises(BolidError, match="names the person 200000") as error:
        protocol.read_protocol(file=bad)
    assert "validation people" in error.value.hint


def test_held_out_photos_are_others(tmp_path):
    small = protocol.Protocol(0, (64, 48), 2, 2, 1, (100_000,), ("x",))
    assert [path.name for path in small.conditioning_photos(tmp_path, 100_000)] == ["000.jpg", "001.jpg"]
    assert [path.name for path in small.held_out_photos(tmp_path, 100_000)] == ["100.jpg", "101.jpg"]


def test_the_target_photo_is_never_its_own_condition(world):
    found = mechanism.Table(world[0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = np.random.default_rng(0).permutation(len(found.captions))[:6]
        context, present = mechanism.draw_context(found, rows, 3, generator)
        for i, row in enumerate(rows):
            used = context[i, present[i]].tolist()
            assert row not in used and len(set(used)) == len(used) >= 1
            assert all(found.owner[other] == found.owner[row] for other in used)


def test_attention_starts_as_the_average_and_ignores_the_order():
    torch.manual_seed(0)
    attention, embeds = baselines.PhotoAttention(16), torch.randn(2, 4, 16)
    present = torch.tensor([[True, True, True, False], [True, False, False, False]])
    out = attention(embeds, present)
    assert torch.allclose(out[0], embeds[0, :3].mean(0), atol=1e-6) and torch.allclose(out[1], embeds[1, 0], atol=1e-6)
    torch.nn.init.normal_(attention.attention.out_proj.weight)
    turned = attention(embeds[:1, [2, 0, 1, 3]], present[:1])
    assert torch.allclose(attention(embeds[:1], present[:1]), turned, atol=1e-5)
    other = embeds.clone()
    other[0, 3] = 100  # a photo that is not there
    assert torch.allclose(attention(other[:1], present[:1]), turned, atol=1e-5)


@pytest.mark.parametrize("method", SIMPLE)
def test_a_trained_baseline_makes_pictures(world, method, tmp_path, monkeypatch):
    _, family, folder = world
    tensors, record = load_tensors(folder / method / baselines.FILE, mechanism.KIND)
    settings = record["config"]
    assert settings["method"] == method and settings["steps"] == 3 and settings["build_word_dropout"] == 1
    assert tensors["ip_adapter.1.to_v_ip.weight"].abs().max() > 0  # it learned something
    maker = methods.Maker(get_family(family), folder)
    embeds = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    monkeypatch.setattr(
        maker, "seen",
        lambda who, photos: mechanism.Person(who.name, embeds[: len(photos)], torch.zeros(len(photos), 512)),
    )  # fmt: skip
    asked = [pictures.Wanted(f"full-{i}", "a woman", {"framing": "full body"}, i) for i in range(2)]
    photos = pictures.Photos([tmp_path / f"{i}.jpg" for i in range(3)], [], [])
    made = maker.make(method, sample_person(100_000), photos, asked)
    assert len(made) == 2 and made[0].dtype == np.uint8 and (made[0] != made[1]).any()
    (condition,) = maker.baseline(method).mechanism.vectors(maker.seen(sample_person(100_000), photos.given))
    assert torch.equal(condition, embeds[0]) == (method == "ip-adapter")
    embeds.copy_(embeds.flip(1))
    assert (maker.make(method, sample_person(100_000), photos, asked)[0] != made[0]).any()  # it depends on the person


def test_training_goes_on_to_the_bit(world, tmp_path, monkeypatch):
    train, _, folder = world
    save = mechanism.save_checkpoint
    calls = []

    def stop_after_two(*arguments):
        save(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    often = baselines.equal_settings(steps=3, batch_size=4, checkpoint_minutes=0.0)
    monkeypatch.setattr(mechanism, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        baselines.train_baseline("ip-adapter-attention", train, tmp_path, config=often)
    monkeypatch.setattr(mechanism, "save_checkpoint", save)
    baselines.train_baseline("ip-adapter-attention", train, tmp_path, config=often)
    whole, _ = load_tensors(folder / "ip-adapter-attention" / baselines.FILE, mechanism.KIND)
    resumed, _ = load_tensors(tmp_path / baselines.FILE, mechanism.KIND)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_trained_method_is_in_the_table_and_names_its_source():
    assert set(baselines.METHODS) < methods.METHODS.keys()
    for name in ("ip-adapter", "photomaker", "instantid", "pulid", "dreambooth-lora"):
        assert "arXiv:" in methods.METHODS[name].what


def test_a_method_that_was_trained_on_another_base_is_left_out(world, tmp_path):
    _, family, trained = world
    maker = methods.Maker(get_family(family), trained)
    assert maker.lacks("ip-adapter") == ""
    file = tmp_path / "ip-adapter" / baselines.FILE
    tensors, record = load_tensors(trained / "ip-adapter" / baselines.FILE, mechanism.KIND)
    file.parent.mkdir()
    save_tensors(file, tensors, {**record, "inputs": {**record["inputs"], "base": "0" * 64}})
    assert methods.Maker(get_family(family), tmp_path).lacks("ip-adapter") == f"{file} of this base"


def test_fusions_are_what_they_say():
    mean, logvar = torch.randn(3, 4), torch.randn(3, 4)
    views = (mean, logvar, torch.tensor([1.0, 0.5, 0.1]))
    assert torch.equal(methods.fused(views, "mean"), mean.mean(0))
    precision = torch.exp(-logvar)
    surely = (precision * mean).sum(0) / (1 + precision.sum(0))
    assert torch.allclose(methods.fused(views, "no-confidence"), surely, atol=1e-6)


def test_views_are_those_of_the_profile(rendered_people):
    from bolid.backends.body import fuse_views
    from bolid.person import PersonReader

    photos = sorted((rendered_people / "p100000").glob("*.jpg"))
    reader = PersonReader(get_family("tiny"))
    body = fuse_views(*methods.views_of(reader, photos), reader.encoder.prior)[0]
    assert torch.allclose(body, reader.read(photos).body_mean, atol=1e-4)


def shape(**deviations):
    return {name: 0.0 for name in RATIO_NAMES} | deviations


def test_build_words_name_the_most_remarkable_ratios():
    assert build_words.shape_clause(shape(leg=0.3)) == ""
    assert build_words.shape_clause(shape(leg=1.3, head=-0.5)) == "very long legs and a small head"
    four = shape(leg=-0.6, torso=1.5, arm=0.7, hip_breadth=-1.4)
    assert build_words.shape_clause(four) == "a very long torso, very narrow hips and long arms"
    assert build_words.shape_clause(four, 1) == "a very long torso"


def test_build_words_leave_out_what_the_text_encoder_could_not_read():
    person = sample_person(190_008)  # a short heavy man
    prompts = ["a photo of a man standing, in a room", "a man"]
    whole = build_words.with_build(prompts, person, deviation=shape(leg=1, head=1))
    assert whole[0] == "a photo of a short heavy man with long legs and a large head standing, in a room"
    short = build_words.with_build(prompts, person, lambda prompt: len(prompt) < 70, shape(leg=1, head=1))
    assert short == [
        "a photo of a short heavy man with long legs standing, in a room",
        "a short heavy man with long legs and a large head",
    ]
    with pytest.raises(BolidError, match="the prompt names nobody: a dog"):
        build_words.with_build(["a dog"], person, deviation=shape())


def of(*values):
    return Interval(*values)


R = "body by masks, mean r"


def small_table(few=None):
    figures = {
        "base": {R: of(0.1, 0.0, 0.2), "likeness by an outsider": of(0.0, -0.1, 0.1)},
        "ip-adapter": {R: of(0.3, 0.2, 0.4), "likeness by an outsider": of(0.1, 0.0, 0.2)},
        "bolid-8-equal": {R: of(0.6, 0.5, 0.7), "likeness by an outsider": of(0.1, 0.0, 0.2)},
        "real": {R: of(0.9, 0.85, 0.95)},
    }
    even = Difference(of(0.0, -0.1, 0.1), 0.9)
    rivals = {
        "base": {R: Difference(of(0.5, 0.4, 0.6), 0.0001), "likeness by an outsider": even},
        "ip-adapter": {R: Difference(of(0.3, 0.01, 0.59), 0.04), "likeness by an outsider": even},
    }
    facts = {
        "date": "2026-11-30", "commit": "abc", "family": "tiny", "size": [256, 192], "people": 24, "first": 100_000,
        "few": 4, "left out": "", "lacks": {"pulid": "pulid/image.safetensors"}, "readers": ["masks"],
        "instruments": {"body by masks": "a reader"}, "trained": {"ip-adapter": "350 steps of 24 photos, 1.0 MB"},
    }  # fmt: skip
    return table.Table(figures, {"bolid-8-equal": rivals}, facts, few or {})


def test_the_table_says_what_was_measured():
    text = table.markdown(small_table())
    assert "| base | 0.100 (0.000 to 0.200) |" in text and "n is 24 people in every cell" in text
    assert "| ip-adapter | IP-Adapter (arXiv:2308.06721)" in text and "350 steps of 24 photos, 1.0 MB |" in text
    assert "Left out: pulid, which lacks pulid/image.safetensors." in text and "- body by masks: a reader" in text
    assert (
        "BoLID from eight photos trained as the others: 0.600 (0.500 to 0.700); +0.300 (0.010 to 0.590) over " in text
    )
    assert "DreamBooth" not in text
    few = {"dreambooth-lora": {"face found, portraits": of(0.5, 0.0, 1.0)}}
    assert "On the first 4 people alone" in table.markdown(small_table(few))


def test_p_values_are_corrected_for_all_differences_of_a_table():
    rivals, columns = small_table().differences["bolid-8-equal"], {"r": R, "likeness": "likeness by an outsider"}
    lines, adjusted = table.differences_of("bolid-8-equal", rivals, columns)
    assert adjusted["base", R] == pytest.approx(4 * 0.0001) and adjusted["ip-adapter", R] == pytest.approx(3 * 0.04)
    assert "| base | **0.500 (0.400 to 0.600)** p <0.001 | 0.000 (-0.100 to 0.100) p 1.000 |" in lines
    assert "| ip-adapter | 0.300 (0.010 to 0.590) p 0.120 |" in lines[-1]  # not bold, though its interval leaves out 0


def test_too_few_people_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py", "--people", "4"])
    with pytest.raises(BolidError, match="too few people"):
        table.arguments()


def test_the_seeds_of_a_training_are_set_beside_the_people():
    """Each training's value, mean and deviation; pairs of trainings, and how many of them leave out 0."""
    figures = {
        f"{method}, seed {seed}": {
            name: of(value + 0.1 * seed, value - 0.2, value + 0.2) for name in seeds.COMPARED.values()
        }
        for method, value in (("ip-adapter", 0.3), ("bolid-8-equal", 0.6))
        for seed in range(3)
    }

    def differences(ours, theirs):
        values = {name: figures[ours][name].value - figures[theirs][name].value for name in figures[ours]}
        return {name: Difference(of(value, value - 0.2, value + 0.2), 0.01) for name, value in values.items()}

    facts = {
        "date": "2026-12-01",
        "commit": "abc",
        "people": 24,
        "first": 100_000,
        "seeds": 3,
        "instruments": {"a": "b"},
    }
    readings = SimpleNamespace(differences=differences)
    text = seeds.markdown(readings, figures, ["ip-adapter", "bolid-8-equal"], facts)
    assert "| bolid-8-equal | r by judge | 0.600 | 0.700 | 0.800 | 0.700 | 0.100 | 0.200 |" in text
    assert "| r by judge | 0.300 | 0.100 | 0.500 | 6 |" in text  # of 9 pairs, those of 0.1 and of 0.2 hold 0
    assert seeds.beside(Path("runs/trained"), 0) == Path("runs/trained")
    assert seeds.beside(Path("runs/trained"), 2) == Path("runs/trained-2")
