"""The mesh of an adult's body: shape parameters -> vertices in metres, at rest and in a pose.

The body is Anny's. Its own statures run from 1.3 to 2.4 m over the parameters that `bolid.synth` draws, which no adult
population does, so size is a parameter of its own here: Anny's parameters say the proportions, and the mesh is scaled
to the stature. Photos do not show size, so for them the two descriptions are the same.

Shapes: B bodies, P parameters, V vertices, F triangles. Axes: x to the person's left, y to the back, z up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bolid.body.rest_mesh import RestMesh
from bolid.errors import BolidError
from bolid.synth.body import ARM_BONES, HEAD_BONES
from bolid.synth.people import ADULT_AGE, BODY_CHANGES, HEAD_CHANGES, PHENOTYPES
from bolid.synth.poses import ASYMMETRIC_ROTATIONS, POSE_ROTATIONS, rotation

if TYPE_CHECKING:
    from bolid.synth.body import AnnyBody

CHANGES = (*BODY_CHANGES, *HEAD_CHANGES)
PARAMETERS = ("stature", *PHENOTYPES, *CHANGES)
"""Stature in metres, Anny's phenotypes (0..1) and its shape changes (-1..1; `{s}`: both sides alike)."""

MIN_STATURE, MAX_STATURE = 1.40, 2.20
"""Adults in metres. Nothing outside is a body here."""

NEUTRAL = {"gender": 0.5, "age": 0.75, "muscle": 0.5, "weight": 0.5, "height": 0.5, "proportions": 0.5}
"""The body whose vertices give the canonical coordinates."""

A_POSE = "a-pose"
"""The pose at rest: arms 45 degrees down."""


