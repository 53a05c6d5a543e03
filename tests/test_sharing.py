"""Commands whose work worker processes, ranks or Ray share: the same bytes and figures as one process.

One pair of ranks runs all commands, one after the other, and so does one process with Ray: a process needs ten seconds
to import what a command needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from generate_world import PROMPTS, make_world
from PIL import Image
from test_workers import contents, free_port, run_ranks, run_with_ray

from bolid.evaluate import bench, compare, evaluate
from bolid.extract import extract
from bolid.generate import generate
from bolid.run import canonical_json

pytestmark = pytest.mark.slow

MANY = [f"{prompt} {word}" for prompt in PROMPTS for word in ("one", "two", "three")]

COMMANDS_SCRIPT = """
import json, os, sys
from bolid.run import prepare_environment
prepare_environment()
from typer.testing import CliRunner
from bolid_cli.main import app

for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    result = CliRunner().invoke(app, words, prog_name="bolid")
    print(json.dumps([result.exit_code, result.stdout, result.stderr]), flush=True)
"""


class Inputs(NamedTuple):
    """What the commands read."""

    photos: Path
    pictures: Path
    world: Any

    def lines(self, out: Path) -> dict[str, list[str]]:
        """The commands, each writing into `out`."""
        people = [str(self.pictures / name) for name in ("p100000", "p100001")]
        scored = ["--reference", str(self.photos), "--family", "tiny", "--device", "cpu", "--json"]
        return {
            "extract": [
                "extract", str(self.photos), "--family", "tiny", "--device", "cpu", "--max-bad", "0.2",
                "--out", str(out / "extract"),
            ],
            "generate": [
                "generate", *MANY, "--profile", str(self.world.me), "--adapter", str(self.world.adapter),
                "--device", "cpu", "--batch-size", "2", "--steps", "1", "--seed", "4", "--out", str(out / "generate"),
            ],
            "evaluate": ["evaluate", str(self.pictures), *scored, "--quiet"],
            "evaluate --compare": ["evaluate", "--compare", *people, *scored, "--html", str(out / "report.html")],
            "bench": ["bench", str(self.pictures), *scored, "--quiet"],
        }  # fmt: skip


class Alone(NamedTuple):
    """What one process wrote into `out`, and found."""

    out: Path
    pictures: list[str]
    figures: dict


class Answers(NamedTuple):
    """What the processes of one run wrote into `out`, and printed: {command: standard output} for each process."""

    out: Path
    printed: list[dict[str, str]]


@pytest.fixture(scope="module")
def inputs(rendered_people, tmp_path_factory):
    """Two people's photos as PNG, in folders of their names; one file is damaged, and there are several batches."""
    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted([*rendered_people.glob("p100000/*.jpg"), *rendered_people.glob("p100001/*.jpg")]):
        target = folder / path.parent.name / f"{path.stem}.png"
        target.parent.mkdir(exist_ok=True)
        Image.open(path).save(target)
    (folder / "p100000" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "p100001" / "cut.png").write_bytes((folder / "p100001" / "000.png").read_bytes()[:3000])
    return Inputs(rendered_people, folder, make_world(tmp_path_factory.mktemp("generate")))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What one process writes, the names of its pictures in order, and its figures."""
    out = tmp_path_factory.mktemp("alone")
    extract(inputs.photos, out / "extract", device="cpu", max_bad=0.2)
    names = [path.name for path in generate(MANY, out / "generate", **options_of(inputs.world))]
    return Alone(out, names, figures(evaluate(inputs.pictures, inputs.photos, family="tiny", device="cpu")))


@pytest.fixture(scope="module")
def ranks(inputs, tmp_path_factory):
    """Two processes as torchrun starts them. Their home is new: they extract the reference photos, and share them."""
    out = tmp_path_factory.mktemp("ranks")
    names = ("extract", "generate", "evaluate --compare", "bench")
    lines = [(free_port(), inputs.lines(out)[name]) for name in names]
    command = [sys.executable, "-c", COMMANDS_SCRIPT, json.dumps(lines)]
    return Answers(out, [answers(printed, names) for printed in run_ranks(command, BOLID_HOME=str(out / "home"))])


@pytest.fixture(scope="module")
def ray(inputs, tmp_path_factory):
    """A process with Ray. Only `extract` gets two actors: that Ray keeps the order, test_workers.py says."""
    pytest.importorskip("ray", reason="pip install 'bolid[ray]'")
    out = tmp_path_factory.mktemp("ray")
    workers = {"extract": "2", "generate": "1", "evaluate": "1"}
    lines = [(0, [*inputs.lines(out)[name], "--engine", "ray", "--workers", n]) for name, n in workers.items()]
    command = [sys.executable, "-c", COMMANDS_SCRIPT, json.dumps(lines)]
    return Answers(out, [answers(run_with_ray(command, BOLID_HOME=str(out / "home")), tuple(workers))])


def answers(printed: str, names: tuple[str, ...]) -> dict[str, str]:
    """Standard output of each command, all of which have ended well."""
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    for name, (status, _, talk) in zip(names, found, strict=True):
        assert status == 0, f"{name}: {talk}"
    return {name: output for name, (_, output, _) in zip(names, found, strict=True)}


def figures(result) -> dict:
    """What is printed with --json."""
    return json.loads(canonical_json(result))


def options_of(world) -> dict[str, Any]:
    return {"profile": world.me, "adapter": world.adapter, "device": "cpu", "batch_size": 2, "steps": 1, "seed": 4}


def test_ranks_write_the_same_shards(alone, ranks):
    assert [printed["extract"].strip() for printed in ranks.printed] == [str(ranks.out / "extract"), ""]
    assert contents(ranks.out / "extract") == contents(alone.out / "extract")


def test_ranks_write_the_same_pictures(alone, ranks):
    first, second = (printed["generate"] for printed in ranks.printed)
    assert first.splitlines() == [str(ranks.out / "generate" / name) for name in alone.pictures] and second == ""
    assert contents(ranks.out / "generate") == contents(alone.out / "generate") and len(alone.pictures) == 6


def test_ranks_give_the_same_figures_and_the_first_writes(inputs, ranks):
    """torchmetrics would wait for statistics that only rank 0 has."""
    folders = [inputs.pictures / "p100000", inputs.pictures / "p100001"]
    one = figures(compare(folders, inputs.photos, family="tiny", device="cpu"))
    first, second = (printed["evaluate --compare"] for printed in ranks.printed)
    assert json.loads(first[first.index("{") :]) == one and second == ""
    assert (ranks.out / "report.html").is_file()


def test_ranks_give_the_figures_of_the_benchmark(inputs, ranks):
    one = figures(bench([inputs.pictures], reference=inputs.photos, family="tiny", device="cpu"))
    first, second = (printed["bench"] for printed in ranks.printed)
    assert json.loads(first) == one and second == ""


def test_ray_writes_the_same_shards(alone, ray):
    assert contents(ray.out / "extract") == contents(alone.out / "extract")


def test_ray_writes_the_same_pictures(alone, ray):
    printed = ray.printed[0]["generate"].splitlines()
    assert printed == [str(ray.out / "generate" / name) for name in alone.pictures]
    assert contents(ray.out / "generate") == contents(alone.out / "generate")


def test_ray_gives_the_same_figures(alone, ray):
    assert json.loads(ray.printed[0]["evaluate"]) == alone.figures


def test_worker_processes_write_the_same_pictures(inputs, alone, tmp_path):
    generate(MANY, tmp_path / "two", workers=2, **options_of(inputs.world))
    assert contents(tmp_path / "two") == contents(alone.out / "generate")


def test_worker_processes_give_the_same_figures(inputs, alone):
    assert alone.figures["pictures"] == 10 and sum(map(len, alone.figures["rejected"].values())) == 2
    # In this test's own home the reference photos are extracted anew, and shared too.
    assert figures(evaluate(inputs.pictures, inputs.photos, workers=2, family="tiny", device="cpu")) == alone.figures
