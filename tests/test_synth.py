"""Synthetic people: adults, dressed, repeatable, with a truth that fits the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.synth.people import (
    ADULT_AGE,
    BOTTOMS,
    COLORS,
    FRAMINGS,
    POSES,
    RATIO_NAMES,
    SCENES,
    SLEEVES,
    caption,
    sample_person,
    sample_plan,
)
from bolid_cli.main import app
from bolid_cli.synth import _seeds, _size

SIZE = (128, 96)


@pytest.fixture(scope="module")
def renderer():
    from bolid.synth.render import Renderer

    return Renderer(sample_person(7), SIZE)


def test_people_are_adults_and_repeatable():
    people = [sample_person(seed) for seed in range(500)]
    assert min(person.phenotypes["age"] for person in people) >= ADULT_AGE
    assert people[3] == sample_person(3)
    assert len({person.phenotypes["weight"] for person in people}) > 400


def test_every_plan_is_dressed_and_in_the_vocabulary():
    for seed in range(200):
        plan = sample_plan(sample_person(seed), seed % 8)
        assert plan.top_color in COLORS and plan.bottom_color in COLORS and plan.top_color != plan.bottom_color
        assert plan.bottom in BOTTOMS and plan.sleeves in SLEEVES
        assert plan.framing in FRAMINGS and plan.pose in POSES and plan.scene in SCENES
        assert not (plan.bottom == "skirt" and plan.pose == "squatting")
        if plan.framing == "portrait":
            assert plan.pose == "standing"


def test_captions_say_what_is_there():
    person = sample_person(11)
    plan = sample_plan(
        person,
        0,
        framing="full body",
        pose="waving",
        scene="snow",
        top_color="orange",
        bottom_color="blue",
        bottom="shorts",
        sleeves="short",
        name_build=False,
    )
    words = caption(person, plan)
    assert words.startswith("a full body photo of a ")
    assert words.endswith(" waving, in an orange short-sleeved top and blue shorts, in the snow")
    portrait = caption(person, sample_plan(person, 0, framing="portrait"))
    assert "standing" not in portrait and "trousers" not in portrait
    named = sum("tall" in caption(p, sample_plan(p, 0, name_build=True)) for p in map(sample_person, range(60)))
    assert named > 5


def test_same_plan_same_pixels(renderer):
    from bolid.synth.render import Renderer

    plan = sample_plan(renderer.person, 0)
    again = Renderer(sample_person(7), SIZE).render(plan)
    assert np.array_equal(renderer.render(plan).image, again.image)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_truth_fits_the_picture(renderer, framing):
    photo = renderer.render(sample_plan(renderer.person, 3, framing=framing, pose="standing", yaw=0.0))
    truth, (height, width) = photo.truth, SIZE
    assert photo.image.shape == (*SIZE, 3) and photo.image.dtype == np.uint8
    x0, y0, x1, y1 = truth["box"]
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    inside = [(x, y) for x, y, v in truth["keypoints"] if v]
    assert len(inside) >= {"full body": 17, "three-quarter": 11, "portrait": 5}[framing]
    for x, y in inside:
        assert x0 - 2 <= x <= x1 + 2 and y0 - 2 <= y <= y1 + 2
    nose, left_eye, right_eye = (truth["keypoints"][i] for i in range(3))
    assert nose[2] == 2 and left_eye[0] > nose[0] > right_eye[0]  # facing us: their left is our right
    landmarks = np.array(truth["face_landmarks"])
    assert landmarks[0, 0] < landmarks[1, 0] and landmarks[3, 0] < landmarks[4, 0]
    assert landmarks[:2, 1].max() < landmarks[2, 1] < landmarks[3:, 1].min()
    fx0, fy0, fx1, fy1 = truth["face_box"]
    assert (landmarks > [fx0, fy0]).all() and (landmarks < [fx1, fy1]).all()


def test_ratios_belong_to_the_person_and_differ_between_people(renderer):
    from bolid.synth.render import Renderer

    assert tuple(renderer.ratios) == RATIO_NAMES
    photos = [renderer.render(sample_plan(renderer.person, i)).truth["ratios"] for i in range(2)]
    assert photos[0] == photos[1] == renderer.ratios
    other = Renderer(sample_person(8), SIZE).ratios
    assert max(abs(other[name] / renderer.ratios[name] - 1) for name in RATIO_NAMES) > 0.05
    assert 0.35 < renderer.ratios["leg"] < 0.6 and 0.09 < renderer.ratios["head"] < 0.2


def test_colours_are_the_ones_named(renderer):
    plan = sample_plan(
        renderer.person,
        1,
        framing="full body",
        pose="standing",
        yaw=0.0,
        top_color="red",
        bottom_color="blue",
        bottom="trousers",
        scene="studio",
    )
    photo = renderer.render(plan)
    marks = np.array(photo.truth["keypoints"])
    chest = marks[[5, 6, 11, 12], :2].mean(0)
    knee = marks[13, :2]
    red = photo.image[int(chest[1]) - 8, int(chest[0])].astype(int)
    blue = photo.image[int(knee[1]), int(knee[0])].astype(int)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0]


def test_writing_goes_on_where_it_stopped(tmp_path):
    from bolid.synth.render import write_photos

    paths = write_photos(tmp_path, 5, 2, size=(64, 48))
    before = {path: path.read_bytes() for path in paths}
    paths[1].unlink()
    kept = paths[0].stat().st_mtime_ns
    assert write_photos(tmp_path, 5, 2, size=(64, 48)) == paths
    assert {path: path.read_bytes() for path in paths} == before and paths[0].stat().st_mtime_ns == kept
    truth = json.loads(paths[0].with_suffix(".json").read_text())
    assert truth["person"] == "p000005" and paths[0].with_suffix(".txt").read_text().strip()


@pytest.mark.parametrize("text", ["", "x", "5:5", "9:3", "-1", "0:2000000"])
def test_bad_people(text):
    with pytest.raises(BolidError, match="--person-seed is") as error:
        _seeds(text)
    assert "0:100" in error.value.hint


def test_people_and_sizes():
    assert _seeds("7") == [7] and _seeds("3:6") == [3, 4, 5]
    assert _size("384x512") == (512, 384)
    for bad in ("512", "10x10", "511x384", "9000x100"):
        with pytest.raises(BolidError, match="--size is"):
            _size(bad)


def test_one_kind_of_photo(tmp_path):
    command = ["synth", "--person-seed", "5", "--photos", "2", "--size", "96x128", "--framing"]
    assert CliRunner().invoke(app, [*command, "portrait", "-o", str(tmp_path)]).exit_code == 0
    captions = [path.read_text() for path in sorted(tmp_path.glob("*/*.txt"))]
    assert len(captions) == 2 and all(caption.startswith("a portrait of") for caption in captions)
    refused = CliRunner().invoke(app, [*command, "close-up", "-o", str(tmp_path / "none")])
    assert refused.exit_code == 2 and "hint: choose full-body, three-quarter or portrait" in refused.stderr
    assert not (tmp_path / "none").exists()
