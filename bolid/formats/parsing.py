"""JSON and TOML from files that anybody may have written: size and depth are limited before parsing."""

from __future__ import annotations

import json
import tomllib
from typing import Any

MAX_JSON = 256 * 2**20  # bytes; an index of a million photos has some 100 MB
MAX_TOML = 2**20
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


def parse_toml(text: str) -> dict[str, Any]:
    """The table in `text`. Raises ValueError for what is no TOML, too long, or nested too deeply.

    tomllib's time grows with the square of a dotted key's parts, so these are counted first.
    """
    if len(text) > MAX_TOML:
        raise ValueError(f"it has more than {MAX_TOML:,} characters")
    for number, line in enumerate(text.splitlines(), 1):
        key = line if line.lstrip().startswith("[") else line.partition("=")[0]
        if key.count(".") > MAX_DEPTH:
            raise ValueError(f"line {number} is nested too deeply")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
