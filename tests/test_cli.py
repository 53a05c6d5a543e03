from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bolid
from bolid.errors import BolidError
from bolid_cli import _console as _render
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


def test_our_errors_exit_with_1_and_say_what_to_do(tmp_path):
    result = program("inspect", str(tmp_path / "absent"))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: there is no {tmp_path}/absent\n\nhint: give a shard directory")
    assert "Traceback" not in result.stderr
    assert "Traceback" in program("inspect", str(tmp_path / "absent"), BOLID_DEBUG="1").stderr


def test_errors_are_told(capsys):
    assert _render.show_error(BolidError("what", "do this")) == 1
    assert capsys.readouterr().err == "error: what\n\nhint: do this\n"
    assert _render.show_error(BolidError("what")) == 1
    assert capsys.readouterr().err == "error: what\n"
    assert _render.show_error(KeyboardInterrupt()) == 130
    assert "same command" in capsys.readouterr().err
    assert _render.show_error(ZeroDivisionError("division by zero")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected ZeroDivisionError: division by zero") and "BOLID_DEBUG=1" in shown


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
    _render.print_table(("name", "value"), [("a", 1.0), ("long name", 12.5), ("none", None)])
    _render.note("talk")
    _render.note("not this", quiet=True)
    _render.emit_paths([Path("x/y"), "z"])
    _render.emit_json({"path": Path("x"), "sizes": (1, 2)})
    with _render.progress_bar() as progress:
        progress(1, 2, "no terminal, no bar")
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
    _render.print_table(("name", "value"), [])
    assert capsys.readouterr().err.splitlines()[0] == "name  value"


def test_long_lists_of_rejected_photos_are_cut(capsys):
    _render.print_rejected({"no person found": [f"{n}.jpg" for n in range(25)]}, most=5)
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
    assert _render.choose_family(None).name == "tiny"
    assert "family: tiny" in capsys.readouterr().err
    _render.choose_family(None, quiet=True)
    _render.choose_family("tiny")
    monkeypatch.setenv("BOLID_FAMILY", "tiny")
    _render.choose_family(None)
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_is_no_error():
    """`bolid ... | head`"""
    command = f"{sys.executable} -c 'from bolid_cli.main import main; main()' models list --json | head -n 1"
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "error" not in shown.stderr
