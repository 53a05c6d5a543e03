from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter, nested_state_dict, save_adapter
from bolid.formats.profile import load_profile, save_profile
from bolid.formats.tensors import load_tensors, read_record, save_tensors


@pytest.fixture
def saved(tmp_path, record):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).reshape(2, 3), "b": np.zeros((2,), np.float16)}, record("thing"))
    return path


def test_round_trip_and_equal_bytes(saved, record, tmp_path):
    tensors, found = load_tensors(saved, ("other", "thing"))
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3)) and tensors["b"].dtype == torch.float16
    assert found["kind"] == "thing" and read_record(saved) == found
    again = tmp_path / "again.safetensors"
    save_tensors(again, dict(reversed(tensors.items())), record("thing"))
    assert again.read_bytes() == saved.read_bytes()


def test_odd_tensors(tmp_path, record):
    path = tmp_path / "odd.safetensors"
    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "bf16": torch.ones(3, dtype=torch.bfloat16)}
    odd["transposed"] = torch.arange(6.0).reshape(2, 3).T
    save_tensors(path, odd, record("odd"))
    tensors, _ = load_tensors(path, "odd")
    assert all(torch.equal(tensors[name], value) for name, value in odd.items())


def test_record_is_read_without_torch(saved):
    code = """import sys; from bolid.formats.tensors import read_record
print(read_record(sys.argv[1])["kind"], "torch" in sys.modules)"""
    result = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert result.stdout.split() == ["thing", "False"]


def test_wrong_kind_and_newer_version(saved, tmp_path, record):
    with pytest.raises(BolidError, match="is of kind 'thing', not 'profile'"):
        load_tensors(saved, "profile")
    newer = tmp_path / "newer.safetensors"
    save_tensors(newer, {"a": torch.zeros(1)}, {**record("thing"), "version": 99})
    with pytest.raises(BolidError, match="format version 99") as caught:
        load_tensors(newer, "thing")
    assert "newer bolid" in caught.value.hint


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_truncated(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(BolidError, match="not a safetensors file|damaged"):
        load_tensors(saved, "thing")


def test_every_flipped_bit_is_noticed(saved):
    data = bytearray(saved.read_bytes())
    header = int.from_bytes(data[:8], "little")
    for position in range(8 + header, len(data)):
        damaged = data.copy()
        damaged[position] ^= 1
        saved.write_bytes(damaged)
        with pytest.raises(BolidError, match="damaged: its content does not match"):
            load_tensors(saved, "thing")


@pytest.mark.parametrize("old", ['"seed":0', '"family":"tiny"', '"sha256":"'])
def test_a_changed_record_is_noticed(saved, old):
    data = saved.read_bytes()
    place = data.index(old.replace('"', '\\"').encode()) + len(old.replace('"', '\\"')) - (old == '"family":"tiny"')
    last = place - 1 if old == '"seed":0' else place - 3 if "family" in old else place
    changed = bytearray(data)
    changed[last] ^= 1
    saved.write_bytes(changed)
    with pytest.raises(BolidError, match="damaged: its content does not match"):
        load_tensors(saved, "thing")


def test_a_file_of_an_older_version_still_loads(tmp_path, record):
    """It has a checksum of its tensors alone."""
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3.0)}
    digest = hashlib.sha256(b'["a","torch.float32",[3]]' + tensors["a"].numpy().tobytes()).hexdigest()
    for checksum, whole in ((digest, True), (digest[::-1], False), (None, False)):
        text = json.dumps({**record("thing"), "tensors_sha256": checksum})
        save_file(tensors, tmp_path / "old.safetensors", metadata={"bolid": text})
        if whole:
            assert torch.equal(load_tensors(tmp_path / "old.safetensors", "thing")[0]["a"], tensors["a"])
        else:
            with pytest.raises(BolidError, match="damaged: its content does not match"):
                load_tensors(tmp_path / "old.safetensors", "thing")


