"""The pose of a person in a photo: rotations of a body's bones that put its joints where the photo's keypoints are.

Each start is one of the named poses, seen from some side. From there least squares finds the rotations, the camera's
scale and its shift: the keypoints' distances, weighted by their confidence, and the rotations' distance from the start,
which decides what one photo leaves open. The start with the least sum wins (SMPLify, Bogo et al. 2016,
arXiv:1607.08128, with named poses for its mixture of Gaussians).

Shapes: J joints that carry keypoints, R rotation angles, B bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bolid.errors import BolidError
from bolid.method.keypoints import HIPS, MIN_CONFIDENCE, NAMES, SHOULDERS

if TYPE_CHECKING:
    from bolid.body.mesh import BodyModel

Pose = Mapping[str, np.ndarray]
"""Bone -> rotation matrix [3, 3] from the pose at rest, in the body's axes."""

BONE_SD = {
    "root": 0.35, "spine03": 0.15, "neck01": 0.3, "upperarm01.L": 0.5, "upperarm01.R": 0.5, "lowerarm01.L": 0.5,
    "lowerarm01.R": 0.5, "upperleg01.L": 0.35, "upperleg01.R": 0.35, "lowerleg01.L": 0.3, "lowerleg01.R": 0.3,
}  # fmt: skip
"""Bone that turns -> standard deviation of its rotation from the initial pose, in radians."""
_HINGES = ("lowerleg01.L", "lowerleg01.R")  # turn about x alone, and one way
_CARRIERS = {
    "nose": "head", "left_eye": "head", "right_eye": "head", "left_ear": "head", "right_ear": "head",
    "left_shoulder": "upperarm01.L", "right_shoulder": "upperarm01.R", "left_elbow": "lowerarm01.L",
    "right_elbow": "lowerarm01.R", "left_wrist": "wrist.L", "right_wrist": "wrist.R", "left_hip": "upperleg01.L",
    "right_hip": "upperleg01.R", "left_knee": "lowerleg01.L", "right_knee": "lowerleg01.R", "left_ankle": "foot.L",
    "right_ankle": "foot.R",
}  # fmt: skip
"""COCO keypoint -> the bone that it moves with."""
TURNS = (0.0, 45.0, -45.0, 180.0)
KEYPOINT_SD = 0.02  # of a keypoint's place, over the person's height in the photo
DISTANCE = 3.0  # statures between camera and person


def fit_pose(model: BodyModel, parameters: np.ndarray, keypoints: np.ndarray) -> dict[str, np.ndarray]:
    """Bone -> rotation of the body [P] whose keypoints come nearest to `keypoints` [17, 3] (pixels, confidence).

    Raises BolidError where no torso is visible.
    """
    from scipy.optimize import least_squares

    from bolid.body.mesh import A_POSE, poses

    seen = keypoints[:, 2] >= MIN_CONFIDENCE
    if not (seen[list(SHOULDERS)].any() and seen[list(HIPS)].any()):
        raise BolidError("the photo shows no torso to fit a pose to", "give one that shows the person to the hips")
    problem = _Problem(model, parameters, keypoints[seen], seen)

    def improve(x: np.ndarray, start: np.ndarray, calls: int) -> tuple[float, np.ndarray]:
        found = least_squares(problem.residuals, x, problem.slope, args=(start,), max_nfev=calls, loss="soft_l1")
        return float(found.cost), found.x

    named = [model.rotations(name) for name in poses() if name != A_POSE]
    starts = [problem.start(rotations, turn) for rotations in named for turn in TURNS]
    rough = [(*improve(start, start, 6), start) for start in starts]
    fine = [improve(x, start, 30) for _, x, start in sorted(rough, key=lambda each: each[0])[:3]]
    return problem.rotations(min(fine, key=lambda each: each[0])[1])


