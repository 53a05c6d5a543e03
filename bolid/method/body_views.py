"""A view, one photo of a person, as the body VAE's input: a skeleton, and patches cut along its bones (section 5.2).

The crop is weighted by Gaussians around the keypoints. Torso, bust and limbs are cut out of it, each turned along its
own bone, so the outline of a body stands in the same place in every photo, whatever the pose.

Shapes: N views, K = 17 COCO keypoints, (H, W) = CROP_SIZE times the detail. Crops are float NCHW -1..1 (uint8 HWC in
files). Keypoints are (x, y, confidence): pixels of the stored picture in files, -1..1 over the crop in a view.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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
    """The encoder's input for N photos: the body's patches and the keypoints. See `make_views`."""

    torso: torch.Tensor  # [N, 1, C, h, w] float -1..1: RGB or the mask, and the Gaussian keypoint weight
    bust: torch.Tensor  # [N, 1, C, h, w]; what is not visible is zero
    limb: torch.Tensor  # [N, 8, C, h, w]
    keypoints: torch.Tensor  # [N, K, 3], (x, y) in -1..1 over the crop, confidence 0..1
    features: torch.Tensor | None = None  # [N, K, C] image-text patch features pooled at the keypoints

    def to(self, device: str) -> Views:
        """The same views on a device."""
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
    """(H, W) of the crops at this detail."""
    return round(CROP_SIZE[0] * detail), round(CROP_SIZE[1] * detail)


def view_crop(
    image: np.ndarray, keypoints: np.ndarray, margin: float = 0.18, detail: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the person out, scale-normalised: the box of the visible keypoints plus `margin`, in CROP_SIZE's proportions.

    `image` uint8 [h, w, 3]; `keypoints` [K, 3] in its pixels. => uint8 crop [H, W, 3] and the keypoints [K, 3] in
    -1..1 over it; those that are not visible get confidence 0 and lie at 0. Outside the
    picture the crop repeats its edge.
    """
    from PIL import Image

    crop_h, crop_w = crop_size(detail)
    visible = keypoints[:, 2] >= MIN_CONFIDENCE
    xy = keypoints[visible, :2] if visible.any() else keypoints[:, :2]
    low, high = xy.min(axis=0), xy.max(axis=0)
    centre, (box_w, box_h) = (low + high) / 2, np.maximum(high - low, 4.0)
    # Pixels of the picture per pixel of the crop. One scale for both axes: a crop must keep the proportions.
    scale = (1 + 2 * margin) * max(box_h / crop_h, box_w / crop_w)
    half = np.array([crop_w, crop_h]) / 2
    low, high = centre - scale * half, centre + scale * half
    pad = int(np.ceil(max(0, -low.min(), high[0] - image.shape[1], high[1] - image.shape[0])))
    if pad:
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    crop = Image.fromarray(image).resize((crop_w, crop_h), Image.Resampling.BILINEAR, box=(*(low + pad), *(high + pad)))
    inside = np.zeros((KEYPOINTS, 3), np.float32)
    inside[visible, :2] = (keypoints[visible, :2] - centre) / (scale * half)
    inside[visible, 2] = keypoints[visible, 2].clip(0, 1)
    return np.asarray(crop), inside


