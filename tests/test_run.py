from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    for name in ("cuda:99", "abacus", "meta", "", "cpu:x"):
        with pytest.raises(BolidError, match=f"device '{name}' cannot be used"):
            run.pick_device(name)


def test_prepare_environment_leaves_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("YOLO_AUTOINSTALL", raising=False)
    run.prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and os.environ["YOLO_AUTOINSTALL"] == "false"


def test_out_is_no_device_no_pipe_and_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(BolidError, match="is a device, a pipe or a socket"):
            run.write_atomic(path, "x")
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    for folder in (tmp_path, "."):
        with pytest.raises(BolidError, match="is a folder"):
            run.write_atomic(folder, "x")


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file.txt")
    for text in ("new", "newer"):
        run.write_atomic(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file.txt").read_text() == text


def test_the_longest_names_there_are(tmp_path):
    for name in ("x" * 251 + ".txt", "é" * 125 + ".txt"):
        run.write_atomic(tmp_path / name, "y")
        assert (tmp_path / name).read_text() == "y"
    with pytest.raises(BolidError, match="File name too long"):
        run.write_atomic(tmp_path / ("x" * 256), "y")
    assert len(os.listdir(tmp_path)) == 2


def test_an_out_that_vanishes_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BolidError, match="cannot write .*file.txt: No such file"):
        with run.atomic_path(tmp_path / "out" / "file.txt") as temporary:
            temporary.write_text("x")
            temporary.unlink()
            (tmp_path / "out").rmdir()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_a_file_system_that_makes_no_files_is_told():
    """There, "no such file" is what the system says of a file or folder that is to be made."""
    with pytest.raises(BolidError, match="cannot write /proc/x.txt: No such file"):
        run.write_atomic(Path("/proc/x.txt"), "y")
    for made in (Path("/proc/x"), Path("/proc/x/inside")):
        with pytest.raises(BolidError, match=f"cannot write {made}: No such file"), run.disk_errors(made):
            made.mkdir(parents=True)


def test_a_file_that_is_missing_is_not_blamed_on_out(tmp_path):
    with pytest.raises(FileNotFoundError), run.disk_errors(tmp_path / "out.txt"):
        (tmp_path / "elsewhere" / "input.txt").read_text()


def test_a_home_that_cannot_be_written_is_not_blamed_on_out(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("BOLID_HOME", str(tmp_path / "home"))
    with pytest.raises(BolidError, match="cannot write") as caught:
        run.write_atomic(run.home() / "family", "tiny")
    assert "BOLID_HOME" in caught.value.hint


def test_what_a_killed_process_leaves_of_a_file_is_taken_over(tmp_path):
    """By its exact name: nothing else of anybody's."""
    names = [
        ".x.point.safetensors",
        "..x.point.bolid-tmp.safetensors2",
        ".x.bolid-tmp.safetensors",
        "notes.tmp",
    ]
    for name in [*names, "..x.point.bolid-tmp.safetensors"]:
        (tmp_path / name).write_text("long and half-written")
    run.remove_leftovers(tmp_path / names[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    run.write_atomic(tmp_path / "x.safetensors", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names, "x.safetensors"} - {names[2]})
    assert (tmp_path / "x.safetensors").read_text() == "new"


def test_nothing_is_written_where_a_killed_process_has_left_nothing(tmp_path):
    (tmp_path / "x.png").write_text("whole")
    os.utime(tmp_path, ns=(1, 1))
    run.remove_leftovers(tmp_path / "x.png")
    assert tmp_path.stat().st_mtime_ns == 1  # making or removing a file would have changed it


@pytest.mark.skipif(run.fcntl is None, reason="leftovers are taken over by their locks")
def test_a_file_that_was_named_before_the_kill_stays_whole(tmp_path):
    named, leftover = tmp_path / "x.txt", tmp_path / ".x.bolid-tmp.txt"
    named.write_text("whole")
    os.link(named, leftover)
    with run.unfinished(named) as temporary:
        temporary.write_text("another run's")
        assert (temporary, named.read_text()) == (leftover, "whole")
    os.link(named, leftover)
    run.remove_leftovers(named)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"] and named.read_text() == "whole"


def test_what_a_killed_process_leaves_of_a_folder_is_taken_over(tmp_path):
    (tmp_path / ".model.bolid-tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".model.bolid-tmp" / "deep" / "half").touch()
    with run.atomic_folder(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(tmp_path / "model") == ["whole"]


def test_a_link_or_a_folder_under_the_temporary_name_is_left_alone(tmp_path):
    (tmp_path / "thesis").write_text("thesis")
    (tmp_path / ".x.bolid-tmp.txt").symlink_to(tmp_path / "thesis")
    (tmp_path / ".y.bolid-tmp.txt").mkdir()
    for name in ("x.txt", "y.txt"):
        run.write_atomic(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "thesis").read_text() == "thesis" and len(os.listdir(tmp_path)) == 5


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    target = tmp_path / "x.txt"
    with run.atomic_path(target) as first, run.atomic_path(target) as second:
        assert first != second and first.suffix == second.suffix == ".txt"
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("folder", [True, False])
def test_one_process_writes_a_place(tmp_path, folder):
    """Until it ends, even by a kill, which leaves nothing that keeps the next one away."""
    out = tmp_path / "out"
    code = f"from bolid.run import only_writer\nwith only_writer({str(out)!r}, folder={folder}):\n print(1, flush=True)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}\n import time; time.sleep(99)"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BolidError, match="another process is writing .*out") as caught:
            with run.only_writer(out, folder=folder):
                pass
        assert "another --out" in caught.value.hint
    finally:
        other.kill()
        other.wait()
    for _ in range(2):
        with run.only_writer(out, folder=folder):
            pass
    assert os.listdir(tmp_path) == (["out"] if folder else []), "the killed one has made it"


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    with pytest.raises(BolidError), run.only_writer(tmp_path / "a" / "out", folder=True):
        raise BolidError("wrong")
    with run.only_writer(tmp_path / "b", folder=True):
        (tmp_path / "b" / "x").touch()
    assert not (tmp_path / "a" / "out").exists() and (tmp_path / "b" / "x").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_allocator_is_left_alone_where_the_user_has_set_it(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    run.keep_freed_memory()
    assert len(calls) == 3
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    run.keep_freed_memory()
    assert len(calls) == 3
