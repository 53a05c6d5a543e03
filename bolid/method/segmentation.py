"""The person's mask from a crop and its keypoints: a small U-Net (Ronneberger et al. 2015).

Shapes: N crops of (H, W) = SIZE around a person, as `body_views.view_crop` cuts them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from bolid.method.body_views import gaussian_keypoint_weight

DETAIL = 4 / 3  # of the crops
SIZE = (128, 96)
SIGMA = 0.03  # of the Gaussians at the keypoints, in heights of the crop
WIDTHS = (16, 24, 40, 64)


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True),
        nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True),
    )  # fmt: skip


class MaskNet(nn.Module):
    """Crop and keypoints -> logits of the mask. The keypoints say which person is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(a, b, 2) for a, b in zip((4, *WIDTHS), WIDTHS, strict=False))
        pairs = list(itertools.pairwise(WIDTHS))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(WIDTHS[0], 4, 3, 1, 1)  # the four pixels of a cell

    def forward(self, crops: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """crops [N, 3, H, W] in -1..1, keypoints [N, 17, 3] in -1..1 over them => logits [N, H, W]"""
        weight = gaussian_keypoint_weight(keypoints, (crops.shape[2], crops.shape[3]), SIGMA)
        x, skips = torch.cat([crops, 2 * weight[:, None] - 1], 1), []
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], 1))
        return F.pixel_shuffle(self.out(x), 2)[:, 0]


def loss_mask(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus the soft Dice loss (Milletari et al. 2016), scalar. Both [N, H, W], `mask` 0..1."""
    likely = logits.sigmoid()
    dice = 1 - (2 * (likely * mask).sum((1, 2)) + 1) / (likely.sum((1, 2)) + mask.sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + dice.mean()
