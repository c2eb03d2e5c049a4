"""The heads and ratios of benchmarks/votes/curves.py on numbers worked by hand."""

import math

import numpy as np
import pytest

from benchmarks.votes import curves, curves_page

VOTES = np.array([50.0, 100.0, 200.0, 400.0])


def test_a_head_of_one_vote_balances_likelihood_and_ridge():
    # log(1 + exp(-w)) + w^2 / 2 is least where w = 1 / (1 + exp(w)): w = 0.401058
    assert curves.fit_head(np.array([[1.0]]), 1.0) == pytest.approx([0.401058], abs=1e-6)
    # three votes of four for the feature, no ridge to speak of: sigmoid(w) = 3/4, w = log 3
    three = np.array([[1.0], [1.0], [1.0], [-1.0]])
    assert curves.fit_head(three, 1e-9) == pytest.approx([math.log(3)], abs=1e-6)


def test_the_policy_is_the_answer_of_the_highest_score():
    gold = np.array([[0.1, 0.5], [0.9, 0.3]])
    # prompt 0 takes its second answer, prompt 1 its second too: (0.5 + 0.3) / 2
    assert curves.best_gold(np.array([1.0, 2.0, -3.0, -1.0]), gold) == pytest.approx(0.4)


def test_votes_between_points_are_read_in_their_logarithm():
    gold = np.array([0.5, 0.6, 0.6, 0.8])
    # half of the way from 50 to 100 is 50 sqrt 2; a plateau is reached at its beginning
    assert curves_page.votes_for(0.55, VOTES, gold) == pytest.approx(50 * math.sqrt(2))
    assert curves_page.votes_for(0.6, VOTES, gold) == pytest.approx(100)
    assert curves_page.votes_for(0.4, VOTES, gold) == 50
    assert curves_page.votes_for(0.81, VOTES, gold) == math.inf


def test_the_ratio_is_at_the_highest_gold_that_both_reach():
    slow, fast = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.5, 0.7, 0.8, 0.9])
    # slow ends at 0.8 with 400 votes, which fast has with 200
    assert curves_page.votes_ratio(VOTES, fast, slow) == pytest.approx(0.5)
    assert curves_page.votes_ratio(VOTES, slow, fast) == pytest.approx(2.0)
    # a fall is levelled: 0.7, 0.6 -> 0.65, 0.65
    assert curves_page.votes_ratio(
        VOTES, np.array([0.5, 0.7, 0.6, 0.8]), np.array([0.5, 0.65, 0.65, 0.8])
    ) == pytest.approx(1.0)


def test_rules_share_the_first_votes_and_no_pair_is_asked_twice(monkeypatch):
    for name, value in {"FIRST": 4, "ROUND": 3, "LAST": 10, "MEMBERS": 3}.items():
        monkeypatch.setattr(curves, name, value)
    draw = np.random.default_rng(0)
    # six prompts of three answers, so three pairs each; the first feature is gold
    features = draw.normal(size=(18, 3))
    pairs = []
    for prompt in range(6):
        pairs += [(3 * prompt + a, 3 * prompt + b) for a, b in ((0, 1), (0, 2), (1, 2))]
    pairs = np.array(pairs)
    gaps = features[pairs[:, 0], 0] - features[pairs[:, 1], 0]
    labels = np.sign(gaps).astype(int)
    # without a winner
    labels[5] = 0
    ids = [[number] for number in range(18)]
    prompts = [number // 3 for number in range(18)]
    pool = curves.Pool(ids, features, pairs, prompts, labels, np.abs(gaps))
    test = curves.Answers(ids, features, np.ones(3), features[:, 0].reshape(6, 3))
    firsts = set()
    for rule in curves.RULES:
        chosen, points = curves.grow(pool, rule, "0 0", test)
        assert [point["votes"] for point in points] == [4, 7, 10]
        assert len(set(chosen)) == 10
        # each prompt is asked about before one is asked about twice
        assert len({prompts[number] for number in chosen[:4]}) == 4
        assert {prompts[number] for number in chosen[:7]} == set(range(6))
        firsts.add(tuple(chosen[:4]))
        again, same = curves.grow(pool, rule, "0 0", test)
        assert (again, same) == (chosen, points)
    assert len(firsts) == 1


def test_curves_are_measured_once_and_kept(tmp_path, monkeypatch):
    (tmp_path / "seed-0").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("read_pool", "test_answers"):
        monkeypatch.setattr(curves, name, lambda *_: None)
    # repeats "0 0", "0 1", ... have gold 0, 1, ...: the mean of 20 is 9.5
    points = [{"votes": 50, "gold": 0.0}]
    monkeypatch.setattr(
        curves,
        "grow",
        lambda pool, rule, name, test: ([], [points[0] | {"gold": float(name.split()[1])}]),
    )
    found = curves.measure_seed(0)
    assert found == {rule: [{"votes": 50, "gold": 9.5}] for rule in curves.RULES}
    monkeypatch.delattr(curves, "grow")
    assert curves.measure_seed(0) == found
