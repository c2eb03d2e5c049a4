import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from rlhf.compare.report import print_table, write_report
from rlhf.compare.text import count, escape
from rlhf.config import UserError

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
            response=f"{word} | answer *{g}* <b>\nsample {s}",
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


META = {
    "seeds": {"run": [0], "world": [0]},
    "budgets": {"ppo": {"episodes": 4096, "flops": 3.2e15}, "dpo": {"episodes": 800}},
}


def report_of(tmp_path, policies, judge="gold", meta=META, kinds=KINDS, **options):
    return write_report(tmp_path, policies, kinds, judge, meta, **options)


def test_numbers_by_hand(tmp_path):
    # Two groups, two samples: gold sft (1, 2), ppo (3, 3): means 1.5 and 3, difference 1.5, both won; KL 2 +- 1
    # differences 2 and 1: se .5, t(.975, 1) = 12.7062: 1.5 +- 6.3531
    def two(gold, kl):
        return [
            Row([{"role": "user", "content": g}], g, s, "a b a b", 4, True, k, {"gold": v})
            for g, v, k in zip("xy", gold, kl, strict=True)
            for s in (0, 1)
        ]

    report = report_of(tmp_path, {"sft": two((1, 2), (0, 0)), "ppo": two((3, 3), (1, 3))}, kinds={"gold": "gold"})
    ppo = report["policies"]["ppo"]
    assert ppo["scores"]["gold"]["mean"]["estimate"] == 3.0
    assert ppo["scores"]["gold"]["difference"]["estimate"] == 1.5
    difference = ppo["scores"]["gold"]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((1.5 - 6.3531, 1.5 + 6.3531), abs=1e-4)
    assert (ppo["kl"]["estimate"], ppo["kl"]["se"]) == pytest.approx((2.0, 1.0), abs=1e-12)
    assert (ppo["length"], ppo["ended"]) == (4.0, 1.0)
    (pair,) = report["pairs"]
    assert (pair["a"], pair["b"], pair["win_rate"]["estimate"]) == ("ppo", "sft", 1.0)


def test_better_equal_and_worse_are_said_as_the_intervals_allow(tmp_path):
    report = report_of(tmp_path, three(ppo=0.9, dpo=0.5))
    duel, *to_sft, scope = report["verdict"]
    assert duel.startswith("ppo is better than dpo by the gold score: +0.4")
    assert [line.split(" by ")[0] for line in to_sft] == ["dpo is better than sft", "ppo is better than sft"]
    assert "equal KL" not in duel
    assert "40 groups (40 prompts, 2 samples each)" in scope
    assert "these trained models, not for the method: one run seed (0)" in scope

    duel = report_of(tmp_path, three(ppo=0.5, dpo=0.5))["verdict"][0]
    assert duel.startswith("Between ppo and dpo no difference can be shown by the gold score: ")

    report = report_of(tmp_path, three(ppo=-0.5, dpo=0.5, kl=(4.0, 9.0)))
    duel, _, ppo, overoptimised, _ = report["verdict"]
    assert duel.startswith("ppo is worse than dpo by the gold score: -0.997 [-1.0")
    assert "(KL 8.99 and 4.00 nats)" in duel and "not a comparison at equal KL" in duel
    assert ppo.startswith("ppo is worse than sft")
    assert overoptimised == "ppo raised its proxy (reward) while the gold score fell: the proxy was over-optimised."


def test_several_seeds_and_unknown_seeds_are_said(tmp_path):
    scope = report_of(tmp_path, three(), meta={"seeds": {"run": [2, 0, 1]}})["verdict"][-1]
    assert "Run seeds 0, 1, 2; the intervals do not hold the spread between runs." in scope
    assert "run seeds not given" in report_of(tmp_path, three(), meta={})["verdict"][-1]


def test_without_a_judge_it_says_that_it_cannot_judge(tmp_path):
    report = report_of(tmp_path, three(), judge=None)
    assert report["verdict"][0].startswith("No gold or referee score was given, so this report cannot judge")
    assert len(report["verdict"]) == 2
    assert all(pair["win_rate"] is None for pair in report["pairs"])
    assert "wins over" not in (tmp_path / "report.md").read_text()
    print_table(report)


def test_one_group_has_no_interval_and_says_so(tmp_path):
    one = {name: [r for r in policy if r.group == "g000"] for name, policy in three().items()}
    report = report_of(tmp_path, one)
    assert report["verdict"][0].startswith("Between ppo and dpo nothing can be shown by the gold score: with one group")


@pytest.mark.parametrize("groups", [2, 4, 5])
def test_below_five_groups_there_is_no_verdict(tmp_path, groups):
    few = {name: [r for r in policy if int(r.group[1:]) < groups] for name, policy in three(ppo=-9.0).items()}
    report = report_of(tmp_path, few)
    text = " ".join(report["verdict"])
    said = "is worse than" in text, "over-optimised" in text, "groups are too few, a verdict needs 5" in text
    assert said == ((True, True, False) if groups == 5 else (False, False, True))
    assert report["policies"]["ppo"]["scores"]["gold"]["difference"]["high"] < 0  # the interval is shown all the same


def test_with_one_sample_a_prompt_there_is_no_win_rate_and_the_report_says_so(tmp_path):
    one = {name: [r for r in policy if r.sample == 0] for name, policy in three(ppo=0.9).items()}
    report = report_of(tmp_path, one)
    assert all(pair["win_rate"] is None for pair in report["pairs"])
    assert report["verdict"][0].startswith("ppo is better than dpo") and "wins" not in report["verdict"][0]
    assert "No win rate is given" in report["verdict"][-1]
    assert "No win rate" not in " ".join(report_of(tmp_path, three())["verdict"])
    print_table(report)


