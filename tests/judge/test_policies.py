"""A judge of pairs in the report of an experiment or of runs: who is asked about whom, and what people's
votes add.
"""

import json

import pytest

from rlhf.compare.summary import summarise
from rlhf.data.store import Store
from rlhf.judge.pairs import read_pairs
from rlhf.judge.policies import judge_policies, swept_to_ask
from rlhf.report.tables import judge_itself, judge_of_pairs
from tests.compare.results_example import make

SPEC = {"function": "tests.judge.test_policies:prefer_ppo"}


def prefer_ppo(prompts, first, second):
    """Prefer the answers that PPO wrote, in whatever order they are shown."""
    return [
        0.5 + 0.5 * (a.startswith("ppo") - b.startswith("ppo"))
        for a, b in zip(first, second, strict=True)
    ]


def test_each_method_meets_the_others_and_the_initial_policy_at_its_tuned_value(tmp_path):
    results = make({"ppo": lambda d: 0.2 * d, "dpo": lambda d: 0.0 * d}, seeds=2, groups=6)
    report = summarise(results)
    asked = judge_policies(SPEC, ["ppo", "dpo"], results, report, tmp_path)
    assert [(row["a"], row["b"], row["seeds"]) for row in asked["rows"]] == [
        ("ppo", "dpo", [0, 1]), ("ppo", "sft", [0, 1]), ("dpo", "sft", [0, 1]),
    ]  # fmt: skip
    json.dumps(asked)
    # Asked again, all answers are there
    lines = (tmp_path / "judge.jsonl").read_text()
    assert judge_policies(SPEC, ["ppo", "dpo"], results, report, tmp_path) == asked
    assert (tmp_path / "judge.jsonl").read_text() == lines
    assert swept_to_ask(report, "ppo") == report["tuned"]["methods"]["ppo"]["usual"]
    # sample 0 of ppo ("ppo a") meets sample 1 of sft ("b"), sample 1 ("b") meets "sft a"
    pairs = [
        pair for pair in read_pairs(tmp_path / "judged.jsonl") if (pair.a, pair.b) == ("ppo", "sft")
    ]
    assert len(pairs) == 2 * 6 * 2 and {pair.share for pair in pairs} == {1.0, 0.5}
    assert not any(row["corrected"] for row in asked["rows"])


def test_votes_on_the_same_answers_correct_the_win_rates(tmp_path):
    results = make({"ppo": lambda d: 0.2 * d}, seeds=1, groups=24)
    report = summarise(results)
    with Store.open(tmp_path / "votes.db", create=True) as store, store.transaction():
        people = [store.add_annotator(name) for name in ("ann", "bela")]
        for group in range(12):
            prompt = store.add_prompt([{"role": "user", "content": f"question g{group:02}?"}])
            a = store.add_response(prompt, "b", model="x")
            b = store.add_response(prompt, "ppo a", model="y")
            for person in people:
                # the answer of ppo wins in two thirds of the prompts
                store.vote(store.add_comparison(a, b), person, "b" if group % 3 else "a")
    asked = judge_policies(
        SPEC, ["ppo"], results, report, tmp_path / "out", votes=str(tmp_path / "votes.db")
    )
    (row,) = asked["rows"]
    # the judge says the same on every prompt, so that its weight is 0: the mean of the votes
    assert row["corrected"]["estimate"] == pytest.approx(2 / 3) and row["corrected"]["weight"] == 0
    assert (row["corrected"]["labelled"], row["corrected"]["groups"]) == (12, 24)
    found = asked["judge"]["agreement"]
    # it agrees where ppo wins; ann and bela always agree
    assert found["all"]["judge"]["estimate"] == pytest.approx(2 / 3)
    assert found["all"]["people"]["estimate"] == 1.0
    report["judge_of_pairs"] = asked
    assert judge_of_pairs(report).rows[0][-1].startswith("66.7 % [")
    assert [row[0] for row in judge_itself(report).rows][:2] == [
        "agreement", "agreement where both took a side",
    ]  # fmt: skip


def test_without_a_score_that_chooses_the_middle_value_is_asked():
    report = {
        "tuned": {"methods": {}},
        "methods": {"ppo": {"swept_values": [0.1, 0.2, 0.4]}, "dpo": {"swept_values": []}},
    }
    assert (swept_to_ask(report, "ppo"), swept_to_ask(report, "dpo")) == (0.2, None)
