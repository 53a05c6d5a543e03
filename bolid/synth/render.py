"""Photos of synthetic people: Anny bodies, dressed, posed, lit and drawn into a place.

The body is Anny's (Apache-2.0, CC0 shapes), the rasteriser a small Warp kernel on the CPU. Garments are not separate
meshes: every vertex knows where it lies on a canonical adult body ("canonical coordinates": metres over stature,
floor at 0, x to the person's left, y to the back, z up), and each pixel is skin or cloth by the
canonical point it shows. So a hem is a smooth line, whatever the pose. Skirts and long hair are added surfaces.
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bolid.run import atomic_path
from bolid.synth.people import (
    COLORS,
    RATIO_NAMES,
    Identity,
    PhotoPlan,
    attributes,
    caption,
    sample_identity,
    sample_plan,
)

COCO_KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
FOV = 28.0
"""Vertical field of view in degrees: a short telephoto, as portraits are taken."""
SUPERSAMPLING = 2
HAIR_THICKNESS = {"bald": 0.0, "short": 0.006, "full": 0.016, "bun": 0.006, "long": 0.011}  # of the stature

# Joint rotations in degrees about (x, y, z) for the left side; the right side mirrors y and z.
# x: to the person's left, y: to the back, z: up. The rest pose holds the arms about 45 degrees down.
_POSE_ROTATIONS: dict[str, dict[str, tuple[float, float, float]]] = {
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
_UNMIRRORED: dict[str, dict[str, tuple[float, float, float]]] = {
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


@dataclass(frozen=True)
class Photo:
    """One rendered photo: `image` uint8 [H, W, 3]; `truth` plain data (see `render`); `caption` text."""

    image: np.ndarray
    truth: dict
    caption: str


BODY_FILE = Path(__file__).parent / "anny-adults.safetensors"
"""The part of Anny used here, written by examples/tiny_family/make_body.py (Apache-2.0; shapes CC0)."""


def load_anny():
    """Anny with the shape changes of people.py, from BODY_FILE: seconds, where Anny's own first start takes minutes."""
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
def _anny() -> _Body:
    """Anny with the shape changes we use, and what we read off its canonical adult body (loaded once a process)."""
    import os
    import sys

    import warp as wp

    wp.config.log_level = wp.LOG_ERROR  # it talks on standard output, which is for data
    # Warp's C++ side warns of the missing CUDA driver on file descriptor 2, whatever the level is.
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            wp.init()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    return _Body()


