"""Gamma_body: photos of a person -> c_body (BoLID section 5.2), a variational encoder over views.

Every view gives a Gaussian over z; the views are fused by a product of experts; the decoder rebuilds the body of a
held-out view *given that view's pose*, so z keeps what the pose does not tell: proportions and build.

Shapes: B people, M views of one person, N = views in a flat batch, K = 17 COCO keypoints, D body dimension,
(H, W) = CROP_SIZE. Crops are float NCHW -1..1 (uint8 HWC in files). Keypoints are (x, y, confidence): pixels of the
stored picture in files, and -1..1 over the crop once a view is made of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CROP_SIZE = (96, 72)
KEYPOINTS = 17
FLIP = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]  # left <-> right in COCO's order
MID_SHOULDER, MID_HIP = 17, 18  # two points that COCO lacks, appended by `bones`
BONES = (
    (5, 6), (11, 12), (5, 11), (6, 12), (MID_SHOULDER, MID_HIP), (0, MID_SHOULDER), (3, 4),
    (5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16),
)  # fmt: skip
MIN_CONFIDENCE = 0.3  # keypoints below do not count as seen


class Views(NamedTuple):
    """What the encoder sees of N photos."""

    crops: torch.Tensor  # [N, 3, H, W] float -1..1
    keypoints: torch.Tensor  # [N, K, 3], (x, y) in -1..1 over the crop, confidence 0..1
    features: torch.Tensor | None = None  # [N, K, C] image-text patch features pooled at the keypoints


# ---- a view -------------------------------------------------------------------------------------------------------


def gaussian_keypoint_weight(keypoints: torch.Tensor, size: tuple[int, int], sigma: float) -> torch.Tensor:
    """w(x, y) = max_k conf_k exp(-((x - x_k)^2 + (y - y_k)^2) / 2 sigma^2), scaled so that its peak is 1 (section 5.2).

    `keypoints` [N, K, 3] in -1..1 over a map of `size` = (h, w); `sigma` in units of the map's height. => [N, h, w]
    """
    h, w = size
    y = (torch.arange(h, device=keypoints.device, dtype=keypoints.dtype) + 0.5) / h
    x = (torch.arange(w, device=keypoints.device, dtype=keypoints.dtype) + 0.5) / w * (w / h)
    x_k = (keypoints[..., 0] + 1) / 2 * (w / h)
    y_k = (keypoints[..., 1] + 1) / 2
    # A Gaussian over the plane is the product of one along each axis: K * (h + w) exponentials, not K * h * w.
    along_x = torch.exp(-((x - x_k[..., None]) ** 2) / (2 * sigma**2))  # [N, K, w]
    along_y = torch.exp(-((y - y_k[..., None]) ** 2) / (2 * sigma**2)) * keypoints[..., 2:3]  # [N, K, h]
    weight = (along_y[..., :, None] * along_x[..., None, :]).amax(dim=-3)
    return weight / weight.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-6)


def view_crop(
    image: np.ndarray, keypoints: np.ndarray, border: tuple[int, int] = (0, 0), margin: float = 0.18
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the person out, scale-normalised: the box of the seen keypoints plus `margin`, in CROP_SIZE's proportions.

    `image` uint8 [h, w, 3]; `keypoints` [K, 3] in its pixels. => uint8 crop [H + 2 border_y, W + 2 border_x, 3], and
    the keypoints [K, 3] in -1..1 over its inner CROP_SIZE; those that are not seen get confidence 0 and lie at 0.
    Outside the picture the crop repeats its edge. The border is what `augment` may shift the crop into.
    """
    from PIL import Image

    (crop_h, crop_w), (border_y, border_x) = CROP_SIZE, border
    seen = keypoints[:, 2] >= MIN_CONFIDENCE
    xy = keypoints[seen, :2] if seen.any() else keypoints[:, :2]
    low, high = xy.min(axis=0), xy.max(axis=0)
    centre, (box_w, box_h) = (low + high) / 2, np.maximum(high - low, 4.0)
    # Pixels of the picture per pixel of the crop. One scale for both axes, or a crop would change the proportions
    # that are to be measured.
    scale = (1 + 2 * margin) * max(box_h / crop_h, box_w / crop_w)
    half = np.array([crop_w, crop_h]) / 2
    low = centre - scale * (half + [border_x, border_y])
    high = centre + scale * (half + [border_x, border_y])
    pad = int(np.ceil(max(0, -low.min(), high[0] - image.shape[1], high[1] - image.shape[0])))
    if pad:
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = Image.fromarray(image).resize(
        (crop_w + 2 * border_x, crop_h + 2 * border_y), Image.Resampling.BILINEAR, box=(*(low + pad), *(high + pad))
    )
    inside = np.zeros((KEYPOINTS, 3), np.float32)
    inside[seen, :2] = (keypoints[seen, :2] - centre) / (scale * half)
    inside[seen, 2] = keypoints[seen, 2].clip(0, 1)
    return np.asarray(crop), inside


def view_confidence(keypoints: torch.Tensor) -> torch.Tensor:
    """How far a view can be trusted: the mean confidence of its keypoints. [..., K, 3] => [...], 0..1"""
    return keypoints[..., 2].mean(dim=-1)


def bones(keypoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A view's pose and its proportions, apart. keypoints [N, K, 3] => directions, log-lengths, confidences.

    directions [N, bones, 2] are unit vectors (the pose: no lengths in it); log-lengths [N, bones] have their
    confidence-weighted mean subtracted (proportions: no scale in them); a bone is as sure as its worse end.
    """
    middle = torch.stack([keypoints[:, [5, 6]].mean(1), keypoints[:, [11, 12]].mean(1)], dim=1)
    ends = keypoints[:, [[5, 6], [11, 12]], 2].amin(dim=-1)
    middle = torch.cat([middle[..., :2], ends[..., None]], dim=-1)
    points = torch.cat([keypoints, middle], dim=1)
    start, end = points[:, [a for a, _ in BONES]], points[:, [b for _, b in BONES]]
    vector = (end[..., :2] - start[..., :2]) * vector_aspect(points)
    length = vector.norm(dim=-1).clamp_min(1e-3)
    confidence = torch.minimum(start[..., 2], end[..., 2])
    log_length = length.log()
    mean = (log_length * confidence).sum(-1, keepdim=True) / confidence.sum(-1, keepdim=True).clamp_min(1e-6)
    return vector / length[..., None] * (confidence[..., None] > 0), log_length - mean, confidence


def vector_aspect(like: torch.Tensor) -> torch.Tensor:
    """-1..1 over the crop spans fewer pixels in x than in y; this makes both the same length. [2]"""
    return torch.tensor([CROP_SIZE[1] / CROP_SIZE[0], 1.0], device=like.device, dtype=like.dtype)


# ---- the network --------------------------------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.conv2(self.conv1(x))))


class CropEncoder(nn.Module):
    """The weighted crop -> one vector: a small CNN, read out around the keypoints and over the whole crop."""

    def __init__(self, width: int, local_dim: int = 24, global_dim: int = 128) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_conv(4, w, 2), _conv(w, 2 * w, 2), _Residual(2 * w))  # => H/4
        self.middle = nn.Sequential(_conv(2 * w, 4 * w, 2), _Residual(4 * w))  # => H/8
        self.top = nn.Sequential(_conv(4 * w, 6 * w, 2), _Residual(6 * w))  # => H/16
        self.local = nn.Conv2d(4 * w, local_dim, 1)
        self.whole = nn.Linear(6 * w * (CROP_SIZE[0] // 16) * -(-CROP_SIZE[1] // 16), global_dim)
        self.out_dim = KEYPOINTS * local_dim + global_dim

    def forward(self, crops: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        weight = gaussian_keypoint_weight(keypoints, CROP_SIZE, sigma=0.06)[:, None]
        x = torch.cat([crops, 2 * weight - 1], dim=1).contiguous(memory_format=torch.channels_last)
        middle = self.middle(self.stem(x))
        whole = self.whole(self.top(middle).flatten(1))
        at = F.grid_sample(self.local(middle), keypoints[:, :, None, :2], align_corners=False)  # [N, local, K, 1]
        local = at[..., 0].transpose(1, 2) * keypoints[..., 2:]
        return torch.cat([local.flatten(1), whole], dim=1)


class BodyVAE(nn.Module):
    """q(z | views) and p(view | z, pose). See the module's docstring; `view` says what a view is represented by."""

    def __init__(
        self, body_dim: int = 64, width: int = 16, hidden_dim: int = 256, view: str = "crop", feature_dim: int = 0
    ) -> None:
        super().__init__()
        if view not in ("crop", "pooled", "both"):
            raise ValueError(f"view is crop, pooled or both, not {view!r}")
        self.body_dim, self.view, self.feature_dim = body_dim, view, 0 if view == "crop" else feature_dim
        in_dim = KEYPOINTS * 3 + len(BONES) * 4
        if view != "pooled":
            self.crop_encoder = CropEncoder(width)
            in_dim += self.crop_encoder.out_dim
        if view != "crop":
            self.features = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, 24))
            in_dim += KEYPOINTS * 24
        self.head = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
        )
        # Normed, so that views start out far apart: else telling people apart begins by calling them all unknown.
        self.mean = nn.Sequential(nn.Linear(hidden_dim, body_dim), nn.BatchNorm1d(body_dim))
        self.logvar = nn.Linear(hidden_dim, body_dim)
        nn.init.constant_(self.logvar.bias, 1.0)  # a view starts out saying little
        pose_dim = len(BONES) * 3
        self.decode_bones = nn.Sequential(
            nn.Linear(body_dim + pose_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, len(BONES))
        )
        self.decode_outline = nn.Sequential(
            nn.Linear(body_dim + KEYPOINTS * 3, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, math.prod(OUTLINE_SIZE))
        )

    def encode(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z | one view) without the prior: mean [N, D], logvar [N, D]."""
        keypoints = views.keypoints
        directions, log_lengths, confidence = bones(keypoints)
        parts = [keypoints.flatten(1), directions.flatten(1), log_lengths * (confidence > 0), confidence]
        if self.view != "pooled":
            parts.append(self.crop_encoder(views.crops, keypoints))
        if self.view != "crop":
            if views.features is None:
                raise ValueError("this body encoder needs the image-text features of the views")
            parts.append((self.features(views.features.float()) * keypoints[..., 2:]).flatten(1))
        hidden = self.head(torch.cat(parts, dim=1))
        return self.mean(hidden), self.logvar(hidden).clamp(-6, 6)

    def decode(self, z: torch.Tensor, keypoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p(view | z, pose): z [N, D], keypoints [N, K, 3] => log-lengths [N, bones], outline [N, *OUTLINE_SIZE].

        The bones are told their directions only; the outline is told where the joints are, not how wide the body is.
        """
        directions, _, confidence = bones(keypoints)
        log_lengths = self.decode_bones(torch.cat([z, directions.flatten(1), confidence], dim=1))
        outline = self.decode_outline(torch.cat([z, keypoints.flatten(1)], dim=1))
        return log_lengths, outline.view(-1, *OUTLINE_SIZE)


