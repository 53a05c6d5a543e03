"""FID, KID and IS: identities, closed forms, and torchmetrics' and torch-fidelity's figures on the same features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bolid.method import distributions, feature_statistics
from bolid.method.distributions import (
    InceptionScore,
    frechet_distance,
    frechet_extrapolated,
    frechet_interval,
    kernel_distance,
)
from bolid.method.feature_statistics import FeatureStatistics


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(x: torch.Tensor, batch: int = 10_000) -> FeatureStatistics:
    result = FeatureStatistics(x.shape[1])
    for part in x.split(batch):
        result.update(part)
    return result


def pair(n: int = 300, m: int = 260, d: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unlike sets, off centre, with correlated features."""
    return normal(n, d) @ normal(d, d, 2) + 5, normal(m, d, 1) @ normal(d, d, 3) + 4


@pytest.mark.parametrize(("n", "d"), [(40, 8), (6, 20), (20, 20), (2, 5)])
def test_a_set_is_at_no_distance_from_itself(n, d):
    x = normal(n, d)
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(statistics(x), statistics(x + 3)) == pytest.approx(9 * d)  # only the mean moved


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_do_not_matter(batch):
    x = normal(200, 6) + 100
    mean, factor = statistics(x, batch).compute()
    assert torch.allclose(mean, x.mean(0)) and torch.allclose(factor.T @ factor, torch.cov(x.T))


def test_many_float32_features_far_off_zero():
    """More features than LARGE_DIM, no multiple of any block: float32 panels, and FID by a cached factor."""
    d = feature_statistics.LARGE_DIM + 89
    mix = normal(d, d, 2) * torch.logspace(0, -2, d, dtype=torch.float64)[:, None] / d**0.5
    a, b = (normal(2 * d, d, seed) @ mix + 30 for seed in (0, 1))
    exact = frechet_distance(statistics(a, 100), statistics(b * 1.1, 100))
    few = frechet_distance(statistics(a.float(), 100), statistics((b * 1.1).float(), 100))
    kept = FeatureStatistics.from_tensors(statistics(a.float()).tensors())
    assert kept.is_folded and frechet_distance(statistics((b * 1.1).float()), kept) == pytest.approx(few, rel=1e-6)
    mean, covariance = statistics(b.float(), 100).covariance()
    assert torch.allclose(mean, b.mean(0)) and torch.allclose(covariance.triu(), torch.cov(b.T).triu(), atol=2e-7)
    root = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(1.1 * b.T)).real.clamp_min(0).sqrt().sum()
    traces = torch.cov(a.T).trace() + 1.21 * torch.cov(b.T).trace()
    whole = float((a.mean(0) - 1.1 * b.mean(0)).square().sum() + traces - 2 * root)
    assert exact == pytest.approx(whole, rel=1e-7) and few == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("repeated", "panel"), [(0, 250), (40, None), (512, 250)])
def test_large_float32_features_that_repeat_themselves(repeated, panel, monkeypatch):
    """Cholesky's factor of float32 products ends where the features repeat: what is left is made up for."""
    d = feature_statistics.LARGE_DIM + 89
    monkeypatch.setattr(feature_statistics, "PANEL", panel or d)  # with d the last panel is full
    a, b = ((normal(2 * d, d, seed) / d**0.5 + 3).float() for seed in (0, 1))
    a, b = (torch.cat([x, x[:, :repeated]], 1) for x in (a, b * 1.1))
    factor, failed = feature_statistics.cholesky(statistics(a).covariance()[1])
    assert (failed > d - 9) if repeated else failed == 0
    exact = frechet_distance(statistics(a.double()), statistics(b.double()))
    assert frechet_distance(statistics(a, 100), statistics(b, 70)) == pytest.approx(exact, rel=1e-4)


