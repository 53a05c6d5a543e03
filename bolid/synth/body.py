"""The bodies of synthetic people: Anny (Apache-2.0, CC0 shapes), its keypoints and its body ratios."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from bolid.method.keypoints import NAMES
from bolid.synth.geometry import quiet_warp
from bolid.synth.people import RATIO_NAMES, SyntheticPerson

BODY_FILE = Path(__file__).parent / "anny-adults.safetensors"
"""The part of Anny used here, written by examples/tiny_family/make_body.py (Apache-2.0; shapes CC0)."""
ARM_BONES = ("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
HEAD_BONES = ("head", "eye")
"""How the names of an arm's and the head's bones begin."""


def load_anny() -> Any:
    """Anny with the shape changes of people.py, from BODY_FILE: in seconds; Anny's own first start takes minutes."""
    import dataclasses

    import anny
    import torch
    from anny.models.model_data import ModelData, RigConfig

    data = ModelData.load_safetensors(BODY_FILE)
    data = dataclasses.replace(data, blendshapes=data.blendshapes.float())
    rig = RigConfig.from_string("anny")
    return anny.Anny.from_model_data(
        data,
        pose_parameterization="local-ref",
        bone_orientation=rig.bone_orientation,
        root_identity_orientation=rig.root_identity_orientation,
    ).to(torch.float32)


@functools.cache
def anny_body() -> AnnyBody:
    """The body model, loaded once a process."""
    quiet_warp()
    return AnnyBody()


