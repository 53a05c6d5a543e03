"""How far apart two sets of pictures are: FID, KID and IS from features that stream by (BoLID Eq. 15, section 6).

A `FeatureStatistics` sees one side of a comparison, batch by batch, and keeps as much of a million pictures as of three
thousand. Metrics that torchmetrics has are checked against torchmetrics and torch-fidelity in the tests.

Shapes: N, M pictures, D features, C classes, r <= LIMIT * (D + 1) rows, m <= KEPT kept rows. All f64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torchmetrics import Metric

KEPT = 2048  # rows kept as they are, a uniform sample: for KID and for intervals
RESAMPLED = 512  # of those, as many as FID's bootstrap draws from
LIMIT = 3  # rows are folded when there are this many times D + 1


class Interval(NamedTuple):
    """A value and its 95 % bootstrap interval; (nan, nan) where there is none."""

    value: float
    low: float
    high: float


class FeatureStatistics(Metric):
    """Mean, covariance and a uniform sample of features [N, D], in memory that does not grow with N.

    The covariance is kept as a triangular factor of the centred features, so that nothing is ever squared: R of
    QR([1 | X]) holds sqrt(N) and sqrt(N) * mean in its first row, and below it R_c with R_c^T R_c = scatter. Rows of
    several machines are simply stacked, which is what `dist_reduce_fx="cat"` does.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    rows: torch.Tensor
    kept: torch.Tensor
    keys: torch.Tensor
    count: torch.Tensor

    def __init__(self, features: int, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if features < 1:
            raise ValueError(f"features is {features}: give at least 1")
        self.features = features
        self._generator = torch.Generator().manual_seed(seed)
        empty = torch.zeros(0, features, dtype=torch.float64)
        self.add_state("rows", torch.zeros(0, features + 1, dtype=torch.float64), dist_reduce_fx="cat")
        self.add_state("kept", empty, dist_reduce_fx="cat")
        self.add_state("keys", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: torch.Tensor) -> None:
        """Take in features [N, D] of any float type."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"expected features [N, {self.features}], not {list(features.shape)}")
        features = features.detach().to(self.rows.device, torch.float64)
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        self.rows = torch.cat([self.rows, torch.cat([ones, features], 1)])
        if len(self.rows) > LIMIT * (self.features + 1):
            self.rows = torch.linalg.qr(self.rows, mode="r").R
        # A uniform sample of a stream: every row gets a random key, and the smallest keys stay.
        keys = torch.rand(len(features), generator=self._generator, dtype=torch.float64).to(features.device)
        self.keys, self.kept = torch.cat([self.keys, keys]), torch.cat([self.kept, features])
        if len(self.keys) > KEPT:
            smallest = self.keys.topk(KEPT, largest=False).indices.sort().values
            self.keys, self.kept = self.keys[smallest], self.kept[smallest]
        self.count += len(features)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D], factor [k, D] with factor^T factor = the unbiased covariance, k <= D). N >= 2."""
        if self.count < 2:
            raise ValueError(f"a distribution needs two pictures or more, not {int(self.count)}")
        r = torch.linalg.qr(self.rows, mode="r").R
        return r[0, 1:] / r[0, 0], r[1:, 1:] / (self.count - 1).double().sqrt()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """FID (BoLID Eq. 15; Heusel et al., arXiv:1706.08500) between two streamed sets of N, M >= 2 pictures.

    |mu_a - mu_b|^2 + Tr S_a + Tr S_b - 2 Tr sqrt(S_a S_b). With S = F^T F the last trace is the nuclear norm of
    F_a F_b^T: no matrix square root, no product of covariances, and exact for N < D too.
    """
    return _frechet(*a.compute(), *b.compute())


def _frechet(mean_a: torch.Tensor, a: torch.Tensor, mean_b: torch.Tensor, b: torch.Tensor) -> float:
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _frechet_of_rows(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same of features [N, D] and [M, D] in memory."""
    sides: list[torch.Tensor] = []
    for x in (a, b):
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        sides += [x.mean(0), torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred]
    return _frechet(*sides)


def frechet_interval(a: FeatureStatistics, b: FeatureStatistics, replicates: int = 200, seed: int = 0) -> Interval:
    """FID with a bootstrap interval over pictures of both sides.

    Resampling repeats pictures, which moves FID itself up; so only the spread of the replicates around their own mean
    is taken. Of more than RESAMPLED pictures that many are drawn, and the spread is scaled by sqrt(drawn / all).
    """
    value = frechet_distance(a, b)
    generator = torch.Generator().manual_seed(seed)
    sides = [x.kept[_some(len(x.kept), RESAMPLED, generator)] for x in (a, b)]
    found = torch.tensor(
        [
            _frechet_of_rows(*(x[torch.randint(len(x), (len(x),), generator=generator)] for x in sides))
            for _ in range(replicates)
        ],
        dtype=torch.float64,
    )
    scale = max((len(x) / int(y.count)) ** 0.5 for x, y in zip(sides, (a, b), strict=True))
    low, high = ((found - found.mean()) * scale).quantile(_ENDS).tolist()
    return Interval(value, max(0.0, value + low), value + high)


def frechet_extrapolated(
    a: FeatureStatistics, b: FeatureStatistics, replicates: int = 30, draws: int = 4, seed: int = 0
) -> Interval:
    """FID at infinitely many pictures: the intercept of FID over 1/N (Chong and Forsyth, arXiv:1911.07023).

    FID's bias goes as 1/N on each side. Both sides are thinned alike to 1/1 .. 1/2 of their kept rows and a line is
    fitted; unlike in the paper, the reference is thinned too, because it is as small as the rest here. The interval is
    the spread of the intercept over resampled draws. It may be below 0 where the truth is near it.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0], dtype=torch.float64)
    table = torch.empty(len(parts), draws, dtype=torch.float64)
    sides = [x.kept[_some(len(x.kept), 2 * RESAMPLED, generator)] for x in (a, b)]
    for i, part in enumerate(parts.tolist()):
        for j in range(draws):
            table[i, j] = _frechet_of_rows(*(x[_some(len(x), max(2, round(len(x) / part)), generator)] for x in sides))
    design = torch.stack([torch.ones_like(parts), parts], 1)
    intercepts = []
    for _ in range(replicates):
        columns = torch.randint(draws, (len(parts), draws), generator=generator)
        intercepts.append(torch.linalg.lstsq(design, table.gather(1, columns).mean(1, keepdim=True)).solution[0, 0])
    value = float(torch.linalg.lstsq(design, table.mean(1, keepdim=True)).solution[0, 0])
    low, high = torch.stack(intercepts).quantile(_ENDS).tolist()
    return Interval(value, low, high)


