"""A person's pose as the picture that openpose ControlNets take: coloured limbs on black.

Keypoints are [K, 3]: x, y in pixels and confidence 0..1; K = 17 for COCO, 18 for OpenPose (COCO's and the neck).
Order, limbs and colours are OpenPose's (Cao et al., arXiv:1812.08008), line widths those of ControlNet's annotator.
"""

from __future__ import annotations

import math

import numpy as np

from bolid.method.keypoints import MIN_CONFIDENCE, SHOULDERS

# OpenPose's order, as COCO's numbers: nose, neck, right arm, left arm, right leg, left leg, eyes, ears (right first).
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


def coco_to_openpose(keypoints: np.ndarray) -> np.ndarray:
    """COCO's [17, 3] -> OpenPose's [18, 3]. The neck: between the shoulders, with the lower of their confidences."""
    points = np.zeros((18, 3), np.float32)
    for row, source in enumerate(_FROM_COCO):
        if source is not None:
            points[row] = keypoints[source]
    shoulders = keypoints[list(SHOULDERS)]
    points[1] = [*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()]
    return points


def draw_openpose(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """COCO keypoints [17, 3], in pixels of `size` (height, width) -> uint8 [height, width, 3], RGB.

    Keypoints of a confidence below MIN_CONFIDENCE are left out, with the limbs that end there.
    """
    import cv2

    height, width = size
    points = coco_to_openpose(keypoints)
    seen = points[:, 2] >= MIN_CONFIDENCE
    canvas = np.zeros((height, width, 3), np.uint8)
    stick = max(1, round(4 * max(size) / 512))  # 4 pixels at the 512 of the published ControlNets
    for (a, b), colour in zip(_LIMBS, _COLOURS, strict=False):
        if seen[a] and seen[b]:
            (x0, y0), (x1, y1) = points[a, :2], points[b, :2]
            centre = (round(float(x0 + x1) / 2), round(float(y0 + y1) / 2))
            half, angle = int(math.hypot(x1 - x0, y1 - y0) / 2), int(math.degrees(math.atan2(y1 - y0, x1 - x0)))
            outline = cv2.ellipse2Poly(centre, (half, stick), angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, outline, [int(0.6 * part) for part in colour])
    for (x, y, _), visible, colour in zip(points, seen, _COLOURS, strict=True):
        if visible:
            cv2.circle(canvas, (int(x), int(y)), stick, colour, thickness=-1)
    return canvas
