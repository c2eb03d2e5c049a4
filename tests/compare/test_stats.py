"""Intervals of means, differences and shares over groups, where the seeds are fixed."""

import math

import numpy as np
import pytest

from rlhf.compare.results import Results
from rlhf.errors import UserError
from rlhf.stats import bounded_interval, jackknife_interval, student_quantile, wilson
from rlhf.stats.crossed import crossed_mean, share


def mean_of(values):
    """Student's interval of the mean over groups."""
    return crossed_mean(np.asarray(values, dtype=float)[None])


def share_of(values):
    return share(mean_of(values), 0.95)


def results_of(groups):
    return Results(
        points=[], groups=groups, prompts=groups, score_kinds={}, judge=None, methods={},
        shared_budget={}, meta={},
    )  # fmt: skip


def test_the_unit_is_the_group():
    # group x: prompt p (1, 3) -> 2, prompt q (5, 5) -> 5, so x = 3.5; group y: 0.5.  Over responses the mean is 2.5.
    found = results_of(["y", "x", "x"]).group_means([[0.5, 0.5], [1, 3], [5, 5]])
    np.testing.assert_allclose(found, [3.5, 0.5], atol=1e-12)
    assert mean_of(found).estimate == pytest.approx(2.0, abs=1e-12)


def test_standard_error_is_clustered_by_group():
    # group means 2, 4, 9: mean 5, variance (9 + 1 + 16) / 2 = 13, se = sqrt(13 / 3).  Repeated samples add nothing.
    found = mean_of(
        results_of(list("abc")).group_means([[2.0] * 4, [3.0, 5.0, 3.0, 5.0], [9.0] * 4])
    )
    assert (found.estimate, found.se) == pytest.approx((5.0, math.sqrt(13 / 3)), abs=1e-12)


def test_student_quantiles_are_the_table_s():
    # Printed tables; for 2 degrees of freedom in closed form: t = (2p - 1) sqrt(2 / (4 p (1 - p)))
    for p, df, expected in [
        (0.975, 1, 12.7062),
        (0.975, 9, 2.26216),
        (0.95, 30, 1.69726),
        (0.975, 299, 1.96793),
    ]:
        assert student_quantile(p, df) == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.75, 2) == pytest.approx(math.sqrt(2 / 3), abs=1e-6)


def test_the_difference_of_three_groups_by_hand():
    # Differences 0, 3, 6: mean 3, sd 3, se sqrt 3; t(.975, 2) = .95 sqrt(2 / (1 - .95^2)) =
    # 4.302653: 3 +- 7.452413
    interval = mean_of([0.0, 3.0, 6.0])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (3.0, -4.452413, 10.452413), abs=1e-6
    )
    assert interval.se == pytest.approx(math.sqrt(3.0), abs=1e-9)
    swapped = mean_of([0.0, -3.0, -6.0])
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx(
        (-3.0, -10.452413, 4.452413), abs=1e-6
    )


def test_two_groups_leave_nearly_everything_open():
    # 0 and 4: mean 2, se 2, t(.975, 1) = 12.7062 (their whole range, 0 to 4, would hold the truth
    # half of the time)
    interval = mean_of([0.0, 4.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 25.4124, 2 + 25.4124), abs=1e-4)


def test_the_interval_of_a_share_is_wilson_s_with_student_s_quantile():
    # 10 groups, 8 won and 2 lost: se^2 = .16 / 9, N = .16 / se^2 = 9, t(.975, 9)^2 = 5.117355, over
    # N: .568595 (.8 + .284298 +- sqrt(.568595 * .16 + .080825)) / 1.568595 = (1.084298 +- .414488)
    # / 1.568595
    interval = share_of([1.0] * 8 + [0.0] * 2)
    assert (interval.low, interval.high) == pytest.approx((0.427012, 0.955496), abs=1e-6)
    # the same of -1 and 1
    signs = np.array([1.0] * 8 + [-1.0] * 2)
    without = (10 * signs.mean() - signs) / 9
    low, high, _ = jackknife_interval(signs.mean(), without, bounds=(-1, 1))
    assert (low, high) == pytest.approx((2 * interval.low - 1, 2 * interval.high - 1), abs=1e-9)
    # with the normal's quantile and N = n it is Wilson's: p = 1, n = 10: low = 1 / (1 + 3.841459 /
    # 10) = .722467
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    # .25 = sqrt(.25 / 4)
    assert bounded_interval(0.5, 0.25, 1.959964, 99) == pytest.approx(wilson(2, 4), abs=1e-6)


