"""The formula of traffic, and times by hand."""

import json

import pytest

from benchmarks.ranks import scaling_estimate
from benchmarks.ranks.scaling_estimate import Model, link_bytes, messages, seconds
from tests.conftest import ROOT

TINY = Model(base=100, embeddings=10, trainable=3)


def test_messages_by_hand():
    assert messages("sft", "0", TINY) == {"all_reduce": 12}
    # three micro-batches in two steps: ZeRO 2 sums with each micro-batch, ZeRO 1 with each step, and
    # updated weights travel with each step
    several = {"micro_batches": 3, "steps": 2}
    assert messages("dpo", "2", TINY, **several) == {
        "all_reduce": 3 * 12,
        "all_gather_into_tensor": 2 * 12,
    }
    assert messages("dpo", "1", TINY, **several) == {
        "all_reduce": 2 * 12,
        "all_gather_into_tensor": 2 * 12,
    }
    # forward and backward: 2 x (2 x 100 + 4 x 3)
    sent = messages("sft", "3", TINY)
    assert sent == {"all_gather_into_tensor": 424, "reduce_scatter_tensor": 12}
    # PPO, two micro-batches: each 4 x 200 + 2 x 12 - 2 x 20, and 212 once
    sent = messages("ppo", "3", TINY, micro_batches=2)
    assert sent["all_gather_into_tensor"] == 2 * 784 + 212
    assert sent["reduce_scatter_tensor"] == 24


def test_a_ppo_step_by_hand(monkeypatch):
    monkeypatch.setattr(scaling_estimate, "MODEL", TINY)
    # 16 rows of 1024 tokens, 100 weights
    work, spoken = scaling_estimate.ppo_seconds(16, 8, "2", network=1.0)
    flops = scaling_estimate.MACHINE.flops
    # 4 passes forward of 2 FLOPs a weight; 4 epochs of policy and critic of 6
    passes = 100 * 16 * 1024 * (4 * 2 + 4 * 2 * 6) / flops
    assert work == pytest.approx(scaling_estimate.sampling_seconds(16) + passes)
    # 8 micro-batches in 4 steps: gradients of 2 x 3 numbers 8 times, weights 4 times; 2 x (8 + 4) calls
    sent = {"all_reduce": 8 * 24, "all_gather_into_tensor": 4 * 24}
    assert spoken == pytest.approx(seconds(sent, 24, 8, network=1.0))


def test_rings_and_links_by_hand():
    sent = {"all_reduce": 80.0, "all_gather_into_tensor": 40.0}
    # 7/8 of the message, twice for the sum
    assert link_bytes(sent, 8) == 7 / 8 * (2 * 80 + 40)
    machine = scaling_estimate.MACHINE
    # 6 hops in a machine; 6 more between 8 machines
    inside = 175 / machine.nvlink + 3 * 6 * machine.latency_in
    assert seconds(sent, 3, 8, network=1.0) == pytest.approx(inside)
    between = 63 / 64 * 200 / 2.0 + 3 * (6 * machine.latency_in + 6 * machine.latency_out)
    assert seconds(sent, 3, 64, network=2.0) == pytest.approx(between)


def test_measured_traffic_is_the_formulas(tmp_path):
    found = json.loads((ROOT / "benchmarks/results/communication.json").read_text())
    assert {(c["program"], c["stage"]) for c in found} >= {
        (program, stage) for program in ("sft", "dpo", "ppo") for stage in "0123"
    }
    assert scaling_estimate.largest_difference(found) <= 0.01
    # one gather more is seen
    found[3]["step"]["all_gather_into_tensor"]["bytes"] *= 2
    assert scaling_estimate.largest_difference(found) > 0.9


def test_gathers_of_a_step_are_as_many_as_measured(monkeypatch):
    monkeypatch.setattr(scaling_estimate, "LAYERS", 4)
    found = json.loads((ROOT / "benchmarks/results/communication.json").read_text())
    seen = {(cell["program"], cell["stage"]): cell["step"] for cell in found}
    for program in ("sft", "dpo", "ppo"):
        calls = seen[program, "3"]["all_gather_into_tensor"]["calls"]
        assert scaling_estimate.calls_of(program, "3") == pytest.approx(calls, rel=0.03)


def test_the_page_is_that_of_the_numbers():
    found = json.loads((ROOT / "benchmarks/results/communication.json").read_text())
    assert scaling_estimate.PAGE.read_text() == scaling_estimate.page(found)
