import json
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.experiment.cost import (
    cost_until,
    parts_of,
    pilot_cost,
    planned_lengths,
    run_cost,
    shared_cost,
)
from tests.experiment.example import experiment, method


def write_metrics(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flops(*costs: float, first: int = 1) -> list[dict]:
    return [
        {"step": first + i, "budget/flops": cost, "loss/total": 1.0} for i, cost in enumerate(costs)
    ]


def write_result(folder: Path, cost: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(
        json.dumps({"finished": "now", "budget": {"budget/flops": cost}})
    )


def pilots(tmp_path: Path, **more):
    """DPO's steps cost 10 after a first one of 100, PPO's 50; the reward model has cost 300."""
    config = experiment(tmp_path, **({"budget": {"match": "flops", "total": 1000}} | more))
    out = tmp_path / "out"
    write_metrics(out / "pilot" / "dpo", flops(*(100 + 10 * i for i in range(8))))
    write_metrics(out / "pilot" / "ppo", flops(80, 130, 180))
    write_result(out / "seed-0" / "reward", 300)
    return config


def test_a_step_costs_what_it_adds_so_that_the_start_does_not_count(tmp_path):
    # steps 1 to 8 at 100, 110, ..., 170: (170 - 100) / 7 = 10
    folder = write_metrics(tmp_path, flops(*(100 + 10 * i for i in range(8))))
    assert pilot_cost(folder, "flops", 8).step == pytest.approx(10)


def test_steps_are_what_the_budget_leaves_over_the_shared_parts(tmp_path):
    # DPO learns from given pairs: 1000 / 10 = 100 steps. PPO pays for the reward model: (1000 -
    # 300) / 50 = 14
    assert planned_lengths(pilots(tmp_path)) == {"dpo": 100, "ppo": 14}
    # 1049: 749 / 50 = 14.98, rounded down
    assert planned_lengths(pilots(tmp_path, budget={"match": "flops", "total": 1049}))["ppo"] == 14


SIZES = {"held_out": 4, "training": 50, "per_step": 2, "steps": 30}


def pilot_of_dpo(folder: Path, sizes: dict, spent: list[tuple[float, float]]) -> Path:
    """A pilot's folder: the FLOPs of each of its 8 steps in all, and those of the reference."""
    rows = flops(*(cost for cost, _ in spent))
    for row, (_, reference) in zip(rows, spent, strict=True):
        row["budget/reference_flops"] = reference
    write_result(folder, spent[-1][0])
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"reference_pass": sizes}))
    return write_metrics(folder, rows)


def test_a_run_of_more_than_a_pass_pays_once_for_the_reference_of_each_pair(tmp_path):
    # A step costs 10, the reference of a pair 3. Held-out pairs cost 4 x 3 = 12 before the first
    # step, then each step meets 2 pairs: 6 more
    spent = [(12 + 16 * step, 12 + 6 * step) for step in range(1, 9)]
    folder = pilot_of_dpo(tmp_path / "out" / "pilot" / "dpo", SIZES, spent)
    cost = pilot_cost(folder, "flops", 8)
    assert (cost.step, cost.pair) == (10, 3)

    # 50 + 4 pairs once, 162: (1000 - 162) / 10 = 83.8 (by what the pilot's steps cost: 62)
    assert cost.longest(1000) == 83
    # less than a pass of 30 steps: (400 - 12) / 16 = 24.25 (held-out pairs left out: 25)
    assert cost.longest(400) == 24
    # 162 + 30 x 10 = 462 pays for a pass; one less for (461 - 12) / 16 = 28.06 steps
    assert (cost.longest(462), cost.longest(461)) == (30, 28)

    budget = {"match": "flops", "total": 1000}
    dpo = {"dpo": method()}
    config = experiment(tmp_path, reward=None, methods=dpo, budget=budget)
    assert planned_lengths(config) == {"dpo": 83}
    with pytest.raises(UserError, match=r"1 steps of 'dpo' \(10 each, and 3 for the reference of"):
        planned_lengths(
            experiment(tmp_path, reward=None, methods=dpo, budget=budget | {"total": 30})
        )


def test_a_pilot_of_more_than_a_pass_has_paid_for_the_reference_at_its_start(tmp_path):
    # 6 training pairs and 4 held out, 10 x 3 = 30 at the start
    sizes = SIZES | {"training": 6, "steps": 3}
    spent = [(30 + 10 * step, 30) for step in range(1, 9)]
    cost = pilot_cost(pilot_of_dpo(tmp_path / "pilot", sizes, spent), "flops", 8)
    assert (cost.step, cost.pair) == (10, 3)
    # (130 - 30) / 10 = 10; a run of less than a pass: (45 - 12) / 16 = 2.06
    assert (cost.longest(130), cost.longest(45)) == (10, 2)


