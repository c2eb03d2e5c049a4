"""Times of work on numbers worked by hand."""

from types import SimpleNamespace

import pytest

from rlhf.plan.devices import Device
from rlhf.plan.memory import Setup
from rlhf.plan.passes import Rows
from rlhf.plan.work import Clock, steps_of


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
