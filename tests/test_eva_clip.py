"""EVA02-CLIP's architecture (a timm tower inside open_clip), small and random, in its publishers' layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bolid.backends.image_text import ImageTextModel
from bolid.errors import BolidError

# open_clip's own EVA02-B-16.json and the preprocess_cfg of its published open_clip_config.json, with a smaller tower.
CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_model_pretrained": False,
            "timm_pool": "token", "timm_proj": None,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic", "resize_mode": "shortest",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("eva")
    torch.manual_seed(0)
    network = open_clip.model.CustomTextCLIP(**{k: v for k, v in CONFIG["model_cfg"].items() if k != "custom_text"})
    save_file({name: value.contiguous() for name, value in network.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (60 + 10 * n, 50, 3), dtype=np.uint8) for n in range(3)]


@pytest.mark.slow
def test_what_extract_asks_of_it(published, pictures):
    model = ImageTextModel(published)
    keypoints = np.full((3, 17, 3), 20.0, np.float32)
    embeddings, features = model.views(pictures, keypoints)
    assert embeddings.shape == (3, 32) and features.shape == (3, 17, 192)  # the tower's width
    torch.testing.assert_close(embeddings, model.encode_images(pictures), atol=1e-5, rtol=0)
    assert model.patch_features(pictures).shape == (3, 192, 16, 16)  # 224 / 14
    assert model.encode_text(["a woman", "a man on a beach"]).shape == (2, 32)
    pixels = torch.rand(1, 3, 60, 50, requires_grad=True)
    model.encode_pixels(pixels).sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0


@pytest.mark.slow
def test_half_precision(published, pictures):
    keypoints = np.full((3, 17, 3), 20.0, np.float32)
    whole, half = ImageTextModel(published), ImageTextModel(published, half=True)
    for a, b in zip(whole.views(pictures, keypoints), half.views(pictures, keypoints), strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
    norms = half.encode_images(pictures).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))
    pixels = torch.rand(1, 3, 60, 50)  # what is differentiated stays exact
    assert torch.equal(whole.encode_pixels(pixels), half.encode_pixels(pixels))


@pytest.mark.parametrize("damage", ["truncated", "malicious", "wrong shape", "wrong family"])
def test_bad_files(published, tmp_path, damage):
    import os

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    weights = tmp_path / "open_clip_model.safetensors"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    tensors = load_file(published / weights.name)
    if damage == "truncated":
        weights.write_bytes((published / weights.name).read_bytes()[:-100])
    elif damage == "malicious":
        torch.save(Malicious(), weights)
    elif damage == "wrong shape":
        save_file(tensors | {"visual.trunk.norm.weight": torch.ones(3)}, weights)
    else:
        save_file({"conv_in.weight": torch.ones(3)}, weights)
    with pytest.raises(BolidError) as caught:
        ImageTextModel(tmp_path)
    assert str(tmp_path) in caught.value.message and caught.value.hint and not (tmp_path / "it-ran").exists()