def test_a_counter_without_a_reference_follows_from_the_steps_alone(tmp_path):
    folder = pilot_of_dpo(
        tmp_path / "pilot", SIZES, [(16 * step, 6 * step) for step in range(1, 9)]
    )
    tokens = [{"step": step, "budget/tokens_trained": 5 * step} for step in range(1, 9)]
    cost = pilot_cost(write_metrics(folder, tokens), "tokens_trained", 8)
    assert (cost.step, cost.pair, cost.longest(104)) == (5, 0, 20)


def test_sampled_pairs_are_paid_by_all(tmp_path):
    from rlhf.data.store import Store

    pairs = {"prompts": [str(tmp_path / "prompts.jsonl")], "sample": "s.yaml", "annotate": "a.yaml"}
    config = pilots(tmp_path, pairs=pairs)
    with (
        Store.open(tmp_path / "out" / "seed-0" / "preferences.db", create=True) as store,
        store.transaction(),
    ):
        store.set_setting("budget", json.dumps({"flops": 200, "seconds": 3}))
    assert shared_cost(config, 0) == {
        "pairs": {"flops": 200, "seconds": 3},
        "reward": {"flops": 300},
    }
    # (1000 - 200) / 10 = 80, (1000 - 200 - 300) / 50 = 10
    assert planned_lengths(config) == {"dpo": 80, "ppo": 10}
    assert shared_cost(config, 1) == {"pairs": {}, "reward": {}}  # nothing made yet


def test_who_pays_for_what(tmp_path):
    config = experiment(tmp_path)
    assert parts_of(config, "dpo") == ("pairs",)
    assert parts_of(config, "ppo") == parts_of(config, "best_of_n") == ("pairs", "reward")
    own = method("ppo", options={"reward": [{"rule": "length"}]})
    assert parts_of(experiment(tmp_path, reward=None, methods={"ppo": own}), "ppo") == ("pairs",)


def test_a_budget_that_is_too_small_says_what_it_would_pay_for(tmp_path):
    # 350 - 300 = 50: one step of PPO, and there are to be two checkpoints
    with pytest.raises(
        UserError,
        match=r"of 350 flops 300 go into pairs and reward model.* 1 steps of 'ppo' \(50 each",
    ):
        planned_lengths(pilots(tmp_path, budget={"match": "flops", "total": 350}))
    assert planned_lengths(pilots(tmp_path, budget={"match": "flops", "total": 400}))["ppo"] == 2
    with pytest.raises(UserError, match=r"pays for 0 steps of 'ppo'.*Raise 'total'"):
        planned_lengths(pilots(tmp_path, budget={"match": "flops", "total": 200}))


@pytest.mark.parametrize("rows", [[], flops(80), flops(80, 130), [{"step": 1, "loss/total": 1.0}]])
def test_a_pilot_that_was_cut_short_is_no_measure(tmp_path, rows):
    with pytest.raises(
        UserError, match=r"does not tell what 3 steps cost in flops. Look at its log"
    ):
        pilot_cost(write_metrics(tmp_path / "pilot", rows), "flops", 3)
    with pytest.raises(UserError, match="does not tell what 3 steps cost"):
        pilot_cost(tmp_path / "absent", "flops", 3)


def test_cost_between_logged_steps_is_in_proportion(tmp_path):
    # logged after 10 steps 100, after 20 steps 300
    folder = write_metrics(
        tmp_path,
        [*flops(100, first=10), *flops(300, first=20), {"step": 20, "eval/kl/sequence": 1}],
    )
    at = {0: 0, 1: 10, 5: 50, 10: 100, 15: 200, 20: 300, 25: 300}  # beyond the end it is the end's
    assert {step: cost_until(folder, step)["flops"] for step in at} == pytest.approx(at)
    assert cost_until(tmp_path / "absent", 3) == {}
    assert (
        cost_until(write_metrics(tmp_path / "none", [{"step": 0, "eval/kl/sequence": 0.0}]), 3)
        == {}
    )


def test_a_counter_that_starts_later_is_zero_before(tmp_path):
    rows = [
        {"step": 1, "budget/flops": 2.0},
        {"step": 3, "budget/flops": 4.0, "budget/seconds": 8.0},
    ]
    assert cost_until(write_metrics(tmp_path, rows), 2) == pytest.approx(
        {"flops": 3.0, "seconds": 4.0}
    )


def test_the_cost_of_a_run_is_its_result(tmp_path):
    assert run_cost(tmp_path) == {}
    write_result(tmp_path, 7)
    assert run_cost(tmp_path) == {"flops": 7.0}