class _Body:
    """Anny, its keypoints and the canonical coordinates of its vertices."""

    def __init__(self) -> None:
        import anny
        import scipy.sparse
        import torch
        from anny.face_segmentation import get_face_segmentation_mask

        self.torch = torch
        self.model = load_anny()
        self.regress = anny.KeypointsRegressor.coco(self.model, labels=list(COCO_KEYPOINTS)).float()
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
        kp = dict(zip(COCO_KEYPOINTS, keypoints, strict=True))

        def weight_of(*prefixes: str) -> np.ndarray:
            bones = [i for i, name in enumerate(self.model.bone_labels) if name.startswith(prefixes)]
            mask = np.isin(self.model.vertex_bone_indices.numpy(), bones)
            return (self.model.vertex_bone_weights.numpy() * mask).sum(1).astype(np.float32)

        self.arm = weight_of("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
        self.head = weight_of("head", "eye")
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
        z = self.levels[level] + shift
        return np.flatnonzero((np.abs(self.canonical[:, 2] - z) < half) & (self.arm < 0.05))

    def coefficients(self, phenotypes: dict[str, float], local_changes: dict[str, float]):
        parameters = self.model.get_tensor_inputs(
            None,
            {k: self.torch.tensor([v]) for k, v in phenotypes.items()},
            {k: self.torch.tensor([v]) for k, v in local_changes.items()},
            None,
        )
        return self.model._get_phenotype_blendshape_coefficients(*parameters[1:])

    def rest(self, phenotypes, local_changes) -> tuple[np.ndarray, np.ndarray, dict]:
        """Vertices [V, 3] in metres at rest, bone heads [J, 3], and Anny's own rest model for posing."""
        with self.torch.no_grad():
            model = self.model.get_rest_model(self.coefficients(phenotypes, local_changes))
        return model["rest_vertices"][0].numpy(), model["rest_bone_heads"][0].numpy(), model

    def keypoints_of(self, vertices: np.ndarray) -> np.ndarray:
        """COCO keypoints [B, 17, 3] of vertices [B, V, 3]."""
        return self.regress({"vertices": self.torch.as_tensor(vertices, dtype=self.torch.float32)}).numpy()

    def pose(self, rest_model: dict, rotations: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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
        a, b, c = (vertices[self.faces[:, i]] for i in range(3))
        normal = self.vertex_faces @ np.cross(b - a, c - a).astype(np.float32)
        return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)

    def ratios(self, rest: np.ndarray) -> dict[str, float]:
        """The scale-free body ratios (RATIO_NAMES) of a rest body [V, 3]."""
        from scipy.spatial import ConvexHull

        stature = float(np.ptp(rest[:, 2]))
        kp = dict(zip(COCO_KEYPOINTS, self.keypoints_of(rest[None])[0], strict=True))

        def length(*names: str) -> float:
            return float(sum(np.linalg.norm(kp[a] - kp[b]) for a, b in zip(names, names[1:], strict=False)))

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


@functools.cache
def _kernels():
    """The rasteriser: one CPU thread draws triangle after triangle into a depth buffer, so there are no races."""
    import warp as wp

    @wp.kernel
    def rasterise(
        points: wp.array(dtype=wp.vec3),
        faces: wp.array(dtype=wp.int32, ndim=2),
        depth: wp.array(dtype=wp.float32, ndim=2),
        triangle: wp.array(dtype=wp.int32, ndim=2),
        weights: wp.array(dtype=wp.vec3, ndim=2),
    ):
        f = wp.tid()
        a = points[faces[f, 0]]
        b = points[faces[f, 1]]
        c = points[faces[f, 2]]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if wp.abs(area) < 1.0e-9 or a[2] <= 0.0 or b[2] <= 0.0 or c[2] <= 0.0:
            return
        height = depth.shape[0]
        width = depth.shape[1]
        x0 = wp.max(int(wp.ceil(wp.min(a[0], wp.min(b[0], c[0])) - 0.5)), 0)
        x1 = wp.min(int(wp.floor(wp.max(a[0], wp.max(b[0], c[0])) - 0.5)), width - 1)
        y0 = wp.max(int(wp.ceil(wp.min(a[1], wp.min(b[1], c[1])) - 0.5)), 0)
        y1 = wp.min(int(wp.floor(wp.max(a[1], wp.max(b[1], c[1])) - 0.5)), height - 1)
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                px = float(x) + 0.5
                py = float(y) + 0.5
                wa = ((b[0] - px) * (c[1] - py) - (b[1] - py) * (c[0] - px)) / area
                wb = ((c[0] - px) * (a[1] - py) - (c[1] - py) * (a[0] - px)) / area
                wc = 1.0 - wa - wb
                if wa >= 0.0 and wb >= 0.0 and wc >= 0.0:
                    z = wa * a[2] + wb * b[2] + wc * c[2]
                    if z < depth[y, x]:
                        depth[y, x] = z
                        triangle[y, x] = f
                        weights[y, x] = wp.vec3(wa, wb, wc)

    return rasterise


def _rasterise(points: np.ndarray, faces: np.ndarray, height: int, width: int):
    """Depth [H, W] (inf where empty), triangle index [H, W] (-1 where empty), barycentric weights [H, W, 3]."""
    import warp as wp

    depth = wp.array(np.full((height, width), np.inf, np.float32), dtype=wp.float32, device="cpu")
    triangle = wp.array(np.full((height, width), -1, np.int32), dtype=wp.int32, device="cpu")
    weights = wp.zeros((height, width), dtype=wp.vec3, device="cpu")
    inputs = [
        wp.array(points.astype(np.float32), dtype=wp.vec3, device="cpu"),
        wp.array(faces, dtype=wp.int32, device="cpu"),
    ]
    wp.launch(_kernels(), dim=len(faces), inputs=[*inputs, depth, triangle, weights], device="cpu")
    return depth.numpy(), triangle.numpy(), weights.numpy()


def _rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rotation matrix of Euler angles in degrees, x first."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians([x, y, z])), np.sin(np.radians([x, y, z]))
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


def _joint_rotations(plan: PhotoPlan) -> dict[str, np.ndarray]:
    """Each bone's rotation in the plan's pose, jittered by a few degrees."""
    rng = np.random.default_rng(plan.joint_jitter_seed)
    angles: dict[str, tuple[float, float, float]] = {}
    for bone, (x, y, z) in _POSE_ROTATIONS[plan.pose].items():
        angles[f"{bone}.L"], angles[f"{bone}.R"] = (x, y, z), (x, -y, -z)
    angles.update(_UNMIRRORED.get(plan.pose, {}))
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
            rotations[name] = _rotation(*(base + noise))
    rotations.update({bone: _rotation(*xyz) for bone, xyz in angles.items()})
    return rotations


def body_ratios(identity: Identity) -> dict[str, float]:
    """The scale-free body ratios (RATIO_NAMES) of a person."""
    body = _anny()
    return body.ratios(body.rest(identity.phenotypes, identity.local_changes)[0])


class Renderer:
    """Renders photos of one identity (its body is built once).

    Args:
        identity: who.
        size: (height, width) of the photos in pixels; any portrait size, 256x192 and 512x384 are the usual ones.
    """

    def __init__(self, identity: Identity, size: tuple[int, int] = (512, 384)) -> None:
        self.identity, self.size = identity, size
        self.body = _anny()
        self.rest_vertices, _, self.rest_model = self.body.rest(identity.phenotypes, identity.local_changes)
        self.stature = float(np.ptp(self.rest_vertices[:, 2]))
        self.ratios = self.body.ratios(self.rest_vertices)

    def render(self, plan: PhotoPlan) -> Photo:
        """The photo, its caption and its truth: seed, attributes, phenotypes, ratios, keypoints [17][x, y, v]
        (v: 0 outside the picture, 1 hidden, 2 seen), box and face_box [x0, y0, x1, y1], face_landmarks [5][x, y] in
        InsightFace's order, face_yaw in degrees (None for a face turned away or outside)."""
        body, (height, width) = self.body, self.size
        vertices, transforms = body.pose(self.rest_model, _joint_rotations(plan))
        normals = body.normals(vertices)
        coverage = self._dress(plan)
        dressed = vertices + normals * coverage[:, None] * self.stature
        parts = [(dressed, body.faces)]
        if plan.bottom == "skirt":
            parts.append(self._skirt(dressed, transforms))
        if self.identity.hair_style in ("long", "bun"):
            parts.append(self._hair(transforms))

        # One mesh; `part` says which vertices are body (0), skirt (1), hair (2).
        offsets = np.cumsum([0] + [len(v) for v, _ in parts])
        kinds = (
            [0] + ([1] if plan.bottom == "skirt" else []) + ([2] if self.identity.hair_style in ("long", "bun") else [])
        )
        mesh = np.concatenate([v for v, _ in parts])
        faces = np.concatenate([f + o for (_, f), o in zip(parts, offsets[:-1], strict=True)]).astype(np.int32)
        part = np.concatenate([np.full(len(v), k, np.float32) for (v, _), k in zip(parts, kinds, strict=True)])

        turn = _rotation(0, 0, plan.yaw)
        keypoints = body.keypoints_of(vertices[None])[0]
        corners = vertices[[body.mouth_corner_right, body.mouth_corner]]
        floor = mesh[:, 2].min()
        mesh, keypoints, corners = ((p - [0, 0, floor]) @ turn.T for p in (mesh, keypoints, corners))
        camera = _Camera.framing(plan, mesh, keypoints, self.size)

        scale = SUPERSAMPLING
        points = camera.project(mesh) * [scale, scale, 1]
        depth, triangle, weights = _rasterise(points, faces, height * scale, width * scale)
        mesh_normals = np.concatenate([body.normals(dressed), *[_surface_normals(v, f) for v, f in parts[1:]]]) @ turn.T
        canonical = np.concatenate([body.canonical, *[np.zeros((len(v), 3)) for v, _ in parts[1:]]])
        fields = np.concatenate(
            [np.stack([body.arm, body.along_arm, body.head, body.eye], 1), np.zeros((len(mesh) - len(body.arm), 4))]
        )
        values = np.concatenate([mesh_normals, canonical, fields, part[:, None]], 1).astype(np.float32)

        seen = triangle >= 0
        corners_of = faces[triangle[seen]]
        pixel = np.einsum("pk,pkc->pc", weights[seen], values[corners_of])
        color = self._shade(plan, pixel, camera, part[corners_of[:, 0]])
        layer = np.zeros((height * scale, width * scale, 4), np.float32)
        layer[seen] = np.concatenate([color, np.ones((len(color), 1), np.float32)], 1)
        layer = layer.reshape(height, scale, width, scale, 4).mean((1, 3))  # premultiplied, so edges blend right

        background = _background(plan, camera, mesh, faces, self.size)
        image = layer[..., :3] + background * (1 - layer[..., 3:])
        image = np.clip(image, 0, 1)
        photo = (image * 255 + 0.5).astype(np.uint8)
        return Photo(
            photo, self._truth(plan, camera, layer[..., 3], depth, keypoints, corners), caption(self.identity, plan)
        )

    def _dress(self, plan: PhotoPlan) -> np.ndarray:
        """How far cloth and hair stand off the skin at each vertex, over stature [V]."""
        body, levels = self.body, self.body.levels
        z, loose = body.canonical[:, 2], plan.looseness
        trunk = body.arm < 0.5
        sleeve = 0.93 if plan.sleeves == "long" else 0.40
        top = np.where(
            trunk,
            _ramp(z, levels["waist"] - 0.01, 0.01) * _ramp(-z, -levels["neck"], 0.02),
            _ramp(-body.along_arm, -sleeve, 0.05),
        ) * (body.head < 0.5)
        hem = {"trousers": levels["ankle"] + 0.012, "shorts": levels["knee"] + 0.045, "skirt": levels["crotch"]}[
            plan.bottom
        ]
        low = np.where(trunk, _ramp(-z, -levels["waist"], 0.01) * _ramp(z, hem, 0.01), 0.0)
        shoe = _ramp(-z, -levels["ankle"] - 0.002, 0.006) * trunk
        hair = _hair_mask(body.canonical, body.head, body.face_points)
        thickness = HAIR_THICKNESS[self.identity.hair_style]
        return (top * (0.003 + 0.004 * loose) + low * (0.003 + 0.005 * loose) + shoe * 0.004 + hair * thickness).astype(
            np.float32
        )

    def _skirt(self, vertices: np.ndarray, transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A flared surface from the waist to above the knee that encloses both legs."""
        body, levels = self.body, self.body.levels
        legs = np.flatnonzero(
            (body.arm < 0.05)
            & (body.canonical[:, 2] < levels["waist"] + 0.02)
            & (body.canonical[:, 2] > levels["knee"] - 0.02)
        )
        frame = transforms[body.skin_bones["root"]][:3, :3]
        local, rows, columns = vertices[legs] @ frame, 12, 64
        angles = np.linspace(0, 2 * np.pi, columns, endpoint=False)
        directions = np.stack([np.cos(angles), np.sin(angles)], 1)
        heights = np.linspace(levels["waist"] + 0.004, levels["knee"] + 0.03, rows)
        waist = np.abs(body.canonical[legs, 2] - heights[0]) < 0.012
        center = (local[waist].max(0) + local[waist].min(0)) / 2
        rings, reach = [], np.zeros(columns)
        for row, level in enumerate(heights):
            band = np.abs(body.canonical[legs, 2] - level) < 0.030
            spread = ((local[band][:, :2] - center[:2]) @ directions.T).max(0)
            spread = (np.roll(spread, 1) + spread + np.roll(spread, -1)) / 3
            reach = np.maximum(spread + 0.009 * self.stature, reach + (0.0045 * self.stature if row else 0))
            z = center[2] - (heights[0] - level) * self.stature
            rings.append(np.concatenate([center[:2] + directions * reach[:, None], np.full((columns, 1), z)], 1))
        return (np.concatenate(rings) @ frame.T).astype(np.float32), _grid_faces(rows, columns, closed=True)

    def _hair(self, transforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Long hair: a curtain round the back of the head; a bun: a small sphere behind its top."""
        body = self.body
        head = self.rest_vertices[body.head > 0.9]
        eyes, ears = body.keypoints_of(self.rest_vertices[None])[0][[1, 3]]
        top, back, side = head[:, 2].max(), head[:, 1].max(), np.abs(head[:, 0]).max()
        if self.identity.hair_style == "bun":
            rows, columns, radius = 12, 20, 0.030 * self.stature
            center = np.array([0, back - 0.2 * radius, top - 0.35 * radius])
            polar, azimuth = np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns, endpoint=False)
            shape = np.stack(
                [
                    np.outer(np.sin(polar), np.cos(azimuth)),
                    np.outer(np.sin(polar), np.sin(azimuth)),
                    np.repeat(np.cos(polar)[:, None], columns, 1),
                ],
                -1,
            ).reshape(-1, 3)
            vertices, faces = center + radius * shape, _grid_faces(rows, columns, closed=True)
        else:
            rows, columns = 14, 40
            azimuth = np.radians(np.linspace(-28, 208, columns))  # 90 is straight back
            heights = np.linspace(eyes[2] + 0.2 * (top - eyes[2]), top - 0.19 * self.stature, rows)
            flare = np.linspace(1.02, 1.28, rows)[:, None]
            x = (side + 0.002 * self.stature) * np.cos(azimuth) * flare
            y = ears[1] + (back - ears[1] + 0.012 * self.stature) * np.sin(azimuth) * flare
            vertices = np.stack([x, y, np.repeat(heights[:, None], columns, 1)], -1).reshape(-1, 3)
            faces = _grid_faces(rows, columns, closed=False)
        moved = np.concatenate([vertices, np.ones((len(vertices), 1))], 1) @ transforms[body.skin_bones["head"]].T
        return moved[:, :3].astype(np.float32), faces

    def _shade(self, plan: PhotoPlan, pixel: np.ndarray, camera: _Camera, part: np.ndarray) -> np.ndarray:
        """Colour [P, 3] in 0..1 of pixels with (normal 3, canonical 3, arm, along_arm, head, eye, part)."""
        body, levels, who = self.body, self.body.levels, self.identity
        normal = pixel[:, :3] / np.maximum(np.linalg.norm(pixel[:, :3], axis=1, keepdims=True), 1e-9)
        x, y, z = pixel[:, 3], pixel[:, 4], pixel[:, 5]
        arm, along, head, eye = pixel[:, 6], pixel[:, 7], pixel[:, 8], pixel[:, 9]
        skin, hair = np.array(who.skin, np.float32), np.array(who.hair_color, np.float32)
        color = np.repeat(skin[None], len(pixel), 0)
        trunk = arm < 0.5

        points = body.face_points
        front = (head > 0.5) & (y < points["ear"][1] - 0.02)
        ex, ez = points["eye"][0], points["eye"][2]
        eye_x, eye_z = np.abs(x) - ex, z - ez
        mouth = body.canonical[body.mouth_corner]
        lips = front & ((x / (mouth[0] * 1.15)) ** 2 + ((z - mouth[2] + 0.001) / 0.0062) ** 2 < 1)
        color[lips] = skin * [0.86, 0.58, 0.56]
        brow = (
            front
            & (np.abs(eye_x) < 0.0125)
            & (np.abs(eye_z - 0.0155 + 0.10 * np.abs(eye_x - 0.002)) < 0.0023 * who.brow)
        )
        color[brow] = hair * 0.75
        white = eye > 0.5
        color[white] = (0.93, 0.93, 0.92)
        color[white & (eye_x**2 + eye_z**2 < 0.0042**2)] = who.eye_color
        color[white & (eye_x**2 + eye_z**2 < 0.0020**2)] = (0.03, 0.03, 0.03)
        if who.hair_style != "bald":
            hair_level = _hair_level(pixel[:, 3:6], points)
            color[(head > 0.5) & (hair_level > 0)] = hair

        sleeve = 0.93 if plan.sleeves == "long" else 0.40
        neck = levels["neck"] - 0.012 * np.clip(-y / 0.05, -1, 2.5) + 0.06 * np.maximum(np.abs(x) - 0.07, 0)
        top = np.where(trunk, (z > levels["waist"]) & (z < neck) & (head < 0.5), along < sleeve)
        hem = {"trousers": levels["ankle"] + 0.012, "shorts": levels["knee"] + 0.045, "skirt": levels["crotch"] - 0.01}[
            plan.bottom
        ]
        low = trunk & (z <= levels["waist"]) & (z > hem)
        color[top] = COLORS[plan.top_color]
        color[low] = COLORS[plan.bottom_color]
        color[trunk & (z < levels["ankle"] + 0.002)] = plan.shoe
        color[part == 1] = COLORS[plan.bottom_color]
        color[part == 2] = hair

        light = camera.light(plan)
        facing = normal @ light
        facing = np.where(part > 0, np.abs(facing), facing)  # skirts and long hair are seen from both sides
        sky = 0.5 + 0.5 * normal[:, 2]
        shade = 0.46 + 0.14 * sky + plan.light_strength * np.clip(facing * 0.82 + 0.18, 0, 1)
        return np.clip(color * shade[:, None], 0, 1).astype(np.float32)

    def _truth(self, plan, camera, alpha, depth, keypoints, corners) -> dict:
        height, width = self.size
        rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None
        flat = camera.project(keypoints)
        tolerance = (
            np.array([0.03] * 5 + [0.13, 0.13, 0.08, 0.08, 0.07, 0.07, 0.17, 0.17, 0.10, 0.10, 0.08, 0.08])
            * self.stature
        )
        marks = []
        for (px, py, pz), slack in zip(flat, tolerance, strict=True):
            inside = 0 <= px < width and 0 <= py < height
            seen = inside and depth[int(py * SUPERSAMPLING), int(px * SUPERSAMPLING)] > pz - slack
            marks.append([round(float(px), 2), round(float(py), 2), (2 if seen else 1) if inside else 0])
        landmarks = np.concatenate([flat[[2, 1, 0], :2], camera.project(corners)[:, :2]])  # picture's left to right
        face_yaw = _face_yaw(keypoints)
        whole = ((landmarks > 0) & (landmarks < [width, height])).all()
        face_box = None
        if whole and abs(face_yaw) < 65 and min(marks[i][2] for i in (0, 1, 2)) > 0:
            center = landmarks.mean(0)
            reach = max(
                np.linalg.norm(landmarks[2] - (landmarks[0] + landmarks[1]) / 2),
                np.linalg.norm(landmarks[3] - landmarks[0]) * 0.62,
                np.linalg.norm(landmarks[1] - landmarks[0]) * 0.8,
            )
            face_box = [
                center[0] - reach * 1.15,
                center[1] - reach * 1.45,
                center[0] + reach * 1.15,
                center[1] + reach * 1.35,
            ]
            face_box = [round(float(v), 2) for v in face_box]
        return {
            "seed": self.identity.seed,
            "person": self.identity.person,
            "photo": plan.index,
            "width": width,
            "height": height,
            "attributes": attributes(self.identity, plan),
            "phenotypes": self.identity.phenotypes,
            "ratios": self.ratios,
            "keypoints": marks,
            "box": box,
            "face_box": face_box,
            "face_landmarks": [[round(float(v), 2) for v in p] for p in landmarks] if face_box else None,
            "face_yaw": round(face_yaw, 1) if face_box else None,
        }


def _face_yaw(keypoints: np.ndarray) -> float:
    """Turn of the head against the camera in degrees, from the ears' direction."""
    ears = keypoints[3] - keypoints[4]
    return float(np.degrees(np.arctan2(ears[1], ears[0])))


def _ramp(value: np.ndarray, edge: float, width: float) -> np.ndarray:
    """0 below the edge, 1 above it, smooth over `width`."""
    t = np.clip((value - edge) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _hair_level(canonical: np.ndarray, points: dict) -> np.ndarray:
    """Height of a canonical point above the hairline (negative: skin)."""
    y, z = canonical[:, 1], canonical[:, 2]
    eye, ear = points["eye"], points["ear"]
    forehead = eye[2] + 0.62 * (1.0 - eye[2])
    line = np.interp(
        y,
        [eye[1], eye[1] + 0.022, ear[1] - 0.012, ear[1] + 0.012, ear[1] + 0.05],
        [forehead, forehead - 0.006, ear[2] + 0.016, ear[2] - 0.004, ear[2] - 0.028],
    )
    return z - line


def _hair_mask(canonical: np.ndarray, head: np.ndarray, points: dict) -> np.ndarray:
    """0..1: how much of the hair's thickness stands at each vertex; ears stay out."""
    ear = points["ear"]
    beside = (
        (np.abs(canonical[:, 0]) > abs(ear[0]) - 0.006)
        & (np.abs(canonical[:, 1] - ear[1]) < 0.03)
        & (canonical[:, 2] < ear[2] + 0.02)
    )
    return _ramp(_hair_level(canonical, points), 0.004, 0.012) * (head > 0.5) * ~beside


def _grid_faces(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Triangles of a rows x columns grid of vertices; `closed` joins the last column to the first."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij")
    a, b = i * columns + j, i * columns + (j + 1) % columns
    c, d = a + columns, b + columns
    return np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)]).astype(
        np.int32
    )


