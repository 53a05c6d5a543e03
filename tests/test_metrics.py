"""The measures, against closed forms and against each other."""

from __future__ import annotations

import pytest
import torch

from bolid.method.keypoints import BONES
from bolid.method.metrics import (
    accept_threshold,
    bone_confidence,
    bone_ratios,
    bone_weights,
    bootstrap_mean,
    correlation_interval,
    expected_max,
    holm,
    jackknife_interval,
    jackknife_p_value,
    mean_correlation,
    mean_p_value,
    perceptual_distance,
    r2_scores,
    rank_and_auc,
    weighted_mean,
    width_profile,
)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def body() -> torch.Tensor:
    points = normal(17, 2, 3) * 50 + 100
    return torch.cat([points, torch.ones(17, 1, dtype=torch.float64)], 1)


def test_bone_ratios_ignore_place_size_and_turn():
    keypoints = body()
    moved = keypoints.clone()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    moved[:, :2] = keypoints[:, :2] @ turn * 2.5 + 7
    assert torch.allclose(bone_ratios(keypoints), bone_ratios(moved))
    assert bone_ratios(keypoints).shape == (len(BONES),)


def test_bone_ratios_are_nan_for_bones_that_are_not_visible():
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


def test_bone_confidence_is_0_where_a_ratio_is_missing():
    keypoints = body()
    keypoints[[7, 8], 2] = 0.1
    keypoints[11, 2] = 0.7
    ratios, confidence = bone_ratios(keypoints), bone_confidence(keypoints)
    assert torch.equal(ratios.isnan(), confidence == 0)
    names = list(BONES)
    assert confidence[names.index("hips")] == 0.7 and confidence[names.index("thigh")] == 1  # the right side is sure


def test_foreshortened_legs_count_little():
    keypoints = torch.zeros(17, 3, dtype=torch.float64)
    places = {
        5: (40, 0),
        6: (0, 0),
        11: (35, 60),
        12: (5, 60),
        13: (35, 105),
        14: (5, 105),
        15: (35, 150),
        16: (5, 150),
    }
    for number, place in places.items():
        keypoints[number] = torch.tensor([*place, 1.0])
    standing, squatting = keypoints.clone(), keypoints.clone()
    squatting[[13, 14], 1] = 80  # the thigh is 20, the shin 70
    names = list(BONES)
    upright, squat = bone_weights(standing), bone_weights(squatting)
    assert torch.equal(upright, bone_confidence(standing)) and upright[names.index("forearm")] == 0
    assert squat[names.index("torso")] == pytest.approx((20 / 70 / 0.85) ** 4)
    keypoints[15:, 2] = 0  # no shins: no ratios, no weight
    assert float(bone_weights(keypoints).sum()) == 0


def test_weighted_mean_leaves_out_nan():
    nan = float("nan")
    values = torch.tensor([[1.0, nan, 4.0], [3.0, nan, nan]])
    assert weighted_mean(values)[[0, 2]].tolist() == [2, 4] and weighted_mean(values)[1].isnan()
    assert weighted_mean(values, torch.tensor([[3.0, 1, 1], [1.0, 1, 1]]))[0] == 1.5


