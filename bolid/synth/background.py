"""The place behind the person: a studio, a room, four places outdoors; and the shadow on the floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bolid.synth.camera import Camera
from bolid.synth.geometry import ramp, rasterise
from bolid.synth.people import PhotoPlan

Color = tuple[float, float, float]

SKY: dict[str, tuple[Color, Color]] = {  # at the top, at the horizon
    "beach": ((0.38, 0.65, 0.93), (0.78, 0.90, 0.98)),
    "meadow": ((0.42, 0.68, 0.95), (0.82, 0.92, 0.98)),
    "street": ((0.62, 0.74, 0.88), (0.80, 0.86, 0.92)),
    "snow": ((0.72, 0.78, 0.86), (0.86, 0.89, 0.93)),
}
GROUND: dict[str, tuple[Color, Color, float]] = {  # near, far, contrast of its speckles
    "beach": ((0.88, 0.77, 0.55), (0.84, 0.74, 0.54), 0.03),
    "meadow": ((0.36, 0.60, 0.22), (0.46, 0.66, 0.28), 0.07),
    "street": ((0.52, 0.52, 0.54), (0.56, 0.56, 0.58), 0.02),
    "snow": ((0.93, 0.95, 0.97), (0.87, 0.90, 0.95), 0.015),
}


@dataclass(frozen=True)
class _Scene:
    """Every pixel's ray into the place, [H, W] each, and the place's random numbers."""

    rng: np.random.Generator
    size: tuple[int, int]
    ray: np.ndarray  # [H, W, 3] unit vectors
    up: np.ndarray  # the ray's vertical component
    pixel: float  # angle of one pixel, to soften edges
    reach: np.ndarray  # distance to the floor
    ground: np.ndarray  # [H, W, 2] metres on the floor
    wall: np.ndarray  # [H, W, 3] metres on the wall
    on_wall: np.ndarray  # 0..1
    horizon: np.ndarray  # 0..1: above it
    tint: np.ndarray  # [3]


def background(
    plan: PhotoPlan, camera: Camera, mesh: np.ndarray, faces: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The place behind the person [H, W, 3], 0..1, with the person's shadow on the floor."""
    scene = _scene(plan, camera, size)
    if plan.scene == "studio":
        picture = _studio(scene)
    elif plan.scene == "room":
        picture = _room(scene)
    else:
        picture = _outdoors(scene, plan.scene)
    shadow = _shadow(plan, camera, mesh, faces, size)
    return np.clip(picture, 0, 1) * (1 - (0.42 if plan.scene != "studio" else 0.30) * shadow[..., None])


def _scene(plan: PhotoPlan, camera: Camera, size: tuple[int, int]) -> _Scene:
    rng = np.random.default_rng(plan.scene_seed)
    ray = camera.rays(size)
    up = ray[..., 2]
    pixel = 1.0 / camera.focal
    reach = np.where(up < -1e-3, camera.position[2] / np.maximum(-up, 1e-3), 1e3)
    ground = camera.position[:2] + ray[..., :2] * reach[..., None]
    wall_at = {"room": rng.uniform(1.2, 2.2), "studio": 3.0, "street": rng.uniform(3.5, 6.0)}.get(plan.scene, 1e4)
    along = (wall_at - camera.position[1]) / np.maximum(ray[..., 1], 1e-3)
    wall = camera.position + ray * along[..., None]
    on_wall = ramp(wall[..., 2], 0.0, 2 * pixel * wall_at + 0.01)
    horizon = ramp(up, 0.0, 2 * pixel)
    tint = rng.uniform(-0.03, 0.03, 3)
    return _Scene(rng, size, ray, up, pixel, reach, ground, wall, on_wall, horizon, tint)


def _edge(value: np.ndarray, at: float, width: float = 0.02) -> np.ndarray:
    """A soft step, [H, W] -> [H, W, 1]."""
    return ramp(value, at, width)[..., None]


def _blend(a: Any, b: Any, t: np.ndarray) -> np.ndarray:
    """Colours a -> b [H, W, 3] as t goes from 0 to 1."""
    t = t[..., None] if np.ndim(t) == 2 else t
    return np.asarray(a) * (1 - t) + np.asarray(b) * t


def _studio(scene: _Scene) -> np.ndarray:
    rng, size = scene.rng, scene.size
    gray = np.array([0.70, 0.70, 0.71]) + rng.uniform(-0.08, 0.10) + scene.tint
    place = np.mgrid[0 : size[0], 0 : size[1]] / np.array(size)[:, None, None]
    falloff = 1 - 0.10 * np.clip(np.hypot((place - 0.45)[0], (place - 0.5)[1]) * 1.6, 0, 1)
    return gray * falloff[..., None] * _blend([1.0] * 3, [0.93] * 3, 1 - scene.on_wall)


