"""Photos of synthetic people in looks of the judge's own: other cameras, lights, cloths, places and colours.

The bodies, poses and clothes' cuts are those of `bolid.synth`; what a pixel looks like is decided here. So a judge that
learns from these photos shares neither people nor pictures with the probe and the base. Edges are hard: the judge reads
half of the size, which smooths them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from bolid.run import derive_seed
from bolid.synth.background import background
from bolid.synth.body import AnnyBody
from bolid.synth.camera import FOV, Camera
from bolid.synth.geometry import rasterise
from bolid.synth.people import COLORS, PhotoPlan, sample_plan
from bolid.synth.render import Renderer
from bolid.synth.shading import BODY, HAIR, albedo
from bolid.synth.truth import keypoint_marks

FIELDS_OF_VIEW = (18.0, 40.0)  # vertical, in degrees


@dataclass(frozen=True)
class Shot:
    """`image` uint8 [H, W, 3]; `mask` uint8 [H, W], 0..255: the person; `keypoints` f32 [17, 3]: x and y in pixels, v
    as in `bolid.synth.truth`; `joints` f32 [17, 3]: the same in the camera's axes (right, down, forward), over the
    stature and around their mean."""

    image: np.ndarray
    mask: np.ndarray
    keypoints: np.ndarray
    joints: np.ndarray


def photograph(renderer: Renderer, index: int) -> Shot:
    """Photo number `index` of the renderer's person, in a look that the person and the number decide."""
    rng = np.random.default_rng(derive_seed(renderer.person.seed, "judge", index))
    plan = look_plan(renderer, index, rng)
    height, width = renderer.size
    mesh = renderer.mesh(plan)
    camera = through_lens(Camera.framing(plan, mesh.vertices, mesh.keypoints, renderer.size), mesh.vertices, rng)
    depth, triangle, weights = rasterise(camera.project(mesh.vertices), mesh.faces, height, width)
    covered = triangle >= 0
    corners = mesh.faces[triangle[covered]]
    pixel = np.einsum("pk,pkc->pc", weights[covered], mesh.values[corners])
    part = mesh.part[corners[:, 0]]
    color = dressed(renderer.body, renderer, plan, pixel, part, rng) * lit(pixel, part, camera, rng)
    picture = place(plan, camera, mesh.vertices, mesh.faces, renderer.size, rng)
    picture[covered] = np.clip(color, 0, 1)
    marks = keypoint_marks(camera.project(mesh.keypoints), depth, renderer.size, renderer.stature)
    joints = (mesh.keypoints - mesh.keypoints.mean(0)) @ camera.rotation.T / renderer.stature
    mask = covered.astype(np.uint8) * 255
    return Shot(developed(picture, rng), mask, np.array(marks, np.float32), joints.astype(np.float32))


def look_plan(renderer: Renderer, index: int, rng: np.random.Generator) -> PhotoPlan:
    """What the photo shows: full bodies and three-quarters, turned, tilted and loose more than elsewhere."""
    return sample_plan(
        renderer.person, index,
        framing="full body" if rng.random() < 0.7 else "three-quarter",
        yaw=float(np.clip(rng.normal(0, 25), -70, 70)), pitch=float(rng.uniform(-6, 12)),
        roll=float(rng.normal(0, 1.5)), fill=float(rng.uniform(0.8, 0.97)), looseness=float(rng.uniform(0.1, 1.2)),
        shift=(float(rng.normal(0, 0.025)), float(rng.normal(0, 0.015))),
    )  # fmt: skip


def through_lens(camera: Camera, vertices: np.ndarray, rng: np.random.Generator) -> Camera:
    """The camera with another lens, from further off or nearer: the person stays as large."""
    wider = np.tan(np.radians(rng.uniform(*FIELDS_OF_VIEW)) / 2) / np.tan(np.radians(FOV) / 2)
    forward = camera.rotation[2]
    distance = (vertices.mean(0) - camera.position) @ forward
    return replace(camera, focal=camera.focal / wider, position=camera.position + forward * distance * (1 - 1 / wider))


