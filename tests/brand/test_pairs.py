"""Prompts from templates, pairs by a voice, and pairs as votes leave them."""

import json

import pytest

from rlhf.brand.pairs import (
    CheckedConfig,
    PairsConfig,
    best_and_worst,
    checked,
    pair_key,
    pairs,
    turned,
)
from rlhf.brand.prompts import fill
from rlhf.data.load import load
from rlhf.data.records import Preference, Scores
from rlhf.data.store import Store
from rlhf.errors import UserError

PROMPT = [{"role": "user", "content": "Where is my mug?"}]
OTHER = [{"role": "user", "content": "Where is my jug?"}]


def test_templates_take_every_value_and_keep_it_as_a_fact():
    given = {
        "prompts": [
            "Hello?",
            {"prompt": "My {colour} {item} broke.", "metadata": {"remedy": "replace"}},
        ],
        "values": {"item": ["mug", "jug"], "colour": ["red"]},
    }
    rows = fill(given)
    assert [row["prompt"][0]["content"] for row in rows] == [
        "Hello?",
        "My red mug broke.",
        "My red jug broke.",
    ]
    assert rows[2]["metadata"] == {"remedy": "replace", "colour": "red", "item": "jug"}


def test_a_template_without_its_values_is_refused():
    with pytest.raises(UserError, match=r"'Where is my \{item\}' needs values for 'item'.*'items'"):
        fill({"prompts": ["Where is my {item}"], "values": {"items": ["mug"]}})
    with pytest.raises(UserError, match="templates: unknown key 'prompt'"):
        fill({"prompt": ["x"]})


def answer(prompt, text, **more):
    return {
        "prompt": prompt,
        "messages": PROMPT,
        "metadata": {"group": f"g{prompt}"},
        "text": text,
        "split": None,
    } | {
        "ended": 1,
        **more,
    }


def test_of_each_prompt_the_best_and_the_worst_make_a_pair():
    candidates = [
        answer(1, "good"),
        answer(1, "bad", ended=0),
        answer(1, "as good, by rule", by_rule=True),
        answer(2, "close"),
        answer(2, "closer"),
    ]
    rows, close = best_and_worst(candidates, [0.9, 0.2, 0.9, 0.5, 0.45], [False] * 5, 0.1)
    assert close == 1 and len(rows) == 1
    assert rows[0]["chosen"] == "good" and rows[0]["rejected"] == "bad"
    assert rows[0]["rejected_ended"] is False and "chosen_ended" not in rows[0]
    assert rows[0]["group"] == "g1"
    assert rows[0]["metadata"] == {"pair": {"better": 0.9, "worse": 0.2, "by_rule": False}}


def test_an_answer_that_refuses_is_never_the_better_one():
    candidates = [answer(1, "I'm unable to say"), answer(1, "good"), answer(1, "bad")]
    rows, close = best_and_worst(candidates, [0.9, 0.7, 0.2], [True, False, False], 0.1)
    assert (rows[0]["chosen"], rows[0]["rejected"], close) == ("good", "bad", 0)
    # it may be the worse one, and without another answer there is no pair
    rows, _ = best_and_worst(candidates, [0.1, 0.7, 0.2], [True, False, False], 0.1)
    assert rows[0]["rejected"] == "I'm unable to say"
    assert best_and_worst(candidates, [0.9, 0.7, 0.2], [True, True, True], 0.1) == ([], 1)


def test_a_pair_has_the_split_that_its_prompt_was_given():
    candidates = [answer(1, "good", split="validation"), answer(1, "bad", split="validation")]
    rows, _ = best_and_worst(candidates, [0.9, 0.2], [False, False], 0.1)
    assert rows[0]["split"] == "validation"


