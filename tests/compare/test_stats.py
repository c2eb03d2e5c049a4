import math
import random
from dataclasses import dataclass

import numpy as np
import pytest

from rlhf.compare.stats import group_means, interval_of_mean, mean_interval, mean_se, paired_difference, win_rate
from rlhf.stats import bounded_interval, jackknife_interval, student_quantile, wilson


@dataclass
class Row:
    group: str
    prompt: str
    score: float
    sample: int = 0


def rows_of(table):
    """{group: {prompt: [values]}} -> rows"""
    return [Row(g, p, v, k) for g, prompts in table.items() for p, vs in prompts.items() for k, v in enumerate(vs)]


def score(row):
    return row.score


def test_the_unit_is_the_group():
    # group x: prompt p (1, 3) -> 2, prompt q (5) -> 5, so x = 3.5; group y: 0.5.  Over rows the mean would be 2.375.
    rows = rows_of({"x": {"p": [1, 3], "q": [5]}, "y": {"r": [0.5]}})
    np.testing.assert_allclose(group_means(rows, score), [3.5, 0.5], atol=1e-12)
    assert mean_interval(rows, score).estimate == pytest.approx(2.0, abs=1e-12)


def test_standard_error_is_clustered_by_group():
    # group means 2, 4, 9: mean 5, variance (9 + 1 + 16) / 2 = 13, se = sqrt(13 / 3).  Repeated samples add nothing.
    rows = rows_of({"a": {"p": [2.0] * 4}, "b": {"q": [3.0, 5.0, 3.0, 5.0]}, "c": {"r": [9.0] * 4}})
    mean, se = mean_se(rows, score)
    assert mean == pytest.approx(5.0, abs=1e-12)
    assert se == pytest.approx(math.sqrt(13 / 3), abs=1e-12)


def test_student_quantiles_are_the_table_s():
    # Printed tables; for 2 degrees of freedom in closed form: t = (2p - 1) sqrt(2 / (4 p (1 - p)))
    for p, df, expected in [(0.975, 1, 12.7062), (0.975, 9, 2.26216), (0.95, 30, 1.69726), (0.975, 299, 1.96793)]:
        assert student_quantile(p, df) == pytest.approx(expected, abs=1e-4)
    assert student_quantile(0.75, 2) == pytest.approx(math.sqrt(2 / 3), abs=1e-6)


def test_the_difference_of_three_groups_by_hand():
    # Differences 0, 3, 6: mean 3, sd 3, se sqrt 3; t(.975, 2) = .95 sqrt(2 / (1 - .95^2)) = 4.302653: 3 +- 7.452413
    a = rows_of({"x": {"p": [1.0]}, "y": {"q": [5.0]}, "z": {"r": [10.0]}})
    b = rows_of({"x": {"p": [1.0]}, "y": {"q": [2.0]}, "z": {"r": [4.0]}})
    interval = paired_difference(a, b, score)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3.0, -4.452413, 10.452413), abs=1e-6)
    assert interval.se == pytest.approx(math.sqrt(3.0), abs=1e-9)
    swapped = paired_difference(b, a, score)
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx((-3.0, -10.452413, 4.452413), abs=1e-6)


def test_two_groups_leave_nearly_everything_open():
    # 0 and 4: mean 2, se 2, t(.975, 1) = 12.7062 (their whole range, 0 to 4, would hold the truth half of the time)
    interval = interval_of_mean(np.array([0.0, 4.0]))
    assert (interval.low, interval.high) == pytest.approx((2 - 25.4124, 2 + 25.4124), abs=1e-4)


def test_the_interval_of_a_share_is_wilson_s_with_student_s_quantile():
    # 10 groups, 8 won and 2 lost: se^2 = .16 / 9, N = .16 / se^2 = 9, t(.975, 9)^2 = 5.117355, over N: .568595
    # (.8 + .284298 +- sqrt(.568595 * .16 + .080825)) / 1.568595 = (1.084298 +- .414488) / 1.568595
    interval = interval_of_mean(np.array([1.0] * 8 + [0.0] * 2), bounds=(0, 1))
    assert (interval.low, interval.high) == pytest.approx((0.427012, 0.955496), abs=1e-6)
    # the same of -1 and 1
    of_signs = interval_of_mean(np.array([1.0] * 8 + [-1.0] * 2), bounds=(-1, 1))
    assert (of_signs.low, of_signs.high) == pytest.approx((2 * interval.low - 1, 2 * interval.high - 1), abs=1e-9)
    # with the normal's quantile and N = n it is Wilson's: p = 1, n = 10: low = 1 / (1 + 3.841459 / 10) = .722467
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert bounded_interval(0.5, 0.25, 1.959964, 99) == pytest.approx(wilson(2, 4), abs=1e-6)  # .25 = sqrt(.25 / 4)


