"""Options of a command from a config dataclass: one source for names, types, defaults and help lines."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer


def config_options(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `config` by one option for each field of `config_class`."""
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            config = config_class(**{field.name: values.pop(field.name) for field in fields})
            command(config=config, **values)

        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hints[field.name], typer.Option(help=_sentence(field.metadata["help"]))],
            )
            for field in fields
        ]
        own = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "config"
        ]
        wrapper.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*parameters, *options]}
        del wrapper.__wrapped__  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
