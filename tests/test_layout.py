"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "bolid").rglob("*.py"), *(ROOT / "bolid_cli").rglob("*.py")])
COMMANDS = {path.stem for path in (ROOT / "bolid_cli").glob("*.py") if not path.stem.startswith("_")} - {"main"}
FOUNDATION = {"bolid", "bolid.errors", "bolid.run", "bolid.config"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def our_imports(path: Path) -> frozenset[str]:
    """Our modules that a file imports, inside functions too; `from package import module` imports the module."""
    modules, found = NAMES, set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules if inside <= modules else {node.module} | inside & modules
    return frozenset(found & modules)


NAMES = {name_of(module) for module in MODULES}

# Who may import whom, from the ground up: a room imports only from its own floor's packages and from those below.
LAYERS = {
    "bolid.method": ("bolid.method",),
    "bolid.formats": ("bolid.formats",),
    "bolid.synth": ("bolid.synth", "bolid.method"),
    "bolid.body": ("bolid.body", "bolid.synth", "bolid.formats", "bolid.method"),
    "bolid.models": ("bolid.models", "bolid.formats", "bolid.backends", "bolid.scales"),
    "bolid.backends": ("bolid.backends", "bolid.formats", "bolid.method", "bolid.models.families", "bolid.scales"),
}


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_whom(path):
    name, imported = name_of(path), our_imports(path)
    if name.startswith("bolid_cli"):
        return
    assert not {other for other in imported if within(other, ["bolid_cli"])}
    if name in FOUNDATION:
        assert all(other in FOUNDATION or other.startswith("bolid.run.") for other in imported)
    for layer, allowed in LAYERS.items():
        if within(name, [layer]):
            below = allowed if layer == "bolid.method" else (*allowed, *FOUNDATION)
            assert all(other in FOUNDATION or within(other, below) for other in imported - {"bolid"}), layer
    command = ".".join(name.split(".")[:2])
    if command.removeprefix("bolid.") in COMMANDS - {"demo", "fieldtest", "models", "synth", "ui"}:
        others = {f"bolid.{other}" for other in COMMANDS - {"models", "synth"}} - {command}
        assert not {other for other in imported if within(other, others)}, "no command imports another"


def test_no_circles():
    """No modules import each other in a ring, imports inside functions counted too."""
    arrows = {name_of(path): our_imports(path) - {name_of(path)} for path in MODULES}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


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


LONGEST_FUNCTION, LONGEST_FILE = 80, 500  # lines
# The parameters of a command are its options: its function, and its twin in bolid/, may be longer for them.
COMMAND_FILES = {f"bolid_cli/{name}.py" for name in COMMANDS} | {f"bolid/{name}/command.py" for name in COMMANDS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_and_files_are_short(path):
    file, lines = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # From the first statement: options of a command with their help are no code.
            first = node.body[0] if file in COMMAND_FILES else node
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_defaults_on_the_command_line_are_those_of_the_library():
    """Where a command and its twin share a parameter, they share its default."""
    from bolid_cli import main

    compared = 0
    for name, command in main.COMMANDS:
        stem = name.replace("-", "_")
        exists = any((ROOT / "bolid" / place).exists() for place in (f"{stem}.py", stem))
        module = importlib.import_module(f"bolid.{stem}") if exists else None
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
    assert total <= 43_000_000