def test_the_jackknife_of_a_ratio_is_that_of_its_residuals():
    # sums 3, 0 over counts 3, 1: 3/4; without each: 0 and 1, mean 1/2, se^2 = 1/2 (1/4 + 1/4) = 1/4
    assert jackknife_interval(0.75, np.array([0.0, 1.0]))[2] == pytest.approx(0.5, abs=1e-12)
    assert all(map(math.isnan, jackknife_interval(0.75, np.array([0.0, math.nan]))))
    assert all(map(math.isnan, jackknife_interval(0.75, np.array([0.75]))))


def test_the_interval_over_groups_is_wider_than_one_over_their_samples():
    groups = 50
    # a group's mean has the variance 1 + 2 * .25 / 8 = 1.0625; samples pretend (1 + .5) / 8 =
    # .1875: sqrt of it is 2.4
    rng = np.random.default_rng(0)
    gain = rng.normal(size=(groups, 1)) + (rng.normal(size=(2, groups, 8)) * 0.5).sum(0)
    by_group, by_sample = mean_of(gain.mean(axis=1)), mean_of(gain.ravel())
    assert by_group.estimate == pytest.approx(by_sample.estimate, abs=1e-9)
    assert 1.9 < (by_group.high - by_group.low) / (by_sample.high - by_sample.low) < 2.9


def test_95_percent_intervals_cover_95_percent_of_the_time():
    # 500 worlds of 25 groups with 4 samples each; the standard error of the coverage is sqrt(.95 *
    # .05 / 500) = .0097
    rng, truth = np.random.default_rng(7), 0.3
    hits = naive = 0
    for _ in range(500):
        gain = truth + rng.normal(size=(25, 1)) + (rng.normal(size=(2, 25, 4)) * 0.5).sum(0)
        by_group, by_sample = mean_of(gain.mean(axis=1)), mean_of(gain.ravel())
        hits += by_group.low <= truth <= by_group.high
        naive += by_sample.low <= truth <= by_sample.high
    assert abs(hits / 500 - 0.95) < 3 * 0.0097
    # samples as units are overconfident, so the test can fail
    assert naive / 500 < 0.85


@pytest.mark.parametrize("groups", [2, 3, 4, 5, 8, 20])
def test_a_few_groups_are_wrong_in_five_percent_too(groups):
    # 4000 worlds; standard error of the share sqrt(.05 * .95 / 4000) = .0034
    values = np.random.default_rng(groups).normal(size=(4000, groups))
    wrong = [not (i := mean_of(row)).low <= 0 <= i.high for row in values]
    assert abs(np.mean(wrong) - 0.05) < 4 * 0.0034


@pytest.mark.parametrize("truth", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("groups", [4, 6, 10, 18])
def test_a_share_is_held_by_its_interval_with_few_groups_of_few(groups, truth):
    # 4 answers a group, correlated 0.3 within it: the lowest of these cells was 94.6 % of 20,000
    rng, a = np.random.default_rng([groups, int(100 * truth)]), 1 / 0.3 - 1
    means = rng.binomial(4, rng.beta(a * truth, a * (1 - truth), (2000, groups))) / 4
    held = [(i := share_of(row)).low <= truth <= i.high for row in means]
    assert np.mean(held) > 0.93


def test_what_cannot_be_computed_says_so():
    one = mean_of([2.0])
    assert one.estimate == 2.0
    assert math.isnan(one.low) and math.isnan(one.se)
    assert one.to_dict()["low"] is None
    with pytest.raises(UserError, match=r"shape \(1, 0\)"):
        mean_of([])
    with pytest.raises(UserError, match="finite"):
        mean_of([1.0, math.nan])


def test_the_estimate_never_lies_outside_its_interval_by_rounding():
    for value in (0.1, 0.7, 1e-3 / 3):
        interval = mean_of(np.full(37, value))
        assert interval.low <= interval.estimate <= interval.high
        assert interval.high == interval.low
        share = share_of(np.full(37, round(value)))
        assert share.low <= share.estimate <= share.high
