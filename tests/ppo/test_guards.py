"""Series made by hand, for which the step of the decision is known beforehand; and the same without
a fault.
"""

import json
import math
import random
import re
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.options.guards import GUARDS, check_guards
from rlhf.ppo.guards import Guards, check_watched, trend
from rlhf.runs.metrics import check_names

HEALTHY = {
    "kl/sequence": 5.0,
    "kl/sequence_se": 0.3,
    "response/entropy": 0.5,
    "response/length": 30.0,
    "response/repetition": 0.01,
    "response/ended": 0.98,
    "score/total": 1.0,
    "score/raw": 1.0,
    "score/std": 0.8,
}
GOOD = {"loss/total": 0.1, "ppo/ratio": 1.01, "ppo/approx_kl": 0.01, "grad/norm": 0.5}


def run(guards: Guards, rows: list[dict], start: int = 1) -> list:
    """(step, guard, action) of every decision when these metrics follow each other, each over
    HEALTHY.
    """
    found = [(step, guards.step(step, HEALTHY | row)) for step, row in enumerate(rows, start)]
    return [(step, d.guard, d.action) for step, d in found if d]


def noisy(steps: int, seed: int) -> list[dict]:
    """A clean run as the sandbox's look: KL grows from exactly 0, the score rises, entropy falls to
    two thirds.
    """
    noise = random.Random(seed).gauss
    rows = []
    for i in range(steps):
        done = 1 - math.exp(-i / 20)
        rows.append(
            {
                "kl/sequence": 0.0 if i == 0 else 6 * done + noise(0, 0.1),
                "kl/sequence_se": 0.0 if i == 0 else 0.1,
                "response/entropy": 0.5 * (1 - 0.35 * done) * (1 + noise(0, 0.05)),
                "response/length": 30 * (1 - 0.3 * done) * (1 + noise(0, 0.05)),
                "response/repetition": abs(noise(0, 0.02)),
                "response/ended": 1 - abs(noise(0, 0.03)),
                "score/raw": 2 * done + noise(0, 0.06),
                "score/std": 0.9 * (1 - 0.6 * done) * (1 + noise(0, 0.1)),
                "score/gold": done + noise(0, 0.06),
            }
        )
    return rows


def test_clean_noisy_runs_raise_no_alarm():
    for seed in range(40):
        guards = Guards({}, ["gold"])
        assert run(guards, noisy(100, seed)) == []
        noise = random.Random(seed).gauss
        for update in range(400):
            ratio = math.exp(noise(0, 0.1))
            assert (
                guards.update(
                    update // 4, {"ppo/ratio": ratio, "ppo/approx_kl": ratio - 1 - math.log(ratio)}
                )
                is None
            )
        assert guards.decisions.events == [] and guards.decisions.drain_events() == []
        assert guards.decisions.metrics() == {
            f"guard/{n}": 0.0 for n in guards.decisions.counts
        } | {
            "guard/rollbacks": 0.0,
            "guard/rate_scale": 1.0,
        }


# guards of whole steps: five healthy steps, then the fault


def test_max_kl_needs_three_steps_in_a_row():
    high, low = {"kl/sequence": 101.0}, {"kl/sequence": 99.0}
    assert run(Guards({}), [high, high, low, high, high, low]) == []
    assert run(Guards({}), [low, high, high, high]) == [(4, "max_kl", "stop")]
    assert run(Guards({}), [{"kl/sequence": math.inf}] * 3) == [(3, "max_kl", "stop")]


def test_a_rollback_goes_behind_the_update_that_did_it():
    # rollouts 4, 5, 6 are bad: the updates of step 3 made the policy that sampled rollout 4
    guards = Guards({"max_kl": "rollback", "ratio": "rollback"})
    rows = [{}] * 3 + [{"kl/sequence": 200.0}] * 3
    run(guards, rows)
    assert guards.decisions.drain_events()[-1].since == 3
    assert guards.update(7, {"ppo/ratio": 50.0}).since == 7  # the checkpoint after step 6 is good


def test_max_kl_says_what_it_saw_and_what_to_do():
    guards = Guards({"max_kl": {"threshold": 30, "window": 1}})
    decision = guards.step(7, HEALTHY | {"kl/sequence": 31.25})
    assert (decision.value, decision.threshold, decision.step) == (31.25, 30.0, 7)
    assert "kl/sequence is 31.2, above 30" in decision.reason
    assert "raise kl_coef" in decision.reason and "guards.max_kl" in decision.reason


