"""Memory counted on fake tensors, against numbers worked by hand for layers of a few numbers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf.plan.ledger import Ledger, Reduction, peak_of, size_of
from rlhf.plan.memory import (
    Peak,
    Setup,
    Weights,
    held,
    reduced,
    sampling_phase,
    state_table,
    step_phase,
)

FLOAT = 4


def test_tensors_count_until_they_are_freed_and_views_once():
    with FakeTensorMode(), Ledger() as ledger:
        first = torch.zeros(10)
        assert ledger.alive == 10 * FLOAT
        second = first.view(2, 5).t()
        assert ledger.alive == 10 * FLOAT
        third = second + 1
        assert ledger.alive == 20 * FLOAT
        del first, second
        assert ledger.alive == 10 * FLOAT
        del third
    assert ledger.alive == 0
    assert ledger.peak.total == 20 * FLOAT


def test_a_pass_keeps_what_its_backward_pass_reads():
    # x (8, 3) @ W (3, 5) = y (8, 5); y.square() keeps y; its sum is one number. Backward: the
    # gradient of y (8, 5) while y is still there, then that of W (3, 5) from x, which stood before
    with FakeTensorMode():
        layer = nn.Linear(3, 5, bias=False)
        x = torch.zeros(8, 3)

        def passes(ledger):
            layer(x).square().sum().backward()

        peak = peak_of(layer, passes)
        again = peak_of(layer, passes, repeated=True)
        freed = peak_of(layer, passes, repeated=True, reduction=Reduction(0, 0))
    # forward: y and its square; backward: y, the square's gradient and what becomes y's
    assert peak.total >= 2 * 40 * FLOAT
    assert peak.gradients == 0
    # the gradient of the first pass stands through the second, unless it was handed over
    assert again.total - peak.total == 15 * FLOAT
    assert again.gradients == 15 * FLOAT
    assert freed.total == peak.total


def test_a_bucket_stands_from_the_gradient_of_a_pass_to_its_end():
    # 8 rows of 3 numbers to 100 to 1, float32. The first gradient is that of the last layer's 100
    # weights. The fullest moment behind it has those of the 8 x 100 between and of 3 x 100 weights
    middle, first, last = 8 * 100 * FLOAT, 100 * 3 * FLOAT, 100 * FLOAT

    def peak_with(reduction, *, repeated=False, forward_only=0):
        with FakeTensorMode():
            model = nn.Sequential(nn.Linear(3, 100, bias=False), nn.Linear(100, 1, bias=False))
            x = torch.zeros(8, 3)

            def passes(ledger):
                torch.zeros(forward_only)
                model(x).sum().backward()
                ledger.end_pass(reduction)

            return peak_of(model, passes, repeated=repeated, reduction=reduction)

    zero2 = Reduction(bucket=5000, kept=700)
    both = peak_with(zero2)
    assert (both.bucket, both.gradients) == (5000, 700)
    # and two sums
    assert both.total == middle + first + 5700 + 2 * FLOAT
    # a forward pass that is fuller than all of this finds no bucket, and what the first pass kept
    fuller = {"forward_only": 10_000}
    assert peak_with(zero2, **fuller).total == peak_with(Reduction(), **fuller).total
    again = peak_with(zero2, repeated=True, **fuller)
    assert (again.bucket, again.gradients) == (0, 700)
    # ZeRO 1 holds gradients and bucket until the optimizer's step
    again = peak_with(Reduction(5000), repeated=True, **fuller)
    assert (again.bucket, again.gradients) == (5000, first + last)


@pytest.mark.parametrize(
    ("setup", "optimizer", "learning"),
    [
        # plain: two moments of 4 bytes each, for 1000 numbers
        (Setup(1, "cpu", launched=False), 8000, 4000),
        # ZeRO-2 on one rank has a copy of the weights beside them
        (Setup(1, "cpu", stage=2), 12000, 4000),
        # four ranks: a quarter each
        (Setup(4, "cpu", stage=2), 3000, 4000),
        (Setup(4, "cpu", stage=3), 3000, 1000),
        (Setup(4, "cpu", stage=3, offload_optimizer=True), 0, 1000),
    ],
)
def test_zero_divides_the_optimizer_and_then_the_weights(setup, optimizer, learning):
    weights = Weights(frozen=800, adapters=0, other_models=0, trained=1000, trained_size=4)
    parts = held(weights, setup)
    assert parts["optimizer"] == optimizer
    assert parts["learning weights"] == learning
    assert parts["base"] == (200 if setup.stage == 3 else 800)


def test_what_each_stage_holds_between_passes():
    # 1000 numbers in float32, gradients too, and 800 bytes of a base, on four ranks; the state is 8 bytes
    # a number, and 12 with ZeRO's copy
    weights = Weights(frozen=800, adapters=0, other_models=0, trained=1000, trained_size=4)
    totals = [row["total"] for row in state_table(weights, Setup(4, "cpu", stage=2))]
    assert totals == [
        800 + 4000 + 8000 + 4000,
        800 + 4000 + 3000 + 4000,
        800 + 4000 + 3000 + 1000,
        200 + 1000 + 3000 + 1000,
    ]
    # the optimizer's state, and the gradients that are kept, on the CPU: there is no such ZeRO 0
    offloaded = Setup(4, "cpu", stage=2, offload_optimizer=True)
    totals = [row["total"] for row in state_table(weights, offloaded)]
    assert totals == [800 + 4000 + 8000 + 4000, 800 + 4000, 800 + 4000, 200 + 1000]


def test_mixed_precision_has_sixteen_bytes_for_each_number_that_learns():
    # Rajbhandari et al. 2020, sec. 3.1: 2 weight + 2 gradient + 12 = 4 copy + 4 + 4 moments
    weights = Weights(0, 0, 0, trained=1000, trained_size=2, masters=True, fused=True)
    setup = Setup(ranks=1, device="cpu", stage=2)
    parts = held(weights, setup)
    kept, _ = reduced(weights, setup)
    assert parts["learning weights"] + kept + parts["optimizer"] == 16_000


def test_adamw_makes_two_tensors_of_the_largest_weight_and_foreach_one_of_all():
    one = Weights(0, 0, 0, trained=1000, trained_size=4, largest=300)
    assert step_phase(one, Setup(device="cpu", launched=False)).parts["temporary"] == 2 * 300 * 4
    every = Weights(0, 0, 0, trained=1000, trained_size=4, largest=300, foreach=True)
    assert step_phase(every, Setup(launched=False)).parts["temporary"] == 1000 * 4


def test_sampling_holds_the_adapted_weights_once_more_beside_keys_and_values():
    weights = Weights(frozen=800, adapters=0, other_models=0, trained=10, trained_size=4)
    phase = sampling_phase(
        weights, Setup(device="cpu", launched=False), 600, 20, 1000, Peak(1500, 0, 100)
    )
    # 800 + 40 + moments 80 + 600 + (cache 1000, logits 100, else 400)
    assert phase.total == 800 + 40 + 80 + 600 + 1500


def test_tied_weights_count_once():
    with FakeTensorMode():
        weight = nn.Parameter(torch.zeros(6))
        assert size_of([weight, weight.view(2, 3)]) == 24
