"""DreamBooth: Eq. 9 and 10 against the plain diffusion loss, and the training of one person's LoRA."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bolid.errors import BolidError
from bolid.method.dreambooth import loss_dreambooth, loss_reconstruction, snr_weights
from bolid.method.losses import noise_level

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x, noise, prediction = (torch.randn(6, 4, 3, 2, generator=generator) for _ in range(3))
    alphas = torch.tensor([0.9, 0.5, 0.1, 0.8, 0.4, 0.2])
    return x, noise, prediction, alphas, noise_level(x, noise, alphas)


def test_eq_9_with_the_snr_as_weight_is_the_loss_on_the_noise(batch):
    x, noise, prediction, alphas, noisy = batch
    photos = torch.zeros(6, dtype=torch.bool)
    found = loss_dreambooth(prediction, noisy, x, alphas, photos, prediction_type="epsilon")
    assert float(found) == pytest.approx(float((prediction - noise).square().mean()), rel=1e-5)


def test_eq_9_is_0_for_the_right_picture_and_weighs_each_sample():
    x = torch.ones(2, 1, 2, 2)
    assert loss_reconstruction(x, x, torch.ones(2)) == 0
    assert float(loss_reconstruction(x + 1, x, torch.tensor([3.0, 1.0]))) == pytest.approx(2)
    assert snr_weights(torch.tensor([0.8])).tolist() == pytest.approx([4])


def test_eq_10_adds_the_class_times_lambda(batch):
    x, noise, prediction, alphas, noisy = batch
    is_prior = torch.tensor([False, False, True, True, True, True])  # each kind has a mean of its own

    def loss(prior_weight):
        return float(
            loss_dreambooth(
                prediction, noisy, x, alphas, is_prior, prediction_type="epsilon", prior_weight=prior_weight
            )
        )

    error = (prediction - noise).square()
    assert loss(0) == pytest.approx(float(error[:2].mean()), rel=1e-5)
    assert loss(0.5) == pytest.approx(float(error[:2].mean() + 0.5 * error[2:].mean()), rel=1e-5)


def test_eq_10_needs_a_photo(batch):
    x, _, prediction, alphas, noisy = batch
    with pytest.raises(ValueError, match="no photo of the person"):
        loss_dreambooth(prediction, noisy, x, alphas, torch.ones(6, dtype=torch.bool), prediction_type="epsilon")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import dreambooth
    from PIL import Image
    from small_base import make_family

    from bolid.models.families import get_family

    root = tmp_path_factory.mktemp("dreambooth")
    family = get_family(make_family(root))
    photos = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 48, 3), np.uint8)
        photos.append(root / f"{i}.png")
        Image.fromarray(pixels).save(photos[-1])
    trainer = dreambooth.DreamBooth(family, dreambooth.Settings(steps=3, batch_size=2, rank=2))
    before = {name: value.clone() for name, value in trainer.pipe.unet.state_dict().items()}
    file = trainer.train(photos, "woman", root / "loras" / "p1.safetensors")
    return trainer, family, photos, before, file


def test_a_lora_in_diffusers_layout_changes_pictures_and_the_base_stays(trained, tmp_path):
    import dreambooth

    from bolid.generate import generate

    trainer, family, photos, before, file = trained
    after = trainer.pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    again = trainer.train(photos, "woman", tmp_path / "again.safetensors")
    assert again.read_bytes() == file.read_bytes()
    prompt = dreambooth.with_identifier(["a woman, in a room"])
    assert prompt == ["a q woman, in a room"]
    plain = generate(prompt, tmp_path / "plain", family=family.name)[0].read_bytes()
    assert generate(prompt, tmp_path / "lora", family=family.name, lora=[str(file)])[0].read_bytes() != plain


def test_what_a_person_costs_is_recorded(trained):
    import dreambooth

    file = trained[-1]
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["config"]["steps"] == 3 and record["seconds"]["cpu"] > 0 and "photo_001" in record["inputs"]
    assert dreambooth.cost(file.parent).startswith("3 steps of 2 photos and as many class pictures, 0.")


def test_dreambooth_without_photos_is_refused(trained, tmp_path):
    with pytest.raises(BolidError, match="no photos to train on"):
        trained[0].train([], "man", tmp_path / "x.safetensors")
