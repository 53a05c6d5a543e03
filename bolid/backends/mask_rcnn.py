"""The person's mask without AGPL: torchvision's Mask R-CNN of COCO (He et al., arXiv:1703.06870), BSD-3-Clause.

It sees every person of a photo by itself, so that one who stands behind another is told apart. Shapes: N people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bolid.errors import BolidError

NAME = "maskrcnn_resnet50_fpn_v2"  # torchvision's name; the network's in config.json
SIDE = 800  # pixels of a photo's shorter side, as in its training
LONGEST = 1333 / 800  # the longer side over SIDE, at most
CLASSES, PERSON = 91, 1  # COCO's numbering, with a background
MOST = 50  # things in a photo


def build(side: int = SIDE) -> torch.nn.Module:
    """The network with random weights, for photos whose shorter side has `side` pixels."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    return maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES, box_detections_per_img=MOST,
        min_size=side, max_size=round(side * LONGEST),
    )  # fmt: skip


def people_masks(
    network: torch.nn.Module, image: np.ndarray, score: float, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray, float]:
    """(boxes f32 [N, 4], how likely each pixel is of the person u8 [N, h, w], scale) of a photo, uint8 [H, W, 3].

    `scale`: pixels of boxes and masks per pixel of the photo. People of less than `score` are left out.
    """
    import cv2

    side, longest = network.transform.min_size[0], network.transform.max_size
    scale = min(side / min(image.shape[:2]), longest / max(image.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    # So large as the network resizes to: a mask of a large photo at its own size would fill the memory.
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    found = network([torch.tensor(resized).to(device).permute(2, 0, 1).float() / 255])[0]
    people = (found["labels"] == PERSON) & (found["scores"] >= score)
    masks = (found["masks"][people, 0] * 255).round().byte()
    return found["boxes"][people].cpu().numpy(), masks.cpu().numpy(), scale


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of torchvision's file, maskrcnn_resnet50_fpn_v2_coco-*.pth.

    A pickle, read by torch's restricted reader: nothing in it is run. Raises BolidError for another network's weights.
    """
    if not path.is_file():
        raise BolidError(f"there is no {path}", f"give a file like {NAME}_coco-73cbd019.pth")
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own class, which nothing here may import, and zip files' of all kinds
        raise BolidError(
            f"{path} is refused: it is damaged, or holds more than tensors", "fetch torchvision's own file again"
        ) from error
    with torch.device("meta"):
        expected = build().state_dict()
    shapes = (
        {name: getattr(value, "shape", None) for name, value in tensors.items()} if isinstance(tensors, dict) else {}
    )
    if shapes != {name: value.shape for name, value in expected.items()}:
        raise BolidError(f"{path} holds no Mask R-CNN for COCO", f"give torchvision's {NAME}_coco-73cbd019.pth")
    return dict(tensors)