def crop_views(
    pixel_values: torch.Tensor, keypoints: torch.Tensor, margin: float = 0.18, detail: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`view_crop` of a batch, differentiable in the pictures and in the keypoints' places; the window itself is fixed.

    `pixel_values` float [N, 3, h, w]; `keypoints` [N, K, 3] in its pixels. => crops [N, 3, H, W] and keypoints
    [N, K, 3] in -1..1 over them.
    """
    crop_h, crop_w = crop_size(detail)
    visible = keypoints[..., 2] >= MIN_CONFIDENCE
    counted = (visible | ~visible.any(1, keepdim=True))[..., None]
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
    return crops, torch.cat([inside, keypoints[..., 2:].clamp(0, 1)], dim=-1) * visible[..., None]


def view_confidence(keypoints: torch.Tensor) -> torch.Tensor:
    """The confidence of a view: the mean over its keypoints. [..., K, 3] => [...], 0..1"""
    return keypoints[..., 2].mean(dim=-1)


class Skeleton(NamedTuple):
    """The pose of N views, apart from their proportions and from the scale of the picture."""

    points: torch.Tensor  # [N, K + 2, 3] pixels of the crop and confidence, with mid-shoulder and mid-hip
    directions: torch.Tensor  # [N, bones, 2] unit vectors: the pose, no lengths in it
    log_lengths: torch.Tensor  # [N, bones] log of length / (scale * usual length): the proportions, no scale in them
    confidence: torch.Tensor  # [N, bones], of a bone's worse end
    scale: torch.Tensor  # [N] stature in pixels of the crop, estimated from the visible bones


def skeleton(keypoints: torch.Tensor) -> Skeleton:
    """keypoints [N, K, 3] in -1..1 over the crop => bones."""
    pixels = keypoints.new_tensor([CROP_SIZE[1] / 2, CROP_SIZE[0] / 2])
    xy, visible = (keypoints[..., :2] + 1) * pixels, keypoints[..., 2]
    middle = torch.stack([xy[:, [5, 6]].mean(1), xy[:, [11, 12]].mean(1)], dim=1)
    visible_middle = torch.stack([visible[:, [5, 6]].amin(1), visible[:, [11, 12]].amin(1)], dim=1)
    points = torch.cat([torch.cat([xy, middle], 1), torch.cat([visible, visible_middle], 1)[..., None]], dim=-1)
    start, end = points[:, [a for a, _ in ENCODER_BONES]], points[:, [b for _, b in ENCODER_BONES]]
    vector = end[..., :2] - start[..., :2]
    length = vector.norm(dim=-1).clamp_min(0.5)
    confidence = torch.minimum(start[..., 2], end[..., 2])
    relative = length / length.new_tensor(USUAL_LENGTH)
    # Foreshortening only ever makes a bone shorter, so the longer ones set the scale.
    scale = torch.nanquantile(relative.masked_fill(confidence == 0, float("nan")), 0.75, dim=1)
    scale = scale.nan_to_num(float(CROP_SIZE[0])).clamp(CROP_SIZE[0] / 4, CROP_SIZE[0] * 4)
    log_lengths = (relative / scale[:, None]).log().clamp(-2, 1) * (confidence > 0)
    return Skeleton(points, vector / length[..., None] * (confidence[..., None] > 0), log_lengths, confidence, scale)


PATCHES = {"torso": (24, 20), "bust": (16, 20), "limb": (16, 10)}  # (along, across), samples at a detail of 1


def patch_sizes(detail: float) -> dict[str, tuple[int, int]]:
    """(along, across) samples of each kind of patch at this detail."""
    return {part: (round(along * detail), round(across * detail)) for part, (along, across) in PATCHES.items()}


def body_patches(crops: torch.Tensor, bones: Skeleton) -> dict[str, torch.Tensor]:
    """Cut the torso, the bust and the limbs out of the crop, each turned along its own bone.

    In these frames a body's outline does not move with the pose. Extents are fractions of the stature, never of the
    bone, so that foreshortening does not stretch a patch.
    crops [N, c, H, W] => {"torso": [N, 1, c, h, w], "bust": [N, 1, c, h, w], "limb": [N, 8, c, h, w]}, of the crops'
    detail; a part that is not visible is zero.
    """
    sizes = patch_sizes(crops.shape[2] / CROP_SIZE[0])
    points, scale = bones.points, bones.scale[:, None, None]
    shoulder, hip = points[:, MID_SHOULDER : MID_SHOULDER + 1], points[:, MID_HIP : MID_HIP + 1]
    head = points[:, :5]
    head_xy = (head[..., :2] * head[..., 2:]).sum(1, keepdim=True) / head[..., 2:].sum(1, keepdim=True).clamp_min(1e-6)
    head_visible = torch.minimum(head[..., 2].amax(1, keepdim=True), shoulder[..., 2])
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
        "bust": (shoulder[..., :2] + 0.08 * scale * up, up, 0.17 * scale, 0.20 * scale, head_visible),
        "limb": (limb_mid, bones.directions[:, LIMBS], 0.62 * usual * scale, 0.075 * scale * outward,
                 bones.confidence[:, LIMBS]),
    }  # fmt: skip
    patches = {}
    for part, (centre, along, half_along, half_across, visible) in frames.items():
        h, w = sizes[part]
        u = torch.linspace(-1, 1, h, device=crops.device)[:, None, None]
        v = torch.linspace(-1, 1, w, device=crops.device)[None, :, None]
        across = torch.stack([-along[..., 1], along[..., 0]], dim=-1) * half_across
        grid = centre[:, :, None, None] + u * (along * half_along)[:, :, None, None] + v * across[:, :, None, None]
        grid = grid / grid.new_tensor([CROP_SIZE[1] / 2, CROP_SIZE[0] / 2]) - 1
        n, parts = centre.shape[:2]
        sampled = F.grid_sample(crops, grid.view(n, parts * h, w, 2), padding_mode="border", align_corners=False)
        sampled = sampled.view(n, -1, parts, h, w).transpose(1, 2)
        patches[part] = sampled * (visible[:, :, None, None, None] > 0)
    return patches


def make_views(
    crops: torch.Tensor, keypoints: torch.Tensor, features: torch.Tensor | None = None, sigma: float = 0.06
) -> Views:
    """Crops and keypoints [N, K, 3] => the encoder's input. Crops are uint8 [N, H, W, 3], as `view_crop` makes them,
    or float [N, 3, H, W] in -1..1, as `crop_views` does. Those of masks have one channel.
    """
    pixels = crops if crops.is_floating_point() else crops.permute(0, 3, 1, 2).float() / 127.5 - 1
    weight = gaussian_keypoint_weight(keypoints, tuple(pixels.shape[2:]), sigma)[:, None]
    patches = body_patches(torch.cat([pixels, 2 * weight - 1], dim=1), skeleton(keypoints))
    return Views(patches["torso"], patches["bust"], patches["limb"], keypoints, features)


def visible_patches(patch: torch.Tensor) -> torch.Tensor:
    """1 where a part is visible, [N, parts, 1, 1, 1]: the patch of one that is not is zero all over."""
    return (patch.abs().amax(dim=(-3, -2, -1), keepdim=True) > 0).to(patch.dtype)


# ---- training views -----------------------------------------------------------------------------------------------


def augment(
    views: Views,
    generator: torch.Generator,
    grayscale: float = 0.3,
    head_occlusion: float = 0.0,
    color_jitter: float = 0.35,
    degradation: float = 0.0,
) -> Views:
    """Training views: mirrored, recoloured, with shaky keypoints. Proportions stay.

    Skin, hair, clothes and the face identify people without showing the body. Mixing the colour channels closes that
    short cut. Hiding heads closes another, but loses the head's own proportions, and the ratios' R2 is better without.
    Probabilities of a view: `grayscale`, of losing its colour; `head_occlusion`, of losing the head; `degradation`, of
    `degrade`. `color_jitter`: standard deviation of the channels' mixture.
    """
    n = len(views.keypoints)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    # Colour: one random mix of the channels a view, some all the way to grey, then contrast and brightness.
    mix = torch.eye(3) + color_jitter * torch.randn(n, 3, 3, generator=generator)
    mix = torch.where((uniform(n) < grayscale)[:, None, None], uniform(n, 1, 3), mix)
    mix = mix / mix.sum(-1, keepdim=True).abs().clamp_min(0.5) * uniform(n, 1, 1, low=0.6, high=1.4)
    mix4 = torch.eye(4).repeat(n, 1, 1)
    mix4[:, :3, :3] = mix
    offset = torch.zeros(n, 1, 4, 1, 1)
    offset[:, 0, :3] = uniform(n, 1, 1, 1, low=-0.3, high=0.3)
    # Hide the head: everything of the bust beyond the shoulders (its rows run from the chest up).
    rows = views.bust.shape[-2]
    visible = torch.ones(n, 1, 1, rows, 1)
    visible[:, :, :, rows * 5 // 16 :] = (uniform(n) >= head_occlusion).view(-1, 1, 1, 1, 1).float()

    def recolour(patch: torch.Tensor) -> torch.Tensor:
        if patch.shape[2] != 4:
            return patch  # a mask
        mixed = torch.einsum("nij,npjhw->npihw", mix4, patch) + offset
        return mixed.clamp(-1.5, 1.5) * visible_patches(patch)

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
    return degrade(views, generator, degradation) if degradation else views


HALVES = [list(range(11)), list(range(11, 17)), list(range(1, 17, 2)), list(range(2, 17, 2))]
"""Keypoints that an occlusion hides: of the upper half of a person, the lower, the left, the right."""


def degrade(views: Views, generator: torch.Generator, probability: float) -> Views:
    """Degradation and occlusion: with this probability a view is blurred, or half the person is hidden, as often.

    The encoder learns from it how much such views are worth.
    """
    n = len(views.keypoints)
    drawn = torch.rand(n, generator=generator)
    blurred, hidden = drawn < probability / 2, (drawn >= probability / 2) & (drawn < probability)
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
