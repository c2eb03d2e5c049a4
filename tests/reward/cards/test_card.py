"""Every number of the report card on arrays small enough to work by hand."""

import json
import math

import numpy as np
import pytest

from reward.cards.accuracy import accuracy_with_interval, pair_accuracy
from reward.cards.bias import correlation
from reward.cards.calibration import binomial_deviation, calibration
from reward.cards.card import distribution, report_card
from reward.cards.page import write_card
from reward.cards.pairs import ScoredPairs
from reward.cards.verdict import doubts, doubts_of
from rlhf.data.records import Preference


def pair(i, group=None, **more):
    prompt = [{"role": "user", "content": f"question {i}"}]
    return Preference(
        prompt=prompt, chosen=f"good {i}", rejected=f"bad {i}", group=group or f"g{i}", **more
    )


def card_of(pairs, *columns, **more):
    return report_card(ScoredPairs(pairs, *columns), **more)


def test_a_tie_counts_half():
    assert pair_accuracy(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_the_unit_of_the_accuracy_s_interval_is_the_group():
    # two groups: one with three right pairs, one with one wrong: 3/4. Without each 0 and 1: se^2 =
    # 1/2 (1/4 + 1/4) N = (3/16) / (1/4) = 3/4; t(.975, 1)^2 = 161.4476, over N 215.2635 (.75 +
    # 107.6317 +- sqrt(40.3619 + 11584.59)) / 216.2635
    result = accuracy_with_interval(np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"])
    assert result["accuracy"] == pytest.approx(0.75)
    assert (result["low"], result["high"]) == pytest.approx((0.002599, 0.999710), abs=1e-5)
    assert (result["n"], result["pairs"]) == (2, 4)


def test_the_interval_of_single_pairs_is_near_the_normal_one():
    # 400 groups of one, p = 0.8: 0.8 +- 1.96 * sqrt(0.16 / 400) = 0.8 +- 0.0392
    right = np.array([1.0, 1.0, 1.0, 1.0, 0.0] * 80)
    result = accuracy_with_interval(right, [str(i) for i in range(400)])
    assert result["low"] == pytest.approx(0.7608, abs=0.006)
    assert result["high"] == pytest.approx(0.8392, abs=0.006)


def test_paraphrases_widen_the_interval():
    # the same 400 pairs in 20 groups of 20 that agree within: as if n = 20 -> half-width 1.96 * 0.4
    # / sqrt(20) = 0.175
    right = np.repeat(np.array([1.0, 1.0, 1.0, 1.0, 0.0] * 4), 20)
    result = accuracy_with_interval(right, [str(i // 20) for i in range(400)])
    assert result["n"] == 20
    assert result["high"] - result["low"] == pytest.approx(0.35, abs=0.06)


def test_all_right_has_an_interval_and_one_group_has_none():
    # 10 groups: 1 / (1 + t(.975, 9)^2 / 10) = 1 / (1 + .5117355) = .661491
    all_right = accuracy_with_interval(np.ones(30), [str(i // 3) for i in range(30)])
    assert (all_right["low"], all_right["high"], all_right["n"]) == (
        pytest.approx(0.661491, abs=1e-6),
        1.0,
        10,
    )
    assert accuracy_with_interval(np.array([1.0, 0.0]), ["a", "a"])["low"] is None
    assert accuracy_with_interval(np.array([]), [])["accuracy"] is None


def test_the_accuracy_s_interval_holds_with_few_groups_of_unequal_size():
    # 1 + Poisson(2) pairs a group, correlated 0.3 within, accuracy 0.75: 1000 cards of 8 groups,
    # standard error .7 %
    rng, a = np.random.default_rng(0), 1 / 0.3 - 1
    held = 0
    for _ in range(1000):
        sizes = 1 + rng.poisson(2, 8)
        skill = np.repeat(rng.beta(0.75 * a, 0.25 * a, 8), sizes)
        right = (rng.random(sizes.sum()) < skill).astype(float)
        found = accuracy_with_interval(right, np.repeat(np.arange(8), sizes))
        held += found["low"] <= 0.75 <= found["high"]
    assert held / 1000 > 0.93  # percentiles of the bootstrap: 0.87


def test_calibration_by_hand():
    # gaps ln 3, ln 3, -ln 3, 0: p = .75 .75 .25 .5; confidence .75 .75 .75 .5; right 1 1 0 .5
    # bin [.75, .8): confidence .75, accuracy 2/3, 3 pairs; bin [.5, .55): .5 and .5, 1 pair
    # ECE = 3/4 * (.75 - .6666667) = .0625; Brier = (.0625 + .0625 + .5625 + .25) / 4 = .234375
    result = calibration(
        np.array([math.log(3) + 1e-12, math.log(3) + 1e-12, -math.log(3) - 1e-12, 0.0])
    )
    assert result["ece"] == pytest.approx(0.0625, abs=1e-6)
    assert result["brier"] == pytest.approx(0.234375, abs=1e-6)
    # of a calibrated model: E|X - 2.25| of Binomial(3, .75) is 2 * .25 * 3 * .421875 = .6328125;
    # the tie adds nothing
    assert result["ece_expected"] == pytest.approx(0.6328125 / 4, abs=1e-6)
    low, high = result["bins"]
    assert (low["from"], low["pairs"], low["accuracy"]) == (0.5, 1, 0.5)
    assert (high["from"], high["pairs"]) == (0.75, 3)
    assert high["accuracy"] == pytest.approx(2 / 3)


def test_the_deviation_of_a_binomial_by_hand():
    # n = 2, p = .5: E|X - 1| = 1/4 + 1/4; n = 3, p = .75 above; large n: sqrt(2 n p (1 - p) / pi)
    assert binomial_deviation(2, 0.5) == pytest.approx(0.5, abs=1e-12)
    assert binomial_deviation(10**6, 0.5) == pytest.approx(math.sqrt(5e5 / math.pi), rel=1e-6)
    assert binomial_deviation(7, 0.0) == binomial_deviation(7, 1.0) == 0.0


@pytest.mark.parametrize("pairs", [50, 200, 1000])
def test_a_calibrated_model_shows_the_error_that_is_expected_of_it(pairs):
    # gaps of sd 2, the choice drawn from sigmoid(gap): the mean ECE of 400 such cards lies above 0,
    # and where we say
    rng = np.random.default_rng(pairs)
    seen, expected = [], []
    for _ in range(400):
        gaps = 2 * rng.normal(size=pairs)
        gaps *= np.where(rng.random(pairs) < 1 / (1 + np.exp(-gaps)), 1, -1)
        found = calibration(gaps)
        seen.append(found["ece"])
        expected.append(found["ece_expected"])
    error = np.std(seen) / 20
    assert np.mean(seen) == pytest.approx(np.mean(expected), abs=4 * error)
    assert np.mean(seen) > 20 * error  # what a calibrated model is charged with


def test_a_huge_gap_is_certain_and_does_not_overflow():
    assert calibration(np.array([1e6]))["brier"] == pytest.approx(0.0, abs=1e-12)
    result = calibration(np.array([-1e6]))
    assert (result["brier"], result["ece"]) == pytest.approx((1.0, 1.0))


def test_distribution_and_correlation_by_hand():
    # 1 2 3: mean 2, population std sqrt(2/3), p5 = 1 + 0.05 * 2 = 1.1
    d = distribution(np.array([1.0, 2.0, 3.0]))
    assert (d["mean"], d["std"], d["p5"], d["median"], d["max"]) == pytest.approx(
        (2, math.sqrt(2 / 3), 1.1, 2, 3)
    )
    # x = 1 2 3, y = 1 3 2: cov = (1 + 0 + 0)/... deviations (-1,0,1) and (-1,1,0): 1 / (sqrt 2 *
    # sqrt 2) = 0.5
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    assert correlation(np.array([1.0, 1, 1]), np.array([1.0, 3, 2])) is None


def four_pairs():
    pairs = [
        pair(0, source="a", annotator="ann"),
        pair(1, source="a", annotator="bob"),
        pair(2, source="b", annotator="bob"),
        pair(3, group="g2", source="b"),
    ]
    # gaps 1, -2, 0, 3; lengths: longer, longer, shorter, same
    return card_of(pairs, [1.0, 0, 1, 3], [0.0, 2, 1, 0], [5, 5, 2, 4], [2, 3, 6, 4])


def test_report_card_by_hand():
    card = four_pairs()
    assert (card["pairs"], card["groups"], card["ties"]) == (4, 3, 1)
    assert card["accuracy"]["accuracy"] == pytest.approx(2.5 / 4)
    assert card["accuracy"]["n"] == 3
    length = card["length"]
    assert length["chosen_longer"]["accuracy"] == pytest.approx(0.5)  # 1, 0
    assert length["chosen_shorter"]["accuracy"] == pytest.approx(0.5)  # the tie
    assert length["same_length"]["accuracy"] == pytest.approx(1.0)
    # 1, 1, 0, 1/2
    assert length["baseline"] == {"accuracy": pytest.approx(2.5 / 4), "rule": "longer"}
    # gaps (1,-2,0,3), mean .5; length gaps (3,2,-4,0), mean .25: sum of products of deviations
    # .5*2.75 - 2.5*1.75 + .5*4.25 - 2.5*.25 = 1.375 - 4.375 + 2.125 - .625 = -1.5
    # sqrt(.25+6.25+.25+6.25) = sqrt 13;  sqrt(7.5625+3.0625+18.0625+.0625) = sqrt 28.75
    assert length["gap_correlation"] == pytest.approx(-1.5 / math.sqrt(13 * 28.75), abs=1e-6)
    assert card["by_source"]["a"]["accuracy"] == pytest.approx(0.5)
    assert card["by_source"]["b"]["accuracy"] == pytest.approx(0.75)
    assert card["by_source"]["b"]["n"] == 1  # both pairs are of one group
    assert card["by_annotator"]["bob"]["accuracy"] == pytest.approx(0.25)
    # the pair without one is not a group of its own
    assert set(card["by_annotator"]) == {"ann", "bob"}
    assert card["scores"]["gap"]["mean"] == pytest.approx(0.5)
    assert [m["prompt"] for m in card["mistakes"]] == ["question 1"]


def test_the_shorter_may_be_the_better_baseline():
    card = card_of([pair(0), pair(1)], [1.0, 1], [0.0, 0], [1, 1], [3, 3])
    assert card["length"]["baseline"] == {"accuracy": 1.0, "rule": "shorter"}


def test_doubts_of_a_model_at_chance_and_of_a_length_detector(tmp_path):
    rng = np.random.default_rng(0)
    pairs, lengths = [pair(i) for i in range(60)], rng.integers(5, 60, (2, 60))
    noise = rng.normal(size=(2, 60))
    # 90 %, 50 %, 10 % right
    right = [np.arange(60) % 10 != 0, np.arange(60) % 2 == 0, np.arange(60) % 10 == 0]
    cards = [
        card_of(pairs, np.where(r, 2.0, 0.0) + 0.1 * noise[0], np.ones(60), *lengths) for r in right
    ]
    assert doubts(cards[0]) == []
    (guessing,), (worse, beaten) = doubts(cards[1]), doubts(cards[2])
    assert "the better judge" in beaten
    assert (
        "is 0.500 (" in guessing
        and "cannot be told from guessing" in guessing
        and "is worse than" in worse
    )
    (detector,) = doubts(
        card_of(pairs, lengths[0] + noise[0], lengths[1] + noise[1] - 30, *lengths)
    )
    assert "its score gaps go with length (correlation +1.00" in detector
    assert "too few" in doubts(card_of(pairs[:1], [1.0], [0.0], [3], [2]))[0]
    assert "no report card" in doubts_of(tmp_path)[0] and doubts_of("org/model-of-the-hub") == []
    write_card(cards[1], tmp_path)
    assert doubts_of(tmp_path) == [guessing]
    (tmp_path / "card.json").write_text('{"accuracy": 1}')
    assert "cannot be read" in doubts_of(tmp_path)[0]


def test_card_is_written_and_reads_back(tmp_path):
    card = four_pairs()
    card["rows"] = {"preference/train": {"read": 9, "used": 7, "dropped": {"prompt longer": 2}}}
    path = write_card(card, tmp_path)
    assert "Rows of preference/train: 7 of 9 are used; 2: prompt longer." in path.read_text(
        encoding="utf-8"
    )
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    text = path.read_text()
    assert "| **all pairs** | 0.625 |" in text
    assert f"{card['calibration']['ece_expected']:.4f} |" in text
    assert "**Verdict: do not use it.**" in text
    assert '("the longer is better"' in text
    assert "question 1" in text
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scores"):
        card_of([pair(0)], [1.0, 2.0], [0.0], [1], [1])
    with pytest.raises(ValueError, match="finite"):
        card_of([pair(0)], [math.nan], [0.0], [1], [1])
    with pytest.raises(ValueError, match="0 pairs"):
        card_of([], [], [], [], [])