def test_kl_below_zero_beyond_noise():
    # -0.5 + 3 * 0.1 = -0.2 < 0: beyond noise.   -0.5 + 3 * 0.2 = +0.1: noise.
    assert run(Guards({}), [{"kl/sequence": -0.5, "kl/sequence_se": 0.1}] * 3) == [
        (3, "negative_kl", "warn")
    ]
    assert run(Guards({}), [{"kl/sequence": -0.5, "kl/sequence_se": 0.2}] * 9) == []
    # step 0 is exactly 0; rounding in bfloat16 may leave a little less
    assert run(Guards({}), [{"kl/sequence": 0.0, "kl/sequence_se": 0.0}] * 9) == []
    assert run(Guards({}), [{"kl/sequence": -0.005, "kl/sequence_se": 0.0}] * 9) == []


def test_entropy_collapse_against_the_first_steps():
    # first five: mean 0.5; a tenth of it is 0.05
    first = [{"response/entropy": e} for e in (0.6, 0.4, 0.5, 0.45, 0.55)]
    assert run(Guards({}), first + [{"response/entropy": 0.051}] * 20) == []
    assert run(Guards({}), first + [{"response/entropy": 0.049}] * 5) == [(10, "entropy", "stop")]


def test_a_collapse_within_the_first_steps_does_not_become_the_measure():
    # 0.03 <= 0.05 from step 2 on: it never enters the mean, so the fifth in a row is step 6
    assert run(Guards({}), [{}] + [{"response/entropy": 0.03}] * 5) == [(6, "entropy", "stop")]
    # nothing at all from the start is no measure either
    assert run(Guards({}), [{"response/entropy": 0.0}] * 5) == [(5, "entropy", "stop")]


def test_length_drifts_both_ways():
    # it began at 30: more than 60 or less than 15
    assert run(Guards({}), [{}] * 5 + [{"response/length": 59.0}] * 9) == []
    assert run(Guards({}), [{}] * 5 + [{"response/length": 61.0}] * 5) == [(10, "length", "warn")]
    assert run(Guards({}), [{}] * 5 + [{"response/length": 16.0}] * 9) == []
    assert run(Guards({}), [{}] * 5 + [{"response/length": 14.0}] * 5) == [(10, "length", "warn")]


def test_repetition_and_missing_ends():
    assert run(Guards({}), [{"response/repetition": 0.19}] * 9) == []
    assert run(Guards({}), [{"response/repetition": 0.21}] * 5) == [(5, "repetition", "warn")]
    assert run(Guards({}), [{"response/ended": 0.51}] * 9) == []
    assert run(Guards({}), [{"response/ended": 0.49}] * 5) == [(5, "truncation", "warn")]


def test_score_collapse_gone_to_nothing():
    # it began at 0.8: 5 % of it is 0.04
    assert run(Guards({}), [{}] * 5 + [{"score/std": 0.041}] * 9) == []
    assert run(Guards({}), [{}] * 5 + [{"score/std": 0.039}] * 5) == [
        (10, "score_collapse", "warn")
    ]
    # a scorer that says one thing
    assert run(Guards({}), [{"score/std": 0.0}] * 5) == [(5, "score_collapse", "warn")]


def test_members_of_an_ensemble_that_disagree_more_and_more():
    # both begin at their own baseline: 0.1 and 3; twice that is the threshold
    def steps(first, second, count):
        return [{"score/e/spread": first, "score/f/spread": second}] * count

    def watching(**overrides):
        return Guards(overrides, spreads=["e/spread", "f/spread"])

    assert run(watching(), steps(0.1, 3.0, 5) + steps(0.19, 5.9, 9)) == []
    # nor is agreement a fault
    assert run(watching(), steps(0.1, 3.0, 5) + steps(0.0, 0.01, 9)) == []
    assert run(watching(), steps(0.1, 3.0, 5) + steps(0.21, 3.0, 5)) == [
        (10, "disagreement", "warn")
    ]
    one_after_the_other = steps(0.1, 3.0, 5) + steps(0.1, 6.1, 3) + steps(0.21, 6.1, 3)
    assert run(watching(disagreement="stop"), one_after_the_other) == [
        (10, "disagreement", "stop"),
        (11, "disagreement", "stop"),
    ]
    assert run(watching(disagreement="off"), steps(0.1, 3.0, 5) + steps(9.0, 9.0, 9)) == []
    # without an ensemble there is nothing to watch
    assert run(Guards({}), steps(0.1, 3.0, 5) + steps(9.0, 9.0, 9)) == []


