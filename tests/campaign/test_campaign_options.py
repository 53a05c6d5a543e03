"""Random command lines: each is done or refused with a message, none is an unexpected error, none hangs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from gallery import jpeg
from mutations import SCALE, SLOW
from typer.testing import CliRunner

from bolid_cli._options import settings_of
from bolid_cli._settings import without_none
from bolid_cli.main import COMMANDS, app

LINES = max(1, round(75 * SCALE))
# These would work for minutes, or ask the machine: synth and demo render, doctor and fieldtest run programs.
LONG = {"synth", "demo", "doctor", "fieldtest"}
SMALL = {"bench make": ["--max-people", "1"]}  # before the random options: these win
ODD = (
    "", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "9" * 20, "9" * 5000, "x" * 300, "ftp://x", "s3:/x",
    "\udcff", "\u202e", "a\nb", "'", "[", "{}", "null", "auto", "cpu", "cuda:99", "meta", "tiny.toml", "absent.toml",
    "/dev/null", ".", "..", "/", "photos", "photos/a.jpg", "junk.safetensors", "junk.csv", "absent", "5@0..0.5",
    "2@1..0", "1x1", "512x512", "0x0", "legs=+1", "waist=-4cm", "=", "=1", "me,you", "1:3", "3:1", "none", "blip2",
)  # fmt: skip
SANE = {int: (1, 2, 3), float: (0.5, 1.0), str: ("a man", "me"), Path: ("out", "photos", "report.html")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of every kind and none of use; a family whose weights are missing."""
    monkeypatch.setenv("BOLID_FAMILY", "sd15")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0, size=(40, 32)))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.csv").write_text("person,url\nx,file:///etc/passwd\n")
    (tmp_path / "tiny.toml").write_text("image_size = [64, 48]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(rng: np.random.Generator) -> list[str]:
    """A command with some of its options and arguments, most of the values odd."""
    commands = [(name, command) for name, command in COMMANDS if name.split()[0] not in LONG]
    name, command = commands[int(rng.integers(len(commands)))]
    words = [*name.split(), *SMALL.get(name, [])]
    settings = list(settings_of(command).values())
    for setting in rng.permutation(np.array(settings, dtype=object))[: int(rng.integers(4))] if settings else ():
        option = "-n" if setting.name == "n" else f"--{setting.name.replace('_', '-')}"
        value = ODD[int(rng.integers(len(ODD)))]
        if rng.random() < 0.5:
            sane = setting.choices or SANE.get(without_none(setting.type), ("photos",))
            value = str(sane[int(rng.integers(len(sane)))])
        words += [option] if without_none(setting.type) is bool else [option, value]
    values = ODD if rng.random() < 0.5 else ("photos", "junk.safetensors", "tiny.toml", "photos/a.jpg")
    words += [values[int(rng.integers(len(values)))] for _ in range(int(rng.integers(3)))]
    return [word for word in words if "\0" not in word]


@pytest.mark.slow
def test_random_command_lines(folder):
    failures, ends = [], {0: 0, 1: 0, 2: 0}
    before = sorted(path.name for path in Path("/").iterdir())
    for number in range(LINES):
        words = line(np.random.default_rng([1, number]))
        started = time.process_time()
        result = CliRunner().invoke(app, words, prog_name="bolid")
        output = result.stderr if result.stderr_bytes is not None else result.output
        if result.exit_code not in ends or "fault in bolid" in output or "Traceback" in output:
            failures.append(f"{number}: {words}: exit {result.exit_code}: {output[-300:]}")
        else:
            ends[result.exit_code] += 1
        if result.exit_code and "hint: " not in output and "usage" not in output.lower():
            failures.append(f"{number}: {words}: no hint: {output[-300:]}")
        if time.process_time() - started > 3 * SLOW:
            failures.append(f"{number}: {words}: took more than {3 * SLOW:g} s")
        for name in ("generated", "shards", "train", "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)
    done, refused, usage = ends.values()
    print(f"campaign: command lines: {LINES} tried, {done} done, {refused + usage} refused, {len(failures)} failed")
    assert sorted(path.name for path in Path("/").iterdir()) == before
    assert not failures, "\n".join(failures[:20])
