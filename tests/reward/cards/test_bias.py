"""Planted biases are found, and clean cards say nothing: simulated where the truth is known."""

import math

import numpy as np
import pytest

from reward.cards.bias import (
    bias_tests,
    chosen_first,
    linear_coefficients,
    logistic_coefficients,
    two_sided_p,
)
from rlhf.data.records import Preference
from rlhf.data.store import Store


def world(rng, groups=150, *, length=0.0, first=0.0, score_length=0.0):
    """Return gaps, length gaps, sides, groups and gold gaps of 1 to 3 pairs a group.

    Longer answers are truly better (correlation 0.5), and groups share a part of their gold gap.
    length, first: log-odds that people add for ten tokens and for the first side; score_length:
    raw score that the model adds for ten tokens.
    """
    sizes = rng.integers(1, 4, groups)
    names = np.repeat(np.arange(groups), sizes).astype(str)
    n = len(names)
    gold = np.repeat(rng.normal(size=groups), sizes) + rng.normal(size=n)
    tokens = 10 * (0.5 * gold + rng.normal(size=n))
    side = rng.choice([-1.0, 1.0], n)
    logit = gold + length * tokens / 10 + first * side
    chosen = np.where(rng.random(n) < 1 / (1 + np.exp(-logit)), 1.0, -1.0)
    score = 1.5 * gold + score_length * tokens / 10 + rng.normal(size=n)
    return chosen * score, chosen * tokens, chosen * side, names, chosen * gold


def test_clean_cards_show_no_bias_more_often_than_they_may():
    rng = np.random.default_rng(0)
    flagged, below = 0, {"labels_length": 0, "score_length": 0, "labels_position": 0}
    for _ in range(400):
        gaps, tokens, side, groups, gold = world(rng, 60)
        tests = bias_tests(gaps, tokens, side, groups, gold)
        flagged += any(test["found"] for test in tests)
        for test in tests:
            below[test["kind"]] += test["p"] < 0.05
    # three tests at 0.01, standard error 0.9 %
    assert flagged / 400 < 0.03 + 2 * 0.009
    for kind, count in below.items():
        # standard error 1.1 %
        assert 0.02 < count / 400 < 0.08, kind


def test_a_gold_that_tells_nothing_apart_is_as_none():
    gaps, tokens, side, groups, gold = world(np.random.default_rng(0), 60)
    assert bias_tests(gaps, tokens, side, groups, 0 * gold) == bias_tests(
        gaps, tokens, side, groups
    )


def test_planted_biases_are_found():
    rng = np.random.default_rng(1)
    counts = {"labels_length": 0, "labels_position": 0, "score_length": 0}
    for _ in range(50):
        found = bias_tests(*world(rng, 300, length=0.8, first=0.6, score_length=0.8))
        for test in found:
            counts[test["kind"]] += test["found"]
    assert min(counts.values()) >= 48, counts


def test_without_gold_a_score_that_overuses_length_is_found():
    rng = np.random.default_rng(2)
    found = clean = 0
    for _ in range(50):
        gaps, tokens, side, groups, _ = world(rng, 300, score_length=1.5)
        (overuse, _) = bias_tests(gaps, tokens, side, groups)
        # at p < 0.01 the interval at 95 % lies above 0
        found += overuse["found"] and 0 < overuse["low"] < overuse["effect"] < overuse["high"]
        gaps, tokens, side, groups, _ = world(rng, 300)
        clean += bias_tests(gaps, tokens, side, groups)[0]["found"]
    assert found >= 48 and clean <= 2


def test_a_score_that_is_no_line_of_gold_has_no_bias_for_that():
    # the score grows with the cube of gold, and so does length
    rng = np.random.default_rng(6)
    gold = rng.normal(size=400)
    score, tokens = gold**3 + 0.3 * rng.normal(size=400), gold**3 + rng.normal(size=400)
    tests = bias_tests(score, tokens, np.zeros(400), np.arange(400).astype(str), gold)
    (test,) = [test for test in tests if test["kind"] == "score_length"]
    assert test["share"] < 0.02 and not test["found"]


