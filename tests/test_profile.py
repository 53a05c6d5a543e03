from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import make_body_encoder, make_family

import bolid.views
from bolid.errors import BolidError
from bolid.formats.profile import load_profile
from bolid.profile import make_profile


class Reader:
    """Stands in for the family's models: what it sees is a function of the picture."""

    def __init__(self, family, device="cpu", person="main"):
        pass

    def read(self, images):
        return [self._view(image) for image in images]

    def _view(self, image):
        if image.mean() < 2:
            return bolid.views.NO_PERSON
        rng = np.random.default_rng(int(hashlib.sha256(image.tobytes()).hexdigest()[:8], 16))
        h, w = image.shape[:2]
        keypoints = (rng.uniform(0.1, 0.9, (17, 3)) * [w, h, 0] + [0, 0, rng.uniform(0.5, 1)]).astype(np.float32)
        face = rng.normal(size=512).astype(np.float32)
        return bolid.views.View(
            image=image, box=np.array([4, 4, w - 4, h - 4], np.float32), score=0.9, keypoints=keypoints,
            face=face / np.linalg.norm(face) if image.mean() < 140 else None, face_box=None,
            image_embed=np.zeros(4, np.float32), view_features=np.zeros((17, 4), np.float16),
        )  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(bolid.views, "ViewReader", Reader)
    family = make_family(tmp_path)
    rng = np.random.default_rng(0)
    photos = []
    for i in range(4):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(path)
        photos.append(path)
    return family, make_body_encoder(tmp_path / "enc.safetensors", family), photos


def profile(world, photos, out):
    return make_profile(photos, out, body_encoder=world[1], family=world[0], device="cpu")


def test_the_order_of_the_photos_does_not_matter(world, tmp_path):
    _, _, photos = world
    profile(world, photos, tmp_path / "a.safetensors")
    profile(world, photos[::-1], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_of_the_photos_do_not_matter(world, tmp_path):
    _, _, photos = world
    profile(world, photos, tmp_path / "a.safetensors")
    for i, photo in enumerate(photos):
        photo.rename(photo.with_name(f"z{3 - i}.png"))
    profile(world, [tmp_path / "photos"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_photo_never_raises_the_uncertainty(world, tmp_path):
    _, _, photos = world
    spreads = []
    for count in range(1, 5):
        profile(world, photos[:count], tmp_path / "me.safetensors")
        me = load_profile(tmp_path / "me.safetensors")
        assert len(me.view_weights) == count and float(me.view_weights.sum()) == pytest.approx(1)
        spreads.append(me.body_logvar)
    assert all((more <= fewer).all() for fewer, more in zip(spreads, spreads[1:], strict=False))
    assert (spreads[0] <= 0).all()  # never above the prior's


def test_photos_that_cannot_be_used_are_reported(world, tmp_path):
    _, _, photos = world
    Image.new("RGB", (60, 80)).save(tmp_path / "dark.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "again.png").write_bytes(photos[0].read_bytes())
    bad = [tmp_path / name for name in ("dark.png", "text.png", "again.png")]
    result = profile(world, [*photos, *bad], tmp_path / "me.safetensors")
    reasons = [report.rejected for report in result.reports]
    assert reasons[:4] == [""] * 4 and reasons[4] == "no person found" and reasons[6] == "the same file again"
    assert "is not a picture" in reasons[5] and result.photos == 4
    profile(world, photos, tmp_path / "without.safetensors")
    with_bad, without = load_profile(tmp_path / "me.safetensors"), load_profile(tmp_path / "without.safetensors")
    assert torch.equal(with_bad.body_mean, without.body_mean)


def test_no_face_is_no_face(world, tmp_path):
    Image.new("RGB", (60, 80), (200, 200, 200)).save(tmp_path / "light.png")
    result = profile(world, [tmp_path / "light.png"], tmp_path / "me.safetensors")
    assert not result.has_face and load_profile(tmp_path / "me.safetensors").face is None


def test_nothing_usable_leaves_no_file(world, tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "dark.png")
    with pytest.raises(BolidError, match="none of the 1 photos can be used: .*no person found") as error:
        profile(world, [tmp_path / "dark.png"], tmp_path / "me.safetensors")
    assert error.value.hint and not (tmp_path / "me.safetensors").exists()


def test_errors(world, tmp_path):
    family, encoder, photos = world
    with pytest.raises(BolidError, match="no photo given"):
        profile(world, [], tmp_path / "me.safetensors")
    with pytest.raises(BolidError, match="cannot read"):
        profile(world, [tmp_path / "missing.jpg"], tmp_path / "me.safetensors")
    with pytest.raises(BolidError, match="was made with family"):
        make_profile(photos, tmp_path / "me.safetensors", body_encoder=encoder, family="tiny")
    for name in ("a", "b"):
        (tmp_path / "people" / name).mkdir(parents=True)
        (tmp_path / "people" / name / "1.png").write_bytes(photos[0].read_bytes())
    with pytest.raises(BolidError, match="holds photos of 2 people"):
        profile(world, [tmp_path / "people"], tmp_path / "me.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(encoder.read_bytes()[:-10])
    with pytest.raises(BolidError, match="damaged"):
        make_profile(photos, tmp_path / "me.safetensors", body_encoder=tmp_path / "bad.safetensors")
