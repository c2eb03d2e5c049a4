import copy

import pytest

from rlhf.compare.markdown import markdown
from rlhf.compare.phrases import digits, interval, listed
from rlhf.compare.words import budget, equal_kl, overoptimised, power, scope, sentences, tuned, wins


def number(estimate, low, high, p=0.001, seeds=5, groups=256):
    return {
        "estimate": estimate, "low": low, "high": high, "se": 0.1, "p": p, "seeds": seeds, "groups": groups,
    }  # fmt: skip


def row(kl, estimate, low, high, p_adjusted, **rest):
    return {
        "kl": kl,
        "difference": number(estimate, low, high, **rest),
        "p_adjusted": p_adjusted,
        "minimum_detectable_effect": 0.1,
    }


def pair(*rows, overlap=(1.2, 7.5)):
    return {
        "a": "ppo", "b": "dpo", "seeds": [0, 1, 2, 3, 4], "overlap": overlap, "rows": list(rows), "sensitivity": [],
        "ranges": {"ppo": [5.0, 12.0], "dpo": [0.0, 3.0]},
    }  # fmt: skip


def report(**changes):
    base = {
        "name": "hand-made",
        "judge": "gold",
        "score_kinds": {"gold": "gold", "reward": "proxy"},
        "scope": "method",
        "unit": {"seeds": [0, 1, 2, 3, 4], "groups": 256, "prompts": 256, "samples_per_prompt": 2, "level": 0.95},
        "methods": {
            "sft": {"program": "sft", "swept": None, "swept_values": [], "baseline": True, "trials": 0},
            "ppo": {"program": "ppo", "swept": "kl_coef", "swept_values": [0.1, 0.4], "baseline": False, "trials": 4},
            "dpo": {"program": "dpo", "swept": "beta", "swept_values": [0.3, 1.0], "baseline": False, "trials": 4},
        },
        "missing": [],
        "foundation": {"method": "sft", "kl": number(0, 0, 0), "scores": {}, "length": None, "words": None,
                       "ended": None, "repetition": None, "numbers": {}},
        "points": [],
        "curves": {},
        "frontier": [pair(row(2, 0.01, -0.05, 0.07, 0.7), row(6, 0.12, 0.03, 0.21, 0.02))],
        "wins": None,
        "tuned": {"methods": {}, "rows": []},
        "overoptimisation": [],
        "budget": {"match": None, "rows": [], "matched": None},
        "power": {"win_rate": 0.55, "pairs_needed": 783, "power": 0.8},
        "samples": [],
        "sentences": [],
        "meta": {},
    }  # fmt: skip
    return {**copy.deepcopy(base), **changes}


def first(*rows, **rest):
    (line,) = equal_kl(pair(*rows, **rest), report())
    return line


def test_the_sentence_says_what_the_numbers_say():
    assert first(row(2, 0.01, -0.05, 0.07, 0.7), row(6, 0.12, 0.03, 0.21, 0.02)) == (
        "At KL 6 nats PPO is ahead of DPO by 0.12 [0.03, 0.21] by the gold score (5 seeds x 256 prompts); at 2 nats no "
        "difference can be shown: +0.01 [-0.05, 0.07]; as much as 0.07 could hide in the intervals. Both methods' "
        "checkpoints cover KL 1.2 to 7.5 nats; outside of it nothing is said."
    )


def test_the_side_that_is_behind_is_named():
    line = first(row(2, 0.1, 0.05, 0.15, 0.01), row(6, -0.12, -0.21, -0.03, 0.02))
    assert line.startswith("At KL 2 nats PPO is ahead of DPO by 0.10 [0.05, 0.15] by the gold score")
    assert "; at KL 6 nats it is behind DPO by 0.12 [0.03, 0.21]. Both" in line and "no difference" not in line


def test_nothing_is_shown_that_does_not_survive_the_correction():
    line = first(row(6, 0.12, 0.03, 0.21, 0.08))
    assert "ahead" not in line and "no difference can be shown between PPO and DPO" in line
    assert "the interval leaves out 0, but not after correcting" in line


def test_what_could_hide_is_the_larger_end_of_the_widest_interval():
    assert "as much as 0.30 could hide" in first(row(2, 0.0, -0.3, 0.2, 1.0), row(6, 0.1, -0.05, 0.25, 0.4))


def test_where_the_form_of_the_curve_decides_the_sentence_says_so():
    found = pair(row(6, 0.12, 0.03, 0.21, 0.02))
    found["sensitivity"] = [{"kl": 6, "difference": number(0.02, -0.1, 0.14)}]
    assert "rests on the form of the curve" in equal_kl(found, report())[0]
    found["sensitivity"] = [{"kl": 6, "difference": number(-0.02, -0.1, 0.06)}]
    against = equal_kl(found, report())[0]
    assert "ahead" not in against and "lines from point to point contradict" in against
    found["sensitivity"] = [{"kl": 6, "difference": number(0.1, 0.02, 0.18)}]
    assert "form of the curve" not in equal_kl(found, report())[0]


