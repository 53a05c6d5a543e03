"""Pose detection without AGPL: YOLOX finds the people (OpenCV's file), RTMPose their 17 COCO keypoints. On onnxruntime.

YOLOX (Ge et al., arXiv:2107.08430) and RTMPose (Jiang et al., arXiv:2303.07399), both Apache-2.0. No gradient goes
through them. Shapes: N anchors, P people, W x H the pose network's input, K = 17 keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bolid.backends.onnx_session import open_session
from bolid.backends.pose import CONFIDENCE, OVERLAP, Detection
from bolid.errors import BolidError

DETECTOR, POSE = "detector.onnx", "pose.onnx"
STRIDES = (8, 16, 32)
PADDING = 1.25  # of a box, before it is cut out, as in RTMPose's training
SPLIT = 2.0  # bins of SimCC in a pixel
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB, 0..255
MOST = 50  # people in a picture


def is_rtmpose(path: Path) -> bool:
    """Whether the folder `path` holds such a pair of networks."""
    return (path / POSE).is_file() and (path / DETECTOR).is_file()


class RTMPose:
    """`detector.onnx` and `pose.onnx` of a folder. Raises BolidError for damaged files and other networks."""

    differentiable = False

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        path = Path(path)
        self.detector, self.pose = (open_session(path / name, device) for name in (DETECTOR, POSE))
        shape, rows = self.detector.get_inputs()[0].shape, self.detector.get_outputs()[0].shape
        if shape[1:2] != [3] or not all(isinstance(side, int) for side in shape[2:]) or len(rows) != 3 or rows[2] != 85:
            raise BolidError(
                f"{path / DETECTOR} is no YOLOX for COCO's 80 classes: it takes {shape} and gives {rows}",
                "give OpenCV's object_detection_yolox_2022nov.onnx",
            )
        self.side: tuple[int, int] = (shape[2], shape[3])
        shape = self.pose.get_inputs()[0].shape
        bins = [output.shape for output in self.pose.get_outputs()]
        expected = [SPLIT * side for side in reversed(shape[2:])] if isinstance(shape[-1], int) else []
        # Exporters often leave the number of keypoints open.
        if [one[-1] for one in bins] != expected or any(one[1] != 17 for one in bins if isinstance(one[1], int)):
            raise BolidError(
                f"{path / POSE} is no RTMPose of 17 keypoints: it takes {shape} and gives {bins}",
                "give one of MMPose's rtmpose-*_simcc-body7_*.onnx",
            )
        self.size: tuple[int, int] = (shape[2], shape[3])  # H, W
        self.one = shape[0] == 1  # person at a time

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """The people in each picture (uint8 [H,W,3] RGB, any sizes), the most certain first."""
        return [self._people(image) for image in images]

    def _people(self, image: np.ndarray) -> list[Detection]:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) == 0:
            raise BolidError(
                f"a picture must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}", "decode it as RGB first"
            )
        boxes, scores = self._boxes(image)
        if not len(boxes):
            return []
        keypoints = self._keypoints(image, boxes)
        height, width = image.shape[:2]
        boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
        return [Detection(box, float(score), k) for box, score, k in zip(boxes, scores, keypoints, strict=True)]

    def _boxes(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [P, 4] in pixels of the picture and scores [P] of its people, after non-maximum suppression."""
        import cv2

        padded, scale = letterbox(image, self.side)
        name = self.detector.get_inputs()[0].name
        raw = self.detector.run(None, {name: padded.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]  # [N, 85]
        grid, stride = _anchors(self.side)
        centre = (raw[:, :2] + grid) * stride
        half = np.exp(np.minimum(raw[:, 2:4], 20)) * stride / 2
        score = raw[:, 4] * raw[:, 5]  # of an object, and of that being a person
        boxes = np.concatenate([centre - half, centre + half], 1) / scale
        corner_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        kept = cv2.dnn.NMSBoxes(corner_size.tolist(), score.tolist(), CONFIDENCE, OVERLAP)
        order = sorted(np.array(kept, int).reshape(-1).tolist(), key=lambda i: -score[i])[:MOST]
        return boxes[order], score[order]

    def _keypoints(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """f32 [P, 17, 3]: x, y in pixels of the picture, confidence 0..1."""
        import cv2

        height, width = self.size
        centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * PADDING
        # In the network's aspect ratio.
        scale = np.maximum(np.maximum(extent[:, 0] / width, extent[:, 1] / height), 1e-6)  # picture per input pixel
        corner = centre - scale[:, None] * [width / 2, height / 2]
        crops = []
        for (left, top), step in zip(corner, scale, strict=True):
            back = np.array([[step, 0, left], [0, step, top]])
            crop = cv2.warpAffine(image, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            crops.append((crop - np.array(MEAN)) / np.array(STD))
        batch = np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32)
        name = self.pose.get_inputs()[0].name
        parts = [batch[i : i + 1] for i in range(len(batch))] if self.one else [batch]
        outputs = [self.pose.run(None, {name: part}) for part in parts]
        along_x, along_y = (np.concatenate([each[axis] for each in outputs]) for axis in (0, 1))
        if along_x.shape[1] != 17 or along_y.shape[1] != 17:
            raise BolidError(f"the pose network gives {along_x.shape[1]} keypoints", "give an RTMPose of COCO's 17")
        places = np.stack([along_x.argmax(2), along_y.argmax(2)], 2) / SPLIT  # [P, 17, 2], input pixels
        sure = np.minimum(along_x.max(2), along_y.max(2)).clip(0, 1)
        points = places * scale[:, None, None] + corner[:, None]
        return np.concatenate([points, sure[..., None]], 2).astype(np.float32)


def letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """(the picture scaled into the upper left of uint8 [*size, 3], grey elsewhere; the scale)."""
    import cv2

    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    shape = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    padded = np.full((*size, 3), 114, np.uint8)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR  # without aliasing
    padded[: shape[1], : shape[0]] = cv2.resize(image, shape, interpolation=interpolation)
    return padded, scale


def _anchors(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The cells [N, 2] (x, y) of all strides, and their strides [N, 1]."""
    cells, strides = [], []
    for stride in STRIDES:
        y, x = np.mgrid[: size[0] // stride, : size[1] // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], 1))
        strides.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(strides)
