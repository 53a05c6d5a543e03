"""Weights of InceptionV3 and of LPIPS: what is looked for, and that bad files are refused and never run."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from bolid.backends.features import InceptionFeatures, Lpips, alexnet_path, inception_path
from bolid.errors import BolidError
from bolid.evaluate.evaluators import Evaluators
from bolid.models.families import get_family

pytest.importorskip("torch_fidelity")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_missing_weights_are_named():
    with pytest.raises(BolidError, match="InceptionV3's weights are missing: looked for") as caught:
        InceptionFeatures()
    assert "--features tower" in caught.value.hint and str(inception_path()) in caught.value.message


@pytest.mark.parametrize("kind", ["truncated", "malicious", "wrong shape", "wrong network"])
def test_bad_weights_are_refused(kind, tmp_path):
    path, trace = inception_path(), tmp_path / "it-ran"
    path.parent.mkdir(parents=True)
    content = {
        "truncated": {"fc.weight": torch.ones(9)},
        "malicious": Malicious(trace),
        "wrong shape": {"Conv2d_1a_3x3.conv.weight": torch.ones(3)},
        "wrong network": {"conv_in.weight": torch.ones(3)},
    }[kind]
    torch.save(content, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(
        BolidError, match="does not hold InceptionV3's weights|is damaged or not a weights file"
    ) as caught:
        InceptionFeatures()
    assert caught.value.hint == "fetch it again" and not trace.exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torch's own folder for fetched weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    alexnet_path().parent.mkdir(parents=True)
    return alexnet_path()


@pytest.mark.slow
def test_lpips_is_torchmetrics(hub):
    import torchvision
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as theirs

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), hub)
    lpips, rng = Lpips(), np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (96, 72, 3), dtype=np.uint8) for _ in range(2))
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in (a, b))
    assert lpips.distance(a, b) == pytest.approx(float(theirs(x, y, net_type="alex", normalize=True)), rel=1e-5)
    assert lpips.distance(a, a) == 0 and lpips.distance(a, b) > 0
    assert lpips.distance(a[:40, :40], b) > 0  # smaller than AlexNet can see: made larger
    models = Evaluators(get_family("tiny"), "cpu", "tower")
    assert models.lpips is None
    tower = models.perceptual_distance(*map(models.perceptual_view, (a, b)))
    models.lpips = lpips
    assert models.perceptual_distance(*map(models.perceptual_view, (a, b))) == lpips.distance(a, b) != tower > 0


def test_missing_alexnet_is_named(hub):
    with pytest.raises(BolidError, match="AlexNet's weights are missing: looked for") as caught:
        Lpips()
    assert str(hub) in caught.value.message and "torchvision.models.alexnet" in caught.value.hint


@pytest.mark.parametrize("kind", ["text", "malicious", "wrong network"])
def test_bad_alexnet_is_refused(kind, hub, tmp_path):
    trace = tmp_path / "it-ran"
    torch.save(Malicious(trace) if kind == "malicious" else {"conv_in.weight": torch.ones(3)}, hub)
    if kind == "text":
        hub.write_text("text")
    with pytest.raises(BolidError, match="does not hold AlexNet's weights|is damaged or not a weights file"):
        Lpips()
    assert not trace.exists()