def test_disagreement_is_remembered_by_a_checkpoint():
    rows = [{"score/e/spread": 0.1}] * 5 + [{"score/e/spread": 0.5}] * 3
    first, whole = (Guards(spreads=["e/spread"]) for _ in range(2))
    run(first, rows)
    resumed = Guards(spreads=["e/spread"])
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run(whole, rows)
    assert run(resumed, rows[-2:], 9) == run(whole, rows[-2:], 9) == [(10, "disagreement", "warn")]


def test_a_warning_comes_again_only_after_health():
    bad = {"response/repetition": 0.5}
    guards = Guards({"repetition": {"window": 2}})
    assert [step for step, *_ in run(guards, [bad] * 6 + [{}] + [bad] * 6)] == [2, 9]
    assert guards.decisions.metrics()["guard/warnings"] == 2


def test_missing_and_nan_metrics_are_not_judged():
    guards = Guards({"repetition": {"window": 3}})
    # NaN neither counts nor breaks the row
    rows = [{"response/repetition": r} for r in (0.5, math.nan, 0.5, 0.5)]
    assert run(guards, rows) == [(4, "repetition", "warn")]
    assert guards.step(9, {"time/step": 1.0}) is None


def test_the_gravest_decision_is_returned_and_all_are_recorded():
    guards = Guards({"repetition": {"window": 1}, "max_kl": {"window": 1}})
    assert run(guards, [{"kl/sequence": 500.0, "response/repetition": 0.9}]) == [
        (1, "max_kl", "stop")
    ]
    assert [e["guard"] for e in guards.decisions.events] == ["max_kl", "repetition"]
    assert [d.guard for d in guards.decisions.drain_events()] == [
        "max_kl",
        "repetition",
    ] and guards.decisions.drain_events() == []


# before the first update


def test_the_first_rollout_is_looked_at_before_anything_is_learnt():
    healthy = HEALTHY | {"score/length_correlation": 0.69}
    assert Guards({}).first(1, healthy, 0.1, 64) is None
    guards = Guards({})
    decision = guards.first(1, healthy | {"response/ended": 0.0, "score/total": -1.0}, 0.0, 64)
    assert (decision.guard, decision.action) == ("no_signal", "stop")
    assert "are all alike, -1" in decision.reason and "max_response_length" in decision.reason
    assert [(e["guard"], e["action"]) for e in guards.decisions.events] == [
        ("truncation", "warn"),
        ("no_signal", "stop"),
    ]
    assert Guards({"no_signal": "warn"}).first(1, healthy, 0.0, 64).action == "warn"
    assert Guards({"no_signal": "off"}).first(1, healthy, 0.0, 64) is None
    assert Guards({}).first(1, healthy, 0.0, 1) is None  # one response differs from no other
    assert Guards({}).first(1, healthy | {"response/ended": 0.0}, 0.1, 64).guard == "truncation"
    assert (
        Guards({"truncation": "off"}).first(1, healthy | {"response/ended": 0.0}, 0.1, 64) is None
    )


def test_a_score_that_is_length_is_said_before_it_is_learnt_from():
    for r in (0.71, -0.71):
        decision = Guards({}).first(1, HEALTHY | {"score/length_correlation": r}, 0.1, 32)
        assert (decision.guard, decision.action, decision.value) == ("length_detector", "warn", r)
    # too few to say
    assert Guards({}).first(1, HEALTHY | {"score/length_correlation": 0.9}, 0.1, 31) is None
    assert (
        Guards({"length_detector": 0.8}).first(
            1, HEALTHY | {"score/length_correlation": 0.71}, 0.1, 32
        )
        is None
    )
    assert Guards({}).first(1, HEALTHY, 0.1, 32) is None  # one of the two does not vary


