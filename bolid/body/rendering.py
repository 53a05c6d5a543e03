"""Pictures of a body mesh: a camera, visibility by the synthetic world's rasteriser, and clay shading.

Shapes: V vertices, F triangles, H x W pixels. Axes: x to the person's left, y to the back, z up; a camera at turn 0
looks at the person's front, so that the person's left is on the picture's right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bolid.synth.geometry import rasterise, surface_normals

_AHEAD = 10.0  # metres: an orthographic camera stands so far off, that all depths are positive


@dataclass(frozen=True)
class Viewpoint:
    """A camera before a body. `turn` in degrees: 0 the front, 90 the person's left side, 180 the back.

    `scale`: pixels a metre; `center`: the pixel (x, y) of the floor's origin. `distance` in metres: None is
    orthographic, else a pinhole camera at so much distance and `eye` metres high, `scale` at the person.
    """

    turn: float
    scale: float
    center: tuple[float, float]
    size: tuple[int, int]  # (height, width)
    distance: float | None = None
    eye: float = 0.0

    def rotation(self) -> np.ndarray:
        """[3, 3] to the camera's axes: right, down, away."""
        a = np.radians(self.turn)
        right = np.array([np.cos(a), np.sin(a), 0.0])
        away = np.array([-np.sin(a), np.cos(a), 0.0])
        return np.stack([right, [0.0, 0.0, -1.0], away])

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points [n, 3] in metres -> pixels x, y and depth in metres [n, 3]."""
        local = points @ self.rotation().T
        if self.distance is None:
            return np.concatenate([local[:, :2] * self.scale + self.center, local[:, 2:] + _AHEAD], 1)
        depth = local[:, 2:] + self.distance
        x = local[:, :1] * self.scale * self.distance / depth + self.center[0]
        # The horizon lies at the height of the eye, wherever the person stands.
        y = (local[:, 1:2] + self.eye) * self.scale * self.distance / depth + self.center[1] - self.eye * self.scale
        return np.concatenate([x, y, depth], 1)


@dataclass(frozen=True)
class Buffer:
    """What a view shows: `depth` [H, W] (inf: nothing), `normals` [H, W, 3] in the camera's axes, `mask` [H, W], and
    `values` [H, W, C]: quantities of the vertices.
    """

    depth: np.ndarray
    normals: np.ndarray
    mask: np.ndarray
    values: np.ndarray


def render_view(
    view: Viewpoint, vertices: np.ndarray, faces: np.ndarray, quantities: np.ndarray | None = None
) -> Buffer:
    """The body [V, 3] in a view, and `quantities` [V, C] of its vertices."""
    depth, triangle, weights = rasterise(view.project(vertices), faces, *view.size)
    mask = triangle >= 0
    corners, inside = faces[triangle[mask]], weights[mask]
    turned = surface_normals(vertices, faces) @ view.rotation().T
    of_vertices = np.concatenate([turned, *([] if quantities is None else [quantities])], 1).astype(np.float32)
    flat = sum(inside[:, k, None] * of_vertices[corners[:, k]] for k in range(3))
    normals = np.zeros((*view.size, 3), np.float32)
    values = np.zeros((*view.size, of_vertices.shape[1] - 3), np.float32)
    normals[mask] = flat[:, :3] / np.maximum(np.linalg.norm(flat[:, :3], axis=1, keepdims=True), 1e-9)
    values[mask] = flat[:, 3:]
    return Buffer(depth, normals, mask, values)


def clay(buffer: Buffer, color: np.ndarray) -> np.ndarray:
    """A matt body under a soft light from above left: float 0..1 of the n pixels in the mask, [n, 3]; so is `color`."""
    normals = buffer.normals[buffer.mask]
    key, fill = np.array([-0.45, -0.60, -0.66]), np.array([0.7, -0.1, -0.7])
    light = 0.42 + 0.46 * np.clip(normals @ key, 0, 1) + 0.16 * np.clip(normals @ fill, 0, 1) - 0.06 * normals[:, 1]
    light *= 0.82 + 0.18 * np.clip(-normals[:, 2], 0, 1) ** 0.7
    return np.clip(light[:, None] * color, 0, 1)