class AnnyBody:
    """Anny, its keypoints, and the canonical coordinates of its V vertices (see render.py)."""

    def __init__(self) -> None:
        import anny
        import scipy.sparse
        import torch
        from anny.face_segmentation import get_face_segmentation_mask

        self.torch = torch
        self.model = load_anny()
        self.regress = anny.KeypointsRegressor.coco(self.model, labels=list(NAMES)).float()
        self.faces = self.model.faces.numpy().astype(np.int32)
        n = len(self.model.template_vertices)
        corner = self.faces.reshape(-1)
        face_index = np.repeat(np.arange(len(self.faces)), 3)
        self.vertex_faces = scipy.sparse.csr_matrix(
            (np.ones(len(corner), np.float32), (corner, face_index)), (n, len(self.faces))
        )

        neutral = {"gender": 0.5, "age": 0.75, "muscle": 0.5, "weight": 0.5, "height": 0.5, "proportions": 0.5}
        rest, heads, _ = self.rest(neutral, {})
        stature = float(np.ptp(rest[:, 2]))
        self.canonical = (rest - [0, 0, rest[:, 2].min()]) / stature
        joints = (heads - [0, 0, rest[:, 2].min()]) / stature
        joint = dict(zip(self.model.bone_labels, joints, strict=True))
        keypoints = self.keypoints_of(self.canonical[None])[0]
        kp = dict(zip(NAMES, keypoints, strict=True))

        def weight_of(*prefixes: str) -> np.ndarray:
            bones = [i for i, name in enumerate(self.model.bone_labels) if name.startswith(prefixes)]
            mask = np.isin(self.model.vertex_bone_indices.numpy(), bones)
            return (self.model.vertex_bone_weights.numpy() * mask).sum(1).astype(np.float32)

        self.arm, self.head = weight_of(*ARM_BONES), weight_of(*HEAD_BONES)
        # Position along the arm: 0 at the shoulder joint, 1 at the wrist (both arms alike).
        shoulder, wrist = joint["upperarm01.L"], joint["wrist.L"]
        axis = wrist - shoulder
        mirrored = self.canonical * [1, 1, 1]
        mirrored[:, 0] = np.abs(mirrored[:, 0])
        self.along_arm = (((mirrored - shoulder) @ axis) / (axis @ axis)).astype(np.float32)
        self.levels = {
            "waist": float(joint["spine03"][2]) + 0.004,
            "neck": float(joint["neck01"][2]) - 0.004,
            "knee": float(kp["left_knee"][2]),
            "ankle": float(kp["left_ankle"][2]),
            "hip": float(kp["left_hip"][2]),
            "chest": float(joint["spine01"][2]),
            "crotch": float(joint["upperleg02.L"][2]),
        }
        self.face_points = {"eye": kp["left_eye"], "nose": kp["nose"], "ear": kp["left_ear"], "top": 1.0}
        labels = list(self.model.blendshape_labels)
        corner_shift = self.model.blendshapes[labels.index("local_change:mouth-scale-horiz-incr")][:, 0].numpy()
        lips = (self.head > 0.5) & (self.canonical[:, 1] < kp["left_eye"][1])
        self.mouth_corner = int(np.argmax(np.where(lips, corner_shift, -1)))
        self.mouth_corner_right = int(np.argmin(np.where(lips, corner_shift, 1)))
        eyes = get_face_segmentation_mask(self.model, ["eye_front.L", "eye_front.R"])
        self.eye = np.zeros(n, np.float32)
        self.eye[np.unique(self.faces[eyes])] = 1
        self.skin_bones = {name: self.model.bone_labels.index(name) for name in ("head", "root", "neck01")}
        self._band_cache = {
            "chest": self._band("chest", 0.012),
            "hip_girth": self._band("crotch", 0.012, shift=0.028),
        }
        from anny import Anthropometry

        self.waist_loop = np.array(Anthropometry(self.model).waist_vertex_indices)

    def _band(self, level: str, half: float, shift: float = 0.0) -> np.ndarray:
        """Vertices of the trunk and legs within `half` of a level."""
        z = self.levels[level] + shift
        return np.flatnonzero((np.abs(self.canonical[:, 2] - z) < half) & (self.arm < 0.05))

    def coefficients(self, phenotypes: dict[str, float], local_changes: dict[str, float]) -> Any:
        """Weights of Anny's blend shapes for one body."""
        parameters = self.model.get_tensor_inputs(
            None,
            {k: self.torch.tensor([v]) for k, v in phenotypes.items()},
            {k: self.torch.tensor([v]) for k, v in local_changes.items()},
            None,
        )
        return self.model._get_phenotype_blendshape_coefficients(*parameters[1:])

    def rest(
        self, phenotypes: dict[str, float], local_changes: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Vertices [V, 3] in metres at rest, bone heads [J, 3], and Anny's own rest model for posing."""
        with self.torch.no_grad():
            model = self.model.get_rest_model(self.coefficients(phenotypes, local_changes))
        return model["rest_vertices"][0].numpy(), model["rest_bone_heads"][0].numpy(), model

    def keypoints_of(self, vertices: np.ndarray) -> np.ndarray:
        """COCO keypoints [B, 17, 3] of vertices [B, V, 3]."""
        return self.regress({"vertices": self.torch.as_tensor(vertices, dtype=self.torch.float32)}).numpy()

    def pose(self, rest_model: dict[str, Any], rotations: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [V, 3] in the pose, and each bone's transform from the rest [J, 4, 4]."""
        torch = self.torch
        pose = torch.eye(4).repeat(1, self.model.bone_count, 1, 1)
        for bone, matrix in rotations.items():
            pose[0, self.model.bone_labels.index(bone), :3, :3] = torch.as_tensor(matrix, dtype=torch.float32)
        with torch.no_grad():
            transforms, _ = self.model.get_bone_transforms(pose, rest_model["rest_bone_poses"])
            vertices = self.model.get_skinned_vertices(rest_model["rest_vertices"], transforms)
        if not torch.is_tensor(transforms):
            transforms = transforms.to_homogeneous()
        return vertices[0].numpy().astype(np.float32), transforms[0].numpy()

    def normals(self, vertices: np.ndarray) -> np.ndarray:
        """Unit normals [V, 3] of vertices [V, 3]."""
        a, b, c = (vertices[self.faces[:, i]] for i in range(3))
        normal = self.vertex_faces @ np.cross(b - a, c - a).astype(np.float32)
        return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)

    def ratios(self, rest: np.ndarray) -> dict[str, float]:
        """The scale-free body ratios (RATIO_NAMES) of a rest body [V, 3]."""
        from scipy.spatial import ConvexHull

        stature = float(np.ptp(rest[:, 2]))
        kp = dict(zip(NAMES, self.keypoints_of(rest[None])[0], strict=True))

        def length(*names: str) -> float:
            return float(sum(np.linalg.norm(kp[a] - kp[b]) for a, b in itertools.pairwise(names)))

        def girth(indices: np.ndarray) -> float:
            return float(ConvexHull(rest[indices][:, :2]).area)  # in the plane, `area` is the perimeter

        shoulders, hips = (kp["left_shoulder"] + kp["right_shoulder"]) / 2, (kp["left_hip"] + kp["right_hip"]) / 2
        chin = rest[
            (self.head > 0.9)
            & (np.abs(self.canonical[:, 0]) < 0.01)
            & (self.canonical[:, 1] < self.face_points["eye"][1])
        ]
        waist = rest[self.waist_loop]
        a, b, c = (rest[self.faces[:, i]] for i in range(3))
        values = {
            "leg": length("left_hip", "left_knee", "left_ankle"),
            "arm": length("left_shoulder", "left_elbow", "left_wrist"),
            "torso": float(np.linalg.norm(shoulders - hips)),
            "head": float(rest[:, 2].max() - chin[:, 2].min()),
            "shoulder_breadth": length("left_shoulder", "right_shoulder"),
            "hip_breadth": float(np.ptp(rest[self._band_cache["hip_girth"]][:, 0])),
            "chest_girth": girth(self._band_cache["chest"]),
            "waist_girth": float(np.linalg.norm(waist - np.roll(waist, 1, 0), axis=1).sum()),
            "hip_girth": girth(self._band_cache["hip_girth"]),
        }
        values = {name: value / stature for name, value in values.items()}
        values["volume"] = float(abs(np.einsum("ij,ij->i", np.cross(a, b), c).sum()) / 6 / stature**3)
        return {name: round(values[name], 6) for name in RATIO_NAMES}


def body_ratios(person: SyntheticPerson) -> dict[str, float]:
    """The scale-free body ratios (RATIO_NAMES) of a person."""
    body = anny_body()
    return body.ratios(body.rest(person.phenotypes, person.local_changes)[0])
