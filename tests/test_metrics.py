"""The measures, against closed forms and against each other."""

from __future__ import annotations

import pytest
import torch

from bolid.method.metrics import BONES, bone_ratios, frechet_distance, r2_scores


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (6, 20), (20, 20)])
def test_frechet_distance_of_a_set_to_itself_is_zero(n, d):
    x = normal(n, d)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(9 * d)  # only the mean moved


def test_frechet_distance_of_commuting_covariances():
    x = normal(5000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # covariance exactly I
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert frechet_distance(x, x * scale) == pytest.approx(float(((scale - 1) ** 2).sum()))


def test_frechet_distance_equals_the_matrix_square_root():
    import scipy.linalg

    a, b = normal(60, 7), normal(80, 7, 1) @ normal(7, 7, 2)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = scipy.linalg.sqrtm((ca @ cb).numpy()).real
    expected = float((a.mean(0) - b.mean(0)).pow(2).sum() + ca.trace() + cb.trace() - 2 * root.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_needs_two():
    with pytest.raises(ValueError, match="two pictures"):
        frechet_distance(normal(1, 3), normal(5, 3))


def body() -> torch.Tensor:
    points = normal(17, 2, 3) * 50 + 100
    return torch.cat([points, torch.ones(17, 1, dtype=torch.float64)], 1)


def test_bone_ratios_do_not_see_place_size_or_turn():
    keypoints = body()
    moved = keypoints.clone()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    moved[:, :2] = keypoints[:, :2] @ turn * 2.5 + 7
    assert torch.allclose(bone_ratios(keypoints), bone_ratios(moved))
    assert bone_ratios(keypoints).shape == (len(BONES),)


def test_bone_ratios_leave_out_what_was_not_seen():
    keypoints = body()
    keypoints[[7, 8], 2] = 0.1  # both elbows
    ratios = dict(zip(BONES, bone_ratios(keypoints).tolist(), strict=True))
    assert ratios["forearm"] != ratios["forearm"] and ratios["upper_arm"] != ratios["upper_arm"]  # nan
    assert ratios["thigh"] > 0
    keypoints[[15, 16], 2] = 0  # no ankle: no shin, so nothing to measure by
    assert bone_ratios(keypoints).isnan().all()


def test_r2():
    truth = normal(50, 2)
    assert torch.allclose(r2_scores(truth, truth), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(r2_scores(truth, truth.mean(0).expand_as(truth)), torch.zeros(2, dtype=torch.float64))
