"""The formula of traffic, and times by hand."""

import json

import pytest

from benchmarks import scaling_estimate
from benchmarks.scaling_estimate import Model, link_bytes, messages, seconds
from tests.conftest import ROOT

TINY = Model(base=100, embeddings=10, trainable=3)


def test_messages_by_hand():
    assert messages("sft", "0", TINY) == {"all_reduce": 12}
    assert messages("dpo", "2", TINY, micro_batches=2) == {
        "all_reduce": 24,
        "all_gather_into_tensor": 24,
    }
    # forward and backward: 2 x (2 x 100 + 4 x 3)
    sent = messages("sft", "3", TINY)
    assert sent == {"all_gather_into_tensor": 424, "reduce_scatter_tensor": 12}
    # PPO, two micro-batches: each 4 x 200 + 2 x 12 - 2 x 20, and 212 once
    sent = messages("ppo", "3", TINY, micro_batches=2)
    assert sent["all_gather_into_tensor"] == 2 * 784 + 212
    assert sent["reduce_scatter_tensor"] == 24


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


def test_the_page_is_that_of_the_numbers():
    found = json.loads((ROOT / "benchmarks/results/communication.json").read_text())
    assert scaling_estimate.PAGE.read_text() == scaling_estimate.page(found)
