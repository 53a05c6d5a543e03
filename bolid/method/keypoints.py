"""COCO's 17 keypoints of a person: their order, the bones between them, and the confidence at which they count.

Keypoints are [..., 17, 3]: x, y in pixels and confidence 0..1. Everything that needs a keypoint's number takes it from
here.
"""

from __future__ import annotations

NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
KEYPOINTS = len(NAMES)
MIRRORED = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
"""Each keypoint's counterpart on the other side: `keypoints[:, MIRRORED]` swaps left and right."""

HEAD = slice(0, 5)  # nose, eyes, ears
BODY = slice(5, 17)  # shoulders, elbows, wrists, hips, knees, ankles: the 12 keypoints of L_id (Eq. 14)
SHOULDERS, HIPS, KNEES, ANKLES = (5, 6), (11, 12), (13, 14), (15, 16)  # (left, right)
TORSO = (*SHOULDERS, *HIPS)

BONES: dict[str, tuple[tuple[int, int], ...]] = {
    "upper_arm": ((5, 7), (6, 8)),
    "forearm": ((7, 9), (8, 10)),
    "thigh": ((11, 13), (12, 14)),
    "shin": ((13, 15), (14, 16)),
    "torso": ((5, 11), (6, 12)),
    "shoulders": ((5, 6),),
    "hips": ((11, 12),),
}
"""Bones by name: pairs of keypoints, left and right where there are two."""
SCALE_BONES = ("torso", "thigh", "shin")
"""Lengths and widths are divided by the sum of these three: that takes the distance to the camera out."""

MIN_CONFIDENCE = 0.3
"""A keypoint of less confidence counts as not visible."""
MIN_BONE_CONFIDENCE = 0.5
"""A bone is measured when both its ends have this confidence: a wrong end makes a length useless, not only noisy."""
