import math

import numpy as np
import pytest
from scipy.stats import binom, chi2, nct
from scipy.stats import t as student

from rlhf.errors import UserError
from rlhf.stats.crossed import Estimate, Variances, crossed_mean
from rlhf.stats.power import components, detectable, needed_seeds, pairs_needed, power_of


def test_pairs_for_a_win_rate_of_55_percent():
    # (1.95996 / 2 + .84162 sqrt(.55 * .45))^2 / .05^2 = (.97998 + .41870)^2 / .0025 = 782.5
    assert pairs_needed(0.55) == pairs_needed(0.45) == 783
    # (.97998 + .84162 sqrt(.6 * .4))^2 / .01 = (.97998 + .41231)^2 / .01 = 193.8
    assert pairs_needed(0.6) == 194


def test_that_many_pairs_have_that_power():
    # Exact binomial power of the test |wins / n - 1/2| > 1.96 / (2 sqrt(n)); wins are whole
    # numbers, so roughly so
    for rate, power in [(0.55, 0.8), (0.6, 0.9), (0.7, 0.8)]:
        n = pairs_needed(rate, power)
        edge = n / 2 + 1.959964 * math.sqrt(n) / 2
        assert binom.sf(math.floor(edge), n, rate) == pytest.approx(power, abs=0.03)


@pytest.mark.parametrize(("seeds", "difference"), [(3, 3.0), (3, 6.0), (5, 2.0), (10, 3.0)])
def test_power_without_prompts_is_that_of_the_noncentral_t(seeds, difference):
    # seed means of variance S alone: T = mean / se with S - 1 degrees of freedom, noncentrality
    # `difference`
    expected = nct.sf(student.ppf(0.975, seeds - 1), seeds - 1, difference)
    assert power_of(difference, Variances(1.0, 0.0, 0.0), seeds, 100) == pytest.approx(
        expected, abs=2e-3
    )


def test_power_with_the_seeds_fixed_by_hand():
    # half 1.984217 (t of 99 degrees of freedom) of a standard error of 1: Phi(3 - 1.984217) =
    # .845134
    assert power_of(3.0, Variances(0.0, 1.0, 0.0), 2, 100) == pytest.approx(0.845134, abs=1e-5)
    assert power_of(3.0, Variances(9.0, 1.0, 0.0), 2, 100) == pytest.approx(0.845134, abs=1e-5)


def estimate(seeds, groups, of_seeds, of_groups=0.0, error=0.0):
    """An estimate of standard error 1 that has these roots of mean squares."""
    return Estimate(0.0, -1.0, 1.0, 1.0, 1.0, seeds, groups, of_seeds, of_groups, error)


def test_detectable_allows_for_a_standard_error_of_three_seeds():
    # Two experiments of 3 seeds that alone matter: the second finds what the first calls detectable
    # in 80 % of all. Standard errors sqrt(chi^2_2 / 2); 200,000 pairs: the share is known to .001
    stated, low, high = detectable(estimate(3, 100, 1.0))
    rng = np.random.default_rng(0)
    first, second = np.sqrt(rng.chisquare(2, (2, 200_000)) / 2)
    shown = np.mean(stated * first + rng.normal(size=200_000) > 4.302653 * second)
    assert shown == pytest.approx(0.8, abs=0.01)
    # taken for true, the standard error would promise that at 5.6 of it, and keep it in 7 of 10
    known = next(d for d in np.arange(4, 9, 0.01) if nct.sf(4.302653, 2, d) > 0.8)
    assert (
        known < 5.7 and np.mean(known * first + rng.normal(size=200_000) > 4.302653 * second) < 0.72
    )
    # chi^2_2 / 2 is below .105361 and above 2.302585 in a tenth each: the true one is within these
    # ends in 80 %
    assert (low / known, high / known) == pytest.approx(
        (1 / math.sqrt(2.302585), 1 / math.sqrt(0.105361)), rel=0.01
    )


def test_detectable_of_fixed_seeds_and_of_nothing():
    # 1.984217 + .841621, and 10 and 90 % of chi^2_99 / 99: .823 and 1.185
    stated, low, high = detectable(estimate(2, 100, 0.0, 1.0))
    assert stated == pytest.approx(1.984217 + 0.841621, abs=1e-4)
    quantiles = chi2.ppf([0.9, 0.1], 99) / 99
    assert (low, high) == pytest.approx(tuple(stated / np.sqrt(quantiles)), rel=1e-4)
    assert all(math.isnan(x) for x in detectable(crossed_mean(np.ones((1, 1)))))
    assert detectable(crossed_mean(np.ones((3, 4)))) == (0.0, 0.0, 0.0)


def test_components_by_hand():
    # From test_crossed: S = G = 3, MS_seeds = MS_groups = 12, MS_error = 1.5: (12 - 1.5) / 3 = 3.5
    # for both
    values = np.array([[1.0, 2.0, 6.0], [2.0, 6.0, 7.0], [6.0, 7.0, 8.0]])
    assert components(values) == pytest.approx((3.5, 3.5, 1.5), abs=1e-12)


def test_needed_seeds_by_hand():
    # Seed means 3, 5, 7 and nothing else: MS_seeds / (S G) = 4 / 3, a = 4 at its face value.  The median of chi^2_2 / 2
    # is .693147, so the median of a is 4 / .693147 = 5.770780; n seeds see 3 in 80 %, or not, by the noncentral t.
    values = np.array([[3.0] * 4, [5.0] * 4, [7.0] * 4])

    def power(n, variance):
        return nct.sf(student.ppf(0.975, n - 1), n - 1, 3.0 / math.sqrt(variance / n))

    expected = [
        next(n for n in range(3, 1000) if power(n, 4 / share) >= 0.8)
        for share in (0.693147, 2.302585, 0.105361)
    ]
    assert list(needed_seeds(values, 3.0)) == expected
    assert expected[1] < expected[0] < expected[2]


def test_needed_seeds_are_right_in_the_median():
    # Seeds .5, groups 1, error 1, 100 groups, a difference of .8: from 300 seeds the number is
    # known; 3 seeds say more in half of the experiments and less in the other (200 of them, the
    # share has a standard error of .035)
    rng = np.random.default_rng(0)

    def world(seeds, mean=0.0):
        return (
            mean
            + 0.5 * rng.normal(size=(seeds, 1))
            + rng.normal(size=(1, 100))
            + rng.normal(size=(seeds, 100))
        )

    (right, *_) = needed_seeds(world(300), 0.8)
    found = [needed_seeds(world(3), 0.8) for _ in range(200)]
    assert 0.38 < np.mean([n is None or n >= right for n, _, _ in found]) < 0.68
    assert (
        np.mean([low <= right and (high is None or high >= right) for _, low, high in found]) > 0.7
    )
    power = np.mean([crossed_mean(world(right, 0.8)).low > 0 for _ in range(400)])
    assert power == pytest.approx(0.8, abs=0.07)
    # prompts alone: 1 / sqrt(100) = .1, so .2 is out of reach with 100 groups and in reach with
    # 5000
    assert needed_seeds(world(300), 0.2)[0] is None
    assert needed_seeds(world(300), 0.2, groups=5000)[0] > 30


def test_what_cannot_be_planned_says_so():
    with pytest.raises(UserError, match="that is not"):
        pairs_needed(0.5)
    with pytest.raises(UserError, match="at least 3"):
        needed_seeds(np.zeros((2, 10)), 0.1)
