"""Which pose and which face model a folder holds: what finds people is chosen by its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from bolid.backends.face import Face
    from bolid.backends.pose import Detection


class PoseDetector(Protocol):
    """Finds people."""

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """The people in each picture (uint8 [H,W,3] RGB), the most certain first."""


class FaceDetector(Protocol):
    """Finds faces and embeds them. `sha256`: of the recogniser."""

    sha256: str

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a picture (uint8 [H,W,3] RGB), the most certain first."""


def pose_detector(path: Path, device: str = "cpu") -> PoseDetector:
    """RTMPose where the folder holds it, else a YOLO pose network."""
    from bolid.backends.pose import PoseModel
    from bolid.backends.rtmpose import RTMPose, is_rtmpose

    return RTMPose(path, device) if is_rtmpose(path) else PoseModel(path, device)


def face_detector(path: Path, device: str = "cpu") -> FaceDetector:
    """YuNet and its recogniser where the folder holds them, else an InsightFace pack."""
    from bolid.backends.face import FaceModel
    from bolid.backends.yunet import YuNetFaces, is_yunet

    return YuNetFaces(path, device) if is_yunet(path) else FaceModel(path, device)
