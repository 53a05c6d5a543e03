"""The mechanisms of published methods, on a small random base: what each adds, and what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import IMAGE_SIZE, make_family, make_training_shards

from bolid.backends.diffusion import encode_prompts, load_base
from bolid.backends.sampling import Guidance, sample
from bolid.formats.tensors import load_tensors
from bolid.models.families import get_family
from bolid.synth.people import RATIO_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
import baselines
import instantid
import mechanism
import photomaker
import pulid

PERSON = mechanism.Person(
    "p000003", torch.eye(16)[:3], torch.nn.functional.normalize(torch.randn(3, 512), dim=1),
    [np.tile(np.array([0.5, 0.5, 1.0], np.float32), (17, 1))] * 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("mechanisms")
    family = make_family(root)
    return make_training_shards(root / "train", family), get_family(family)


def build(method, family):
    pipe = load_base(family)
    return baselines.MECHANISMS[method](pipe, family, 16, 1)


def drawn(table, one, pipe):
    from bolid.train_adapter.config import TrainAdapterConfig
    from bolid.train_adapter.data import TextStates
    from bolid.train_adapter.denoiser import training_schedule

    states = TextStates(pipe, table.captions)
    config = TrainAdapterConfig(steps=2, batch_size=4, all_dropout=0, text_dropout=0, body_dropout=0)
    return mechanism.draw_step(table, one.most, config, training_schedule(pipe), states, 0, 0, "x")[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["photomaker", "instantid", "upper-bound"])
def test_each_is_trained_and_samples(method, world, tmp_path):
    train, family = world
    config = baselines.equal_settings(steps=2, batch_size=4)
    path = baselines.train_baseline(method, train, tmp_path, config=config, family=str(family.name))
    before = build(method, family).parameters
    after, record = load_tensors(path, mechanism.KIND)
    assert before.keys() == after.keys() and record["config"]["method"] == method
    trained = baselines.load_baseline(method, path, family)
    for name, parameter in trained.mechanism.parameters.items():
        assert torch.equal(parameter, after[name].float()), name
    one = trained.mechanism
    latents = sample(
        trained.pipe, one.text(["a woman", "a man"], PERSON), size=IMAGE_SIZE, steps=2,
        guidance=Guidance(family.guidance), generators=[torch.Generator().manual_seed(i) for i in range(2)],
        vectors=one.vectors(PERSON), controls=one.controls(PERSON),
    )  # fmt: skip
    assert latents.shape[0] == 2 and latents.isfinite().all()


def test_photomaker_writes_the_class_word_once_a_photo(world):
    one = build("photomaker", world[1])
    caption, places = one.repeated("a tall woman, in red", 3)
    assert caption == "a tall woman woman woman, in red"
    ids = one.pipe.tokenizer(caption).input_ids
    last = one.pipe.tokenizer("woman").input_ids[-2]
    assert len(places) == 3 and all(ids[place] == last for place in places)
    assert one.repeated("a beach", 3) == ("a beach", []) and one.repeated("a man", 0) == ("a man", [])
    assert len(one.repeated("a man", 40)[1]) < 40  # what the text encoder does not read is left out


def test_photomaker_changes_the_text_at_those_places_only(world):
    one = build("photomaker", world[1])
    (text, _), photos = encode_prompts(one.pipe, ["a woman woman"]), torch.eye(16)[:2]
    states = one.stacked(["a woman"], [photos])
    _, places = one.repeated("a woman", 2)
    changed = (states != text).any(-1)[0].nonzero()[:, 0].tolist()
    assert changed == places
    assert torch.equal(one.stacked(["a woman"], [photos[:0]]), encode_prompts(one.pipe, ["a woman"])[0])
    assert not torch.equal(one.stacked(["a woman"], [photos.flip(0)]), states)


def test_photomakers_sampling_is_diffusers(world):
    """Text states in, the latents of StableDiffusionPipeline out, to the bit."""
    from diffusers import DDIMScheduler

    one = build("photomaker", world[1])
    one.pipe.scheduler = DDIMScheduler.from_config(one.pipe.scheduler.config)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    text = one.text(["a woman"], PERSON)
    options = {"guidance": Guidance(world[1].guidance), "steps": 2, "size": IMAGE_SIZE}
    ours = sample(one.pipe, text, generators=[torch.Generator()], latents=noise, **options)
    theirs = one.pipe(
        prompt_embeds=text[0], negative_prompt_embeds=encode_prompts(one.pipe, [""])[0], guidance_scale=3.0,
        num_inference_steps=2, height=IMAGE_SIZE[0], width=IMAGE_SIZE[1], latents=noise, output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(ours, theirs)


def test_instantid_begins_as_the_base_and_its_net_sees_the_face(world):
    train, family = world
    table, one = mechanism.Table(train), build("instantid", family)
    draw = drawn(table, one, one.pipe)
    plain = load_base(family).unet(draw.noisy, draw.timesteps, encoder_hidden_states=draw.text).sample
    with torch.no_grad():
        assert torch.allclose(one.predict(table, draw), plain, atol=1e-5)
        for name, parameter in one.identity_net.network.named_parameters():
            if "controlnet_" in name and "cond_embedding" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        first = one.predict(table, draw)
        table.faces = table.faces.flip(1)
        assert not torch.allclose(
            one.predict(table, draw), first, atol=1e-4
        )  # through the net alone: the branch adds 0
        table.keypoints = table.keypoints.flip(0)
        assert not torch.allclose(one.predict(table, draw), first, atol=1e-4)


def test_the_face_map_shows_five_points():
    keypoints = np.zeros((17, 3), np.float32)
    keypoints[:5] = [[0.5, 0.5, 1], [0.6, 0.4, 1], [0.4, 0.4, 1], [0.7, 0.45, 0.1], [0.3, 0.45, 1]]
    picture = instantid.draw_face(keypoints, (64, 48))
    assert tuple(picture[32, 24]) == instantid.COLORS[0] and tuple(picture[26, 29]) == instantid.COLORS[1]
    assert not (picture == instantid.COLORS[3]).all(-1).any()  # not seen
    assert not picture[40:].any()


def test_pulid_aligns_with_the_picture_without_the_person(world):
    train, family = world
    table, one = mechanism.Table(train), build("pulid", family)
    draw = drawn(table, one, one.pipe)
    noise, person = torch.randn(4, 4, 16, 12), one.condition(table, draw)[:, None]
    plain = one.without_person(noise, draw.text, person)
    with torch.no_grad():
        x0, own = one.few_steps(noise, draw.text, person)
    assert len(plain) == pulid.STEPS * sum(name.endswith("attn2.processor") for name in one.unet.attn_processors)
    assert x0.shape == noise.shape and float(sum(pulid.alignment(own, plain))) == 0  # the branch begins as nothing
    with torch.no_grad():
        for name, parameter in one.parameters.items():
            if "to_v_ip" in name:
                parameter.normal_()
    again = one.without_person(noise, draw.text, person)
    assert all(torch.equal(a, b) for pair in zip(plain, again, strict=True) for a, b in zip(*pair, strict=True))
    _, own = one.few_steps(noise, draw.text, person)
    layout, semantics = pulid.alignment(own, plain)
    assert layout > 0 and semantics > 0
    (layout + semantics).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in one.parameters.items() if "to_v_ip" in n)


@pytest.mark.slow
def test_pulid_is_trained_with_its_losses(world, tmp_path):
    """A step with the second branch, on the tiny family's face model."""
    text = Path(world[1].name).read_text() + f"face = '{get_family('tiny').face}'\n"
    (tmp_path / "with-face.toml").write_text(text)
    path = baselines.train_baseline(
        "pulid", world[0], tmp_path, config=baselines.equal_settings(steps=1, batch_size=2),
        family=str(tmp_path / "with-face.toml"),
    )  # fmt: skip
    assert load_tensors(path, mechanism.KIND)[0]["ip_adapter.1.to_v_ip.weight"].abs().max() > 0


@pytest.mark.slow
def test_the_upper_bound_knows_the_truth():
    ratios = mechanism.true_ratios("p000003")
    assert ratios.shape == (len(RATIO_NAMES),) and float(ratios.abs().max()) < 4
    assert not torch.equal(ratios, mechanism.true_ratios("p000004"))


def test_stacked_embeddings_depend_on_text_and_photo():
    torch.manual_seed(0)
    fuse = photomaker.Fuse(16, 24)
    text, photos = torch.randn(2, 24), torch.eye(16)[:2]
    assert not torch.allclose(fuse(text, photos), fuse(text, photos.flip(0)))
    assert not torch.allclose(fuse(text, photos), fuse(text.flip(0), photos))
