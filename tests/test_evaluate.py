"""evaluate, with the embedded models on rendered people."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.evaluate import evaluate
from bolid_cli.main import app


@pytest.fixture(scope="module")
def person(rendered_people):
    return sorted(path for path in rendered_people.iterdir() if path.is_dir())[0]


@pytest.fixture(scope="module")
def pictures(person, tmp_path_factory):
    """The person's own photos as if they had been generated, each with a run record naming its caption."""
    folder = tmp_path_factory.mktemp("generated")
    for path in sorted(person.glob("*.jpg")):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("bolid", json.dumps({"config": {"prompt": path.with_suffix(".txt").read_text().strip()}}))
        Image.open(path).save(folder / f"{path.stem}.png", pnginfo=info)
    return folder


@pytest.fixture(scope="module")
def result(person, pictures):
    return evaluate(pictures, person, family="tiny", device="cpu")


def test_a_persons_own_photos_are_perfect(result):
    assert result.metrics["fid"].value == pytest.approx(0, abs=1e-6)
    assert result.metrics["bone_ratio_error"].value == pytest.approx(0, abs=1e-6)
    assert result.metrics["person_found"].value == 1
    assert result.metrics["body_ratio_error"].value < 0.2
    assert result.pictures == result.references == 5


def test_every_figure_says_what_measured_it(result):
    for metric in result.metrics.values():
        assert metric.measured_by and metric.n == 5
    assert "bias" in result.metrics["fid"].note
    assert all(set(ratio) == {"true", "pictures"} for ratio in result.ratios.values()) and len(result.ratios) == 10


def test_the_right_caption_scores_higher(person, pictures, result, tmp_path):
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    files = sorted(pictures.glob("*.png"))
    for file, other in zip(files, files[1:] + files[:1], strict=True):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("bolid", Image.open(other).text["bolid"])
        Image.open(file).save(swapped / file.name, pnginfo=info)
    wrong = evaluate(swapped, person, family="tiny", device="cpu").metrics["text_score"].value
    assert result.metrics["text_score"].value > wrong


def test_bad_pictures_are_listed_and_the_rest_scored(person, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "some")
    (folder / "broken.png").write_bytes(b"no picture")
    found = evaluate(folder, person, family="tiny", device="cpu")
    assert found.pictures == 5 and any("broken.png" in name for names in found.rejected.values() for name in names)


def test_refusals(person, pictures, tmp_path):
    with pytest.raises(BolidError, match="the same folder"):
        evaluate(person, person, family="tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BolidError, match="no pictures in"):
        evaluate(tmp_path / "empty", person, family="tiny")
    with pytest.raises(BolidError, match="there is no folder"):
        evaluate(tmp_path / "nowhere", person, family="tiny")


def test_json_on_stdout_and_table_on_stderr(person, pictures):
    shown = CliRunner().invoke(
        app, ["evaluate", str(pictures), "--reference", str(person), "--family", "tiny", "--json"]
    )
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["metrics"]["person_found"]["value"] == 1
    assert "text_score" in shown.stderr and "waist_girth" in shown.stderr
