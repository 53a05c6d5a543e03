"""`generate --upscale`: networks that spandrel knows, factors, files that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from generate_world import make_pictures, make_world, read_picture
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact

from bolid.backends import upscale
from bolid.backends.upscale import Upscaler
from bolid.errors import BolidError
from bolid.generate.models import Models

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 14, 3), dtype=np.uint8)


def save_network(path, scale):
    torch.manual_seed(0)
    save_file(Compact(num_feat=8, num_conv=2, upscale=scale).state_dict(), path)
    return path


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("factor", [2, 4])
def test_factors(tmp_path, scale, factor):
    upscaler = Upscaler(save_network(tmp_path / "up.safetensors", scale))
    assert upscaler.scale == scale
    larger = upscaler([PICTURE, PICTURE], factor)
    assert [picture.shape for picture in larger] == [(20 * factor, 14 * factor, 3)] * 2
    assert larger[0].dtype == np.uint8 and np.array_equal(*larger)


def test_it_is_the_networks_own_result(tmp_path):
    path = save_network(tmp_path / "up.safetensors", 2)
    network = Compact(num_feat=8, num_conv=2, upscale=2).eval()
    network.load_state_dict(Upscaler(path).model.model.state_dict())
    with torch.no_grad():
        wanted = network(torch.from_numpy(PICTURE).permute(2, 0, 1)[None].float() / 255)[0].clamp(0, 1)
    ours = Upscaler(path)([PICTURE], 2)[0]
    assert np.array_equal(ours, (wanted * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"no tensors"), "is not a safetensors file"),
        (lambda path: save_file({"a.weight": torch.zeros(3)}, path), "holds no upscaler"),
        (lambda path: save_network(path, 1), "does not enlarge"),
    ],
)
def test_files_that_are_no_upscalers(tmp_path, make, words):
    make(tmp_path / "up.safetensors")
    with pytest.raises(BolidError, match=words):
        Upscaler(tmp_path / "up.safetensors")


@pytest.fixture
def world(tmp_path):
    """A world whose family has an upscaler."""
    world = make_world(tmp_path)
    save_network(tmp_path / "up.safetensors", 2)
    with open(world.family, "a") as file:
        file.write(f"upscaler = '{tmp_path / 'up.safetensors'}'\n")
    return world


def test_it_is_loaded_once(world, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(upscale, "Upscaler", lambda *files: loaded.append(files) or Upscaler(*files))
    models = Models()
    for number in (2, 4):
        make_pictures(world, tmp_path / str(number), ["a man"], upscale=number, models=models)
    assert len(loaded) == 1


def test_generate(world, tmp_path):
    plain = make_pictures(world, tmp_path / "plain", ["a man"])
    large = make_pictures(world, tmp_path / "large", ["a man"], upscale=4)
    assert large[0].shape == (256, 192, 3) and plain[0].shape == (64, 48, 3)
    record = read_picture(next((tmp_path / "large").glob("*.png")))
    assert record["config"]["upscale"] == 4 and "upscaler" in record["inputs"]


def test_generate_without_an_upscaler(tmp_path):
    world = make_world(tmp_path)
    with pytest.raises(BolidError, match="upscaler"):
        make_pictures(world, tmp_path / "out", upscale=2)
    with pytest.raises(BolidError, match="--upscale is 3"):
        make_pictures(world, tmp_path / "out", upscale=3)
