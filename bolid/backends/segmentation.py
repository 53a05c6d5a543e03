"""The person's mask, by the family's segmentation network: YOLO11-seg, Mask R-CNN, or our own small one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from bolid.backends import mask_rcnn
from bolid.backends.pose import CONFIDENCE, CONFIG, OVERLAP, WEIGHTS, letterbox, read_config, same_threads
from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method import segmentation
from bolid.method.body_views import view_crop
from bolid.method.mask_views import MASK_SIZE, MaskView
from bolid.run import run_record, write_atomic

NETWORK = "segmentation-weights"
OWN = "masknet"  # the name of our network in config.json
YOLO_SIZE = 640  # pixels of a photo's longer side
MIN_OVERLAP = 0.3  # intersection over union of the pose's box and a mask's box, for one person
PERSON, CLASSES = 0, 80  # COCO's classes


class Segmenter(Protocol):
    """A family's segmentation network."""

    def segment(self, image: np.ndarray, box: np.ndarray, keypoints: np.ndarray) -> MaskView | None:
        """The mask of the person in `box` [4] with these `keypoints` [17, 3], pixels of `image`, uint8 [H, W, 3].

        None where the network sees nobody there.
        """


def load_segmenter(path: Path | str, device: str = "cpu") -> Segmenter:
    """The network in the directory `path`: config.json names it, model.safetensors has its weights.

    Raises BolidError for files that are missing, damaged or of another network.
    """
    path = Path(path)
    yaml, size = read_config(path, "segmentation", "-seg.yaml", (OWN, mask_rcnn.NAME))
    tensors, _ = load_tensors(path / WEIGHTS, NETWORK)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        if yaml == OWN:
            return OwnSegmenter(weights, device)
        if yaml == mask_rcnn.NAME:
            return MaskRCNNSegmenter(size, weights, device)
        return YoloSegmenter(yaml, size, weights, device)
    except (RuntimeError, FileNotFoundError) as error:
        raise BolidError(
            f"{path / WEIGHTS} does not hold the weights of {yaml}",
            f"{WEIGHTS} and {CONFIG} must come from the same training",
        ) from error


def save_segmenter(directory: Path, network: torch.nn.Module, record: dict[str, Any]) -> None:
    """Write our own network, f16, as `load_segmenter` reads it."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    save_tensors(directory / WEIGHTS, half, record)
    write_atomic(directory / CONFIG, json.dumps({"yaml": OWN}) + "\n")


def write_segmenter(
    directory: Path, yaml: str, tensors: Mapping[str, torch.Tensor], *, source: str = "", sha256: str = ""
) -> None:
    """Write a published network, f16, as `load_segmenter` reads it. `source`, `sha256`: of the original weights.

    `yaml`: ultralytics' name of the network, or `mask_rcnn.NAME`.
    """
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    record = run_record(
        NETWORK, family=None, config={"source": source}, inputs={"checkpoint": sha256} if sha256 else {}
    )
    save_tensors(directory / WEIGHTS, half, record)
    size = mask_rcnn.SIDE if yaml == mask_rcnn.NAME else YOLO_SIZE
    write_atomic(directory / CONFIG, json.dumps({"yaml": yaml, "imgsz": size}) + "\n")


class OwnSegmenter:
    """`method.segmentation.MaskNet`, which sees the window of the person alone."""

    def __init__(self, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        self.device = device
        self.network = segmentation.MaskNet()
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def segment(self, image: np.ndarray, box: np.ndarray, keypoints: np.ndarray) -> MaskView | None:
        """See `Segmenter`. It takes the person for granted."""
        crop, inside = view_crop(image, keypoints, detail=segmentation.DETAIL)
        pixels = torch.tensor(crop).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        logits = self.network(pixels, torch.from_numpy(inside).to(self.device)[None])
        fine = F.interpolate(logits[:, None], MASK_SIZE, mode="bilinear", align_corners=False)
        return MaskView((fine[0, 0] > 0).cpu().numpy(), inside)


class YoloSegmenter:
    """YOLO-seg of COCO's 80 classes, as ultralytics publishes it; of the people it sees, the one in the box."""

    def __init__(self, yaml: str, image_size: int, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        self.image_size, self.device = image_size, device
        with same_threads():
            from ultralytics.nn.tasks import SegmentationModel

            network = SegmentationModel(yaml, ch=3, nc=CLASSES, verbose=False)
            network.load_state_dict(weights)
            self.network = network.fuse(verbose=False).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def segment(self, image: np.ndarray, box: np.ndarray, keypoints: np.ndarray) -> MaskView | None:
        """See `Segmenter`."""
        from ultralytics.utils.nms import non_max_suppression

        scale = self.image_size / max(image.shape[:2])
        with same_threads():
            pixels = letterbox(image, scale)[None].to(self.device)
            (raw, prototypes), _ = self.network(pixels)
            people = non_max_suppression(raw, CONFIDENCE, OVERLAP, nc=CLASSES, classes=[PERSON], max_time_img=10.0)[0]
        # A row: left, top, right, bottom, score, class, 32 coefficients of the prototypes; network pixels.
        overlaps = [_overlap(row[:4].cpu().numpy() / scale, box) for row in people]
        if not overlaps or max(overlaps) < MIN_OVERLAP:
            return None
        best = people[int(np.argmax(overlaps))]
        logits = torch.einsum("c,chw->hw", best[6:], prototypes[0])
        whole = F.interpolate(logits[None, None], tuple(pixels.shape[2:]), mode="bilinear", align_corners=False)[0, 0]
        height, width = (round(side * scale) for side in image.shape[:2])
        points = keypoints * np.array([scale, scale, 1], np.float32)
        return MaskView.cut((whole[:height, :width] > 0).cpu().numpy(), points)


class MaskRCNNSegmenter:
    """torchvision's Mask R-CNN (`mask_rcnn`); of the people it sees, the one in the box."""

    def __init__(self, image_size: int, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        self.image_size, self.device = image_size, device
        self.network = mask_rcnn.build(image_size)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def segment(self, image: np.ndarray, box: np.ndarray, keypoints: np.ndarray) -> MaskView | None:
        """See `Segmenter`."""
        boxes, masks, scale = mask_rcnn.people_masks(self.network, image, CONFIDENCE, self.device)
        overlaps = [_overlap(found / scale, box) for found in boxes]
        if not overlaps or max(overlaps) < MIN_OVERLAP:
            return None
        points = keypoints * np.array([scale, scale, 1], np.float32)
        return MaskView.cut(masks[int(np.argmax(overlaps))], points)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes [4]."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(sides.clip(0).prod())
    return shared / (float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared + 1e-9)
