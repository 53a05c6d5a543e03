"""`bolid doctor`: what it says of a family's files, of libraries that are missing or broken, and of devices."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from bolid.doctor import diagnose
from bolid.doctor.libraries import (
    LIBRARIES,
    TROUBLES,
    Library,
    device_rows,
    import_rows,
    package_rows,
    try_imports,
    versions,
)
from bolid.doctor.machine import environment, memory
from bolid.doctor.parts import COMMANDS, OPTIONAL, look_at, part_rows
from bolid.models.families import PARTS, get_family
from bolid.run import write_atomic
from bolid_cli.main import app

run = CliRunner().invoke
ROOT = Path(__file__).parent.parent


def section(found, title):
    return {row.name: row for row in found.sections[title]}


# ---- files of a family --------------------------------------------------------------------------------------------


def test_the_embedded_family_can_be_used():
    found = diagnose("tiny", quick=True)
    assert found.usable and found.problems == ()
    assert {row.value for row in found.sections["Commands"]} == {"runs"}
    assert all(row.details["state"] == "there" for row in found.sections["Family tiny"])
    result = run(app, ["doctor", "--quick"])
    assert result.exit_code == 0 and "Family tiny" in result.stdout and "error" not in result.stderr


def test_a_family_without_weights_says_what_each_part_costs_and_the_command():
    result = run(app, ["doctor", "--family", "sdxl", "--quick", "--json", "-q"])
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert not data["usable"] and "error: family 'sdxl' cannot be used here: " in result.stderr
    rows = {row["name"]: row for row in data["sections"]["Family sdxl"]}
    assert rows["base"]["state"] == "wrong" and "6940 MB" in rows["base"]["value"]
    assert "bolid models pull sdxl --only base" in rows["base"]["advice"]
    assert rows["body_encoder"]["state"] == "ok" and rows["segmentation"]["state"] != "ok"
    assert rows["to be fetched"]["value"].startswith("9.2 GB")
    commands = {row["name"]: row for row in data["sections"]["Commands"]}
    assert commands["profile"]["value"] == "lacks the pose, face, image text and segmentation"
    assert commands["profile"]["advice"] == "bolid models pull sdxl"
    assert commands["train-vae"]["value"] == "runs"
    # Pictures of a person need no training.
    fetch = "bolid models pull sdxl"
    assert commands["generate --profile"]["advice"] == f"{fetch}, then {fetch} --only face_portrait"
    assert commands["generate --body-from shape"]["advice"] == f"{fetch}, then {fetch} --only depth_controlnet"
    assert f"{fetch} --only face_portrait; or train one" in rows["face_adapter"]["advice"]
    assert f"{fetch} --only depth_controlnet; or train one" in rows["body_adapter"]["advice"]
    # Published parts are needed, what has to be trained is not: the plain base is of use without it.
    assert [p.split(": ")[1] for p in data["problems"]] == ["base", "pose", "face", "image_text", "segmentation"]
    page = run(app, ["doctor", "--family", "sdxl", "--quick"]).stdout
    assert "! base" in page and "! segmentation" in page and "> bolid models pull sdxl" in page


def test_published_parts_stand_in_for_trained_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("BOLID_HOME", str(tmp_path))
    sdxl = tmp_path / "sdxl"
    write_atomic(sdxl / "adapter" / "face-portrait.safetensors", save({"x": torch.zeros(1)}))
    write_atomic(sdxl / "controlnet-depth" / "config.json", "{}")
    found = diagnose("sdxl", quick=True)
    parts, commands = section(found, "Family sdxl"), section(found, "Commands")
    assert parts["face_adapter"].advice == "generate works without it, by the face portrait"
    assert parts["body_adapter"].advice == "generate --body-from shape works without it, by the depth controlnet"
    assert commands["generate --profile"].value == "lacks the base"
    monkeypatch.setenv("BOLID_COMMERCIAL", "1")  # then only a training gives a face
    assert "bolid train-adapter" in section(diagnose("sdxl", quick=True), "Family sdxl")["face_adapter"].advice


def test_an_unknown_family_is_an_error():
    result = run(app, ["doctor", "--family", "huge", "--quick"])
    assert result.exit_code == 1 and "no model family called 'huge'" in result.stderr


@pytest.fixture
def copied(tmp_path):
    """A family of the user's own: a copy of tiny's files."""
    tiny = get_family("tiny")
    for part in ("pose", "base"):
        shutil.copytree(getattr(tiny, part), tmp_path / part)
    shutil.copyfile(tiny.body_encoder, tmp_path / "body-encoder.safetensors")
    file = tmp_path / "mine.toml"
    file.write_text("image_size = [128, 96]\n")
    return get_family(str(file))


def state(family, name):
    return next(part for part in look_at(family) if part.name == name)


def test_damaged_files_are_named(copied):
    assert state(copied, "base").state == state(copied, "pose").state == "there"
    encoder = copied.body_encoder
    encoder.write_bytes(encoder.read_bytes()[:-100])
    part = state(copied, "body_encoder")
    assert part.state == "damaged" and part.why.startswith("body-encoder.safetensors is damaged: it has")
    assert part.hint == "remove it, then: bolid train-vae"
    (copied.pose / "config.json").write_text("{")
    assert state(copied, "pose").why == "config.json is not JSON"
    (copied.pose / "config.json").unlink()
    assert state(copied, "pose").why == "config.json is missing"
    shutil.rmtree(copied.base / "vae")
    assert state(copied, "base").why == "the folder vae is missing"
    (copied.base / "model_index.json").unlink()
    assert state(copied, "base").why == "model_index.json is missing or damaged"
    row = next(row for row in part_rows(copied, look_at(copied)) if row.name == "base")
    assert row.state == "wrong" and row.value.startswith("damaged: ")


def test_files_are_compared_with_what_was_fetched(copied):
    files = {p.name: {"size": p.stat().st_size, "sha256": ""} for p in copied.pose.iterdir()}
    write_atomic(copied.root / "models.json", json.dumps({"pose": {"files": files | {"gone.bin": {"size": 1}}}}))
    assert state(copied, "pose").why == "gone.bin is missing"
    files["config.json"]["size"] += 7
    write_atomic(copied.root / "models.json", json.dumps({"pose": {"files": files}}))
    size = files["config.json"]["size"]
    assert state(copied, "pose").why == f"config.json has {size - 7} bytes; {size} were fetched"
    (copied.pose / "weights.onnx").symlink_to(copied.root / "a-cache-that-was-cleared")
    (copied.root / "models.json").unlink()
    assert state(copied, "pose").why == "weights.onnx points to a file that is gone"


def test_every_part_and_command_has_its_line():
    tiny = get_family("tiny")
    assert set(PARTS) <= {part.name for part in look_at(get_family("sdxl"))}
    assert all(hasattr(tiny, part) for needs in (*COMMANDS.values(), OPTIONAL) for part in needs)


def test_too_small_a_disk_is_a_fault(monkeypatch):
    monkeypatch.setattr("bolid.doctor.parts.free_space", lambda folder: 3_000_000_000)
    family = get_family("sdxl")
    row = part_rows(family, look_at(family))[-1]
    assert row.state == "wrong" and row.advice.startswith("only 3.0 GB free at ")


# ---- the machine --------------------------------------------------------------------------------------------------


def test_environment_names_tokens_without_showing_them(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    rows = {row.name: row for row in environment()}
    assert rows["HF_TOKEN"].value == rows["https_proxy"].value == "set"
    assert "secret" not in repr(list(rows.values()))
    assert rows["HF_HUB_OFFLINE"].state == rows["OMP_WAIT_POLICY"].state == "note"
    assert "30 times slower" in rows["OMP_WAIT_POLICY"].advice


def test_memory_is_known_here():
    total, available = memory()
    assert total and available and 0 < available <= total


def test_it_starts_within_two_seconds_without_torch_or_a_network():
    code = (
        "import sys, socket; sys.argv = ['bolid', 'doctor', '--family', 'sdxl', '--quick']\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from bolid_cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 1\n"
        "print('HEAVY', *sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0 and "AssertionError" not in result.stderr, result.stderr
        assert result.stdout.rstrip().endswith("HEAVY"), "heavy modules were loaded"
    assert min(seconds) < 2  # processor time, so that busy neighbours do not fail the test


# ---- libraries ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Libraries that fail in every way a library can, and a good one after them."""
    modules = {
        "bolid_t_raises": "raise OSError('libcudart.so.12: cannot open shared object file\\nmore')",
        "bolid_t_exits": "raise SystemExit(3)",
        "bolid_t_dies": "import os, sys; print('illegal instruction', file=sys.stderr, flush=True); os.abort()",
        "bolid_t_hangs": "import time; time.sleep(60)",
        "bolid_t_talks": "print('noise on stdout')",
        "bolid_t_lazy": "def __getattr__(name): raise ImportError('no ' + name)",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    return [
        Library(name, name, "a test", needed=name != "bolid_t_lazy") for name in [*modules, "bolid_t_absent", "json"]
    ]


@pytest.mark.slow
def test_broken_libraries_are_reported_and_the_rest_goes_on(broken):
    answers = {answer["module"]: answer["error"] for answer in try_imports(broken, patience=4)}
    assert list(answers) == [library.module for library in broken]
    assert answers["bolid_t_raises"] == "OSError: libcudart.so.12: cannot open shared object file"
    assert answers["bolid_t_exits"] == "SystemExit: 3"
    assert answers["bolid_t_dies"].startswith("ended Python, status -6")
    assert answers["bolid_t_hangs"] == "took more than 4 s"
    assert answers["bolid_t_absent"] == "ModuleNotFoundError: No module named 'bolid_t_absent'"
    assert answers["bolid_t_talks"] == answers["json"] == ""
    rows = import_rows([{"module": m, "seconds": 1, "error": e} for m, e in answers.items()], broken)
    assert rows[0].value.startswith("3 of 8 libraries")
    assert all(row.state == "wrong" and "pip install" in row.advice for row in rows[1:])


def test_a_library_that_dies_makes_the_exit_status_1(monkeypatch, broken):
    monkeypatch.setattr("bolid.doctor.command.try_imports", lambda: try_imports(broken[2:3]))
    monkeypatch.setattr("bolid.doctor.command.import_rows", lambda answers: import_rows(answers, broken))
    monkeypatch.setattr("bolid.doctor.command.device_rows", lambda answers, megabytes: [])
    result = run(app, ["doctor"])
    assert result.exit_code == 1 and "! bolid_t_dies" in result.stdout
    assert "Libraries: bolid_t_dies: ended Python" in result.stderr


def test_lazy_libraries_are_loaded_whole(monkeypatch, broken):
    lazy = Library("bolid_t_lazy", "bolid_t_lazy", "", "Thing")
    code = (
        "import bolid.doctor.libraries as l, sys\n"
        "l.LIBRARIES = (l.Library('bolid_t_lazy', '', '', 'Thing'),)\nl._import_all(['bolid_t_lazy'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "ImportError: no Thing" in shown.stdout and lazy.attribute == "Thing"
    assert {library.module for library in LIBRARIES if library.attribute} >= {"diffusers", "transformers"}


def test_known_troubles_are_told_from_sound_versions():
    good = {"torch": "2.13.0", "torchvision": "0.28.0", "typer": "0.29.2", "onnxruntime": "1.31.1"}
    assert not any(trouble.found(good) for trouble in TROUBLES)
    assert not any(trouble.found({}) for trouble in TROUBLES)
    cpu = good | {"torch": "2.13.0+cpu"}
    (row,) = [row for row in package_rows(versions() | cpu) if row.name.startswith("torch+cpu")]
    assert row.state == "wrong" and "does not import" in row.value and "pip install" in row.advice
    assert not TROUBLES[0].found(cpu | {"torchvision": "0.28.0+cpu"})
    for bad in (
        {"typer": "0.25.1"},
        {"onnxruntime-gpu": "1.20"},
        {"opencv-python": "4", "opencv-python-headless": "4"},
    ):
        assert sum(trouble.found(good | bad) for trouble in TROUBLES) == 1


def test_old_and_absent_packages_are_faults(monkeypatch):
    monkeypatch.setattr("bolid.doctor.libraries._requirements", lambda: {"torch": ">=2.8", "tqdm": ">=4.66"})
    installed = {name: version for name, version in versions().items() if name != "tqdm"}
    rows = {row.name: row for row in package_rows(installed | {"torch": "2.7.1+cu126"})}
    assert rows["torch"].state == "wrong" and rows["torch"].value == "2.7.1+cu126, and >=2.8 is needed"
    assert rows["tqdm"].value == "not installed" and rows["tqdm"].state == "note"
    without = {name: version for name, version in versions().items() if name != "diffusers"}
    rows = {row.name: row for row in package_rows(without)}
    assert rows["diffusers"].state == "wrong" and rows["diffusers"].value == "not installed"


# ---- devices ------------------------------------------------------------------------------------------------------


def devices(*found, cuda="13.0", driver=False, providers=("CPUExecutionProvider",), megabytes=0):
    report = {"torch": "2.15.0", "cuda": cuda, "hip": None, "found": list(found), "threads": 2, "driver": driver}
    return {row.name: row for row in device_rows([{"device": report}, {"onnxruntime": list(providers)}], megabytes)}


def test_what_is_said_of_a_device():
    card = {
        "device": "cuda:0",
        "name": "Card",
        "total": 8e9,
        "free": 7e9,
        "capability": "8.6",
        "bf16": True,
        "error": "",
    }
    rows = devices(card, megabytes=6940)
    assert rows["cuda:0"].value == "Card, 7.0 GB free of 8.0 GB, bf16"
    assert "generate --offload" in rows["cuda:0"].advice and "onnxruntime-gpu" in rows["onnxruntime"].advice
    rows = devices({**card, "total": 24e9}, megabytes=6940, providers=["CUDAExecutionProvider"])
    assert {row.state for row in rows.values()} == {"ok"}
    rows = devices({**card, "error": "no kernel image is available"})
    assert rows["cuda:0"].state == "wrong" and "no kernel image" in rows["cuda:0"].value
    assert devices()["device"].state == "ok" and "hours" in devices(megabytes=6940)["device"].advice
    assert "built without CUDA" in devices(driver=True, cuda=None)["device"].advice
    assert "older than CUDA 13.0" in devices(driver=True)["device"].advice
    assert device_rows([{"module": "torch", "seconds": 0, "error": "no"}])[0].state == "wrong"
