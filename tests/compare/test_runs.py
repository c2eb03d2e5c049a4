"""Single runs compared: each is a method of its own, with one nominal seed, and intervals are over
groups.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from rlhf.compare.measure import results_of_runs
from rlhf.compare.summary import summarise
from rlhf.errors import UserError

KINDS = {"gold": "gold", "reward": "proxy", "politeness": "other"}


@dataclass
class Row:
    """The fields of an evaluation row."""

    prompt: list
    group: str
    sample: int
    response: str
    length: int
    ended: bool
    kl: float
    scores: dict
    metadata: dict = field(default_factory=dict)


def rows(effect, proxy=0.0, kl=0.0, groups=40, samples=2, seed=0, word="yes"):
    """Gold = difficulty of the group (the same for all policies) + effect + noise."""
    rng = np.random.default_rng(seed)
    difficulty = np.random.default_rng(99).normal(size=groups)
    return [
        Row(
            prompt=[{"role": "user", "content": f"question {g}?"}],
            group=f"g{g:03}",
            sample=s,
            response=f"{word} answer {g} sample {s}",
            length=10 + s,
            ended=s == 0,
            kl=kl + 0.1 * rng.normal(),
            scores={
                "gold": difficulty[g] + effect + 0.1 * rng.normal(),
                "reward": difficulty[g] + proxy + 0.1 * rng.normal(),
                "politeness": 0.5,
            },
        )
        for g in range(groups)
        for s in range(samples)
    ]


def three(ppo=0.5, dpo=0.5, proxy=1.0, kl=(4.0, 4.0)):
    return {
        "sft": rows(0.0, seed=1, kl=0.0),
        "dpo": rows(dpo, proxy, kl[0], seed=2, word="dpo"),
        "ppo": rows(ppo, proxy, kl[1], seed=3, word="ppo"),
    }


def report_of(policies, judge="gold", kinds=KINDS):
    meta = {"budgets": {name: {"episodes": 100.0} for name in policies}, "seeds": {"run": [0]}}
    return summarise(
        results_of_runs([f"none/{name}" for name in policies], policies, kinds, judge, meta)
    )


def verdicts_of(report, kind="tuned"):
    return {(v["a"], v["b"]): v for v in report["verdicts"] if v["kind"] == kind}


def test_numbers_by_hand():
    # Two groups, two samples: gold sft (1, 2), ppo (3, 3): means 1.5 and 3, difference 1.5, both
    # won; KL 2 +- 1 differences 2 and 1: se .5, t(.975, 1) = 12.7062: 1.5 +- 6.3531
    def two(gold, kl):
        return [
            Row([{"role": "user", "content": g}], g, s, "a b a b", 4, True, k, {"gold": v})
            for g, v, k in zip("xy", gold, kl, strict=True)
            for s in (0, 1)
        ]

    report = report_of(
        {"sft": two((1, 2), (0, 0)), "ppo": two((3, 3), (1, 3))}, kinds={"gold": "gold"}
    )
    (ppo,) = report["points"]
    assert ppo["scores"]["gold"]["mean"]["estimate"] == 3.0
    difference = ppo["scores"]["gold"]["difference"]
    assert (difference["estimate"], difference["seeds"], difference["groups"]) == (1.5, 1, 2)
    assert (difference["low"], difference["high"]) == pytest.approx(
        (1.5 - 6.3531, 1.5 + 6.3531), abs=1e-4
    )
    assert (ppo["kl"]["estimate"], ppo["kl"]["se"]) == pytest.approx((2.0, 1.0), abs=1e-12)
    assert (ppo["length"]["estimate"], ppo["ended"]["estimate"]) == (4.0, 1.0)
    # 4 responses of 3 word pairs each: "a b" and "b a" over 12
    assert ppo["numbers"]["distinct_2"] == pytest.approx(2 / 12)
    assert report["wins"]["raw"][1][0]["estimate"] == 1.0
    # 2 of 2 groups won, at t(.975, 1): 1 / (1 + 12.7062^2 / 2)
    assert report["wins"]["raw"][1][0]["low"] == pytest.approx(1 / (1 + 12.7062**2 / 2), abs=1e-6)


def test_what_is_not_there_is_empty():
    report = report_of(three())
    assert (report["kind"], report["scope"], report["unit"]["seeds"]) == ("runs", "models", [0])
    assert (
        report["curves"] == {}
        and report["overoptimisation"] == []
        and report["frontier"][0]["rows"] == []
    )
    assert set(report["methods"]) == {"dpo", "ppo"} and report["initial_policy"]["method"] == "sft"
    assert report["initial_policy"]["budget"] == {"episodes": 100.0}
    assert [row["total"] for row in report["budget"]["rows"]] == [{"episodes": 100.0}] * 2
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_better_equal_and_worse_are_verdicts_on_these_runs():
    found = verdicts_of(report_of(three(ppo=0.9, dpo=0.5)))
    assert {pair: v["sign"] for pair, v in found.items()} == {
        ("dpo", "ppo"): -1,
        ("dpo", "sft"): 1,
        ("ppo", "sft"): 1,
    }
    assert found["ppo", "sft"]["difference"]["estimate"] == pytest.approx(0.9, abs=0.1)
    # Student's p of each alone, Holm's over the three
    assert all(v["p_adjusted"] >= v["difference"]["p"] for v in found.values())
    assert verdicts_of(report_of(three(ppo=0.5, dpo=0.5)))["dpo", "ppo"]["sign"] == 0
    assert verdicts_of(report_of(three(ppo=-0.5)))["ppo", "sft"]["sign"] == -1


def test_a_proxy_that_rose_while_the_judge_fell_was_exploited():
    (found,) = verdicts_of(report_of(three(ppo=-0.5)), "exploited_proxy").values()
    assert (found["a"], found["b"], found["sign"]) == ("ppo", "sft", -1)
    assert found["evidence"]["proxies"]["reward"]["low"] > 0 > found["difference"]["high"]
    assert verdicts_of(report_of(three(ppo=-0.5, proxy=-1.0)), "exploited_proxy") == {}


def test_a_mean_that_a_few_comparisons_decide_is_marked():
    policies = three(ppo=-0.2)
    for row in policies["ppo"]:
        # 10 of 40 groups win by far, the others lose by a little
        row.scores["gold"] += 3.0 * (row.group < "g010")
    found = verdicts_of(report_of(policies))["ppo", "sft"]
    assert (found["sign"], found["reservation"]) == (1, "win_rate")


def test_without_a_judge_nothing_is_decided():
    report = report_of(three(), judge=None)
    assert report["verdicts"] == [] and report["wins"] is None
    assert report["notes"] == [{"kind": "no_judge", "proxies": ["reward"]}]


@pytest.mark.parametrize("groups", [1, 2, 4, 5])
def test_below_five_groups_there_is_no_verdict(groups):
    policies = three(ppo=-9.0)
    few = {
        name: [row for row in own if int(row.group[1:]) < groups] for name, own in policies.items()
    }
    report = report_of(few)
    assert verdicts_of(report)["ppo", "sft"]["sign"] == (-1 if groups == 5 else None)
    assert bool(verdicts_of(report, "exploited_proxy")) == (groups == 5)
    assert ({"kind": "few_groups", "groups": groups, "needed": 5} in report["notes"]) == (
        groups < 5
    )
    difference = report["points"][1]["scores"]["gold"]["difference"]
    # shown all the same
    assert difference["low"] is None if groups == 1 else difference["high"] < 0


def test_with_one_sample_a_prompt_there_is_no_win_rate():
    one = {name: [row for row in own if row.sample == 0] for name, own in three(ppo=0.9).items()}
    report = report_of(one)
    assert not any(cell for row in report["wins"]["raw"] for cell in row)
    assert {"kind": "no_win_rate"} in report["notes"] and verdicts_of(report)["ppo", "sft"][
        "sign"
    ] == 1


def test_the_order_of_rows_does_not_matter():
    policies = three()
    first = report_of(policies)
    second = report_of({name: own[::-1] for name, own in policies.items()})
    assert first["samples"] == second["samples"] and len(first["samples"]) == 3
    for sample in first["samples"]:
        assert list(sample["responses"]) == ["sft", "dpo", "ppo"]
        assert all("sample 0" in response["response"] for response in sample["responses"].values())
    assert first["points"] == second["points"]


def test_what_cannot_be_compared_is_refused():
    policies = three()
    with pytest.raises(
        UserError, match=r"the judge 'reward' is of kind 'proxy'; only a gold or referee score"
    ):
        report_of(policies, judge="reward")
    with pytest.raises(
        UserError, match=r"80 of 80 responses of 'sft' have no finite score 'clarity'"
    ):
        report_of(policies, kinds={**KINDS, "clarity": "other"})
    policies["ppo"][3].kl = float("nan")
    with pytest.raises(UserError, match=r"1 of 80 responses of 'ppo' have no finite KL"):
        report_of(policies)
