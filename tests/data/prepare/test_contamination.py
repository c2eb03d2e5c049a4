import json

import pytest

from rlhf.data.prepare.contamination import find_leaks, read_evaluation
from rlhf.data.records import Instruction, Preference
from rlhf.errors import UserError

TEST = "Please explain in a few words why the sea is salty and the rivers are not"
GOOD = "Rivers carry a little salt from the rocks into the sea, where only the water leaves again by the sun"
BAD = "Because somebody long ago put a great deal of salt in it and then forgot all about it, I would suppose"


@pytest.fixture()
def evaluation(tmp_path):
    rows = [
        {"prompt": TEST, "chosen": GOOD, "rejected": BAD},
        {
            "messages": [
                {"role": "user", "content": "Hi there"},
                {"role": "assistant", "content": "Yes."},
            ]
        },
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_evaluation([str(tmp_path / "test.jsonl")], 5)


def pair(prompt, chosen="one answer", rejected="another"):
    return Preference(
        prompt=[{"role": "user", "content": prompt}], chosen=chosen, rejected=rejected
    )


def found(rows, evaluation, overlap=0.5):
    return [
        (leak.row, leak.what, round(leak.share, 3))
        for leak in find_leaks(rows, evaluation, overlap)
    ]


def test_the_same_prompt_leaks_however_it_is_written(evaluation):
    assert found([pair("hi  THERE"), pair("hi their"), pair(TEST.upper())], evaluation) == [
        (0, "prompt", 1.0),
        (2, "prompt", 1.0),
    ]
    assert evaluation.rows == 2


def test_overlap_by_hand(evaluation):
    # the prompt has 16 words, so 12 5-grams; one word exchanged in the middle takes 5 of them: 7 /
    # 12
    assert len(TEST.split()) == 16
    assert found([pair(f"Well: {TEST.replace('why', 'how')}?")], evaluation) == [
        (0, "prompt", round(7 / 12, 3))
    ]
    assert found([pair(f"Well: {TEST.replace('why', 'how')}?")], evaluation, overlap=0.6) == []


def test_a_short_prompt_counts_inside_a_longer_one_from_five_words_on(tmp_path):
    rows = [{"prompt": "Write a poem about snow"}, {"prompt": "Tell a joke"}]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = read_evaluation([str(tmp_path / "short.jsonl")], 8)
    rows = [
        pair("Please: write a poem about snow, today"),
        pair("Please tell a joke to us"),
        pair("Tell a JOKE"),
    ]
    assert found(rows, evaluation) == [(0, "prompt", 1.0), (2, "prompt", 1.0)]


def conversation(*turns):
    roles = ("user", "assistant") * len(turns)
    prompt = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Preference(prompt=prompt, chosen="one answer", rejected="another")


def test_what_stands_inside_a_prompt_leaks(evaluation):
    rows = [
        # a whole prompt as an earlier turn, however short
        conversation("Hi there", "Hello.", "And now?"),
        conversation("And you?", f"You ask: {TEST}", "Yes"),  # in the assistant's turn
        conversation("And you?", GOOD, "Shorter, please"),  # an answer as an earlier one
        pair(f"Make this shorter: {GOOD}"),
        conversation("And you?", "Hi there", "Yes"),  # what everybody says
        pair("Make this shorter: yes."),
    ]
    leaked = [(0, "prompt", 1.0), (1, "prompt", 1.0), (2, "answer", 1.0), (3, "answer", 1.0)]
    assert found(rows, evaluation, overlap=1.0) == leaked


def test_what_stands_inside_a_prompt_of_the_evaluation_leaks(tmp_path):
    first, long = (
        "Why is the sea salty?",
        "Write a letter to the town about the broken lamp in our street",
    )
    rows = [
        {
            "messages": [
                {"role": r, "content": t}
                for r, t in zip("uau", (first, GOOD, "Shorter"), strict=True)
            ]
        },
        {"prompt": f"You are a helpful clerk. {long} and sign it with my name."},
    ]
    for message in rows[0]["messages"]:
        message["role"] = {"u": "user", "a": "assistant"}[message["role"]]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = read_evaluation([str(tmp_path / "test.jsonl")], 8)
    leaked = [(0, "prompt", 1.0), (1, "prompt", 1.0), (2, "answer", 1.0)]
    rows = [
        pair(first),
        pair(f"{long}!"),
        pair("q", GOOD, f"{GOOD}!"),
        pair("Shorter"),
        pair("Write a letter"),
    ]
    assert found(rows, evaluation, overlap=1.0) == leaked


def test_a_near_duplicate_of_a_prompt_leaks(evaluation):
    row = pair(TEST.replace("why", "hwy").replace("salty", "salt"))
    assert find_leaks([row], evaluation, 0.7) == []
    (leak,) = find_leaks([row], evaluation, 0.7, near=0.6)
    assert leak.what == "prompt" and leak.text == TEST and 0.6 <= leak.share < 1


def test_both_answers_of_a_pair_must_be_the_evaluations(evaluation):
    assert found(
        [pair("q", GOOD, BAD), pair("q", BAD, GOOD), pair("q", GOOD, "mine")], evaluation
    ) == [
        (0, "answer", 1.0),
        (1, "answer", 1.0),
    ]


def test_a_short_answer_is_everybodys(evaluation):
    hi = [{"role": "user", "content": "q"}]
    rows = [Instruction(prompt=hi, response="yes."), Instruction(prompt=hi, response=f"{GOOD}!")]
    assert found(rows, evaluation) == [(1, "answer", 1.0)]


def test_two_short_answers_are_everybodys_too(tmp_path):
    rows = [
        {"prompt": TEST, "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Which of the two?", "chosen": "Yes.", "rejected": BAD},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = read_evaluation([str(tmp_path / "test.jsonl")], 5)
    rows = [
        pair("Is it so?", "Yes.", "No."),
        pair(TEST, "Yes.", "No."),
        pair("Is it so?", "YES.", BAD),
    ]
    assert found(rows, evaluation) == [(1, "prompt", 1.0), (2, "answer", 1.0)]


def test_an_evaluation_that_cannot_be_read_stops(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match=r"no row of this evaluation can be read \(1 bad\)"):
        read_evaluation([str(tmp_path / "bad.jsonl")], 5)
