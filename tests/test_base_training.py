"""What the scripts of the tiny base say in captions and look at in pictures (their training is too long for a test)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_family"))

import train_autoencoder
import train_base

CAPTION = "a full body photo of a tall slim woman waving, in a red long-sleeved top and blue trousers, on a beach"


def deviations(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(train_base.SHAPE_WORDS, 0.0), **given}


def test_remarkable_ratios_are_named_and_others_are_not():
    rng = np.random.default_rng(0)
    assert train_base.name_shape(CAPTION, deviations(leg=0.3), rng) == CAPTION
    told = train_base.name_shape(CAPTION, deviations(leg=0.5), rng)
    assert told == CAPTION.replace("woman", "woman with long legs")
    told = train_base.name_shape(CAPTION, deviations(head=-1.5), rng)
    assert told == CAPTION.replace("woman", "woman with a very small head")
    many = {train_base.name_shape(CAPTION, deviations(leg=2, arm=-2, hip_breadth=-1), rng) for _ in range(60)}
    assert any("very long legs, " in told or ", very short arms" in told for told in many)
    assert all(told.count(" and ") <= 2 and told.endswith(CAPTION[CAPTION.index(" waving") :]) for told in many)


def test_a_portrait_says_nothing_of_the_body():
    ratios = [dict.fromkeys(train_base.SHAPE_WORDS, value) for value in (0.1, 0.2, 0.3)]
    photos = [
        {"caption": f"a {framing} of a man", "ratios": row, "attributes": {"framing": framing}}
        for framing, row in zip(("portrait", "full body", "portrait"), ratios, strict=True)
    ]
    photos[1]["ratios"] = dict.fromkeys(train_base.SHAPE_WORDS, 0.9)
    captions = train_base.name_shapes(photos, seed=0)
    assert len(captions) == 3 * train_base.VARIANTS
    assert set(captions[0::3]) == {"a portrait of a man"} == set(captions[2::3])
    assert all("a full body of a man with " in caption for caption in captions[1::3])


def test_a_part_of_the_caption_is_left_out():
    rng = np.random.default_rng(0)
    caption = CAPTION.replace("woman", "woman with a flat chest, short legs and long arms").replace(
        "a red", "an orange"
    )
    left = {train_base.leave_out(caption, rng) for _ in range(80)}
    assert left == {
        caption.replace("an orange long-sleeved", "an orange"),
        caption.replace("a full body photo of ", ""),
        caption.replace(" waving", ""),
        caption.replace(", in an orange long-sleeved top and blue trousers", ""),
        caption.replace(", on a beach", ""),
    }
    portrait = "a portrait of a man, in an orange long-sleeved top, in a room"
    assert "a man, in an orange long-sleeved top, in a room" in {train_base.leave_out(portrait, rng) for _ in range(60)}
    assert train_base.article("orange") == "an" and train_base.article("red") == "a"


def test_a_vocabulary_is_kept_where_it_knows_the_words(tmp_path):
    old = train_base.build_tokenizer(["a red top", "a blue top"], tmp_path)
    assert train_base.knows(old, ["a blue top", "a red, red top"]) and not train_base.knows(old, ["a green top"])


def test_a_new_vocabulary_keeps_what_the_words_mean(tmp_path):
    old = train_base.build_tokenizer(["a red top", "a blue top"], tmp_path / "old")
    new = train_base.build_tokenizer(["a red top", "a blue top", "very long legs"], tmp_path / "new")
    earlier, text = (train_base.build(t, (128, 96), 4, (32, 64))[0] for t in (old, new))
    earlier.save_pretrained(tmp_path / "text_encoder")
    old.save_pretrained(tmp_path / "tokenizer")
    train_base.adopt(text, new, tmp_path)
    states = []
    for model, tokenizer in ((earlier, old), (text, new)):
        tokens = tokenizer("a blue top", return_tensors="pt").input_ids
        states.append(model.eval()(tokens)[0])
    torch.testing.assert_close(*states)


def test_crops_about_faces_lie_in_the_picture_and_show_them():
    photos = [
        {"face_box": [20.0, 10.0, 60.0, 70.0], "width": 192, "height": 256},
        {"face_box": None, "width": 192, "height": 256},
    ]
    boxes = train_autoencoder.face_boxes(photos, (128, 96))
    assert boxes.tolist() == [[10, 5, 30, 35], [0, 0, 0, 0]]
    rng = np.random.default_rng(0)
    corners = np.stack([train_autoencoder.crop_corners(rng, boxes, 64, (128, 96)) for _ in range(200)])
    assert (corners >= 0).all() and (corners[..., 0] <= 64).all() and (corners[..., 1] <= 32).all()
    assert corners[:, 1, 0].mean() == pytest.approx(32, abs=4), "anywhere, where there is no face"
    assert corners[:, 0, 0].mean() < 24, "near the face half of the time"


def test_the_picture_loss_minds_faces_and_edges():
    truth = torch.zeros(1, 3, 8, 8)
    even, uneven = truth + 0.1, truth + 0.1 * (torch.arange(8) % 2 * 2 - 1)
    plain, face = torch.ones(1, 1, 8, 8), torch.full((1, 1, 8, 8), 4.0)
    loss = train_autoencoder.picture_loss
    assert loss(truth, truth, plain) == 0
    assert loss(even, truth, plain) == pytest.approx(0.1 + 2 * 0.01)
    assert loss(even, truth, face) == pytest.approx(4 * loss(even, truth, plain))
    assert loss(uneven, truth, plain) > 2 * loss(even, truth, plain)


def test_one_process_has_its_own_clock():
    assert train_base.agreed(12.5, world=1) == 12.5