def test_memory_does_not_grow_and_the_sample_is_fair(monkeypatch):
    monkeypatch.setattr(feature_statistics, "MAX_SAMPLE", 400)
    stats = FeatureStatistics(4)
    x = torch.arange(20_000, dtype=torch.float64)[:, None].expand(-1, 4)
    sizes = []
    for part in x.split(100):
        stats.update(part)
        sizes.append(sum(map(len, stats.rows)) + len(stats.factor) + len(stats.sample))
    assert max(sizes) <= feature_statistics.MIN_FOLD_ROWS + 5 + 400 and len(stats.sampled) == 400
    assert int(stats.count) == 20_000 and stats.compute()[0][0] == pytest.approx(9999.5)
    assert stats.sampled[:, 0].unique().numel() == 400
    assert abs(float(stats.sampled[:, 0].mean()) - 9999.5) < 4 * 5774 / 20  # four standard errors of 400 draws


def test_statistics_of_two_machines_add_up(monkeypatch):
    monkeypatch.setattr(feature_statistics, "MIN_FOLD_ROWS", 30)
    x = normal(90, 5)
    one, two, whole = statistics(x[:40], 15), statistics(x[40:], 8), statistics(x)
    merged = FeatureStatistics(5)
    merged.count = one.count + two.count
    for name in ("factor", "sample", "sample_keys"):
        setattr(merged, name, torch.cat([getattr(one, name), getattr(two, name)]))
    for name in ("rows", "keys"):
        setattr(merged, name, getattr(one, name) + getattr(two, name))
    assert torch.allclose(merged.compute()[0], whole.compute()[0]) and len(merged.sampled) == 90
    assert frechet_distance(merged, whole) == pytest.approx(0, abs=1e-9)


def as_tensor_features(module_input: int) -> nn.Module:
    extractor = nn.Identity()
    extractor.num_features = module_input
    return extractor


@pytest.mark.parametrize("large", [512, 8])
@pytest.mark.parametrize("shape", [(300, 260, 24), (12, 14, 24), (300, 14, 24), (12, 260, 24)])
def test_fid_equals_torchmetrics(shape, large, monkeypatch):
    """In the way of small and of large feature sizes, with more and with fewer pictures than features."""
    for module in (distributions, feature_statistics):
        monkeypatch.setattr(module, "LARGE_DIM", large)
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = pair(*shape)
    theirs = FrechetInceptionDistance(feature=as_tensor_features(shape[2])).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet_distance(statistics(a, 50), statistics(b)) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_fid_equals_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="pip install torch-fidelity")
    a, b = pair()
    theirs = fid.fid_statistics_to_metric(
        fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b), verbose=False
    )
    ours = frechet_distance(statistics(a, 50), statistics(b, 70))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_large_features_of_no_full_rank(monkeypatch):
    """Where the Cholesky factor of the Gram matrix does not exist, QR takes over."""
    for module in (distributions, feature_statistics):
        monkeypatch.setattr(module, "LARGE_DIM", 8)
    a, b = pair(200, 200, 24)
    a, b = (torch.cat([x[:, :12], x[:, :12]], 1) for x in (a, b))
    plain = frechet_distance(statistics(a[:, :12] * 2**0.5), statistics(b[:, :12] * 2**0.5))
    assert frechet_distance(statistics(a, 30), statistics(b, 30)) == pytest.approx(plain, rel=1e-6)


def test_fid_is_exact_where_the_covariances_are_nearly_singular():
    """Against 50 digits: features whose covariance spans 24 orders of magnitude."""
    import mpmath

    mpmath.mp.dps = 50
    scale = torch.logspace(0, -12, 4, dtype=torch.float64)
    a, b = normal(30, 4) * scale, normal(30, 4, 1) * scale.flip(0)
    means, covariances = [], []
    for x in (a, b):
        rows = mpmath.matrix(x.tolist())
        mean = [mpmath.fsum(rows[i, j] for i in range(30)) / 30 for j in range(4)]
        centred = mpmath.matrix([[rows[i, j] - mean[j] for j in range(4)] for i in range(30)])
        means.append(mean)
        covariances.append(centred.T * centred / 29)
    roots = mpmath.eig(covariances[0] * covariances[1], left=False, right=False)
    trace = mpmath.fsum(mpmath.sqrt(abs(r)) for r in roots)
    exact = mpmath.fsum((p - q) ** 2 for p, q in zip(*means, strict=True)) - 2 * trace
    exact += mpmath.fsum(c[i, i] for c in covariances for i in range(4))
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(float(exact), rel=1e-13)