def bounds() -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each parameter, each [P]: what the mesh takes, adults only."""
    limits = {"stature": (MIN_STATURE, MAX_STATURE), **{name: (0.0, 1.0) for name in PHENOTYPES}}
    limits["age"] = (ADULT_AGE, 1.0)
    low, high = np.array([limits.get(name, (-1.0, 1.0)) for name in PARAMETERS]).T
    return low, high


def parameters_of(phenotypes: Mapping[str, float], local_changes: Mapping[str, float], stature: float) -> np.ndarray:
    """[P] of a synthetic person (of whose two sides the left is taken: they are alike) at this stature in metres."""
    changes = [local_changes.get(name.format(s="l"), 0.0) for name in CHANGES]
    return np.array([stature, *(phenotypes[name] for name in PHENOTYPES), *changes])


def poses() -> tuple[str, ...]:
    """The names of the poses that `BodyModel.posed` knows."""
    return (A_POSE, *POSE_ROTATIONS)


class BodyModel:
    """Anny, ready to make bodies. Build it once: `body_model()`.

    `faces` int32 [F, 3]; `canonical` f32 [V, 3]: where each vertex lies on the neutral adult, over stature, floor at 0;
    `joints`: bone -> where it begins, in the same coordinates; `arm`, `head` f32 [V]: how far a vertex belongs to one.
    """

    def __init__(self) -> None:
        self._rest = rest = RestMesh()
        self.faces: np.ndarray = rest.faces
        self.arm, self.head = rest.belonging(ARM_BONES), rest.belonging(HEAD_BONES)
        sources = {name.format(s=side): PARAMETERS.index(name) for name in CHANGES for side in "lr"}
        self._phenotypes = [PARAMETERS.index(name) for name in rest.phenotypes]
        self._changes = [sources[label] for label in rest.changes]
        neutral = np.array([[NEUTRAL.get(name, 0.0) for name in PARAMETERS]])
        coefficients = self._coefficients(neutral)
        vertices, heads = rest.vertices(coefficients)[0], rest.bone_heads(coefficients)[0]
        stature, floor = float(np.ptp(vertices[:, 2])), np.array([0, 0, vertices[:, 2].min()])
        self.canonical: np.ndarray = (vertices - floor) / stature
        self.joints: dict[str, np.ndarray] = dict(zip(rest.bones, (heads - floor) / stature, strict=True))

    @functools.cached_property
    def _anny(self) -> AnnyBody:
        """Anny itself: poses and keypoints are its own. It takes seconds to load."""
        from bolid.synth.body import anny_body

        return anny_body()

    def _coefficients(self, parameters: np.ndarray) -> np.ndarray:
        inputs = np.asarray(parameters)
        return self._rest.coefficients(inputs[:, self._phenotypes], inputs[:, self._changes])

    def _rest_model(self, parameters: np.ndarray) -> dict[str, Any]:
        """Anny's own, of one body [P], for posing."""
        import torch

        with torch.no_grad():
            return dict(self._anny.model.get_rest_model(torch.from_numpy(self._coefficients(parameters[None]))))

    def rest(self, parameters: np.ndarray) -> np.ndarray:
        """Vertices f64 [B, V, 3] in metres, in A-pose, floor at 0, of parameters [B, P]."""
        vertices = self._rest.vertices(self._coefficients(parameters)).astype(np.float64)
        low, high = vertices[:, :, 2].min(1), vertices[:, :, 2].max(1)
        scale = np.asarray(parameters)[:, 0] / (high - low)
        return (vertices - low[:, None, None] * [0, 0, 1]) * scale[:, None, None]

    def posed(self, parameters: np.ndarray, pose: str | Mapping[str, np.ndarray] = "standing") -> np.ndarray:
        """Vertices f64 [V, 3] in metres, floor at 0, of one body [P] in one of `poses()`, or by each bone's rotation.

        The scale is that at rest, so a body that squats is lower. Raises BolidError for an unknown pose.
        """
        if pose == A_POSE:
            return self.rest(parameters[None])[0]
        rotations = self.rotations(pose) if isinstance(pose, str) else dict(pose)
        model = self._rest_model(parameters)
        vertices, _ = self._anny.pose(model, rotations)
        scale = parameters[0] / np.ptp(model["rest_vertices"][0, :, 2].numpy())
        vertices = vertices.astype(np.float64) * scale
        return vertices - [0, 0, vertices[:, 2].min()]

    def rotations(self, pose: str) -> dict[str, np.ndarray]:
        """Each bone's rotation matrix in one of `poses()`. Raises BolidError for an unknown one."""
        if pose not in poses():
            raise BolidError(f"there is no pose {pose!r}", f"the poses are {', '.join(poses())}")
        angles: dict[str, tuple[float, float, float]] = {}
        for bone, (x, y, z) in POSE_ROTATIONS.get(pose, {}).items():
            angles[f"{bone}.L"], angles[f"{bone}.R"] = (x, y, z), (x, -y, -z)
        return {bone: rotation(*turn) for bone, turn in {**angles, **ASYMMETRIC_ROTATIONS.get(pose, {})}.items()}

    def skeleton(self, parameters: np.ndarray) -> tuple[list[str], list[int], np.ndarray, np.ndarray]:
        """(bones, the number of each one's parent or -1, where they begin [J, 3], COCO's keypoints [17, 3]) in metres
        of one body [P] at rest.
        """
        model = self._rest_model(parameters)
        vertices, heads = (model[name][0].double().numpy() for name in ("rest_vertices", "rest_bone_heads"))
        scale = parameters[0] / np.ptp(vertices[:, 2])
        parents = [int(parent) for parent in self._anny.model.bone_parents]
        return list(self._rest.bones), parents, heads * scale, self.keypoints(vertices) * scale

    def keypoints(self, vertices: np.ndarray) -> np.ndarray:
        """COCO's 17 keypoints [17, 3] in metres of vertices [V, 3]."""
        return self._anny.keypoints_of(vertices[None])[0]


@functools.cache
def body_model() -> BodyModel:
    """The body model, built once a process."""
    return BodyModel()


def vertex_distances(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance of each vertex [V] in metres of two bodies [V, 3] in one pose, both centred and the first scaled to the
    size of the second: their mean is PVE-T-SC (Sengupta et al. 2020, arXiv:2009.10013).
    """
    a, b = found - found.mean(0), truth - truth.mean(0)
    return np.linalg.norm(a * np.sqrt((b**2).sum() / (a**2).sum()) - b, axis=1)


def volume(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Volume [...] in cubic metres of closed meshes [..., V, 3]."""
    a, b, c = (vertices[..., faces[:, i], :] for i in range(3))
    return np.abs(np.einsum("...fi,...fi->...", np.cross(a, b), c)) / 6