def test_a_sure_bias_of_the_score_must_be_large_enough_to_matter():
    rng = np.random.default_rng(3)
    gaps, tokens, side, groups, gold = world(rng, 20_000, score_length=0.1)
    by_kind = {t["kind"]: t for t in bias_tests(gaps, tokens, side, groups, gold)}
    test = by_kind["score_length"]
    # 0.1 of a score with noise of 1: 1 % of what gold leaves open
    assert test["p"] < 1e-6 and test["share"] == pytest.approx(0.01, abs=0.003)
    assert not test["found"]
    assert test["effect"] == pytest.approx(0.1, abs=0.02)


def test_the_logistic_coefficient_of_one_column_by_hand():
    # x = 1 where chosen was first (3 of 4 times): log odds ln 3, up to the ridge
    side = np.array([1.0, 1.0, 1.0, -1.0] * 25)
    found = logistic_coefficients({"first": side}, np.arange(100).astype(str))["first"]
    assert found["effect"] == pytest.approx(math.log(3), abs=2e-3)
    # delta method: se = 1 / sqrt(n p q) = 1 / sqrt(100 * 3/16) = 0.231
    half = (found["high"] - found["low"]) / 2
    assert half / 1.984 == pytest.approx(0.231, abs=0.005)


def test_leaving_out_a_group_is_what_a_new_fit_says():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=30), rng.normal(size=30)
    groups = np.repeat(np.arange(10), 3).astype(str)
    found = linear_coefficients(y, {"x": x}, groups)["x"]
    assert found["effect"] == pytest.approx(x @ y / (x @ x), rel=1e-3)
    without = []
    for group in np.unique(groups):
        rest = groups != group
        without.append(x[rest] @ y[rest] / (x[rest] @ x[rest]))
    se = math.sqrt(0.9 * np.sum((np.array(without) - np.mean(without)) ** 2))
    # t(.975, 9) = 2.2622
    assert (found["high"] - found["low"]) / 2 == pytest.approx(2.2622 * se, rel=2e-3)
    assert found["p"] == pytest.approx(two_sided_p(found["effect"], se, 9), abs=2e-3)


def test_p_of_students_t():
    # t = 2.2622 is the 97.5 % quantile at 9 degrees of freedom
    assert two_sided_p(2.2622, 1.0, 9) == pytest.approx(0.05, abs=1e-4)
    assert two_sided_p(1.0, 0.0, 9) is None


def test_too_few_groups_have_no_test():
    rng = np.random.default_rng(5)
    assert bias_tests(*world(rng, 9)) == []


@pytest.mark.parametrize(
    ("metadata", "side"),
    [
        ({"vote": {"shown": "left"}}, 1),
        ({"vote": {"shown": "right"}}, -1),
        ({"chosen_first": True}, 1),
        ({"chosen_first": False}, -1),
        ({"chosen_first": "perhaps"}, 0),
        ({"vote": "yes"}, 0),
        ({}, 0),
    ],
)
def test_where_the_chosen_answer_was_shown(metadata, side):
    prompt = [{"role": "user", "content": "hi"}]
    pair = Preference(prompt=prompt, chosen="a", rejected="b", metadata=metadata)
    assert chosen_first(pair) == side


def test_a_store_tells_on_which_side_the_chosen_answer_was_shown(tmp_path):
    with Store.open(tmp_path / "votes.db", create=True) as store:
        ann = store.add_annotator("ann")
        for i, (choice, left) in enumerate([("a", "a"), ("a", "b"), ("b", "b"), ("b", None)]):
            prompt = store.add_prompt([{"role": "user", "content": f"question {i}"}])
            answers = [store.add_response(prompt, text) for text in ("one", "two")]
            store.vote(store.add_comparison(*answers), ann, choice, left=left)
        sides = [chosen_first(pair) for pair in store.at().preferences()]
    assert sides == [1, -1, 1, 0]