def test_pairs_of_a_store_with_answers_rewritten_by_rule(tmp_path, capsys):
    store = tmp_path / "answers.db"
    with Store.open(store, create=True) as opened:
        prompt = opened.add_prompt(PROMPT, metadata={"item": "mug"})
        for text in ("here it is", "somewhere"):
            opened.add_response(prompt, text, model="base", ended=True)
        prompt = opened.add_prompt(OTHER)
        opened.add_response(prompt, "cut off as it", model="base", ended=False)
    scores = {
        "here it is": 0.5,
        "somewhere": 0.3,
        "hello, here it is": 1.0,
        "hello, somewhere": 0.7,
    }

    def scorer(samples):
        return Scores([scores.get(text, 0.1) for text in samples.responses])

    config = PairsConfig(answers=str(store), voice="-", output=str(tmp_path / "pairs.jsonl"))
    rows = pairs(config, scorer, lambda text, metadata: f"hello, {text}")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("hello, here it is", "somewhere")
    ]
    assert (
        "1 pairs, of 1 the better answer is rewritten by rule; 1 prompts" in capsys.readouterr().out
    )
    (record,) = load(config.output, Preference)
    assert record.metadata["item"] == "mug"

    # "hello, somewhere" is now the best that does not refuse
    config.refusal_phrases = ["here it is"]
    (row,) = pairs(config, scorer, lambda text, metadata: f"hello, {text}")
    assert (row["chosen"], row["rejected"]) == ("hello, somewhere", "somewhere")
    assert "2 of 5 answers refuse" in capsys.readouterr().out

    config.margin = 0.8
    with pytest.raises(UserError, match=r"no prompt has two answers that differ by 0\.8"):
        pairs(config, scorer, lambda text, metadata: text)


def row_of(prompt, chosen, rejected):
    return {"prompt": prompt, "group": prompt[0]["content"], "chosen": chosen, "rejected": rejected}


def test_votes_keep_turn_or_leave_out_pairs(tmp_path):
    prompts = [[{"role": "user", "content": f"Where is mug {n}?"}] for n in range(4)]
    rows = [row_of(prompt, f"good {n}", f"bad {n}") for n, prompt in enumerate(prompts)]
    file, store = tmp_path / "pairs.jsonl", tmp_path / "check.db"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Store.open(store, create=True) as opened:
        ann = opened.add_annotator("sim-ann", kind="model")
        bob = opened.add_annotator("sim-bob", kind="model")
        for row, choices in zip(rows[:3], ("aa", "bb", "ab"), strict=True):
            prompt = opened.add_prompt(row["prompt"])
            sides = [opened.add_response(prompt, row[name]) for name in ("chosen", "rejected")]
            comparison = opened.add_comparison(*sides)
            for annotator, choice in zip((ann, bob), choices, strict=True):
                opened.vote(comparison, annotator, choice, left="a")
    output = tmp_path / "checked.jsonl"
    config = CheckedConfig(pairs=str(file), votes=str(store), output=str(output))
    report = checked(config)
    assert report == {
        **{"source": "simulated", "event": 6, "pairs": 4},
        **{"agreed": 1, "turned": 1, "without a winner": 1, "not judged": 1},
    }
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["chosen"] for row in kept] == ["good 0", "bad 1", "good 3"]
    assert json.loads((tmp_path / "checked.jsonl.check.json").read_text()) == report
    # as it was after the first pair's votes
    config.votes = f"{store}@2"
    assert checked(config) == {
        **{"source": "simulated", "event": 2, "pairs": 4, "agreed": 1, "not judged": 3},
    }


def test_pairs_that_cannot_be_read_are_one_message(tmp_path):
    file = tmp_path / "pairs.jsonl"
    config = CheckedConfig(pairs=str(file), votes="check.db", output=str(tmp_path / "out.jsonl"))
    for text in (None, "no JSON"):
        if text:
            file.write_text(text)
        with pytest.raises(UserError, match=r"pairs\.jsonl: no pairs can be read; make them with"):
            checked(config)


def test_a_turned_pair_takes_its_ends_with_it():
    row = {**row_of(PROMPT, "one", "two"), "rejected_ended": False}
    assert turned(row) == {**row_of(PROMPT, "two", "one"), "chosen_ended": False}
    assert pair_key(PROMPT, "one ", "two") == pair_key(PROMPT, "two", "one")