def test_the_jackknife_of_a_ratio_is_that_of_its_residuals():
    # sums 3, 0 over counts 3, 1: 3/4; without each: 0 and 1, mean 1/2, se^2 = 1/2 (1/4 + 1/4) = 1/4
    assert jackknife_interval(0.75, np.array([0.0, 1.0]))[2] == pytest.approx(0.5, abs=1e-12)
    assert all(map(math.isnan, jackknife_interval(0.75, np.array([0.0, math.nan]))))
    assert all(map(math.isnan, jackknife_interval(0.75, np.array([0.75]))))


def test_win_rate_by_hand():
    # sample 0 of the one meets sample 1 of the other.  x/p: A (1, 3), B (0, 3): 1<3, 3>0 -> .5.  x/q: A (5, 4),
    # B (3, 3): both won -> 1.  x = .75.  y/r: A (7, 9), B (8, 7): 7=7, 9>8 -> .75.  Over groups: .75.
    # tie_margin 1: p: 1<3, 3>0 -> .5; q: won, tie -> .75; x = .625; r: two ties -> .5.  Over groups: .5625.
    a = rows_of({"x": {"p": [1, 3], "q": [5, 4]}, "y": {"r": [7, 9]}})
    b = rows_of({"x": {"p": [0, 3], "q": [3, 3]}, "y": {"r": [8, 7]}})
    assert win_rate(a, b, score).estimate == pytest.approx(0.75, abs=1e-12)
    assert win_rate(b, a, score).estimate == pytest.approx(0.25, abs=1e-12)
    assert win_rate(a, b, score, tie_margin=1).estimate == pytest.approx(0.5625, abs=1e-12)


def test_with_one_sample_there_is_no_pair_with_independent_noise():
    a, b = rows_of({"x": {"p": [1]}, "y": {"q": [2]}}), rows_of({"x": {"p": [0]}, "y": {"q": [3]}})
    assert win_rate(a, b, score) is None


@pytest.mark.parametrize("samples", [2, 3, 6])
def test_a_win_rate_does_not_depend_on_the_number_of_samples_nor_on_shared_noise(samples):
    # B's score is z_k, A's z_k + 0.1 from the same noise: sample k of A always beats sample k of B, by however little.
    # P(A beats B) = P(z - z' > -0.1) = Phi(0.1 / sqrt 2) = .52819.  4000 prompts: standard error below .008
    z = np.random.default_rng(samples).normal(size=(4000, samples))
    a, b = (rows_of({f"{i:04}": {"p": list(row + plus)} for i, row in enumerate(z)}) for plus in (0.1, 0.0))
    found = win_rate(a, b, score)
    assert found.estimate == pytest.approx(0.52819, abs=0.024)
    assert found.low < 0.52819 < found.high


def test_winning_everywhere_is_not_certainty():
    # 20 of 20 groups: 1 / (1 + t(.975, 19)^2 / 20) = 1 / (1 + 2.093024^2 / 20) = .820319
    a = rows_of({str(i): {"p": [1.0, 1.0]} for i in range(20)})
    b = rows_of({str(i): {"p": [0.0, 0.0]} for i in range(20)})
    won, lost = win_rate(a, b, score), win_rate(b, a, score)
    assert (won.low, won.high) == pytest.approx((0.820319, 1.0), abs=1e-6)
    assert (lost.low, lost.high) == pytest.approx((0.0, 1 - 0.820319), abs=1e-6)


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(3)
    a, b = (rows_of({f"g{i}": {f"p{i}": list(rng.normal(size=3))} for i in range(40)}) for _ in range(2))
    shuffled_a, shuffled_b = random.Random(1).sample(a, len(a)), random.Random(2).sample(b, len(b))
    assert paired_difference(a, b, score) == paired_difference(shuffled_a, shuffled_b, score)
    assert win_rate(a, b, score) == win_rate(shuffled_a, shuffled_b, score)


