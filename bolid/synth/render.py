"""Photos of synthetic people: Anny bodies, dressed, posed, lit and drawn into a place.

The body is Anny's (Apache-2.0, CC0 shapes), the rasteriser a small Warp kernel on the CPU. Every vertex has a place on
a canonical adult body, in "canonical coordinates": metres over stature, floor at 0, x to the person's left, y to the
back, z up. Garments are not separate meshes: a pixel is skin or cloth by the canonical point that it shows. So a hem is
a smooth line in every pose. Skirts and long hair are added surfaces.

body.py has the body, poses.py its poses, clothes.py clothes and hair, camera.py the camera, shading.py and
background.py the colours, truth.py the ground truth.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bolid.run import atomic_path, disk_errors
from bolid.synth.background import background
from bolid.synth.body import anny_body
from bolid.synth.camera import FOV, Camera
from bolid.synth.clothes import ADDED_HAIR, cloth_thickness, hair_surface, skirt
from bolid.synth.geometry import rasterise, surface_normals
from bolid.synth.people import PhotoPlan, SyntheticPerson, attributes, caption, sample_person, sample_plan
from bolid.synth.poses import joint_rotations, rotation
from bolid.synth.shading import BODY, HAIR, SKIRT, shade
from bolid.synth.truth import face_truth, keypoint_marks, person_box

SUPERSAMPLING = 2


@dataclass(frozen=True)
class RenderedPhoto:
    """One rendered photo: `image` uint8 [H, W, 3]; `truth` plain data (see `Renderer.render`); `caption` text."""

    image: np.ndarray
    truth: dict[str, Any]
    caption: str


@dataclass(frozen=True)
class _Mesh:
    """Body, clothes and hair in the pose, in world coordinates: metres, floor at 0."""

    vertices: np.ndarray  # f64 [N, 3]
    faces: np.ndarray  # i32 [F, 3]
    values: np.ndarray  # f32 [N, 11]: what `shade` reads of a pixel
    part: np.ndarray  # f32 [N]: BODY, SKIRT or HAIR
    bare: np.ndarray  # f64 [V, 3]: the body without clothes
    keypoints: np.ndarray  # [17, 3]
    corners: np.ndarray  # [2, 3] of the mouth, right and left


class Renderer:
    """Renders photos of one person, whose body is built once.

    Args:
        person: who.
        size: (height, width) of the photos in pixels; any portrait size, 256x192 and 512x384 are the usual ones.
    """

    def __init__(self, person: SyntheticPerson, size: tuple[int, int] = (512, 384)) -> None:
        self.person, self.size = person, size
        self.body = anny_body()
        self.rest_vertices, _, self.rest_model = self.body.rest(person.phenotypes, person.local_changes)
        self.stature = float(np.ptp(self.rest_vertices[:, 2]))
        self.ratios = self.body.ratios(self.rest_vertices)

    def render(self, plan: PhotoPlan) -> RenderedPhoto:
        """The photo, its caption and its truth.

        Truth: seed, attributes, phenotypes, ratios, keypoints [17][x, y, v] (v: 0 outside the picture, 1 hidden, 2
        visible), box and face_box [x0, y0, x1, y1], face_landmarks [5][x, y] in InsightFace's order, face_yaw in
        degrees; the last three are None for a face turned away or outside.
        """
        height, width = self.size
        mesh = self._mesh(plan)
        camera = Camera.framing(plan, mesh.vertices, mesh.keypoints, self.size)
        scale = SUPERSAMPLING
        points = camera.project(mesh.vertices) * [scale, scale, 1]
        depth, triangle, weights = rasterise(points, mesh.faces, height * scale, width * scale)

        covered = triangle >= 0
        corners_of = mesh.faces[triangle[covered]]
        pixel = np.einsum("pk,pkc->pc", weights[covered], mesh.values[corners_of])
        color = shade(self.body, self.person, plan, camera, pixel, mesh.part[corners_of[:, 0]])
        layer = np.zeros((height * scale, width * scale, 4), np.float32)
        layer[covered] = np.concatenate([color, np.ones((len(color), 1), np.float32)], 1)
        layer = layer.reshape(height, scale, width, scale, 4).mean((1, 3))  # premultiplied, so edges blend right

        behind = background(plan, camera, mesh.vertices, mesh.faces, self.size)
        image = layer[..., :3] + behind * (1 - layer[..., 3:])
        image = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
        return RenderedPhoto(image, self._truth(plan, camera, layer[..., 3], depth, mesh), caption(self.person, plan))

    def outline(self, plan: PhotoPlan, fov: float = FOV) -> tuple[np.ndarray, np.ndarray]:
        """The photo's mask alone: (bool [H, W], keypoints f32 [17, 3] as x, y in pixels and v as in `render`).

        `fov`: the camera's vertical field of view in degrees. With the default it is the mask of `render`'s photo.
        """
        mesh = self._mesh(plan)
        camera = Camera.framing(plan, mesh.vertices, mesh.keypoints, self.size, fov)
        depth, triangle, _ = rasterise(camera.project(mesh.vertices), mesh.faces, *self.size)
        marks = keypoint_marks(camera.project(mesh.keypoints), depth, self.size, self.stature)
        return triangle >= 0, np.array(marks, np.float32)

    def project_body(self, plan: PhotoPlan) -> np.ndarray:
        """Where the body without clothes is in the photo: x and y in pixels, depth in metres of its vertices [V, 3]."""
        mesh = self._mesh(plan)
        return Camera.framing(plan, mesh.vertices, mesh.keypoints, self.size).project(mesh.bare)

    def _mesh(self, plan: PhotoPlan) -> _Mesh:
        body, style = self.body, self.person.hair_style
        vertices, transforms = body.pose(self.rest_model, joint_rotations(plan))
        thickness = cloth_thickness(body, self.person, plan)
        dressed = vertices + body.normals(vertices) * thickness[:, None] * self.stature
        parts = [(BODY, dressed, body.faces)]
        if plan.bottom == "skirt":
            parts.append((SKIRT, *skirt(body, self.stature, dressed, transforms)))
        if style in ADDED_HAIR:
            parts.append((HAIR, *hair_surface(body, style, self.rest_vertices, self.stature, transforms)))

        offsets = np.cumsum([0] + [len(v) for _, v, _ in parts])
        mesh = np.concatenate([v for _, v, _ in parts])
        faces = np.concatenate([f + o for (_, _, f), o in zip(parts, offsets[:-1], strict=True)]).astype(np.int32)
        part = np.concatenate([np.full(len(v), kind, np.float32) for kind, v, _ in parts])

        turn = rotation(0, 0, plan.yaw)
        keypoints = body.keypoints_of(vertices[None])[0]
        corners = vertices[[body.mouth_corner_right, body.mouth_corner]]
        floor = mesh[:, 2].min()
        mesh, bare, keypoints, corners = ((p - [0, 0, floor]) @ turn.T for p in (mesh, vertices, keypoints, corners))
        normals = np.concatenate([body.normals(dressed), *[surface_normals(v, f) for _, v, f in parts[1:]]]) @ turn.T
        added = len(mesh) - len(dressed)
        canonical = np.concatenate([body.canonical, np.zeros((added, 3))])
        fields = np.stack([body.arm, body.along_arm, body.head, body.eye], 1)
        fields = np.concatenate([fields, np.zeros((added, 4))])
        values = np.concatenate([normals, canonical, fields, part[:, None]], 1).astype(np.float32)
        return _Mesh(mesh, faces, values, part, bare, keypoints, corners)

    def mesh(self, plan: PhotoPlan) -> _Mesh:
        """Body, clothes and hair as `render` draws them, for renderers of other looks."""
        return self._mesh(plan)

    def _truth(
        self, plan: PhotoPlan, camera: Camera, alpha: np.ndarray, depth: np.ndarray, mesh: _Mesh
    ) -> dict[str, Any]:
        projected = camera.project(mesh.keypoints)
        marks = keypoint_marks(projected, depth, self.size, self.stature)
        return {
            "seed": self.person.seed,
            "person": self.person.name,
            "photo": plan.index,
            "width": self.size[1],
            "height": self.size[0],
            "attributes": attributes(self.person, plan),
            "phenotypes": self.person.phenotypes,
            "ratios": self.ratios,
            "keypoints": marks,
            "box": person_box(alpha),
            **face_truth(camera, projected, mesh.keypoints, mesh.corners, marks, self.size),
        }


def photo_name(index: int) -> str:
    """The file name of a photo, without its ending."""
    return f"{index:03d}"


def write_photos(
    out: Path,
    seed: int,
    count: int,
    *,
    size: tuple[int, int] = (512, 384),
    quality: int = 95,
    start: int = 0,
    **fixed: Any,
) -> list[Path]:
    """Render `count` photos of the person `seed` into out/<person>/NNN.jpg with .txt (caption) and .json (truth).

    Existing photos are kept, so the same call again finishes an interrupted one; the JPEG is written last. `fixed` sets
    any field of the photos' plans. Returns the JPEGs' paths.
    """
    from PIL import Image

    folder = Path(out) / sample_person(seed).name
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{photo_name(i)}.jpg" for i in range(start, start + count)]
    missing = [p for p in paths if not p.exists()]
    if not missing:
        return paths
    renderer = Renderer(sample_person(seed), size)
    for path in missing:
        photo = renderer.render(sample_plan(renderer.person, int(path.stem), **fixed))
        path.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(photo.truth) + "\n", encoding="utf-8")
        buffer = io.BytesIO()
        Image.fromarray(photo.image).save(buffer, "JPEG", quality=quality, subsampling=0)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return paths
