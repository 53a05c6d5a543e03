"""Mean, covariance and a sample of image features, streamed: what FID and KID (distributions.py) compare.

The linear algebra that FID needs of them stands below the class.

Shapes: N pictures, D features, m <= MAX_SAMPLE sampled rows. f64, but for rows not yet folded in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import blas, eigvalsh, lapack
from torchmetrics import Metric

MAX_SAMPLE = 2048  # rows in the uniform sample, for KID and for intervals
FOLD = 3  # rows are folded into the factor when there are this many times D, but at least MIN_FOLD_ROWS
MIN_FOLD_ROWS = 1024
PANEL = 5120  # rows whose products are summed in float32 before float64 takes over
# Above this dimension LAPACK's orthogonal routines (QR, SVD) cost several times what products and symmetric
# eigenvalues do.
LARGE_DIM = 512


class FeatureStatistics(Metric):
    """Mean, covariance and a uniform sample of features [N, D], in memory that does not grow with N.

    The covariance is kept as a triangular factor: R of QR([1 | X]) holds sqrt(N) and sqrt(N) * mean in its first row,
    and below it R_c with R_c^T R_c = scatter. The factors of several machines are stacked (`dist_reduce_fx="cat"`).
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
        self.add_state("rows", [], dist_reduce_fx="cat")  # not folded in yet
        self.add_state(
            "keys", [], dist_reduce_fx="cat"
        )  # a random number a row; the MAX_SAMPLE smallest are the sample

    def update(self, features: torch.Tensor) -> None:
        """Add features [N, D] of any float type. Raises ValueError for another shape."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"expected features [N, {self.features}], not {list(features.shape)}")
        features = features.detach().to(self.factor.device)
        self.rows.append(features)
        self.keys.append(torch.rand(len(features), generator=self._generator, dtype=torch.float64).to(features.device))
        self.count += len(features)
        if sum(map(len, self.rows)) > max(FOLD * self.features, MIN_FOLD_ROWS):
            self.sample, self.sample_keys = self._select()
            self.factor, self.rows, self.keys = self._fold(), [], []

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D], factor [k, D], k <= D), f64; factor^T factor is the unbiased covariance.

        Raises ValueError below two pictures.
        """
        self._require_two()
        r = self._fold()
        return r[0, 1:] / r[0, 0], r[1:, 1:] / (self.count - 1).double().sqrt()

    @property
    def is_folded(self) -> bool:
        """Whether all rows are in the factor, so that `compute` has nothing left to do."""
        return not self.rows and 0 < len(self.factor) <= self.features + 1

    @property
    def sampled(self) -> torch.Tensor:
        """A uniform sample of the rows, f64 [min(N, MAX_SAMPLE), D]."""
        return self._select()[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors, for a file."""
        self.sample, self.sample_keys = self._select()
        self.factor, self.rows, self.keys = self._fold(), [], []
        return {name: getattr(self, name) for name in ("factor", "sample", "sample_keys", "count")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], **kwargs: Any) -> FeatureStatistics:
        """The inverse of `tensors`; `kwargs` are torchmetrics' own."""
        statistics = cls(tensors["sample"].shape[1], **kwargs)
        for name in ("factor", "sample", "sample_keys", "count"):
            setattr(statistics, name, tensors[name])
        statistics._update_count = 1  # else torchmetrics warns that `update` was never called
        return statistics

    def _select(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([self.sample_keys, *self.keys])
        taken = torch.ones_like(keys, dtype=torch.bool)
        if len(keys) > MAX_SAMPLE:
            taken[:] = False
            taken[keys.topk(MAX_SAMPLE, largest=False).indices] = True
        parts = [self.sample, *self.rows]
        of_each = taken.split([len(part) for part in parts])
        return torch.cat([part[mask].double() for part, mask in zip(parts, of_each, strict=True)]), keys[taken]

    def _fold(self) -> torch.Tensor:
        """Upper triangular R [min(N, D + 1), D + 1] with R^T R = [1 | X]^T [1 | X]."""
        total = len(self.factor) + sum(map(len, self.rows))
        if not self.rows and len(self.factor) and torch.equal(self.factor, self.factor.triu()):
            return self.factor  # no new rows; stacked factors of several machines are no triangle
        if self.features > LARGE_DIM and total > self.features:
            n, mean, scatter = self._moments()
            r, failed = cholesky(scatter)
            if not failed:
                first = torch.cat([mean.new_ones(1), mean])[None] * n**0.5
                return torch.cat([first, torch.cat([r.new_zeros(len(r), 1), r], 1)])
        whole = [torch.cat([part.new_ones(len(part), 1), part], 1).double() for part in self.rows]
        return torch.linalg.qr(torch.cat([self.factor, *whole]), mode="r").R

    def covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean [D], unbiased covariance [D, D]), f64; only the upper triangle of the covariance is valid.

        Faster than the factor. Float32 features are multiplied in float32, so eigenvalues may lie slightly below 0.
        Raises ValueError below two pictures.
        """
        self._require_two()
        n, mean, scatter = self._moments(exact=False)
        return mean, scatter.div_(n - 1)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a distribution needs two pictures or more, not {int(self.count)}")

    def _moments(self, exact: bool = True) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(N, mean [D], scatter [D, D] around the mean), f64; only the upper triangle of the scatter is valid.

        With `exact=False` float32 rows are multiplied in float32, PANEL rows at a time, and summed in float64.
        """
        folded = self.factor.T @ self.factor if len(self.factor) else self.factor.new_zeros(1 + self.features, 1)
        n = float(folded[0, 0]) + sum(map(len, self.rows))
        sums = folded[1:, 0].clone()
        for part in self.rows:
            sums += part.sum(0, dtype=torch.float64)
        mean = sums / n
        scatter = torch.from_numpy(np.zeros((len(mean), len(mean)))).to(mean)  # NumPy asks for large pages of memory
        if len(self.factor):
            cross = torch.outer(folded[1:, 0], mean)
            scatter += folded[1:, 1:] - cross - cross.T + folded[0, 0] * torch.outer(mean, mean)
        if not self.rows:
            return n, mean, scatter
        centre = mean if exact or any(part.dtype == torch.float64 for part in self.rows) else mean.float()
        for panel in _panels(self.rows, centre):
            _add_gram(scatter, panel)
        # Around the true mean it is less by this than around a rounded one (Steiner's theorem).
        scatter.addr_(mean - centre, mean - centre, alpha=-sum(map(len, self.rows)))
        return n, mean, scatter


def _panels(parts: Sequence[torch.Tensor], centre: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of all parts minus `centre` [D], PANEL at a time; every panel reuses the same memory."""
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
    """gram += x^T x, the upper triangle only, by BLAS's syrk: half the work of torch's product."""
    if gram.device.type != "cpu":
        gram += x.T @ x
        return
    rows = x.numpy().T  # to Fortran a row-major matrix is its own transpose, and the upper triangle the lower one
    if x.dtype == gram.dtype:
        blas.dsyrk(1.0, rows, beta=1.0, c=gram.numpy().T, lower=1, overwrite_c=1)
    else:
        sums = gram.numpy()
        sums += blas.ssyrk(1.0, rows, lower=1).T  # five times as fast as adding float32 to float64 in torch


# ---- linear algebra -----------------------------------------------------------------------------------------------


def nuclear_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values of a b^T, for a [k, D] and b [l, D]."""
    if len(a) > len(b):
        a, b = b, a
    product = a @ b.T
    return torch.linalg.svdvals(product).sum() if len(a) <= LARGE_DIM else sum_of_roots(product @ product.T)


def sum_of_roots(gram: torch.Tensor) -> torch.Tensor:
    """Sum of the square roots of a positive semidefinite matrix's eigenvalues.

    Only its upper triangle is read, and the matrix is overwritten.
    """
    if gram.device.type != "cpu":
        found = torch.linalg.eigvalsh(gram, UPLO="U")
    else:  # SciPy's is a quarter faster and works in place
        found = torch.from_numpy(eigvalsh(gram.numpy().T, driver="evd", overwrite_a=True, check_finite=False))
    return found.clamp_min(0).sqrt().sum()


def mean_and_factor(statistics: FeatureStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """`statistics.compute()` by way of `statistics.covariance()`, which is faster.

    Rounding can push the covariance's smallest eigenvalues below 0, and Cholesky's factorisation stops there. The rest
    of the matrix is then replaced by its nearest positive semidefinite one; if much is left, `compute` is called.
    """
    mean, covariance = statistics.covariance()
    factor, failed = cholesky(covariance)
    done = failed - 1  # rows of the factor that are valid
    if failed and len(mean) - done > LARGE_DIM:
        return statistics.compute()
    if failed:
        right = torch.linalg.solve_triangular(factor[:done, :done].T, covariance[:done, done:], upper=False)
        values, vectors = torch.linalg.eigh(covariance[done:, done:] - right.T @ right, UPLO="U")
        factor[:done, done:] = right
        factor[done:, done:] = torch.linalg.qr(values.clamp_min(0).sqrt()[:, None] * vectors.T, mode="r").R
    return mean, factor


def cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(upper triangular F with F^T F = `matrix`, 0); only the upper triangle of `matrix` is read.

    Where the factorisation fails: the partial factor and its first invalid row, counted from 1.
    """
    if matrix.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        return factor, int(failed)
    factor, failed = lapack.dpotrf(matrix.numpy().T, lower=1)  # transposed, as in `_add_gram`
    return torch.from_numpy(factor.T), failed


def congruent(factor: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """F S F^T for an upper triangular F and a symmetric S, which is overwritten; upper triangles only."""
    if factor.device.type != "cpu":
        return factor @ (covariance.triu() + covariance.triu(1).T) @ factor.T
    # LAPACK's reduction of the generalised problem S F^T F x = l x: half the work of one product.
    result, _ = lapack.dsygst(covariance.numpy().T, factor.numpy().T, itype=2, lower=1, overwrite_a=1)
    return torch.from_numpy(result.T)
