"""Gamma_body: photos of a person -> c_body (BoLID section 5.2), a variational encoder over views.

Every view gives a Gaussian over z; the views are fused by a product of experts; the decoder rebuilds the body of a
held-out view *given that view's pose*, so z keeps what the pose does not tell: proportions and build.

Shapes: B people, M views of one person, N = views in a flat batch, K = 17 COCO keypoints, D body dimension,
(H, W) = CROP_SIZE times the detail. Crops are float NCHW -1..1 (uint8 HWC in files). Keypoints are (x, y, confidence):
pixels of the stored picture in files, and -1..1 over the crop once a view is made of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bolid.method.keypoints import KEYPOINTS, MIN_CONFIDENCE, MIRRORED

CROP_SIZE = (96, 72)  # at a detail of 1; also what the pixels of a `Skeleton` are
MID_SHOULDER, MID_HIP = 17, 18  # two points that COCO lacks, appended by `bones`
# (start, end, usual length over stature). The lengths only set a common scale; they need to be right to some 10 %.
_SKELETON = (
    (5, 6, 0.205), (11, 12, 0.11), (5, 11, 0.29), (6, 12, 0.29), (MID_SHOULDER, MID_HIP, 0.29),
    (0, MID_SHOULDER, 0.115), (3, 4, 0.085), (5, 7, 0.17), (7, 9, 0.15), (6, 8, 0.17), (8, 10, 0.15),
    (11, 13, 0.245), (13, 15, 0.24), (12, 14, 0.245), (14, 16, 0.24),
)  # fmt: skip
ENCODER_BONES = [(start, end) for start, end, _ in _SKELETON]
USUAL_LENGTH = [length for _, _, length in _SKELETON]
LIMBS = [7, 8, 9, 10, 11, 12, 13, 14]  # the bones that are arms and legs


class Views(NamedTuple):
    """What the encoder sees of N photos: the body's patches and the skeleton. See `make_views`."""

    torso: torch.Tensor  # [N, 1, 4, h, w] float -1..1: RGB and the Gaussian keypoint weight; zeros if not seen
    bust: torch.Tensor  # [N, 1, 4, h, w]
    limb: torch.Tensor  # [N, 8, 4, h, w]
    keypoints: torch.Tensor  # [N, K, 3], (x, y) in -1..1 over the crop, confidence 0..1
    features: torch.Tensor | None = None  # [N, K, C] image-text patch features pooled at the keypoints

    def to(self, device: str) -> Views:
        torso, bust, limb, keypoints = (part.to(device) for part in (self.torso, self.bust, self.limb, self.keypoints))
        return Views(torso, bust, limb, keypoints, None if self.features is None else self.features.to(device))


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


def crop_size(detail: float) -> tuple[int, int]:
    return round(CROP_SIZE[0] * detail), round(CROP_SIZE[1] * detail)


