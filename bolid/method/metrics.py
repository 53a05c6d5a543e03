"""The measures of section 6 that look at one picture, one pair or one person, and their intervals; on plain tensors.

Sets of pictures are compared in distributions.py. Not seen is nan, and does not count.

Shapes: N pictures, D features, K = 17 COCO keypoints, P people, R ratios, W = 16 places of a width profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)  # of a 95 % interval
FEWEST_GROUPS = 5  # with fewer people than this, pictures are resampled and not people

BONES: dict[str, tuple[tuple[int, int], ...]] = {
    "upper_arm": ((5, 7), (6, 8)),
    "forearm": ((7, 9), (8, 10)),
    "thigh": ((11, 13), (12, 14)),
    "shin": ((13, 15), (14, 16)),
    "torso": ((5, 11), (6, 12)),
    "shoulders": ((5, 6),),
    "hips": ((11, 12),),
}
"""Bones by name: pairs of COCO keypoints, left and right where there are two."""
PROFILE = (("torso", 8), ("thigh", 4), ("shin", 4))  # where body widths are taken, from the shoulders down


class Interval(NamedTuple):
    """A value and its 95 % bootstrap interval; nan where there is none."""

    value: float
    low: float
    high: float


# ---- intervals ----------------------------------------------------------------------------------------------------


def resamples(replicates: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """How often each of `total` things is in each bootstrap resample, f64 [replicates, total]."""
    picks = torch.randint(total, (replicates, total), generator=generator)
    return torch.zeros(replicates, total, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.float64)
    )


def bootstrap_mean(
    values: torch.Tensor, groups: torch.Tensor | None = None, replicates: int = 1000, seed: int = 0
) -> Interval:
    """The mean of values [N] (nan left out) and its percentile interval (Efron 1979).

    `groups` [N]: whose picture each is. Pictures of one person are alike, so whole people are resampled where there are
    FEWEST_GROUPS or more; otherwise pictures. Below two values, or two groups, there is no interval.
    """
    there = ~values.isnan()
    values = values[there].double()
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    index = torch.arange(len(values))
    if groups is not None:
        index_of_group = groups[there].unique(return_inverse=True)[1]
        if len(values) and int(index_of_group.max()) + 1 >= FEWEST_GROUPS:
            index = index_of_group
    total = int(index.max()) + 1
    mean = float(values.mean())
    if total < 2:
        return Interval(mean, float("nan"), float("nan"))
    sums = torch.zeros(total, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.zeros(total, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    weights = resamples(replicates, total, torch.Generator().manual_seed(seed))
    low, high = ((weights @ sums) / (weights @ counts)).quantile(ENDS).tolist()
    return Interval(mean, low, high)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the first axis, [N, R] -> [R]; nan counts for nothing, and is what comes out where nothing was seen."""
    there = ~values.isnan()
    weights = there.to(values) if weights is None else weights * there
    return (values.nan_to_num() * weights).sum(0) / weights.sum(0)


# ---- the body -----------------------------------------------------------------------------------------------------


def bone_ratios(keypoints: torch.Tensor, least_confidence: float = 0.5) -> torch.Tensor:
    """Lengths of BONES over torso + thigh + shin, [..., 7], from keypoints [..., K, 3] (pixels, pixels, confidence).

    Left and right are averaged by confidence; a bone with an end below `least_confidence` counts as not seen (nan), and
    so do all ratios when torso, thigh or shin are not seen. Foreshortening is in them: compare averages over pictures.
    """
    points, confidence = keypoints[..., :2], keypoints[..., 2]
    lengths = []
    for pairs in BONES.values():
        length = torch.stack([(points[..., i, :] - points[..., j, :]).norm(dim=-1) for i, j in pairs], -1)
        weight = torch.stack([torch.minimum(confidence[..., i], confidence[..., j]) for i, j in pairs], -1)
        weight = weight * (weight >= least_confidence)
        lengths.append((length * weight).sum(-1) / weight.sum(-1))  # 0 / 0 = nan: not seen
    bones = torch.stack(lengths, -1)
    names = list(BONES)
    scale = sum(bones[..., names.index(name)] for name in ("torso", "thigh", "shin"))
    return bones / scale[..., None]


def bone_confidence(keypoints: torch.Tensor, least_confidence: float = 0.5) -> torch.Tensor:
    """How far each of `bone_ratios` can be trusted, [..., 7]: the better side's worse end; 0 where it was not seen."""
    confidence = keypoints[..., 2]
    sides = [
        torch.stack([torch.minimum(confidence[..., i], confidence[..., j]) for i, j in pairs], -1).amax(-1)
        for pairs in BONES.values()
    ]
    found = torch.stack(sides, -1)
    return found * (found >= least_confidence)


