"""Distances between two sets of pictures: FID (BoLID Eq. 15), KID and the inception score (section 6).

The features of each set stream into a `FeatureStatistics`. The tests compare every metric with torchmetrics and
torch-fidelity.

Shapes: N, M pictures, D features, C classes. All f64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torchmetrics import Metric

from bolid.method.feature_statistics import (
    LARGE_DIM,
    FeatureStatistics,
    congruent,
    mean_and_factor,
    nuclear_norm,
    sum_of_roots,
)
from bolid.method.metrics import ENDS, Interval, resamples, t_quantile

JACKKNIFE_ROWS = 512  # rows of a side that FID's jackknife leaves out of
BLOCKS = 20  # of a side


# ---- FID (BoLID Eq. 15) -------------------------------------------------------------------------------------------


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """FID, from 0 (BoLID Eq. 15; Heusel et al., arXiv:1706.08500), of two sets of N, M >= 2 pictures:

        FID = |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 sqrt(S_a S_b))

    with mu the mean and S the covariance of the features. With S = F^T F, Tr sqrt(S_a S_b) is the nuclear norm of
    F_a F_b^T (`_frechet`): no matrix square root, no product of covariances, and exact for N < D too. With more than
    LARGE_DIM features and more pictures than features, it is the sum of the square roots of the eigenvalues of
    F_a S_b F_a^T, and float32 features are multiplied in float32. Raises ValueError below two pictures.
    """
    if a.features <= LARGE_DIM or min(int(a.count), int(b.count)) <= a.features:
        return _frechet(*a.compute(), *b.compute())
    if b.is_folded and not a.is_folded:
        a, b = b, a  # use the factor that is ready: the reference's, from the cache
    mean_a, factor = a.compute() if a.is_folded else mean_and_factor(a)
    mean_b, covariance = b.covariance()
    total = (mean_a - mean_b).square().sum() + torch.linalg.vector_norm(factor).square() + covariance.trace()
    return max(0.0, float(total - 2 * sum_of_roots(congruent(factor, covariance))))


def _frechet(mean_a: torch.Tensor, a: torch.Tensor, mean_b: torch.Tensor, b: torch.Tensor) -> float:
    """Eq. 15 from means [D] and factors a [k, D], b [l, D] of the covariances."""
    total = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum()
    return max(0.0, float(total - 2 * nuclear_norm(a, b)))


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and a factor [k, D] of the covariance of features [N, D] in memory."""
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    tall = len(rows) > rows.shape[1] or rows.shape[1] > LARGE_DIM
    return rows.mean(0), torch.linalg.qr(centred, mode="r").R if tall else centred


class _Jackknife(NamedTuple):
    """What FID's value does when pictures are left out, block by block, on each side."""

    error: float  # its standard error, at the full count
    bias: float  # by the numbers of pictures, at the full counts
    blocks: int


def _jackknife(a: FeatureStatistics, b: FeatureStatistics, seed: int) -> _Jackknife:
    """The grouped jackknife (Quenouille 1949, Tukey 1958) over JACKKNIFE_ROWS pictures of each side at most.

    Error and bias fall with sqrt(N) and N, so those of a part give those of all. The blocks are random, whatever the
    order of the files is.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [_shuffled(x.sampled, generator)[:JACKKNIFE_ROWS] for x in (a, b)]
    whole = [_moments(rows) for rows in sides]
    value = _frechet(*whole[0], *whole[1])
    variance, bias, total = 0.0, 0.0, 0
    for rows, other, statistics in zip(sides, whole[::-1], (a, b), strict=True):
        blocks = min(BLOCKS, len(rows))
        block = torch.arange(len(rows)) * blocks // len(rows)
        if len(rows) < 3:  # nothing can be left out
            return _Jackknife(math.nan, math.nan, blocks)
        left_out = torch.tensor(
            [_frechet(*_moments(rows[block != i]), *other) for i in range(blocks)], dtype=torch.float64
        )
        fraction = len(rows) / int(statistics.count)
        variance += float((blocks - 1) / blocks * (left_out - left_out.mean()).square().sum()) * fraction
        bias += float((blocks - 1) * (left_out.mean() - value)) * fraction
        total += blocks
    return _Jackknife(variance**0.5, bias, total)


def frechet_intervals(a: FeatureStatistics, b: FeatureStatistics, seed: int = 0) -> tuple[Interval, Interval]:
    """`frechet_interval` and `frechet_extrapolated`, of one distance and one jackknife."""
    value, found = frechet_distance(a, b), _jackknife(a, b, seed)
    reach, limit = t_quantile(found.blocks - 1) * found.error, value - found.bias
    return Interval(value, value - min(value, reach), value + reach), Interval(limit, limit - reach, limit + reach)


def frechet_interval(a: FeatureStatistics, b: FeatureStatistics, seed: int = 0) -> Interval:
    """FID with an interval over pictures of both sides, by the jackknife.

    It covers FID's expectation at these numbers of pictures, not FID at infinitely many: see `frechet_extrapolated`.
    """
    return frechet_intervals(a, b, seed)[0]


def frechet_extrapolated(a: FeatureStatistics, b: FeatureStatistics, seed: int = 0) -> Interval:
    """FID at infinitely many pictures, without the bias that is proportional to 1/N on each side.

    Chong and Forsyth (arXiv:1911.07023) fit a line over 1/N to thinned sets; the jackknife's bias is the slope of that
    line at N, without random draws. A true FID near 0 may be estimated below 0.
    """
    return frechet_intervals(a, b, seed)[1]


def _shuffled(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The rows in a random order that does not depend on the order they come in."""
    for column in (1, 0):
        if column < rows.shape[1]:
            rows = rows[rows[:, column].argsort(stable=True)]
    return rows[torch.randperm(len(rows), generator=generator)]


