"""bench: methods beside real photos and strangers, on rendered people; the protocol; copy-paste."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil

import pytest
import torch
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.evaluate import bench, make_benchmark
from bolid.evaluate.bounds import real_and_strangers
from bolid.evaluate.pictures import read_methods, reference_photos
from bolid.evaluate.results import DESCRIPTIONS, GROUPS
from bolid.method.metrics import copy_paste
from bolid.models.families import get_family
from bolid_cli.main import app


def unit(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


@pytest.mark.parametrize(("at", "expected"), [(0, 1.0), (60, -1.0), (30, 0.0), (90, -1.0), (15, 0.5)])
def test_copy_paste_is_multiid_benchs(at, expected):
    """The conditioning photo lies at 0 degrees, the held-out one at 60."""
    assert copy_paste(unit(at)[0], unit(60), unit(0)) == pytest.approx(expected)


def test_copy_paste_takes_the_nearest_photos_that_show_a_face():
    nothing = torch.full((1, 2), math.nan, dtype=torch.float64)
    found = copy_paste(unit(10)[0], torch.cat([unit(60, 90), nothing]), torch.cat([nothing, unit(-40, 20)]))
    assert found == copy_paste(unit(10)[0], unit(60), unit(20)) == pytest.approx(1)
    assert math.isnan(copy_paste(nothing[0], unit(60), unit(0)))
    assert math.isnan(copy_paste(unit(1)[0], nothing, unit(0)))
    assert math.isnan(copy_paste(unit(1)[0], unit(5), unit(5)))  # nothing lies between equal photos


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three people: four photos for the methods, four held out, a manifest of copies and of fresh photos."""
    from bolid.synth.render import write_photos

    root = tmp_path_factory.mktemp("bench")
    rows = []
    for seed in (100_000, 100_001, 100_002):
        given = write_photos(root / "conditioning", seed, 3, size=(256, 192), framing="full body", pose="standing")
        held = write_photos(root / "reference", seed, 4, size=(256, 192), start=3, framing="full body", pose="standing")
        fresh = write_photos(root / "fresh", seed, 1, size=(256, 192), start=7, framing="full body", pose="standing")
        assert len(held) == 4
        for method, photo in (("fresh", fresh[0]), ("copies", given[0])):
            prompt = photo.with_suffix(".txt").read_text().strip()
            file = photo.relative_to(root).as_posix()
            rows.append({"picture": file, "person": photo.parent.name, "prompt": prompt, "method": method})
    with (root / "methods.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["picture", "person", "prompt", "method"])
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def result(world):
    return bench(
        [world / "methods.csv"], reference=world / "reference", conditioning=world / "conditioning", family="tiny",
        device="cpu", html=world / "report.html",
    )  # fmt: skip


def test_real_photos_are_split_and_strangers_are_others(world):
    reference = reference_photos(world / "reference")
    before = {photo.source for photo in reference.pictures}
    limits = real_and_strangers(reference)
    real, strangers = (limits[name].pictures for name in ("real photos", "strangers"))
    assert len(real) == len(strangers) == len(reference.pictures) == 6
    assert {photo.source for photo in real} | {photo.source for photo in reference.pictures} == before
    assert all(one.person != other.person for one, other in zip(real, strangers, strict=True))
    assert [one.source for one in real] == [one.source for one in strangers]
    assert all(one.prompt != other.prompt for one, other in zip(real, strangers, strict=True))
    alone = reference_photos(world / "reference" / "p100000")
    assert set(real_and_strangers(alone)) == {"real photos"} and len(alone.pictures) == 2


def test_a_manifest_holds_several_methods(world, tmp_path):
    found = read_methods(world / "methods.csv")
    assert {name: len(folder.pictures) for name, folder in found.items()} == {"fresh": 3, "copies": 3}
    assert {picture.person for picture in found["fresh"].pictures} == {"p100000", "p100001", "p100002"}
    (tmp_path / "one.csv").write_text("picture,prompt\nnothing.png,a woman\n")
    with pytest.raises(BolidError, match="names no picture that can be read: the file cannot be read"):
        read_methods(tmp_path / "one.csv")
    (tmp_path / "one.csv").write_text("picture,prompt\n")
    with pytest.raises(BolidError, match="it has no rows"):
        read_methods(tmp_path / "one.csv")


@pytest.mark.slow
def test_methods_stand_between_real_photos_and_strangers(result, world):
    assert list(result.methods) == ["fresh", "copies"] and list(result.bounds) == ["real photos", "strangers"]
    fresh, copies = (result.methods[name].metrics for name in ("fresh", "copies"))
    real, strangers = (result.bounds[name].metrics for name in ("real photos", "strangers"))
    for name in ("body_auc", "face_similarity", "image_score", "text_score"):
        assert real[name].value > strangers[name].value, name
    assert copies["face_copy_paste"].value > 0.9 > 0.6 > fresh["face_copy_paste"].value
    assert abs(real["face_copy_paste"].value) < 0.6
    assert copies["copy_paste"].value > real["copy_paste"].value
    assert result.methods["fresh"].references == 6 and result.bounds["real photos"].pictures == 6
    assert "of pictures in which a face is found" in fresh["face_similarity"].note
    assert set(dataclasses.asdict(result)) == {"baseline", "methods", "differences", "bounds"}, "plain data"
    page = (world / "report.html").read_text()
    assert "<th>real photos</th><th>strangers</th>" in page
    assert f"{result.bounds['strangers'].metrics['image_score'].value:.3f}" in page


def test_every_metric_has_a_heading():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(DESCRIPTIONS)


@pytest.mark.slow
def test_several_recognisers_are_averaged(world, result):
    face = get_family("tiny").face
    twice = bench(
        [world / "methods.csv"], reference=world / "reference", conditioning=world / "conditioning", family="tiny",
        device="cpu", recognisers=[face, face],
    )  # fmt: skip
    ours, theirs = (found.methods["fresh"].metrics["face_similarity"] for found in (result, twice))
    assert theirs.value == pytest.approx(ours.value, abs=1e-4) and theirs.measured_by.startswith("mean of face, face")


@pytest.mark.slow
def test_another_body_reader_is_named(world):
    class Reader:
        ratio_names = ("leg", "arm")

        def predict(self, images):
            return [[image[:, :, 0].mean(), image[:, :, 1].mean()] for image in images]

    import numpy as np

    reader = Reader()
    reader.predict = lambda images: np.array(Reader().predict(images), np.float32)
    found = bench([world / "fresh"], reference=world / "reference", body_reader=("grey", reader), family="tiny")
    assert found.methods["fresh"].metrics["body_auc"].measured_by == "grey"
    assert set(found.methods["fresh"].ratios) == {"leg", "arm"} and not found.differences


@pytest.mark.slow
def test_the_protocol_is_made_from_seeds(tmp_path):
    made = make_benchmark(tmp_path / "bm", max_people=1, max_prompts=1)
    assert (made.people, made.photos, made.requests) == (1, 14, 2)
    rows = list(csv.DictReader((tmp_path / "bm" / "requests.csv").open()))
    assert [row["picture"] for row in rows] == ["p190000/000-0.png", "p190000/000-1.png"]
    assert rows[0]["prompt"].startswith("a full body photo of a man standing") and rows[0]["seed"] != rows[1]["seed"]
    assert len(list((tmp_path / "bm/conditioning/p190000").glob("*.jpg"))) == 8
    assert not list((tmp_path / "bm/conditioning").rglob("*.json"))  # the truth is no method's to read
    assert len(list((tmp_path / "bm/reference/p190000").glob("*.json"))) == 6
    assert json.loads((tmp_path / "bm/benchmark.json").read_text())["digest"] == made.digest
    shutil.rmtree(tmp_path / "bm/reference")
    assert make_benchmark(tmp_path / "bm", max_people=1, max_prompts=1) == made
    (tmp_path / "file").touch()
    with pytest.raises(BolidError, match="is a file"):
        make_benchmark(tmp_path / "file")


def test_refusals(world, tmp_path):
    with pytest.raises(BolidError, match="no benchmark: it has no requests.csv") as error:
        bench([world / "fresh"], tmp_path)
    assert "bolid bench make" in error.value.hint
    with pytest.raises(BolidError, match="no photos of the people"):
        bench([world / "fresh"])
    with pytest.raises(BolidError, match="given twice"):
        bench([world / "fresh"] * 3, reference=world / "reference")
    with pytest.raises(BolidError, match="no face model"):
        bench([world / "fresh"], reference=world / "reference", recognisers=[tmp_path], family="tiny")


@pytest.mark.slow
def test_on_the_command_line(world, tmp_path):
    folder = tmp_path / "bm"
    shutil.copytree(world / "reference", folder / "reference")
    shutil.copytree(world / "conditioning", folder / "conditioning")
    rows = [f"{n}/007.jpg,{n},a man on a beach,1" for n in ("p100000", "p100001", "p100002")]
    (folder / "requests.csv").write_text("\n".join(["picture,person,prompt,seed", *rows]) + "\n")
    command = ["bench", str(world / "fresh"), "--benchmark", str(folder), "--family", "tiny"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.stderr
    assert set(json.loads(shown.stdout)["bounds"]) == {"real photos", "strangers"}
    assert "body_auc" in shown.stderr and "strangers" in shown.stderr
    made = CliRunner().invoke(app, ["bench", "make", str(tmp_path / "new"), "--max-people", "1", "--max-prompts", "1"])
    assert made.exit_code == 0 and made.stdout.strip() == str(tmp_path / "new") and "digest" in made.stderr
