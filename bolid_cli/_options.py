"""Options of the commands: from config dataclasses, from a TOML file, and from presets.

A command is a function. ``configurable`` gives it three more options:

    --config FILE     take settings from a TOML file
    --preset NAME     take settings that belong together, where there are presets
    --print-config    write all settings in force, as a file for --config

Default < preset < file < environment variable < command line. Options with ``hidden=True`` are settings of the file
that ``--help`` does not list; the command line takes them all the same. ``rich_help_panel`` is an option's heading.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from bolid_cli._settings import COMMON, Setting, checked, choices_of, listed, read_settings, toml_lines
from bolid_cli._streams import emit

# Not of the run itself: what to print, what to do instead, and this mechanism's own.
_NO_SETTINGS = {
    "config_file", "preset", "print_config", "as_json", "quiet", "dry_run", "stop_after", "forget", "also",
}  # fmt: skip

_Command = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class FieldOption:
    """Marks an option made from a config field: its choices, () for any. The config class checks its range."""

    choices: tuple[Any, ...]


# ----------------------------------------------------------------------------------- options from a config dataclass


def config_options(config_class: type) -> Callable[[_Command], _Command]:
    """Replace a command's parameter ``config`` by one option for each field of ``config_class``.

    A field's metadata: "help" (text), and optionally "choices" (a tuple), "group" (the heading in --help) and
    "advanced" (True: not in --help). The class may have ``PRESETS``: name -> {"description": ..., field: value}.
    The command becomes ``configurable``.
    """
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)

    def build(values: dict[str, Any]) -> Any:
        """The config, whose fields are taken out of ``values``."""
        return config_class(**{field.name: values.pop(field.name) for field in fields})

    def decorate(command: _Command) -> _Command:
        def with_fields(**values: Any) -> None:
            command(config=build(values), **values)

        options = [
            _keyword(field.name, field.default, _field_option(field.metadata, hints[field.name])) for field in fields
        ]
        parameters = [parameter for parameter in _parameters(command) if parameter.name != "config"]
        wrapped = _with_signature(with_fields, command, [*parameters, *options])
        return configurable(wrapped, presets=getattr(config_class, "PRESETS", {}), check=build)

    return decorate


def _field_option(metadata: Mapping[str, Any], kind: Any) -> Any:
    choices = tuple(metadata.get("choices", ()))
    option = typer.Option(
        help=sentence(metadata["help"]),
        rich_help_panel=metadata.get("group"),
        hidden=metadata.get("advanced", False),
        metavar=f"<{listed(choices).replace(', ', '|').replace(' or ', '|')}>" if choices and kind is not str else None,
    )
    return Annotated[Literal[choices] if choices and kind is str else kind, option, FieldOption(choices)]


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


# ------------------------------------------------------------------------------ --config, --preset and --print-config


def configurable(
    command: _Command,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    check: Callable[[dict[str, Any]], Any] | None = None,
) -> _Command:
    """The command with --config and --print-config, and with --preset where there are presets.

    ``presets``: name -> {"description": what it reproduces, setting: value}; --help shows the description up to its
    first colon. ``check`` raises BolidError for values that do not go together; --print-config calls it first.
    """
    own = _parameters(command)
    settings = {setting.name: setting for parameter in own if (setting := _setting(parameter))}
    used = {name: _preset(name, preset, settings) for name, preset in (presets or {}).items()}
    context_name = next((parameter.name for parameter in own if parameter.annotation is typer.Context), "")

    def with_settings(context: typer.Context, print_config: bool, **values: Any) -> None:
        for name in ("config_file", "preset"):
            values.pop(name, None)
        if print_config:
            if check is not None:
                check(dict(values))
            path = context.command_path
            emit(f"# Settings of `{path}`. Use them with: {path} --config THIS_FILE")
            emit("\n".join(toml_lines(settings.values(), values)))
            return
        command(**values, **({context_name: context} if context_name else {}))

    extra = [_config_option(settings), _PRINT_CONFIG]
    if used:
        extra.insert(0, _preset_option(presets or {}, used))
    parameters = [parameter for parameter in own if parameter.name != context_name]
    wrapped = _with_signature(with_settings, command, [_keyword("context", None, typer.Context), *parameters, *extra])
    wrapped.settings, wrapped.presets = settings, presets or {}  # type: ignore[attr-defined]
    return wrapped


def settings_of(command: _Command) -> dict[str, Setting]:
    """What the command's config file may hold: key -> setting; {} for a command without --config."""
    return getattr(command, "settings", {})