def _surface_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.zeros_like(vertices)
    flat = np.cross(b - a, c - a)
    for i in range(3):
        np.add.at(normal, faces[:, i], flat)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class _Camera:
    """A pinhole camera in front of the person (at -y), looking along +y, tilted by `pitch`."""

    position: np.ndarray
    rotation: np.ndarray  # rows: right, down, forward
    focal: float  # pixels
    center: tuple[float, float]  # pixels

    @classmethod
    def framing(cls, plan: PhotoPlan, mesh: np.ndarray, keypoints: np.ndarray, size: tuple[int, int]) -> _Camera:
        """The camera that fills the picture as the plan's framing and fill ask."""
        height, width = size
        focal = 0.5 * height / np.tan(np.radians(FOV / 2))
        top, hips, knees = mesh[:, 2].max(), keypoints[11:13, 2].mean(), keypoints[13:15, 2].mean()
        head_top = keypoints[0:5, 2].mean() + 0.09
        shoulders = keypoints[5:7, 2].mean()
        low = {
            "full body": 0.0,
            "three-quarter": 0.35 * hips + 0.65 * knees,
            "portrait": shoulders - 0.42 * (head_top - shoulders),
        }[plan.framing]
        high = top if plan.framing != "portrait" else head_top + 0.03
        inside = mesh[(mesh[:, 2] >= low) & (mesh[:, 2] <= high)]
        middle = np.array([(inside[:, 0].max() + inside[:, 0].min()) / 2, 0.0, (low + high) / 2])
        if plan.framing == "portrait":
            middle[0] = keypoints[0:5, 0].mean()
        pitch = np.radians(plan.pitch)
        # Camera axes in world coordinates: x to the picture's right is the world's +x seen from -y.
        forward = np.array([0, np.cos(pitch), -np.sin(pitch)])
        right = np.array([1.0, 0, 0])
        down = np.cross(forward, right)
        roll = np.radians(plan.roll)
        right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
        axes = np.stack([right, down, forward])
        # Perspective makes near hands large: look once from about the right distance, then correct distance and aim.
        distance = focal * (high - low) / (plan.fill * height)
        if plan.framing != "portrait":
            for _ in range(2):
                seen = cls(middle - forward * distance, axes, focal, (0.0, 0.0)).project(inside)
                low_px, high_px = seen[:, :2].min(0), seen[:, :2].max(0)
                middle = middle + (right * (low_px + high_px)[0] + down * (low_px + high_px)[1]) / 2 * distance / focal
                distance *= max(np.ptp(seen[:, 1]) / (plan.fill * height), np.ptp(seen[:, 0]) / (0.96 * width))
        center = (width / 2 + plan.shift[0] * width, height / 2 + plan.shift[1] * height)
        return cls(middle - forward * distance, axes, focal, center)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] -> (x px, y px, distance along the view) [N, 3]."""
        local = (points - self.position) @ self.rotation.T
        xy = local[:, :2] / local[:, 2:] * self.focal + self.center
        return np.concatenate([xy, local[:, 2:]], 1)

    def rays(self, size: tuple[int, int]) -> np.ndarray:
        """Unit view directions [H, W, 3] through the pixel centres."""
        y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
        local = np.stack([(x - self.center[0]) / self.focal, (y - self.center[1]) / self.focal, np.ones_like(x)], -1)
        world = local @ self.rotation
        return world / np.linalg.norm(world, axis=-1, keepdims=True)

    def light(self, plan: PhotoPlan) -> np.ndarray:
        """Unit vector towards the key light."""
        azimuth, elevation = np.radians([plan.light_azimuth, plan.light_elevation])
        return np.array([np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)])


def _background(
    plan: PhotoPlan, camera: _Camera, mesh: np.ndarray, faces: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The place behind the person [H, W, 3] with the person's shadow on the ground."""
    rng = np.random.default_rng(plan.scene_seed)
    ray = camera.rays(size)
    up = ray[..., 2]
    pixel = 1.0 / camera.focal  # angle of one pixel, to soften edges
    reach = np.where(up < -1e-3, camera.position[2] / np.maximum(-up, 1e-3), 1e3)
    ground = camera.position[:2] + ray[..., :2] * reach[..., None]  # metres on the floor
    wall_at = {"room": rng.uniform(1.2, 2.2), "studio": 3.0, "street": rng.uniform(3.5, 6.0)}.get(plan.scene, 1e4)
    along = (wall_at - camera.position[1]) / np.maximum(ray[..., 1], 1e-3)
    wall = camera.position + ray * along[..., None]  # metres on the wall
    on_wall = _ramp(wall[..., 2], 0.0, 2 * pixel * wall_at + 0.01)
    horizon = _ramp(up, 0.0, 2 * pixel)

    def edge(value, at, width=0.02):
        return _ramp(value, at, width)[..., None]

    def blend(a, b, t):
        t = t[..., None] if np.ndim(t) == 2 else t
        return np.asarray(a) * (1 - t) + np.asarray(b) * t

    tint = rng.uniform(-0.03, 0.03, 3)
    if plan.scene == "studio":
        gray = np.array([0.70, 0.70, 0.71]) + rng.uniform(-0.08, 0.10) + tint
        falloff = 1 - 0.10 * np.clip(
            np.hypot(
                (np.mgrid[0 : size[0], 0 : size[1]] / np.array(size)[:, None, None] - 0.45)[0],
                (np.mgrid[0 : size[0], 0 : size[1]] / np.array(size)[:, None, None] - 0.5)[1],
            )
            * 1.6,
            0,
            1,
        )
        picture = gray * falloff[..., None] * blend([1.0] * 3, [0.93] * 3, 1 - on_wall)
    elif plan.scene == "room":
        floor = np.array([0.55, 0.37, 0.22]) * rng.uniform(0.85, 1.15) + tint
        planks = 0.93 + 0.07 * _ramp(np.abs(ground[..., 0] / 0.18 % 1 - 0.5), 0.05, 0.06)
        paint = np.array([0.87, 0.80, 0.66]) * rng.uniform(0.9, 1.06) + tint
        picture = blend(floor * planks[..., None], paint * np.ones_like(ray), on_wall)
        board = on_wall * (1 - _ramp(wall[..., 2], 0.12, 0.01))
        picture = blend(picture, [0.95, 0.94, 0.92], board)
        cx, w = rng.choice([-1, 1]) * rng.uniform(0.75, 1.1), rng.uniform(0.35, 0.5)
        inside = (
            edge(w - np.abs(wall[..., 0] - cx), 0) * edge(0.55 - np.abs(wall[..., 2] - 1.55), 0) * on_wall[..., None]
        )
        glass = edge(w - 0.06 - np.abs(wall[..., 0] - cx), 0) * edge(0.49 - np.abs(wall[..., 2] - 1.55), 0)
        cross = edge(np.abs(wall[..., 0] - cx), 0.018) * edge(np.abs(wall[..., 2] - 1.55), 0.018)
        picture = blend(picture, [0.97, 0.97, 0.95], inside)
        picture = blend(picture, [0.66, 0.84, 0.95], inside * glass * cross)
    else:
        sky_top, sky_low = {
            "beach": ((0.38, 0.65, 0.93), (0.78, 0.90, 0.98)),
            "meadow": ((0.42, 0.68, 0.95), (0.82, 0.92, 0.98)),
            "street": ((0.62, 0.74, 0.88), (0.80, 0.86, 0.92)),
            "snow": ((0.72, 0.78, 0.86), (0.86, 0.89, 0.93)),
        }[plan.scene]
        sky = blend(sky_low, sky_top, np.clip(up * 4, 0, 1)) + tint
        floor_color, far_color, speck = {
            "beach": ((0.88, 0.77, 0.55), (0.84, 0.74, 0.54), 0.03),
            "meadow": ((0.36, 0.60, 0.22), (0.46, 0.66, 0.28), 0.07),
            "street": ((0.52, 0.52, 0.54), (0.56, 0.56, 0.58), 0.02),
            "snow": ((0.93, 0.95, 0.97), (0.87, 0.90, 0.95), 0.015),
        }[plan.scene]
        floor = blend(floor_color, far_color, np.clip(reach / 25, 0, 1)) * rng.uniform(0.94, 1.06) + tint * 0.5
        u, v = ground[..., 0] * 2.1 + rng.uniform(0, 9), ground[..., 1] * 2.1 + rng.uniform(0, 9)
        waves = (np.sin(u * 1.7 + np.sin(v * 1.3)) + np.sin(v * 2.3 + np.sin(u * 0.9) * 2)) * np.clip(6 / reach, 0, 1)
        floor = floor + (speck * waves)[..., None]
        if plan.scene == "beach":
            shore = rng.uniform(4, 8)
            sea = blend((0.20, 0.60, 0.72), (0.13, 0.42, 0.66), np.clip(reach / 60, 0, 1))
            foam = _ramp(ground[..., 1], shore, 0.4) * (1 - _ramp(ground[..., 1], shore + 0.9, 0.5))
            floor = blend(floor, sea, _ramp(ground[..., 1], shore, 0.4))
            floor = blend(floor, (0.95, 0.97, 0.97), foam * 0.8)
        if plan.scene == "street":
            slabs = np.minimum(np.abs(ground[..., 0] / 0.9 % 1 - 0.5), np.abs(ground[..., 1] / 0.9 % 1 - 0.5))
            floor = floor * (1 - 0.10 * (1 - _ramp(slabs, 0.035, 0.03)) * np.clip(7 / reach, 0, 1))[..., None]
        picture = blend(floor, sky, horizon)
        azimuth = np.arctan2(ray[..., 0], ray[..., 1])
        if plan.scene in ("meadow", "snow"):
            phase = rng.uniform(0, 9)
            if plan.scene == "meadow":
                ridge = 0.045 + 0.016 * np.sin(azimuth * 23 + phase) + 0.008 * np.sin(azimuth * 61 + 2 * phase)
                trees = (0.16, 0.38, 0.17)
            else:
                ridge = 0.02 + 0.065 * np.abs(((azimuth * 14 + phase) % 1) * 2 - 1)
                trees = (0.20, 0.30, 0.29)
            picture = blend(picture, trees, horizon * _ramp(ridge - up, 0, 2 * pixel))
        if plan.scene == "street":
            bricks = np.array([[0.62, 0.36, 0.29], [0.66, 0.58, 0.48], [0.50, 0.52, 0.58]])[
                int(rng.integers(3))
            ] * rng.uniform(0.92, 1.08)
            gx, gz = (wall[..., 0] + rng.uniform(0, 2)) / 1.5 % 1 - 0.5, (wall[..., 2] - 0.2) / 1.7 % 1 - 0.5
            window = edge(0.26 - np.abs(gx), 0, 0.03) * edge(0.30 - np.abs(gz), 0, 0.03)
            facade = blend(bricks * np.ones_like(ray), (0.24, 0.30, 0.38), window)
            picture = blend(picture, facade, on_wall)
    shadow = _shadow(plan, camera, mesh, faces, size)
    return np.clip(picture, 0, 1) * (1 - (0.42 if plan.scene != "studio" else 0.30) * shadow[..., None])


