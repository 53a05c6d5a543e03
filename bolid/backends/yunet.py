"""Faces without InsightFace's packs: YuNet (MIT, OpenCV's file) finds them, AuraFace (Apache-2.0) tells them apart.

YuNet: Wu et al., Machine Intelligence Research 20 (2023). AuraFace: an ArcFace recogniser trained on data that permits
commercial use. InsightFace's library, MIT, aligns the faces and runs the recogniser. No gradient goes through them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bolid.backends.face import ALIGNED, EMBEDDING_SIZE, Face, quiet_insightface
from bolid.backends.onnx_session import open_session
from bolid.backends.rtmpose import STRIDES, letterbox
from bolid.errors import BolidError
from bolid.run import sha256_file

DETECTOR = "yunet.onnx"
SIDE = 640  # pixels; sides of the detector's input
CONFIDENCE, OVERLAP = 0.6, 0.3  # of the score, and of two boxes of one face: those of OpenCV's example


def is_yunet(path: Path) -> bool:
    """Whether the folder `path` holds such a detector."""
    return (path / DETECTOR).is_file()


class YuNetFaces:
    """`yunet.onnx` of a folder and the recogniser beside it. `sha256` is the recogniser's.

    Raises BolidError for damaged files and other networks.
    """

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        path = Path(path)
        others = [file for file in sorted(path.glob("*.onnx")) if file.name != DETECTOR]
        if len(others) != 1:
            raise BolidError(
                f"{path} holds {len(others)} recognisers beside {DETECTOR}", "put one there, like auraface.onnx"
            )
        self.detector = open_session(path / DETECTOR, device)
        self.outputs = [output.name for output in self.detector.get_outputs()]
        if wanted := {f"{name}_{s}" for name in ("cls", "obj", "bbox", "kps") for s in STRIDES} - set(self.outputs):
            raise BolidError(
                f"{path / DETECTOR} is no YuNet: it has no output {sorted(wanted)[0]}",
                "give OpenCV's face_detection_yunet_2023mar.onnx",
            )
        session = open_session(others[0], device)
        shape = session.get_inputs()[0].shape[1:]
        if shape != [3, ALIGNED, ALIGNED] or session.get_outputs()[0].shape[-1] != EMBEDDING_SIZE:
            raise BolidError(
                f"{others[0]} is no ArcFace-shaped recogniser", f"it takes [B,3,112,112] and gives {EMBEDDING_SIZE}"
            )
        with quiet_insightface():
            from insightface.model_zoo.arcface_onnx import ArcFaceONNX

            self.recogniser = ArcFaceONNX(model_file=str(others[0]), session=session)
        self.sha256 = sha256_file(others[0])

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a picture (uint8 [H,W,3] RGB), the most certain first."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) == 0:
            raise BolidError(
                f"a picture must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}", "decode it as RGB first"
            )
        faces = []
        for box, score, landmarks in self._find(image):
            with quiet_insightface():
                from insightface.utils.face_align import norm_crop

                bgr = np.ascontiguousarray(image[..., ::-1])  # InsightFace takes BGR
                vector = self.recogniser.get_feat(norm_crop(bgr, landmarks, ALIGNED)).ravel()
            unit = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
            faces.append(Face(box, score, landmarks, unit))
        return faces

    def _find(self, image: np.ndarray) -> list[tuple[np.ndarray, float, np.ndarray]]:
        """(box f32 [4], score, landmarks f32 [5, 2]) of each face, the most certain first."""
        import cv2

        padded, scale = letterbox(image, (SIDE, SIDE))
        pixels = padded[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)  # BGR, 0..255
        found = self.detector.run(self.outputs, {self.detector.get_inputs()[0].name: pixels})
        output = dict(zip(self.outputs, found, strict=True))
        boxes, scores, points = [], [], []
        for stride in STRIDES:
            cls, obj, bbox, kps = (output[f"{name}_{stride}"][0] for name in ("cls", "obj", "bbox", "kps"))
            y, x = np.mgrid[: SIDE // stride, : SIDE // stride]
            cell = np.stack([x.ravel(), y.ravel()], 1)
            scores.append(np.sqrt(cls.clip(0, 1) * obj.clip(0, 1))[:, 0])
            size = np.exp(np.minimum(bbox[:, 2:], 20)) * stride
            boxes.append(np.concatenate([(cell + bbox[:, :2]) * stride - size / 2, size], 1))
            points.append((kps.reshape(-1, 5, 2) + cell[:, None]) * stride)
        box, score, point = np.concatenate(boxes), np.concatenate(scores), np.concatenate(points)
        kept = cv2.dnn.NMSBoxes(box.tolist(), score.tolist(), CONFIDENCE, OVERLAP)
        order = sorted(np.array(kept, int).reshape(-1).tolist(), key=lambda i: -score[i])
        corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1) / scale
        return [(corners[i].astype(np.float32), float(score[i]), (point[i] / scale).astype(np.float32)) for i in order]
