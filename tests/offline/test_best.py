"""Which evaluation is the best, and how long ago it was, by hand."""

import math

import pytest

from rlhf.offline.best import HeldOutLosses

STEPS = [(10, 0.7), (20, 0.5), (30, 0.6), (40, 0.5), (50, 0.55)]


def test_the_best_is_the_lowest_and_of_equals_the_last():
    # as `prune` keeps checkpoints
    assert HeldOutLosses(STEPS).best == (40, 0.5)
    assert HeldOutLosses(STEPS[:3]).best == (20, 0.5)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 3)])
def test_an_equal_loss_is_no_gain(count, expected):
    assert HeldOutLosses(STEPS[:count]).without_gain == expected


def test_a_checkpoint_holds_all_of_it():
    import json

    again = HeldOutLosses(json.loads(json.dumps(HeldOutLosses(STEPS).evaluations)))
    assert again.evaluations == STEPS and again.without_gain == 3
    assert again.loss_at(30) == 0.6 and again.loss_at(35) is None


def test_what_is_no_number_or_known_is_left_out():
    losses = HeldOutLosses()
    for step, loss in ((1, 0.5), (2, math.nan), (3, None), (1, 0.1), (4, math.inf)):
        losses.add(step, loss)
    assert losses.evaluations == [(1, 0.5)]


def test_a_run_without_a_finite_loss_has_no_best_model():
    from types import SimpleNamespace

    from rlhf.errors import UserError
    from rlhf.offline.best import load_best

    with pytest.raises(UserError, match="no evaluation on held-out pairs had a finite loss"):
        load_best(None, HeldOutLosses(), SimpleNamespace(folder="runs/reward"))