def _shadow(plan: PhotoPlan, camera: _Camera, mesh: np.ndarray, faces: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """0..1: the person's shadow, cast along the light onto the floor and softened [H, W]."""
    from scipy.ndimage import gaussian_filter

    light = camera.light(plan)
    flat = mesh.copy()
    flat -= light * (mesh[:, 2:] / light[2])
    flat[:, 2] = 0.0
    # Without the part that lies behind the camera; half resolution is enough for something this soft.
    points = camera.project(flat) * [0.5, 0.5, 1]
    _, triangle, _ = _rasterise(points, faces, size[0] // 2, size[1] // 2)
    soft = gaussian_filter((triangle >= 0).astype(np.float32), 0.006 * size[0])
    return np.repeat(np.repeat(soft, 2, 0), 2, 1)[: size[0], : size[1]]


def photo_name(index: int) -> str:
    return f"{index:03d}"


def write_photos(
    out: Path,
    seed: int,
    count: int,
    *,
    size: tuple[int, int] = (512, 384),
    quality: int = 95,
    start: int = 0,
    **fixed: object,
) -> list[Path]:
    """Render `count` photos of the person `seed` into out/<person>/NNN.jpg with .txt (caption) and .json (truth).

    Photos that are already there are left alone, so the same command again finishes an interrupted run; the JPEG is
    written last. `fixed` sets any field of the photos' plans. Returns the JPEGs' paths.
    """
    from PIL import Image

    folder = Path(out) / sample_identity(seed).person
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{photo_name(i)}.jpg" for i in range(start, start + count)]
    missing = [p for p in paths if not p.exists()]
    if not missing:
        return paths
    renderer = Renderer(sample_identity(seed), size)
    for path in missing:
        photo = renderer.render(sample_plan(renderer.identity, int(path.stem), **fixed))
        path.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(photo.truth) + "\n", encoding="utf-8")
        buffer = io.BytesIO()
        Image.fromarray(photo.image).save(buffer, "JPEG", quality=quality, subsampling=0)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return paths
