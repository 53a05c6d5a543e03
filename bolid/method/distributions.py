"""How far apart two sets of pictures are: FID, KID and IS from features that stream by (BoLID Eq. 15, section 6).

A `FeatureStatistics` sees one side of a comparison, batch by batch, and keeps as much of a million pictures as of three
thousand. Metrics that torchmetrics has are checked against torchmetrics and torch-fidelity in the tests.

Shapes: N, M pictures, D features, C classes, r <= LIMIT * (D + 1) rows, m <= KEPT kept rows. All f64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import blas, eigvalsh, lapack
from torchmetrics import Metric

from bolid.method.metrics import ENDS, Interval, resamples

KEPT = 2048  # rows kept as they are, a uniform sample: for KID and for intervals
RESAMPLED = 512  # of those, as many as FID's bootstrap draws from
FOLD = 3  # rows are folded into the factor when there are this many times D, but at least FOLD_ROWS
FOLD_ROWS = 1024
PANEL = 5120  # rows whose products are summed in float32 before float64 takes over
# Above this size LAPACK's orthogonal routines (QR, SVD) cost several times what products and symmetric eigenvalues do.
LARGE = 512


class FeatureStatistics(Metric):
    """Mean, covariance and a uniform sample of features [N, D], in memory that does not grow with N.

    The covariance is kept as a triangular factor: R of QR([1 | X]) holds sqrt(N) and sqrt(N) * mean in its first row,
    and below it R_c with R_c^T R_c = scatter. Rows of several machines are simply stacked, which is what
    `dist_reduce_fx="cat"` does.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    factor: torch.Tensor
    sample: torch.Tensor
    sample_keys: torch.Tensor
    count: torch.Tensor
    rows: list[torch.Tensor]
    keys: list[torch.Tensor]

    def __init__(self, features: int, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if features < 1:
            raise ValueError(f"features is {features}: give at least 1")
        self.features = features
        self._generator = torch.Generator().manual_seed(seed)
        self.add_state("factor", torch.zeros(0, features + 1, dtype=torch.float64), dist_reduce_fx="cat")
        self.add_state("sample", torch.zeros(0, features, dtype=torch.float64), dist_reduce_fx="cat")
        self.add_state("sample_keys", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")  # not folded yet, as they came
        self.add_state("keys", [], dist_reduce_fx="cat")  # one a row: the smallest KEPT of all make the sample

    def update(self, features: torch.Tensor) -> None:
        """Take in features [N, D] of any float type."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"expected features [N, {self.features}], not {list(features.shape)}")
        features = features.detach().to(self.factor.device)
        self.rows.append(features)
        self.keys.append(torch.rand(len(features), generator=self._generator, dtype=torch.float64).to(features.device))
        self.count += len(features)
        if sum(map(len, self.rows)) > max(FOLD * self.features, FOLD_ROWS):
            self.sample, self.sample_keys = self._sampled()
            self.factor, self.rows, self.keys = self._folded(), [], []

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D], factor [k, D] with factor^T factor = the unbiased covariance, k <= D), f64. N >= 2."""
        self._require_two()
        r = self._folded()
        return r[0, 1:] / r[0, 0], r[1:, 1:] / (self.count - 1).double().sqrt()

    @property
    def folded(self) -> bool:
        """Whether the factor is there and up to date, so that `compute` costs next to nothing."""
        return not self.rows and 0 < len(self.factor) <= self.features + 1

    @property
    def kept(self) -> torch.Tensor:
        """A uniform sample of the rows, f64 [min(N, KEPT), D]."""
        return self._sampled()[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All there is to keep, for a file."""
        self.sample, self.sample_keys = self._sampled()
        self.factor, self.rows, self.keys = self._folded(), [], []
        return {name: getattr(self, name) for name in ("factor", "sample", "sample_keys", "count")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureStatistics:
        """The statistics that `tensors` came from."""
        statistics = cls(tensors["sample"].shape[1])
        for name in ("factor", "sample", "sample_keys", "count"):
            setattr(statistics, name, tensors[name])
        statistics._update_count = 1  # or torchmetrics warns that nothing has come in yet
        return statistics

    def _sampled(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([self.sample_keys, *self.keys])
        taken = torch.ones_like(keys, dtype=torch.bool)
        if len(keys) > KEPT:
            taken[:] = False
            taken[keys.topk(KEPT, largest=False).indices] = True
        parts = [self.sample, *self.rows]
        of_each = taken.split([len(part) for part in parts])
        return torch.cat([part[mask].double() for part, mask in zip(parts, of_each, strict=True)]), keys[taken]

    def _folded(self) -> torch.Tensor:
        """Upper triangular R [min(N, D + 1), D + 1] with R^T R = [1 | X]^T [1 | X]."""
        total = len(self.factor) + sum(map(len, self.rows))
        if not self.rows and len(self.factor) and torch.equal(self.factor, self.factor.triu()):
            return self.factor  # nothing has come in since; those of several machines are stacked, and no triangle
        if self.features > LARGE and total > self.features:
            n, mean, scatter = self._moments()
            r, failed = _cholesky(scatter)
            if not failed:
                first = torch.cat([mean.new_ones(1), mean])[None] * n**0.5
                return torch.cat([first, torch.cat([r.new_zeros(len(r), 1), r], 1)])
        whole = [torch.cat([part.new_ones(len(part), 1), part], 1).double() for part in self.rows]
        return torch.linalg.qr(torch.cat([self.factor, *whole]), mode="r").R

    def covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D], the unbiased covariance [D, D], of which only the upper triangle counts), f64. N >= 2. In less
        time than its factor takes, and of float32 features exact to their own rounding; so it can have eigenvalues a
        little below 0.
        """
        self._require_two()
        n, mean, scatter = self._moments(exact=False)
        return mean, scatter.div_(n - 1)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a distribution needs two pictures or more, not {int(self.count)}")

    def _moments(self, exact: bool = True) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(N, mean [D], scatter [D, D] around it, of which only the upper triangle counts), f64.

        Not `exact`: products of float32 rows in float32, PANEL rows at a time, and those sums in float64.
        """
        seen = self.factor.T @ self.factor if len(self.factor) else self.factor.new_zeros(1 + self.features, 1)
        n = float(seen[0, 0]) + sum(map(len, self.rows))
        sums = seen[1:, 0].clone()
        for part in self.rows:
            sums += part.sum(0, dtype=torch.float64)
        mean = sums / n
        scatter = torch.from_numpy(np.zeros((len(mean), len(mean)))).to(mean)  # NumPy asks for large pages of memory
        if len(self.factor):
            cross = torch.outer(seen[1:, 0], mean)
            scatter += seen[1:, 1:] - cross - cross.T + seen[0, 0] * torch.outer(mean, mean)
        if not self.rows:
            return n, mean, scatter
        centre = mean if exact or any(part.dtype == torch.float64 for part in self.rows) else mean.float()
        for panel in _panels(self.rows, centre):
            _add_gram(scatter, panel)
        # Around the true mean it is less by this than around a rounded one (Steiner's theorem).
        scatter.addr_(mean - centre, mean - centre, alpha=-sum(map(len, self.rows)))
        return n, mean, scatter


def _panels(parts: Sequence[torch.Tensor], centre: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of all parts less their centre [D], PANEL at a time, each time in the same memory."""
    panel, filled = torch.from_numpy(np.empty((PANEL, len(centre)), np.float32)).to(centre), 0
    for part in parts:
        while len(part):
            fits = part[: PANEL - filled]
            torch.sub(fits, centre, out=panel[filled : filled + len(fits)])
            filled, part = filled + len(fits), part[len(fits) :]
            if filled == PANEL:
                yield panel
                filled = 0
    if filled:
        yield panel[:filled]


def _add_gram(gram: torch.Tensor, x: torch.Tensor) -> None:
    """gram += x^T x, its upper triangle: half of a product's work, for which torch has no name but BLAS has."""
    if gram.device.type != "cpu":
        gram += x.T @ x
        return
    rows = x.numpy().T  # to Fortran a row-major matrix is its own transpose, and the upper triangle the lower one
    if x.dtype == gram.dtype:
        blas.dsyrk(1.0, rows, beta=1.0, c=gram.numpy().T, lower=1, overwrite_c=1)
    else:
        sums = gram.numpy()
        sums += blas.ssyrk(1.0, rows, lower=1).T  # a fifth of what torch takes to add one type to another


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """FID (BoLID Eq. 15; Heusel et al., arXiv:1706.08500) between two streamed sets of N, M >= 2 pictures.

    |mu_a - mu_b|^2 + Tr S_a + Tr S_b - 2 Tr sqrt(S_a S_b). With S = F^T F the last trace is the nuclear norm of
    F_a F_b^T: no matrix square root, no product of covariances, and exact for N < D too. Of more than LARGE features
    and yet more pictures it is the sum of the roots of the eigenvalues of F_a S_b F_a^T; float32 features are then
    multiplied in float32.
    """
    if a.features <= LARGE or min(int(a.count), int(b.count)) <= a.features:
        return _frechet(*a.compute(), *b.compute())
    if b.folded and not a.folded:
        a, b = b, a  # the factor that is at hand already: the reference's, kept from an earlier time
    mean_a, factor = a.compute() if a.folded else _mean_and_factor(a)
    mean_b, covariance = b.covariance()
    total = (mean_a - mean_b).square().sum() + torch.linalg.vector_norm(factor).square() + covariance.trace()
    return max(0.0, float(total - 2 * _roots(_congruent(factor, covariance))))


def _frechet(mean_a: torch.Tensor, a: torch.Tensor, mean_b: torch.Tensor, b: torch.Tensor) -> float:
    total = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum()
    return max(0.0, float(total - 2 * _nuclear_norm(a, b)))


def _nuclear_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values of a b^T, for a [k, D] and b [l, D]."""
    if len(a) > len(b):
        a, b = b, a
    product = a @ b.T
    return torch.linalg.svdvals(product).sum() if len(a) <= LARGE else _roots(product @ product.T)


def _roots(gram: torch.Tensor) -> torch.Tensor:
    """Sum of the roots of the eigenvalues of a symmetric matrix that has none below 0 but by rounding; its upper
    triangle is read, and the matrix used up."""
    if gram.device.type != "cpu":
        found = torch.linalg.eigvalsh(gram, UPLO="U")
    else:  # SciPy's takes three quarters of the time, and the transpose in the place where it lies
        found = torch.from_numpy(eigvalsh(gram.numpy().T, driver="evd", overwrite_a=True, check_finite=False))
    return found.clamp_min(0).sqrt().sum()


def _mean_and_factor(side: FeatureStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """`side.compute()` from `side.covariance()`, in less time.

    Rounding can leave the covariance's last eigenvalues below 0, where Cholesky's factor ends. What is left there is
    then taken at its nearest that has none, or `side.compute()` if much is left.
    """
    mean, covariance = side.covariance()
    factor, failed = _cholesky(covariance)
    done = failed - 1  # so many rows of the factor are right
    if failed and len(mean) - done > LARGE:
        return side.compute()
    if failed:
        right = torch.linalg.solve_triangular(factor[:done, :done].T, covariance[:done, done:], upper=False)
        values, vectors = torch.linalg.eigh(covariance[done:, done:] - right.T @ right, UPLO="U")
        factor[:done, done:] = right
        factor[done:, done:] = torch.linalg.qr(values.clamp_min(0).sqrt()[:, None] * vectors.T, mode="r").R
    return mean, factor


def _cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The upper triangular F with F^T F = a symmetric matrix whose upper triangle is read, and 0; or what there is of
    it, and the first row, counted from 1, that is not there."""
    if matrix.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        return factor, int(failed)
    factor, failed = lapack.dpotrf(matrix.numpy().T, lower=1)  # transposed as above, and so are the next steps'
    return torch.from_numpy(factor.T), failed


def _congruent(factor: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """F S F^T for an upper triangular F and a symmetric S, which is used up; of it and of the result the upper triangle
    counts."""
    if factor.device.type != "cpu":
        return factor @ (covariance.triu() + covariance.triu(1).T) @ factor.T
    # LAPACK's step towards the generalised problem S F^T F x = l x: half of one product's work. Transposed as above.
    result, _ = lapack.dsygst(covariance.numpy().T, factor.numpy().T, itype=2, lower=1, overwrite_a=1)
    return torch.from_numpy(result.T)


def _frechet_of_rows(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same of features [N, D] and [M, D] in memory."""
    sides: list[torch.Tensor] = []
    for x in (a, b):
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        tall = len(x) > x.shape[1] or x.shape[1] > LARGE
        sides += [x.mean(0), torch.linalg.qr(centred, mode="r").R if tall else centred]
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
    low, high = ((found - found.mean()) * scale).quantile(ENDS).tolist()
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
    low, high = torch.stack(intercepts).quantile(ENDS).tolist()
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
        within = [((w @ k) * w).sum(1) / (w.sum(1).square() - w.square().sum(1)) for w, k in ((u, k_xx), (v, k_yy))]
        return within[0] + within[1] - 2 * ((u @ k_xy) * v).sum(1) / (u.sum(1) * v.sum(1))

    generator = torch.Generator().manual_seed(seed)
    value = float(distance(x.new_ones(1, len(x)), y.new_ones(1, len(y))))
    found = distance(*(resamples(replicates, len(z), generator) for z in (x, y)))
    scale = max((len(z) / int(s.count)) ** 0.5 for z, s in ((x, a), (y, b)))
    low, high = ((found - value) * scale).nan_to_num().quantile(ENDS).tolist()
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
        weights = resamples(replicates, len(p), torch.Generator().manual_seed(seed)) / len(p)
        found = (weights @ _x_log_x(p).sum(1) - _x_log_x(weights @ p).sum(1)).exp()
        value = float(self.compute())
        scale = (len(p) / int(self.count)) ** 0.5
        low, high = ((found - found.mean()) * scale).quantile(ENDS).tolist()
        return Interval(value, max(1.0, value + low), min(float(len(self.sum_p)), value + high))


def _x_log_x(p: torch.Tensor) -> torch.Tensor:
    return torch.special.xlogy(p, p)


def _some(total: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `most` rows of `total`, or of all."""
    return torch.randperm(total, generator=generator)[:most]
