import math

import numpy as np
import pytest

from rlhf.judge.agreement import (
    agreement,
    choice_of,
    length_bias,
    ratio,
    same_family,
    self_preference,
)
from rlhf.judge.pairs import JudgedPair, add_votes, ordered, read_pairs, write_pairs
from rlhf.judge.report import judge_report, markdown
from rlhf.stats import wilson


def pair(share, people="", group="g", words=(1, 1), a="ppo", b="sft", prompt="q"):
    """share: the judge's of A; people: a letter each, - for a tie."""
    names = {"a": "a", "b": "b", "-": "tie", "x": "both_bad"}
    return JudgedPair(
        prompt=prompt,
        group=group,
        a=a,
        b=b,
        answer_a="w " * words[0],
        answer_b="v " * words[1],
        p_ab=share,
        p_ba=1 - share,
        people={f"person {i}": names[letter] for i, letter in enumerate(people)},
    )


def test_agreement_with_people_stands_beside_their_own():
    # judge a: 2 of 3 -> 2/3; judge tie: 2 of 2 (both bad is a tie) -> 1; judge b: none of 2 -> 0
    # people: (1/2 + 1/2 + 0) / 3 = 1/3; 1; 1
    pairs = [pair(1.0, "aab", "1"), pair(0.5, "-x", "2"), pair(0.0, "aa", "3")]
    # nobody voted, or no verdict: not counted
    pairs += [pair(1.0, "", "4"), pair(math.nan, "aa", "5")]
    found = agreement(pairs)
    assert found["pairs"] == 3
    assert found["all"]["judge"]["estimate"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["all"]["people"]["estimate"] == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert found["all"]["difference"]["estimate"] == pytest.approx((5 / 3 - 7 / 3) / 3)
    # sides alone: pairs 1 and 3
    assert found["decided"]["judge"]["estimate"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["decided"]["people"]["estimate"] == pytest.approx((1 / 3 + 1) / 2)
    first = found["annotators"]["person 0"]
    # with the rest 1/2, 1, 1; with the judge 1, 1, 0
    assert first["rest"]["estimate"] == pytest.approx(2.5 / 3)
    assert first["judge"]["estimate"] == pytest.approx(2 / 3)
    assert agreement([pair(1.0)]) is None


def test_pairs_of_one_group_are_one_cluster():
    counts = [(1.0, 1.0), (0.0, 1.0)] * 20
    alone = ratio(counts, [str(i) for i in range(40)])
    # independent pairs of 0 or 1: nearly Wilson's interval with Student's quantile
    low, high = wilson(20, 40)
    assert (alone["low"], alone["high"]) == pytest.approx((low, high), abs=0.01)
    # 20 groups of two equal pairs say less
    grouped = ratio(sorted(counts), [str(i // 2) for i in range(40)])
    assert grouped["high"] - grouped["low"] > 1.3 * (alone["high"] - alone["low"])


def test_a_judge_of_length_is_found_where_people_do_not_share_it():
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(200):
        words = tuple(rng.integers(5, 60, 2))
        people = "".join(rng.choice(["a", "b"], 3))
        pairs.append(pair(float(words[0] > words[1]), people, str(i // 2), words))
    found = length_bias(pairs)
    assert found["judge"]["longer"]["estimate"] == 1.0
    assert found["judge"]["slope"]["estimate"] > 3
    assert found["people"]["slope"]["low"] < 0 < found["people"]["slope"]["high"]
    assert found["excess"]["low"] > 0
    # turned pairs say the same
    back = length_bias([p.turned() for p in pairs])
    assert back["judge"]["longer"] == pytest.approx(found["judge"]["longer"])
    assert back["excess"]["estimate"] == pytest.approx(found["excess"]["estimate"], abs=1e-6)


def test_the_slope_on_length_by_hand():
    # d = +-1, sd 1, tanh 1 = .76159; A wins 3/4 when longer, 1/4 when shorter: phi = ln 3 / .76159
    pairs = []
    for i in range(8):
        longer = i % 2 == 0
        wins = (i // 2 != 0) if longer else (i // 2 == 0)
        pairs.append(pair(float(wins), "", str(i), (2, 1) if longer else (1, 2)))
    slope = length_bias(pairs)["judge"]["slope"]["estimate"]
    assert slope == pytest.approx(math.log(3) / math.tanh(1.0), abs=1e-6)
    equal = [pair(1.0, "a", str(i)) for i in range(8)]
    assert length_bias(equal)["judge"]["slope"] is None


def test_self_preference_is_the_judges_share_less_the_peoples():
    # own answers win 1, 1, 1/2 by the judge; by the people 0, 1 and nobody
    pairs = [
        pair(1.0, "b", "1", a="qwen-1", b="llama"),
        pair(0.0, "bb", "2", a="llama", b="qwen-1"),
        pair(0.5, "", "3", a="qwen-1", b="llama"),
        pair(1.0, "a", "4", a="llama", b="opt"),
    ]
    found = self_preference(pairs, ["qwen-1"])
    assert found["judge"]["estimate"] == pytest.approx(2.5 / 3)
    assert found["people"]["estimate"] == pytest.approx(0.5)
    assert found["difference"]["estimate"] == pytest.approx(1.0 - 0.5)
    assert self_preference(pairs, ["gpt"]) is None
    assert same_family("Qwen/Qwen3-8B", ["qwen2-7b", "qwq", "sft", "7b"]) == ["qwen2-7b"]
    assert same_family("123", ["456"]) == []


def test_pairs_are_turned_and_kept(tmp_path):
    one = pair(0.9, "ab-", a="x", b="y", words=(2, 1))
    back = one.turned()
    assert (back.a, back.share, back.votes) == ("y", pytest.approx(0.1), one.votes)
    assert back.people == {"person 0": "b", "person 1": "a", "person 2": "tie"}
    assert back.turned() == one
    assert [p.a for p in ordered([one, back])] == ["y", "y"]
    assert [p.a for p in ordered([one, back], ["y", "x"])] == ["x", "x"]
    nothing = pair(math.nan, "x")
    write_pairs(tmp_path / "judged.jsonl", [one, nothing])
    read = read_pairs(tmp_path / "judged.jsonl")
    assert read[0] == one and math.isnan(read[1].share) and read[1].people == nothing.people


def test_votes_are_found_by_the_texts_whatever_the_order():
    voted = pair(math.nan, "a", words=(2, 1), prompt=[{"role": "user", "content": "q"}])
    asked = [
        pair(1.0, words=(2, 1)),
        pair(0.0, words=(1, 2)),
        pair(1.0, prompt="other", words=(2, 1)),
    ]
    asked[1].answer_a, asked[1].answer_b = voted.answer_b, voted.answer_a
    assert add_votes(asked, [voted]) == 2
    assert [p.votes for p in asked[:2]] == [1.0, 0.0] and math.isnan(asked[2].votes)


def test_the_report_counts_what_was_asked_and_reads_as_a_table():
    pairs = [pair(1.0, "ab", str(i), (3, 1)) for i in range(12)]
    pairs.append(pair(math.nan, "", "x", (3, 1)))
    found = judge_report(pairs, "m <b>")
    assert (found["asked"], found["no_verdict"], found["consistency"]) == (13, 1, 1.0)
    (rate,) = found["win_rates"]
    assert (rate["a"], rate["b"], rate["voted"]) == ("sft", "ppo", 12)
    assert rate["judge"]["estimate"] == 0.0 and rate["corrected"]["estimate"] == 0.5
    text = "\n".join(markdown(found))
    assert "| sft over ppo | 0.0 %" in text and "13 of 13 pairs asked about" in text
    assert choice_of(0.5) == "tie"
    # a judge that nobody could read has no share of anything
    nothing = judge_report([pair(math.nan, "a", "1", (3, 1))], "m")
    assert nothing["no_verdict"] == 1 and nothing["agreement"] is None
    assert nothing["length"]["judge"] == {
        "longer": {"estimate": None, "low": None, "high": None, "pairs": 0}, "slope": None,
    }  # fmt: skip
    assert "1 without a verdict" in "\n".join(markdown(nothing))
