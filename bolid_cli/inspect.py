"""``bolid inspect``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bolid_cli._console import JsonOption, emit_json
from bolid_cli._streams import emit


def inspect(
    path: Annotated[
        str, typer.Argument(help="Profile, adapter, body encoder, shard directory (or its URL), or generated picture.")
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and compare the checksums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a file that BoLID has written, and the run that made it."""
    import bolid.inspect

    description = bolid.inspect.inspect(path, verify=verify)
    if as_json:
        emit_json(description)
    else:
        _print(description)


def _print(value: Any, indent: int = 0) -> None:
    """Nested dicts as indented `name: value` lines. This is the data the user asked for, so it goes to stdout."""
    for name, entry in value.items():
        start = f"{'  ' * indent}{name}:"
        if isinstance(entry, dict) and {"dtype", "shape"} == entry.keys():
            emit(f"{start} {entry['dtype']} {entry['shape']}")
        elif isinstance(entry, dict) and entry:
            emit(start)
            _print(entry, indent + 1)
        elif isinstance(entry, list) and entry and all(isinstance(item, dict) for item in entry):
            emit(start)
            for item in entry:
                _print(item, indent + 1)
        else:
            emit(f"{start} {'-' if entry in (None, {}) else entry}")
