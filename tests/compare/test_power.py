import math

import numpy as np
import pytest
from scipy.stats import binom
from scipy.stats import t as student

from rlhf.compare.crossed import Estimate, crossed_mean
from rlhf.compare.power import components, detectable, needed_seeds, pairs_needed
from rlhf.config import UserError


def test_pairs_for_a_win_rate_of_55_percent():
    # (1.95996 / 2 + .84162 sqrt(.55 * .45))^2 / .05^2 = (.97998 + .41870)^2 / .0025 = 782.5
    assert pairs_needed(0.55) == pairs_needed(0.45) == 783
    # (.97998 + .84162 sqrt(.6 * .4))^2 / .01 = (.97998 + .41231)^2 / .01 = 193.8
    assert pairs_needed(0.6) == 194


def test_that_many_pairs_have_that_power():
    # Exact binomial power of the test |wins / n - 1/2| > 1.96 / (2 sqrt(n)); wins are whole numbers, so roughly so
    for rate, power in [(0.55, 0.8), (0.6, 0.9), (0.7, 0.8)]:
        n = pairs_needed(rate, power)
        edge = n / 2 + 1.959964 * math.sqrt(n) / 2
        assert binom.sf(math.floor(edge), n, rate) == pytest.approx(power, abs=0.03)


def test_detectable_by_hand():
    # Two degrees of freedom, closed form t(p) = (2p - 1) sqrt(2 / (4 p (1 - p))): t(.975) = 4.302653, t(.8) = 1.060660
    estimate = Estimate(0.0, -1.0, 1.0, 0.5, 2.0, 1.0, 3, 40)
    assert detectable(estimate) == pytest.approx(0.5 * (4.302653 + 1.060660), abs=1e-6)
    assert math.isnan(detectable(crossed_mean(np.ones((1, 1)))))


def test_components_by_hand():
    # From test_crossed: S = G = 3, MS_seeds = MS_groups = 12, MS_error = 1.5: (12 - 1.5) / 3 = 3.5 for both
    values = np.array([[1.0, 2.0, 6.0], [2.0, 6.0, 7.0], [6.0, 7.0, 8.0]])
    assert components(values) == pytest.approx((3.5, 3.5, 1.5), abs=1e-12)


def test_needed_seeds_by_hand():
    # Those parts with 4 seeds and 3 groups: error 1.5 / 12 = .125, seeds 3.5 / 4 + .125 = 1, groups 3.5 / 3 + .125 =
    # 1.291667, V = 2.166667; df = V^2 / (.95^2 / 2 + 1.291667^2 / 2) = 4.694444 / 1.285452 = 3.651978
    values = np.array([[1.0, 2.0, 6.0], [2.0, 6.0, 7.0], [6.0, 7.0, 8.0]])
    edge = (student.ppf(0.975, 3.651978) + student.ppf(0.8, 3.651978)) * math.sqrt(2.166667)
    assert needed_seeds(values, edge + 1e-4) == 4
    assert needed_seeds(values, edge - 1e-4) == 5


def test_needed_seeds_show_what_they_promise():
    # Seeds 0.3, groups 1, error 1, 200 groups.  A simulated experiment of the size that was asked for finds the
    # difference in about 80 % of its repeats (400 of them: standard error .02), one of half the size in much fewer.
    rng = np.random.default_rng(0)

    def world(seeds, mean=0.0):
        return mean + 0.3 * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 200)) + rng.normal(size=(seeds, 200))

    seeds = needed_seeds(world(300), 0.4)
    assert 7 <= seeds <= 12

    def power(count):
        return np.mean([crossed_mean(world(count, 0.4)).low > 0 for _ in range(400)])

    assert 0.72 < power(seeds) < 0.9
    assert power(seeds // 2) < 0.65
    # prompts alone: 1 / sqrt(200) = .07, so .1 is out of reach with 200 groups and in reach with 5000
    assert needed_seeds(world(300), 0.1) is None
    assert needed_seeds(world(300), 0.1, groups=5000) > 30


def test_what_cannot_be_planned_says_so():
    with pytest.raises(UserError, match="that is not"):
        pairs_needed(0.5)
    with pytest.raises(UserError, match="at least 3"):
        needed_seeds(np.zeros((2, 10)), 0.1)
