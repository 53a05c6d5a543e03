"""Takes out of texts what would say whose machine this is: paths, the user's name, the host's."""

from __future__ import annotations

import getpass
import os
import platform
import re
import site
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A path that begins at the root and is none of an address. Only its last name is kept.
_ABSOLUTE = re.compile(r"(?<![\w./:~>\\-])(?:/|[A-Za-z]:[\\/])(?:[^\s/\\:'\"<>|,;()]+[/\\])+([^\s/\\:'\"<>|,;()]*)")


class Scrubber:
    """``scrubber(text)``: the text with known folders by a short name, other absolute paths by their last name.

    ``folders``: name => folder, of this run. The rest (home, temporary folder, Python, this package) is known.
    """

    def __init__(self, folders: Mapping[str, str | os.PathLike[str]]) -> None:
        package = Path(__file__).parents[1]
        known: dict[str, str] = {}
        for name, folder in folders.items():
            _add(known, folder, name)
        _add(known, package, "bolid")
        _add(known, package.parent / "bolid_cli", "bolid_cli")
        for folder in [*site.getsitepackages(), site.getusersitepackages()]:
            _add(known, folder, "site-packages")
        _add(known, sys.prefix, "python")
        _add(known, Path.cwd(), ".")
        _add(known, tempfile.gettempdir(), "tmp")
        _add(known, Path.home(), "~")
        pairs = sorted(known.items(), key=lambda pair: len(pair[0]), reverse=True)
        # A folder ends where a name ends: /home/me is no part of /home/meg.
        self._folders = [(re.compile(rf"{re.escape(path)}(?![\w-])"), name) for path, name in pairs]
        self._names = []
        for name, word in ((_user(), "USER"), (platform.node(), "HOST")):
            if len(name) > 1:
                self._names.append((re.compile(rf"(?<=[/\\@]){re.escape(name)}(?=[/\\:\s'\"]|$)", re.I), word))

    def __call__(self, text: str) -> str:
        """The text without names of folders, of the user and of the machine."""
        for pattern, name in self._folders:
            text = pattern.sub(name.replace("\\", r"\\"), text)
        text = _ABSOLUTE.sub(lambda match: f".../{match[1]}", text)
        for pattern, word in self._names:
            text = pattern.sub(word, text)
        return text

    def all_of(self, value: Any) -> Any:
        """The same for every text inside dicts and lists."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self.all_of(key): self.all_of(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.all_of(entry) for entry in value]
        return value


def _add(known: dict[str, str], folder: str | os.PathLike[str], name: str) -> None:
    """The folder as it is written, as it is, and as Python's repr has it (on Windows)."""
    for path in (str(folder), os.path.abspath(folder), os.path.realpath(folder)):
        if len(path) > 3:  # not "/" or "C:\"
            known.setdefault(path, name)
            known.setdefault(path.replace("\\", "\\\\"), name)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