def presets_of(command: _Command) -> Mapping[str, Mapping[str, Any]]:
    """The presets of a command: name -> {"description": ..., setting: value}."""
    return getattr(command, "presets", {})


def _setting(parameter: inspect.Parameter) -> Setting | None:
    """An option as a setting; None for an argument, and for what is no setting."""
    parts = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else ()
    option = next((part for part in parts if isinstance(part, typer.models.OptionInfo)), None)
    if option is None or parameter.name in _NO_SETTINGS:
        return None
    of_a_field = next((part for part in parts if isinstance(part, FieldOption)), FieldOption(()))
    # In an Annotated, Typer keeps the first name as the default.
    names = [str(text) for text in (option.default, *(option.param_decls or ()))]
    flags = [text for text in names if text.startswith("--")]
    return Setting(
        name=flags[0].split("/")[0][2:].replace("-", "_") if flags else parameter.name,
        parameter=parameter.name,
        type=parts[0],
        default=parameter.default,
        help=option.help or "",
        group=option.rich_help_panel or "",
        advanced=option.hidden,
        choices=of_a_field.choices or choices_of(parts[0]),
    )


def _preset(name: str, preset: Mapping[str, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Parameter -> value of a preset. A mistake in one is ours: TypeError, or a BolidError that names it."""
    values = {key: value for key, value in preset.items() if key != "description"}
    if "description" not in preset or (unknown := values.keys() - settings.keys()):
        raise TypeError(f"preset {name!r}: {'no description' if 'description' not in preset else unknown}")
    return {settings[k].parameter: checked(value, settings[k], f"preset {name}: {k}") for k, value in values.items()}


def _preset_option(presets: Mapping[str, Mapping[str, Any]], used: Mapping[str, dict[str, Any]]) -> inspect.Parameter:
    def use(context: typer.Context, value: str | None) -> str | None:
        if value is not None and not context.resilient_parsing:
            context.default_map = {**used[value], **(context.default_map or {})}  # a file wins, in either order
        return value

    described = "; ".join(f"{name}: {preset['description'].partition(': ')[0]}" for name, preset in presets.items())
    option = typer.Option(
        "--preset",
        help=f"Settings that belong together. {described}.",
        rich_help_panel=COMMON, is_eager=True, callback=use, show_default=False,
    )  # fmt: skip
    return _keyword("preset", None, Annotated[Literal[tuple(used)] | None, option])


def _config_option(settings: Mapping[str, Setting]) -> inspect.Parameter:
    def read(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None and not context.resilient_parsing:
            values = read_settings(value, settings, context.command_path)
            context.default_map = {**(context.default_map or {}), **values}
        return value

    option = typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Take settings from this file. Options on the command line win.",
        rich_help_panel=COMMON, is_eager=True, callback=read, show_default=False,
    )  # fmt: skip
    return _keyword("config_file", None, Annotated[Path | None, option])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_PRINT_CONFIG = _keyword(
    "print_config",
    False,
    Annotated[
        bool,
        typer.Option(
            "--print-config", rich_help_panel=COMMON, help="Write all settings in force, as a file for --config."
        ),
    ],
)


def _parameters(command: _Command) -> list[inspect.Parameter]:
    hints = get_type_hints(command, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
    ]


def _with_signature(function: _Command, command: _Command, parameters: list[inspect.Parameter]) -> _Command:
    """``function`` with the name and docstring of ``command``, and these parameters."""
    wrapped = functools.wraps(command)(function)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped
