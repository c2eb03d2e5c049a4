"""The tie parameter of Davidson's model is learnt to the maximum of the likelihood, whatever the batches."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from reward.objective import pair_log_loss
from reward.ties import RATE, TieParameter, tie_share
from rlhf.errors import UserError


def one_rank(value):
    return torch.as_tensor(value, dtype=torch.float64)


def test_it_starts_where_equal_scores_give_the_share_of_ties():
    # v / (2 + v) = 1/5 at v = 1/2
    assert math.exp(TieParameter(0.2, one_rank).log_tie) == pytest.approx(0.5)


def test_a_step_by_hand():
    # v = 1/2 at d = 0: P = 1/5, P (1 - P) = 4/25. Three pairs at d = 0: expected ties 3/5, and
    # there are 3 * 0.2; with one at d = 2 ln 2 too, Z = 2 + 0.5 + 0.5 = 3, P = 1/6, P (1 - P) = 5/36
    ties = TieParameter(0.2, one_rank)
    ties.add(torch.zeros(3), None)
    ties.on_step_end(None, None, None)
    assert math.exp(ties.log_tie) == pytest.approx(0.5, abs=1e-12)

    ties.add(torch.tensor([0.0, 2 * math.log(2)], dtype=torch.float64), None)
    ties.on_step_end(None, None, None)
    step = RATE * (0.4 - 1 / 5 - 1 / 6) / (4 / 25 + 5 / 36)
    assert ties.log_tie == pytest.approx(math.log(0.5) + step, abs=1e-12)


def test_it_settles_at_the_maximum_of_the_likelihood():
    generator = torch.Generator().manual_seed(0)
    d = 2 * torch.randn(400, generator=generator, dtype=torch.float64)
    outcome = torch.randint(0, 4, (400,), generator=generator)
    tie = (outcome == 3).double()
    p = torch.where(tie.bool(), 0.5, (outcome < 2).double())
    best = minimize_scalar(lambda v: pair_log_loss(d, p, tie, v).sum().item(), bounds=(-3, 3)).x
    ties = TieParameter(tie.mean().item(), one_rank)
    for _ in range(200):
        ties.add(d, None)
        ties.on_step_end(None, None, None)
    assert ties.log_tie == pytest.approx(best, abs=1e-4)
    assert ties.log_tie != pytest.approx(math.log(2 * ties.share / (1 - ties.share)), abs=0.05)


def test_a_step_depends_on_neither_micro_batch_nor_rank():
    d = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=torch.float64)
    weight = torch.tensor([2.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    whole = TieParameter(0.1, one_rank)
    whole.add(d, weight)
    parts = TieParameter(0.1, one_rank)
    for i in range(4):
        parts.add(d[i : i + 1], weight[i : i + 1])
    # two ranks with two pairs each
    other = TieParameter(0.1, one_rank)
    other.add(d[2:], weight[2:])
    sums = iter(other.sums)
    rank = TieParameter(0.1, lambda value: one_rank(value + next(sums)))
    rank.add(d[:2], weight[:2])
    for ties in (whole, parts, rank):
        ties.on_step_end(None, None, None)
    assert whole.log_tie != TieParameter(0.1, one_rank).log_tie
    assert parts.log_tie == pytest.approx(whole.log_tie, abs=1e-12)
    assert rank.log_tie == pytest.approx(whole.log_tie, abs=1e-12)


def test_the_share_is_weighted_and_must_be_one_to_learn_from():
    # (2 * 0.5 + 0 * 1) / 2
    rows = [{"tie_prob": 0.5, "weight": 2.0}, {"tie_prob": 1.0, "weight": 0.0}]
    assert tie_share(rows) == 0.5
    with pytest.raises(UserError, match="no ties"):
        tie_share([{"weight": 1.0}])
    with pytest.raises(UserError, match="only ties"):
        tie_share([{"tie_prob": 1.0}])
