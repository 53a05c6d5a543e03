"""`generate --refine-face`: heads are found, cut out, sampled again and laid back; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from generate_world import make_pictures, make_world, read_picture, same
from PIL import Image

from bolid.backends.face import FaceModel
from bolid.backends.pose import PoseModel
from bolid.generate.refine import FaceRefiner, blend_head, cut, portrait_prompt, window
from bolid.models.families import get_family
from bolid.synth.people import sample_person, sample_plan
from bolid.synth.render import RenderedPhoto, Renderer

SIZE = (128, 96)


def photo_of(seed: int, size: tuple[int, int], **plan) -> RenderedPhoto:
    person = sample_person(seed)
    return Renderer(person, size).render(sample_plan(person, 0, yaw=0.0, **plan))


@pytest.fixture(scope="module")
def refiner():
    family = get_family("tiny")
    return FaceRefiner(FaceModel(family.require("face")), PoseModel(family.require("pose")), SIZE)


@pytest.fixture(scope="module")
def full_body():
    """A photo of a whole person, uint8 [512,384,3], and where their face is: left, top, right, bottom."""
    photo = photo_of(100_003, (512, 384), framing="full body", pose="standing")
    return photo.image, np.array(photo.truth["face_box"])


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a full body photo of a man waving", "a portrait of a man waving"),
        ("a full-length photograph of a woman", "a portrait of a woman"),
        ("a three-quarter photo of a man", "a portrait of a man"),
        ("a woman on a beach", "a woman on a beach"),
        ("a portrait of a full body photo of a man", "a portrait of a portrait of a man"),
    ],
)
def test_portrait_prompt(prompt, wanted):
    assert portrait_prompt(prompt) == wanted


def test_the_head_is_found_and_cut_out_as_a_portrait(refiner, full_body):
    picture, (left, top, right, bottom) = full_body
    head = refiner.find(picture)
    assert abs(head.x - (left + right) / 2) < 8 and abs(head.y - (top + bottom) / 2) < 8
    crop = cut(picture, window(head, SIZE), SIZE)
    assert crop.shape == (*SIZE, 3)
    again = refiner.find(crop)
    assert 0.2 < again.height / SIZE[0] < 0.45 and abs(again.x - SIZE[1] / 2) < 8


def test_where_no_face_is_detected_the_pose_says_where_the_head_is(refiner, full_body, monkeypatch):
    by_face = refiner.find(full_body[0])
    monkeypatch.setattr(refiner, "faces", type("NoFaces", (), {"detect": lambda self, picture: []})())
    by_pose = refiner.find(full_body[0])
    assert abs(by_pose.x - by_face.x) < 10 and abs(by_pose.y - by_face.y) < 15
    assert 0.6 < by_pose.height / by_face.height < 1.6
    assert refiner.find(np.full((128, 96, 3), 200, np.uint8)) is None


def test_only_the_head_changes(refiner, full_body):
    picture, (left, top, right, bottom) = full_body
    asked = []

    def sample(crops, prompts, seeds, strength):
        asked.append((prompts, seeds, strength))
        return [np.zeros_like(crop) for crop in crops]

    plain = np.full((128, 96, 3), 200, np.uint8)
    changed, same_as_before = refiner([picture, plain], ["a full body photo of a man", "nobody"], [5, 6], sample)
    assert asked == [(["a portrait of a man"], [5], 0.5)]
    assert np.array_equal(same_as_before, plain)
    middle = changed[int((top + bottom) / 2), int((left + right) / 2)]
    assert middle.max() == 0
    far = np.ones(picture.shape[:2], bool)
    margin = int(bottom - top)
    far[int(top) - margin : int(bottom) + margin, int(left) - margin : int(right) + margin] = False
    assert np.array_equal(changed[far], picture[far])


def test_a_head_laid_back_unchanged_is_the_same_picture(refiner, full_body):
    picture, _ = full_body
    head = refiner.find(picture)
    place = window(head, SIZE)
    back = blend_head(picture, cut(picture, place, SIZE), place, head)
    assert np.abs(back.astype(int) - picture).mean() < 0.5
    assert np.abs(back.astype(int) - picture).max() < 120  # only thin lines get softer


def test_a_large_face_is_left_alone(refiner):
    portrait = photo_of(100_004, SIZE, framing="portrait").image

    def never(*_):
        raise AssertionError("sampled again")

    assert np.array_equal(refiner([portrait], ["a portrait"], [1], never)[0], portrait)


def test_generate_records_it(tmp_path):
    tiny = get_family("tiny")
    world = make_world(tmp_path)
    text = open(world.family).read()
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("pose =", "face =")))
    open(world.family, "w").write(text + f"\npose = '{tiny.pose}'\nface = '{tiny.face}'\n")
    plain = make_pictures(world, tmp_path / "plain", ["a man"])
    refined = make_pictures(world, tmp_path / "refined", ["a man"], refine_face=True)
    assert same(plain, refined)  # a random base's pictures show nobody
    record = read_picture(next((tmp_path / "refined").glob("*.png")))
    assert record["config"]["refine_face"] is True and "refine_face" in record["inputs"]
    assert "refine_face" not in read_picture(next((tmp_path / "plain").glob("*.png")))["config"]
    assert Image.open(next((tmp_path / "refined").glob("*.png"))).size == (48, 64)
