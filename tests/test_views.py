from __future__ import annotations

import numpy as np
import pytest

from bolid import views
from bolid.backends.pose import Detection
from bolid.views import choose_person, face_of, person_crop


def person(box=(20, 10, 60, 110), score=0.9, seen=range(17)) -> Detection:
    keypoints = np.zeros((17, 3), np.float32)
    left, top, right, bottom = box
    keypoints[:, 0] = np.linspace(left, right, 17)
    keypoints[:, 1] = np.linspace(top, bottom, 17)
    keypoints[list(seen), 2] = 0.9
    return Detection(np.array(box, np.float32), score, keypoints)


class Face:
    def __init__(self, box):
        self.box = np.array(box, np.float32)


def test_main_person_is_large_and_sure():
    small, large, doubtful = person((0, 0, 20, 60), 0.95), person(), person((0, 0, 200, 400), 0.3)
    assert choose_person([small, large, doubtful], "main") is large
    assert choose_person([large, doubtful], "only") is large  # a doubtful one does not count as a second
    assert choose_person([small, large], "only") == views.SEVERAL


def test_people_are_counted_from_the_left():
    left, right, doubtful = person((0, 0, 20, 60)), person((300, 0, 400, 300)), person((100, 0, 250, 300), 0.3)
    people = [right, doubtful, left]
    assert choose_person(people, "main") is right
    assert choose_person(people, 1) is left and choose_person(people, 2) is right
    assert choose_person(people, 3) == views.FEWER
    assert choose_person([right], 2) is right  # nobody else can be meant


def test_reasons_for_rejection():
    assert choose_person([], "main") == views.NO_PERSON
    assert choose_person([person(score=0.3)], "main") == views.UNSURE
    assert choose_person([person((0, 0, 10, 20))], "main") == views.SMALL
    assert choose_person([person(seen=(9, 10))], "main") == views.CUT_OFF  # a hand
    assert choose_person([person(seen=(0, 1, 2, 3, 4))], "main") == views.CUT_OFF  # a head
    assert choose_person([person(seen=(7, 8, 9, 10, 13, 14, 15, 16))], "main") == views.CUT_OFF  # limbs without a torso
    portrait = person(seen=(0, 1, 2, 3, 4, 5))  # one shoulder is beyond the picture's edge
    assert choose_person([portrait], "main") is portrait


def test_how_far_down_a_photo_shows_a_person():
    shown = {"feet": range(17), "knees": range(15), "hips": range(13), "shoulders": range(11), "head": range(5)}
    for part, seen in shown.items():
        assert views.lowest_part(person(seen=seen).keypoints) == part
    assert views.lowest_part(person(seen=range(16)).keypoints) == "knees"  # one foot alone
    assert views.lowest_part(person(seen=[15, 16]).keypoints) == "feet"  # whatever hides the rest


def test_the_box_holds_the_seen_keypoints():
    raised = person((20, 10, 60, 110))
    raised.keypoints[9] = (30, 2, 0.9)
    raised.keypoints[10] = (90, 50, 0.1)  # not seen
    raised.keypoints[15] = (40, 130, 0.9)
    assert views.whole_box(raised, (120, 80)).tolist() == [20, 2, 60, 120]


def test_the_face_belongs_to_the_body():
    someone = person((20, 10, 60, 110))
    head = someone.keypoints[:5, :2].mean(axis=0)
    near = Face([*(head - 6), *(head + 8)])
    other = Face([100, 10, 114, 26])
    assert face_of(someone, [other, near]) is near
    assert face_of(someone, [other]) is None
    assert face_of(person(seen=range(5, 17)), [near]) is None  # seen from behind
    assert face_of(someone, []) is None


@pytest.mark.parametrize(
    ("shape", "box", "window"),
    [
        ((256, 192), (40, 20, 150, 250), (0, 0, 192, 256)),  # the format itself: all of it
        ((300, 800), (600, 10, 700, 290), (537.5, 0, 762.5, 300)),  # landscape: full height around the person
        ((300, 800), (760, 10, 800, 290), (575, 0, 800, 300)),  # at the border
        ((800, 300), (50, 300, 250, 700), (0, 300, 300, 700)),  # full width, centred upright
        ((800, 600), (280, 380, 320, 460), (225, 320, 375, 520)),  # small: zoomed in until 40 %
        ((800, 600), (100, 400, 400, 480), (100, 240, 400, 640)),  # lying: never narrower than they are
    ],
)
def test_crop_window(shape, box, window):
    height, width = shape
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 / width, y * 255 / height, np.zeros_like(x)], -1).astype(np.uint8)
    keypoints = np.array([[*box[:2], 0.9], [*box[2:], 0.9], [-50, 0, 0.9]] + [[0, 0, 0]] * 14, np.float32)
    cut, new_box, moved = person_crop(image, np.array(box), keypoints, (128, 96))
    assert cut.shape == (128, 96, 3) and cut.dtype == np.uint8
    scale = 128 / (window[3] - window[1])
    expected = (np.array(box) - [*window[:2], *window[:2]]) * scale
    assert np.allclose(new_box, np.clip(expected, 0, [96, 128, 96, 128]), atol=0.75)
    # What lies under a keypoint is the same as before.
    centre = (np.array(window[:2]) + window[2:]) / 2
    before, after = image[int(centre[1]), int(centre[0])], cut[64, 48]
    assert np.abs(before.astype(int) - after).max() <= 3
    assert np.allclose(moved[:2, :2], expected.reshape(2, 2), atol=0.75)
    assert moved[2, 2] == 0  # outside the window: not seen


def test_crop_keeps_the_head_of_a_person_too_tall_for_it():
    keypoints = np.zeros((17, 3), np.float32)
    _, box, _ = person_crop(np.zeros((900, 300, 3), np.uint8), np.array([100, 50, 200, 850]), keypoints, (128, 96))
    assert 0 < box[1] < 8 and box[3] == 128


def test_unknown_rule():
    from bolid.errors import BolidError
    from bolid.models.families import get_family

    with pytest.raises(BolidError, match="--select-person is 'everyone'"):
        views.ViewReader(get_family(), person="everyone")
