"""One command on a terminal: headings in its help, checks that all options share, and hints for mistakes in typing."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from bolid.errors import BolidError
from bolid.run import LARGEST_SEED
from bolid_cli._options import FieldOption
from bolid_cli._settings import COMMON, choices_of, listed, without_none

LARGEST = 10**9  # of a whole number without a limit of its own
LONGEST_NAME = 255  # bytes of a file's name; the limit of all common file systems
_SEED_RANGE = re.compile(rf"(; )?(0<=)?x<={LARGEST_SEED}")
# Parameters that name files or folders and, being text, may also be the URL of an object store.
_PLACES = {"out", "train", "shards", "path"}
_WRITTEN = {"out", "html"}
# What other programs call a command of ours.
_SYNONYMS = {"download": "pull", "fetch": "pull", "get": "pull", "install": "pull", "train": "train-adapter"}
_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory", "file")


class UsageError(BolidError):
    """A value on the command line that no run could use. Exit status 2, like every mistake in typing."""

    exit_code = 2


class Command(typer.core.TyperCommand):
    """A command whose options are listed under their headings and checked by one table of types."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in Typer; then every value is checked. Raises UsageError, or Typer's own error with ``given`` set."""
        written = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "ctx"):
                error.ctx = error.ctx or ctx
            if parameter := getattr(error, "param", None):
                error.given = self._written(ctx, written).get(parameter.name)  # type: ignore[attr-defined]
            raise
        if not ctx.resilient_parsing:
            texts, kinds = self._written(ctx, written), self.kinds()
            for parameter in self.params:
                name = parameter.name or ""
                if name in kinds and (value := ctx.params.get(name)) is not None:
                    _check(option_name(parameter), name, value, texts.get(name), kinds[name], parameter)
        return rest

    def _written(self, ctx: Any, args: list[str]) -> dict[str, Any]:
        """Parameter -> text, or texts, as written on the line."""
        try:
            return self.make_parser(ctx).parse_args(args=list(args))[0]
        except Exception:  # what is wrong with the line was raised before
            return {}

    def kinds(self) -> dict[str, Any]:
        """Parameter -> its annotation in the command's function."""
        return get_type_hints(inspect.unwrap(self.callback), include_extras=True) if self.callback else {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, options without a heading, those under headings, and the common ones last."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        common = []
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            record = (_plain_types(record[0]), _SEED_RANGE.sub("", record[1]).replace("  []", ""))
            if parameter.param_type_name == "argument":
                sections["Arguments"].append(record)
            elif parameter not in self.params or parameter.rich_help_panel == COMMON:  # --help is not in self.params
                common.append(record)
            else:
                sections.setdefault(parameter.rich_help_panel or "Options", []).append(record)
        sections[COMMON if sections["Options"] or len(sections) > 2 else "Options"] = common
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Where the options are that are not listed."""
        hidden = sum(getattr(parameter, "hidden", False) for parameter in self.params)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(
                f"{hidden} more settings for a config file: {ctx.command_path} --print-config writes and explains "
                "them all."
            )


def _plain_types(text: str) -> str:
    for typers, ours in (("<int range>", "<int>"), ("<float range>", "<float>"), ("<str>", "<text>")):
        text = text.replace(typers, ours)
    return re.sub(r" <list\[\w+\]>", "", text)


def option_name(parameter: Any) -> str:
    """``--workers``, or the name of an argument in capitals."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return max(parameter.opts, key=len)


# ---------------------------------------------------------------------------------------------------- types of options


def _check(shown: str, name: str, value: Any, text: Any, kind: Any, parameter: Any) -> None:
    """Raises UsageError for a value that is of the right type and still none. ``text``: as written, if it was."""
    if isinstance(value, list | tuple):
        texts = text if isinstance(text, list | tuple) and len(text) == len(value) else [None] * len(value)
        for one, written in zip(value, texts, strict=True):
            _check(shown, name, one, written, kind, parameter)
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        _check_whole(shown, value, parameter)
    elif isinstance(value, float):
        _check_number(shown, value, kind)
    elif isinstance(value, Path):
        _check_path(shown, str(value) if text is None else str(text), urls=False)
        if name in _WRITTEN:
            _check_written(shown, value, parameter.default)
    elif isinstance(value, str) and name in _PLACES:
        _check_path(shown, value, urls=True)
        if name in _WRITTEN:
            _check_written(shown, Path(value), parameter.default)
    elif isinstance(value, str):
        _check_text(shown, value)


def _check_whole(shown: str, value: int, parameter: Any) -> None:
    if getattr(parameter, "max", None) is None and abs(value) > LARGEST:
        raise UsageError(f"{shown} is {value}", f"give at most {LARGEST}")


def _check_number(shown: str, value: float, kind: Any) -> None:
    if math.isnan(value):
        raise UsageError(f"{shown} is {value}", "give a number")
    of_a_field = any(isinstance(part, FieldOption) for part in get_args(kind))
    if math.isinf(value) and not of_a_field:  # the config class says where infinity has a meaning
        raise UsageError(f"{shown} is {value}", "give a finite number")


def _check_text(shown: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{shown} is not valid UTF-8: {value!r}", "write it in UTF-8") from None


def _check_path(shown: str, text: str, *, urls: bool) -> None:
    if not text.strip():
        raise UsageError(f"{shown} is empty", "give the name of a file or folder")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if scheme:
        if urls and scheme[1].lower() in _STORES and "://" in text:
            return
        if "://" in text or urls:
            takes = "s3://bucket/folder" if urls else "a path on this machine"
            raise UsageError(f"{shown} is {text}: a {scheme[1]}:// address is not supported here", f"give {takes}")
    for part in Path(text).parts:
        if (length := len(os.fsencode(part))) > LONGEST_NAME:
            raise UsageError(f"{shown}: the name {part[:20]}... is {length} bytes long", f"give {LONGEST_NAME} at most")


def _check_written(shown: str, path: Path, default: Any) -> None:
    """``default``: of the option; a file's name where the command writes a file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{shown} {path} is a device, a pipe or a socket", "give the name of a file or folder")
    if default is not None and Path(default).suffix and path.is_dir():
        raise UsageError(f"{shown} {path} is a folder", f"give the name of a file, like {path / Path(default)}")


# ------------------------------------------------------------------------------------------------- mistakes in typing


def explain_usage(error: Any) -> tuple[str, str]:
    """(message, hint) for an error that Typer raises about the command line."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "bolid"
    help_hint = f"{path} --help shows how it is used"
    parameter, option = getattr(error, "param", None), getattr(error, "option_name", None)
    if parameter is not None and "Missing" in type(error).__name__:
        return f"{option_name(parameter)} is missing", help_hint
    if parameter is not None:
        return _explain_value(error, parameter, context, help_hint)
    if option is not None and hasattr(error, "possibilities"):
        known = [text for p in context.command.get_params(context) for text in (*p.opts, *p.secondary_opts)]
        near = difflib.get_close_matches(option, known, 1)
        hint = f"perhaps you mean {near[0]}; " if near else ""
        return f"{path} has no option {option}", f"{hint}{path} --help lists the options"
    message = error.format_message().rstrip(".")
    if message.startswith("No such command"):
        name = message.removeprefix("No such command ").partition(". Did you mean")[0].strip("'\"")
        meant = _SYNONYMS.get(name, name)
        near = difflib.get_close_matches(meant, context.command.commands, 1)
        hint = f"perhaps you mean {path} {near[0]}; " if near else ""
        return f"{path} has no command {name}", f"{hint}{path} --help lists the commands"
    if message.startswith("Got unexpected extra argument"):
        return f"{path} takes no more arguments: {message.rpartition('(')[2].rstrip(')')}", help_hint
    return message[:1].lower() + message[1:], help_hint


def _explain_value(error: Any, parameter: Any, context: Any, help_hint: str) -> tuple[str, str]:
    """A value of the wrong type, out of its range, or none of the choices."""
    name, given = option_name(parameter), getattr(error, "given", None)
    kind = context.command.kinds().get(parameter.name, str) if hasattr(context.command, "kinds") else str
    kind = without_none(get_args(kind)[0] if get_origin(kind) is Annotated else kind)
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    where = "" if given is not None else " in the config file"
    message = f"{name}{where}: {error.message}" if given is None else f"{name} is {_quoted(given)}"
    if choices := choices_of(kind):
        return message, f"choose {listed(choices)}"
    if kind in (int, float):
        return message, f"give a {'whole ' if kind is int else ''}number{_range(parameter)}"
    return f"{message}: {error.message}" if given is not None else message, help_hint


def _quoted(given: Any) -> str:
    return ", ".join(map(str, given)) if isinstance(given, list | tuple) else repr(given)


def _range(parameter: Any) -> str:
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f", at least {low}" if low is not None else f", at most {high}" if high is not None else ""