def view_crop(
    image: np.ndarray, keypoints: np.ndarray, margin: float = 0.18, detail: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the person out, scale-normalised: the box of the seen keypoints plus `margin`, in CROP_SIZE's proportions.

    `image` uint8 [h, w, 3]; `keypoints` [K, 3] in its pixels. => uint8 crop [H, W, 3] and the keypoints [K, 3] in
    -1..1 over it; those that are not seen get confidence 0 and lie at 0. Outside the picture the crop repeats its edge.
    """
    from PIL import Image

    crop_h, crop_w = crop_size(detail)
    seen = keypoints[:, 2] >= MIN_CONFIDENCE
    xy = keypoints[seen, :2] if seen.any() else keypoints[:, :2]
    low, high = xy.min(axis=0), xy.max(axis=0)
    centre, (box_w, box_h) = (low + high) / 2, np.maximum(high - low, 4.0)
    # Pixels of the picture per pixel of the crop. One scale for both axes, or a crop would change the proportions
    # that are to be measured.
    scale = (1 + 2 * margin) * max(box_h / crop_h, box_w / crop_w)
    half = np.array([crop_w, crop_h]) / 2
    low, high = centre - scale * half, centre + scale * half
    pad = int(np.ceil(max(0, -low.min(), high[0] - image.shape[1], high[1] - image.shape[0])))
    if pad:
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = Image.fromarray(image).resize((crop_w, crop_h), Image.Resampling.BILINEAR, box=(*(low + pad), *(high + pad)))
    inside = np.zeros((KEYPOINTS, 3), np.float32)
    inside[seen, :2] = (keypoints[seen, :2] - centre) / (scale * half)
    inside[seen, 2] = keypoints[seen, 2].clip(0, 1)
    return np.asarray(crop), inside


def crop_views(
    pixel_values: torch.Tensor, keypoints: torch.Tensor, margin: float = 0.18, detail: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`view_crop` of a batch, differentiable in the pictures and in the keypoints' places; the window itself is fixed.

    `pixel_values` float [N, 3, h, w]; `keypoints` [N, K, 3] in its pixels. => crops [N, 3, H, W] and keypoints
    [N, K, 3] in -1..1 over them.
    """
    crop_h, crop_w = crop_size(detail)
    seen = keypoints[..., 2] >= MIN_CONFIDENCE
    counted = (seen | ~seen.any(1, keepdim=True))[..., None]
    xy = keypoints[..., :2].detach()
    low = xy.masked_fill(~counted, math.inf).amin(1)
    high = xy.masked_fill(~counted, -math.inf).amax(1)
    centre, box = (low + high) / 2, (high - low).clamp_min(4.0)
    scale = (1 + 2 * margin) * (box / box.new_tensor([crop_w, crop_h])).amax(1)
    half = scale[:, None] * scale.new_tensor([crop_w, crop_h]) / 2
    # Two samples along each axis for every pixel of the crop, and their mean: PIL's resampling does not alias either.
    y = (torch.arange(2 * crop_h, device=xy.device) + 0.5) / crop_h - 1
    x = (torch.arange(2 * crop_w, device=xy.device) + 0.5) / crop_w - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) * half[:, None, None] + centre[:, None, None]
    grid = grid * 2 / grid.new_tensor([pixel_values.shape[3], pixel_values.shape[2]]) - 1
    crops = F.avg_pool2d(F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False), 2)
    inside = (keypoints[..., :2] - centre[:, None]) / half[:, None]
    return crops, torch.cat([inside, keypoints[..., 2:].clamp(0, 1)], dim=-1) * seen[..., None]


def view_confidence(keypoints: torch.Tensor) -> torch.Tensor:
    """How far a view can be trusted: the mean confidence of its keypoints. [..., K, 3] => [...], 0..1"""
    return keypoints[..., 2].mean(dim=-1)


class Skeleton(NamedTuple):
    """The pose of N views, apart from their proportions and from the scale of the picture."""

    points: torch.Tensor  # [N, K + 2, 3] pixels of the crop and confidence, with mid-shoulder and mid-hip
    directions: torch.Tensor  # [N, bones, 2] unit vectors: the pose, no lengths in it
    log_lengths: torch.Tensor  # [N, bones] log of length / (scale * usual length): the proportions, no scale in them
    confidence: torch.Tensor  # [N, bones], of a bone's worse end
    scale: torch.Tensor  # [N] stature in pixels of the crop, as far as the seen bones tell