def clustered(rng, groups, samples, effect):
    """A and B on the same groups: their difficulty (sd 3), what A gains there (sd 1), noise of a sample (sd 0.5)."""
    difficulty, gain = rng.normal(size=groups) * 3, effect + rng.normal(size=groups)
    noise = rng.normal(size=(2, groups, samples)) * 0.5
    places = [(i, j) for i in range(groups) for j in range(samples)]
    a = [Row(f"{i:03}", "p", difficulty[i] + gain[i] + noise[0, i, j], j) for i, j in places]
    b = [Row(f"{i:03}", "p", difficulty[i] + noise[1, i, j], j) for i, j in places]
    return a, b


def as_rows_of_their_own(rows):
    """What one would see who takes rows as units: each row its own group."""
    return [Row(f"{row.group}-{j}", row.prompt, row.score) for j, row in enumerate(rows)]


def test_clustered_data_gets_wider_intervals_than_its_rows_would():
    a, b = clustered(np.random.default_rng(0), 50, 8, 0.0)
    by_group = paired_difference(a, b, score)
    by_row = paired_difference(as_rows_of_their_own(a), as_rows_of_their_own(b), score)
    assert by_group.estimate == pytest.approx(by_row.estimate, abs=1e-9)
    # variance of a group mean 1 + 2 * .25 / 8 = 1.0625; rows pretend (1 + .5) / 8 = .1875: sqrt of the ratio is 2.4
    assert 1.9 < (by_group.high - by_group.low) / (by_row.high - by_row.low) < 2.9
    # pairing: unpaired, the difficulty (variance 9 twice) would be in the interval
    assert by_group.se < 0.5 * math.hypot(mean_se(a, score)[1], mean_se(b, score)[1])


def test_95_percent_intervals_cover_95_percent_of_the_time():
    # 500 worlds of 25 groups with 4 samples each; the standard error of the coverage is sqrt(.95 * .05 / 500) = .0097
    rng, truth = np.random.default_rng(7), 0.3
    hits = naive = 0
    for _ in range(500):
        a, b = clustered(rng, 25, 4, truth)
        interval = paired_difference(a, b, score)
        hits += interval.low <= truth <= interval.high
        row = paired_difference(as_rows_of_their_own(a), as_rows_of_their_own(b), score)
        naive += row.low <= truth <= row.high
    assert abs(hits / 500 - 0.95) < 3 * 0.0097
    assert naive / 500 < 0.85  # rows as units: overconfident, so the test can fail


@pytest.mark.parametrize("groups", [2, 3, 4, 5, 8, 20])
def test_a_few_groups_are_wrong_in_five_percent_too(groups):
    # 4000 worlds; standard error of the share sqrt(.05 * .95 / 4000) = .0034
    values = np.random.default_rng(groups).normal(size=(4000, groups))
    wrong = [not (i := interval_of_mean(row)).low <= 0 <= i.high for row in values]
    assert abs(np.mean(wrong) - 0.05) < 4 * 0.0034


@pytest.mark.parametrize("truth", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("groups", [4, 6, 10, 18])
def test_a_share_is_held_by_its_interval_with_few_groups_of_few(groups, truth):
    # 4 answers a group, correlated 0.3 within it: the lowest of these cells was 94.6 % of 20,000
    rng, a = np.random.default_rng([groups, int(100 * truth)]), 1 / 0.3 - 1
    means = rng.binomial(4, rng.beta(a * truth, a * (1 - truth), (2000, groups))) / 4
    held = [(i := interval_of_mean(row, bounds=(0, 1))).low <= truth <= i.high for row in means]
    assert np.mean(held) > 0.93


def test_what_cannot_be_computed_says_so():
    one = interval_of_mean(np.array([2.0]))
    assert one.estimate == 2.0
    assert math.isnan(one.low) and math.isnan(one.se)
    assert one.to_dict()["low"] is None
    with pytest.raises(ValueError, match="no groups"):
        interval_of_mean(np.array([]))
    with pytest.raises(ValueError, match="finite"):
        interval_of_mean(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="1 only in A, 0 only in B"):
        paired_difference(rows_of({"x": {"p": [1], "q": [2]}}), rows_of({"x": {"p": [1]}}), score)


def test_the_estimate_never_lies_outside_its_interval_by_rounding():
    for value in (0.1, 0.7, 1e-3 / 3):
        interval = interval_of_mean(np.full(37, value))
        assert interval.low <= interval.estimate <= interval.high
        assert interval.high == interval.low
        share = interval_of_mean(np.full(37, round(value)), bounds=(0, 1))
        assert share.low <= share.estimate <= share.high
