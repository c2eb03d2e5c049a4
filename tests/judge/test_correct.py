import itertools

import numpy as np
import pytest

from benchmarks.judge.coverage import JUDGES, intervals, simulate, truth
from rlhf.judge.correct import MIN_LABELLED, corrected_win_rate, prediction_powered
from rlhf.judge.pairs import JudgedPair
from rlhf.judge.report import win_rates
from rlhf.stats import bounded_interval, student_quantile


def slow_estimate(y, x, f, rest):
    """The docstring's formulas by numpy's own variances."""
    n, m = len(y), len(rest)
    w = n / (n + m)
    h = x - w * f
    spread = np.var(h, ddof=1) + n * (1 - w) ** 2 * np.var(rest, ddof=1) / m
    weight = np.cov(y, h)[0, 1] / spread
    return np.mean(y - weight * h) + weight * (1 - w) * np.mean(rest), weight, h, w


def test_the_estimate_is_that_of_the_formula_and_its_error_the_jackknifes():
    rng = np.random.default_rng(0)
    y, f, rest = rng.random(12), rng.random(12), rng.random(20)
    x = np.clip(f + 0.1 * rng.normal(size=12), 0, 1)
    estimate, se, weight = prediction_powered(y, x, f, rest)
    theta, lam, h, w = slow_estimate(y, x, f, rest)
    assert (estimate, weight) == (pytest.approx(theta, abs=1e-12), pytest.approx(lam, abs=1e-12))

    # w is a matter of design: it stays when a group is left out
    def with_fixed_w(y, h, rest):
        n, m = len(y), len(rest)
        spread = np.var(h, ddof=1) + n * (1 - w) ** 2 * np.var(rest, ddof=1) / m
        lam = np.cov(y, h)[0, 1] / spread
        return np.mean(y) - lam * np.mean(h) + lam * (1 - w) * np.mean(rest)

    first = [with_fixed_w(np.delete(y, i), np.delete(h, i), rest) for i in range(12)]
    second = [with_fixed_w(y, h, np.delete(rest, i)) for i in range(20)]
    variance = sum(
        (len(v) - 1) / len(v) * np.sum((v - np.mean(v)) ** 2)
        for v in map(np.array, (first, second))
    )
    assert se == pytest.approx(np.sqrt(variance), abs=1e-12)


def test_by_hand():
    # y = f = 0, 0, 1, 1 and the rest says 1 throughout.  w = 1/2, h = f/2: cov(y, h) = 1/6, var(h) = 1/12,
    # lambda = 2: mean(y - f) + 2 * 1/2 * 1 = 1
    y = np.array([0.0, 0.0, 1.0, 1.0])
    estimate, _, weight = prediction_powered(y, y, y, np.ones(4))
    assert (estimate, weight) == (pytest.approx(1.0), pytest.approx(2.0))
    # a judge that says one thing has the weight 0: the votes alone, se = sqrt(1/3 / 4)
    estimate, se, weight = prediction_powered(y, np.ones(4), np.ones(4), np.ones(5))
    assert (estimate, weight, se) == (0.5, 0.0, pytest.approx(np.sqrt(1 / 12)))


def test_with_whole_groups_it_is_the_estimate_of_the_paper():
    # 2311.01453, example 6.1: mean(y) + l (mean(rest) - mean(f)), l = cov(y, f) / ((1 + n / m) var(f)), with
    # the variance of f measured in each of the two parts
    rng = np.random.default_rng(3)
    y, f, rest = rng.random(15), rng.random(15), rng.random(40)
    y = (y + f) / 2
    lam = np.cov(y, f)[0, 1] / (np.var(f, ddof=1) + 15 / 40 * np.var(rest, ddof=1))
    expected = y.mean() + lam * (rest.mean() - f.mean())
    assert prediction_powered(y, f, f, rest)[0] == pytest.approx(expected, abs=1e-12)


def test_all_labelled_is_the_mean_of_the_votes_with_students_interval():
    rng = np.random.default_rng(1)
    y, f = rng.random(30), rng.random(30)
    found = corrected_win_rate(y, f, [str(i) for i in range(30)])
    se = y.std(ddof=1) / np.sqrt(30)
    expected = bounded_interval(y.mean(), se, student_quantile(0.975, 29), 30)
    assert (found.estimate, found.low, found.high) == pytest.approx((y.mean(), *expected))
    assert found.worth == pytest.approx(1.0)


