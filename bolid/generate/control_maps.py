"""What a ControlNet follows: the depth of each person's 3D body, or the pose of a photo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bolid.generate.identity import Identity
from bolid.generate.request import Request

if TYPE_CHECKING:
    import numpy as np


def maps_of_people(request: Request, people: Sequence[Identity]) -> list[np.ndarray]:
    """The map of each person, uint8 [H,W,3]; empty where the request has no ControlNet."""
    if (part := request.control_part) is None:
        return []
    family, size = request.family, request.family.image_size
    family.require(part)
    if request.pose_from is not None and not request.uses_shape:
        from bolid.generate.pose_map import read_pose

        return [read_pose(request.pose_from, family, request.device)] * len(people)
    from bolid.generate.shape_map import POSE, depth_picture
    from bolid.views import person_in_photo

    points = None
    if request.pose_from is not None:
        points = person_in_photo(request.pose_from, family, request.device)[1].keypoints
    return [depth_picture(person.shape(), request.pose or POSE, size, points) for person in people]
