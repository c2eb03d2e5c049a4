"""The length-only model against numbers worked by hand and a logistic regression."""

import math

import numpy as np
import pytest

from reward.length import add_offsets, fit_length


def row(chosen, rejected, **more):
    return {"chosen_ids": [5] * chosen, "rejected_ids": [5] * rejected, **more}


def test_one_length_difference_by_hand():
    # x = 1 for each of n pairs of +10 tokens, s of them right: n (s/n - sigmoid(b)) = b; at b = ln 3
    # sigmoid is 3/4, so that 400 p - 300 = ln 3 at p = (300 + ln 3) / 400
    p = (300 + math.log(3)) / 400
    rows = [row(20, 10, label_prob=p) for _ in range(400)]
    assert 10 * fit_length(rows) == pytest.approx(math.log(3), abs=1e-9)
    # and the same from the other side
    rows = [row(10, 20, label_prob=1 - p) for _ in range(400)]
    assert 10 * fit_length(rows) == pytest.approx(math.log(3), abs=1e-9)


def test_it_is_the_logistic_regression_through_the_origin():
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(0)
    gaps = rng.integers(-30, 31, 2000)
    longer_wins = rng.random(2000) < 1 / (1 + np.exp(-0.08 * np.abs(gaps)))
    chosen_gap = np.where(longer_wins, np.abs(gaps), -np.abs(gaps))
    rows = [row(40 + max(g, 0), 40 + max(-g, 0)) for g in chosen_gap]

    def loss(b):
        return np.log1p(np.exp(-b * chosen_gap)).sum()

    found = fit_length(rows)
    assert found == pytest.approx(minimize_scalar(loss, bounds=(0, 1)).x, rel=1e-2)
    assert found == pytest.approx(0.08, abs=0.01)


def test_without_a_difference_there_is_nothing_to_take_out():
    rows = [row(7, 7), row(3, 3)]
    assert fit_length(rows) == 0.0
    # as often the longer as the shorter
    assert fit_length([row(9, 7), row(7, 9)]) == pytest.approx(0.0, abs=1e-12)


def test_lengths_that_tell_all_pairs_apart_have_a_finite_slope():
    slope = fit_length([row(20, 10) for _ in range(100)])
    assert 0 < 10 * slope < 10


def test_the_offset_is_slope_times_difference_in_tokens():
    rows = [row(12, 10), row(10, 15)]
    add_offsets(rows, 0.5)
    assert [r["offset"] for r in rows] == [1.0, -2.5]