def test_without_overlap_nothing_is_said_of_the_methods():
    line = first(overlap=None)
    assert line == (
        "The KL ranges of PPO and DPO do not overlap (PPO covers 5 to 12 nats, DPO covers 0 to 3 nats), so nothing can "
        "be said at equal KL."
    )


def test_two_seeds_speak_of_the_trained_models():
    line = first(row(6, 0.12, 0.03, 0.21, 0.02, seeds=2))
    assert line.startswith(
        "At KL 6 nats PPO differs from DPO by +0.12 [0.03, 0.21] by the gold score (these trained models: 2 seeds x "
        "256 prompts); fewer than 3 run seeds allow no verdict on the methods. Both"
    )
    unit = report()["unit"] | {"seeds": [0, 1]}
    assert scope(report(scope="models", unit=unit)).startswith(
        "All of this holds for these trained models, not for the"
    )
    assert "trained models" not in scope(report()) and "5 run seeds and 256 prompts" in scope(report())
    assert "outlier" not in scope(report())
    three = scope(report(unit=unit | {"seeds": [0, 1, 2]}))
    assert three.endswith("3 seeds can hardly show that one of them is an outlier.")


def test_checkpoints_on_the_way_are_shown_without_a_verdict():
    found = pair(row(6, 0.12, 0.03, 0.21, 0.02))
    found["path"] = {"overlap": [0.8, 7.5], "rows": [row(2, 0.3, 0.2, 0.4, None), row(4, -0.1, -0.2, 0.05, None)]}
    assert equal_kl(found, report())[1] == (
        "Over all checkpoints on the way, which have not spent the same, from KL 0.8 to 7.5 nats: PPO over DPO at KL 2 "
        "and 4 nats: +0.30 [0.20, 0.40] and -0.10 [-0.20, 0.05], without a verdict."
    )


def test_an_outlier_is_named():
    run = {"method": "ppo", "swept": 0.1, "seed": 3, "score": 0.1234, "others": [0.55, 0.5812]}
    line = sentences(report(outliers=[run]))[1]
    assert line.startswith(
        "Seed 3 of PPO (kl_coef 0.1) is an outlier by the gold score: 0.123, the other seeds 0.55 to 0.581. Intervals"
    )


def test_without_a_judge_no_method_is_ahead():
    lines = sentences(report(judge=None, frontier=[], power=None))
    assert "cannot judge which method is better" in lines[0] and "(reward)" in lines[0]
    assert not any(word in " ".join(lines) for word in ("ahead", "behind", "wins"))


def test_missing_trials_are_counted():
    missing = [{"method": "ppo", "swept": 0.1, "seed": s} for s in range(6)]
    line = sentences(report(missing=missing))[1]
    assert line.startswith("6 trials have not ended (PPO (kl_coef 0.1) seed 0,") and "and 2 more" in line


TUNED = {
    "ppo": {"shares": {"0.1": 1.0}, "kl": number(8.1, 8, 8.2), "usual": 0.1},
    "dpo": {"shares": {"0.3": 0.4, "0.5": 0.6}, "kl": number(3.24, 3, 3.5), "usual": 0.5},
}


def test_tuned_methods_stand_at_their_own_kl():
    entry = {"a": "ppo", "b": "dpo", "difference": number(0.3, 0.1, 0.5), "p_adjusted": 0.01,
             "minimum_detectable_effect": 0.28,
             "minimum_detectable_effect_range": [0.2, 0.51],
             "seeds_for_half": 12, "seeds_for_half_range": [7, None]}  # fmt: skip
    found = report(tuned={"methods": TUNED, "rows": [entry]})
    assert tuned(entry, found) == (
        "Each at the strength that did best on other prompts and seeds, PPO (kl_coef 0.1, KL 8.1 nats) is ahead of DPO "
        "(beta 0.5 or 0.3, KL 3.2 nats) by 0.30 [0.10, 0.50] by the gold score (5 seeds x 256 prompts). This is not a "
        "comparison at equal KL."
    )
    undecided = tuned(entry | {"p_adjusted": 0.2}, found)
    assert "no difference can be shown" in undecided and "Alone the interval would show one" in undecided
    assert power(found).endswith(
        "if it were 0.28 or more (5 seeds x 256 prompts; the spread that was measured leaves open from where: 0.20 to "
        "0.51); one of half that size needs about 12 run seeds (7 to any number)."
    )
    of_two = tuned(entry | {"difference": number(0.3, 0.1, 0.5, seeds=2), "p_adjusted": None}, found)
    assert "ahead" not in of_two and "no difference" not in of_two
    assert "differs from DPO (beta 0.5 or 0.3, KL 3.2 nats) by +0.30 [0.10, 0.50]" in of_two
    assert "fewer than 3 run seeds allow no verdict on the methods. This is not" in of_two


