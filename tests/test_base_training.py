"""What the scripts of the tiny base say in captions and look at in pictures (their training is too long for a test)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from bolid.formats.adapter import adapter_kind, flat_tensors, save_adapter
from bolid.method.body_condition import initial_state
from bolid.run import run_record
from bolid.train_adapter.data import AdapterTable

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_family"))

import captions
import distill_guidance
import timebox
import train_adversarial
import train_autoencoder
import train_base

CAPTION = "a full body photo of a tall slim woman waving, in a red long-sleeved top and blue trousers, on a beach"


def deviations(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(captions.SHAPE_WORDS, 0.0), **given}


def test_remarkable_ratios_are_named_and_others_are_not():
    rng = np.random.default_rng(0)
    assert captions.name_shape(CAPTION, deviations(leg=0.3), rng) == CAPTION
    named = captions.name_shape(CAPTION, deviations(leg=0.5), rng)
    assert named == CAPTION.replace("woman", "woman with long legs")
    named = captions.name_shape(CAPTION, deviations(head=-1.5), rng)
    assert named == CAPTION.replace("woman", "woman with a very small head")
    many = {captions.name_shape(CAPTION, deviations(leg=2, arm=-2, hip_breadth=-1), rng) for _ in range(60)}
    assert any("very long legs, " in named or ", very short arms" in named for named in many)
    assert all(named.count(" and ") <= 2 and named.endswith(CAPTION[CAPTION.index(" waving") :]) for named in many)


def test_a_portrait_says_nothing_of_the_body():
    ratios = [dict.fromkeys(captions.SHAPE_WORDS, value) for value in (0.1, 0.2, 0.3)]
    photos = [
        {"caption": f"a {framing} of a man", "ratios": row, "attributes": {"framing": framing}}
        for framing, row in zip(("portrait", "full body", "portrait"), ratios, strict=True)
    ]
    photos[1]["ratios"] = dict.fromkeys(captions.SHAPE_WORDS, 0.9)
    texts = captions.name_shapes(photos, seed=0)
    assert len(texts) == 3 * captions.VARIANTS
    assert set(texts[0::3]) == {"a portrait of a man"} == set(texts[2::3])
    assert all("a full body of a man with " in text for text in texts[1::3])


def test_a_part_of_the_caption_is_left_out():
    rng = np.random.default_rng(0)
    caption = CAPTION.replace("woman", "woman with a flat chest, short legs and long arms").replace(
        "a red", "an orange"
    )
    left = {captions.leave_out(caption, rng) for _ in range(80)}
    assert left == {
        caption.replace("an orange long-sleeved", "an orange"),
        caption.replace("a full body photo of ", ""),
        caption.replace(" waving", ""),
        caption.replace(", in an orange long-sleeved top and blue trousers", ""),
        caption.replace(", on a beach", ""),
    }
    portrait = "a portrait of a man, in an orange long-sleeved top, in a room"
    assert "a man, in an orange long-sleeved top, in a room" in {captions.leave_out(portrait, rng) for _ in range(60)}
    assert captions.article("orange") == "an" and captions.article("red") == "a"


def test_a_vocabulary_is_kept_where_it_knows_the_words(tmp_path):
    old = captions.build_tokenizer(["a red top", "a blue top"], tmp_path)
    assert captions.knows(old, ["a blue top", "a red, red top"]) and not captions.knows(old, ["a green top"])


def test_a_new_vocabulary_keeps_what_the_words_mean(tmp_path):
    old = captions.build_tokenizer(["a red top", "a blue top"], tmp_path / "old")
    new = captions.build_tokenizer(["a red top", "a blue top", "very long legs"], tmp_path / "new")
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
    corners = np.stack([train_autoencoder.crop_corners(rng, boxes, (64, 64), (128, 96)) for _ in range(200)])
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


def test_a_time_box_ends_and_resumes(tmp_path):
    def train(minutes: float) -> timebox.TimeBox:
        network = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        box = timebox.TimeBox({"network": network}, optimizer, tmp_path, minutes=minutes)
        while box.running():
            box.update(network(torch.ones(1, 1)).square().mean())
        box.save()
        return box

    first = train(0.002)
    again = train(0.002)
    assert again.step == first.step > 0, "nothing is left to do"
    assert train(0.004).step > first.step


def test_a_unet_takes_an_earlier_one_for_pictures_of_half_the_size(tmp_path):
    """At first it makes of a smooth picture about what the earlier one makes of it at half the size."""
    torch.manual_seed(0)
    tokenizer = captions.build_tokenizer(["a red top"], tmp_path / "tokenizer")
    _, unet = train_base.build(tokenizer, (16, 16), 4, (32, 32, 64))
    _, of_other_channels = train_base.build(tokenizer, (16, 16), 6, (32, 32, 64))
    earlier = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=1,
        cross_attention_dim=128,
        norm_num_groups=16,
    )
    earlier.save_pretrained(tmp_path / "unet")
    assert train_base.adopt_unet(unet, tmp_path) and not train_base.adopt_unet(of_other_channels, tmp_path)
    small, hidden = torch.randn(4, 4, 1, 1).expand(4, 4, 8, 8), torch.randn(4, 3, 128)
    with torch.no_grad():
        theirs = earlier(small, 500, hidden).sample
        ours = torch.nn.functional.avg_pool2d(unet(small.repeat(1, 1, 2, 2), 500, hidden).sample, 2)
    inner = (..., slice(2, 6), slice(2, 6))
    assert torch.corrcoef(torch.stack([ours[inner].flatten(), theirs[inner].flatten()]))[0, 1] > 0.6


def test_photos_are_encoded_once(tmp_path):
    vae = train_autoencoder.build(8, 4).eval()
    photos = []
    for i in range(3):
        path = tmp_path / "photos" / "p1" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 24, 3), 80 * i, np.uint8)).save(path)
        photos.append({"path": path})
    some, _ = train_base.encode_new(vae, photos[:2], (32, 24), tmp_path)
    photos[0]["path"].unlink()
    every, mirrored = train_base.encode_new(vae, photos[::-1], (32, 24), tmp_path)
    assert every.shape == (3, 4, 4, 3) and mirrored.shape == (3,)
    assert torch.equal(every.flip(0)[:2], some), "in the photos' order"


def test_distillation_learns_the_guided_prediction_and_leaves_the_empty_caption():
    """v of the empty caption + W * (the caption's - the empty one's)."""

    def teacher(noisy: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=noisy * (1 + hidden.mean((1, 2)))[:, None, None, None])

    def text(tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (tokens[..., None].float(),)

    empty = torch.zeros(5, dtype=torch.long)
    step = distill_guidance.Distillation(text, teacher, empty, 3.0, "cpu")
    noisy = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    target = step.target(noisy, torch.tensor([500, 70]), text(torch.stack([torch.full((5,), 2), empty]))[0])
    assert torch.allclose(target[0], (1 + 3.0 * 2) * noisy[0]) and torch.allclose(target[1], noisy[1])


def photos_of(count: int, person: bool = False) -> train_base.TrainingSet:
    """Random latents of 8x8 positions; with `person`, two faces and bodies each."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(count, 2, width, generator=generator) for width in (512, 8)]
    return train_base.TrainingSet(
        torch.randn(count, 4, 8, 8, generator=generator).half(),
        torch.ones(count, 1, 8, 8),
        torch.arange(1 + 2 * count)[:, None].expand(-1, 5),
        np.full(count, 1 / count),
        vectors if person else (),
    )