def test_files(tmp_path):
    report = report_of(tmp_path, three(), tie_margin=0.01)
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert saved == json.loads(json.dumps(report))
    for name in ("frontier.png", "scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# dpo, ppo against sft\n\n- Between ppo and dpo")
    assert "| reward (**proxy**) |" in page
    assert "| ppo | 4.1k | 3.20e+15 |" in page and "| dpo | 800 | – |" in page
    assert "(a tie: at most 0.01 apart)" in page
    assert r"ppo \| answer \*" in page and "<b>" not in page  # sampled text cannot break the table
    assert "*(cut off)*" not in page  # sample 0 of each prompt ended
    widths = {line.count("|") - line.count("\\|") for line in page.splitlines() if line.startswith("| gold (judge)")}
    assert widths == {7}  # score, three means, two differences


def test_samples_are_the_same_prompts_whatever_the_order_of_rows(tmp_path):
    policies = three()
    first = report_of(tmp_path, policies)
    second = report_of(tmp_path, {name: policy[::-1] for name, policy in policies.items()})
    assert first == second
    assert len(first["samples"]) == 3
    for sample in first["samples"]:
        assert list(sample["responses"]) == ["sft", "dpo", "ppo"]
        assert all("sample 0" in r["response"] for r in sample["responses"].values())


def test_what_cannot_be_compared_is_refused(tmp_path):
    policies = three()
    short = {**policies, "ppo": [r for r in policies["ppo"] if r.group != "g007"]}
    with pytest.raises(
        UserError, match=r"'ppo' and 'sft' do not cover the same prompts: 0 only in 'ppo', 1 only in 'sft'"
    ):
        report_of(tmp_path, short)
    with pytest.raises(UserError, match=r"the judge 'reward' is of kind 'proxy'; only a gold or referee score"):
        report_of(tmp_path, policies, judge="reward")
    with pytest.raises(UserError, match=r"judge 'golf' is not among the scores\. Did you mean 'gold'\?"):
        report_of(tmp_path, policies, judge="golf")
    with pytest.raises(UserError, match=r"80 of 80 rows of 'sft' have no finite score 'clarity'"):
        report_of(tmp_path, policies, kinds={**KINDS, "clarity": "other"})
    with pytest.raises(UserError, match=r"kind 'golden', expected one of gold"):
        report_of(tmp_path, policies, kinds={"gold": "golden"})
    with pytest.raises(UserError, match=r"policy 'dpo' has no evaluation rows"):
        report_of(tmp_path, {**policies, "dpo": []})
    with pytest.raises(UserError, match=r"no policy given"):
        report_of(tmp_path, {})
    policies["ppo"][3].kl = float("nan")
    with pytest.raises(UserError, match=r"1 of 80 rows of 'ppo' have a KL that is not a finite number"):
        report_of(tmp_path, policies)
    assert not list(Path(tmp_path).iterdir())  # refused before anything is written


def test_the_printed_table_holds_the_numbers(tmp_path, capsys):
    report = report_of(tmp_path, three(ppo=0.9))
    print_table(report, tmp_path)
    out = capsys.readouterr().out
    mean = report["policies"]["ppo"]["scores"]["gold"]["mean"]["estimate"]
    for text in (f"{mean:.3f} [", "ppo over dpo", "ppo is better than dpo by the gold score", "report.md"):
        assert text in out


def test_short_numbers():
    assert [count(x) for x in (None, 0, 512, 4096, 1.25e6, 3.2e12, 3.2e15)] == [
        "–", "0", "512", "4.1k", "1.25M", "3.2T", "3.20e+15",
    ]  # fmt: skip
    assert escape("a|b\n<i>") == "a\\|b<br>&lt;i&gt;"


def test_a_mean_that_a_few_comparisons_decide_is_hedged(tmp_path):
    # ppo loses 30 of 40 groups by 0.5 and wins 10 by 5, noise 0.1 sqrt 2: mean +0.875, win rate 25 %
    policies = {"sft": rows(0.0, seed=1), "ppo": rows(0.0, seed=1)}
    for row in policies["ppo"]:
        row.scores["gold"] += 5.0 if int(row.group[1:]) % 4 == 0 else -0.5
    (line, _) = report_of(tmp_path, policies)["verdict"]
    assert line.startswith("ppo is better than sft by the gold score: +0.875 ")
    assert "ppo wins 25.0 %" in line and line.endswith("Mean and win rate disagree: a few comparisons decide the mean.")


def test_annotators_stand_in_the_report_where_their_votes_are_given(tmp_path):
    from rlhf.data.agreement import agreement_summary
    from rlhf.data.votes import Vote

    votes = [Vote(i, i // 2, "ab"[i % 2], "ab"[i % 3 == 0], left="a") for i in range(40)]
    report_of(tmp_path / "with", three(), meta=META | {"annotators": agreement_summary(votes)})
    report_of(tmp_path / "without", three())
    text = (tmp_path / "with" / "report.md").read_text()
    assert "## Annotators" in text and "Krippendorff's alpha" in text and "20 of 20 pairs" in text
    assert "## Annotators" not in (tmp_path / "without" / "report.md").read_text()
