"""The ``bolid`` program: one list of commands, one place where errors end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import bolid
from bolid.run import keep_freed_memory, prepare_environment
from bolid_cli import (
    bench,
    demo,
    doctor,
    evaluate,
    extract,
    fieldtest,
    generate,
    inspect,
    models,
    profile,
    profile_body,
    scrape,
    shard,
    synth,
    train_adapter,
    train_vae,
    ui,
)
from bolid_cli._command import Command
from bolid_cli._console import show_error, show_usage_error
from bolid_cli._streams import check_working_directory, emit, output_error, prepare_terminal

# In the order of the chain. Each command is a function in a module of its (first) name, whose twin in bolid/
# does the work. Command modules import typer and the standard library only: `bolid --help` must not load torch.
COMMANDS: list[tuple[str, Callable[..., None]]] = [
    ("demo", demo.demo),
    ("scrape", scrape.scrape),
    ("synth", synth.synth),
    ("extract", extract.extract),
    ("shard", shard.shard),
    ("train-vae", train_vae.train_vae),
    ("profile", profile.profile),
    ("profile mix", profile.mix),
    ("profile edit", profile.edit),
    ("profile export", profile_body.export),
    ("profile show", profile.show),
    ("train-adapter", train_adapter.train_adapter),
    ("generate", generate.generate),
    ("evaluate", evaluate.evaluate),
    ("bench", bench.bench),
    ("bench make", bench.make),
    ("ui", ui.ui),
    ("inspect", inspect.inspect),
    ("doctor", doctor.doctor),
    ("fieldtest", fieldtest.fieldtest),
]


class _Commands(typer.core.TyperGroup):
    """The one catch: whatever a command raises becomes a message and an exit status. And commands of two words."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """As in Typer, but mistakes in typing are shown like all errors, with a hint."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            status = super().main(args, standalone_mode=False, **extra)
        except typer.Abort:
            status = 1
        except OSError as error:  # the help could not be printed
            status = show_error(output_error(error) if not isinstance(error, BrokenPipeError) else error)
        except (Exception, KeyboardInterrupt) as error:
            status = show_usage_error(error) if hasattr(error, "format_message") else show_error(error)
        sys.exit(status if isinstance(status, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`profile mix A B` is the command "profile mix", unless `mix` is a file or folder: then it holds photos."""
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands and not Path(args[1]).exists():
            args = [two, *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            check_working_directory()
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "format_message"):  # a mistake in typing, which `main` shows
                raise
            raise typer.Exit(show_error(error)) from None


app = typer.Typer(
    name="bolid",
    cls=_Commands,
    help="Personalised pictures of people that keep the body as well as the face.\n\n"
    "Photos go in once, a small profile comes out; from then on a text prompt and that profile are enough. "
    "Try: bolid demo",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _function in COMMANDS:
    app.command(_name, cls=Command, no_args_is_help=False)(_function)
app.add_typer(models.app, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        emit(bolid.__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``bolid`` script."""
    prepare_environment()  # before torch and ultralytics load
    keep_freed_memory()
    prepare_terminal()
    app(prog_name="bolid")


if __name__ == "__main__":
    main()
