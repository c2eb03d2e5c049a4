"""Every number of the report card on arrays small enough to work by hand."""

import json
import math

import numpy as np
import pytest

from reward.card import (
    accuracy_with_interval,
    calibration,
    correlation,
    distribution,
    pair_accuracy,
    report_card,
    wilson,
    write_card,
)
from rlhf.data.records import Preference


def pair(i, group=None, **more):
    prompt = [{"role": "user", "content": f"question {i}"}]
    return Preference(prompt=prompt, chosen=f"good {i}", rejected=f"bad {i}", group=group or f"g{i}", **more)


def test_a_tie_counts_half():
    assert pair_accuracy(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_wilson_interval_by_hand():
    # p = 1, n = 10: middle and spread both z^2/20, low = 1 / (1 + z^2/10) = 1 / 1.3841459 = 0.7224672
    low, high = wilson(1.0, 10)
    assert (low, high) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    # p = 1/2, n = 4: half-width z / 2 / sqrt(n + z^2) = sqrt(3.8414588 / 7.8414588) / 2 = 0.3499610
    assert wilson(0.5, 4) == pytest.approx((0.1500390, 0.8499610), abs=1e-6)


def test_bootstrap_resamples_groups_not_pairs():
    # two groups: one with three right pairs, one with one wrong. Mean 3/4. A resample of two groups is
    # (a, a) -> 1, (a, b) -> 3/4, (b, b) -> 0 with chances 1/4, 1/2, 1/4: the 2.5 and 97.5 percentiles are 0 and 1
    result = accuracy_with_interval(np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"])
    assert result["accuracy"] == pytest.approx(0.75)
    assert (result["low"], result["high"], result["n"], result["pairs"]) == (0.0, 1.0, 2, 4)
    assert result["method"] == "bootstrap"


def test_bootstrap_of_single_pairs_is_near_the_normal_interval():
    # 400 groups of one, p = 0.8: 0.8 +- 1.96 * sqrt(0.16 / 400) = 0.8 +- 0.0392
    right = np.array([1.0, 1.0, 1.0, 1.0, 0.0] * 80)
    result = accuracy_with_interval(right, [str(i) for i in range(400)])
    assert result["low"] == pytest.approx(0.7608, abs=0.006)
    assert result["high"] == pytest.approx(0.8392, abs=0.006)


def test_paraphrases_widen_the_interval():
    # the same 400 pairs in 20 groups of 20 that agree within: as if n = 20 -> half-width 1.96 * 0.4 / sqrt(20) = 0.175
    right = np.repeat(np.array([1.0, 1.0, 1.0, 1.0, 0.0] * 4), 20)
    result = accuracy_with_interval(right, [str(i // 20) for i in range(400)])
    assert result["n"] == 20
    assert result["high"] - result["low"] == pytest.approx(0.35, abs=0.06)


def test_all_right_takes_wilson_and_one_group_has_no_interval():
    all_right = accuracy_with_interval(np.ones(30), [str(i // 3) for i in range(30)])  # 10 groups
    assert (all_right["method"], all_right["n"]) == ("wilson", 10)
    assert all_right["low"] == pytest.approx(0.7224672, abs=1e-6)
    assert accuracy_with_interval(np.array([1.0, 0.0]), ["a", "a"])["low"] is None
    assert accuracy_with_interval(np.array([]), [])["accuracy"] is None


def test_calibration_by_hand():
    # gaps ln 3, ln 3, -ln 3, 0: p = .75 .75 .25 .5; confidence .75 .75 .75 .5; right 1 1 0 .5
    # bin [.75, .8): confidence .75, accuracy 2/3, 3 pairs; bin [.5, .55): .5 and .5, 1 pair
    # ECE = 3/4 * (.75 - .6666667) = .0625; Brier = (.0625 + .0625 + .5625 + .25) / 4 = .234375
    result = calibration(np.array([math.log(3) + 1e-12, math.log(3) + 1e-12, -math.log(3) - 1e-12, 0.0]))
    assert result["ece"] == pytest.approx(0.0625, abs=1e-6)
    assert result["brier"] == pytest.approx(0.234375, abs=1e-6)
    low, high = result["bins"]
    assert (low["from"], low["pairs"], low["accuracy"]) == (0.5, 1, 0.5)
    assert (high["from"], high["pairs"]) == (0.75, 3)
    assert high["accuracy"] == pytest.approx(2 / 3)


def test_a_huge_gap_is_certain_and_does_not_overflow():
    assert calibration(np.array([1e6]))["brier"] == pytest.approx(0.0, abs=1e-12)
    result = calibration(np.array([-1e6]))
    assert (result["brier"], result["ece"]) == pytest.approx((1.0, 1.0))


def test_distribution_and_correlation_by_hand():
    # 1 2 3: mean 2, population std sqrt(2/3), p5 = 1 + 0.05 * 2 = 1.1
    d = distribution(np.array([1.0, 2.0, 3.0]))
    assert (d["mean"], d["std"], d["p5"], d["median"], d["max"]) == pytest.approx((2, math.sqrt(2 / 3), 1.1, 2, 3))
    # x = 1 2 3, y = 1 3 2: cov = (1 + 0 + 0)/... deviations (-1,0,1) and (-1,1,0): 1 / (sqrt 2 * sqrt 2) = 0.5
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
    return report_card(pairs, [1.0, 0, 1, 3], [0.0, 2, 1, 0], [5, 5, 2, 4], [2, 3, 6, 4])


def test_report_card_by_hand():
    card = four_pairs()
    assert (card["pairs"], card["groups"], card["ties"]) == (4, 3, 1)
    assert card["accuracy"]["accuracy"] == pytest.approx(2.5 / 4)
    assert card["accuracy"]["n"] == 3
    length = card["length"]
    assert length["chosen_longer"]["accuracy"] == pytest.approx(0.5)  # 1, 0
    assert length["chosen_shorter"]["accuracy"] == pytest.approx(0.5)  # the tie
    assert length["same_length"]["accuracy"] == pytest.approx(1.0)
    assert length["baseline"] == {"accuracy": pytest.approx(2.5 / 4), "rule": "longer"}  # 1, 1, 0, 1/2
    # gaps (1,-2,0,3), mean .5; length gaps (3,2,-4,0), mean .25: sum of products of deviations
    # .5*2.75 - 2.5*1.75 + .5*4.25 - 2.5*.25 = 1.375 - 4.375 + 2.125 - .625 = -1.5
    # sqrt(.25+6.25+.25+6.25) = sqrt 13;  sqrt(7.5625+3.0625+18.0625+.0625) = sqrt 28.75
    assert length["gap_correlation"] == pytest.approx(-1.5 / math.sqrt(13 * 28.75), abs=1e-6)
    assert card["by_source"]["a"]["accuracy"] == pytest.approx(0.5)
    assert card["by_source"]["b"]["accuracy"] == pytest.approx(0.75)
    assert card["by_source"]["b"]["n"] == 1  # both pairs are of one group
    assert card["by_annotator"]["bob"]["accuracy"] == pytest.approx(0.25)
    assert set(card["by_annotator"]) == {"ann", "bob"}  # the pair without one is not a group of its own
    assert card["scores"]["gap"]["mean"] == pytest.approx(0.5)
    assert [m["prompt"] for m in card["mistakes"]] == ["question 1"]


def test_the_shorter_may_be_the_better_baseline():
    card = report_card([pair(0), pair(1)], [1.0, 1], [0.0, 0], [1, 1], [3, 3])
    assert card["length"]["baseline"] == {"accuracy": 1.0, "rule": "shorter"}


def test_card_is_written_and_reads_back(tmp_path):
    card = four_pairs()
    card["rows"] = {"preference/train": {"read": 9, "used": 7, "dropped": {"prompt longer": 2}}}
    path = write_card(card, tmp_path)
    assert "Rows of preference/train: 7 of 9 are used; 2: prompt longer." in path.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    text = path.read_text()
    assert "| **all pairs** | 0.625 |" in text
    assert '("the longer is better"' in text
    assert "question 1" in text
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scores"):
        report_card([pair(0)], [1.0, 2.0], [0.0], [1], [1])
    with pytest.raises(ValueError, match="finite"):
        report_card([pair(0)], [math.nan], [0.0], [1], [1])
    with pytest.raises(ValueError, match="0 pairs"):
        report_card([], [], [], [], [])