def test_a_pool_brings_pictures_to_the_last_level_and_then_begins_others():
    rng, data = np.random.default_rng(0), photos_of(40, person=True)
    pool = distill_guidance.Pool(data, 12, rng)
    tokens, person = pool.photos.tokens.clone(), pool.photos.person[1].clone()
    last = pool.level == len(train_base.FEW_STEPS) - 1
    pool.advance(torch.full_like(pool.x0, 7.0), rng)
    assert (pool.x0 == 7).all() and (pool.level[last] == 0).all() and (pool.level[~last] > 0).all()
    assert torch.equal(pool.photos.tokens[~last], tokens[~last]), "a picture keeps its caption,"
    assert torch.equal(pool.photos.person[1][~last], person[~last]), "and its person"
    assert not torch.equal(pool.photos.person[1][last], person[last])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_of_the_adversarial_stage_with_branches(tmp_path):
    """Both networks get gradients, the branches none; switched off, they change nothing."""
    torch.manual_seed(0)
    tokenizer = captions.build_tokenizer(["a red top"], tmp_path / "tokenizer")
    text, unet = train_base.build(tokenizer, (8, 8), 4, (32, 64))
    noisy, t, hidden = torch.randn(2, 4, 8, 8), torch.tensor([600, 70]), torch.randn(2, 5, 128)
    with torch.no_grad():
        alone = unet(noisy, t, hidden).sample
    for branch, width in (("face", 512), ("body", 8)):
        state = initial_state(unet, branch, width)
        state["ip_adapter"] = {name: torch.randn_like(value) for name, value in state["ip_adapter"].items()}
        record = run_record(adapter_kind(branch), family="tiny")
        save_adapter(tmp_path / f"{branch}.safetensors", flat_tensors(state), record)
    train_adversarial.install_branches(unet, tmp_path)
    given = train_adversarial.Given(hidden, [torch.randn(2, 1, 512), torch.randn(2, 1, 8)])
    with torch.no_grad():
        train_adversarial.use_branches(unet, True)
        assert not torch.allclose(train_adversarial.predict(unet, noisy, t, given), alone, atol=1e-3)
        train_adversarial.use_branches(unet, False)
        torch.testing.assert_close(train_adversarial.predict(unet, noisy, t, given), alone)
    train_adversarial.use_branches(unet, True)
    step = adversarial_step(text, unet, photos_of(12, person=True))
    assert all(p.grad is None for name, p in step.unet.named_parameters() if "_ip" in name or "hid_proj" in name)


