"""Metrics of one picture, one pair of pictures or one person (BoLID section 6), and their intervals.

Plain tensors in and out. A value that could not be measured is nan and is left out of every mean. distributions.py
compares sets of pictures (FID, KID, IS).

Shapes: N pictures, D features, K = 17 COCO keypoints, P people, R ratios, W = 16 places of a width profile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bolid.method.keypoints import (
    ANKLES,
    BONES,
    HIPS,
    KNEES,
    MIN_BONE_CONFIDENCE,
    MIN_CONFIDENCE,
    SCALE_BONES,
    SHOULDERS,
)

LEVEL = 0.95  # of every interval
ENDS = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
MIN_GROUPS = 5  # with fewer people than this, pictures are resampled and not people
THIGH_OVER_SHIN = 0.85  # of a leg that is not foreshortened, at least
WIDTHS = (("torso", 8), ("thigh", 4), ("shin", 4))  # a width profile: places on each, from the shoulders down


class Interval(NamedTuple):
    """A value and its 95 % interval; nan where there is none."""

    value: float
    low: float
    high: float


# ---- intervals ----------------------------------------------------------------------------------------------------


def resamples(replicates: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Counts of each of `total` items in each bootstrap resample, f64 [replicates, total]."""
    picks = torch.randint(total, (replicates, total), generator=generator)
    return torch.zeros(replicates, total, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.float64)
    )


def t_quantile(count: int) -> float:
    """Student's t for a two-sided 95 % interval from `count` >= 2 independent values."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, (1 + LEVEL) / 2))


def expanded_ends(count: int) -> torch.Tensor:
    """Quantiles of a bootstrap of `count` >= 2 values that make a 95 % interval, f64 [2].

    The spread of resampled means is too small by sqrt((count - 1) / count) and knows nothing of Student's t. Of few
    values, plain percentiles therefore cover the truth less than 95 % of the time. These are the expanded percentiles
    of Hesterberg (arXiv:1411.5279).
    """
    z = t_quantile(count) * (count / (count - 1)) ** 0.5
    low = float(torch.special.ndtr(torch.tensor(-z, dtype=torch.float64)))
    return torch.tensor([low, 1 - low], dtype=torch.float64)


def jackknife_interval(value: float, left_out: torch.Tensor, bound: float = math.inf) -> Interval:
    """The interval of a smooth statistic, from `left_out` f64 [n >= 2]: its value without each of n independent items.

    The jackknife's standard error (Tukey 1958) times Student's t. A statistic between -bound and bound is compared on
    the scale of artanh(value / bound), Fisher's z for a correlation, so the interval stays within the bounds.
    """
    n = len(left_out)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x if math.isinf(bound) else torch.atanh((x / bound).clamp(-1 + 1e-9, 1 - 1e-9))

    centre, each = scaled(torch.tensor(value, dtype=torch.float64)), scaled(left_out.double())
    reach = t_quantile(n) * ((n - 1) / n * (each - each.mean()).square().sum()).sqrt()
    low, high = centre - reach, centre + reach
    if not math.isinf(bound):
        low, high = bound * low.tanh(), bound * high.tanh()
    return Interval(value, float(low), float(high))


def jackknife_p_value(value: float, left_out: torch.Tensor) -> float:
    """The two-sided p-value of `value` being 0, by the jackknife's standard error and Student's t, 0..1.

    `left_out` f64 [n >= 2]: the value without each of n independent items.
    """
    from scipy.special import stdtr

    n = len(left_out)
    error = float(((n - 1) / n * (left_out.double() - left_out.double().mean()).square().sum()).sqrt())
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stdtr(n - 1, -abs(value) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value, adjusted for there being several (Holm 1979), 0..1, in the order given.

    Those at 0.05 or below are significant together: the chance of any false one is at most 0.05.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def bootstrap_mean(
    values: torch.Tensor, groups: torch.Tensor | None = None, replicates: int = 1000, seed: int = 0
) -> Interval:
    """The mean of values [N], without nan, and its bootstrap interval (Efron 1979; `expanded_ends`).

    `groups` [N]: the number of each picture's person. Pictures of one person are alike: with MIN_GROUPS people or more,
    whole people are resampled, else pictures. Fewer than two values, or two groups, give no interval (nan).
    """
    present = ~values.isnan()
    values = values[present].double()
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    index = torch.arange(len(values))
    if groups is not None:
        index_of_group = groups[present].unique(return_inverse=True)[1]
        if len(values) and int(index_of_group.max()) + 1 >= MIN_GROUPS:
            index = index_of_group
    total = int(index.max()) + 1
    mean = float(values.mean())
    if total < 2:
        return Interval(mean, float("nan"), float("nan"))
    sums = torch.zeros(total, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.zeros(total, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    weights = resamples(replicates, total, torch.Generator().manual_seed(seed))
    low, high = ((weights @ sums) / (weights @ counts)).quantile(expanded_ends(total)).tolist()
    return Interval(mean, low, high)


def mean_p_value(values: torch.Tensor, groups: torch.Tensor | None = None) -> float:
    """The two-sided p-value of the mean of values [N], without nan, being 0; nan below two values or groups.

    `groups` as in `bootstrap_mean`.
    """
    present = ~values.isnan()
    values = values[present].double()
    index = torch.arange(len(values))
    if groups is not None and len(groups[present].unique()) >= MIN_GROUPS:
        index = groups[present].unique(return_inverse=True)[1]
    total = int(index.max()) + 1 if len(index) else 0
    if total < 2:
        return math.nan
    sums = torch.zeros(total, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.zeros(total, dtype=torch.float64).index_add_(0, index, torch.ones_like(values))
    return jackknife_p_value(float(values.mean()), (sums.sum() - sums) / (counts.sum() - counts))


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the first axis, [N, R] -> [R]. Missing values (nan) are left out; a column without values gives nan."""
    present = ~values.isnan()
    weights = present.to(values) if weights is None else weights * present
    return (values.nan_to_num() * weights).sum(0) / weights.sum(0)


