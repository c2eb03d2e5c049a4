import random

import numpy as np
import pytest

from rlhf.data.dawid_skene import dawid_skene


def test_one_round_by_hand():
    # items 1: x says a, y says b; 2: both a. Shares of the votes: T = (1/2, 1/2), (1, 0) M: of
    # class a there is 1/2 + 1 = 3/2, of class b 1/2. x always says a: pi_x = (1, 0) for both
    # classes
    #    y says a for 1 of the 3/2: pi_y(a) = (2/3, 1/3); for 0 of the 1/2: pi_y(b) = (0, 1).  p = (3/4, 1/4)
    # E: item 1: a: 3/4 * 1 * 1/3 = 1/4, b: 1/4 * 1 * 1 = 1/4  -> 1/2, 1/2;   item 2: b is impossible
    found = dawid_skene({1: {"x": "a", "y": "b"}, 2: {"x": "a", "y": "a"}}, "ab", rounds=1)
    assert found.posterior[1].tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
    assert found.posterior[2].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    np.testing.assert_allclose(found.confusion["x"], [[1, 0], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(found.confusion["y"], [[2 / 3, 1 / 3], [0, 1]], atol=1e-12)
    assert found.prior.tolist() == pytest.approx([0.75, 0.25], abs=1e-12)


def test_pseudo_votes_by_hand():
    # one vote: start at pi = (3/4, 1/4), p uniform: T = (3/4, 1/4)
    # M: x on class a: (3 + 3/4, 1) of 4 3/4; on class b: says a 1 + 1/4, b 3, of 4 1/4.  p = (7/4, 5/4) / 3
    # E: a: 7/12 * 3.75/4.75, b: 5/12 * 1.25/4.25
    found = dawid_skene({1: {"x": "a"}}, "ab", pseudo=[[3, 1], [1, 3]], rounds=1)
    a, b = 7 / 12 * 3.75 / 4.75, 5 / 12 * 1.25 / 4.25
    assert found.posterior[1].tolist() == pytest.approx([a / (a + b), b / (a + b)], abs=1e-12)


def test_items_of_a_weight_by_hand():
    # the same with a weight of 1/2. M: x on class a: (3 + 3/8, 1) of 4 3/8; on class b: says a
    # 1 + 1/8, b 3, of 4 1/8.  p = (1 + 3/8, 1 + 1/8) / 2.5.  E: as of any item
    found = dawid_skene({1: {"x": "a"}}, "ab", pseudo=[[3, 1], [1, 3]], weights={1: 0.5}, rounds=1)
    a, b = 1.375 / 2.5 * 3.375 / 4.375, 1.125 / 2.5 * 1.125 / 4.125
    assert found.posterior[1].tolist() == pytest.approx([a / (a + b), b / (a + b)], abs=1e-12)
    assert found.prior.tolist() == pytest.approx([0.55, 0.45], abs=1e-12)
    # twice the same item of weight 1/2 teaches what one item does
    twice = {1: {"x": "a", "y": "b"}, 2: {"x": "a", "y": "b"}, 3: {"x": "b", "y": "b"}}
    once = {1: twice[1], 3: twice[3]}
    halves = dawid_skene(twice, "ab", pseudo=[[3, 1], [1, 3]], weights={1: 0.5, 2: 0.5})
    whole = dawid_skene(once, "ab", pseudo=[[3, 1], [1, 3]])
    np.testing.assert_allclose(halves.confusion["x"], whole.confusion["x"], atol=1e-6)


def test_a_mirror_makes_the_names_of_the_classes_mean_nothing():
    rng = random.Random(0)
    ratings = {i: {n: rng.choice("ab") for n in "xyz"} for i in range(30)}
    swapped = {
        i: {n: "ba"["ab".index(v)] for n, v in values.items()} for i, values in ratings.items()
    }
    options = {"pseudo": [[2, 1], [1, 2]], "mirror": (1, 0)}
    one, other = dawid_skene(ratings, "ab", **options), dawid_skene(swapped, "ab", **options)
    for item in ratings:
        assert one.posterior[item][0] == pytest.approx(other.posterior[item][1], abs=1e-9)
    assert one.confusion["x"][0, 0] == pytest.approx(one.confusion["x"][1, 1], abs=1e-12)


def crowd(accuracies, items=600, seed=0):
    rng = random.Random(seed)
    truth = {i: rng.choice("ab") for i in range(items)}
    flip = {"a": "b", "b": "a"}
    ratings = {
        i: {
            name: t if rng.random() < accuracy else flip[t] for name, accuracy in accuracies.items()
        }
        for i, t in truth.items()
    }
    return truth, ratings


def test_planted_skills_are_recovered_and_beat_the_majority():
    # one good annotator among four poor ones: the majority is right less often than weighting by
    # skill
    accuracies = {"good": 0.95, "p1": 0.65, "p2": 0.65, "p3": 0.65, "p4": 0.65}
    truth, ratings = crowd(accuracies, items=2000)
    found = dawid_skene(ratings, "ab", pseudo=[[2.5, 0.5], [0.5, 2.5]], mirror=(1, 0))
    for name, accuracy in accuracies.items():
        assert found.confusion[name][0, 0] == pytest.approx(accuracy, abs=0.05), name
    by_skill = sum("ab"[found.posterior[i].argmax()] == t for i, t in truth.items()) / len(truth)
    majority = sum(
        max("ab", key=list(ratings[i].values()).count) == t for i, t in truth.items()
    ) / len(truth)
    assert by_skill > 0.9 and by_skill > majority + 0.05


def test_known_items_stay_and_teach():
    # two annotators who always disagree; the control items say which one to believe
    ratings = {i: {"x": "a", "y": "b"} for i in range(40)}
    found = dawid_skene(
        ratings, "ab", known=dict.fromkeys(range(20), "a"), pseudo=[[2, 1], [1, 2]], mirror=(1, 0)
    )
    assert found.posterior[0].tolist() == [1.0, 0.0]
    assert (
        found.posterior[30][0] > 0.99
        and found.confusion["x"][0, 0] > 0.9 > 0.1 > found.confusion["y"][0, 0]
    )


def test_other_values_and_empty_items_are_left_out():
    found = dawid_skene(
        {1: {"x": "a", "y": "skip"}, 2: {"y": "skip"}}, "ab", pseudo=[[2, 1], [1, 2]]
    )
    assert list(found.posterior) == [1] and list(found.confusion) == ["x"]
    assert dawid_skene({}, "ab").posterior == {}
