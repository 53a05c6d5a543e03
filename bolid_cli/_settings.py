"""The settings of a command as TOML: what --config reads and --print-config writes."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bolid.errors import BolidError
from bolid.formats.parsing import read_toml

COMMON = "Common options"  # the heading of what most commands have
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: 'text in quotes, like "this"'}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One option of a command as a setting of its config file."""

    name: str  # the key in the file: the option's name, with underscores
    parameter: str  # of the command's function
    type: Any
    default: Any
    help: str
    group: str = ""  # the heading in --help; "" for the first one
    advanced: bool = False  # hidden from --help
    choices: tuple[Any, ...] = ()


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal or an Enum; () for any other type."""
    kind = without_none(kind)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return tuple(member.value for member in kind)
    return ()


def without_none(kind: Any) -> Any:
    """``X`` for the annotation ``X | None``."""
    if get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def listed(choices: Iterable[Any]) -> str:
    """``a, b or c``."""
    words = [f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


# ------------------------------------------------------------------------------------------------------------ reading


def read_settings(file: Path, settings: Mapping[str, Setting], command: str) -> dict[str, Any]:
    """Parameter -> value, for every setting in a TOML file.

    Raises BolidError for a file that is no TOML, a key that ``command`` does not have, and a value of another type.
    """
    values: dict[str, Any] = {}
    for key, value in read_toml(file, "config file", f"{command} --print-config writes one").items():
        name = key.replace("-", "_")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            raise BolidError(
                f"{file}: {key!r} is no setting of {command}",
                f"perhaps you mean {near[0]}" if near else f"{command} --print-config writes all there are",
            )
        setting = settings[name]
        if setting.parameter in values:
            raise BolidError(f"{file}: {name} is given twice", "leave one of them out")
        values[setting.parameter] = checked(value, setting, f"{file}: {key}")
    return values


def checked(value: Any, setting: Setting, where: str) -> Any:
    """``value`` if it has the setting's type. Raises a BolidError that begins with ``where``."""
    kind = without_none(setting.type)
    if get_origin(kind) is list:
        one = dataclasses.replace(setting, type=get_args(kind)[0])
        if not isinstance(value, list):
            raise BolidError(f"{where} is {_shown(value)}", 'write a list, like ["this", "that"]')
        return [checked(entry, one, where) for entry in value]
    if setting.choices:
        if isinstance(value, bool | list | dict) or value not in setting.choices:
            raise BolidError(f"{where} is {_shown(value)}", f"choose {listed(setting.choices)}")
        return value
    plain = kind if kind in (int, float, bool) else str
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise BolidError(f"{where} is {_shown(value)}", f"write {_TYPE_NAMES[plain]}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------------------ writing


def toml_lines(settings: Iterable[Setting], values: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The settings as TOML, under headings, each below its help text.

    ``values``: parameter -> value; None for the defaults. A setting without a value is a comment: TOML has no null.
    """
    before = None
    for setting in _ordered(settings):
        heading = (setting.group or "Options") + (", not listed in --help" if setting.advanced else "")
        if heading != before:
            yield f"\n# ---- {heading} {'-' * (90 - len(heading))}"
            before = heading
        yield ""
        yield from (f"# {line}" for line in textwrap.wrap(_explained(setting), 100))
        value = setting.default if values is None else values[setting.parameter]
        if value is None or value == () or value == []:
            yield f"# {setting.name} ="
        else:
            yield f"{setting.name} = {_toml(value)}"


def _ordered(settings: Iterable[Setting]) -> list[Setting]:
    """By heading, as --help has them: those without one first, the common ones last; then those it does not list."""
    settings = list(settings)
    groups = [""] + [setting.group for setting in settings if setting.group not in ("", COMMON)] + [COMMON]
    return sorted(settings, key=lambda setting: (setting.advanced, groups.index(setting.group)))


def _explained(setting: Setting) -> str:
    text = " ".join(setting.help.split())
    if setting.choices and not all(str(choice) in text for choice in setting.choices):
        text += f" One of {listed(setting.choices)}."
    return text


def _toml(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BolidError(f"{text!r} is not valid UTF-8, so TOML cannot hold it", "give another name") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