# single updates


def test_a_number_that_is_not_finite_is_skipped_and_the_fifth_in_twenty_stops():
    guards = Guards({})
    actions = []
    for i in range(24):
        # at the fifth, update 21, the first is 20 back: only four count
        faulty = i in (0, 3, 6, 9) or i == 20
        decision = guards.update(1 + i // 4, GOOD | ({"loss/total": math.nan} if faulty else {}))
        actions.append(decision.action if decision else None)
    assert [i for i, a in enumerate(actions) if a] == [0, 3, 6, 9, 20] and set(actions) == {
        None,
        "skip",
    }
    assert guards.decisions.metrics()["guard/skipped_updates"] == 5
    guards = Guards({})
    row = [guards.update(1, GOOD | {"grad/norm": math.inf}).action for _ in range(5)]
    assert row == ["skip"] * 4 + ["stop"]


def test_scores_that_are_not_finite_skip_the_rollout():
    guards = Guards({"not_finite": {"limit": 1, "window": 3}})
    message = "the score of a response is nan: prompt 'Hello'"
    decision = guards.scores(4, message)
    assert (decision.action, decision.guard) == (
        "skip",
        "not_finite",
    ) and decision.reason.startswith(message)
    assert guards.scores(5, None) is None
    assert guards.scores(7, message).action == "skip"  # step 4 is three back
    assert guards.scores(8, message).action == "stop"
    assert guards.decisions.metrics()["guard/skipped_rollouts"] == 2


def test_ratio_is_caught_at_once_upwards_and_downwards():
    guards = Guards({})
    assert guards.update(1, GOOD | {"ppo/ratio": 9.9, "ppo/approx_kl": 8.9}) is None
    decision = guards.update(1, GOOD | {"ppo/ratio": 10.1, "ppo/approx_kl": 9.1})
    assert (decision.guard, decision.action, decision.value) == ("ratio", "skip", 10.1)
    # sampled tokens 9 or 11 times less likely: E[r] = 1/9, approx_kl = r - 1 - log r, and 1/10 is
    # the bound
    for times, caught in ((9, False), (11, True)):
        numbers = {"ppo/ratio": 1 / times, "ppo/approx_kl": 1 / times - 1 + math.log(times)}
        decision = Guards({}).update(1, numbers)
        assert (decision is not None) == caught
    assert decision.value == pytest.approx(1 / 11)


def test_ratio_stops_at_the_third_rollout_of_five():
    guards = Guards({})
    actions = []
    for step in (1, 2, 4):
        for ratio in (1.0, 50.0, 50.0):
            decision = guards.update(step, {"ppo/ratio": ratio, "ppo/approx_kl": ratio - 1})
            actions.append(decision.action if decision else None)
    assert actions == [None, "skip", "skip", None, "skip", "skip", None, "stop", "stop"]
    guards = Guards({})
    steps = [guards.update(step, {"ppo/ratio": 50.0}).action for step in (1, 2, 6, 7)]
    assert steps == ["skip"] * 4  # 1 and 2 are past when 6 and 7 come


def test_a_warning_about_the_ratio_comes_again_only_after_a_window_without():
    guards = Guards({"ratio": "warn"})
    steps = (1, 1, 2, 5, 6, 11)  # 6 is within five of 5; 11 is not within five of 6
    found = [guards.update(step, {"ppo/ratio": 50.0}) for step in steps]
    assert [d.action if d else None for d in found] == ["warn", None, None, None, None, "warn"]


def test_target_kl_ends_a_rollout_and_never_the_run():
    assert Guards({}).update(1, GOOD | {"ppo/approx_kl": 1.0}) is None  # off unless asked for
    guards = Guards({"target_kl": 0.05})
    assert guards.update(1, GOOD | {"ppo/approx_kl": 0.05}) is None
    actions = [guards.update(step, GOOD | {"ppo/approx_kl": 0.06}).action for step in range(1, 50)]
    assert set(actions) == {"end"} and guards.decisions.metrics()["guard/shortened_rollouts"] == 49
    (event,) = guards.decisions.events  # one series, one event, one line in the log
    assert (event["step"], event["last_step"], event["times"]) == (1, 49, 49) and len(
        guards.decisions.drain_events()
    ) == 1


# reward hacking


def test_trend_by_hand():
    # halves 0 0.1 0 0.1 and 1 1.1 1 1.1: means 0.05 and 1.05. A line of slope 0.02 through (0, .1, 0, .1) leaves
    # -.02, .06, -.06, .02: squares .0004 + .0036 + .0036 + .0004 = .008, twice .016; s = sqrt(.016 / 4) = .0632456
    # t = 1 / (.0632456 * sqrt(2 / 4)) = 22.360680
    assert trend([0, 0.1, 0, 0.1, 1, 1.1, 1, 1.1]) == pytest.approx(22.360680, abs=1e-5)
    assert trend([1, 1.1, 1, 1.1, 0, 0.1, 0, 0.1]) == pytest.approx(-22.360680, abs=1e-5)
    assert trend([3.0] * 20) == 0.0
    assert trend([0.0] * 10 + [1.0] * 10) > 100 and trend([float(i) for i in range(20)]) > 100


def hacked(seed: int, shape) -> list[dict]:
    """40 steps of common rise, then the proxy goes on and gold falls by `shape(steps since)` noise
    widths.
    """
    noise = random.Random(seed).gauss
    rows = []
    for i in range(90):
        fall = shape(i - 40) if i >= 40 else 0.0
        gold = min(i, 40) * 0.02 - 0.06 * fall + noise(0, 0.06)
        rows.append({"score/raw": i * 0.03 + noise(0, 0.06), "score/gold": gold})
    return rows


@pytest.mark.parametrize(
    "shape",
    [lambda j: 0.3 * j, lambda j: 8.0, lambda j: min(j, 8.0)],
    ids=["slowly", "at once", "within 8 steps"],
)
def test_hacking_is_caught_within_thirty_steps(shape):
    for seed in range(10):
        decisions = run(Guards({}, ["gold"]), hacked(seed, shape))
        assert decisions, seed
        step, name, action = decisions[0]
        assert (name, action) == ("hacking", "stop") and 40 < step <= 70, (seed, step)


def test_hacking_needs_both_a_rise_and_a_fall():
    for seed in range(10):
        # gold falls alone
        flat = [row | {"score/raw": 1.0} for row in hacked(seed, lambda j: 0.3 * j)]
        assert run(Guards({}, ["gold"]), flat) == []
        noise = random.Random(seed).gauss
        # gold does not move
        rising = [{"score/raw": 0.05 * i, "score/gold": noise(0, 0.06)} for i in range(80)]
        assert run(Guards({}, ["gold"]), rising) == []


def test_hacking_watches_what_is_named():
    rows = [
        {"score/gold": 1.0, "score/rule": 1.0 - 0.1 * i, "score/raw": 0.1 * i} for i in range(22)
    ]
    assert run(Guards({}, ["gold"]), rows) == []
    assert run(Guards({"hacking": {"watch": "rule"}}, ["gold"]), rows) == [
        (21, "hacking", "stop"),
        (22, "hacking", "stop"),
    ]
    assert run(Guards({"hacking": {"watch": ["score/rule"], "action": "warn"}}), rows) == [
        (21, "hacking", "warn")
    ]
    # a rollout that was skipped has no scores
    assert Guards({}, ["gold"]).step(1, {"time/step": 1.0}) is None
    # a rule that applies at some steps only: the window counts those
    seldom = [
        {"score/raw": float(i), "score/rule": -float(i) if i % 5 == 0 else math.nan}
        for i in range(120)
    ]
    assert [s for s, *_ in run(Guards({"hacking": {"watch": "rule"}}), seldom)] == [
        101,
        106,
        111,
        116,
    ]
    with pytest.raises(
        UserError, match=r"'score/gould', which is not a score of this run.*score/gold"
    ):
        run(Guards({"hacking": {"watch": "gould"}}), rows)


def test_a_score_to_watch_that_no_scorer_gives_is_refused_before_the_run():
    scorers = ["reward", "gold"]
    for known in ("gold", "score/gold", "gold/part", "score/raw", "response/length"):
        check_watched({"hacking": {"watch": known}}, scorers)
    check_watched({}, scorers)
    with pytest.raises(
        UserError, match=r"'gould' is not a score of this run. Did you mean 'gold'\?.*reward, gold"
    ):
        check_watched({"hacking": {"watch": ["gold", "gould"]}}, scorers)


# memory


def faulty_run() -> list[dict]:
    rows = noisy(60, 3)
    for i, row in enumerate(rows):
        row["score/gold"] -= 0.1 * max(0, i - 25)
        row["response/length"] *= 3 if i >= 40 else 1
        row["kl/sequence"] += 200 if i in (30, 31, 50, 51, 52) else 0
    return rows


def play(guards: Guards, rows: list[dict], start: int) -> list:
    found = []
    for step, row in enumerate(rows, start):
        for i in range(3):
            found.append(
                guards.update(step, GOOD | ({"loss/total": math.inf} if step % 7 == i else {}))
            )
        found.append(guards.step(step, HEALTHY | row))
    return [(d.guard, d.action, d.step, d.reason) if d else None for d in found]


@pytest.mark.parametrize("cut", [1, 3, 29, 31, 44, 51])
def test_state_in_the_middle_gives_the_same_later_decisions(cut):
    rows, options = faulty_run(), {"hacking": "warn", "not_finite": {"window": 30, "limit": 1}}
    whole, first = Guards(options, ["gold"]), Guards(options, ["gold"])
    expected = play(whole, rows, 1)
    begun = play(first, rows[:cut], 1)
    second = Guards(options, ["gold"])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert begun + play(second, rows[cut:], cut + 1) == expected
    assert {name for d in expected if d for name in d[:1]} == {
        "not_finite",
        "max_kl",
        "hacking",
        "length",
    }
    assert (
        second.state_dict() == whole.state_dict()
        and second.decisions.metrics() == whole.decisions.metrics()
    )


def test_a_state_is_a_copy():
    guards = Guards({})
    run(guards, [{"response/length": 100.0}])
    state = guards.state_dict()
    before = json.dumps(state)
    run(guards, [{"kl/sequence": 500.0}] * 3, 2)
    assert json.dumps(state) == before
    other = Guards({})
    other.load_state_dict(state)
    run(other, [{"kl/sequence": 500.0}] * 3, 2)
    assert json.dumps(state) == before


def test_rollbacks_are_counted_over_checkpoints_and_become_a_stop():
    guards = Guards({"max_kl": {"action": "rollback", "limit": 2}})
    run(guards, [{}] * 3)
    checkpoint = json.loads(json.dumps(guards.state_dict()))
    for number in (1, 2):
        decisions = run(guards, [{"kl/sequence": 200.0}] * 3, 4)
        assert decisions == [(6, "max_kl", "rollback")]
        guards.rolled_back(checkpoint)
        assert (
            guards.decisions.metrics()["guard/rollbacks"] == number
            and guards.decisions.rate_scale == 0.5**number
        )
        assert guards.decisions.streaks["max_kl"] == 0 and len(guards.decisions.events) == number
    assert run(guards, [{"kl/sequence": 200.0}] * 3, 4) == [(6, "max_kl", "stop")]
    assert "after 2 rollbacks" in guards.decisions.events[-1]["reason"]
    assert checkpoint["rollbacks"] == 0  # a checkpoint taken now holds the count
    assert guards.state_dict()["rollbacks"] == 2


def test_a_rollback_to_the_start_forgets_the_windows():
    guards = Guards({"ratio": {"action": "rollback", "limit": 1}})
    decision = guards.update(1, {"ppo/ratio": 99.0})
    assert decision.action == "rollback"
    guards.rolled_back(None)
    assert (guards.updates, guards.faults, guards.decisions.rate_scale) == (0, {}, 0.5)
    assert guards.update(1, {"ppo/ratio": 99.0}).action == "stop"


# options


def test_overrides_and_their_short_forms():
    guards = check_guards(
        {"max_kl": {"threshold": 30, "action": "rollback"}, "length": False, "entropy": "warn"}
    )
    assert (guards["max_kl"].threshold, guards["max_kl"].action, guards["max_kl"].window) == (
        30.0,
        "rollback",
        3,
    )
    assert (guards["length"].action, guards["entropy"].action) == ("off", "warn")
    # YAML 1.1 reads 3e-2 as text
    assert check_guards({"target_kl": "3e-2"})["target_kl"].threshold == 0.03
    assert check_guards({"hacking": {"watch": "gold"}})["hacking"].watch == ("gold",)
    assert check_guards({}) == GUARDS
    assert run(Guards({"max_kl": "off"}), [{"kl/sequence": 1e6}] * 9) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_lk": 3}, "unknown guard 'max_lk'. Did you mean 'max_kl'?"),
        (
            {"max_kl": {"treshold": 3}},
            "guards.max_kl: unknown key 'treshold'. Did you mean 'threshold'?",
        ),
        (
            {"max_kl": {"watch": "gold"}},
            "unknown key 'watch'. Known keys: threshold, action, window, limit",
        ),
        ({"not_finite": {"threshold": 3}}, "guards.not_finite: unknown key 'threshold'"),
        ({"max_kl": "stopp"}, "Did you mean 'stop'?"),
        ({"max_kl": {"action": "skip"}}, "were made. Possible: off, warn, stop, rollback"),
        ({"not_finite": False}, "guards.not_finite.action: cannot be off: one such update"),
        ({"hacking": "rollback"}, "the same score would be exploited again"),
        ({"target_kl": "stop"}, "see max_kl"),
        ({"entropy": 1.5}, "guards.entropy.threshold: found 1.5, expected less than 1"),
        ({"ratio": 0.5}, "guards.ratio.threshold: found 0.5, expected greater than 1"),
        ({"max_kl": math.nan}, "found nan, expected a finite number"),
        (
            {"max_kl": {"threshold": "much"}},
            "guards.max_kl.threshold: found 'much', expected a number",
        ),
        (
            {"max_kl": {"window": 0}},
            "guards.max_kl.window: found 0, expected greater than or equal to 1",
        ),
        ({"hacking": {"window": 7}}, "found 7, expected greater than or equal to 8"),
        (
            {"max_kl": {"limit": -1}},
            "guards.max_kl.limit: found -1, expected greater than or equal to 0",
        ),
        ({"max_kl": {"window": 1.5}}, "expected a whole number"),
        ({"max_kl": True}, "expected settings"),
        ({"max_kl": [3]}, "expected settings"),
    ],
)
def test_wrong_overrides_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        check_guards(overrides)
    assert message in str(error.value)


