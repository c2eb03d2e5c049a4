import math
import random
from dataclasses import dataclass

import numpy as np
import pytest

from rlhf.compare.stats import (
    bootstrap,
    group_means,
    mean_interval,
    mean_se,
    paired_bootstrap,
    student_quantile,
    win_rate,
)


@dataclass
class Row:
    group: str
    prompt: str
    score: float


def rows_of(table):
    """{group: {prompt: [values]}} -> rows"""
    return [Row(g, p, v) for g, prompts in table.items() for p, values in prompts.items() for v in values]


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


def test_three_groups_are_enumerated_by_hand():
    # Differences 0, 3, 6: the mean of 3 draws is 0..6 with 1, 3, 6, 7, 6, 3, 1 of 27 resamples,
    # cumulated .037 .148 .370 .630 .852 .963 1.  Level 0.55: t(.775, 2) = .55 sqrt(2 / (1 - .55^2)) = .9313,
    # times sqrt(3/2) = 1.1407, Phi(-1.1407) = .127.  The quantiles at .127 and .873 are 1 and 5
    # (without the factor, at Phi(-.9313) = .176, or plain, at .225, they would be 2 and 4).
    a = rows_of({"x": {"p": [1.0]}, "y": {"q": [5.0]}, "z": {"r": [10.0]}})
    b = rows_of({"x": {"p": [1.0]}, "y": {"q": [2.0]}, "z": {"r": [4.0]}})
    interval = paired_bootstrap(a, b, score, level=0.55)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3.0, 1.0, 5.0), abs=1e-6)
    assert interval.se == pytest.approx(math.sqrt(3.0), abs=1e-6)  # sd 3, over sqrt(3)
    swapped = paired_bootstrap(b, a, score, level=0.55)
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx((-3.0, -5.0, -1.0), abs=1e-6)


def test_two_groups_give_their_whole_range_at_95_percent():
    # t(.975, 1) = 12.7: all four resamples (0, 2, 2, 4) lie inside
    interval = bootstrap(np.array([0.0, 4.0]))
    assert (interval.estimate, interval.low, interval.high) == (2.0, 0.0, 4.0)


def test_random_resamples_agree_with_the_binomial():
    # Six groups 0 and six groups 1: the resampled mean is Binomial(12, 1/2) / 12.  t(.75, 11) = .69745, times
    # sqrt(12/11) = .72847, Phi(-.72847) = .2332.  P(X <= 4) = 794/4096 = .194 < .2332 < P(X <= 5) = .387
    interval = bootstrap(np.array([0.0, 1.0] * 6), level=0.5)
    assert (interval.low, interval.high) == pytest.approx((5 / 12, 7 / 12), abs=1e-9)


def test_win_rate_by_hand():
    # x/p: A (1, 3) against B (2, 3): 1<2, 1<3, 3>2, 3=3 -> 1.5 of 4 = .375.   x/q: 5 > 4 -> 1.   x = .6875
    # y/r: tie -> .5.   Over groups: .59375.
    # tie_margin 1: p: tie, lost, tie, tie = 1.5 of 4; q and r: ties -> x = .4375, all = .46875
    a = rows_of({"x": {"p": [1, 3], "q": [5]}, "y": {"r": [7]}})
    b = rows_of({"x": {"p": [2, 3], "q": [4]}, "y": {"r": [7]}})
    assert win_rate(a, b, score).estimate == pytest.approx(0.59375, abs=1e-12)
    assert win_rate(b, a, score).estimate == pytest.approx(1 - 0.59375, abs=1e-12)
    assert win_rate(a, b, score, tie_margin=1).estimate == pytest.approx(0.46875, abs=1e-12)


