"""Meshes on the picture: the rasteriser (a Warp kernel on the CPU), normals, grids, smooth steps."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import numpy as np


@functools.cache
def quiet_warp() -> Any:
    """Warp, ready to use, without a word on standard output, which is for data."""
    import warp as wp

    wp.config.log_level = wp.LOG_ERROR
    # Its C++ code warns of a missing CUDA driver on file descriptor 2, whatever the level is.
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            wp.init()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    return wp


@functools.cache
def _kernel() -> Any:
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


def rasterise(
    points: np.ndarray, faces: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth [H, W] (inf where empty), triangle index [H, W] (-1 where empty), barycentric weights [H, W, 3]."""
    wp = quiet_warp()
    depth = wp.array(np.full((height, width), np.inf, np.float32), dtype=wp.float32, device="cpu")
    triangle = wp.array(np.full((height, width), -1, np.int32), dtype=wp.int32, device="cpu")
    weights = wp.zeros((height, width), dtype=wp.vec3, device="cpu")
    inputs = [
        wp.array(points.astype(np.float32), dtype=wp.vec3, device="cpu"),
        wp.array(faces, dtype=wp.int32, device="cpu"),
    ]
    wp.launch(_kernel(), dim=len(faces), inputs=[*inputs, depth, triangle, weights], device="cpu")
    return depth.numpy(), triangle.numpy(), weights.numpy()


def ramp(value: np.ndarray, edge: float, width: float) -> np.ndarray:
    """0 below the edge, 1 above it, smooth over `width`."""
    t = np.clip((value - edge) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def grid_faces(rows: int, columns: int, closed: bool) -> np.ndarray:
    """Triangles of a rows x columns grid of vertices; `closed` joins the last column to the first."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns if closed else columns - 1), indexing="ij")
    a, b = i * columns + j, i * columns + (j + 1) % columns
    c, d = a + columns, b + columns
    return np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([b, c, d], -1).reshape(-1, 3)]).astype(
        np.int32
    )


def surface_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3] of vertices [V, 3] with triangles [F, 3]."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.zeros_like(vertices)
    flat = np.cross(b - a, c - a)
    for i in range(3):
        np.add.at(normal, faces[:, i], flat)
    return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
