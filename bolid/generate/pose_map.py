"""The pose of a person in a photo, drawn as openpose ControlNets take it."""

from __future__ import annotations

import os

import numpy as np

from bolid.errors import BolidError
from bolid.method.openpose import draw_openpose
from bolid.models.families import Family


def read_pose(photo: str | os.PathLike[str], family: Family, device: str = "cpu") -> np.ndarray:
    """The pose of the (main) person in a photo, drawn at the family's picture size: uint8 [height, width, 3].

    The photo is cut to the family's proportions around the person, as training photos are.
    Raises BolidError when no person is recognised in it.
    """
    from bolid.backends.people import pose_detector
    from bolid.formats.images import read_photo
    from bolid.views import choose_person, person_crop, whole_box

    model = pose_detector(family.require("pose"), device)
    image = read_photo(photo, max_side=1536)
    person = choose_person(model.detect([image])[0], "main")
    if isinstance(person, str):
        raise BolidError(
            f"--pose-from {photo}: {person}",
            "give a photo in which one person can be seen at least to the hips; the tiny family knows only rendered "
            "people"
            if family.name == "tiny"
            else "give a photo in which one person can be seen at least to the hips",
        )
    _, _, points = person_crop(image, whole_box(person, image.shape[:2]), person.keypoints, family.image_size)
    return draw_openpose(points, family.image_size)
