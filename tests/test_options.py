"""Options of the commands: config dataclasses, headings, --config, --preset, --print-config, and mistakes in typing."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid_cli._command import Command
from bolid_cli._console import SeedOption
from bolid_cli._options import config_options, presets_of, settings_of
from bolid_cli._settings import COMMON, without_none
from bolid_cli.main import COMMANDS, _Commands, app

run = CliRunner().invoke
COMMAND_LINE = typer.main.get_command(app).commands
CONFIGURABLE = [(name, command) for name, command in COMMANDS if settings_of(command)]


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = dataclasses.field(default=100, metadata={"help": "training steps"})
    rate: float = dataclasses.field(default=0.5, metadata={"help": "learning rate", "group": "Optimiser"})
    loss: str = dataclasses.field(
        default="one", metadata={"help": "what is compared", "choices": ("one", "two"), "group": "Losses"}
    )
    detail: float = dataclasses.field(
        default=1.0, metadata={"help": "how finely", "choices": (1.0, 1.5, 2.0), "advanced": True}
    )
    clip: float = dataclasses.field(default=1.0, metadata={"help": "gradient norm; inf: none", "advanced": True})
    compile: bool = dataclasses.field(default=False, metadata={"help": "compile the network", "advanced": True})

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {"description": "reproduces nothing, quickly: at once.", "steps": 5, "rate": 0.25, "loss": "two"},
    }

    def __post_init__(self) -> None:
        if self.detail not in (1.0, 1.5, 2.0):
            raise BolidError(f"--detail is {self.detail}", "choose 1, 1.5 or 2")
        if self.steps < 1:
            raise BolidError(f"--steps is {self.steps}", "give at least 1")


@pytest.fixture
def trained():
    return []


@pytest.fixture
def tool(trained):
    """tool("--steps", "3", ...) -> the result of a program whose command `train` notes what it was called with."""

    @config_options(Config)
    def train(
        config: Config,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder.")] = Path("out"),
        seed: SeedOption = 0,
    ) -> None:
        """Train."""
        trained.append((config, seed))

    program = typer.Typer(cls=_Commands, rich_markup_mode=None, add_completion=False)
    program.command("train", cls=Command)(train)
    program.command("other", cls=Command)(lambda: None)

    def call(*arguments: str):
        return run(program, ["train", *arguments], prog_name="bolid")

    return call


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_help_names_a_config_file_only_where_there_is_one(name):
    shown = run(app, [*name.split(), "--help"]).stdout
    assert ("more settings for a config file" in shown) <= ("--print-config" in shown.partition("Common options")[2])


def test_precedence_is_default_preset_file_line(tool, trained, tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("rate = 0.125\nloss = 'one'\n")
    for arguments, expected in (
        ((), Config()),
        (("--preset", "small"), Config(steps=5, rate=0.25, loss="two")),
        (("--preset", "small", "--config", str(file)), Config(steps=5, rate=0.125)),
        (("--config", str(file), "--preset", "small"), Config(steps=5, rate=0.125)),
        (("--rate", "2", "--config", str(file), "--preset", "small"), Config(steps=5, rate=2.0)),
    ):
        result = tool(*arguments)
        assert result.exit_code == 0, result.output
        assert trained.pop() == (expected, 0)


def test_what_print_config_writes_gives_the_same_again(tool, trained, tmp_path):
    printed = tool("--preset", "small", "--seed", "7", "--clip", "inf", "--compile", "--print-config")
    assert printed.exit_code == 0 and not trained
    values = tomllib.loads(printed.stdout)
    assert values["loss"] == "two" and values["seed"] == 7 and values["clip"] == float("inf")
    assert "# Training steps.\nsteps = 5" in printed.stdout
    assert "# What is compared. One of one or two." in printed.stdout
    file = tmp_path / "again.toml"
    file.write_text(printed.stdout)
    assert tool("--config", str(file), "--print-config").stdout == printed.stdout
    assert tool("--config", str(file)).exit_code == 0
    config = Config(steps=5, rate=0.25, loss="two", clip=float("inf"), compile=True)
    assert trained == [(config, 7)]


def test_print_config_refuses_what_the_command_would(tool):
    result = tool("--steps", "0", "--print-config")
    assert result.exit_code == 1 and result.stdout == "" and "--steps is 0" in result.stderr


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stepz = 3", "'stepz' is no setting of bolid train", "perhaps you mean steps"),
        ("zzz = 3", "'zzz' is no setting of bolid train", "--print-config writes all there are"),
        ("config = 'a.toml'", "'config' is no setting", "--print-config"),
        ("steps = 3.5", "steps is 3.5", "write a whole number"),
        ("steps = true", "steps is true", "write a whole number"),
        ("rate = 'much'", 'rate is "much"', "write a number"),
        ("compile = 1", "compile is 1", "write true or false"),
        ("loss = 'three'", 'loss is "three"', "choose one or two"),
        ("loss = 1", "loss is 1", "choose one or two"),
        ("detail = 3", "detail is 3", "choose 1, 1.5 or 2"),
        ("out = 3", "out is 3", "write text in quotes"),
        ("[steps]\na = 1", 'steps is {"a": 1}', "write a whole number"),
        ("steps = ", "is not valid TOML", "correct that line"),
        ("a" + ".a" * 50_000 + " = 1", "is not valid TOML", "correct that line"),
        ("a = " + "[" * 50_000, "is not valid TOML", "correct that line"),
        ("# " + "x" * 300_000, "is larger than 256 KiB", "give another file"),
    ],
)
def test_mistakes_in_a_config_file(tool, tmp_path, text, message, hint):
    file = tmp_path / "train.toml"
    file.write_text(text)
    result = tool("--config", str(file))
    assert result.exit_code == 1 and str(file) in result.stderr
    assert message in result.stderr and hint in result.stderr.partition("hint: ")[2]


def test_a_config_file_that_is_missing_or_no_text(tool, tmp_path):
    result = tool("--config", str(tmp_path / "absent.toml"))
    assert result.exit_code == 1 and "cannot read" in result.stderr and "--print-config writes one" in result.stderr
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in tool("--config", str(tmp_path / "b.toml")).stderr


def test_a_range_is_checked_in_the_file_too(tool, tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("seed = -1\n")
    result = tool("--config", str(file))
    assert result.exit_code == 2 and "--seed in the config file" in result.stderr
    assert "hint: give a whole number" in result.stderr


def test_help_has_headings_and_leaves_out_what_is_advanced(tool):
    text = tool("--help").stdout
    words = " ".join(text.split())
    positions = [text.index(f"\n{heading}:\n") for heading in ("Options", "Optimiser", "Losses", "Common options")]
    assert positions == sorted(positions)
    assert "--steps" in text and "--loss <one|two>" in text and "--compile" not in text and "--detail" not in text
    assert "3 more settings for a config file: bolid train --print-config" in words
    assert "small: reproduces nothing, quickly." in words and "at once" not in words


def test_a_preset_that_names_no_setting_or_has_no_description_is_a_mistake_of_ours():
    def command(config: Any) -> None:
        pass

    for preset in ({"steps": 3}, {"description": "x", "nothing": 3}):

        @dataclasses.dataclass(frozen=True)
        class Wrong:
            steps: int = dataclasses.field(default=1, metadata={"help": "steps"})
            PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"wrong": preset}

        with pytest.raises(TypeError, match="wrong"):
            config_options(Wrong)(command)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["exract"], "bolid has no command exract", "perhaps you mean bolid extract"),
        (["zzzz"], "bolid has no command zzzz", "bolid --help lists the commands"),
        (["--nonsense"], "bolid has no option --nonsense", "bolid --help lists the options"),
        (["extract", "--wokers", "2"], "bolid extract has no option --wokers", "perhaps you mean --workers"),
        (["generate", "x", "--best-off", "2"], "bolid generate has no option --best-off", "perhaps you mean --best-of"),
        (["extract", "--workers", "0"], "--workers is '0'", "give a whole number from 1 to 4096"),
        (["extract", "--workers", "two"], "--workers is 'two'", "give a whole number"),
        (["extract", "--max-bad", "nan"], "--max-bad is 'nan'", "give a number from 0 to 1"),
        (["extract", "--engine", "steam"], "--engine is 'steam'", "choose local or ray"),
        (["extract", "--workers"], "option '--workers' requires an argument", "bolid extract --help"),
        (["extract", "a", "b", "c"], "bolid extract takes no more arguments: b c", "bolid extract --help"),
        (["inspect"], "PATH is missing", "bolid inspect --help"),
        (["models", "pul"], "bolid models has no command pul", "perhaps you mean bolid models pull"),
        (["models", "download"], "bolid models has no command download", "perhaps you mean bolid models pull"),
        (["profile", "photo.jpg", "-o", ""], "--out is empty", "give the name of a file or folder"),
        (["profile", "photo.jpg", "-o", "x" * 256], "is 256 bytes long", "give 255 at most"),
        (
            ["profile", "photo.jpg", "-o", "s3://bucket/me"],
            "a s3:// address is not supported",
            "a path on this machine",
        ),
        (["profile", "photo.jpg", "-o", "/dev/null"], "--out /dev/null is a device", "give the name of a file"),
        (["profile", "photo.jpg", "-o", "."], "--out . is a folder", "give the name of a file, like me.safetensors"),
        (["evaluate", "--html", "/dev/null"], "--html /dev/null is a device", "give the name of a file"),
        (["extract", "photos", "-o", "ftp://host/x"], "a ftp:// address is not supported", "s3://bucket/folder"),
        (["extract", "photos", "-o", "s3:/x"], "is not supported", "s3://bucket/folder"),
        (["scrape", "photos", "--delay", "inf"], "--delay is 'inf'", "give a number"),
        (["scrape", "photos", "--min-sharpness", "nan"], "--min-sharpness is 'nan'", "give a number"),
        (["scrape", "photos", "--min-sharpness", "inf"], "--min-sharpness is inf", "give a finite number"),
        (["generate", "x", "-n", "99999999999999999999"], "-n is 99999999999999999999", "give at most 1000000000"),
        (["generate", "x", "--seed", "99999999999999999999"], "--seed is '99999999999999999999'", "from 0 to"),
        (["generate", "x", "--negative", "\udcff"], "--negative is not valid UTF-8", "UTF-8"),
        (["generate", "\udcff"], "PROMPTS is not valid UTF-8", "UTF-8"),
    ],
)
def test_mistakes_in_typing_get_a_hint(arguments, message, hint):
    result = run(app, arguments, prog_name="bolid")
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    first, blank, second = result.stderr.strip().split("\n")
    assert first.startswith("error: ") and message in first and blank == ""
    assert second.startswith("hint: ") and hint in second


@pytest.mark.parametrize(("name", "command"), CONFIGURABLE, ids=[name for name, _ in CONFIGURABLE])
def test_every_command_reads_the_config_that_it_prints(name, command, tmp_path):
    printed = run(app, [*name.split(), "--print-config"], prog_name="bolid")
    assert printed.exit_code == 0, printed.stderr
    (tmp_path / "x.toml").write_text(printed.stdout)
    again = run(app, [*name.split(), "--config", str(tmp_path / "x.toml"), "--print-config"], prog_name="bolid")
    assert again.stdout == printed.stdout
    flags = {flag for option in COMMAND_LINE[name].params for flag in option.opts}
    for key in settings_of(command):
        assert f"\n{key} =" in printed.stdout or f"\n# {key} =" in printed.stdout
        assert {f"--{key.replace('_', '-')}", f"-{key}"} & flags, "a key is the option's name"


@pytest.mark.parametrize(("name", "command"), CONFIGURABLE, ids=[name for name, _ in CONFIGURABLE])
def test_every_preset_is_a_config_that_the_command_takes(name, command):
    for preset, values in presets_of(command).items():
        result = run(app, [*name.split(), "--preset", preset, "--print-config"], prog_name="bolid")
        assert result.exit_code == 0, (preset, result.stderr)
        printed = tomllib.loads(result.stdout)
        assert all(printed[key] == value for key, value in values.items() if key != "description"), preset


@pytest.mark.parametrize(("name", "command"), CONFIGURABLE, ids=[name for name, _ in CONFIGURABLE])
def test_no_value_of_any_option_is_an_unexpected_error(name, command):
    parser = typer.main.get_command(app).commands[name]
    odd = ("nan", "inf", "-inf", "1e400", "9" * 20, "9" * 5000, "", "x" * 300, "ftp://x", "\udcff", "-1")
    for setting in settings_of(command).values():
        kind = without_none(setting.type)
        option = "-n" if setting.name == "n" else f"--{setting.name.replace('_', '-')}="
        for value in odd if kind is not bool else ():
            try:
                parser.make_context(name, [f"{option}{value}"])
            except Exception as error:
                assert isinstance(error, BolidError) or hasattr(error, "format_message"), (option, value)
            else:
                assert kind is not int or value == "-1", (option, value)
                assert kind is not float or not math.isnan(float(value)), (option, value)


def test_options_of_one_name_mean_one_thing():
    types: dict[str, set[Any]] = {}
    for _, command in COMMANDS:
        for key, setting in settings_of(command).items():
            types.setdefault(key, set()).add(without_none(setting.type))
    del types["out"]  # a path, or of shards also a URL
    several = {key: kinds for key, kinds in types.items() if len(kinds) > 1}
    assert not several


def test_a_person_sees_about_fifteen_options_of_a_command():
    for name, command in CONFIGURABLE:
        shown = [setting for setting in settings_of(command).values() if not setting.advanced]
        own = [setting for setting in shown if setting.group != COMMON]
        if name not in ("train-adapter", "train-vae"):
            assert len(own) <= 18, name