def test_winning_everywhere_is_not_certainty():
    # 20 of 20 groups: exact binomial bound .025^(1/20) = .8316
    a = rows_of({str(i): {"p": [1.0]} for i in range(20)})
    b = rows_of({str(i): {"p": [0.0]} for i in range(20)})
    won, lost = win_rate(a, b, score), win_rate(b, a, score)
    assert (won.low, won.high) == pytest.approx((0.831566, 1.0), abs=1e-6)
    assert (lost.low, lost.high) == pytest.approx((0.0, 1 - 0.831566), abs=1e-6)


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(3)
    a, b = (rows_of({f"g{i}": {f"p{i}": list(rng.normal(size=3))} for i in range(40)}) for _ in range(2))
    shuffled_a, shuffled_b = random.Random(1).sample(a, len(a)), random.Random(2).sample(b, len(b))
    assert paired_bootstrap(a, b, score) == paired_bootstrap(shuffled_a, shuffled_b, score)
    assert win_rate(a, b, score) == win_rate(shuffled_a, shuffled_b, score)
    assert paired_bootstrap(a, b, score, seed=0) != paired_bootstrap(a, b, score, seed=1)


def clustered(rng, groups, samples, effect):
    """A and B on the same groups: their difficulty (sd 3), what A gains there (sd 1), noise of a sample (sd 0.5)."""
    difficulty, gain = rng.normal(size=groups) * 3, effect + rng.normal(size=groups)
    noise = rng.normal(size=(2, groups, samples)) * 0.5
    a = [Row(f"{i:03}", "p", difficulty[i] + gain[i] + noise[0, i, j]) for i in range(groups) for j in range(samples)]
    b = [Row(f"{i:03}", "p", difficulty[i] + noise[1, i, j]) for i in range(groups) for j in range(samples)]
    return a, b


def as_rows_of_their_own(rows):
    """What a row bootstrap would see: each row its own group."""
    return [Row(f"{row.group}-{j}", row.prompt, row.score) for j, row in enumerate(rows)]


def test_clustered_data_gets_wider_intervals_than_its_rows_would():
    a, b = clustered(np.random.default_rng(0), 50, 8, 0.0)
    by_group = paired_bootstrap(a, b, score)
    by_row = paired_bootstrap(as_rows_of_their_own(a), as_rows_of_their_own(b), score)
    assert by_group.estimate == pytest.approx(by_row.estimate, abs=1e-9)
    # variance of a group mean 1 + 2 * .25 / 8 = 1.0625; rows pretend (1 + .5) / 8 = .1875: sqrt of the ratio is 2.4
    assert 1.9 < (by_group.high - by_group.low) / (by_row.high - by_row.low) < 2.9
    # pairing: unpaired, the difficulty (variance 9 twice) would be in the interval
    assert by_group.se < 0.5 * math.hypot(mean_se(a, score)[1], mean_se(b, score)[1])


def test_95_percent_intervals_cover_95_percent_of_the_time():
    # 500 worlds of 25 groups with 4 samples each; the standard error of the coverage is sqrt(.95 * .05 / 500) = .0097
    rng, truth = np.random.default_rng(7), 0.3
    hits = naive = 0
    for seed in range(500):
        a, b = clustered(rng, 25, 4, truth)
        interval = paired_bootstrap(a, b, score, resamples=1000, seed=seed)
        hits += interval.low <= truth <= interval.high
        row = paired_bootstrap(as_rows_of_their_own(a), as_rows_of_their_own(b), score, resamples=300, seed=seed)
        naive += row.low <= truth <= row.high
    assert abs(hits / 500 - 0.95) < 3 * 0.0097
    assert naive / 500 < 0.85  # rows as units: overconfident, so the test can fail


def test_what_cannot_be_computed_says_so():
    one = bootstrap(np.array([2.0]))
    assert one.estimate == 2.0
    assert math.isnan(one.low) and math.isnan(one.se)
    assert one.to_dict()["low"] is None
    assert not one.above(0) and not one.below(0)
    with pytest.raises(ValueError, match="no groups"):
        bootstrap(np.array([]))
    with pytest.raises(ValueError, match="finite"):
        bootstrap(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="1 only in A, 0 only in B"):
        paired_bootstrap(rows_of({"x": {"p": [1], "q": [2]}}), rows_of({"x": {"p": [1]}}), score)


def test_the_estimate_never_lies_outside_its_interval_by_rounding():
    for value in (0.1, 0.7, 1e-3 / 3):
        interval = bootstrap(np.full(37, value), resamples=200)
        assert interval.low <= interval.estimate <= interval.high
        assert interval.high - interval.low < 1e-15
