"""Baselines, the agreement of people and slices on pairs small enough to work by hand."""

import numpy as np
import pytest

from reward.cards.accuracy import cut, difference_with_interval, slices
from reward.cards.baselines import bag_of_words, baselines
from reward.cards.card import ceiling, counted_votes
from rlhf.data.records import Preference


def pair(i, chosen="good", rejected="bad", **more):
    prompt = [{"role": "user", "content": f"question {i}"}]
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, group=f"g{i}", **more)


def test_a_bag_of_words_learns_words_and_marks_and_nothing_of_new_ones():
    training = [pair(i, f"yes {i}!", f"no {i}") for i in range(20)]
    logits = bag_of_words(
        training, [pair(50, "YES", "no"), pair(51, "well!", "well"), pair(52, "new", "words")]
    )
    assert logits[0] > 1 and logits[1] > 0.5 and logits[2] == 0


def test_one_word_by_hand():
    # two words that only come together have weights v and -v: minimise 3 log(1 + e^-2v) + log(1 + e^2v)
    # + 2 v^2 / 2 -> 3 sigmoid(-2v) - sigmoid(2v) = v; at v = .3417: 3 * .33549 - .66451 = .3420
    training = [pair(i, "ja", "z") for i in range(3)] + [pair(3, "z", "ja")]
    (logit,) = bag_of_words(training, [pair(9, "ja", "z")])
    v = logit / 2
    assert v == pytest.approx(0.3418, abs=2e-4)
    assert 3 / (1 + np.exp(2 * v)) - 1 / (1 + np.exp(-2 * v)) == pytest.approx(v, abs=1e-4)


def test_baselines_by_hand():
    pairs = [
        pair(0, metadata={"chosen_first": True}),
        pair(1, metadata={"chosen_first": True}),
        pair(2, metadata={"chosen_first": False}),
        pair(3),
    ]
    # the model is right, right, wrong, right; the longer: right, wrong, right, tie
    found = baselines(pairs, np.array([1.0, 2, -1, 1]), np.array([3.0, -2, 1, 0]))
    assert found["length"]["rule"] == "the longer"
    assert found["length"]["accuracy"]["accuracy"] == pytest.approx(2.5 / 4)
    # 0, 1, -1, 1/2
    assert found["length"]["difference"]["mean"] == pytest.approx(0.125)
    # over the three pairs whose sides are known: right, right, wrong, as the model
    assert found["position"]["rule"] == "the first"
    assert found["position"]["accuracy"] | {"low": 0, "high": 0} == {
        "accuracy": pytest.approx(2 / 3), "low": 0, "high": 0, "n": 3, "pairs": 3,
    }  # fmt: skip
    assert found["position"]["difference"]["mean"] == 0
    assert "bag_of_words" not in found


def test_training_pairs_decide_which_way_round_a_rule_works():
    training = [pair(i, "a short one", "a much longer answer") for i in range(10, 13)]
    found = baselines([pair(0)], np.array([1.0]), np.array([5.0]), training)
    assert found["length"]["rule"] == "the shorter"
    assert found["length"]["accuracy"]["accuracy"] == 0
    assert found["bag_of_words"]["rule"].endswith("3 training pairs")


def test_without_training_pairs_these_pairs_decide():
    # of an empty list the mean would be nan, and the rule "the shorter"
    found = baselines([pair(0)], np.array([1.0]), np.array([5.0]), [])
    assert found["length"]["rule"] == "the longer" and "bag_of_words" not in found