class _Problem:
    """Residuals of one photo and one body. The unknowns: R angles, then log scale, and shift in x and y."""

    def __init__(self, model: BodyModel, parameters: np.ndarray, keypoints: np.ndarray, seen: np.ndarray) -> None:
        self.skeleton = model.skeleton(parameters)
        labels, parents, heads, rest = self.skeleton
        names = [name for name, shown in zip(NAMES, seen, strict=True) if shown]
        self.carriers = [labels.index(_CARRIERS[name]) for name in names]
        self.offsets = rest[seen] - heads[self.carriers]
        self.order = _ancestors(self.carriers, parents)
        self.size = max(float(np.ptp(keypoints[:, :2], axis=0).max()), 1.0)
        self.middle = keypoints[:, :2].mean(0)
        self.target = (keypoints[:, :2] - self.middle) / self.size
        self.weight = np.sqrt(keypoints[:, 2]) / KEYPOINT_SD
        self.angles = {bone: slice(3 * i, 3 * i + 3) for i, bone in enumerate(BONE_SD)}
        self.sd = np.repeat(list(BONE_SD.values()), 3)
        for bone in _HINGES:
            self.sd[self.angles[bone]] *= [1, 0.05, 0.05]
        self.stature = float(parameters[0])

    def start(self, rotations: Pose, turn: float) -> np.ndarray:
        """The unknowns of a named pose, turned to the left by `turn` degrees."""
        from scipy.spatial.transform import Rotation

        x = np.zeros(len(self.sd) + 3)
        for bone, place in self.angles.items():
            x[place] = Rotation.from_matrix(rotations.get(bone, np.eye(3))).as_rotvec()
        x[self.angles["root"]] = [0, 0, np.radians(turn)]
        flat = self.project(x[None])[0]
        x[-3] = np.log(1 / max(float(np.ptp(flat, axis=0).max()), 1e-6))
        x[-2:] = -np.exp(x[-3]) * flat.mean(0)
        return x

    def rotations(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Bone -> rotation matrix."""
        from scipy.spatial.transform import Rotation

        return {bone: Rotation.from_rotvec(x[place]).as_matrix() for bone, place in self.angles.items()}

    def project(self, x: np.ndarray) -> np.ndarray:
        """Unknowns [B, R + 3] -> the keypoints as the camera sees them, right and down over stature, [B, n, 2]."""
        from scipy.spatial.transform import Rotation

        labels, parents, heads, _ = self.skeleton
        angle = x[:, : len(self.sd)].reshape(-1, 3)
        turned = Rotation.from_rotvec(angle).as_matrix().reshape(len(x), -1, 3, 3)
        own = {labels.index(bone): turned[:, i] for i, bone in enumerate(BONE_SD)}
        rotation: dict[int, np.ndarray] = {}
        place: dict[int, np.ndarray] = {}
        for bone in self.order:
            parent = parents[bone]
            if parent < 0:
                rotation[bone], place[bone] = own[bone], np.zeros((len(x), 3))
                continue
            place[bone] = place[parent] + rotation[parent] @ (heads[bone] - heads[parent])
            rotation[bone] = rotation[parent] @ own[bone] if bone in own else rotation[parent]
        pairs = zip(self.carriers, self.offsets, strict=True)
        points = np.stack([place[bone] + rotation[bone] @ offset for bone, offset in pairs], 1) / self.stature
        return points[..., [0, 2]] * [1, -1] * DISTANCE / (DISTANCE + points[..., 1:2])

    def _all(self, x: np.ndarray, start: np.ndarray) -> np.ndarray:
        flat = np.exp(x[:, -3])[:, None, None] * self.project(x) + x[:, None, -2:]
        off = (flat - self.target) * self.weight[:, None]
        return np.concatenate([off.reshape(len(x), -1), (x - start)[:, : len(self.sd)] / self.sd], 1)

    def residuals(self, x: np.ndarray, start: np.ndarray) -> np.ndarray:
        """What least squares makes small."""
        return self._all(x[None], start)[0]

    def slope(self, x: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Their derivatives, by differences."""
        step = 1e-5
        near = self._all(np.concatenate([x[None], x + step * np.eye(len(x))]), start)
        return (near[1:] - near[0]).T / step


def _ancestors(bones: list[int], parents: list[int]) -> list[int]:
    """The bones and all that they hang from, parents first."""
    found = set[int]()
    for bone in bones:
        while bone >= 0 and bone not in found:
            found.add(bone)
            bone = parents[bone]
    return sorted(found, key=lambda bone: _depth(bone, parents))


def _depth(bone: int, parents: list[int]) -> int:
    return 0 if parents[bone] < 0 else 1 + _depth(parents[bone], parents)
