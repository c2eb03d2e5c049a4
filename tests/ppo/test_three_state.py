"""The published three-action example (benchmarks/experiments/three_state.py) by hand numbers, and the
losses that reach it.
"""

import json
import math

import pytest
import torch

from benchmarks.experiments import three_state as example


def test_the_rows_of_the_published_table():
    # log(1 + (b/a)^beta): the reference log 2, both other rows 0, the least there is
    assert example.dpo_loss(example.REFERENCE) == pytest.approx(0.693147, abs=1e-6)
    assert (
        example.dpo_loss(example.TABLE["dpo"]) == 0.0
        and example.dpo_loss(example.TABLE["ppo"]) == 0.0
    )
    # log(1 + (0.1/0.3)^2) = log(10/9)
    assert example.dpo_loss((0.3, 0.1, 0.6), beta=2.0) == pytest.approx(0.105361, abs=1e-6)
    # J of (1, 0, 0) under r1 = 10: 10 - log(1/0.5) = 9.306853; of the reference: the mean of 10 and
    # -10; outside: -inf
    assert example.objective(example.TABLE["ppo"], (10, -10, 0)) == pytest.approx(
        9.306853, abs=1e-6
    )
    assert example.objective(example.REFERENCE, (10, -10, 0)) == pytest.approx(0.0, abs=1e-12)
    assert example.objective(example.TABLE["dpo"], (10, -10, 99)) == -math.inf


def test_ppos_solution_never_says_what_the_reference_never_says():
    # reference * exp(r): 0.5 e, 0.5, 0 * exp(50) -> e/(e+1) = .731059, .268941, 0
    policy = example.optimal_policy((1.0, 0.0, 50.0))
    assert policy == pytest.approx((0.731059, 0.268941, 0.0), abs=1e-6) and policy[2] == 0.0
    # and its objective is beta log Z = log(0.5 e + 0.5) = .620115; half as much of each is less
    assert example.objective(policy, (1.0, 0.0, 50.0)) == pytest.approx(0.620115, abs=1e-6)
    assert example.objective((0.7, 0.3, 0.0), (1.0, 0.0, 50.0)) < 0.620114


def test_ppos_solutions_are_among_dpos_and_not_the_other_way_round():
    # DPO's loss of PPO's solution for a reward is the reward's own loss: log(1 + 1/e^gap)
    for gap, beta in ((1.0, 1.0), (3.0, 0.5)):
        reward = (gap, 0.0, -7.0)
        policy = example.optimal_policy(reward, beta=beta)
        assert example.dpo_loss(policy, beta=beta) == pytest.approx(
            math.log1p(math.exp(-gap)), abs=1e-9
        )
        assert example.bradley_terry_loss(reward) == pytest.approx(
            math.log1p(math.exp(-gap)), abs=1e-9
        )
    # a preference right in 9 of 10: a/b = 9 whatever y3 has, and the least loss is the entropy of
    # (.9, .1) = .325083
    found = example.closed_form()
    for a, b, y3, loss in found["noisy_label_minimisers"]:
        assert a / b == pytest.approx(9, abs=1e-9) and a + b + y3 == pytest.approx(1, abs=1e-12)
        assert loss == pytest.approx(0.325083, abs=1e-6)
    assert [row[2] for row in found["noisy_label_minimisers"]] == [0.0, 0.5, 0.9]
    assert (
        example.dpo_loss((0.8, 0.1, 0.1), label_prob=0.9)
        > 0.3251
        < example.dpo_loss((0.9, 0.09, 0), label_prob=0.9)
    )


def test_where_dpo_ends_by_hand():
    # z = (1, -1, 0), margin log 9: the middle stays 0, weights 3, 1/3, 1 -> 9/13, 1/13, 3/13
    assert example.dpo_end((1.0, -1.0, 0.0), math.log(9)) == pytest.approx(
        (9 / 13, 1 / 13, 3 / 13), abs=1e-9
    )


def test_the_projects_losses_are_those_of_the_example():
    from reward.objective import reward_loss
    from rlhf.offline.soft_dpo import soft_dpo_loss

    delta = torch.log(torch.tensor([0.3 / 0.1], dtype=torch.float64))
    for p in (1.0, 0.9):
        found = soft_dpo_loss(delta, 2.0, label_prob=torch.tensor([p]))
        assert found.item() == pytest.approx(example.dpo_loss((0.3, 0.1, 0.6), 2.0, p), abs=1e-6)
    found, _ = reward_loss(torch.tensor([1.5]), torch.tensor([0.5]))
    assert found.item() == pytest.approx(example.bradley_terry_loss((1.5, 0.5, 9.0)), abs=1e-6)


def test_training_ends_where_the_closed_form_says():
    found = example.trained(example.LABEL_PROB, seeds=3)
    assert found["dpo_from_closed_form"] < 1e-6 and found["ppo_from_closed_form"] < 1e-3
    assert found["dpo_margin"] == pytest.approx([math.log(9)] * 2, abs=1e-6)
    assert found["reward_margin"] == pytest.approx([math.log(9)] * 2, abs=1e-6)
    starts, _ = example.random_starts(3)
    by_hand = [example.dpo_end(tuple(z), math.log(9))[2] for z in starts.tolist()]
    assert found["dpo_y3"] == pytest.approx(by_hand, abs=1e-6)
    assert max(found["ppo_y3"]) < 0.01


def test_the_committed_result_is_of_this_code():
    committed = json.loads(example.RESULT.read_text())
    assert committed["closed_form"] == json.loads(
        json.dumps(example.rounded(example.closed_form()))
    )
    assert (
        committed["settings"]["seeds"]
        == example.SEEDS
        == len(committed["trained"]["certain"]["dpo_y3"])
    )
    for part in committed["trained"].values():
        assert max(part["ppo_y3"]) < 0.01 < 0.9 < max(part["dpo_y3"])
    table = example.to_the_table()
    assert table["end"] == pytest.approx(committed["to_the_table"]["end"], abs=1e-5)
    assert table["end"] == pytest.approx(example.TABLE["dpo"], abs=1e-3)