def test_foreign_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(BolidError, match="not one of BoLID's"):
        load_tensors(path, "profile")
    save_file({"a": torch.zeros(1)}, path, metadata={"bolid": "[]"})
    with pytest.raises(BolidError, match="not one of BoLID's"):
        load_tensors(path, "profile")
    deep = (200_000).to_bytes(8, "little") + b"[" * 200_000
    for content in (
        b"",
        b"\x89PNG\r\n\x1a\n" + b"x" * 100,
        json.dumps({"a": 1}).encode(),
        b"\x02" + b"\0" * 7 + b"[]",
        deep,
    ):
        path.write_bytes(content)
        with pytest.raises(BolidError, match="not a safetensors file"):
            load_tensors(path, "profile")
    photo = tmp_path / "me.JPG"
    photo.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BolidError, match="not a safetensors file") as caught:
        load_tensors(photo, "profile")
    assert f"bolid profile {photo}" in caught.value.hint and "--photo" in caught.value.hint
    with pytest.raises(BolidError, match="cannot read .*: No such file"):
        load_tensors(tmp_path / "absent.safetensors", "profile")


def test_profile_round_trip(tmp_path, record):
    path = tmp_path / "me.safetensors"
    mean, logvar, face, weights = torch.randn(64), torch.randn(64), torch.randn(512), torch.tensor([0.25, 0.75])
    save_profile(path, mean, logvar, face, weights, record("profile"))
    profile = load_profile(path)
    assert torch.equal(profile.body_mean, mean) and torch.equal(profile.face, face)
    assert torch.equal(profile.view_weights, weights) and profile.record["family"] == "tiny"
    assert path.stat().st_size < 8192
    save_profile(path, mean, logvar, None, weights, record("profile"))
    assert load_profile(path).face is None
    save_tensors(path, {"body_mean": mean}, record("profile"))
    with pytest.raises(BolidError, match="lacks parts of a profile"):
        load_profile(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_profile_without_numbers_is_refused(tmp_path, record, value):
    for name in ("body_mean", "body_logvar", "face", "view_weights"):
        tensors = {"body_mean": torch.zeros(4), "body_logvar": torch.zeros(4), "face": torch.zeros(512),
                   "view_weights": torch.ones(2) / 2}  # fmt: skip
        tensors[name][1] = value
        save_profile(tmp_path / "me.safetensors", **tensors, record=record("profile"))
        with pytest.raises(BolidError, match=f"me.safetensors cannot be used: {name} has values that are no numbers"):
            load_profile(tmp_path / "me.safetensors")


@pytest.mark.parametrize("fields", [{"family": 5}, {"inputs": []}, {"inputs": {"a": 1}}, {"config": None}])
def test_a_record_of_another_form_is_refused(tmp_path, record, fields):
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {**record("thing"), **fields})
    with pytest.raises(BolidError, match="is damaged: its record lacks a family, settings or inputs"):
        read_record(path)


def test_adapter_round_trip(tmp_path, record):
    path = tmp_path / "body.safetensors"
    tensors = {"image_proj.proj.weight": torch.randn(8, 4), "ip_adapter.1.to_k_ip.weight": torch.randn(2, 2)}
    save_adapter(path, tensors, record("body-adapter"))
    loaded, found = load_adapter(path, "body")
    assert loaded.keys() == tensors.keys() and found["kind"] == "body-adapter"
    assert nested_state_dict(loaded)["ip_adapter"].keys() == {"1.to_k_ip.weight"}
    with pytest.raises(BolidError, match="is of kind 'body-adapter', not 'face-adapter'"):
        load_adapter(path, "face")
    with pytest.raises(BolidError, match="it has no ip_adapter"):
        save_adapter(path, {"image_proj.x": torch.zeros(1)}, record("body-adapter"))
    with pytest.raises(BolidError, match="outside the IP-Adapter layout: 'unet.x'"):
        save_adapter(path, {**tensors, "unet.x": torch.zeros(1)}, record("body-adapter"))