def kernel_distance(a: FeatureStatistics, b: FeatureStatistics, replicates: int = 200, seed: int = 0) -> Interval:
    """KID: the unbiased squared MMD under k(x, y) = (x . y / D + 1)^3 (Binkowski et al., arXiv:1801.01401).

    One U-statistic over all kept rows (up to KEPT of each side) instead of the mean of many small subsets: the same
    expectation, less variance. The interval is a bootstrap in which a picture is never compared with its own copy.
    """
    x, y = a.kept, b.kept
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs two pictures or more on both sides, not {len(x)} and {len(y)}")
    k_xx, k_yy, k_xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    k_xx.fill_diagonal_(0)
    k_yy.fill_diagonal_(0)

    def distance(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """For weights u [B, N] and v [B, M]: [B]."""
        within = [
            ((w @ k) * w).sum(1) / (w.sum(1).square() - w.square().sum(1)) for w, k in ((u, k_xx), (v, k_yy))
        ]
        return within[0] + within[1] - 2 * ((u @ k_xy) * v).sum(1) / (u.sum(1) * v.sum(1))

    generator = torch.Generator().manual_seed(seed)
    value = float(distance(x.new_ones(1, len(x)), y.new_ones(1, len(y))))
    found = distance(*(_counts(replicates, len(z), generator) for z in (x, y)))
    scale = max((len(z) / int(s.count)) ** 0.5 for z, s in ((x, a), (y, b)))
    low, high = ((found - value) * scale).nan_to_num().quantile(_ENDS).tolist()
    return Interval(value, value + low, value + high)


class InceptionScore(Metric):
    """IS = exp(E KL(p(y|x) || p(y))) (Salimans et al., arXiv:1606.03498, Eq. 1), 1..C, over one split.

    Give `update` log-probabilities or logits [N, C]. Two sums are enough for the score; a uniform sample of the
    probabilities is kept for the interval.
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
        log_p = logits.detach().to(self.sum_p.device, torch.float64).log_softmax(1)
        self.sum_p += log_p.exp().sum(0)
        self.sum_p_log_p += (log_p.exp() * log_p).sum()
        self.count += len(logits)
        self.sample.update(log_p.exp())

    def compute(self) -> torch.Tensor:
        if self.count < 2:
            raise ValueError(f"the inception score needs two pictures or more, not {int(self.count)}")
        return (self.sum_p_log_p / self.count - _x_log_x(self.sum_p / self.count).sum()).exp()

    def interval(self, replicates: int = 200, seed: int = 0) -> Interval:
        """IS with a bootstrap interval over pictures (of the kept ones; its spread, as IS too is biased by N)."""
        p = self.sample.kept
        weights = _counts(replicates, len(p), torch.Generator().manual_seed(seed)) / len(p)
        found = (weights @ _x_log_x(p).sum(1) - _x_log_x(weights @ p).sum(1)).exp()
        value = float(self.compute())
        scale = (len(p) / int(self.count)) ** 0.5
        low, high = ((found - found.mean()) * scale).quantile(_ENDS).tolist()
        return Interval(value, max(1.0, value + low), value + high)


_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def _x_log_x(p: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p)


def _some(total: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `most` rows of `total`, or of all."""
    return torch.randperm(total, generator=generator)[:most]


def _counts(replicates: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """How often each of `total` rows is in each resample, f64 [replicates, total]."""
    picks = torch.randint(total, (replicates, total), generator=generator)
    return torch.zeros(replicates, total, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.float64)
    )