def figure(torso: int, leg: int, gap: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of a block torso on two block legs, and its keypoints."""
    mask = torch.zeros(240, 160, dtype=torch.bool)
    mask[40:120, 80 - torso // 2 : 80 + torso // 2] = True
    for centre in (80 - gap // 2, 80 + gap // 2):
        mask[120:220, centre - leg // 2 : centre + leg // 2] = True
    points = torch.ones(17, 3)
    for number, place in {5: (60, 40), 6: (100, 40), 11: (80 - gap / 2, 120), 12: (80 + gap / 2, 120),
                          13: (80 - gap / 2, 170), 14: (80 + gap / 2, 170), 15: (80 - gap / 2, 220),
                          16: (80 + gap / 2, 220)}.items():  # fmt: skip
        points[number, :2] = torch.tensor(place, dtype=torch.float32)
    return mask, points


def test_width_profile_of_a_known_figure():
    mask, points = figure(torso=60, leg=20)
    profile = width_profile(mask, points)
    assert profile.shape == (16,)
    assert torch.allclose(profile[:8], torch.full((8,), 60 / 180), atol=0.01)  # scale: 80 + 50 + 50
    assert torch.allclose(profile[8:], torch.full((8,), 20 / 180), atol=0.01)
    wider = width_profile(*figure(torso=72, leg=20))
    assert torch.allclose(wider[:8] / profile[:8], torch.full((8,), 1.2), atol=0.03)


def test_width_profile_ends_between_legs_that_touch():
    apart, touching = width_profile(*figure(60, 20, gap=30)), width_profile(*figure(60, 20, gap=20))
    assert torch.allclose(apart[8:], touching[8:], atol=0.01)


def test_width_profile_ignores_size_and_needs_the_body():
    mask, points = figure(60, 20)
    larger = points.clone()
    larger[:, :2] *= 2
    twice = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.allclose(width_profile(mask, points), width_profile(twice, larger), atol=0.01)
    points[15, 2] = 0.1
    assert width_profile(mask, points).isnan().all()


def test_rank_and_auc():
    distances = torch.tensor([[0.0, 1, 2], [0.0, 1, 2], [0.0, 1, 2], [1.0, 1, 1]])
    first, auc = rank_and_auc(distances, torch.tensor([0, 1, 2, 0]))
    assert first.tolist() == pytest.approx([1, 0, 0, 1 / 3]) and auc.tolist() == [1, 0.5, 0, 0.5]
    chance = rank_and_auc(normal(4000, 10), torch.zeros(4000, dtype=torch.long))
    assert float(chance[0].mean()) == pytest.approx(0.1, abs=0.02) and float(chance[1].mean()) == pytest.approx(
        0.5, abs=0.02
    )


def test_correlation():
    truth = normal(50, 3)
    assert float(mean_correlation(truth, truth * 2 + 1)) == pytest.approx(1)
    assert float(mean_correlation(truth, -truth)) == pytest.approx(-1)


def test_perceptual_distance_is_that_of_lpips_but_for_its_weights():
    """torchmetrics' own LPIPS layer arithmetic with all weights at one."""
    from torchmetrics.functional.image.lpips import _normalize_tensor, _spatial_average

    a = [normal(2, 5 * 16, i).view(2, 5, 4, 4) for i in (0, 1)]
    b = [normal(2, 5 * 16, i).view(2, 5, 4, 4) for i in (2, 3)]
    theirs = sum(
        _spatial_average(((_normalize_tensor(p) - _normalize_tensor(q)) ** 2).sum(1, keepdim=True))
        for p, q in zip(a, b, strict=True)
    )
    assert torch.allclose(perceptual_distance(a, b), theirs.flatten(), rtol=1e-6)
    assert torch.allclose(perceptual_distance(a, a), torch.zeros(2, dtype=torch.float64))


def test_expected_max_of_all_draws():
    import itertools

    values = normal(6, 1)[:, 0]
    for count in (1, 2, 4, 6):
        draws = [max(draw) for draw in itertools.combinations(values.tolist(), count)]
        assert expected_max(values, count) == pytest.approx(sum(draws) / len(draws))


def test_accept_threshold():
    assert accept_threshold(torch.arange(1001) / 1000, far=0.01) == pytest.approx(0.99)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        _, low, high = bootstrap_mean(normal(40, 1, seed)[:, 0], replicates=400, seed=seed)
        covered += low <= 0 <= high
    assert 180 <= covered <= 199


def test_bootstrap_resamples_people_because_their_pictures_are_alike():
    person = normal(8, 1)[:, 0].repeat_interleave(20)  # twenty equal values each
    groups = torch.arange(8).repeat_interleave(20)
    alone, grouped = bootstrap_mean(person), bootstrap_mean(person, groups)
    assert alone.value == grouped.value
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_jackknife_of_a_mean_is_students_interval():
    from scipy import stats

    values = normal(12, 1)[:, 0]
    left_out = (values.sum() - values) / 11
    found = jackknife_interval(float(values.mean()), left_out)
    expected = stats.t.interval(0.95, 11, loc=float(values.mean()), scale=stats.sem(values.numpy()))
    assert found[1:] == pytest.approx(expected)


def test_p_value_of_a_mean_is_students():
    from scipy import stats

    values = normal(12, 1)[:, 0] + 0.5
    left_out = (values.sum() - values) / 11
    expected = float(stats.ttest_1samp(values.numpy(), 0).pvalue)
    assert jackknife_p_value(float(values.mean()), left_out) == pytest.approx(expected)
    assert mean_p_value(values) == pytest.approx(expected)
    pictures = values.repeat_interleave(5)  # five equal ones a person say no more than one
    assert mean_p_value(pictures, torch.arange(12).repeat_interleave(5)) == pytest.approx(expected)
    assert mean_p_value(pictures) < expected and mean_p_value(values[:1]) != mean_p_value(values[:1])  # nan
    assert jackknife_p_value(0.0, torch.zeros(4)) == 1 and jackknife_p_value(2.0, torch.full((4,), 2.0)) == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.04]) == [0.04]


def test_holm_keeps_the_chance_of_any_false_find_at_5_percent():
    generator = torch.Generator().manual_seed(0)
    alarms = sum(min(holm(torch.rand(20, generator=generator).tolist())) <= 0.05 for _ in range(1000))
    assert 30 <= alarms <= 70


def test_interval_of_a_mean_over_few_people_is_as_wide_as_students():
    from scipy import stats

    values = normal(8, 1)[:, 0]
    found = bootstrap_mean(values, replicates=20_000)
    low, high = stats.t.interval(0.95, 7, scale=stats.sem(values.numpy()))
    assert found.high - found.low == pytest.approx(high - low, rel=0.15)  # plain percentiles: 0.77 of it


@pytest.mark.slow
def test_intervals_of_correlations_cover_the_truth_and_stay_within_bounds():
    covered, paired = 0, 0
    for seed in range(200):
        truth, noise, other = normal(24, 4, seed), normal(24, 4, 1000 + seed), normal(24, 4, 2000 + seed)
        good, poor = 0.9 * truth + 0.19**0.5 * noise, 0.5 * truth + 0.75**0.5 * other
        _, low, high = correlation_interval(truth, good)
        covered += low <= 0.9 <= high < 1
        value, low, high = correlation_interval(truth, good, minus=poor)
        assert value == pytest.approx(float(mean_correlation(truth, good) - mean_correlation(truth, poor)))
        paired += low <= 0.4 <= high
    assert 184 <= covered <= 198 and 184 <= paired <= 198


def test_bootstrap_of_too_little():
    nan = float("nan")
    assert all(x != x for x in bootstrap_mean(torch.tensor([nan])))
    one = bootstrap_mean(torch.tensor([2.0, nan]))
    assert one.value == 2 and one.low != one.low
