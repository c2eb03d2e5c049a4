"""The laws of over-optimisation, on numbers worked by hand."""

import math

import numpy as np
import pytest

from rlhf.best_of_n.curve import Fit, fit_law, fit_with_intervals


def test_the_law_of_best_of_n_by_hand():
    # alpha = 3, beta = 1: R(1) = 1 (3 - 1) = 2, R(2) = 2 (3 - 2) = 2, so it is highest at 1.5
    fit = fit_law("best_of_n", [1.0, 2.0], [2.0, 2.0])
    assert (fit.alpha, fit.beta) == pytest.approx((3, 1)) and fit.rmse == pytest.approx(
        0, abs=1e-12
    )
    assert fit.peak == pytest.approx(1.5)
    assert fit(0.0) == 0 and fit(3.0) == pytest.approx(0)


def test_the_law_of_rl_by_hand():
    # alpha = 2, beta = 2: R(1) = 2, R(e) = e (2 - 2) = 0, highest at exp(2 / 2 - 1) = 1
    fit = fit_law("rl", [1.0, math.e], [2.0, 0.0])
    assert (fit.alpha, fit.beta) == pytest.approx((2, 2))
    assert fit.peak == pytest.approx(1.0)
    assert fit(0.0) == 0
    # alpha = 4, beta = 2: exp(2 - 1) = e, and the slope alpha - beta log d - beta is 0 there
    steeper = Fit("rl", 4.0, 2.0, 0.0)
    assert steeper.peak == pytest.approx(math.e)
    assert steeper(math.e) > steeper(math.e - 0.01) and steeper(math.e) > steeper(math.e + 0.01)


def test_the_least_squares_by_hand():
    # R = (1, 2, 1) at d = (1, 2, 3), columns d = (1, 2, 3) and -d^2 = (-1, -4, -9):
    #   14 alpha - 36 beta = 8,   -36 alpha + 98 beta = -18
    # determinant 14 * 98 - 36^2 = 76; alpha = (8 * 98 - 36 * 18) / 76 = 136 / 76,
    # beta = (14 * -18 + 36 * 8) / 76 = 36 / 76
    fit = fit_law("best_of_n", [1.0, 2.0, 3.0], [1.0, 2.0, 1.0])
    assert (fit.alpha, fit.beta) == pytest.approx((136 / 76, 36 / 76))
    assert fit.peak == pytest.approx(136 / 72)
    # residuals (1, 2, 1) - (100, 128, 84) / 76 = (-24, 24, -8) / 76
    assert fit.rmse == pytest.approx(math.sqrt((24**2 + 24**2 + 8**2) / 3) / 76)


def test_a_law_that_never_falls_has_no_peak():
    assert Fit("best_of_n", 1.0, 0.0, 0.0).peak == math.inf
    assert Fit("rl", 1.0, -0.5, 0.0).peak == math.inf
    # and one that only falls is highest at the start
    assert Fit("best_of_n", -1.0, 0.5, 0.0).peak == 0


def test_one_point_does_not_determine_a_law():
    with pytest.raises(ValueError, match="two different KL"):
        fit_law("rl", [0.0, 1.0, 1.0], [0.0, 1.0, 2.0])


def test_intervals_are_students_over_the_clusters_own_parameters():
    # the fit is linear in the scores, so alpha of the mean is the mean of the clusters' alphas:
    # alpha = (3, 4, 5), beta = 1: 4 +- t(2) 1 / sqrt(3), t(2) = 4.302653
    d = np.array([0.5, 1.0, 2.0])
    scores = np.array([d * (alpha - d) for alpha in (3.0, 4.0, 5.0)])
    found = fit_with_intervals("best_of_n", d, scores)
    half = 4.302652729749464 / math.sqrt(3)
    assert found["alpha"]["estimate"] == pytest.approx(4)
    assert found["alpha"]["low"] == pytest.approx(4 - half)
    assert found["alpha"]["high"] == pytest.approx(4 + half)
    assert found["beta"] == pytest.approx({"estimate": 1, "low": 1, "high": 1})
    # the peaks without a cluster: alphas 4.5, 4, 3.5, halved
    logs = np.log([2.25, 2.0, 1.75])
    se = math.sqrt(2 / 3 * float(np.sum((logs - logs.mean()) ** 2)))
    assert found["peak"]["estimate"] == pytest.approx(2)
    assert found["peak"]["high"] == pytest.approx(2 * math.exp(4.302652729749464 * se))


def test_without_a_peak_there_is_no_interval_of_it():
    d = np.array([1.0, 2.0])
    rising = fit_with_intervals("best_of_n", d, np.array([[1.0, 2.5], [1.0, 2.6]]))
    assert rising["peak"] == {"estimate": None, "low": None, "high": None}
    # without the third of these both points lie on a law with a peak, without the first on none
    lost = fit_with_intervals("best_of_n", d, np.array([[1.0, 0.5], [1.0, 2.6], [1.0, 2.6]]))
    assert lost["peak"]["estimate"] == pytest.approx(10.5)
    assert lost["peak"]["low"] is None and lost["peak"]["high"] is None
