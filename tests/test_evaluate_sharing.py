"""`evaluate` by several processes: the same figures, to the last digit."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image
from test_workers import run_ranks, run_with_ray

from bolid.evaluate import bench, compare, evaluate
from bolid.run import canonical_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(rendered_people, tmp_path_factory):
    """Two people's photos as PNG, in folders of their names; one file is damaged, and there are several batches."""
    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted([*rendered_people.glob("p100000/*.jpg"), *rendered_people.glob("p100001/*.jpg")]):
        target = folder / path.parent.name / f"{path.stem}.png"
        target.parent.mkdir(exist_ok=True)
        Image.open(path).save(target)
    (folder / "p100000" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "p100001" / "cut.png").write_bytes((folder / "p100001" / "000.png").read_bytes()[:3000])
    return folder


def figures(result) -> dict:
    """What is printed with --json."""
    return json.loads(canonical_json(result))


@pytest.fixture(scope="module")
def alone(pictures, rendered_people):
    """The figures of one process."""
    return figures(evaluate(pictures, rendered_people, family="tiny", device="cpu"))


def test_worker_processes_give_the_same_figures(pictures, rendered_people, alone):
    assert alone["pictures"] == 10 and sum(map(len, alone["rejected"].values())) == 2
    # In this test's own home the reference photos are extracted anew, and shared too.
    assert figures(evaluate(pictures, rendered_people, workers=2, family="tiny", device="cpu")) == alone


def test_ray_gives_the_same_figures(pictures, rendered_people, alone):
    pytest.importorskip("ray", reason="pip install 'bolid[ray]'")
    command = [sys.executable, "-m", "bolid_cli.main", "evaluate", str(pictures), "--reference", str(rendered_people)]
    output = run_with_ray([*command, "--family", "tiny", "--json", "--quiet", "--engine", "ray", "--workers", "2"])
    assert json.loads(output[output.index("{") :]) == alone


def test_ranks_give_the_same_figures_and_the_first_writes(pictures, rendered_people, tmp_path):
    """torchmetrics would wait for statistics that only rank 0 has."""
    report = tmp_path / "report.html"
    compared = [str(pictures / "p100000"), str(pictures / "p100001")]
    alone = figures(compare(compared, rendered_people, family="tiny", device="cpu"))
    command = [sys.executable, "-m", "bolid_cli.main", "evaluate", "--compare", *compared]
    options = ["--reference", str(rendered_people), "--family", "tiny", "--device", "cpu", "--json"]
    home = {"BOLID_HOME": str(tmp_path / "home")}  # the reference photos are extracted anew, and shared too
    first, second = run_ranks([*command, *options, "--html", str(report)], **home)
    assert json.loads(first[first.index("{") :]) == alone and second == ""
    assert report.is_file()


def test_ranks_give_the_figures_of_the_benchmark(pictures, rendered_people):
    options = {"reference": rendered_people, "family": "tiny", "device": "cpu"}
    alone = figures(bench([pictures], **options))
    command = [sys.executable, "-m", "bolid_cli.main", "bench", str(pictures), "--reference", str(rendered_people)]
    first, second = run_ranks([*command, "--family", "tiny", "--device", "cpu", "--json", "--quiet"])
    assert json.loads(first) == alone and second == ""
