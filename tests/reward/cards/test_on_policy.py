"""Pairs of the policy beside the held-out ones, by hand."""

import numpy as np
import pytest

from reward.cards.on_policy import on_policy_card, same_policy, sampled_by
from reward.cards.pairs import ScoredPairs
from rlhf.data.records import Preference
from rlhf.data.store import Store


def scored(name, gaps):
    prompts = [[{"role": "user", "content": f"{name} {i}"}] for i in range(len(gaps))]
    pairs = [Preference(prompt=prompt, chosen="a", rejected="b") for prompt in prompts]
    zeros = np.zeros(len(gaps))
    return ScoredPairs(pairs, np.array(gaps, float), zeros, zeros + 3, zeros + 2)


def test_gold_labels_both_sides_of_the_comparison():
    policy, held_out = scored("new", [1, 1, 1, -1]), scored("old", [1, 2, -1, -2])
    # by votes 2 of 4 are right; gold says that the third pair is labelled wrongly, and is equal on
    # the last: 3 of 3
    by_votes = on_policy_card(policy, held_out, 2.0, "p.db", "votes")
    by_gold = on_policy_card(policy, held_out, 2.0, "p.db", "gold", np.array([0.5, 0.1, -0.2, 0]))
    assert by_votes["difference"]["mean"] == pytest.approx(0.75 - 0.5)
    assert by_gold["difference"]["mean"] == pytest.approx(0.75 - 1.0)
    assert by_gold["held_out"]["accuracy"] == 1 and by_gold["held_out"]["pairs"] == 3
    # gaps of 1 at a temperature of 2
    assert by_votes["calibration"]["after"]["log_loss"] == pytest.approx(
        (3 * np.log1p(np.exp(-0.5)) + np.log1p(np.exp(0.5))) / 4
    )


def test_a_store_of_the_start_policy_s_answers_is_on_policy_as_it_is(tmp_path):
    def store(name, *models):
        path = str(tmp_path / name)
        with Store.open(path, create=True) as opened:
            prompt = opened.add_prompt([{"role": "user", "content": "q"}])
            answers = [
                opened.add_response(prompt, f"text {i}", model=m) for i, m in enumerate(models)
            ]
            opened.add_comparison(*answers)
        return path

    own, mixed = store("own.db", "runs/sft", "runs/sft"), store("mixed.db", "runs/sft", "other")
    assert sampled_by([own, "pairs.jsonl"]) == {"runs/sft", None}
    accuracy = {"accuracy": 0.7, "low": 0.6, "high": 0.8, "n": 9, "pairs": 9}
    assert same_policy([own], "runs/sft", accuracy) == {
        "labels": "held-out", "source": "runs/sft", "accuracy": accuracy,
    }  # fmt: skip
    assert same_policy([mixed], "runs/sft", accuracy) is None
    assert same_policy([own, "pairs.jsonl"], "runs/sft", accuracy) is None
    assert same_policy([str(tmp_path / "gone.db")], "runs/sft", accuracy) is None
