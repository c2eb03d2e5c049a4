"""RewardBench 2's scores on rows worked by hand, and its rows read from a file."""

import json
import math

import pytest

from reward.cards.rewardbench import (
    Row,
    benchmark,
    best_is_right,
    read_rows,
    summary,
    ties,
    ties_score,
)
from rlhf.errors import UserError


def row(row_id, scores, correct=1, subset="Math"):
    answers = [f"answer {i}" for i in range(len(scores))]
    return Row(row_id, subset, "question", answers, correct, list(map(float, scores)))


def test_best_of_four():
    assert best_is_right(row("1", [3, 2, 1, 0])) == 1
    assert best_is_right(row("1", [2, 3, 1, 0])) == 0
    # three share the highest score, of which one is right
    assert best_is_right(row("1", [3, 3, 3, 0])) == pytest.approx(1 / 3)


def test_ties_by_hand():
    # question 1: tied right answers 4 and 3, wrong 1 -> margin 2, spread 1; ref margin 0.5
    # question 2: tied right answers 5 and 1, wrong 2 -> margin -1, spread 4; ref margin 3
    rows = [
        row("tied:1", [4, 3, 1], correct=2, subset="Ties"),
        row("ref:1", [1, 0.5, 0], subset="Ties"),
        row("tied:2", [5, 1, 2], correct=2, subset="Ties"),
        row("ref:2", [3, 0], subset="Ties"),
    ]
    # tied right 1/2, ref right 1, tied margin above spread 1/2, least margin (.5, -1) above it 0
    # tanh(.5 / 1 - 1), tanh(-1 / 4 - 1)
    close = (math.tanh(-0.5) + math.tanh(-1.25)) / 2
    expected = 0.3 * 0.5 + 0.3 + 0.2 * 0.5 + 0.01 * close
    found = ties(rows)
    assert found["score"] == pytest.approx(expected)
    assert found["prompts"] == 4 and found["low"] < expected < found["high"]


def test_ties_without_a_spread_or_a_partner():
    # equal right answers: margin / 0 counts as 1, 0 / 0 as 0
    sure = {"tied": row("tied:1", [2, 2, 1], 2), "ref": row("ref:1", [1, 0])}
    assert ties_score([sure]) == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01)
    level = {"tied": row("tied:1", [2, 2, 2], 2), "ref": row("ref:1", [1, 1])}
    assert ties_score([level]) == 0
    assert ties_score([{"ref": row("ref:1", [1, 0])}]) == pytest.approx(0.3)


def test_the_score_is_the_mean_over_subsets():
    rows = [row("1", [1, 0, 0, 0]), row("2", [0, 1, 0, 0]), row("3", [1, 0, 0, 0], subset="Focus")]
    found = summary(rows)
    assert found["score"] == pytest.approx((0.5 + 1) / 2)
    assert list(found["subsets"]) == ["Focus", "Math"]
    assert found["subsets"]["Focus"] == {"score": 1.0, "low": None, "high": None, "prompts": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


GOOD = {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}


def test_a_file_is_scored_and_rows_that_are_too_long_are_counted(reward_path, tmp_path):
    from reward.model import load_reward

    tied = {"id": "tied:1", "subset": "Ties", "prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]}  # fmt: skip
    long = GOOD | {"chosen": ["word " * 50]}
    file = write(tmp_path / "rows.jsonl", [GOOD, tied, long])
    reward = load_reward(reward_path, "cpu")
    found = benchmark(reward, file, 64, 32)
    assert found["left_out"] == 1 and list(found["subsets"]) == ["Math", "Ties"]
    # the same by the scores of each answer
    from rlhf.data.encode import encode_prompt, encode_response

    prompt = encode_prompt(reward.tokenizer, [{"role": "user", "content": "q"}])
    scores = reward.score_ids([prompt + encode_response(reward.tokenizer, x) for x in "abcd"])
    assert found["subsets"]["Math"]["score"] == float(scores[0] == max(scores))
    with pytest.raises(UserError, match="all 3 rows are too long"):
        benchmark(reward, file, 64, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": "a"}, "row 1: column 'chosen' is no list"),
        ({"rejected": []}, "column 'rejected'"),
        ({"prompt": None}, "column 'prompt' is no text"),
        ({"subset": "Ties"}, "id '1' of a row of Ties; expected 'ref:NUMBER'"),
    ],
)
def test_rows_of_another_form_are_refused_with_their_place(change, words, tmp_path):
    with pytest.raises(UserError) as caught:
        read_rows(write(tmp_path / "rows.jsonl", [GOOD | change]))
    assert words in str(caught.value)