def test_equal_answers_are_ties_that_nobody_is_asked_about():
    # 20 groups, all voted on, A wins 8 of 10; a pair of equal answers in ten more groups, and beside
    # the first ten: (3/4, ..., 1/4) in these, so that it is 1/3 0.5 + 1/3 (0.5 + 0.3/2) + 1/3 0.8
    wins = np.array([1.0] * 8 + [0.0] * 2)
    people = np.concatenate([wins, wins, np.full(20, np.nan)])
    groups = [*map(str, range(20)), *map(str, range(20, 30)), *map(str, range(10))]
    equal = np.arange(40) >= 20
    found = corrected_win_rate(people, np.full(40, np.nan), groups, equal=equal)
    assert found.estimate == pytest.approx((0.5 + 0.65 + 0.8) / 3)
    assert found.people == pytest.approx(found.estimate) and found.weight == 0
    # with the share of groups that have a pair to ask about p = 2/3:
    # p^2 var(y) / 20 + (mean(y) - 1/2)^2 p (1 - p) / 30
    y = np.concatenate([0.25 + wins / 2, wins])
    variance = 4 / 9 * y.var(ddof=1) / 20 + (y.mean() - 0.5) ** 2 * 2 / 9 / 30
    assert found.se == pytest.approx(np.sqrt(variance))

    # in the report, a judge that is right on what it is asked, with votes on half of that: everybody
    # would say 3/4 of 1/2 and 1/4 of 3/4
    rows = []
    for i in range(80):
        a = "same" if i % 4 else f"a {i}"
        one = JudgedPair("q", str(i), "x", "y", a, "same", p_ab=0.5, p_ba=0.5)
        if not i % 4:
            one.p_ab, one.p_ba = (1.0, 0.0) if i % 16 else (0.0, 1.0)
            one.people = {"ann": "a" if i % 16 else "b"} if i < 56 else {}
        rows.append(one)
    (rate,) = win_rates(rows)
    expected = 0.75 * 0.5 + 0.25 * 0.75
    assert rate["judge"]["estimate"] == pytest.approx(expected)
    assert rate["corrected"]["estimate"] == pytest.approx(expected, abs=0.01)
    # of the 14 votes 10 are for A
    assert rate["people"]["estimate"] == pytest.approx(0.75 * 0.5 + 0.25 * 10 / 14)


def test_groups_count_once_and_few_labelled_ones_give_nothing():
    n = 2 * MIN_LABELLED
    people = np.full(n, np.nan)
    people[: MIN_LABELLED - 1] = 1.0
    groups = [str(i) for i in range(n)]
    assert corrected_win_rate(people, np.ones(n), groups) is None
    people[MIN_LABELLED - 1] = 1.0
    people[0] = 0.0
    once = corrected_win_rate(people, np.full(n, np.nan), groups)
    # three more pairs in group 0 change nothing: a judge without a verdict is a judge all the same
    more = corrected_win_rate(
        np.append(people, [0.0] * 3), np.full(n + 3, np.nan), [*groups, "0", "0", "0"]
    )
    assert once == more and once.estimate == pytest.approx(1 - 1 / MIN_LABELLED)


def test_the_interval_of_the_benchmark_is_the_one_in_use():
    for p, se, n in ((0.3, 0.05, 20), (0.0, 0.1, 20), (0.7, 0.0, 20)):
        low, high = intervals(np.array([p]), np.array([se]), n)
        expected = bounded_interval(p, se, student_quantile(0.975, n - 1), n)
        assert (low[0], high[0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("judge", "win_rate"), itertools.product(("likes A", "right in 85 %"), (0.5, 0.75))
)
def test_corrected_intervals_hold_the_truth_with_half_the_votes(judge, win_rate):
    rng = np.random.default_rng(2)
    corrected, alone, judged = simulate(rng, win_rate, JUDGES[judge], 150, 0.5, 2000)

    def coverage(found):
        low, high = intervals(*found)
        return np.mean((low <= truth(win_rate)) & (truth(win_rate) <= high))

    # three standard errors of 2000 repeats are 1.5 %
    assert 0.93 <= coverage(corrected) <= 0.97
    assert coverage(judged) < 0.9 or win_rate == 0.5
    # and they are narrower than those of the votes alone
    assert np.mean(corrected[1]) < 0.95 * np.mean(alone[1])