def _room(scene: _Scene) -> np.ndarray:
    """Planks, a painted wall with a skirting board, and a window."""
    rng, wall, on_wall = scene.rng, scene.wall, scene.on_wall
    floor = np.array([0.55, 0.37, 0.22]) * rng.uniform(0.85, 1.15) + scene.tint
    planks = 0.93 + 0.07 * ramp(np.abs(scene.ground[..., 0] / 0.18 % 1 - 0.5), 0.05, 0.06)
    paint = np.array([0.87, 0.80, 0.66]) * rng.uniform(0.9, 1.06) + scene.tint
    picture = _blend(floor * planks[..., None], paint * np.ones_like(scene.ray), on_wall)
    board = on_wall * (1 - ramp(wall[..., 2], 0.12, 0.01))
    picture = _blend(picture, [0.95, 0.94, 0.92], board)
    cx, w = rng.choice([-1, 1]) * rng.uniform(0.75, 1.1), rng.uniform(0.35, 0.5)
    across, height = np.abs(wall[..., 0] - cx), np.abs(wall[..., 2] - 1.55)
    inside = _edge(w - across, 0) * _edge(0.55 - height, 0) * on_wall[..., None]
    glass = _edge(w - 0.06 - across, 0) * _edge(0.49 - height, 0)
    cross = _edge(across, 0.018) * _edge(height, 0.018)
    picture = _blend(picture, [0.97, 0.97, 0.95], inside)
    return _blend(picture, [0.66, 0.84, 0.95], inside * glass * cross)


def _outdoors(scene: _Scene, name: str) -> np.ndarray:
    rng, ground, reach = scene.rng, scene.ground, scene.reach
    sky = _blend(SKY[name][1], SKY[name][0], np.clip(scene.up * 4, 0, 1)) + scene.tint
    near, far, contrast = GROUND[name]
    floor = _blend(near, far, np.clip(reach / 25, 0, 1)) * rng.uniform(0.94, 1.06) + scene.tint * 0.5
    u, v = ground[..., 0] * 2.1 + rng.uniform(0, 9), ground[..., 1] * 2.1 + rng.uniform(0, 9)
    waves = (np.sin(u * 1.7 + np.sin(v * 1.3)) + np.sin(v * 2.3 + np.sin(u * 0.9) * 2)) * np.clip(6 / reach, 0, 1)
    floor = floor + (contrast * waves)[..., None]
    if name == "beach":
        floor = _sea(scene, floor)
    if name == "street":
        slabs = np.minimum(np.abs(ground[..., 0] / 0.9 % 1 - 0.5), np.abs(ground[..., 1] / 0.9 % 1 - 0.5))
        floor = floor * (1 - 0.10 * (1 - ramp(slabs, 0.035, 0.03)) * np.clip(7 / reach, 0, 1))[..., None]
    picture = _blend(floor, sky, scene.horizon)
    if name in ("meadow", "snow"):
        picture = _trees(scene, name, picture)
    return _houses(scene, picture) if name == "street" else picture


def _sea(scene: _Scene, floor: np.ndarray) -> np.ndarray:
    shore = scene.rng.uniform(4, 8)
    sea = _blend((0.20, 0.60, 0.72), (0.13, 0.42, 0.66), np.clip(scene.reach / 60, 0, 1))
    far = scene.ground[..., 1]
    foam = ramp(far, shore, 0.4) * (1 - ramp(far, shore + 0.9, 0.5))
    return _blend(_blend(floor, sea, ramp(far, shore, 0.4)), (0.95, 0.97, 0.97), foam * 0.8)


def _trees(scene: _Scene, name: str, picture: np.ndarray) -> np.ndarray:
    """A ridge of trees on the horizon."""
    azimuth = np.arctan2(scene.ray[..., 0], scene.ray[..., 1])
    phase = scene.rng.uniform(0, 9)
    if name == "meadow":
        ridge = 0.045 + 0.016 * np.sin(azimuth * 23 + phase) + 0.008 * np.sin(azimuth * 61 + 2 * phase)
        trees = (0.16, 0.38, 0.17)
    else:
        ridge = 0.02 + 0.065 * np.abs(((azimuth * 14 + phase) % 1) * 2 - 1)
        trees = (0.20, 0.30, 0.29)
    return _blend(picture, trees, scene.horizon * ramp(ridge - scene.up, 0, 2 * scene.pixel))


def _houses(scene: _Scene, picture: np.ndarray) -> np.ndarray:
    """A brick wall with windows across the street."""
    rng, wall = scene.rng, scene.wall
    bricks = np.array([[0.62, 0.36, 0.29], [0.66, 0.58, 0.48], [0.50, 0.52, 0.58]])[int(rng.integers(3))] * rng.uniform(
        0.92, 1.08
    )
    gx, gz = (wall[..., 0] + rng.uniform(0, 2)) / 1.5 % 1 - 0.5, (wall[..., 2] - 0.2) / 1.7 % 1 - 0.5
    window = _edge(0.26 - np.abs(gx), 0, 0.03) * _edge(0.30 - np.abs(gz), 0, 0.03)
    facade = _blend(bricks * np.ones_like(scene.ray), (0.24, 0.30, 0.38), window)
    return _blend(picture, facade, scene.on_wall)


def _shadow(plan: PhotoPlan, camera: Camera, mesh: np.ndarray, faces: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The person's shadow on the floor, cast along the light and softened: [H, W], 0..1."""
    from scipy.ndimage import gaussian_filter

    light = camera.light(plan)
    flat = mesh.copy()
    flat -= light * (mesh[:, 2:] / light[2])
    flat[:, 2] = 0.0
    # Triangles behind the camera are left out; half the resolution is enough for a soft shadow.
    points = camera.project(flat) * [0.5, 0.5, 1]
    _, triangle, _ = rasterise(points, faces, size[0] // 2, size[1] // 2)
    soft = gaussian_filter((triangle >= 0).astype(np.float32), 0.006 * size[0])
    return np.repeat(np.repeat(soft, 2, 0), 2, 1)[: size[0], : size[1]]
