"""The ground truth of a rendered photo: keypoints, the person's box, the face's box and landmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from bolid.synth.camera import Camera

# How far behind the visible surface a keypoint may lie and still count as visible, over the stature: joints lie inside.
DEPTH_TOLERANCE = np.array([0.03] * 5 + [0.13, 0.13, 0.08, 0.08, 0.07, 0.07, 0.17, 0.17, 0.10, 0.10, 0.08, 0.08])
MAX_FACE_YAW = 65  # degrees; a face turned further away has no box


def person_box(alpha: np.ndarray) -> list[int] | None:
    """[left, top, right, bottom] of the person's opacity [H, W]; None for an empty picture."""
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None


def keypoint_marks(
    projected: np.ndarray, depth: np.ndarray, size: tuple[int, int], stature: float
) -> list[list[float]]:
    """COCO's keypoints [17][x, y, v]; v is 0 outside the picture, 1 hidden, 2 visible.

    `projected` [17, 3]: x and y in pixels and depth; `depth`: of the rendered surface, in any multiple of `size`.
    """
    height, width = size
    scale = depth.shape[0] // height
    marks: list[list[float]] = []
    for (x, y, z), slack in zip(projected, DEPTH_TOLERANCE * stature, strict=True):
        inside = 0 <= x < width and 0 <= y < height
        visible = inside and depth[int(y * scale), int(x * scale)] > z - slack
        marks.append([round(float(x), 2), round(float(y), 2), (2 if visible else 1) if inside else 0])
    return marks


def face_truth(
    camera: Camera, projected: np.ndarray, keypoints: np.ndarray, corners: np.ndarray, marks: list[list[float]],
    size: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """face_box [left, top, right, bottom], face_landmarks [5][x, y] in InsightFace's order, face_yaw in degrees.

    All None for a face turned away, hidden or outside the picture. `keypoints` [17, 3] and the mouth's `corners` [2, 3]
    are in world coordinates, `projected` and `marks` as in `keypoint_marks`.
    """
    height, width = size
    landmarks = np.concatenate([projected[[2, 1, 0], :2], camera.project(corners)[:, :2]])  # the picture's left first
    yaw = _face_yaw(keypoints)
    whole = ((landmarks > 0) & (landmarks < [width, height])).all()
    if not (whole and abs(yaw) < MAX_FACE_YAW and min(mark[2] for mark in marks[:3]) > 0):
        return {"face_box": None, "face_landmarks": None, "face_yaw": None}
    center = landmarks.mean(0)
    reach = max(
        np.linalg.norm(landmarks[2] - (landmarks[0] + landmarks[1]) / 2),
        np.linalg.norm(landmarks[3] - landmarks[0]) * 0.62,
        np.linalg.norm(landmarks[1] - landmarks[0]) * 0.8,
    )
    box = [
        center[0] - reach * 1.15,
        center[1] - reach * 1.45,
        center[0] + reach * 1.15,
        center[1] + reach * 1.35,
    ]
    return {
        "face_box": [round(float(v), 2) for v in box],
        "face_landmarks": [[round(float(v), 2) for v in p] for p in landmarks],
        "face_yaw": round(yaw, 1),
    }


def _face_yaw(keypoints: np.ndarray) -> float:
    """Turn of the head against the camera in degrees, from the ears' direction."""
    ears = keypoints[3] - keypoints[4]
    return float(np.degrees(np.arctan2(ears[1], ears[0])))
