"""What a photo is conditioned on: leave-one-out, dropout, captions, and how batches are drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from adapter_world import CONFIG, run

from bolid.backends.body import BodyEncoder
from bolid.errors import BolidError
from bolid.method.body_condition import null_condition
from bolid.train_adapter.data import (
    TextStates,
    batch_rows,
    draw_batch,
    draw_rows,
    photo_generators,
    read_table,
    save_bodies,
    without_build,
)


def test_bodies_are_encoded_once(world, tmp_path, monkeypatch):
    """The next start takes them from the file; other shards or a damaged file are encoded again."""
    encoder, cache = BodyEncoder(world.encoder), tmp_path / "bodies.safetensors"
    first, calls = read_table(world.train, encoder, cache=cache), []
    save_bodies(cache, first, world.train, encoder)
    encode = BodyEncoder.encode
    monkeypatch.setattr(BodyEncoder, "encode", lambda *given: calls.append(1) or encode(*given))
    again = read_table(world.train, encoder, cache=cache)
    assert not calls and torch.equal(again.body_mean, first.body_mean) and torch.equal(again.latents, first.latents)
    cache.write_bytes(cache.read_bytes()[:-1] + b"x")
    assert torch.equal(read_table(world.train, encoder, cache=cache).body_mean, first.body_mean) and calls


def test_a_photo_is_never_in_its_own_context(table):
    owner = {row: person for person, rows in enumerate(table.people) for row in rows}
    sizes = set()
    for step in range(30):
        rows = np.random.default_rng(step).permutation(len(table.captions))[:6]
        batch = draw_batch(table, rows, CONFIG, photo_generators(0, step * 6, 6))
        for row, context, present in zip(batch.rows, batch.context, batch.present, strict=True):
            used = context[present].tolist()
            assert used and row not in used and len(set(used)) == len(used)
            assert {owner[other] for other in used} == {owner[row]}
            sizes.add(len(used))
    assert sizes == {1, 2, 3}


def test_a_photos_own_face_and_body_do_not_reach_its_condition(table):
    """Changing everything that is known of the target changes nothing in its embeds."""
    rows = np.array([0])
    before = draw_batch(table, rows, CONFIG, photo_generators(1, 0, 1))
    mean, face = table.body_mean.clone(), table.face.clone()
    mean[0], face[0] = 100.0, 100.0
    other = dataclasses.replace(table, body_mean=mean, face=face)
    after = draw_batch(other, rows, CONFIG, photo_generators(1, 0, 1))
    assert torch.equal(before.body_embeds, after.body_embeds) and torch.equal(before.face_embeds, after.face_embeds)


def test_conditions_are_dropped_each_alone_and_all_together(table):
    def batch(**dropout):
        none = {"text_dropout": 0.0, "face_dropout": 0.0, "body_dropout": 0.0, "all_dropout": 0.0} | dropout
        return draw_batch(table, np.arange(4), dataclasses.replace(CONFIG, **none), photo_generators(0, 0, 4))

    kept = batch()
    assert all(kept.captions) and kept.face_embeds.any() and kept.body_embeds.any()
    assert batch(text_dropout=1.0).captions == [""] * 4
    assert torch.equal(batch(face_dropout=1.0).face_embeds, null_condition(kept.face_embeds))
    assert torch.equal(batch(body_dropout=1.0).body_embeds, null_condition(kept.body_embeds))
    nothing = batch(all_dropout=1.0)
    assert nothing.captions == [""] * 4 and not nothing.face_embeds.any() and not nothing.body_embeds.any()


def test_no_face_in_the_others_is_the_null_condition(table):
    blind = dataclasses.replace(table, face=torch.zeros_like(table.face))
    batch = draw_batch(blind, np.arange(4), CONFIG, photo_generators(0, 0, 4))
    assert torch.equal(batch.face_embeds, null_condition(batch.face_embeds))


def test_what_is_random_about_a_photo_does_not_depend_on_its_batch(table):
    rows = np.array([0, 5, 7, 2])
    whole = draw_batch(table, rows, CONFIG, photo_generators(3, 8, 4))
    half = draw_batch(table, rows[2:], CONFIG, photo_generators(3, 10, 2))
    assert torch.equal(whole.body_embeds[2:], half.body_embeds) and whole.captions[2:] == half.captions
    assert torch.equal(whole.context[2:], half.context)


def test_build_words_leave_the_caption():
    assert without_build("a photo of a tall slim woman waving") == "a photo of a woman waving"
    assert without_build("a man, in a short-sleeved top") == "a man, in a short-sleeved top"
    assert without_build("a woman with short hair") == "a woman with short hair"


def test_every_photo_comes_once_an_epoch():
    rows = np.concatenate([batch_rows(10, 4, step, seed=0) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])


def test_a_fraction_of_each_batch_is_close_ups(table):
    confidence, face = table.confidence.clone(), torch.zeros_like(table.face)
    confidence[:] = 0.9
    confidence[2:8] = 0.3
    face[3:] = 1.0
    table = dataclasses.replace(table, confidence=confidence, face=face)
    assert table.close_ups.tolist() == [3, 4, 5, 6, 7]
    config = dataclasses.replace(CONFIG, batch_size=10)
    few = [draw_rows(table, dataclasses.replace(config, close_up_fraction=0.5), number, seed=0) for number in range(2)]
    assert all(sorted(rows[:5]) == [3, 4, 5, 6, 7] for rows in few), "each once an epoch"
    assert few[0][:5].tolist() != few[1][:5].tolist()
    for number, rows in enumerate(few):
        plain = draw_rows(table, config, number, seed=0)
        assert rows[5:].tolist() == plain[5:].tolist() and rows[:5].tolist() != plain[:5].tolist()


def test_close_ups_that_nobody_has_are_refused(world, tmp_path):
    with pytest.raises(BolidError, match="--close-up-fraction 0.5: no photo in .* shows a face and little of a body"):
        run(world, tmp_path / "out", dataclasses.replace(CONFIG, close_up_fraction=0.5))
    assert not (tmp_path / "out").exists()


def test_bodies_are_the_mean_of_all_photos_by_confidence(table):
    bodies = dataclasses.replace(table, confidence=torch.ones_like(table.confidence)).person_bodies
    for rows, body in zip(table.people, bodies, strict=True):
        assert torch.allclose(body, table.body_mean[rows].mean(0), atol=1e-6)
    blind = torch.ones_like(table.confidence)
    blind[table.people[0][1:]] = 0
    bodies = dataclasses.replace(table, confidence=blind).person_bodies
    assert torch.allclose(bodies[0], table.body_mean[table.people[0][0]], atol=1e-4)


@pytest.mark.parametrize("kind", ["world", pytest.param("large", marks=pytest.mark.slow)])
def test_text_states_are_those_of_the_encoders_cached_or_not(kind, request):
    from bolid.backends.diffusion import encode_prompts, load_base
    from bolid.models.families import get_family

    pipe = load_base(get_family(request.getfixturevalue(kind).family))
    captions = [f"a tall woman, {i}" for i in range(70)]
    texts = ["", captions[69], without_build(captions[1]), captions[69]]
    expected = encode_prompts(pipe, texts)
    assert (expected[1] is None) == (kind == "world")
    kept, computed = TextStates(pipe, captions), TextStates(pipe, captions, limit=0)
    half = TextStates(pipe, captions, precision="bf16")
    assert (kept.cached, computed.cached, half.cached) == (True, False, True)
    size = sum(part[0].numel() for part in expected if part is not None)
    assert not TextStates(pipe, captions, limit=141 * size * 4 - 1).cached, "70 captions, 70 without the build, none"
    for part, cached, anew, short in zip(expected, kept(texts), computed(texts), half(texts), strict=True):
        if part is not None:
            assert torch.allclose(cached, part, atol=1e-5) and torch.allclose(anew, part, atol=1e-5)
            assert short.dtype == torch.bfloat16 and torch.equal(short, cached.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["world", "large"])
def test_training_is_the_same_with_cached_texts(kind, request, tmp_path):
    """Up to rounding, and not a bit further in bf16, which is what the network makes of the states anyway."""
    chosen = request.getfixturevalue(kind)
    config = dataclasses.replace(CONFIG, precision="bf16", steps=2, learning_rate=0.01, sample_every=2)
    kept = run(chosen, tmp_path / "kept", config)
    anew = run(chosen, tmp_path / "anew", dataclasses.replace(config, text_cache=0.0))
    assert kept.loss == pytest.approx(anew.loss, rel=1e-3)
    sheets = [(tmp_path / name / "samples" / "step-000002.png").stat().st_size for name in ("kept", "anew")]
    assert min(sheets) > 1000
