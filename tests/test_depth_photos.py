"""The data of the depth ControlNet's training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from small_base import make_family

from bolid.errors import BolidError
from bolid.models.families import get_family
from bolid.synth.render import write_photos

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_family"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("depth")
    write_photos(root, 31, 4, size=(128, 96))
    return root


def test_the_depth_is_where_the_person_is(photos, tmp_path):
    from depth_photos import read_depth_photos

    family = get_family(make_family(tmp_path))
    found = read_depth_photos(photos, family, tmp_path / "work")
    count = len(found.captions)
    assert 0 < count <= 4 and found.latents.shape[:2] == (count, 2)
    assert found.depth.shape == (count, *family.image_size, 3)
    for depth, points in zip(found.depth, found.keypoints, strict=True):
        seen = points[points[:, 2] == 1][:, :2].astype(int)
        assert len(seen) > 4 and (depth[seen[:, 1], seen[:, 0], 0] > 0).mean() > 0.9
    again = read_depth_photos(photos, family, tmp_path / "work")
    assert np.array_equal(again.depth, found.depth) and again.captions.tolist() == found.captions.tolist()


def test_photos_that_were_made_otherwise_are_refused(photos, tmp_path):
    from depth_photos import read_depth_photos

    posed = tmp_path / "posed"
    write_photos(posed, 31, 2, size=(128, 96), pose="arms raised", framing="full body")
    with pytest.raises(BolidError, match="is not what its seed makes"):
        read_depth_photos(posed, get_family(make_family(tmp_path)), tmp_path / "work")
