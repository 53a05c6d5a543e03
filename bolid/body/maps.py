"""Control maps of a body in a pose: what the published depth, normal and openpose ControlNets take.

- depth: nearer is brighter, black where nothing is, as MiDaS' inverse depth (lllyasviel/control_v11f1p_sd15_depth,
  diffusers/controlnet-depth-sdxl-1.0). The body fills 0.25..1, so that its farthest point stands off the background.
- normal: x to the right, y up and z to the camera as red, green, blue, 0.5 the zero; the background (0.5, 0.5, 1).
- silhouette: white on black.
- openpose: COCO's keypoints of the body as OpenPose draws them; hidden keypoints too.
"""

from __future__ import annotations

import math

import numpy as np

from bolid.body.mesh import BodyModel
from bolid.body.rendering import Buffer, View, draw
from bolid.errors import BolidError

MAPS = ("depth", "normal", "silhouette", "openpose")
_FILL = 0.88  # of the picture's height (or width) that the body fills
_DISTANCE = 4.0  # statures between the camera and the person: a short telephoto
_FARTHEST = 0.25

# OpenPose's order as COCO's numbers (the neck is between the shoulders), its limbs and colours (arXiv:1812.08008).
_FROM_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip


def control_maps(
    model: BodyModel,
    parameters: np.ndarray,
    names: tuple[str, ...] = MAPS,
    *,
    pose: str = "standing",
    size: tuple[int, int] = (1216, 832),
    turn: float = 0.0,
) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] for each of the `names`, of the body [P] in a pose; `size` = (height, width), `turn` in degrees.

    The body is framed whole. Raises BolidError for an unknown map, pose or a size of less than 64 pixels.
    """
    for name in names:
        if name not in MAPS:
            raise BolidError(f"there is no map {name!r}", f"the maps are {', '.join(MAPS)}")
    if min(size) < 64 or max(size) > 8192:
        raise BolidError(f"--size is {size[1]}x{size[0]}", "give WIDTHxHEIGHT from 64 to 8192 pixels")
    vertices = model.posed(parameters, pose)
    view = framed(vertices, parameters[0], size, turn)
    buffer = draw(view, vertices, model.faces)
    makers = {
        "depth": lambda: _depth(buffer),
        "normal": lambda: _normal(buffer),
        "silhouette": lambda: np.repeat(buffer.mask[..., None] * np.uint8(255), 3, 2),
        "openpose": lambda: openpose(view.project(model.keypoints(vertices))[:, :2], size),
    }
    return {name: makers[name]() for name in names}


def framed(vertices: np.ndarray, stature: float, size: tuple[int, int], turn: float = 0.0) -> View:
    """A camera that shows the whole body [V, 3], in the middle of a picture of `size` (height, width)."""
    view = View(turn, 1.0, (0.0, 0.0), size, _DISTANCE * stature, 0.55 * stature)
    flat = view.project(vertices)[:, :2]
    low, high = flat.min(0), flat.max(0)
    scale = _FILL * min(size[0] / (high[1] - low[1]), size[1] / (high[0] - low[0]))
    middle = (low + high) / 2 * scale
    center = (size[1] / 2 - float(middle[0]), size[0] / 2 - float(middle[1]))
    return View(turn, scale, center, size, _DISTANCE * stature, 0.55 * stature)


def _depth(buffer: Buffer) -> np.ndarray:
    inverse = np.zeros(buffer.depth.shape)
    inverse[buffer.mask] = 1 / buffer.depth[buffer.mask]
    near, far = inverse[buffer.mask].max(), inverse[buffer.mask].min()
    shade = np.where(buffer.mask, _FARTHEST + (1 - _FARTHEST) * (inverse - far) / (near - far), 0)
    return np.repeat((shade[..., None] * 255 + 0.5).astype(np.uint8), 3, 2)


def _normal(buffer: Buffer) -> np.ndarray:
    toward = buffer.normals * [1, -1, -1]  # the camera's axes are right, down, away
    toward[~buffer.mask] = (0, 0, 1)
    return ((toward + 1) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def openpose(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """COCO keypoints [17, 2] in pixels of `size` (height, width) as OpenPose's picture, uint8 [H, W, 3]."""
    import cv2

    both = [points[source] if source is not None else (points[5] + points[6]) / 2 for source in _FROM_COCO]
    canvas = np.zeros((*size, 3), np.uint8)
    stick = max(1, round(4 * max(size) / 512))
    for (a, b), colour in zip(_LIMBS, _COLOURS, strict=False):
        (x0, y0), (x1, y1) = both[a], both[b]
        centre = (round(float(x0 + x1) / 2), round(float(y0 + y1) / 2))
        half, angle = int(math.hypot(x1 - x0, y1 - y0) / 2), int(math.degrees(math.atan2(y1 - y0, x1 - x0)))
        outline = cv2.ellipse2Poly(centre, (half, stick), angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, [int(0.6 * part) for part in colour])
    for (x, y), colour in zip(both, _COLOURS, strict=True):
        cv2.circle(canvas, (int(x), int(y)), stick, colour, thickness=-1)
    return canvas
