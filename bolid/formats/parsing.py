"""Text that anybody may have written: NAME=VALUE, and JSON and TOML, whose size and depth are limited first."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from typing import Any

from bolid.errors import BolidError

MAX_JSON = 256 * 2**20  # bytes; an index of a million photos has some 100 MB
MAX_TOML = 256 * 2**10  # bytes
MAX_DEPTH = 64  # parts of a dotted TOML key


def parse_json(text: str | bytes, limit: int = MAX_JSON) -> Any:
    """The value in `text`. Raises ValueError for what is no JSON, too long, nested too deeply, or has half a character
    (a lone surrogate), which nothing can write.
    """
    if len(text) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    try:
        value = json.loads(text)
        escaped = b"\\u" in text if isinstance(text, bytes) else "\\u" in text
        if escaped:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it has half a character (a lone surrogate)") from None
    return value


def read_toml(path: str | os.PathLike[str], what: str, hint: str) -> dict[str, Any]:
    """What is in a TOML file. `what`: the file's kind; `hint`: for a file that is missing.

    Raises BolidError for a file that cannot be read, is too large or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOML + 1)
    except OSError as error:
        raise BolidError(f"cannot read the {what} {path}: {error.strerror}", hint) from error
    if len(data) > MAX_TOML:
        raise BolidError(f"the {what} {path} is larger than {MAX_TOML >> 10} KiB", "give another file")
    try:
        return parse_toml(data)
    except ValueError as error:
        raise BolidError(f"the {what} {path} is not valid TOML: {error}", "correct that line") from error


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table in `data`. Raises ValueError for what is no TOML, too long, or nested too deeply.

    tomllib's time grows with the square of a dotted key's parts, so these are counted first.
    """
    if len(data) > MAX_TOML:
        raise ValueError(f"it has more than {MAX_TOML:,} bytes")
    text = data.decode()
    for number, line in enumerate(text.splitlines(), 1):
        key = line if line.lstrip().startswith("[") else line.partition("=")[0]
        if key.count(".") > MAX_DEPTH:
            raise ValueError(f"line {number} is nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_assignments(texts: Iterable[str], what: str, example: str) -> dict[str, str]:
    """["waist=-4cm"] -> {"waist": "-4cm"}. `what` such a text is called, like "--set", and an `example` are for errors.

    Raises BolidError for a text without = and for a name that is given twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise BolidError(f"{what} {text.strip()} sets nothing", f"write NAME=VALUE, like {example}")
        if name in values:
            raise BolidError(f"{what} {name} is given twice", "leave one of them out")
        values[name] = value
    return values