def skeleton(keypoints: torch.Tensor) -> Skeleton:
    """keypoints [N, K, 3] in -1..1 over the crop => bones."""
    pixels = keypoints.new_tensor([CROP_SIZE[1] / 2, CROP_SIZE[0] / 2])
    xy, seen = (keypoints[..., :2] + 1) * pixels, keypoints[..., 2]
    middle = torch.stack([xy[:, [5, 6]].mean(1), xy[:, [11, 12]].mean(1)], dim=1)
    seen_middle = torch.stack([seen[:, [5, 6]].amin(1), seen[:, [11, 12]].amin(1)], dim=1)
    points = torch.cat([torch.cat([xy, middle], 1), torch.cat([seen, seen_middle], 1)[..., None]], dim=-1)
    start, end = points[:, [a for a, _ in ENCODER_BONES]], points[:, [b for _, b in ENCODER_BONES]]
    vector = end[..., :2] - start[..., :2]
    length = vector.norm(dim=-1).clamp_min(0.5)
    confidence = torch.minimum(start[..., 2], end[..., 2])
    relative = length / length.new_tensor(USUAL_LENGTH)
    # Foreshortening only ever makes a bone shorter, so the longer ones tell the scale.
    scale = torch.nanquantile(relative.masked_fill(confidence == 0, float("nan")), 0.75, dim=1)
    scale = scale.nan_to_num(float(CROP_SIZE[0])).clamp(CROP_SIZE[0] / 4, CROP_SIZE[0] * 4)
    log_lengths = (relative / scale[:, None]).log().clamp(-2, 1) * (confidence > 0)
    return Skeleton(points, vector / length[..., None] * (confidence[..., None] > 0), log_lengths, confidence, scale)


PATCHES = {"torso": (24, 20), "bust": (16, 20), "limb": (16, 10)}  # (along, across), samples at a detail of 1


def patch_sizes(detail: float) -> dict[str, tuple[int, int]]:
    return {part: (round(along * detail), round(across * detail)) for part, (along, across) in PATCHES.items()}


def body_patches(crops: torch.Tensor, bones: Skeleton) -> dict[str, torch.Tensor]:
    """Cut the torso, the bust and the limbs out of the crop, each turned along its own bone.

    In these frames a body's outline does not move with the pose: how wide someone is stands in the same place in every
    photo. Extents are parts of the stature, never of the bone, so that foreshortening does not stretch a patch.
    crops [N, c, H, W] => {"torso": [N, 1, c, h, w], "bust": [N, 1, c, h, w], "limb": [N, 8, c, h, w]}, of the crops'
    detail; a part that is not seen is zero.
    """
    sizes = patch_sizes(crops.shape[2] / CROP_SIZE[0])
    points, scale = bones.points, bones.scale[:, None, None]
    shoulder, hip = points[:, MID_SHOULDER : MID_SHOULDER + 1], points[:, MID_HIP : MID_HIP + 1]
    head = points[:, :5]
    head_xy = (head[..., :2] * head[..., 2:]).sum(1, keepdim=True) / head[..., 2:].sum(1, keepdim=True).clamp_min(1e-6)
    head_seen = torch.minimum(head[..., 2].amax(1, keepdim=True), shoulder[..., 2])
    down = F.normalize(hip[..., :2] - shoulder[..., :2], dim=-1)
    up = F.normalize(head_xy - shoulder[..., :2], dim=-1)
    limb_mid = torch.stack([points[:, list(ENCODER_BONES[i]), :2].mean(1) for i in LIMBS], dim=1)
    usual = scale.new_tensor([USUAL_LENGTH[i] for i in LIMBS])[:, None]
    outward = scale.new_tensor([1.0 if ENCODER_BONES[i][0] % 2 else -1.0 for i in LIMBS])[
        :, None
    ]  # left and right mirrored
    frames = {  # centre, unit vector along, half extents along and across, confidence
        "torso": ((shoulder + hip)[..., :2] / 2 + 0.03 * scale * down, down, 0.24 * scale, 0.20 * scale,
                  torch.minimum(shoulder[..., 2], hip[..., 2])),
        "bust": (shoulder[..., :2] + 0.08 * scale * up, up, 0.17 * scale, 0.20 * scale, head_seen),
        "limb": (limb_mid, bones.directions[:, LIMBS], 0.62 * usual * scale, 0.075 * scale * outward,
                 bones.confidence[:, LIMBS]),
    }  # fmt: skip
    patches = {}
    for part, (centre, along, half_along, half_across, seen) in frames.items():
        h, w = sizes[part]
        u = torch.linspace(-1, 1, h, device=crops.device)[:, None, None]
        v = torch.linspace(-1, 1, w, device=crops.device)[None, :, None]
        across = torch.stack([-along[..., 1], along[..., 0]], dim=-1) * half_across
        grid = centre[:, :, None, None] + u * (along * half_along)[:, :, None, None] + v * across[:, :, None, None]
        grid = grid / grid.new_tensor([CROP_SIZE[1] / 2, CROP_SIZE[0] / 2]) - 1
        n, parts = centre.shape[:2]
        sampled = F.grid_sample(crops, grid.view(n, parts * h, w, 2), padding_mode="border", align_corners=False)
        sampled = sampled.view(n, -1, parts, h, w).transpose(1, 2)
        patches[part] = sampled * (seen[:, :, None, None, None] > 0)
    return patches


