"""Pose detection with ultralytics YOLO pose networks (17 COCO keypoints), from safetensors and never from a pickle.

Shapes: B pictures, K = 17 keypoints, A anchors (all grid cells of the three strides).
Ultralytics' own predictor changes the process's thread count and cannot be differentiated, so the network and the
non-maximum suppression are ultralytics', while resizing and batching are here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors

KIND = "pose-weights"
CONFIDENCE = 0.25  # ultralytics' own default for predictions
OVERLAP = 0.6  # boxes that overlap more than this (intersection over union) are the same person
STRIDE = 32  # the network's largest; input sides are multiples of it


@dataclass(frozen=True)
class Person:
    """One detected person. Pixels of the picture that was given."""

    box: np.ndarray  # f32 [4]: left, top, right, bottom
    score: float  # 0..1
    keypoints: np.ndarray  # f32 [17,3]: x, y, confidence 0..1


class PoseModel:
    """A YOLO pose network read from a directory: `config.json` (which ultralytics yaml) and `model.safetensors`.

    `network` is the plain torch module in eval mode, convolutions and batch norms fused, frozen.
    Raises BolidError when a file is missing, damaged, not ours, or does not fit the named network.
    """

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        path = Path(path)
        config = _read_config(path / "config.json")
        tensors, self.record = load_tensors(path / "model.safetensors", KIND)
        self.image_size: int = config["imgsz"]
        self.device = torch.device(device)
        with _same_threads():
            from ultralytics.nn.tasks import PoseModel as Network

            try:
                network = Network(config["yaml"], ch=3, nc=1, data_kpt_shape=(17, 3), verbose=False)
                network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            except (RuntimeError, FileNotFoundError) as error:
                raise BolidError(
                    f"{path / 'model.safetensors'} does not hold the weights of {config['yaml']}",
                    "model.safetensors and config.json must come from the same training",
                ) from error
            self.network = network.fuse(verbose=False).eval().requires_grad_(False).to(self.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Person]]:
        """The people in each picture (uint8 [H,W,3] RGB, any sizes), the most certain first.

        Pictures are scaled so that the longest side is the network's image size. Those of equal shape share a batch,
        and a picture's result does not depend on which others are with it.
        """
        from ultralytics.utils.nms import non_max_suppression

        found: list[list[Person]] = [[] for _ in images]
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) == 0:
                raise BolidError(
                    f"a picture must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}", "decode it as RGB first"
                )
            shapes.setdefault(image.shape[:2], []).append(index)
        with _same_threads(), torch.no_grad():
            for (height, width), members in shapes.items():
                scale = self.image_size / max(height, width)
                batch = torch.stack([_letterbox(images[index], scale) for index in members]).to(self.device)
                outputs = non_max_suppression(self.raw(batch), CONFIDENCE, OVERLAP, nc=1, max_time_img=10.0, max_det=50)
                for index, rows in zip(members, outputs, strict=True):
                    found[index] = [_person(row, scale, width, height) for row in rows.cpu().numpy()]
        return found

    def raw(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 4+1+51, A] from [B,3,H,W] in 0..1, H and W multiples of 32. Differentiable, before any suppression.

        Rows: box centre x, y, width, height; score 0..1; then x, y, confidence 0..1 of each keypoint; in input pixels.
        People are found best at the size of training: scale so that the longest side is `image_size`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[2] % STRIDE or pixel_values.shape[3] % STRIDE:
            raise BolidError(
                f"the pose network takes [B,3,H,W] with H and W multiples of {STRIDE}, not {list(pixel_values.shape)}",
                "resize or pad the pictures first",
            )
        return self.network(pixel_values)[0]

    def best_person(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(keypoints [B,17,3], box [B,4], score [B]) of the most certain person in each picture [B,3,H,W] in -1..1.

        Differentiable with respect to the pixels. What `detect` finds first, without suppression: that never removes
        the best. Where there is nobody the score says so. Keypoints and box (left, top, right, bottom) are pixels of
        the given pictures, confidences and scores 0..1.
        """
        height, width = pixel_values.shape[2:]
        scale = self.image_size / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = pixel_values.float() / 2 + 0.5
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=scale < 1, align_corners=False)
        pixels = F.pad(pixels, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE), value=114 / 255)
        with _same_threads():
            raw = self.raw(pixels)
        best = raw[:, 4].argmax(-1)
        person = raw[torch.arange(len(raw), device=raw.device), :, best]  # [B,56]
        keypoints = person[:, 5:].unflatten(1, (17, 3)) / person.new_tensor([scale, scale, 1])
        centre, half = person[:, :2], person[:, 2:4] / 2
        return keypoints, torch.cat([centre - half, centre + half], 1) / scale, person[:, 4]


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        yaml, size = config["yaml"], config["imgsz"]
    except OSError as error:
        raise BolidError(
            f"no pose model in {path.parent}: cannot read {path.name} ({error.strerror})",
            "a pose model is a directory with config.json and model.safetensors",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BolidError(f"{path} is not a pose model's config", 'it needs {"yaml": ..., "imgsz": ...}') from error
    # A path here would make ultralytics read a network description from anywhere.
    if not (isinstance(yaml, str) and yaml.endswith("-pose.yaml") and Path(yaml).name == yaml):
        raise BolidError(f"{path} names the network {yaml!r}", "name one of ultralytics' own, e.g. yolo11n-pose.yaml")
    if not (isinstance(size, int) and size > 0 and size % STRIDE == 0):
        raise BolidError(f"{path}: imgsz is {size!r}", f"write a multiple of {STRIDE}")
    return config


def _letterbox(image: np.ndarray, scale: float) -> torch.Tensor:
    """f32 [3,h,w] in 0..1: scaled, then padded with grey on the right and below to multiples of STRIDE."""
    import cv2

    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if scale != 1:
        # INTER_AREA, unlike INTER_LINEAR, does not alias when it shrinks.
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    bottom, right = -height % STRIDE, -width % STRIDE
    if bottom or right:
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def _person(row: np.ndarray, scale: float, width: int, height: int) -> Person:
    """`row`: x0, y0, x1, y1, score, class, 17 x (x, y, confidence), in network pixels."""
    box = np.clip(row[:4] / scale, 0, [width, height, width, height]).astype(np.float32)
    keypoints = row[6:].reshape(17, 3) / np.array([scale, scale, 1], np.float32)
    return Person(box=box, score=float(row[4]), keypoints=keypoints.astype(np.float32))


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    """Ultralytics sets torch's thread count behind one's back; put it back."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