def test_a_win_that_length_explains_is_not_praised():
    policies = [{"label": "sft", "method": "sft", "swept": None}, {"label": "", "method": "ppo", "swept": 0.1}]

    def lines(held):
        def matrix(x):
            return [[None, None], [x, None]]

        table = {"policies": policies, "raw": matrix(number(0.61, 0.57, 0.65)), "controlled": matrix(held),
                 "length_difference": matrix(4.04)}  # fmt: skip
        return wins(report(wins=table, tuned={"methods": TUNED, "rows": []}))

    (line,) = lines(number(0.51, 0.47, 0.55))
    assert line == (
        "PPO (kl_coef 0.1) wins 61.0 % [57.0, 65.0] of its comparisons with SFT, ties half (5 seeds x 256 prompts) "
        "(a strength that was chosen on these prompts, which favours it a little); its answers are 4.0 tokens longer; "
        "with the length of the answers held equal 51.0 % [47.0, 55.0], so the length may make the difference."
    )
    assert lines(number(0.6, 0.56, 0.64))[0].endswith("held equal 60.0 % [56.0, 64.0].")


def over(verdict, fall, change, ends=0.0, peak=4.0, method="ppo"):
    proxy = {"name": "reward", "change": change, "optimised": method != "dpo"}
    entry = {"method": method, "swept": None, "proxy": proxy, "judge": fall, "rise": number(0.3, 0.2, 0.4),
             "peak": {"kl": peak}, "end": {"kl": 15.2}, "ends_at_peak": ends, "verdict": verdict}  # fmt: skip
    return overoptimised(entry, report())


def test_over_optimisation_says_reproduced_or_not_with_its_interval():
    assert over("reproduced", number(-0.21, -0.3, -0.12), number(0.5, 0.4, 0.6)) == (
        "Over-optimisation of PPO, along all its points: reproduced. From the gold score's peak (near KL 4 nats) to "
        "the largest KL (15 nats) the gold score changes by -0.21 [-0.30, -0.12] (5 seeds x 256 prompts) and the proxy "
        "'reward' by +0.50 [0.40, 0.60]."
    )
    assert "A fall of up to 0.10 could hide." in over("undecided", number(0.0, -0.1, 0.1), number(0.5, 0.4, 0.6))
    assert "highest at the largest KL (15 nats)" in over("not reproduced", number(0, 0, 0), number(0, 0, 0), ends=1.0)
    assert "peak (the foundation itself) to" in over("undecided", number(0.0, -0.1, 0.1), number(0, 0, 0), peak=0.0)
    falls = over("not reproduced", number(-0.2, -0.3, -0.1), number(-0.2, -0.3, -0.1))
    assert falls.endswith("The proxy falls with the judge.")
    of_dpo = over("reproduced", number(-0.2, -0.3, -0.1), number(-0.2, -0.3, -0.1), method="dpo")
    assert "the proxy 'reward', which DPO does not learn from, by -0.20" in of_dpo


def test_the_budget_is_told_with_and_without_what_is_shared():
    rows = [
        {"method": "ppo", "baseline": False, "ratio": 1.0, "ratio_own": 0.9},
        {"method": "dpo", "baseline": False, "ratio": 0.7, "ratio_own": 0.68},
        {"method": "dpo", "baseline": False, "ratio": 0.95, "ratio_own": 0.93},
    ]
    match = {"match": "flops", "total": 1e12, "tolerance": 0.1}
    line = budget(report(budget={"match": match, "rows": rows, "matched": False}))
    assert line.startswith("Budgets are not matched in flops (within 10 %)") and "may come from what was spent" in line
    assert "PPO used 100 % of it (90 % without them) and DPO used 70 to 95 % of it (68 to 93 % without them)" in line
    assert line.endswith("Each method had 4 tuning trials (its strengths).")
    matched = budget(report(budget={"match": match, "rows": rows[:1], "matched": True}))
    assert matched.startswith("Budgets are matched") and "may come" not in matched
    unequal = report()
    unequal["methods"]["dpo"]["trials"] = 6
    assert "unequal numbers of tuning trials (PPO 4, DPO 6)" in budget(unequal)
    assert budget(unequal).startswith("Budgets were not matched")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (number(0.12, 0.03, 0.21), "0.12 [0.03, 0.21]"),
        (number(0.12, 0.002, 0.238), "0.120 [0.002, 0.238]"),  # a bound above 0 is not shown as 0.00
        (number(12.34, 8.1, 16.6), "12.3 [8.1, 16.6]"),
        (number(0.0301, 0.0213, 0.0389), "0.030 [0.021, 0.039]"),
        (number(0.5, None, None), "0.50"),
    ],
)
def test_decimals_follow_the_interval(n, text):
    assert interval(n) == text


def test_small_parts_of_sentences():
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert digits(-0.0001, number(0, -0.1, 0.1)) == "0.00"  # no minus before nothing
    assert interval(number(-0.12, -0.21, -0.03), flip=True) == "0.12 [0.03, 0.21]"


def test_the_page_explains_itself():
    found = report(sentences=["A sentence."])
    text = markdown(found, ["proxy_gold"])
    assert "- A sentence." in text and "![proxy gold](proxy_gold.png)" in text
    assert "**PPO** samples answers" in text and "**DPO** learns from the preference pairs" in text
    assert "| PPO over DPO | 6 | +0.12 [0.03, 0.21] | – | 0.020 | 0.100 |" in text
    assert "## Wins" not in text and "## At the best strength" not in text  # no table without rows