# ---- the body -----------------------------------------------------------------------------------------------------


def bone_ratios(keypoints: torch.Tensor, min_confidence: float = MIN_BONE_CONFIDENCE) -> torch.Tensor:
    """Lengths of BONES over torso + thigh + shin, [..., 7], from keypoints [..., K, 3] (pixels, pixels, confidence).

    Left and right are averaged by confidence. A bone with an end below `min_confidence` is nan; without torso, thigh or
    shin all ratios are. Foreshortening shortens bones, so compare averages over pictures.
    """
    points, confidence = keypoints[..., :2], keypoints[..., 2]
    lengths = []
    for pairs in BONES.values():
        length = torch.stack([(points[..., i, :] - points[..., j, :]).norm(dim=-1) for i, j in pairs], -1)
        weight = torch.stack([torch.minimum(confidence[..., i], confidence[..., j]) for i, j in pairs], -1)
        weight = weight * (weight >= min_confidence)
        lengths.append((length * weight).sum(-1) / weight.sum(-1))  # 0 / 0 = nan: not visible
    bones = torch.stack(lengths, -1)
    names = list(BONES)
    scale: torch.Tensor = sum(bones[..., names.index(name)] for name in SCALE_BONES)
    return bones / scale[..., None]


def bone_confidence(keypoints: torch.Tensor, min_confidence: float = MIN_BONE_CONFIDENCE) -> torch.Tensor:
    """Confidence of each of `bone_ratios`, [..., 7]: of a side its less certain end, of two sides the more certain one.

    0 below `min_confidence`.
    """
    confidence = keypoints[..., 2]
    sides = [
        torch.stack([torch.minimum(confidence[..., i], confidence[..., j]) for i, j in pairs], -1).amax(-1)
        for pairs in BONES.values()
    ]
    found = torch.stack(sides, -1)
    return found * (found >= min_confidence)


def bone_weights(keypoints: torch.Tensor, min_confidence: float = MIN_BONE_CONFIDENCE) -> torch.Tensor:
    """How much a picture's `bone_ratios` count in a person's mean, [..., 7]: `bone_confidence`, less where legs point
    at the camera.

    A thigh that is short beside its shin is foreshortened: in a squat, or of a person who sits. The weight falls with
    the fourth power below THIGH_OVER_SHIN, since the thigh is in the scale of all ratios.
    """
    ratios, names = bone_ratios(keypoints, min_confidence), list(BONES)
    upright = (ratios[..., names.index("thigh")] / ratios[..., names.index("shin")] / THIGH_OVER_SHIN).clamp(max=1) ** 4
    return bone_confidence(keypoints, min_confidence) * upright.nan_to_num()[..., None]


