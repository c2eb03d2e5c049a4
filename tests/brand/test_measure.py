"""What an adapter forgets, measured on a model made in memory."""

import json

from rlhf.brand.measure import (
    CHOICES,
    MeasureConfig,
    begun,
    forgotten,
    held_out_rows,
    measure,
)
from rlhf.model.tokenizer import load_tokenizer


def test_a_policy_has_forgotten_nothing_beside_itself(base_path, tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [
        {"prompt": f"where is parcel {n}?", "completion": f"help of the red {text} thank you"}
        for n, text in enumerate(("lamp", "chair", "order", "parcel", "team"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = MeasureConfig(
        model_name_or_path=str(base_path),
        run=str(base_path),
        texts=[str(file)],
        task=[str(file)],
        output=str(tmp_path / "measures.json"),
        max_prompt_length=64,
        max_response_length=64,
    )
    found = measure(config)
    assert len(found["texts"]) == 5 and len(found["task"]) == 5 >= CHOICES
    whole = held_out_rows(config, config.texts, load_tokenizer(str(base_path)))
    for row, answer in zip(found["texts"], whole, strict=True):
        # the first token is given, EOS is predicted
        assert row["tokens"] == len(answer["response_ids"]) - 1 > 5
        assert row["base"] == row["run"] > 0
    assert json.loads((tmp_path / "measures.json").read_text()) == found
    gates = forgotten(found)
    assert (gates["perplexity"].estimate, gates["task"].estimate) == (1.0, 0.0)


def test_the_first_token_of_an_answer_is_given_since_a_greeting_would_take_its_place():
    rows = [{"group": "a", "prompt_ids": [1, 2], "response_ids": [3, 4, 5]}]
    empty = [{"group": "b", "prompt_ids": [1], "response_ids": [5]}]
    assert begun([*rows, *empty]) == [
        {"group": "a", "prompt_ids": [1, 2, 3], "response_ids": [4, 5]}
    ]
