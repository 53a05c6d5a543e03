"""The experiment's own parts: the frozen protocol, the baselines and the table, on a small world."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import make_family, make_training_shards

from bolid.errors import BolidError
from bolid.evaluate import protocol
from bolid.evaluate.pictures import generated_pictures
from bolid.evaluate.results import Comparison, Difference, Evaluation, Metric
from bolid.formats.pictures import picture_record
from bolid.formats.tensors import load_tensors
from bolid.generate.saving import save_picture
from bolid.models.families import get_family
from bolid.run import canonical_json
from bolid.synth.people import RATIO_NAMES, sample_person

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
import baselines
import build_words
import fusion
import mechanism
import run
import table
import trainings

SIMPLE = ("ip-adapter", "ip-adapter-attention")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(training shards, family, folder with both baselines, trained for 3 steps)."""
    root = tmp_path_factory.mktemp("experiment")
    family = make_family(root)
    train = make_training_shards(root / "train", family)
    for method in SIMPLE:
        baselines.train_baseline(method, train, root / "baselines" / method, steps=3, batch_size=4)
    return train, family, root / "baselines"


def test_the_protocol_is_frozen_and_takes_validation_people_only(tmp_path):
    whole = protocol.read_protocol()
    assert whole.whole and len(whole.people) == 24 and len(set(whole.people)) == 24 and len(whole.prompts) == 5
    assert all(100_000 <= person < 200_000 for person in whole.people)
    some = protocol.read_protocol(people=2, prompts=1)
    assert not some.whole and some.people == whole.people[:2] and some.prompts == whole.prompts[:1]
    assert all(" woman " in p or " man " in p for p in whole.prompts_for(whole.people[0]))
    bad = tmp_path / "protocol.json"
    bad.write_text(protocol.FILE.read_text().replace("190000", "200000"))
    with pytest.raises(BolidError, match="names the person 200000") as error:
        protocol.read_protocol(file=bad)
    assert "validation people" in error.value.hint


def test_held_out_photos_are_others(tmp_path):
    small = protocol.Protocol(0, (64, 48), 2, 2, 1, (100_000,), ("x",), False)
    (name, conditioning), *_ = small.photos(tmp_path).items()
    assert [path.name for path in conditioning] == ["000.jpg", "001.jpg"]
    assert sorted(p.name for p in (tmp_path / name).glob("*.jpg")) == ["000.jpg", "001.jpg", "100.jpg", "101.jpg"]


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
def test_a_trained_baseline_generates(world, method, tmp_path):
    train, family, folder = world
    tensors, record = load_tensors(folder / method / baselines.FILE, mechanism.KIND)
    assert record["config"] == {"method": method, "steps": 3, "batch_size": 4, "embedding_size": 16}
    assert tensors["ip_adapter.1.to_v_ip.weight"].abs().max() > 0  # it learned something
    baseline = baselines.load_baseline(method, folder / method / baselines.FILE, get_family(family))
    embeds = torch.nn.functional.normalize(torch.randn(3, baseline.size), dim=1)
    person = mechanism.Person("p1", embeds, torch.zeros(3, 512))
    (condition,) = baseline.mechanism.vectors(person)
    assert torch.equal(condition, embeds[0]) == (method == "ip-adapter")
    paths = baseline.generate(["x", "y"], tmp_path, person, n=2, seed=1, photos={"photo_000": "a"})
    assert [path.name for path in paths] == ["000-0.png", "000-1.png", "001-0.png", "001-1.png"]
    records = [picture_record(path.read_bytes()) for path in paths]
    assert [r["config"]["prompt"] for r in records] == ["x", "x", "y", "y"]
    assert len({r["seed"] for r in records}) == 4 and records[0]["inputs"] == {"photo_000": "a"}
    from bolid.run import derive_seed

    assert records[3]["seed"] == derive_seed(1, "generate", 1, 1)  # as `bolid generate` has it, or nothing pairs