def width_profile(mask: torch.Tensor, keypoints: torch.Tensor, min_confidence: float = MIN_CONFIDENCE) -> torch.Tensor:
    """Widths of the silhouette across torso, thighs and shins, over torso + thigh + shin, f32 [W].

    `mask` bool [H, W], `keypoints` [K, 3] (pixels, pixels, confidence). A width is the run of mask through a point of
    the bone, at a right angle to the bone, so it does not depend on the pose; left and right are averaged. The run of a
    thigh or shin ends at the middle between the legs, or legs that touch would count double. Arms that lie on the torso
    widen it, so compare averages over pictures. All nan where a bone is not visible.
    """
    points, visible = keypoints[:, :2].float(), keypoints[:, 2] >= min_confidence
    shoulders, hips, knees, ankles = (points[list(pair)] for pair in (SHOULDERS, HIPS, KNEES, ANKLES))
    bones = {  # keypoints that are needed, starts and ends; the torso has one axis, a leg's bone one on each side
        "torso": ((*SHOULDERS, *HIPS), (shoulders.mean(0),), (hips.mean(0),)),
        "thigh": ((*HIPS, *KNEES), hips, knees),
        "shin": ((*KNEES, *ANKLES), knees, ankles),
    }
    scale, profile = torch.zeros(()), []
    for bone, places in WIDTHS:
        needed, starts, ends = bones[bone]
        if not visible[list(needed)].all():
            return torch.full((sum(n for _, n in WIDTHS),), float("nan"))
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
    """Length of the run of `mask` through each point of `axis` [n, 2], along the unit vector `across`: [n].

    `other` [n, 2]: the other leg's axis; the run ends halfway to it.
    """
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
    """Rank-1 accuracy and AUC of each picture, both f64 [N], 0..1.

    `distances` [N, P] to P >= 2 people, `owner` [N]: column of the right person. Rank 1: the right person is the
    nearest. AUC: the share of other people who are further away; chance is 0.5, ties count half.
    """
    own = distances.gather(1, owner[:, None])
    nearer, equal = (distances < own).sum(1), (distances == own).sum(1) - 1
    auc = 1 - (nearer + 0.5 * equal) / (distances.shape[1] - 1)
    return (nearer == 0).double() / (equal + 1), auc.double()


def mean_correlation(truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Pearson's r over people of each column of truth and predicted [P, R], averaged over columns; -1..1, chance 0."""
    a, b = truth - truth.mean(0), predicted - predicted.mean(0)
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).mean()


def correlation_left_out(
    truth: torch.Tensor, predicted: torch.Tensor, minus: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    """`mean_correlation` of truth and predicted [P, R], and its P values without one person each, for a jackknife.

    With `minus` [P, R], other predictions for the same people: how much more than theirs, paired.
    """
    everybody = torch.arange(len(truth))

    def statistic(rows: torch.Tensor) -> torch.Tensor:
        value = mean_correlation(truth[rows].double(), predicted[rows].double())
        if minus is not None:
            value = value - mean_correlation(truth[rows].double(), minus[rows].double())
        return value

    left_out = torch.stack([statistic(everybody[everybody != person]) for person in everybody])
    return float(statistic(everybody)), left_out


def correlation_interval(truth: torch.Tensor, predicted: torch.Tensor, minus: torch.Tensor | None = None) -> Interval:
    """`correlation_left_out`'s value with its interval over P >= 5 people."""
    bound = 1.0 if minus is None else 2.0
    return jackknife_interval(*correlation_left_out(truth, predicted, minus), bound=bound)


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
    """Expected maximum of `count` values drawn without replacement from values [n >= count].

    It makes the nearest of few photos and the nearest of many comparable.
    """
    ordered, n = values.double().sort().values, len(values)
    # The i-th smallest is the largest of its draw if the other count - 1 come from the i smaller ones.
    ways = [math.comb(i, count - 1) / math.comb(n, count) for i in range(n)]
    return float(ordered @ torch.tensor(ways, dtype=torch.float64))


def copy_paste(generated: torch.Tensor, held_out: torch.Tensor, conditioning: torch.Tensor) -> float:
    """How much nearer a face is to a photo that it was made from than to another photo of the person, -1..1.

    (angle to the held-out photo - angle to the conditioning photo) / angle of these two: M_CP of MultiID-Bench
    (WithAnyone, arXiv:2510.14975). Of several photos the nearest is taken on either side. 1: a copy of a conditioning
    photo, -1: of a held-out one; where their numbers differ, real photos are not at 0.
    `generated` [D], `held_out` [n, D], `conditioning` [m, D]: unit embeddings; photos without a face (nan) are left
    out. nan where none remains, or where the two photos are equal.
    """
    sides = [rows[~rows.isnan().any(1)].double() for rows in (held_out, conditioning)]
    if not all(len(rows) for rows in sides) or generated.isnan().any():
        return math.nan

    def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b).clamp(-1, 1).arccos()

    own = generated.double()
    target, source = (rows[angle(rows, own).argmin()] for rows in sides)
    between = float(angle(target, source))
    return float(angle(target, own) - angle(source, own)) / between if between > 1e-6 else math.nan


def accept_threshold(impostors: torch.Tensor, far: float = 0.01) -> float:
    """The similarity that a fraction `far` of the comparisons [N] between different people exceeds."""
    return float(impostors.double().quantile(1 - far))