OUTLINE_SIZE = (24, 18)


def outline_target(crops: torch.Tensor, keypoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a view has edges, and the Gaussian keypoint weight of each place; both [N, *OUTLINE_SIZE].

    Edges, not colours: clothes change their colour from photo to photo, the outline of the body under them less.
    """
    grey = crops.mean(dim=1, keepdim=True)
    dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    edges = F.pad((dx**2 + dy**2 + 1e-4).sqrt(), (1, 1, 1, 1))
    edges = F.adaptive_avg_pool2d(edges, OUTLINE_SIZE)[:, 0].sqrt()
    weight = gaussian_keypoint_weight(keypoints, OUTLINE_SIZE, sigma=0.08)
    level = (edges * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True).clamp_min(1e-6)
    return edges / level.clamp_min(1e-3), weight


# ---- fusion and objective -----------------------------------------------------------------------------------------


def fuse(mean: torch.Tensor, logvar: torch.Tensor, confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Product of experts: N(0, I) times every view's Gaussian, precisions scaled by the confidence (section 5.2).

    mean, logvar [B, M, D], confidence [B, M] (0 = the view is not there) => body_mean, body_logvar [B, D].
    Adding a view adds a precision >= 0: it never raises the uncertainty. No view at all gives the prior.
    """
    precision = torch.exp(-logvar) * confidence[..., None]
    body_precision = 1 + precision.sum(dim=1)
    return (precision * mean).sum(dim=1) / body_precision, -body_precision.log()


def identity_logits(
    mean_a: torch.Tensor, logvar_a: torch.Tensor, mean_b: torch.Tensor, logvar_b: torch.Tensor
) -> torch.Tensor:
    """log of int q_a(z) q_b(z) / p(z) dz for every pair: how much likelier "one person" is than "two". [B, B]

    The exact likelihood ratio of this very product of experts (it is PLDA's, Ioffe 2006), so the contrastive term
    needs no temperature and also trains the uncertainties.
    """
    precision_a, precision_b = torch.exp(-logvar_a)[:, None], torch.exp(-logvar_b)[None]
    both = precision_a + precision_b - 1
    a, b = precision_a * mean_a[:, None], precision_b * mean_b[None]
    exponent = (a + b) ** 2 / both - a * mean_a[:, None] - b * mean_b[None]
    return 0.5 * (torch.log(precision_a) + torch.log(precision_b) - torch.log(both) + exponent).sum(dim=-1)


def loss_identity(
    half_a: tuple[torch.Tensor, torch.Tensor], half_b: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE between two disjoint halves of each person's views (van den Oord 2018): loss and accuracy, scalars."""
    logits = identity_logits(*half_a, *half_b)
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss, (logits.argmax(1) == labels).float().mean()


def kl_divergence(body_mean: torch.Tensor, body_logvar: torch.Tensor) -> torch.Tensor:
    """KL(q(z | views) || N(0, I)), [B], in nats."""
    return 0.5 * (body_mean**2 + body_logvar.exp() - 1 - body_logvar).sum(dim=-1)


def loss_reconstruction(
    model: BodyVAE, z: torch.Tensor, views: Views, bone_std: float = 0.1, outline_std: float = 0.5
) -> torch.Tensor:
    """-log p(view | z, pose) up to a constant, [N], in nats: z [N, D] comes from the person's other views."""
    log_lengths, outline = model.decode(z, views.keypoints)
    _, bone_target, confidence = bones(views.keypoints)
    edge_target, weight = outline_target(views.crops, views.keypoints)
    bone_error = F.smooth_l1_loss(log_lengths / bone_std, bone_target / bone_std, reduction="none")
    edge_error = ((outline - edge_target) / outline_std) ** 2 / 2
    return (bone_error * confidence).sum(-1) + (edge_error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-6)


# ---- crops -> network input ---------------------------------------------------------------------------------------

BORDER = (8, 6)  # pixels around the crop that training shifts it into


def plain_views(crops: torch.Tensor, keypoints: torch.Tensor, features: torch.Tensor | None = None) -> Views:
    """uint8 crops [N, H (+ borders), W (+ borders), 3] and their keypoints => the encoder's input, unchanged."""
    top, left = (crops.shape[1] - CROP_SIZE[0]) // 2, (crops.shape[2] - CROP_SIZE[1]) // 2
    crops = crops[:, top : top + CROP_SIZE[0], left : left + CROP_SIZE[1]]
    return Views(crops.permute(0, 3, 1, 2).float() / 127.5 - 1, keypoints, features)


def augment(
    crops: torch.Tensor,
    keypoints: torch.Tensor,
    features: torch.Tensor | None,
    generator: torch.Generator,
    grey: float = 0.3,
    hide_head: float = 0.3,
) -> Views:
    """Training views: shifted, mirrored, recoloured, sometimes with the head hidden. Nothing changes proportions.

    Colours (skin, hair, clothes) and the face tell people apart without telling anything of the body. Mixing the
    colour channels at random and hiding heads closes those short cuts; how far, is measured by the ratios' R2.
    crops uint8 [N, H + 2 BORDER_y, W + 2 BORDER_x, 3].
    """
    n, (h, w) = len(crops), CROP_SIZE

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    # Shift, by cutting each crop elsewhere out of its border.
    shift_y = torch.randint(0, 2 * BORDER[0] + 1, (n,), generator=generator)
    shift_x = torch.randint(0, 2 * BORDER[1] + 1, (n,), generator=generator)
    rows, columns = shift_y[:, None] + torch.arange(h), shift_x[:, None] + torch.arange(w)
    x = crops[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255
    shift = torch.stack([(BORDER[1] - shift_x) * 2 / w, (BORDER[0] - shift_y) * 2 / h], dim=-1)
    keypoints = keypoints.clone()
    keypoints[..., :2] += shift[:, None] * (keypoints[..., 2:] > 0)

    # Mirror; left and right keypoints change places.
    mirror = uniform(n) < 0.5
    x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
    mirrored = keypoints[:, FLIP] * torch.tensor([-1.0, 1.0, 1.0])
    keypoints = torch.where(mirror[:, None, None], mirrored, keypoints)
    if features is not None:
        features = torch.where(mirror[:, None, None], features[:, FLIP], features)

    # Colour: a random mix of the channels, some all the way to grey, then contrast and brightness.
    mix = torch.eye(3) + 0.35 * torch.randn(n, 3, 3, generator=generator)
    mix = torch.where((uniform(n) < grey)[:, None, None], uniform(n, 1, 3), mix)
    mix = mix / mix.sum(-1, keepdim=True).abs().clamp_min(0.5)
    x = torch.einsum("nij,njhw->nihw", mix, x)
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - level) * uniform(n, 1, 1, 1, low=0.6, high=1.4) + level + uniform(n, 1, 1, 1, low=-0.15, high=0.15)

    # Hide the head: a grey disc around the seen points of the face, as wide as from the nose to the shoulders.
    head, shoulders = keypoints[:, :5], keypoints[:, 5:7]
    centre = _weighted_mean(head) * vector_aspect(x)
    radius = (centre - _weighted_mean(shoulders) * vector_aspect(x)).norm(dim=-1) * 0.9
    hide = (uniform(n) < hide_head) & (head[..., 2].amax(-1) > 0) & (shoulders[..., 2].amax(-1) > 0)
    grid_y = torch.linspace(-1, 1, h)[:, None]
    grid_x = torch.linspace(-1, 1, w)[None] * w / h
    inside = ((grid_x - centre[:, 0, None, None]) ** 2 + (grid_y - centre[:, 1, None, None]) ** 2).sqrt()
    inside = (inside < radius[:, None, None]) & hide[:, None, None]
    x = torch.where(inside[:, None], level, x)
    return Views(x.clamp(0, 1) * 2 - 1, keypoints, features)


def _weighted_mean(points: torch.Tensor) -> torch.Tensor:
    """[N, k, 3] => [N, 2], weighted by confidence."""
    weight = points[..., 2:]
    return (points[..., :2] * weight).sum(1) / weight.sum(1).clamp_min(1e-6)
