"""Times of work on numbers worked by hand."""

from types import SimpleNamespace

import pytest

from rlhf.plan.devices import Device
from rlhf.plan.memory import Setup
from rlhf.plan.passes import Rows
from rlhf.plan.work import Clock, Costs, offline_work, ppo_work, steps_of
from rlhf.runs.budget import DecoderShape


def test_sampling_on_a_gpu_passes_the_prompts_and_then_reads_weights_and_cache():
    clock = Clock(Device("x", 1.0, flops=1e6, bandwidth=1e3), Setup(ranks=2), (100.0, 2.0))
    costs = SimpleNamespace(forward=lambda rows, heads: 1000.0 * rows.tokens)
    work = clock.sampling(
        "sample", costs, Rows(8, 10, 20), SimpleNamespace(generation_batch_size=2)
    )
    # 80 prompt tokens of 1000 FLOPs, at 30 % of 1e6 a second on each of two ranks
    prompts = 80 * 1000 / (0.3 * 1e6 * 2)
    # four responses of 20 tokens on a rank, two at a time: 40 steps, each reads 100 bytes of weights and
    # 2 responses x 20 tokens x 2 bytes, at half of 1000 bytes a second
    reading = 40 * 180 / 500
    assert work.seconds == pytest.approx(prompts + reading)
    assert work.flops == 1000.0 * 8 * 30


def test_the_last_batch_of_each_epoch_is_a_step():
    options = {"max_steps": -1, "validation_fraction": 0.1, "test_fraction": 0.1}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    # 8 of 10 rows in batches of 8 are one step an epoch, 9 of 11.25 two
    config = SimpleNamespace(**options, num_train_epochs=3)
    assert steps_of(config, Setup(ranks=1), 10) == 3
    assert steps_of(config, Setup(ranks=1), 12) == 6
    assert steps_of(config, Setup(ranks=2), 12) == 3


# a forward pass: 10 FLOPs a token and one a position with logits; forth and back 100
COSTS = SimpleNamespace(
    forward=lambda rows, heads: 10 * rows.tokens + heads,
    learning=lambda rows, heads: 100 * rows.tokens + heads,
)


def by_name(works):
    return {work.name: (work.tokens, work.flops) for work in works}


def test_ppo_scores_measures_and_learns_each_rollout():
    config = SimpleNamespace(
        rollout_batch_size=4, num_ppo_epochs=2, has_critic=True, critic_trunk="own",
        reward=[{"model": "a"}, {"ensemble": ["b", "c"]}, {"function": "f:g"}], old_logprobs="engine",
        generation_batch_size=4,
    )  # fmt: skip
    clock = Clock(Device("x", 1.0, flops=1e6, bandwidth=1e3), Setup(device="cpu"), (1.0, 1.0))
    found = by_name(ppo_work(config, COSTS, clock, (3, 2), steps=5))
    # a rollout: 4 rows of 5 tokens, 8 of a response; 5 of them
    assert found["sample"] == (100, 1008 + 32)
    # three reward models; then reference and critic
    assert found["score"] == (3 * 100, 3 * 1000)
    assert found["measure"] == (2 * 100, 1040 + 1000)
    # policy and critic, twice each
    assert found["learn"] == (2 * 2 * 100, 2 * (10_000 + 40 + 10_000))
    # the learner measures the policy again
    config.old_logprobs = "learner"
    again = by_name(ppo_work(config, COSTS, clock, (3, 2), steps=5))
    assert again["measure"] == (3 * 100, 2 * 1040 + 1000)


def test_dpo_learns_from_both_rows_and_measures_the_reference_once():
    config = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=3, use_peft=True
    )
    clock = Clock(Device("x", 1.0, flops=1e6, bandwidth=1e3), Setup(ranks=2), (1.0, 1.0))
    # 12 pairs a step share 12 prompts of 3 tokens, and have 24 responses of 2
    found = by_name(offline_work("dpo", config, COSTS, clock, (3, 2), 4, 20))
    assert found["learn"] == (4 * 84, 4 * (8400 + 48))
    # 20 pairs are two passes of 12, however often they are learnt from
    assert found["reference"] == (2 * 84, 2 * (840 + 48))


def test_a_head_that_learns_takes_three_products_more_than_its_forward_pass():
    shape = DecoderShape(linear=10, trained=2, first=1, last=1, pair=1)
    rows = Rows(1, 2, 1)
    # forward 2 (10 x 3 + 3 x 3), and a head of 5; backward 2 (11 x 3 + 2.5 x 9), and the states' gradient
    frozen = Costs(shape, 5, head_learns=False, to_embeddings=False, recomputed=False)
    assert frozen.forward(rows, 1) == 78 + 10
    assert frozen.learning(rows, 1) == 88 + 111 + 10
    # embeddings learn with the head: 2 (12 x 3 + 2.5 x 9); its own gradient and logits made again
    whole = Costs(shape, 5, head_learns=True, to_embeddings=True, recomputed=False)
    assert whole.learning(rows, 1) == 88 + 117 + 30