# ---- KID ------------------------------------------------------------------------------------------------------------


def kernel_distance(a: FeatureStatistics, b: FeatureStatistics, replicates: int = 200, seed: int = 0) -> Interval:
    """KID: the unbiased squared MMD under k(x, y) = (x . y / D + 1)^3 (Binkowski et al., arXiv:1801.01401).

    One U-statistic over all sampled rows instead of the mean over many small subsets: same expectation, less variance.
    In the interval's bootstrap a picture is never compared with its own copy. Raises ValueError below two pictures.
    """
    x, y = a.sampled, b.sampled
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs two pictures or more on both sides, not {len(x)} and {len(y)}")
    k_xx, k_yy, k_xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    k_xx.fill_diagonal_(0)
    k_yy.fill_diagonal_(0)

    def distance(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """For weights u [B, N] and v [B, M]: [B]."""
        within = [((w @ k) * w).sum(1) / (w.sum(1).square() - w.square().sum(1)) for w, k in ((u, k_xx), (v, k_yy))]
        return within[0] + within[1] - 2 * ((u @ k_xy) * v).sum(1) / (u.sum(1) * v.sum(1))

    generator = torch.Generator().manual_seed(seed)
    value = float(distance(x.new_ones(1, len(x)), y.new_ones(1, len(y))))
    found = distance(*(resamples(replicates, len(z), generator) for z in (x, y)))
    scale = max((len(z) / int(s.count)) ** 0.5 for z, s in ((x, a), (y, b)))
    low, high = ((found - value) * scale).nan_to_num().quantile(ENDS).tolist()
    return Interval(value, value + low, value + high)


# ---- IS -------------------------------------------------------------------------------------------------------------


class InceptionScore(Metric):
    """IS = exp(E KL(p(y|x) || p(y))) (Salimans et al., arXiv:1606.03498, Eq. 1), 1..C, over one split.

    Two sums are enough for the score; the interval comes from a uniform sample of the probabilities.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    sum_p: torch.Tensor
    sum_p_log_p: torch.Tensor

    def __init__(self, classes: int, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sample = FeatureStatistics(classes, seed, **kwargs)
        self.add_state("sum_p", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_p_log_p", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor) -> None:
        """Add logits or log-probabilities [N, C]."""
        log_p = logits.detach().to(self.sum_p.device, torch.float64).log_softmax(1)
        self.sum_p += log_p.exp().sum(0)
        self.sum_p_log_p += (log_p.exp() * log_p).sum()
        self.count += len(logits)
        self.sample.update(log_p.exp())

    def compute(self) -> torch.Tensor:
        """The score, 1..C. Raises ValueError below two pictures."""
        if self.count < 2:
            raise ValueError(f"the inception score needs two pictures or more, not {int(self.count)}")
        return (self.sum_p_log_p / self.count - _x_log_x(self.sum_p / self.count).sum()).exp()

    def interval(self, replicates: int = 200, seed: int = 0) -> Interval:
        """IS with a bootstrap interval over the sampled pictures: the replicates' spread, for IS is biased by N too."""
        p = self.sample.sampled
        weights = resamples(replicates, len(p), torch.Generator().manual_seed(seed)) / len(p)
        found = (weights @ _x_log_x(p).sum(1) - _x_log_x(weights @ p).sum(1)).exp()
        value = float(self.compute())
        scale = (len(p) / int(self.count)) ** 0.5
        low, high = ((found - found.mean()) * scale).quantile(ENDS).tolist()
        return Interval(value, max(1.0, value + low), min(float(len(self.sum_p)), value + high))


def _x_log_x(p: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p)
