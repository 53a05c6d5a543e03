"""The 3D body of a person in a pose, as the depth map that the family's depth ControlNet follows (--body-from shape).

P parameters of the body (`bolid.body.mesh`), D body dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bolid.errors import BolidError
from bolid.models.families import get_family

if TYPE_CHECKING:
    import torch

    from bolid.formats.profile import Profile
    from bolid.models.families import Family
    from bolid.person import Person, PersonReader

ADAPTER, SHAPE, BOTH = "adapter", "shape", "both"
BODY_FROM = (ADAPTER, SHAPE, BOTH)
"""Where the body of a picture comes from: the body branch, the 3D body, or both."""
POSE = "standing"
SHAPE_ALONE = "take of the person the 3D body alone: --body-from shape"


def shape_of_profile(profile: Profile) -> np.ndarray:
    """The parameters [P] of a profile's body: as stored, else inferred from its vector by its own family's model."""
    from bolid.body.profiles import shape_in

    if profile.body is not None:
        return shape_in(profile, None).mean
    family = get_family(profile.record["family"])
    return shape_in(profile, family.body_shape if family.has("body_shape") else None).mean


def shape_of_photo(reader: PersonReader, person: Person) -> np.ndarray:
    """The parameters [P] of the body that a photo shows."""
    return reader.shapes(person)[0].mean


def shape_of_vector(body_mean: torch.Tensor, body_encoder: str, family: Family) -> np.ndarray:
    """The parameters [P] of an invented person with c_body [D], as certain as from eight photos."""
    from bolid.body.body_vector import load_body_vectors
    from bolid.body.shape import population

    vectors = load_body_vectors(family.require("body_shape"), body_encoder)
    return vectors.shape_of(population().shape, body_mean.double().numpy(), vectors.logvar).mean


def check_pose(pose: str) -> None:
    """BolidError for a pose that the body model does not know."""
    from bolid.body.mesh import poses

    if pose not in poses():
        raise BolidError(f"--pose is {pose!r}", f"choose one of {', '.join(poses())}; or give --pose-from PHOTO")


def depth_picture(
    parameters: np.ndarray, pose: str, size: tuple[int, int], keypoints: np.ndarray | None = None
) -> np.ndarray:
    """The depth map of the body [P] in a pose, uint8 [H,W,3] of `size` (height, width).

    `keypoints` [17, 3]: those of a photo, whose pose takes the named one's place.
    """
    from bolid.body.maps import control_maps
    from bolid.body.mesh import body_model
    from bolid.body.pose_fit import fit_pose
    from bolid.body.shape import within_bounds

    if keypoints is not None:
        fitted = fit_pose(body_model(), within_bounds(parameters), keypoints)
        return control_maps(body_model(), within_bounds(parameters), ("depth",), pose=fitted, size=size)["depth"]
    return control_maps(body_model(), within_bounds(parameters), ("depth",), pose=pose, size=size)["depth"]
