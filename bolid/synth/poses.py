"""The poses that photos show, as rotations of Anny's bones."""

from __future__ import annotations

import numpy as np

from bolid.synth.people import PhotoPlan

# Joint rotations in degrees about (x, y, z) for the left side; the right side mirrors y and z.
# x: to the person's left, y: to the back, z: up. The rest pose holds the arms about 45 degrees down.
POSE_ROTATIONS: dict[str, dict[str, tuple[float, float, float]]] = {
    "standing": {"upperarm01": (0, 30, 0), "lowerarm01": (-6, 6, 0)},
    "walking": {"upperarm01": (0, 32, 0), "lowerarm01": (-22, 0, 0)},
    "waving": {"upperarm01": (0, 30, 0), "lowerarm01": (-6, 6, 0)},
    "hands on hips": {"upperarm01": (10, -6, -14), "lowerarm01": (0, 112, 34)},
    "arms raised": {"clavicle": (0, -14, 0), "upperarm01": (0, -98, 0), "lowerarm01": (0, -8, 0)},
    "arms spread": {"clavicle": (0, -4, 0), "upperarm01": (0, -42, 0), "lowerarm01": (0, 0, -14)},
    "squatting": {
        "upperarm01": (-50, 34, 10),
        "lowerarm01": (-30, 10, 0),
        "upperleg01": (-88, 8, 0),
        "lowerleg01": (108, 0, 0),
        "foot": (-22, 0, 0),
    },
}
ASYMMETRIC_ROTATIONS: dict[str, dict[str, tuple[float, float, float]]] = {
    "walking": {
        "upperleg01.L": (-27, 0, 0),
        "lowerleg01.L": (9, 0, 0),
        "upperleg01.R": (21, 0, 0),
        "lowerleg01.R": (26, 0, 0),
        "upperarm01.L": (24, 32, 0),
        "upperarm01.R": (-24, -32, 0),
        "foot.R": (14, 0, 0),
    },
    "waving": {"clavicle.R": (0, 8, 0), "upperarm01.R": (0, 52, 0), "lowerarm01.R": (0, 92, 0)},
    "squatting": {"spine03": (26, 0, 0), "neck01": (-20, 0, 0)},
}
"""Rotations that replace or add to the mirrored ones, bone by bone."""


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rotation matrix of Euler angles in degrees, x first."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians([x, y, z])), np.sin(np.radians([x, y, z]))
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


def joint_rotations(plan: PhotoPlan) -> dict[str, np.ndarray]:
    """Bone name -> rotation [3, 3] of the plan's pose, jittered by a few degrees."""
    rng = np.random.default_rng(plan.joint_jitter_seed)
    angles: dict[str, tuple[float, float, float]] = {}
    for bone, (x, y, z) in POSE_ROTATIONS[plan.pose].items():
        angles[f"{bone}.L"], angles[f"{bone}.R"] = (x, y, z), (x, -y, -z)
    angles.update(ASYMMETRIC_ROTATIONS.get(plan.pose, {}))
    jitter = {
        "upperarm01": 5,
        "lowerarm01": 6,
        "upperleg01": 3,
        "lowerleg01": 3,
        "spine03": 2.5,
        "neck01": 4,
        "head": 4,
    }
    rotations = {}
    for bone, sigma in jitter.items():
        for name in [f"{bone}.L", f"{bone}.R"] if bone[0] in "ul" else [bone]:
            base = np.array(angles.pop(name, (0, 0, 0)), float)
            noise = rng.normal(0, sigma, 3)
            if bone.startswith("lowerleg"):
                noise = np.array([abs(noise[0]), 0, 0])  # a knee bends one way
            rotations[name] = rotation(*(base + noise))
    rotations.update({bone: rotation(*xyz) for bone, xyz in angles.items()})
    return rotations
