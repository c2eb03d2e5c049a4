"""Where a score turns down, on curves whose answer is known."""

import numpy as np
import pytest

from rlhf.best_of_n.curve import (
    fine_sizes,
    group_curves,
    repeated_share,
    summarise,
    table_sizes,
    turning_point,
)

SIZES = [1, 2, 4, 8]
KL = np.array([0.0, 0.2, 0.6, 1.2])


def halves_of(count):
    return np.arange(count) % 2


def test_sizes():
    assert table_sizes(8) == [1, 2, 4, 8] and table_sizes(12) == [1, 2, 4, 8, 12]
    assert table_sizes(2) == [1, 2]
    assert fine_sizes(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {1, 2, 64, 100} < set(fine_sizes(100)) and len(fine_sizes(100)) < 50


def test_a_curve_that_every_group_shares_turns_where_it_is_highest():
    curve = np.tile([0.0, 0.3, 0.5, 0.1], (10, 1))
    found = turning_point(SIZES, KL, curve, halves_of(10))
    assert found["outcome"] == "turns down"
    assert found["n"] == {"estimate": 4, "low": 4, "high": 4} and found["kl"]["estimate"] == 0.6
    assert found["gain"] == pytest.approx(0.5) and found["highest_at_last"] == 0
    assert found["fall"]["estimate"] == pytest.approx(-0.4)


def test_a_curve_that_rises_has_no_turn_within_n():
    curve = np.tile([0.0, 0.3, 0.5, 0.6], (10, 1))
    found = turning_point(SIZES, KL, curve, halves_of(10))
    assert found["outcome"] == "not within n" and found["n"]["estimate"] == 8
    assert found["highest_at_last"] == 1 and found["fall"]["estimate"] == 0


def test_groups_that_disagree_widen_the_interval():
    # six groups are highest at 2 and five at 8
    curve = np.array([[0.0, 1.0, 0.5, 0.0]] * 6 + [[0.0, 0.0, 0.5, 1.0]] * 5)
    found = turning_point(SIZES, KL, curve, halves_of(11))
    assert found["n"] == {"estimate": 2, "low": 2, "high": 8}
    # each peak is as often drawn as it wins among 11 groups with 6 : 5: 8 wins in 38 % of the draws
    assert found["highest_at_last"] == pytest.approx(0.38, abs=0.05)
    assert found["outcome"] == "not within n"


def test_a_flat_curve_does_not_fall_because_its_peak_was_chosen():
    """The same noise chooses and measures nothing: over many draws about 1 in 40 seems to fall."""
    rng = np.random.default_rng(0)
    falls = 0
    for _ in range(200):
        curve = np.concatenate([np.zeros((20, 1)), rng.normal(size=(20, 3))], axis=1)
        found = turning_point(SIZES, KL, curve, halves_of(20))
        falls += found["outcome"] == "turns down"
    assert falls <= 12


def test_few_groups_decide_nothing():
    curve = np.tile([0.0, 0.3, 0.5, 0.1], (4, 1))
    assert turning_point(SIZES, KL, curve, halves_of(4))["outcome"] == "undecided"


def test_each_group_counts_once():
    # two prompts of a make one mean: at n = 1 of 1 and 3, at n = 2 of 2 and 4
    proxy = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    values = np.array([[0.0, 2.0], [2.0, 4.0], [10.0, 20.0]])
    found = group_curves(proxy, {"gold": values}, ["a", "a", "b"], [1, 2])["gold"]
    assert found.tolist() == [[2.0, 3.0], [15.0, 20.0]]


def test_the_summary_of_gold_that_the_proxy_overshoots():
    """Gold is -(proxy - 1)^2: it is highest where the best of n has a proxy near 1."""
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(40, 64))
    found = summarise(proxy, {"gold": -((proxy - 1) ** 2)}, [str(i) for i in range(40)])
    assert [row["n"] for row in found["curve"]] == [1, 2, 4, 8, 16, 32, 64]
    # the expected largest of 4 standard normals is 1.03, that of 64 is 2.34
    assert found["curve"][2]["scores"]["proxy"]["mean"]["estimate"] == pytest.approx(1.03, abs=0.05)
    turning = found["turning"]["gold"]
    assert turning["outcome"] == "turns down" and turning["n"]["low"] >= 3
    assert turning["n"]["high"] <= 7
    assert found["laws"]["gold"]["beta"]["low"] > 0


def test_the_share_of_repeated_answers():
    # a and a repeat each other, b, c, c: of six answers four
    assert repeated_share([["a", "a", "b"], ["c", "c", "d"]]) == pytest.approx(4 / 6)
    assert repeated_share([["a", "b"], ["a", "b"]]) == 0
