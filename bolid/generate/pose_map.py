"""The pose of a person in a photo, drawn as openpose ControlNets take it."""

from __future__ import annotations

import os

import numpy as np

from bolid.method.openpose import draw_openpose
from bolid.models.families import Family


def read_pose(photo: str | os.PathLike[str], family: Family, device: str = "cpu") -> np.ndarray:
    """The pose of the (main) person in a photo, drawn at the family's picture size: uint8 [height, width, 3].

    The photo is cut to the family's proportions around the person, as training photos are.
    Raises BolidError when no person is recognised in it.
    """
    from bolid.views import person_crop, person_in_photo, whole_box

    image, person = person_in_photo(photo, family, device)
    _, _, points = person_crop(image, whole_box(person, image.shape[:2]), person.keypoints, family.image_size)
    return draw_openpose(points, family.image_size)
