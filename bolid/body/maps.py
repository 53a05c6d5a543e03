"""Control maps of a body in a pose: what the published depth, normal and openpose ControlNets take.

- depth: nearer is brighter, black where nothing is, as MiDaS' inverse depth (lllyasviel/control_v11f1p_sd15_depth,
  diffusers/controlnet-depth-sdxl-1.0). The body fills 0.25..1, so that its farthest point stands off the background.
- normal: x to the right, y up and z to the camera as red, green, blue, 0.5 the zero; the background (0.5, 0.5, 1).
- silhouette: white on black.
- openpose: COCO's keypoints of the body as OpenPose draws them; hidden keypoints too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bolid.body.mesh import BodyModel
from bolid.body.rendering import Buffer, Viewpoint, render_view
from bolid.errors import BolidError
from bolid.method.openpose import draw_openpose
from bolid.synth.geometry import rasterise

MAPS = ("depth", "normal", "silhouette", "openpose")
_FILL = 0.88  # of the picture's height (or width) that the body fills
_DISTANCE = 4.0  # statures between the camera and the person: a short telephoto
_FARTHEST = 0.25
_FINE = 2  # a depth map is drawn so much larger, then averaged: smooth edges


def control_maps(
    model: BodyModel,
    parameters: np.ndarray,
    names: tuple[str, ...] = MAPS,
    *,
    pose: str | Mapping[str, np.ndarray] = "standing",
    size: tuple[int, int] = (1216, 832),
    turn: float = 0.0,
) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] for each of the `names`, of the body [P] in a pose (`BodyModel.posed`); `size` = (height, width).

    `turn`: of the camera round the body, degrees. The body is framed whole. Raises
    BolidError for an unknown map or pose, or a size of less than 32 pixels.
    """
    for name in names:
        if name not in MAPS:
            raise BolidError(f"there is no map {name!r}", f"the maps are {', '.join(MAPS)}")
    if min(size) < 32 or max(size) > 8192:
        raise BolidError(f"--size is {size[1]}x{size[0]}", "give WIDTHxHEIGHT from 32 to 8192 pixels")
    vertices = model.posed(parameters, pose)
    view = framed(vertices, parameters[0], size, turn)
    buffer = render_view(view, vertices, model.faces)
    makers = {
        "depth": lambda: depth_map(view.project(vertices), model.faces, size),
        "normal": lambda: _normal(buffer),
        "silhouette": lambda: np.repeat(buffer.mask[..., None] * np.uint8(255), 3, 2),
        "openpose": lambda: draw_openpose(_visible(view.project(model.keypoints(vertices))), size),
    }
    return {name: makers[name]() for name in names}


def framed(vertices: np.ndarray, stature: float, size: tuple[int, int], turn: float = 0.0) -> Viewpoint:
    """A camera that shows the whole body [V, 3], in the middle of a picture of `size` (height, width)."""
    view = Viewpoint(turn, 1.0, (0.0, 0.0), size, _DISTANCE * stature, 0.55 * stature)
    flat = view.project(vertices)[:, :2]
    low, high = flat.min(0), flat.max(0)
    scale = _FILL * min(size[0] / (high[1] - low[1]), size[1] / (high[0] - low[0]))
    middle = (low + high) / 2 * scale
    center = (size[1] / 2 - float(middle[0]), size[0] / 2 - float(middle[1]))
    return Viewpoint(turn, scale, center, size, _DISTANCE * stature, 0.55 * stature)


def depth_map(points: np.ndarray, faces: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a projected body: `points` [V, 3], x and y in pixels and depth in metres; `faces` [F, 3]."""
    depth, triangle, _ = rasterise(points * [_FINE, _FINE, 1], faces, _FINE * size[0], _FINE * size[1])
    mask, inverse = triangle >= 0, 1 / depth
    shade = np.zeros(depth.shape)
    if mask.any():
        near, far = inverse[mask].max(), inverse[mask].min()
        shade[mask] = _FARTHEST + (1 - _FARTHEST) * (inverse[mask] - far) / max(near - far, 1e-9)
    shade = shade.reshape(size[0], _FINE, size[1], _FINE).mean((1, 3))
    return np.repeat((shade[..., None] * 255 + 0.5).astype(np.uint8), 3, 2)


def _normal(buffer: Buffer) -> np.ndarray:
    toward = buffer.normals * [1, -1, -1]  # the camera's axes are right, down, away
    toward[~buffer.mask] = (0, 0, 1)
    return ((toward + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def _visible(points: np.ndarray) -> np.ndarray:
    """Projected keypoints [17, 3] with a confidence of 1: hidden ones are drawn too."""
    return np.concatenate([points[:, :2], np.ones((len(points), 1))], 1)
