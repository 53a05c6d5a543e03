from __future__ import annotations

import json

import pytest
import torch
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.formats.adapter import save_adapter
from bolid.formats.profile import save_profile
from bolid.formats.shards import ShardWriter
from bolid.inspect import inspect
from bolid.run import canonical_json
from bolid_cli.main import app

run = CliRunner().invoke


@pytest.fixture
def profile(tmp_path, record):
    path = tmp_path / "me.safetensors"
    save_profile(path, torch.zeros(64), torch.zeros(64), torch.zeros(512), torch.ones(2) / 2, record("profile", seed=3))
    return path


@pytest.fixture
def shards(tmp_path, make_sample, record):
    writer = ShardWriter(tmp_path / "shards", record())
    for number in range(3):
        writer.write(make_sample("p1", number))
    writer.reject("x.jpg", "no person found")
    writer.close()
    return writer.directory


def test_profile(profile):
    found = inspect(profile, verify=True)
    assert found["kind"] == "profile" and found["record"]["seed"] == 3 and found["verified"]
    assert found["tensors"]["face"] == {"dtype": "F32", "shape": [512]}
    result = run(app, ["inspect", str(profile)])
    assert result.exit_code == 0 and "kind: profile" in result.stdout and "  face: F32 [512]" in result.stdout
    assert json.loads(run(app, ["inspect", str(profile), "--json"]).stdout)["kind"] == "profile"


def test_verify_finds_a_flipped_bit(profile):
    data = bytearray(profile.read_bytes())
    data[-1] ^= 1
    profile.write_bytes(data)
    assert inspect(profile)["kind"] == "profile"
    with pytest.raises(BolidError, match="damaged"):
        inspect(profile, verify=True)


def test_shards_and_directories_of_shards(shards, tmp_path):
    found = inspect(shards, verify=True)
    assert (found["kind"], found["samples"], found["persons"]) == ("shards", 3, 1)
    assert found["rejected"] == {"no person found": 1}
    assert inspect(tmp_path)["contents"] == [inspect(shards)]


def test_adapter_directory(tmp_path, record):
    for branch in ("face", "body"):
        tensors = {"image_proj.x": torch.zeros(1), "ip_adapter.1.to_k_ip.weight": torch.zeros(1)}
        save_adapter(tmp_path / f"{branch}.safetensors", tensors, record(f"{branch}-adapter"))
    assert [part["kind"] for part in inspect(tmp_path)["contents"]] == ["body-adapter", "face-adapter"]
    assert "kind: body-adapter" in run(app, ["inspect", str(tmp_path)]).stdout


def test_picture(tmp_path, record):
    path = tmp_path / "picture.png"
    text = PngImagePlugin.PngInfo()
    text.add_text("bolid", canonical_json(record("picture", config={"prompt": "a — b"})))
    Image.new("RGB", (96, 128)).save(path, pnginfo=text)
    found = inspect(path)
    assert (found["kind"], found["width"], found["height"]) == ("picture", 96, 128)
    assert found["record"]["config"] == {"prompt": "a — b"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BolidError, match="damaged"):
        inspect(path)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(BolidError, match="it carries no run"):
        inspect(path)


def test_a_record_behind_the_pixels_is_found(tmp_path, record):
    """Some programs write the text chunks last."""
    path = tmp_path / "picture.png"
    text = PngImagePlugin.PngInfo()
    text.add_itxt("bolid", canonical_json(record("picture", config={"prompt": "x"})))
    Image.new("RGB", (96, 128)).save(path, pnginfo=text)
    data = path.read_bytes()
    start = data.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert inspect(path)["record"]["config"] == {"prompt": "x"}


def test_what_is_not_ours(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(BolidError, match="not a safetensors file"):
        inspect(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BolidError, match="has no index.json"):
        inspect(tmp_path / "empty")