def test_training_goes_on_to_the_bit(world, tmp_path, monkeypatch):
    train, _, folder = world
    save = mechanism.save_checkpoint
    calls = []

    def stop_after_two(*arguments):
        save(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    settings = mechanism.TrainAdapterConfig
    monkeypatch.setattr(mechanism, "TrainAdapterConfig", lambda **c: settings(**c, checkpoint_minutes=0.0))
    monkeypatch.setattr(mechanism, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        baselines.train_baseline("ip-adapter-attention", train, tmp_path, steps=3, batch_size=4)
    monkeypatch.setattr(mechanism, "save_checkpoint", save)
    baselines.train_baseline("ip-adapter-attention", train, tmp_path, steps=3, batch_size=4)
    whole, _ = load_tensors(folder / "ip-adapter-attention" / baselines.FILE, mechanism.KIND)
    resumed, _ = load_tensors(tmp_path / baselines.FILE, mechanism.KIND)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_baseline_that_is_not_there_is_named(world, tmp_path):
    some = protocol.read_protocol(1, 1)
    bench = run.Bench(tmp_path, some, tmp_path / "none", world[1])
    with pytest.raises(BolidError, match="ip-adapter is not trained: looked for") as error:
        bench.baseline("ip-adapter")
    assert error.value.hint.startswith("python examples/experiment/baselines.py ip-adapter train/")
    with pytest.raises(BolidError, match="looked for .*none/bolid/body.safetensors") as error:
        bench.adapter_of(run.EQUAL)
    assert error.value.hint.startswith("bolid train-adapter train/ --out")


def test_every_method_has_a_row_and_says_what_it_lacks(world, tmp_path):
    assert run.METHODS.keys() == table.WHAT.keys() and set(baselines.METHODS) <= run.METHODS.keys()
    bench = run.Bench(tmp_path, protocol.read_protocol(1, 1), tmp_path / "none", world[1])
    for method, flag in (("bolid-8-no-id", "--id-weight 0"), ("bolid-8-no-clip", "--clip-weight 0")):
        with pytest.raises(BolidError, match=f"the adapters of {method} are not trained") as error:
            bench.adapter_of(method)
        assert flag in error.value.hint


class _Encoder:
    population = None


def test_fusions_are_what_they_say():
    reader = type("Reader", (), {"encoder": _Encoder()})()
    mean, logvar = torch.randn(3, 4), torch.randn(3, 4)
    plain = fusion.fused(reader, (mean, logvar, torch.tensor([1.0, 0.5, 0.1])), "mean")
    assert torch.equal(plain[0], mean.mean(0)) and torch.equal(plain[1], logvar.mean(0))
    surely = fusion.fused(reader, (mean, logvar, torch.tensor([1.0, 0.5, 0.1])), "no-confidence")
    precision = torch.exp(-logvar)
    assert torch.allclose(surely[0], (precision * mean).sum(0) / (1 + precision.sum(0)), atol=1e-6)


@pytest.mark.slow
def test_an_ablated_profile_has_another_body_and_the_same_face(rendered_people, tmp_path):
    from bolid.formats.profile import load_profile
    from bolid.profile import make_profile

    photos = sorted((rendered_people / "p100000").glob("*.jpg"))
    make_profile(photos, tmp_path / "own.safetensors", family="tiny")
    fusion.ablated_profile(photos, tmp_path / "mean.safetensors", get_family("tiny"), "mean")
    own, plain = (load_profile(tmp_path / f"{name}.safetensors") for name in ("own", "mean"))
    assert not torch.allclose(own.body_mean, plain.body_mean) and torch.equal(own.face, plain.face)
    assert plain.record["config"] == {"fusion": "mean"} and plain.record["inputs"] == own.record["inputs"]


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


def test_pictures_with_build_words_pair_with_those_of_other_methods(tmp_path):
    for name in ("p1/a.png", "p1/b.png", "p2/a.png"):
        save_picture(tmp_path / name, np.zeros((8, 8, 3), np.uint8), {"kind": "picture", "config": {"prompt": "long"}})
    build_words.write_table(tmp_path, "p1", [tmp_path / "p1/a.png", tmp_path / "p1/b.png"], ["x", "x, y"])
    build_words.write_table(tmp_path, "p2", [tmp_path / "p2/a.png"], ["z"])
    build_words.write_table(tmp_path, "p2", [tmp_path / "p2/a.png"], ["x"])  # made again
    found = generated_pictures(tmp_path).pictures
    assert [(one.person, one.prompt) for one in found] == [("p1", "x"), ("p1", "x, y"), ("p2", "x")]


@pytest.mark.slow
def test_pictures_are_kept_until_a_model_changes(world, tmp_path, monkeypatch):
    small = protocol.Protocol(0, (64, 48), 1, 1, 2, (100_000, 100_001), ("a {who}",), False)
    bench = run.Bench(tmp_path, small, world[2], world[1])
    folder = run.run("base", small, bench)
    pictures = sorted(folder.glob("*/*.png"))
    assert len(pictures) == 4
    times = [path.stat().st_mtime_ns for path in pictures]
    pictures[0].rename(pictures[0].with_name("stray.png"))
    pictures[1].unlink()
    run.run("base", small, bench)  # makes that person's again, and leaves the others
    assert sorted(folder.glob("*/*.png")) == pictures and [p.stat().st_mtime_ns for p in pictures[2:]] == times[2:]
    monkeypatch.setattr(run, "base_sha256", lambda family: "another")
    run.run("base", small, bench)
    assert all(p.stat().st_mtime_ns > t for p, t in zip(pictures, times, strict=True))


def evaluation(value, low):
    metrics = {
        "text_score": Metric(value, 10, "the tower", "a note", low, value + 0.1),
        "kid": Metric(None, 1, "x"),
    }
    return Evaluation(10, 4, 2, metrics, {}, {}, [], {})


def test_methods_that_are_not_made_anew_come_from_an_earlier_run_of_the_same_base():
    difference = {"text_score": Difference(0.2, 0.1, 0.3, 10, "picture")}
    methods = {"base": evaluation(0.5, 0.4), "ip-adapter": evaluation(0.6, 0.5), "bolid-8": evaluation(0.7, 0.6)}
    whole = Comparison("base", methods, {"ip-adapter": difference, "bolid-8": difference})
    now = Comparison("base", {"base": evaluation(0.5, 0.4), "bolid-8": evaluation(0.8, 0.7)}, {"bolid-8": difference})
    earlier = json.loads(canonical_json(whole))
    both = table.with_earlier(now, earlier)
    assert list(both.methods) == ["base", "ip-adapter", "bolid-8"] and set(both.differences) == {
        "ip-adapter",
        "bolid-8",
    }
    assert both.methods["ip-adapter"] == methods["ip-adapter"] and both.methods["bolid-8"] == now.methods["bolid-8"]
    text = table.markdown(both, protocol.read_protocol(), {}, made=list(now.methods))
    assert "table.py --methods base bolid-8`" in text and "From an earlier run, by `--earlier`, are ip-adapter." in text
    other = Comparison("base", {**now.methods, "base": evaluation(0.51, 0.4)}, now.differences)
    with pytest.raises(BolidError, match="the earlier figures of base are not those of now"):
        table.with_earlier(other, earlier)


def test_the_table_says_what_was_measured():
    no_difference = Difference(None, None, None, 0, "picture")
    compared = Comparison(
        "base", {"base": evaluation(0.5, 0.4), "bolid-8": evaluation(0.7, 0.6)},
        {"bolid-8": {"text_score": Difference(0.2, 0.1, 0.3, 10, "picture")}},
    )  # fmt: skip
    text = table.markdown(compared, protocol.read_protocol(), {"bolid-8": "4 steps of 2"})
    assert "| text score ↑ | 0.500 (0.400 to 0.600) | **0.700** (0.600 to 0.800) | 10 |" in text
    assert "| kid ↓ | – | – | 1 |" in text and "| bolid-8 | BoLID, 8 photos | 4 steps of 2 |" in text
    assert "How much more" not in text
    against = Comparison(
        "ip-adapter-attention", {},
        {
            "bolid-8-equal": {"text_score": Difference(0.1, -0.1, 0.3, 10, "picture"), "kid": no_difference},
            "bolid-8": {"text_score": Difference(0.2, 0.1, 0.3, 10, "picture"), "kid": no_difference},
        },
    )  # fmt: skip
    more = table.markdown(compared, protocol.read_protocol(), {}, [against])
    assert "How much more than ip-adapter-attention" in more and more.count("| kid ↓") == text.count("| kid ↓")
    assert "| text score ↑ | +0.100 (-0.100 to +0.300) | **+0.200** (+0.100 to +0.300) |" in more
    assert "the tower (a note)" in text and "5 prompts each, 2 pictures of each" in text


def test_trainings_are_a_source_of_variance():
    def made(value):
        return evaluation(value, value - 0.098)  # one standard error over people is 0.05

    methods = {"ip-adapter": made(0.5), "ip-adapter-training-1": made(0.6), "ip-adapter-training-2": made(0.4)}
    compared = Comparison("base", {"base": made(0.3), **methods}, {})
    rest, groups = trainings.split(compared, ["ip-adapter", "bolid-8"])
    assert list(rest.methods) == ["base", "ip-adapter"] and list(groups) == ["ip-adapter"]
    found = trainings.over_trainings([one.metrics["text_score"] for one in groups["ip-adapter"]])
    assert found.mean == pytest.approx(0.5) and found.sd_trainings == pytest.approx(0.1)
    assert found.se_people == pytest.approx(0.05, rel=0.02)
    assert found.high - found.mean == pytest.approx(1.96 * (0.05**2 + 0.1**2 / 3) ** 0.5, rel=0.02)
    text = "\n".join(trainings.markdown(groups))
    assert "| ip-adapter | text score ↑ | 0.500, 0.600, 0.400 | 0.500 |" in text and "kid" not in text
    assert trainings.markdown({}) == []
