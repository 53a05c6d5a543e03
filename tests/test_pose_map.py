from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from bolid.errors import BolidError
from bolid.generate.pose_map import read_pose
from bolid.method.openpose import coco_to_openpose, draw_openpose
from bolid.models.families import get_family

# A person who faces us, arms down, in 200 x 100 pixels: their right is on our left. COCO's order.
COCO = np.array(
    [
        [50, 20, 1], [54, 16, 1], [46, 16, 1], [58, 18, 1], [42, 18, 1], [66, 40, 1], [34, 40, 0.8], [72, 70, 1],
        [28, 70, 1], [74, 100, 1], [26, 100, 1], [60, 100, 1], [40, 100, 1], [60, 140, 1], [40, 140, 1], [60, 180, 1],
        [40, 180, 1],
    ],
    np.float32,
)  # fmt: skip


def test_coco_becomes_openpose():
    points = coco_to_openpose(COCO)
    assert points.shape == (18, 3)
    assert points[0].tolist() == COCO[0].tolist()
    assert points[1].tolist() == pytest.approx([50, 40, 0.8])  # the neck: between the shoulders, as sure as the worse
    right, left = points[[2, 3, 4, 8, 9, 10, 14, 16]], points[[5, 6, 7, 11, 12, 13, 15, 17]]
    assert (right[:, 0] < 50).all() and (left[:, 0] > 50).all()
    assert np.allclose(right[:, 1], left[:, 1])
    assert points[4, 1] == 100 and points[10, 1] == 180  # wrist, ankle


def test_limbs_have_their_colours():
    """OpenPose's: limbs at 60 % of their colour, joints at all of it, the right arm warm and the left one green."""
    picture = draw_openpose(COCO, (200, 100))
    assert picture.shape == (200, 100, 3) and picture.dtype == np.uint8
    for (x, y), colour in (
        ((42, 40), (153, 0, 0)),  # neck to right shoulder
        ((58, 40), (153, 51, 0)),  # neck to left shoulder
        ((31, 55), (153, 102, 0)),  # right upper arm
        ((69, 55), (102, 153, 0)),  # left upper arm
        ((40, 120), (0, 153, 51)),  # right thigh
        ((60, 120), (0, 102, 153)),  # left thigh
        ((50, 40), (255, 85, 0)),  # the neck itself
        ((40, 180), (0, 170, 255)),  # right ankle
    ):
        assert tuple(picture[y, x].tolist()) == colour, (x, y)
    assert (picture[:10] == 0).all() and (picture[190:] == 0).all()


def test_what_is_not_seen_is_not_drawn():
    hidden = COCO.copy()
    hidden[[5, 7, 9], 2] = 0.1  # the left arm
    picture = draw_openpose(hidden, (200, 100))
    assert (picture[55:95, 65:] == 0).all() and (picture[40, 58] == 0).all()
    assert (picture[40:100, 20:40].sum(axis=(0, 1)) > 0).any()
    hidden[:, 2] = 0
    assert (draw_openpose(hidden, (200, 100)) == 0).all()


def test_sticks_are_as_wide_as_the_published_controlnets_expect():
    """8 pixels across at 512, in proportion elsewhere."""
    for size in ((512, 256), (1024, 512)):
        points = COCO * [size[1] / 100, size[0] / 200, 1]
        column = draw_openpose(points.astype(np.float32), size)[:, size[1] * 60 // 100]
        row = draw_openpose(points.astype(np.float32), size)[size[0] * 120 // 200]
        assert column.any()
        across = np.flatnonzero(row.any(axis=1))
        width = (across < size[1] // 2).sum()
        assert abs(width - size[0] / 64) <= 2


def test_the_pose_of_a_rendered_person(rendered_people):
    """Through the family's own pose model: the skeleton is where the true shoulders and hips are."""
    family = get_family("tiny")
    photos = sorted(rendered_people.glob("*/*.jpg"))
    truths = [json.loads(path.with_suffix(".json").read_text()) for path in photos]
    photo, truth = next(
        (path, truth)
        for path, truth in zip(photos, truths, strict=True)
        if truth["attributes"]["framing"] == "full body"
    )
    picture = read_pose(photo, family)
    assert picture.shape == (*family.image_size, 3)
    # They fill the picture, so it was not zoomed into: truth and drawing differ in size only.
    height, scale = family.image_size[0], family.image_size[0] / truth["height"]
    drawn = np.argwhere(picture.any(axis=2))[:, ::-1]
    torso = np.array(truth["keypoints"])[[5, 6, 11, 12], :2] * scale
    away = np.linalg.norm(torso[:, None] - drawn[None], axis=-1).min(axis=1)
    assert (away < 0.06 * height).all(), away / height


def test_photos_without_a_person(tmp_path):
    Image.new("RGB", (60, 80), (90, 120, 90)).save(tmp_path / "empty.png")
    with pytest.raises(BolidError, match="--pose-from .*empty.png: no person found") as error:
        read_pose(tmp_path / "empty.png", get_family("tiny"))
    assert "one person" in error.value.hint
    with pytest.raises(BolidError, match="absent.png cannot be read"):
        read_pose(tmp_path / "absent.png", get_family("tiny"))
