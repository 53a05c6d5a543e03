"""docs/commands.md is what the commands' own help says. `python tests/test_docs.py` writes it anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bolid_cli._options import presets_of, settings_of
from bolid_cli._settings import toml_lines
from bolid_cli.main import COMMANDS, app

ROOT = Path(__file__).parent.parent
_HEAD = """# Commands

Written by `python tests/test_docs.py` from the commands' own `--help`.

A command with `--config` takes its settings from a TOML file too. `bolid train-vae --print-config > vae.toml` writes
all settings in force, `bolid train-vae --config vae.toml` uses them. A key is the option's name with underscores.
Default, `--preset`, file, environment variable, command line: the later one wins.
"""
REFERENCE = ROOT / "docs" / "commands.md"


def reference() -> str:
    """The help of every command, in the order of the chain."""
    names = [(name,) for name, _ in COMMANDS]
    names += [("models", word) for word in ("list", "pull", "verify", "convert", "use")]
    functions = dict(COMMANDS)
    pages = [_HEAD]
    for name in ((), *names):
        shown = CliRunner().invoke(app, [*name, "--help"], prog_name="bolid", terminal_width=100)
        assert shown.exit_code == 0, name
        title = " ".join(("bolid", *name))
        pages.append(f"## {title}\n\n```text\n{shown.stdout.strip()}\n```\n")
        for preset, values in presets_of(functions.get(" ".join(name))).items():
            pages.append(f"`--preset {preset}`: {values['description']}\n")
        hidden = [setting for setting in settings_of(functions.get(" ".join(name))).values() if setting.advanced]
        if hidden:
            lines = "\n".join(toml_lines(hidden)).strip()
            pages.append(f"Settings of the config file that `--help` does not list:\n\n```toml\n{lines}\n```\n")
    return "\n".join(pages)


def test_reference_is_up_to_date():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), "run: python tests/test_docs.py"


def test_commands_named_in_the_documents_exist():
    known = {name for name, _ in COMMANDS} | {"models"}
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if document.exists():
            text = document.read_text(encoding="utf-8")
            used = set(re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?bolid ([a-z][a-z-]*)", text, re.MULTILINE))
            assert used <= known, f"{document.name} names {sorted(used - known)}"


def documented_commands() -> list[list[str]]:
    """The words of every indented `bolid ...` line of the documents, comments and shell joints taken off."""
    lines = []
    for name in ("README.md", "CONTRIBUTING.md", "docs/controls.md", "docs/comfyui.md", "docs/families.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for line in re.findall(r"^ {4}(.*)$", text, re.MULTILINE):
            for part in re.split(r"&&|\|", line.split("  #")[0]):
                words = shlex.split(part)
                if words and words[0].rpartition("/")[2] == "bolid":
                    lines.append(words[1:])
    return lines


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_options_exist(words):
    two = words[0] == "models" or " ".join(words[:2]) in {name for name, _ in COMMANDS}
    name = words[:2] if two else words[:1]
    command = typer.main.get_command(app)
    for word in [" ".join(name)] if words[0] != "models" else name:
        command = command.commands[word]
    options = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in options | {"-h", "--help"}, f"{word} is no option of {' '.join(name)}"


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(reference(), encoding="utf-8")
