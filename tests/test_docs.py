"""docs/commands.md is what the commands' own help says. `python tests/test_docs.py` writes it anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bolid_cli.main import COMMANDS, app

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "commands.md"


def reference() -> str:
    """The help of every command, in the order of the chain."""
    names = [(name,) for name, _ in COMMANDS]
    names += [("models", word) for word in ("list", "pull", "verify", "convert", "use")]
    pages = ["# Commands\n\nWritten by `python tests/test_docs.py` from the commands' own `--help`.\n"]
    for name in ((), *names):
        shown = CliRunner().invoke(app, [*name, "--help"], prog_name="bolid", terminal_width=100)
        assert shown.exit_code == 0, name
        pages.append(f"## {' '.join(('bolid', *name))}\n\n```text\n{shown.stdout.strip()}\n```\n")
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
    shown = CliRunner().invoke(app, [*name, "--help"], prog_name="bolid", terminal_width=100)
    assert shown.exit_code == 0
    for word in words:
        if word.startswith("-") and word != "-":
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown.stdout), f"{word} is no option of {' '.join(name)}"


if __name__ == "__main__":
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(reference(), encoding="utf-8")