def make_views(
    crops: torch.Tensor, keypoints: torch.Tensor, features: torch.Tensor | None = None, sigma: float = 0.06
) -> Views:
    """Crops and keypoints [N, K, 3] => the encoder's input. Crops are uint8 [N, H, W, 3], as `view_crop` makes them,
    or float [N, 3, H, W] in -1..1, as `crop_views` does.
    """
    pixels = crops if crops.is_floating_point() else crops.permute(0, 3, 1, 2).float() / 127.5 - 1
    weight = gaussian_keypoint_weight(keypoints, tuple(pixels.shape[2:]), sigma)[:, None]
    patches = body_patches(torch.cat([pixels, 2 * weight - 1], dim=1), skeleton(keypoints))
    return Views(patches["torso"], patches["bust"], patches["limb"], keypoints, features)


# ---- the network --------------------------------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True)
    )


def _strided(size: tuple[int, int]) -> tuple[int, int]:
    """What two convolutions of stride 2 leave of a patch."""
    return -(-size[0] // 4), -(-size[1] // 4)


class PatchEncoder(nn.Module):
    """The patches of one kind -> `out_dim` numbers each."""

    def __init__(self, size: tuple[int, int], width: int, parts: int, out_dim: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv(4, width), _conv(width, 2 * width, 2), _conv(2 * width, 3 * width, 2))
        flat = 3 * width * math.prod(_strided(size))
        # One read-out for each part: an arm and a leg share the filters, not what they mean.
        self.weight = nn.Parameter(torch.randn(parts, flat, out_dim) / math.sqrt(flat))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, parts, 4, h, w] => [N, parts * out_dim]"""
        n, parts = patches.shape[:2]
        x = self.convs(patches.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return torch.einsum("npf,pfo->npo", x.reshape(n, parts, -1), self.weight).flatten(1)


class CropEncoder(nn.Module):
    """The Gaussian-weighted crop, read along the bones -> one vector."""

    def __init__(self, width: int, detail: float) -> None:
        super().__init__()
        sizes = patch_sizes(detail)
        self.torso = PatchEncoder(sizes["torso"], width, 1, 96)
        self.bust = PatchEncoder(sizes["bust"], width, 1, 64)
        self.limb = PatchEncoder(sizes["limb"], width // 2, len(LIMBS), 16)
        self.out_dim = 96 + 64 + 16 * len(LIMBS)

    def forward(self, views: Views) -> torch.Tensor:
        return torch.cat([self.torso(views.torso), self.bust(views.bust), self.limb(views.limb)], dim=1)


def at_detail(state: dict[str, torch.Tensor], before: float, now: float) -> dict[str, torch.Tensor]:
    """A BodyVAE's weights for patches of another detail, to train on from: they read a finer map's means."""
    state = dict(state)
    for part in PATCHES:
        name = f"crop_encoder.{part}.weight"
        if before == now or name not in state:
            continue
        coarse, fine = (_strided(patch_sizes(detail)[part]) for detail in (before, now))
        places = math.prod(fine)
        pooling = F.adaptive_avg_pool2d(torch.eye(places).view(places, 1, *fine), coarse).flatten(1)
        parts, flat, out_dim = state[name].shape
        weight = state[name].view(parts, flat // math.prod(coarse), math.prod(coarse), out_dim)
        state[name] = torch.einsum("yx,pcxo->pcyo", pooling, weight).flatten(1, 2)
    return state


class BodyVAE(nn.Module):
    """q(z | views) and p(view | z, pose). See the module's docstring; `view` says what a view is represented by,
    `detail` how finely its patches are sampled.
    """

    def __init__(
        self, body_dim: int = 64, width: int = 24, hidden_dim: int = 256, view: str = "crop", feature_dim: int = 0,
        direct: bool = False, detail: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if view not in ("crop", "pooled", "both"):
            raise ValueError(f"view is crop, pooled or both, not {view!r}")
        self.body_dim, self.view, self.feature_dim = body_dim, view, 0 if view == "crop" else feature_dim
        self.detail = detail
        pose_dim = len(ENCODER_BONES) * 3
        in_dim = KEYPOINTS * 3 + pose_dim + len(ENCODER_BONES)
        if view != "pooled":
            self.crop_encoder = CropEncoder(width, detail)
            in_dim += self.crop_encoder.out_dim
        if view != "crop":
            self.features = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, 24))
            in_dim += KEYPOINTS * 24
        self.head = nn.Sequential(
            nn.BatchNorm1d(in_dim), nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
        )  # fmt: skip
        # Normed, so that views start out far apart: else telling people apart begins by calling them all unknown.
        self.mean = nn.Sequential(nn.Linear(hidden_dim, body_dim), nn.BatchNorm1d(body_dim))
        # What a view tells faintly the head drops, though it adds up over several: a linear way past it.
        self.direct = nn.Linear(in_dim, body_dim, bias=False) if direct else None
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)
        self.logvar = nn.Linear(hidden_dim, body_dim)
        self.decoder = nn.Sequential(
            nn.Linear(body_dim + pose_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, len(ENCODER_BONES) + OUTLINE_DIM),
        )  # fmt: skip

    def encode(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z | one view) without the prior: mean [N, D], logvar [N, D]."""
        bones = skeleton(views.keypoints)
        seen = bones.points[:, :KEYPOINTS, 2:] > 0
        middle = bones.points[:, [5, 6]].mean(1, keepdim=True)
        placed = (bones.points[:, :KEYPOINTS, :2] - middle[..., :2]) / bones.scale[:, None, None] * seen
        parts = [placed.flatten(1), views.keypoints[..., 2], _pose(bones), bones.log_lengths]
        if self.view != "pooled":
            parts.append(self.crop_encoder(views))
        if self.view != "crop":
            if views.features is None:
                raise ValueError("this body encoder needs the image-text features of the views")
            parts.append((self.features(views.features.float()) * seen).flatten(1))
        normed = self.head[0](torch.cat(parts, dim=1))
        hidden = self.head[1:](normed)
        linear = self.mean[0](hidden)
        if self.direct is not None:
            linear = linear + self.direct(normed)
        return self.mean[1](linear), self.logvar(hidden).clamp(-6, 6)

    def decode(self, z: torch.Tensor, bones: Skeleton) -> tuple[torch.Tensor, torch.Tensor]:
        """p(view | z, pose): z [N, D] and a view's pose => log-lengths [N, bones], outline [N, OUTLINE_DIM].

        The pose is the directions of the bones and what is seen; how long and how wide things are must come from z.
        """
        out = self.decoder(torch.cat([z, _pose(bones)], dim=1))
        return out[:, : len(ENCODER_BONES)], out[:, len(ENCODER_BONES) :]


