"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "bolid").rglob("*.py"), *(ROOT / "bolid_cli").rglob("*.py")])
COMMANDS = {path.stem for path in (ROOT / "bolid_cli").glob("*.py")} - {"__init__", "main", "_render"}
FOUNDATION = {"bolid", "bolid.errors", "bolid.run", "bolid.config"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def our_imports(path: Path, top_level_only: bool = False) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ("bolid", "bolid_cli")}
    return {name for name in found if name.split(".")[0] in ("bolid", "bolid_cli")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_whom(path):
    name, imported = name_of(path), our_imports(path)
    if name.startswith("bolid_cli"):
        return
    assert not {other for other in imported if other.startswith("bolid_cli")}
    if name.startswith("bolid.method"):
        assert all(other.startswith("bolid.method") for other in imported)
    elif name.startswith("bolid.formats"):
        assert all(other in FOUNDATION or other.startswith("bolid.formats") for other in imported)
    elif name.startswith("bolid.backends"):
        allowed = ("bolid.formats", "bolid.method", "bolid.backends", "bolid.families", "bolid.controls")
        assert all(other in FOUNDATION or other.startswith(allowed) for other in imported)
    elif name in FOUNDATION:
        assert all(other in FOUNDATION or other.startswith("bolid.run.") for other in imported)
    elif name.removeprefix("bolid.") in COMMANDS - {"demo", "models"}:
        others = {f"bolid.{command}" for command in COMMANDS} - {name, "bolid.synth"}
        assert not imported & others, "no command module imports another"


@pytest.mark.parametrize("path", [p for p in MODULES if "bolid_cli" not in p.parts], ids=name_of)
def test_nothing_in_the_library_prints_or_exits(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "exit", "quit", "sys.exit", "os._exit", "input"), f"line {node.lineno}"
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert is no check of input"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_pickles_and_no_click(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (pickle|click)\b", text, re.MULTILINE)
    assert not re.search(r"torch\.save\(", text)
    # torch.load only as the restricted reader, which runs nothing.
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text))
    assert "from __future__ import annotations" in text or not text.strip() or path.name == "__init__.py"


def test_defaults_on_the_command_line_are_those_of_the_library():
    """Where a command and its twin share a parameter, they share its default."""
    from bolid_cli.main import COMMANDS as registered

    compared = 0
    for name, command in registered:
        module = importlib.import_module(f"bolid.{name.replace('-', '_')}") if (
            ROOT / "bolid" / f"{name.replace('-', '_')}.py"
        ).exists() else None  # fmt: skip
        twin = getattr(module, name.replace("-", "_"), None)
        if twin is None:
            continue
        theirs = inspect.signature(twin).parameters
        for parameter in inspect.signature(command).parameters.values():
            other = theirs.get(parameter.name)
            if other is None or other.default is inspect.Parameter.empty:
                continue
            if other.default is None or parameter.default is inspect.Parameter.empty:
                continue
            default = parameter.default
            if default is None:  # a list has none in its signature; its help says which it is
                default = next(part.show_default for part in typing.get_type_hints(command, include_extras=True)[
                    parameter.name].__metadata__ if hasattr(part, "show_default"))  # fmt: skip
            assert str(default) == str(other.default), f"{name}: {parameter.name}"
            compared += 1
    assert compared > 5


def test_the_embedded_models_are_small():
    total = sum(path.stat().st_size for path in (ROOT / "bolid" / "tiny").rglob("*") if path.is_file())
    assert total <= 40_000_000