def dressed(
    body: AnnyBody, renderer: Renderer, plan: PhotoPlan, pixel: np.ndarray, part: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Colours without light [P, 3]: cloths of any colour, plain, striped, checked, dotted or mottled; tinted skin."""
    color = albedo(body, renderer.person, plan, pixel, part)
    cloths = [(color == np.array(COLORS[name], np.float32)).all(1) for name in (plan.top_color, plan.bottom_color)]
    tinted = color * rng.uniform(0.85, 1.15, 3)
    for mask in cloths:
        first, second = rng.uniform(0.04, 0.96, (2, 3))
        tinted[mask] = first + (second - first) * pattern(pixel[mask, 3:6], rng)[:, None]
    hair = part == HAIR
    tinted[hair] *= 1 + 0.12 * np.sin(40 * pixel[hair, :1] + 25 * pixel[hair, 1:2])
    return tinted


def pattern(at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much of the second colour a cloth has, 0..1, at canonical points [P, 3]."""
    x, y, z = at.T
    pitch, angle = rng.uniform(0.012, 0.05), rng.uniform(0, np.pi)
    u = (np.cos(angle) * x + np.sin(angle) * z) / pitch
    v = (-np.sin(angle) * x + np.cos(angle) * z + 0.5 * y) / pitch
    kind = rng.choice(["plain", "striped", "checked", "dotted", "mottled"], p=[0.55, 0.15, 0.1, 0.1, 0.1])
    if kind == "striped":
        return (np.sin(2 * np.pi * u) > rng.uniform(-0.6, 0.6)) * 1.0
    if kind == "checked":
        return ((np.sin(np.pi * u) > 0) ^ (np.sin(np.pi * v) > 0)) * 1.0
    if kind == "dotted":
        return (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < rng.uniform(0.2, 0.4)) * 1.0
    if kind == "mottled":
        return 0.5 + 0.5 * np.sin(3 * u + 2 * np.sin(2.3 * v) + rng.uniform(0, 6)) * np.cos(1.7 * v + np.sin(1.3 * u))
    return np.zeros(len(at))


def lit(pixel: np.ndarray, part: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """The light [P, 3] on each pixel: two lamps, the sky and a sheen, all tinted."""
    normal = pixel[:, :3] / np.maximum(np.linalg.norm(pixel[:, :3], axis=1, keepdims=True), 1e-9)

    def lamp(azimuth: float, elevation: float) -> np.ndarray:
        a, e = np.radians([azimuth, elevation])
        facing = normal @ np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])
        return np.where(part != BODY, np.abs(facing), facing)

    wrap = rng.uniform(0, 0.4)
    key, fill = lamp(rng.uniform(-110, 110), rng.uniform(5, 80)), lamp(rng.uniform(-150, 150), rng.uniform(-10, 60))
    sky = 0.5 + 0.5 * normal[:, 2]
    light = rng.uniform(0.25, 0.6) + rng.uniform(0, 0.25) * sky[:, None] * rng.uniform(0.85, 1.15, 3)
    light = light + rng.uniform(0.3, 0.8) * np.clip((key + wrap) / (1 + wrap), 0, 1)[:, None] * rng.uniform(
        0.85, 1.1, 3
    )
    light = light + rng.uniform(0, 0.3) * np.clip(fill, 0, 1)[:, None] * rng.uniform(0.8, 1.15, 3)
    rim = (1 - np.abs(normal @ camera.rotation[2])) ** 4
    return light + rng.uniform(-0.15, 0.25) * rim[:, None]


def place(
    plan: PhotoPlan, camera: Camera, vertices: np.ndarray, faces: np.ndarray, size: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """What is behind the person [H, W, 3]: a third each a synthetic place in other colours, a soft one, a cluttered
    one."""
    kind = int(rng.integers(3))
    if kind == 0:
        known = background(plan, camera, vertices, faces, size)
        return np.clip(known @ (np.eye(3) + rng.normal(0, 0.15, (3, 3))), 0, 1)
    height, width = size
    grid = rng.uniform(0, 1, (int(rng.integers(2, 6)), int(rng.integers(2, 5)), 3)).astype(np.float32)
    picture = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    if kind == 2:
        for _ in range(int(rng.integers(4, 20))):
            color = tuple(rng.uniform(0, 1, 3).tolist())
            x, y = int(rng.integers(width)), int(rng.integers(height))
            w, h = int(rng.integers(4, width // 2)), int(rng.integers(4, height // 2))
            if rng.random() < 0.5:
                cv2.rectangle(picture, (x, y), (x + w, y + h), color, -1)
            else:
                cv2.ellipse(picture, (x, y), (w // 2, h // 2), float(rng.uniform(0, 180)), 0, 360, color, -1)
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 4))
    rough = cv2.resize(rng.normal(0, 1, (height // 4, width // 4, 3)).astype(np.float32), (width, height))
    return np.clip(picture + rng.uniform(0, 0.08) * rough, 0, 1)


def developed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] of colours 0..1: exposure, contrast, gamma, tint, and darker corners."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.75, 1.3)
    picture = (picture - 0.5) * rng.uniform(0.75, 1.2) + 0.5 + rng.uniform(-0.06, 0.06) + rng.normal(0, 0.02, 3)
    picture = picture * (1 - rng.uniform(0, 0.15) * (x**2 + y**2))[..., None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
