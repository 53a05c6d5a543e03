"""The body probe: predicts body ratios from a picture. It measures generated pictures; nothing is trained with it.

Shapes: N pictures, R ratios (`ratio_names`: lengths, breadths and girths over stature, volume over stature cubed).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors

KIND = "body-probe"
FILE = "probe.safetensors"


class BodyProbe:
    """The probe read from a directory (`probe.safetensors`), frozen. It knows full bodies and three-quarters.

    `ratio_names`: the R names; `mean`, `std`: of the ratios, f32 [R], in which the network reads them; `image_size`:
    height and width of its input; `held_out_error`, from the metadata: its own error on held-out people,
    {"r2": {name: ...}, "rmse": {name: ...}, "mean_r2": ..., "pictures": ...}.
    Raises BolidError when the file is missing, damaged or not a probe.
    """

    def __init__(self, path: Path | str, device: str = "cpu") -> None:
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        tensors, self.record = load_tensors(file, KIND)
        self.device = torch.device(device)
        try:
            self.ratio_names: tuple[str, ...] = tuple(self.record["config"]["ratio_names"])
            self.image_size: tuple[int, int] = tuple(self.record["config"]["image_size"])
            self.held_out_error: dict[str, Any] = self.record["config"].get("held_out_error", {})
            self.mean, self.std = tensors.pop("mean").float().numpy(), tensors.pop("std").float().numpy()
            network = ProbeNetwork(len(self.ratio_names), self.image_size)
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise BolidError(f"{file} does not hold a body probe", "train one with examples/tiny_family") from error
        self.network = network.eval().requires_grad_(False).to(self.device)

    def predict(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """f32 [N,R]: the ratios of the person in each picture (uint8 [H,W,3] RGB, any sizes; they are
        letterboxed to `image_size`).

        The probe finds the body by itself, so that a generated picture is not measured by the pose model that may have
        guided it.
        """
        if not images:
            return np.empty((0, len(self.ratio_names)), np.float32)
        with torch.no_grad():
            pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in images]
            inputs = [fit(picture, self.image_size) for picture in pixels]
            outputs = [self._predict(torch.cat(inputs[i : i + 64]).to(self.device)) for i in range(0, len(inputs), 64)]
        return torch.cat(outputs).cpu().numpy() * self.std + self.mean

    def _predict(self, pictures: torch.Tensor) -> torch.Tensor:
        """Standardised ratios [B,R] of pictures [B,3,*image_size], averaged over each picture and its mirror image."""
        return (self.network(pictures) + self.network(pictures.flip(-1))) / 2


def fit(pixels: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Pictures [B,3,H,W] in -1..1 as [B,3,*image_size]: scaled to fit, centred, the rest grey."""
    height, width = pixels.shape[2:]
    scale = min(image_size[0] / height, image_size[1] / width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    bottom, right = image_size[0] - size[0], image_size[1] - size[1]
    return F.pad(pixels, (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2))


class ProbeNetwork(nn.Module):
    """[B,3,*image_size] in -1..1 -> [B,R] standardised ratios: a small ResNet with a head of its own for each place."""

    def __init__(self, ratios: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(3, 32, 2), conv_block(32, 64, 2), Residual(64),
            conv_block(64, 96, 2), Residual(96), Residual(96), conv_block(96, 128, 2), Residual(128), Residual(128),
        )  # fmt: skip
        rows, columns = (-(-side // 16) for side in image_size)
        # No pooling over the places: where a body part is carries as much information as how it looks.
        self.read = nn.Sequential(
            nn.Conv2d(128, 24, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.1),
            nn.Linear(24 * rows * columns, 160), nn.ReLU(inplace=True), nn.Linear(160, ratios),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B,R] of pictures [B,3,H,W]."""
        return self.read(self.body(x))


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_block(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        return F.relu(x + self.second(self.first(x)))
