"""Photographs and renders are distinguished: those that installed packages ship, and rendered people."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bolid.formats.images import read_photo
from bolid.rendered import PHOTOGRAPH, fine_texture, is_photograph

SHIPPED = {
    "ultralytics": ("assets/bus.jpg", "assets/zidane.jpg"),
    "insightface": ("data/images/t1.jpg",),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": ("data/astronaut.png", "data/camera.png"),
}


def shipped() -> list[Path]:
    """Photographs of people in installed packages."""
    found = []
    for package, files in SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            found += [path for file in files if (path := Path(spec.origin).parent / file).is_file()]
    return found


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("quality", [None, 40])
def test_photographs_and_renders(rendered_people, quality):
    photographs, renders = shipped(), sorted(rendered_people.rglob("*.jpg"))
    assert len(photographs) >= 3 and len(renders) == 15
    for paths, expected in ((photographs, True), (renders, False)):
        for path in paths:
            picture = read_photo(path)
            assert is_photograph(picture if quality is None else jpeg(picture, quality)) == expected, path.name


def test_the_size_of_a_photograph_does_not_count():
    picture = read_photo(shipped()[0])
    half = np.asarray(
        Image.fromarray(picture).resize((picture.shape[1] // 2, picture.shape[0] // 2), Image.Resampling.BOX)
    )
    assert fine_texture(half) == pytest.approx(fine_texture(picture), rel=0.1)


def test_what_it_measures():
    rng = np.random.default_rng(0)
    plain = np.full((256, 192, 3), 120, np.uint8)
    assert fine_texture(plain) == 0
    ramp = np.broadcast_to(np.linspace(0, 255, 192).astype(np.uint8)[None, :, None], (256, 192, 3))
    assert fine_texture(np.ascontiguousarray(ramp)) < PHOTOGRAPH  # a gradient is no texture
    for deviation in (2, 8):
        grey = np.clip(120 + rng.normal(0, deviation, (256, 192, 1)), 0, 255).round().astype(np.uint8)
        assert fine_texture(np.repeat(grey, 3, 2)) == pytest.approx(deviation, rel=0.1)
    assert fine_texture(plain[:6, :6]) == 0  # too small to say