def test_agreement_of_people_by_hand():
    prompt = [{"role": "user", "content": "q"}]
    three = [
        Preference(prompt=prompt, chosen="A", rejected="B", annotator="x"),
        Preference(prompt=prompt, chosen="a", rejected="b ", annotator="y"),
        Preference(prompt=prompt, chosen="B", rejected="A", annotator="z"),
    ]
    counted = pair(1, metadata={"votes": [1, 1, 1, 0]})
    # of records with two votes only those that agree are pairs, so they say nothing
    two = pair(3, metadata={"vote": {"votes": {"a": 2}}})
    alone = pair(2)
    # 2 : 1 -> (2 + 0) / 6 = 1/3; 3 : 0 -> 1; the single vote does not count
    # the model prefers A: 2/3 of the first, and the other answer of the second: 0
    found = ceiling([*three, counted, alone, two], np.array([1.0, 1, -1, -2, 1, 1]))
    assert found["agreement"]["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["model"]["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["difference"]["mean"] == pytest.approx(1 / 3 - 2 / 3)
    assert found["agreement"]["pairs"] == 2
    assert ceiling([alone], np.array([1.0])) is None


@pytest.mark.parametrize(
    ("metadata", "votes"),
    [
        ({"vote": {"comparison": 1, "votes": {"a": 1, "b": 3, "tie": 2}}}, (3, 1)),
        ({"votes": [2, 2, 0, 1]}, (2, 1)),
        ({"vote": {"comparison": 1, "event": 4}}, None),
        ({"votes": 3}, None),
        ({}, None),
    ],
)
def test_votes_that_a_record_counts(metadata, votes):
    assert counted_votes(pair(0, metadata=metadata)) == votes


def test_a_scale_is_cut_into_fifths_and_few_values_at_each():
    names, order = cut(np.arange(1.0, 11), " tokens")
    # quantiles of 1 to 10: 2.8, 4.6, 6.4, 8.2
    assert order == ["up to 2.8 tokens", "2.8 to 4.6 tokens", "4.6 to 6.4 tokens", "6.4 to 8.2 tokens",
                     "above 8.2 tokens"]  # fmt: skip
    assert [names.index(name) for name in order] == [0, 2, 4, 6, 8]
    names, order = cut(np.array([1 / 3, np.nan, 1.0]))
    assert names == ["0.3333", None, "1"] and order == ["0.3333", "1"]
    assert cut(np.array([np.nan])) == ([None], [])


def test_only_a_slice_that_is_surely_wrong_is_called_so():
    pairs = [pair(i, source="s" if i < 40 else "t", metadata={"topic": "x"}) for i in range(80)]
    # of source s 8 of 40 are right: 0.2 (0.10 to 0.35 at 95 %); of t all
    right = np.array([1.0] * 8 + [0.0] * 32 + [1.0] * 40)
    groups = np.array([p.group for p in pairs])
    found = slices(pairs, right, groups, np.zeros(80), category="topic")
    assert found["by_source"]["s"]["surely_wrong"] and not found["by_source"]["t"]["surely_wrong"]
    assert found["by_category"]["x"]["pairs"] == 80 and found["by_margin"] == {}
    assert list(found["by_length_difference"]) == ["0 tokens"]


def test_a_slice_below_one_half_by_chance_is_not_called_wrong():
    # 18 of 40 right: 0.45 (0.31 to 0.60)
    pairs = [pair(i, source="s") for i in range(40)]
    groups = np.array([p.group for p in pairs])
    right = np.array([1.0] * 18 + [0.0] * 22)
    assert not slices(pairs, right, groups, np.zeros(40))["by_source"]["s"]["surely_wrong"]


def test_the_difference_of_two_sets_that_share_their_groups_has_no_noise_of_the_groups():
    # both sets are right in the even groups, but for one: 10 of 20 and 9 of 20
    right, groups = np.array([1.0, 0.0] * 10), np.arange(20).astype(str)
    other = np.array([0.0, 0.0] + [1.0, 0.0] * 9)
    same = difference_with_interval(right, groups, other, groups)
    assert same["mean"] == pytest.approx(0.05) and same["n"] == 20
    apart = difference_with_interval(right, groups, other, [f"x{g}" for g in groups])
    assert apart["mean"] == pytest.approx(0.05) and apart["n"] == 40
    # two means of 20 coins: se^2 = 2 * 0.25 / 19, by Student 0.34 either way
    assert (apart["high"] - apart["low"]) / 2 == pytest.approx(0.32, abs=0.03)
    # one group of 20 that differs: se = 0.05, by Student 0.105
    assert (same["high"] - same["low"]) / 2 == pytest.approx(0.1, abs=0.02)