def test_kid_equals_torchmetrics_and_torch_fidelity():
    from torchmetrics.image.kid import poly_mmd

    a, b = pair(80, 80)
    ours = kernel_distance(statistics(a, 9), statistics(b))
    assert ours.value == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    assert ours.low < ours.value < ours.high
    kid = pytest.importorskip("torch_fidelity.metric_kid", reason="pip install torch-fidelity")
    theirs = kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=80, verbose=False)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_kid_of_one_distribution_is_about_zero_and_covered_by_its_interval():
    covered = 0
    for seed in range(40):
        found = kernel_distance(statistics(normal(60, 8, 2 * seed)), statistics(normal(60, 8, 2 * seed + 1)))
        covered += found.low <= 0 <= found.high
    assert covered >= 34


def test_inception_score_equals_torchmetrics_and_torch_fidelity():
    from torchmetrics.image.inception import InceptionScore as Theirs

    logits = 3 * normal(200, 10)
    ours = InceptionScore(10)
    for part in logits.split(33):
        ours.update(part)
    theirs = Theirs(feature=nn.Identity(), splits=1)
    theirs.update(logits)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)
    interval = ours.interval()
    assert 1 <= interval.low < interval.value < interval.high <= 10
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason="pip install torch-fidelity")
    found = isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert float(ours.compute()) == pytest.approx(found, rel=1e-9)


def test_inception_score_ends():
    sure = InceptionScore(4)
    sure.update(torch.eye(4).repeat(5, 1) * 1000)
    assert float(sure.compute()) == pytest.approx(4)  # certain, and evenly over all classes
    dull = InceptionScore(4)
    dull.update(torch.eye(4)[:1].repeat(5, 1) * 3)
    assert float(dull.compute()) == pytest.approx(1)  # all alike


def test_few_pictures_give_a_biased_fid_and_extrapolation_takes_the_bias_off():
    a, b = statistics(normal(150, 16)), statistics(normal(150, 16, 1))
    value, low, high = frechet_interval(a, b)
    assert low < value < high and value > 1  # the truth is 0
    assert abs(frechet_extrapolated(a, b).value) < 0.35 * value


def test_the_interval_of_fid_narrows_with_the_number_of_pictures():
    widths = []
    for n in (60, 240, 960):
        found = frechet_interval(statistics(normal(n, 6)), statistics(normal(n, 6, 1) + 1))
        widths.append(found.high - found.low)
    assert widths[0] > 1.4 * widths[1] > 1.4**2 * widths[2]


@pytest.mark.slow
def test_intervals_of_fid_cover_and_do_not_depend_on_the_order_of_files():
    values, reaches, inside = [], [], 0
    for seed in range(60):
        a, b = normal(120, 6, seed) + 0.5, normal(90, 6, 1000 + seed)
        found, at_infinity = (
            frechet_interval(statistics(a), statistics(b)),
            frechet_extrapolated(statistics(a), statistics(b)),
        )
        values.append(found.value)
        reaches.append(found.high - found.value)
        inside += at_infinity.low <= 6 * 0.25 <= at_infinity.high
    mean, reach = sum(values) / 60, sum(reaches) / 60
    spread = (sum((value - mean) ** 2 for value in values) / 59) ** 0.5
    assert reach / spread == pytest.approx(1.96, rel=0.25)
    assert 53 <= inside
    again = frechet_extrapolated(statistics(a.flip(0)), statistics(b[torch.randperm(90)]))
    assert again == pytest.approx(at_infinity)


def test_one_picture_is_refused():
    one, many = statistics(normal(1, 3)), statistics(normal(5, 3))
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="two pictures or more"):
        kernel_distance(one, many)
    lone = InceptionScore(3)
    lone.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="two pictures or more"):
        lone.compute()
    with pytest.raises(ValueError, match=r"expected features \[N, 3\]"):
        many.update(torch.zeros(2, 4))
