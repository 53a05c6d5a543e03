from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import bolid
from bolid.errors import BolidError, out_of_memory
from bolid_cli import _console
from bolid_cli.main import COMMANDS, app

run = CliRunner().invoke
ROOT = Path(__file__).parent.parent


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bolid_cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['bolid', '--help']; from bolid_cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('HEAVY', *sorted({'torch', 'numpy', 'PIL', 'diffusers', 'click', 'rich.console'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
        assert result.stdout.rstrip().endswith("HEAVY"), "heavy modules were loaded"
    # 0.2 s on an idle machine; processor time, and with room, so that busy neighbours do not fail the test.
    assert min(seconds) < 0.6


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS] + ["models"])
def test_every_command_has_help(name):
    result = run(app, [name, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.stdout
    listed = run(app, ["--help"]).stdout
    assert name in listed


def test_version_and_no_arguments():
    assert run(app, ["--version"]).stdout.strip() == bolid.__version__
    assert "Commands:" in run(app, []).output


def test_usage_errors_exit_with_2():
    for arguments in (["nonsense"], ["extract", "--nonsense"], ["extract", "--workers", "0"], ["inspect"]):
        result = run(app, arguments)
        assert result.exit_code == 2, arguments


@pytest.mark.slow
def test_our_errors_exit_with_1_and_say_what_to_do(tmp_path):
    result = program("inspect", str(tmp_path / "absent"))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: there is no {tmp_path}/absent\n\nhint: give a shard directory")
    assert "Traceback" not in result.stderr
    assert "Traceback" in program("inspect", str(tmp_path / "absent"), BOLID_DEBUG="1").stderr


def test_errors_are_told(capsys):
    assert _console.show_error(BolidError("what", "do this")) == 1
    assert capsys.readouterr().err == "error: what\n\nhint: do this\n"
    assert _console.show_error(BolidError("what")) == 1
    assert capsys.readouterr().err == "error: what\n"
    assert _console.show_error(KeyboardInterrupt()) == 130
    assert "same command" in capsys.readouterr().err
    assert _console.show_error(ZeroDivisionError("division by zero")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected ZeroDivisionError: division by zero") and "BOLID_DEBUG=1" in shown


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB"),
        (RuntimeError("can't allocate memory: you tried to allocate 4194304000 bytes."), "4000 MiB"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA: tried to allocate 20.00 MiB."), "20.00 MiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)  # fmt: skip
def test_too_little_memory_says_how_much(capsys, error, amount):
    assert _console.show_error(error) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: too little memory") and amount in shown and "lower --batch-size" in shown


def test_allocations_that_fail_are_told():
    """By the libraries themselves: more than any machine has."""
    for allocate in (lambda: bytearray(2**62), lambda: np.empty(2**58), lambda: torch.empty(2**55)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert out_of_memory(caught.value) is not None
    assert out_of_memory(RuntimeError("mat1 and mat2")) is None and out_of_memory(OSError("x")) is None


@pytest.mark.parametrize(
    ("raised", "status"), [(BolidError("what"), 1), (RuntimeError("oh"), 1), (KeyboardInterrupt(), 130)]
)
def test_the_one_catch(monkeypatch, raised, status):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr("bolid.inspect.inspect", fail)
    result = run(app, ["inspect", "x"])
    assert result.exit_code == status and "Traceback" not in result.output


def test_stdout_is_data_and_stderr_is_talk(capsys):
    _console.print_table(("name", "value"), [("a", 1.0), ("long name", 12.5), ("none", None)])
    _console.note("talk")
    _console.note("not this", quiet=True)
    _console.emit_paths([Path("x/y"), "z"])
    _console.emit_json({"path": Path("x"), "sizes": (1, 2)})
    with _console.progress_bar() as progress:
        progress(1, 2, "no terminal, no bar, and no line in the first minute")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == "name        value" and lines[2:5] == [
        "a           1.000",
        "long name  12.500",
        "none            -",
    ]
    assert lines[5:] == ["talk"]
    path_lines, rest = out.split("{", 1)
    assert path_lines.split() == ["x/y", "z"] and json.loads("{" + rest) == {"path": "x", "sizes": [1, 2]}


def test_empty_table(capsys):
    _console.print_table(("name", "value"), [])
    assert capsys.readouterr().err.splitlines()[0] == "name  value"


def test_long_lists_of_rejected_photos_are_cut(capsys):
    _console.print_rejected({"no person found": [f"{n}.jpg" for n in range(25)]}, most=5)
    err = capsys.readouterr().err
    assert "4.jpg" in err and "5.jpg" not in err and "... and 20 more" in err


def test_models():
    result = run(app, ["models", "list"])
    assert result.exit_code == 0 and result.stdout.split() == ["tiny", "sd15", "sdxl", "sdxl-lightning"]
    assert "chosen by: default" in result.stderr
    assert run(app, ["models", "use", "sd15"]).exit_code == 0
    listed = json.loads(run(app, ["models", "list", "--json"]).stdout)
    assert listed["chosen_by"] == "bolid models use"
    assert [family["name"] for family in listed["families"] if family["chosen"]] == ["sd15"]
    result = run(app, ["models", "use", "huge"])
    assert result.exit_code == 1 and "no model family called 'huge'" in result.stderr


def test_the_default_family_is_announced_and_a_chosen_one_is_not(capsys, monkeypatch):
    assert _console.choose_family(None).name == "tiny"
    assert "family: tiny" in capsys.readouterr().err
    _console.choose_family(None, quiet=True)
    _console.choose_family("tiny")
    monkeypatch.setenv("BOLID_FAMILY", "tiny")
    _console.choose_family(None)
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_is_no_error():
    """`bolid ... | head`"""
    command = f"{sys.executable} -c 'from bolid_cli.main import main; main()' models list --json | head -n 1"
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "error" not in shown.stderr


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(_console.time, "monotonic", lambda: now[0])
    with _console.progress_bar() as progress:
        for step in range(1, 301):
            now[0] += 1
            progress(step, 600, "training, loss 0.5\n")
        progress(1, 0, "of unknown length")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{60 * n}/600 training, loss 0.5, {10 - n} min left" for n in range(1, 6)]
    with _console.progress_bar(quiet=True) as progress:
        now[0] += 100
        progress(1, 2, "not this")
    assert capsys.readouterr().err == ""
    assert [_console.duration(s) for s in (5, 89, 90, 5000, 40000)] == ["5 s", "89 s", "2 min", "83 min", "11 h 7 min"]


def test_no_color_is_respected():
    """On a terminal of its own: script(1) is not everywhere, a pseudo-terminal of Python is."""
    code = "from bolid_cli._console import progress_bar\nwith progress_bar() as p:\n for n in range(3): p(n, 3, 'x')"
    for environment, colours in (({"NO_COLOR": "1"}, False), ({}, True)):
        leader, follower = os.openpty()
        clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        subprocess.run(
            [sys.executable, "-c", code],
            stderr=follower,
            env={**clean, "TERM": "xterm-256color", **environment},
            check=True,
        )
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):
            while block := os.read(leader, 65536):
                shown += block
        os.close(leader)
        assert bool(re.search(rb"\x1b\[[0-9;]*3[0-9;]*m", shown)) == colours


def shell(command: str, **options) -> subprocess.CompletedProcess[str]:
    text = command.replace("bolid ", f"{sys.executable} -m bolid_cli.main ")
    return subprocess.run(
        ["sh", "-c", text], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
    )


@pytest.mark.slow
def test_closed_streams(tmp_path):
    closed = shell(f"bolid inspect {tmp_path}/absent 2>&-")
    assert (closed.returncode, closed.stdout, closed.stderr) == (1, "", ""), "the message is no data"
    closed = shell(f"bolid inspect {tmp_path}/absent <&-")
    assert closed.returncode == 1 and closed.stderr.startswith("error: there is no")
    assert shell("bolid models list --quiet >&-").returncode == 0


@pytest.mark.slow
def test_a_full_disk_behind_standard_output():
    for command in ("bolid models list --json", "bolid models list --quiet", "bolid --version", "bolid --help"):
        full = shell(f"{command} > /dev/full")
        assert full.returncode == 1 and full.stderr.startswith("error: cannot write to standard output: No space left")
        assert "Exception ignored" not in full.stderr


def test_a_working_directory_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    gone = shell("rmdir ../gone && bolid models list", cwd=tmp_path / "gone")
    assert gone.returncode == 1
    assert gone.stderr == "error: the working directory does not exist any more\n\nhint: go to another one: cd\n"


def test_names_that_are_not_utf8_are_printed_as_they_are(tmp_path):
    code = "from bolid_cli._streams import *; import os; prepare_terminal(); emit(os.fsdecode(b'a\\xff'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"a\xff\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_end_a_command_with_a_message(number, status):
    code = (
        "import signal, sys, time; sys.argv = ['bolid', 'inspect', 'x']\nimport bolid.inspect\n"
        # Under nohup, or in a shell's background, the tests' own processes ignore some of these.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*a, **k): print('ready', flush=True); time.sleep(60)\n"
        "bolid.inspect.inspect = wait\nfrom bolid_cli.main import main\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert process.returncode == status and err == f"{what}; the same command goes on where it stopped\n"


def test_shell_completion_names_commands_options_and_choices():
    for words, expected in (("bolid trai", "train-vae"), ("bolid extract --wor", "--workers")):
        environment = {
            "_BOLID_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = program(**environment)
        assert expected in done.stdout.split(), done.stderr
