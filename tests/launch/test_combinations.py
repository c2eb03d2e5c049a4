"""Programs x ZeRO x options on two ranks, each held against the same run in one plain process."""

import itertools
import json
import math

import pytest

from tests.launch.combinations import (
    FACTORS,
    allowed,
    combinations_of,
    covering,
    run_one_and_two,
    run_table,
)

# of the weights' norm; a run moves it by 0.04 at least, and bfloat16 rounds activations to 8 bits
WEIGHTS = {"float32": 1e-4, "bfloat16": 0.02}
# relative, of the norms in the first step
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.05}


@pytest.mark.parametrize("strength", [2, 3])
def test_all_values_that_may_meet_do(strength):
    # by the obvious way: each combination of values is in an allowed run, or in none
    product = [
        dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
    ]
    wanted = {c for run in product if allowed(run) for c in combinations_of(run, strength)}
    chosen = covering(strength)
    assert {c for run in chosen for c in combinations_of(run, strength)} == wanted
    assert all(map(allowed, chosen)) and chosen == covering(strength)
    # four programs x seven kinds of ZeRO need 28 at least
    assert len(chosen) < (31 if strength == 2 else 80)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_on_two_ranks_means_what_one_process_means(tmp_path):
    rows = run_table(tmp_path, covering(2))
    for row in rows:
        print(json.dumps(row))
    for row in rows:
        # its learning rate is a tenth
        takes_less = (row["program"], row["weights"]) == ("ppo", "whole")
        assert row["norm"] < WEIGHTS[row["dtype"]] * (0.1 if takes_less else 1), row
        assert math.isfinite(row["loss"]) and not row["gradient"] > GRADIENTS[row["dtype"]], row


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ppo_on_two_ranks_is_the_run_of_one_process_but_for_rounding(tmp_path):
    """Which grows from update to update: here 1e-16 in 48 of them, and in float32 to 5e-3 of a loss."""
    (row,) = run_one_and_two(tmp_path, [("ppo", "float64", 6, ("--dtype", "float64"))])
    assert row["largest"] < 1e-10 and row["loss"] < 1e-10 and row["tokens"] == 0, row
