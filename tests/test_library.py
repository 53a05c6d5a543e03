"""BoLID as a library: what `import bolid` does not do, and the example of bolid/api.py."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

import bolid
from bolid import api


def fresh(code: str, **environment: str) -> str:
    """What a new Python prints that runs `code`, without any thread policy set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "YOLO_"))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_bolid_changes_no_environment_variable_and_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'ultralytics', 'typer', 'rich'}"
    for module in ("bolid", "bolid.api", "bolid.models.families"):
        code = f"import os; before = dict(os.environ); import {module}, sys\n"
        code += f"print(dict(os.environ) == before, sorted({heavy} & set(sys.modules)))"
        assert fresh(code).split() == ["True", "[]"], module


def test_the_thread_policy_is_set_before_the_library_loads_torch():
    code = "import os, sys; from bolid import api; api.inspect\n"  # which loads no torch yet
    code += "print(os.environ['OMP_WAIT_POLICY'], os.environ['YOLO_AUTOINSTALL'], 'torch' in sys.modules)"
    assert fresh(code).split() == ["PASSIVE", "false", "False"]
    assert fresh(code, OMP_WAIT_POLICY="ACTIVE").split() == ["ACTIVE", "false", "False"]


def test_the_program_sets_it_too():
    code = "import os, sys; sys.argv = ['bolid', '--version']; from bolid_cli.main import main\n"
    code += "try: main()\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    assert fresh(code).split() == [bolid.__version__, "PASSIVE", "False"]


def test_every_public_function_is_there_and_says_what_it_does():
    for name in api.__all__:
        found = getattr(api, name)
        assert inspect.getdoc(found) and (inspect.isclass(found) or inspect.isfunction(found)), name
    assert bolid.api is api and set(api.__all__) == set(dir(api))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = api.nothing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bolid.nothing


@pytest.mark.slow
def test_the_example_runs(rendered_people, tmp_path, monkeypatch, capsys):
    lines = re.findall(r"^ {4}.*$|^$", inspect.getsource(api).split('"""')[1], re.MULTILINE)
    example = textwrap.dedent("\n".join(lines)).strip()
    assert example.startswith("from pathlib") and len(example.splitlines()) <= 12
    shutil.copytree(
        sorted(path for path in rendered_people.iterdir() if path.is_dir())[0], tmp_path / "photos" / "anna"
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("3 photos, uncertainty 0.")
    assert (tmp_path / "anna.safetensors").is_file()
    assert [(tmp_path / line).is_file() for line in printed.splitlines()[1:]] == [True, True]
