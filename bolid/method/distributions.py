"""Distances between two sets of pictures: FID (BoLID Eq. 15), KID and the inception score (section 6).

The features of each set stream into a `FeatureStatistics`. The tests compare every metric with torchmetrics and
torch-fidelity.

Shapes: N, M pictures, D features, C classes. All f64.
"""

from __future__ import annotations

from typing import Any

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
from bolid.method.metrics import ENDS, Interval, resamples

BOOTSTRAP_SAMPLE = 512  # rows that FID's bootstrap draws from


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


def _frechet_of_rows(a: torch.Tensor, b: torch.Tensor) -> float:
    """Eq. 15 of features [N, D] and [M, D] in memory."""
    sides: list[torch.Tensor] = []
    for x in (a, b):
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        tall = len(x) > x.shape[1] or x.shape[1] > LARGE_DIM
        sides += [x.mean(0), torch.linalg.qr(centred, mode="r").R if tall else centred]
    return _frechet(*sides)


def frechet_interval(a: FeatureStatistics, b: FeatureStatistics, replicates: int = 200, seed: int = 0) -> Interval:
    """FID with a bootstrap interval over pictures of both sides.

    Resampling repeats pictures, which biases FID upwards, so the interval is the spread of the replicates around their
    own mean. Above BOOTSTRAP_SAMPLE pictures a subset is resampled and the spread scaled by sqrt(subset / all).
    """
    value = frechet_distance(a, b)
    generator = torch.Generator().manual_seed(seed)
    sides = [x.sampled[_random_rows(len(x.sampled), BOOTSTRAP_SAMPLE, generator)] for x in (a, b)]
    found = torch.tensor(
        [
            _frechet_of_rows(*(x[torch.randint(len(x), (len(x),), generator=generator)] for x in sides))
            for _ in range(replicates)
        ],
        dtype=torch.float64,
    )
    scale = max((len(x) / int(y.count)) ** 0.5 for x, y in zip(sides, (a, b), strict=True))
    low, high = ((found - found.mean()) * scale).quantile(ENDS).tolist()
    return Interval(value, max(0.0, value + low), value + high)


def frechet_extrapolated(
    a: FeatureStatistics, b: FeatureStatistics, replicates: int = 30, draws: int = 4, seed: int = 0
) -> Interval:
    """FID at infinitely many pictures: the intercept of FID over 1/N (Chong and Forsyth, arXiv:1911.07023).

    FID's bias is proportional to 1/N on each side. Both sides are thinned to 1/1 .. 1/2 of their sampled rows and a
    line is fitted. The paper thins one side only; here the reference is small too. The interval is the spread of the
    intercept over resampled draws. A true FID near 0 may be estimated below 0.
    """
    generator = torch.Generator().manual_seed(seed)
    thinning = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0], dtype=torch.float64)
    table = torch.empty(len(thinning), draws, dtype=torch.float64)
    sides = [x.sampled[_random_rows(len(x.sampled), 2 * BOOTSTRAP_SAMPLE, generator)] for x in (a, b)]
    for i, factor in enumerate(thinning.tolist()):
        for j in range(draws):
            table[i, j] = _frechet_of_rows(
                *(x[_random_rows(len(x), max(2, round(len(x) / factor)), generator)] for x in sides)
            )
    design = torch.stack([torch.ones_like(thinning), thinning], 1)
    intercepts = []
    for _ in range(replicates):
        columns = torch.randint(draws, (len(thinning), draws), generator=generator)
        intercepts.append(torch.linalg.lstsq(design, table.gather(1, columns).mean(1, keepdim=True)).solution[0, 0])
    value = float(torch.linalg.lstsq(design, table.mean(1, keepdim=True)).solution[0, 0])
    low, high = torch.stack(intercepts).quantile(ENDS).tolist()
    return Interval(value, low, high)


def _random_rows(total: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `most` random rows of `total`; all of them where there are fewer."""
    return torch.randperm(total, generator=generator)[:most]


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
        self.sample = FeatureStatistics(classes, seed)
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