def width_profile(mask: torch.Tensor, keypoints: torch.Tensor, least_confidence: float = 0.3) -> torch.Tensor:
    """How wide the silhouette is across torso, thighs and shins, over torso + thigh + shin, f32 [W].

    `mask` bool [H, W], `keypoints` [K, 3] (pixels, pixels, confidence). Each width is the run of mask around a point of
    the bone, at a right angle to it, so the pose does not enter; left and right are averaged. A thigh or shin ends
    halfway to the other leg at the latest, or legs that touch would count double. Arms that lie on the torso widen it:
    compare averages over pictures. nan where the bone is not seen.
    """
    points, seen = keypoints[:, :2].float(), keypoints[:, 2] >= least_confidence
    shoulder, hip = points[[5, 6]].mean(0), points[[11, 12]].mean(0)
    torso = ((5, 6, 11, 12), (shoulder,), (hip,))
    thigh, shin = ((11, 12, 13, 14), points[11:13], points[13:15]), ((13, 14, 15, 16), points[13:15], points[15:17])
    scale, profile = torch.zeros(()), []
    for (_, places), (needed, starts, ends) in zip(PROFILE, (torso, thigh, shin), strict=True):
        if not seen[list(needed)].all():
            return torch.full((sum(n for _, n in PROFILE),), float("nan"))
        scale = scale + torch.stack([(e - s).norm() for s, e in zip(starts, ends, strict=True)]).mean()
        t = (torch.arange(places) + 0.5) / places
        axes = [s + t[:, None] * (e - s) for s, e in zip(starts, ends, strict=True)]  # [places, 2] each
        widths = []
        for side, (axis, start, end) in enumerate(zip(axes, starts, ends, strict=True)):
            along = (end - start) / (end - start).norm().clamp_min(1e-6)
            across = torch.stack([-along[1], along[0]])
            widths.append(_run(mask, axis, across, axes[1 - side] if len(axes) == 2 else None))
        profile.append(torch.stack(widths).mean(0))
    return torch.cat(profile) / scale.clamp_min(1e-6)


def _run(mask: torch.Tensor, axis: torch.Tensor, across: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Length of the run of `mask` through each point of `axis` [n, 2], along the unit vector `across`: [n]."""
    height, width = mask.shape
    step = 0.5
    reach = torch.arange(0, max(height, width) / 2, step)  # [s]
    total = torch.zeros(len(axis))
    for sign in (1.0, -1.0):
        places = axis[:, None] + sign * reach[None, :, None] * across  # [n, s, 2]
        x, y = places.floor().long().unbind(-1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        on = inside & mask[y.clamp(0, height - 1), x.clamp(0, width - 1)]
        length = on.to(torch.float32).cumprod(1).sum(1) * step
        if other is not None:
            to_other = ((other - axis) * across).sum(1) * sign  # > 0: the other leg lies on this side
            length = torch.where(to_other > 0, torch.minimum(length, to_other / 2), length)
        total = total + length
    return total


def rank_and_auc(distances: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the nearest of P >= 2 people is the right one, and the share of others that are further off, both [N].

    `distances` [N, P], `owner` [N]: column of the right person. The mean of the second is the area under the ROC curve
    over people; 0.5 is chance. Ties count half.
    """
    own = distances.gather(1, owner[:, None])
    nearer, equal = (distances < own).sum(1), (distances == own).sum(1) - 1
    auc = 1 - (nearer + 0.5 * equal) / (distances.shape[1] - 1)
    return (nearer == 0).double() / (equal + 1), auc.double()


def mean_correlation(truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Pearson's r of each column of truth and predicted [P, R] over the people, averaged; -1..1, 0 is chance."""
    a, b = truth - truth.mean(0), predicted - predicted.mean(0)
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).mean()


def r2_scores(truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Coefficient of determination of each column, [R], from truth and predicted [P, R]; 1 is perfect, 0 the mean's."""
    residual = (truth - predicted).pow(2).sum(0)
    return 1 - residual / (truth - truth.mean(0)).pow(2).sum(0)


# ---- pictures and faces -------------------------------------------------------------------------------------------


def perceptual_distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """LPIPS (Zhang et al., arXiv:1801.03924, Eq. 1) without its learned weights, [N], from 0.

    `a`, `b`: feature maps of some layers, [N, C, h, w] each: unit length at every place, squared difference summed over
    the channels, averaged over the places, summed over the layers.
    """
    return torch.stack([
        (F.normalize(p, dim=1) - F.normalize(q, dim=1)).square().sum(1).mean((1, 2)) for p, q in zip(a, b, strict=True)
    ]).sum(0)  # fmt: skip


def expected_max(values: torch.Tensor, count: int) -> float:
    """The mean, over all ways to take `count` of the values [n >= count], of the largest one taken.

    So that the nearest of few and the nearest of many can be compared: the larger crowd has no advantage.
    """
    ordered, n = values.double().sort().values, len(values)
    # The i-th smallest is the largest of its draw if the other count - 1 come from the i smaller ones.
    ways = [math.comb(i, count - 1) / math.comb(n, count) for i in range(n)]
    return float(ordered @ torch.tensor(ways, dtype=torch.float64))


def accept_threshold(impostors: torch.Tensor, far: float = 0.01) -> float:
    """The similarity above which a part `far` of the comparisons [N] between different people lies."""
    return float(impostors.double().quantile(1 - far))
