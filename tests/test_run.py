from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from bolid import run
from bolid.errors import BolidError


def test_error_keeps_its_hint_through_a_pickle():
    error = pickle.loads(pickle.dumps(BolidError("what", "do this")))
    assert (error.message, error.hint, str(error)) == ("what", "do this", "what")


def test_derived_seeds_are_stable_and_differ_by_name():
    assert run.derive_seed(0, "train-vae", 3) == run.derive_seed(0, "train-vae", 3)
    seeds = {run.derive_seed(seed, name, step) for seed in range(4) for name in "ab" for step in range(4)}
    assert len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    # Names do not run into each other.
    assert run.derive_seed(0, "a", "b") != run.derive_seed(0, "ab")


def test_canonical_json_takes_what_configs_hold():
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: tuple = (1, 2)
        out: Path = Path("a/b")
        scale: float = 0.5

    text = run.canonical_json({"z": np.float64(1.5), "a": Config()})
    assert text == '{"a":{"out":"a/b","scale":0.5,"size":[1,2]},"z":1.5}'
    with pytest.raises(ValueError, match="Out of range float"):
        run.canonical_json(float("nan"))


def test_run_record_holds_plain_json():
    record = run.run_record("profile", family="tiny", config={"p": Path("x")}, seed=7, inputs={"a": "00"})
    assert record == json.loads(json.dumps(record))
    assert record["kind"] == "profile" and record["version"] == run.FORMAT_VERSION and record["seed"] == 7
    assert record["config"] == {"p": "x"} and "torch" in record["packages"]


def test_atomic_path_keeps_the_old_content_when_writing_fails(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    run.write_atomic(target, "old")

    def write_half() -> None:
        with run.atomic_path(target) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == ["file.txt"]


def test_full_disk_and_no_permission_are_told(tmp_path):
    target = tmp_path / "file.txt"
    with pytest.raises(BolidError, match="no space left on the disk while writing .*file.txt") as caught:
        with run.atomic_path(target):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "same command again" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(BolidError, match="cannot write"):
        run.write_atomic(tmp_path / "file" / "below", "x")
    assert not target.exists()


def test_devices():
    assert run.pick_device("cpu") == "cpu" and run.pick_device() in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(BolidError, match=f"device '{name}' cannot be used"):
            run.pick_device(name)


def test_prepare_environment_leaves_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("YOLO_AUTOINSTALL", raising=False)
    run.prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and os.environ["YOLO_AUTOINSTALL"] == "false"