def test_a_step_of_the_adversarial_stage_without_branches(tmp_path):
    tokenizer = captions.build_tokenizer(["a red top"], tmp_path / "tokenizer")
    adversarial_step(*train_base.build(tokenizer, (8, 8), 4, (32, 64)), photos_of(12))


def adversarial_step(text, unet, data: train_base.TrainingSet) -> train_adversarial.AdversarialStep:
    """A step; the discriminator has changed then, and the generator has a gradient."""
    args = SimpleNamespace(device="cpu", discriminator_lr=1e-3, weight=0.1, diffusion=0.34, drift_weight=3.0)
    rng = np.random.default_rng(0)
    step = train_adversarial.AdversarialStep(text.requires_grad_(False), unet.train(), args)
    before = step.discriminator.unet.conv_in.weight.clone()
    losses = step(distill_guidance.Pool(data, 6, rng), data, rng)
    losses["loss"].backward()
    assert losses["drift"] == 0, "the generator is still the base"
    assert not torch.equal(step.discriminator.unet.conv_in.weight, before)
    assert unet.conv_in.weight.grad.abs().sum() > 0
    return step


def test_people_without_shards_get_zeros_for_vectors():
    table = AdapterTable(
        torch.zeros(4, 2, 1, 1, 1), ["a"] * 4, torch.arange(12.0).view(4, 3), torch.zeros(4, 3), torch.ones(4),
        torch.nn.functional.normalize(torch.randn(4, 512)), [np.arange(4)], ["p000007"],
    )  # fmt: skip
    photos = [{"path": Path("photos/p000007/a.jpg")}, {"path": Path("photos/p000008/a.jpg")}]
    faces, bodies = train_adversarial.person_vectors(table, photos, np.random.default_rng(0))
    assert faces.shape == (2, train_adversarial.VECTORS, 512) and bodies.shape == (2, train_adversarial.VECTORS, 3)
    assert not faces[1].any() and not bodies[1].any()
    assert torch.allclose(faces[0].norm(dim=-1), torch.ones(train_adversarial.VECTORS)) and bodies[0].std(0).any()
