"""The documents say what is so: options, links, names of files and functions, figures, lengths.

`python tests/test_docs.py` writes docs/reference/commands.md anew.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import textwrap
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bolid_cli._options import settings_of
from bolid_cli._settings import toml_lines
from bolid_cli.main import COMMANDS, app

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference" / "commands.md"
GENERATED = re.compile(r"^(Made|Written) by `", re.MULTILINE)  # by a script, whose matter its lines are
DOCUMENTS = sorted(
    path
    for place in ("*.md", "docs/**/*.md", "examples/**/*.md", "bolid/tiny/**/*.md", "bolid/masks/*.md")
    for path in ROOT.glob(place)
    if not GENERATED.search(path.read_text(encoding="utf-8"))
)
WORDS = 700  # of README
LINE = 120


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


# ----------------------------------------------------------------------------------------------------------------
# Commands and their options

HEAD = """# Commands

Written by `python tests/test_docs.py` from the commands' own `--help`.

A command with `--config` takes its settings from a TOML file too. `bolid train-vae --print-config > vae.toml` writes
all settings in force, `bolid train-vae --config vae.toml` uses them. A key is the option's name with underscores.
Default, `--preset`, file, environment variable, command line: the later one wins.
"""


def reference() -> str:
    """The help of every command, in the order of the chain."""
    names: list[tuple[str, ...]] = [(name,) for name, _ in COMMANDS]
    names += [("models", word) for word in ("list", "pull", "verify", "convert", "use")]
    functions = dict(COMMANDS)
    pages = [HEAD]
    for name in ((), *names):
        shown = CliRunner().invoke(app, [*name, "--help"], prog_name="bolid", terminal_width=100)
        assert shown.exit_code == 0, name
        pages.append(f"## {' '.join(('bolid', *name))}\n\n```text\n{shown.stdout.strip()}\n```\n")
        hidden = [setting for setting in settings_of(functions.get(" ".join(name))).values() if setting.advanced]
        if hidden:
            lines = "\n".join(toml_lines(hidden)).strip()
            pages.append(f"Settings of the config file that `--help` does not list:\n\n```toml\n{lines}\n```\n")
    return "\n".join(pages)


def test_reference_is_up_to_date():
    assert text_of(REFERENCE) == reference(), "run: python tests/test_docs.py"


def shell_lines(text: str) -> Iterator[str]:
    """The indented lines of a document, those that end with a backslash joined with the next."""
    yield from re.findall(r"^ {4}(?:\$ )?(\S.*)$", re.sub(r"\\\n\s*", "", text), re.MULTILINE)


def documented_commands() -> list[tuple[str, list[str]]]:
    """(document, the words after `bolid`) of every command line in the documents."""
    found = []
    for document in DOCUMENTS:
        for line in shell_lines(text_of(document)):
            for part in re.split(r"&&|\|", line):
                if not re.search(r"\bbolid(_cli\.main)?\b", part):
                    continue
                words = shlex.split(part.partition(" > ")[0], comments=True)
                starts = [i for i, word in enumerate(words) if word == "bolid_cli.main" or word.endswith("bin/bolid")]
                if words[:1] == ["bolid"]:
                    starts = [0]
                elif "srun" in words and "bolid" in words:
                    starts = [words.index("bolid")]
                if starts and not words[starts[0]].startswith("-"):
                    found.append((named(document), words[starts[0] + 1 :]))
    return found


def parse(group: Any, words: list[str], parent: Any = None) -> None:
    """Parse a command line as the program does, without running it. A usage error is raised."""
    context = group.make_context(group.name, list(words), parent=parent)
    name, command, rest = group.resolve_command(context, list(words))
    if hasattr(command, "resolve_command"):
        parse(command, rest, context)
    else:
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    ("document", "words"), [pytest.param(*found, id=" ".join(found[1])) for found in documented_commands()]
)
def test_documented_commands_can_be_typed(document, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        config = Path(words[words.index("--config") + 1])
        config.parent.mkdir(parents=True, exist_ok=True)
        config.touch()
    try:
        parse(typer.main.get_command(app), words)
    except Exception as error:
        pytest.fail(f"{document}: {getattr(error, 'message', error)}")


def test_documented_commands_are_found():
    """The readers of the documents above do read them."""
    names = {words[0] for _, words in documented_commands()}
    assert names >= {"demo", "extract", "shard", "train-vae", "profile", "train-adapter", "generate", "evaluate"}


def all_options(command: Any) -> set[str]:
    """Every option of a command and of the commands below it."""
    found = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return found.union(*(all_options(below) for below in getattr(command, "commands", {}).values()))


OTHERS = {"--help", "--threshold", "--use_fsdp"}  # the parser's own, and those of other programs
HISTORY = {"CHANGELOG.md", "CONTRIBUTING.md", "LEARNT.md"}  # name what was there once, or options of scripts


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in HISTORY], ids=named)
def test_options_named_in_documents_exist(document):
    known = all_options(typer.main.get_command(app)) | OTHERS
    if document.is_relative_to(ROOT / "examples"):  # which speak of the scripts beside them
        scripts = "".join(map(text_of, sorted(document.parent.glob("*.py"))))
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', scripts))
    for span in re.findall(r"(?<!`)`([^`\n]+)`", text_of(document)):
        if span.startswith(("yolo ", "pip ")):
            continue
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span):
            assert option in known, f"`{span}`"


# ----------------------------------------------------------------------------------------------------------------
# Links, names, figures


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(text_of(path)), f"{target}: no such heading"


@each_document
def test_files_named_in_documents_exist(document):
    text = text_of(document)
    for name in re.findall(r"`((?:bolid|bolid_cli|tests|examples|docs)/[\w./-]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    pairs = re.findall(r"`([\w/]+\.py)`:\s`(\w+)`", text)
    pairs += [(file, name) for name, file in re.findall(r"`(\w+)` in\s`([\w/]+\.py)`", text)]
    for file, name in pairs:
        code = text_of(ROOT / file)
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", code, re.MULTILINE), f"{file} has no {name}"


def test_documents_named_in_the_code_exist():
    places = [*ROOT.glob("bolid/**/*.py"), *ROOT.glob("bolid/**/*.toml"), *ROOT.glob("bolid_cli/**/*.py")]
    places += [*ROOT.glob("examples/**/*.py"), *ROOT.glob("examples/**/*.sh")]
    for place in places:
        for name in re.findall(r"\b(?:docs|examples)/[\w./-]+\.md\b", text_of(place)):
            assert (ROOT / name).exists(), f"{named(place)} names {name}"


@each_document
def test_python_in_documents_can_be_read(document):
    for block in python_blocks(document):
        ast.parse(block)


def python_blocks(document: Path) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text_of(document), re.DOTALL)]


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/reference/python.md"])
def test_python_in_documents_runs(document, rendered_people, tmp_path, monkeypatch, capsys):
    """Ten lines, from photos to pictures."""
    code = python_blocks(ROOT / document)[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    person = sorted(path for path in rendered_people.iterdir() if path.is_dir())[0]
    shutil.copytree(person, tmp_path / "bolid-demo" / "photos" / "p200000")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {})
    pictures = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert pictures and all(Path(picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"^\| `(\w+)", text_of(ROOT / "docs/reference/python.md"), re.MULTILINE)))
)
def test_functions_named_in_the_reference_of_python_exist(name):
    assert callable(getattr(importlib.import_module("bolid.api"), name))


def test_figures_in_readme_are_those_that_were_measured():
    measured = json.loads(text_of(ROOT / "docs" / "results" / "experiment.json"))
    cells = {
        line.split(" | ")[0].lstrip("| "): [float(n) for n in re.findall(r"-?\d\.\d\d", line)]
        for line in text_of(ROOT / "README.md").splitlines()
        if line.startswith("| ")
    }
    measured["figures"] |= json.loads(text_of(ROOT / "docs" / "results" / "seeds.json"))["figures"]
    for row, method in (
        ("base, no photo", "base"),
        ("base, the *true* build in words", "build-words"),
        ("IP-Adapter, one photo", "ip-adapter, seed 0"),
        ("BoLID, eight photos, trained as long", "bolid-8-equal, seed 0"),
        ("**BoLID, eight photos, as it ships**", "bolid-8"),
        ("the same with `--pose`", "bolid-8-both"),
        ("other photos of the person", "real"),
    ):
        found = measured["figures"][method]
        wanted = [*found["body by judge, mean r"][:3], *found["likeness by an outsider"][:3]]
        assert cells[row] == pytest.approx(wanted, abs=0.0051), row
    words = measured["differences"]["bolid-8"]["build-words"]["body by judge, mean r"][0]
    sentence = re.search(r"over the words: (\S+) \((\S+) to (\S+)\)", text_of(ROOT / "README.md").replace("\n", " "))
    assert sentence and [float(n) for n in sentence.groups()] == pytest.approx(words, abs=0.0051)


def test_diagram_is_whole():
    picture = xml.etree.ElementTree.parse(ROOT / "docs" / "how-it-works.svg").getroot()
    words = [" ".join(part.itertext()) for part in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"photos", "body encoder", "profile", "body branch", "face branch", "text"} <= set(words)


# ----------------------------------------------------------------------------------------------------------------
# Lengths


def test_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) <= WORDS


def test_readme_has_the_line_that_runs_the_tests():
    line = r"^ {4}\.venv/bin/pip install .*\[test\].* && \.venv/bin/pytest$"
    assert re.search(line, text_of(ROOT / "README.md"), re.MULTILINE)


@each_document
def test_lines_are_short(document):
    prose = text_of(document)
    if document.is_relative_to(ROOT / "bolid"):
        prose = prose.partition("\n## Training")[0]  # what follows in a model card is written by its script
    for number, line in enumerate(prose.splitlines(), 1):
        assert len(line) <= LINE or line.startswith("|"), f"line {number} has {len(line)} characters"


@each_document
def test_no_package_registry_is_named(document):
    assert not re.search(r"pypi\.|index-url|/simple\b", text_of(document))


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
