"""A person's silhouette with OpenCV's GrabCut, started from the pose: no weights, so every family has it."""

from __future__ import annotations

import numpy as np

from bolid.method.keypoints import MIN_CONFIDENCE

NAME = "GrabCut from the pose"
HEIGHT = 160  # larger pictures are reduced to this many rows: outlines need no more, and time grows with the area
# Drawn as certainly body, with the thickness of a limb's core.
_LINES = ((5, 6), (11, 12), (5, 11), (6, 12), (5, 12), (6, 11), (5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15),
          (12, 14), (14, 16), (0, 5), (0, 6))  # fmt: skip


def silhouette(image: np.ndarray, box: np.ndarray, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mask bool [h, w], keypoints [17, 3] on it) of the person in `box` of a picture (uint8 [H, W, 3] RGB).

    (h, w) is the picture's size, reduced to HEIGHT rows. Bones are certainly foreground; places far from them or
    outside the box are certainly background; GrabCut (Rother et al. 2004) decides the rest. Deterministic.
    """
    import cv2

    scale = min(1.0, HEIGHT / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    points = keypoints.astype(np.float32) * np.array([scale, scale, 1], np.float32)
    left, top, right, bottom = (float(side) * scale for side in box)
    tall = max(bottom - top, 8.0)
    body, core, near = (_skeleton(points, small.shape[:2], part * tall) for part in (0.015, 0.07, 0.24))
    labels = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    margin = 0.03 * tall
    rows = slice(max(0, int(top - margin)), int(np.ceil(bottom + margin)))
    columns = slice(max(0, int(left - margin)), int(np.ceil(right + margin)))
    labels[rows, columns] = np.where(near[rows, columns], cv2.GC_PR_BGD, cv2.GC_BGD)
    labels[core] = cv2.GC_PR_FGD
    labels[body] = cv2.GC_FGD
    if not (labels == cv2.GC_BGD).any() or not body.any():
        return labels == cv2.GC_FGD, points
    cv2.setRNGSeed(0)  # its clusters start at random
    models = np.zeros((1, 65), np.float64), np.zeros((1, 65), np.float64)
    cv2.grabCut(np.ascontiguousarray(small[..., ::-1]), labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), points


def _skeleton(points: np.ndarray, size: tuple[int, int], thickness: float) -> np.ndarray:
    """The visible bones as lines of `thickness` pixels: bool of `size`."""
    import cv2

    drawn = np.zeros(size, np.uint8)
    for start, end in _LINES:
        if min(points[start, 2], points[end, 2]) >= MIN_CONFIDENCE:
            a, b = ((round(float(points[i, 0])), round(float(points[i, 1]))) for i in (start, end))
            cv2.line(drawn, a, b, 1, max(1, round(thickness)))
    return drawn > 0