def test_every_default_is_allowed_and_every_reason_is_written():
    for name, guard in GUARDS.items():
        settings = {
            k: getattr(guard, k)
            for k in ("action", "window", "limit")
            if getattr(guard, k) is not None
        }
        assert check_guards({name: settings})[name] == guard
        assert guard.help and guard.remedy and guard.refused


def test_metric_names_are_in_the_vocabulary():
    check_names(Guards({}).decisions.metrics())


def test_the_page_shows_the_defaults():
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    page = page.partition("## SFT, reward models and DPO")[0]
    rows = {
        m[1]: [c.strip() for c in m[0].strip("|").split("|")]
        for m in re.finditer(r"^\| `(\w+)` \|.*\|$", page, re.M)
    }
    for name, guard in GUARDS.items():
        threshold = "-" if guard.threshold in (None, math.inf) else f"{guard.threshold:g}"
        expected = [
            threshold,
            guard.action,
            *("-" if n is None else str(n) for n in (guard.window, guard.limit)),
        ]
        assert rows[name][2:6] == expected, name


def test_old_names_of_guards_are_still_read():
    """In options, and in the state that a checkpoint made before the renaming holds."""
    guards = check_guards({"no_end": "off", "score_spread": {"window": 7}})
    assert (guards["truncation"].action, guards["score_collapse"].window) == ("off", 7)

    first, whole = Guards(), Guards()
    rows = [{"response/ended": 0.1, "score/std": 0.5}] * 5
    run(first, rows)
    run(whole, rows)
    state = json.loads(json.dumps(first.state_dict()))
    old_names = {"truncation": "no_end", "score_collapse": "score_spread"}
    for part in ("streaks", "baselines"):
        state[part] = {old_names.get(name, name): value for name, value in state[part].items()}
    state["events"][0]["guard"] = "no_end"
    assert state["streaks"]["no_end"] == 5 and state["baselines"]["score_spread"]

    resumed = Guards()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == whole.state_dict()
    resumed.rolled_back(state)
    assert resumed.decisions.streaks["truncation"] == 5