def _pose(bones: Skeleton) -> torch.Tensor:
    return torch.cat([bones.directions.flatten(1), bones.confidence], dim=1)


OUTLINE_SIZES = {part: (h // 2, w // 2) for part, (h, w) in PATCHES.items()}
OUTLINE_DIM = sum(math.prod(size) * (len(LIMBS) if part == "limb" else 1) for part, size in OUTLINE_SIZES.items())


def outline_target(views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the body's patches have edges, and which places are seen; both [N, OUTLINE_DIM].

    Edges, not colours: clothes change their colour from photo to photo, the outline of the body under them less.
    """
    values, weights = [], []
    for part, patch in (("torso", views.torso), ("bust", views.bust), ("limb", views.limb)):
        grey = patch[:, :, :3].mean(dim=2)
        dx = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1))
        dy = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
        # As many places whatever the detail, so that a reconstruction weighs as much.
        edges = F.adaptive_avg_pool2d((dx**2 + dy**2 + 1e-4).sqrt(), OUTLINE_SIZES[part])
        edges = edges / edges.mean(dim=(-2, -1), keepdim=True)
        values.append(edges.sqrt().flatten(1))
        weights.append(seen_patches(patch).flatten(2).expand(*edges.shape[:2], edges[0, 0].numel()).flatten(1))
    return torch.cat(values, dim=1), torch.cat(weights, dim=1)


def seen_patches(patch: torch.Tensor) -> torch.Tensor:
    """1 where a part is seen, [N, parts, 1, 1, 1]: a patch that is not there is zero all over."""
    return (patch.abs().amax(dim=(-3, -2, -1), keepdim=True) > 0).to(patch.dtype)


# What the decoder's Gaussians take for the noise of one photo.
BONE_STD, OUTLINE_STD = 0.1, 0.4
EDGE_MEASUREMENTS = 20  # the outline's places are far from independent of each other: they count as so many

# ---- fusion and objective -----------------------------------------------------------------------------------------


def fuse(mean: torch.Tensor, logvar: torch.Tensor, confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Product of experts: N(0, I) times every view's Gaussian, precisions scaled by the confidence (section 5.2).

    mean, logvar [B, M, D], confidence [B, M] (0 = the view is not there) => body_mean, body_logvar [B, D].
    Adding a view adds a precision >= 0: it never raises the uncertainty. No view at all gives the prior.
    """
    precision = torch.exp(-logvar) * confidence[..., None]
    body_precision = 1 + precision.sum(dim=1)
    return (precision * mean).sum(dim=1) / body_precision, -body_precision.log()


class Population(NamedTuple):
    """How bodies are spread over people, as an encoder sees them: N(mean, covariance)."""

    mean: torch.Tensor  # [D]
    covariance: torch.Tensor  # [D, D]


def population(body_mean: torch.Tensor, body_logvar: torch.Tensor) -> Population:
    """The Gaussian with the moments of the aggregated posterior, the prior that would fit the encoder best (Tomczak &
    Welling 2018, arXiv:1705.07120): how the fused means of P people lie, and how unsure each of them is.

    body_mean, body_logvar [P, D], P at least 2.
    """
    covariance = torch.cov(body_mean.double().T) + torch.diag(body_logvar.double().exp().mean(0))
    return Population(body_mean.mean(0), covariance.to(body_mean))


def within_population(body_mean: torch.Tensor, body_logvar: torch.Tensor, people: Population) -> torch.Tensor:
    """The mean [D] of what `fuse` gives, [D] each, had `people` been its prior instead of N(0, I).

    What the views leave open then follows from what they show as it does in the population, where N(0, I) knows of no
    such ties. Not in the paper.
    """
    mean, covariance = (part.double() for part in people)
    precision = body_logvar.double().neg().exp()  # of the views' and 1 of N(0, I)
    shown = (precision - 1).clamp_min(0)
    # (S^-1 + P)^-1 (S^-1 m + evidence), without an inverse of S
    system = torch.eye(len(mean), dtype=mean.dtype) + covariance * shown
    return torch.linalg.solve(system, mean + covariance @ (precision * body_mean)).to(body_mean)


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
    half_a: tuple[torch.Tensor, torch.Tensor], half_b: tuple[torch.Tensor, torch.Tensor], temperature: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE between two disjoint halves of each person's views (van den Oord 2018): loss and accuracy, scalars.

    On the cosine of the fused means.
    """
    logits = F.normalize(half_a[0], dim=-1) @ F.normalize(half_b[0], dim=-1).T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss, (logits.argmax(1) == labels).float().mean()


def kl_divergence(body_mean: torch.Tensor, body_logvar: torch.Tensor) -> torch.Tensor:
    """KL(q(z | views) || N(0, I)), [B], in nats."""
    return 0.5 * (body_mean**2 + body_logvar.exp() - 1 - body_logvar).sum(dim=-1)


def loss_reconstruction(
    model: BodyVAE, z: torch.Tensor, views: Views, bone_std: float = BONE_STD, outline_std: float = OUTLINE_STD
) -> torch.Tensor:
    """-log p(view | z, pose) up to a constant, [N], in nats: z [N, D] comes from the person's other views."""
    bones = skeleton(views.keypoints)
    log_lengths, outline = model.decode(z, bones)
    target, weight = outline_target(views)
    bone_error = F.smooth_l1_loss(log_lengths / bone_std, bones.log_lengths / bone_std, reduction="none")
    edge_error = ((outline - target) / outline_std) ** 2 / 2
    edge_error = EDGE_MEASUREMENTS * (edge_error * weight).sum(1) / weight.sum(1).clamp_min(1e-6)
    return (bone_error * bones.confidence).sum(-1) + edge_error


def body_distance(model: BodyVAE, mean: torch.Tensor, target: torch.Tensor, views: Views) -> torch.Tensor:
    """How differently the decoder draws the bodies `mean` and `target` [N, D] in the pose of `views`, [N], in the nats
    of `loss_reconstruction`: L_id by the body encoder.

    Distances between the vectors themselves also count skin, hair and face, which tell people apart; the bones' lengths
    and the outline are the body alone. Over 4,000 pairs of the tiny family's training people this one goes with the
    distance of the true body ratios at a correlation of 0.68, the vectors' own at 0.45.
    """
    bones = Skeleton(*(part.detach() for part in skeleton(views.keypoints)))
    lengths, outline = model.decode(mean, bones)
    other_lengths, other_outline = model.decode(target, bones)
    weight = outline_target(views)[1]
    bone_error = ((lengths - other_lengths) / BONE_STD).square() / 2
    edge_error = ((outline - other_outline) / OUTLINE_STD).square() / 2
    edge_error = EDGE_MEASUREMENTS * (edge_error * weight).sum(1) / weight.sum(1).clamp_min(1e-6)
    return (bone_error * bones.confidence).sum(-1) + edge_error


# ---- training views -----------------------------------------------------------------------------------------------


def augment(
    views: Views,
    generator: torch.Generator,
    grey: float = 0.3,
    hide_head: float = 0.0,
    colour: float = 0.35,
    spoil: float = 0.0,
) -> Views:
    """Training views: mirrored, recoloured, with shaky keypoints, sometimes with the head hidden. Proportions stay.

    Colours (skin, hair, clothes) and the face tell people apart without telling anything of the body. Mixing the
    colour channels at random closes that short cut, and hiding heads closes the other, at the price of the head's own
    proportions: with the decoder's full weight the ratios' R2 is better without it.
    """
    n = len(views.keypoints)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    # Colour: one random mix of the channels a view, some all the way to grey, then contrast and brightness.
    mix = torch.eye(3) + colour * torch.randn(n, 3, 3, generator=generator)
    mix = torch.where((uniform(n) < grey)[:, None, None], uniform(n, 1, 3), mix)
    mix = mix / mix.sum(-1, keepdim=True).abs().clamp_min(0.5) * uniform(n, 1, 1, low=0.6, high=1.4)
    mix4 = torch.eye(4).repeat(n, 1, 1)
    mix4[:, :3, :3] = mix
    offset = torch.zeros(n, 1, 4, 1, 1)
    offset[:, 0, :3] = uniform(n, 1, 1, 1, low=-0.3, high=0.3)
    # Hide the head: everything of the bust beyond the shoulders (its rows run from the chest up).
    rows = views.bust.shape[-2]
    visible = torch.ones(n, 1, 1, rows, 1)
    visible[:, :, :, rows * 5 // 16 :] = (uniform(n) >= hide_head).view(-1, 1, 1, 1, 1).float()

    def recolour(patch: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("nij,npjhw->npihw", mix4, patch) + offset
        return mixed.clamp(-1.5, 1.5) * seen_patches(patch)

    torso, bust, limb = recolour(views.torso), recolour(views.bust) * visible, recolour(views.limb)

    # Mirror: left and right change places; in a limb's own frame the outer side stays where it is.
    mirror = uniform(n) < 0.5
    flip = mirror.view(-1, 1, 1, 1, 1)
    torso, bust = torch.where(flip, torso.flip(-1), torso), torch.where(flip, bust.flip(-1), bust)
    limb = torch.where(flip, limb[:, [2, 3, 0, 1, 6, 7, 4, 5]], limb)
    mirrored = views.keypoints[:, MIRRORED] * torch.tensor([-1.0, 1.0, 1.0])
    keypoints = torch.where(mirror[:, None, None], mirrored, views.keypoints)
    features = views.features
    if features is not None:
        features = torch.where(mirror[:, None, None], features[:, MIRRORED], features)
    shake = 0.01 * torch.randn(n, KEYPOINTS, 2, generator=generator) * (keypoints[..., 2:] > 0)
    views = Views(torso, bust, limb, torch.cat([keypoints[..., :2] + shake, keypoints[..., 2:]], -1), features)
    return spoil_views(views, generator, spoil) if spoil else views


# What hides half a person: the upper half, the lower, the left, the right.
HALVES = [list(range(11)), list(range(11, 17)), list(range(1, 17, 2)), list(range(2, 17, 2))]


def spoil_views(views: Views, generator: torch.Generator, part: float) -> Views:
    """`part` of the views spoilt: half of these as in a blurred photo, half as in one that half the person is cut off
    from or hidden in. So the encoder learns how far to trust such views.
    """
    n = len(views.keypoints)
    drawn = torch.rand(n, generator=generator)
    blurred, hidden = drawn < part / 2, (drawn >= part / 2) & (drawn < part)
    factor = torch.randint(2, 5, (n,), generator=generator)
    detail = views.bust.shape[-2] / PATCHES["bust"][0]
    half = torch.randint(len(HALVES), (n,), generator=generator)
    gone = torch.zeros(len(HALVES), KEYPOINTS, dtype=torch.bool)
    for i, points in enumerate(HALVES):
        gone[i, points] = True
    gone = gone[half] & hidden[:, None]
    shake = 0.03 * torch.randn(n, KEYPOINTS, 2, generator=generator) * blurred[:, None, None]
    keypoints = views.keypoints.clone()
    keypoints[..., :2] += shake * (keypoints[..., 2:] > 0)
    keypoints[gone] = 0
    trunk = gone[:, [5, 6, 11, 12]].any(1, keepdim=True)
    limbs = torch.stack([gone[:, list(ENCODER_BONES[bone])].any(1) for bone in LIMBS], dim=1)
    patches = []
    for patch, lost in ((views.torso, trunk), (views.bust, trunk), (views.limb, limbs)):
        patch = patch * ~lost[..., None, None, None]
        for times in (2, 3, 4):
            rows = blurred & (factor == times)
            if rows.any():
                sharp = patch[rows].flatten(0, 1)
                small = F.interpolate(sharp, scale_factor=1 / (times * detail), mode="area")
                patch[rows] = F.interpolate(small, sharp.shape[-2:], mode="bilinear").view_as(patch[rows])
        patches.append(patch)
    features = None if views.features is None else views.features * ~gone[..., None]
    torso, bust, limb = patches
    return Views(torso, bust, limb, keypoints, features)
