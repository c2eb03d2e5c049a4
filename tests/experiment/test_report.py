"""A judge of pairs in the report of an experiment: who is asked about whom."""

import json
from types import SimpleNamespace

from rlhf.compare.summary import summarise
from rlhf.experiment.report import ask_judge, swept_to_ask
from tests.compare.results_example import make


def prefer_ppo(prompts, first, second):
    """Prefer the answers that PPO wrote, in whatever order they are shown."""
    return [
        0.5 + 0.5 * (a.startswith("ppo") - b.startswith("ppo"))
        for a, b in zip(first, second, strict=True)
    ]


def test_each_method_meets_the_others_and_the_initial_policy_at_its_tuned_value(tmp_path):
    results = make({"ppo": lambda d: 0.2 * d, "dpo": lambda d: 0.0 * d}, seeds=2, groups=6)
    report = summarise(results)
    judge = {"function": "tests.experiment.test_report:prefer_ppo"}
    config = SimpleNamespace(judge=judge, methods={"ppo": {}, "dpo": {}}, output_dir=str(tmp_path))
    asked = ask_judge(config, results, report)
    assert [(row["a"], row["b"], row["seeds"]) for row in asked["rows"]] == [
        ("ppo", "dpo", [0, 1]), ("ppo", "sft", [0, 1]), ("dpo", "sft", [0, 1]),
    ]  # fmt: skip
    json.dumps(asked)
    # Asked again, all answers are there
    lines = (tmp_path / "judge.jsonl").read_text()
    assert (
        ask_judge(config, results, report) == asked
        and (tmp_path / "judge.jsonl").read_text() == lines
    )
    assert swept_to_ask(report, "ppo") == report["tuned"]["methods"]["ppo"]["usual"]


def test_without_a_score_that_chooses_the_middle_value_is_asked():
    report = {
        "tuned": {"methods": {}},
        "methods": {"ppo": {"swept_values": [0.1, 0.2, 0.4]}, "dpo": {"swept_values": []}},
    }
    assert (swept_to_ask(report, "ppo"), swept_to_ask(report, "dpo")) == (0.2, None)
