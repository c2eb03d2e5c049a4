"""The tie parameter of Davidson's model, learnt along with the scores."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from reward.objective import tie_probability
from rlhf.errors import UserError

# share of a Newton step that one optimizer step makes: an average over about ten batches
RATE = 0.1
# longest step in log v, for a batch whose scores leave next to no chance of a tie
LONGEST = 1.0


class TieParameter(TrainerCallback):
    """log v of Davidson (1970), by maximum likelihood: as many ties expected as there are.

        sum_i w_i P_i(tie) = sum_i w_i t_i                       (the likelihood equation of log v)
        log v += 0.1 (t - mean P) / mean P (1 - P)               after each optimizer step

    t is the share of ties in the training pairs, P(tie) at the scores of the step's pairs, w their
    weights, and the means are over all micro-batches and ranks of the step: what a step is depends
    on neither. P (1 - P) is the information of log v (Fisher scoring). One number beside the
    model: the step size of its weights, some 1e-4, would take it nowhere. It starts where equal
    scores give the share of ties, v = 2 t / (1 - t).
    """

    def __init__(self, share: float, sum_over_ranks: Callable[[Tensor | float], Tensor]):
        self.share = share
        self.log_tie = math.log(2 * share / (1 - share))
        self.sum_over_ranks = sum_over_ranks
        # sums over the pairs of a step on this rank: of w, w P and w P (1 - P)
        self.sums = [0.0, 0.0, 0.0]

    def add(self, d: Tensor, weight: Tensor | None) -> None:
        """Count the pairs of one training pass, by their differences of scores (B,)."""
        p = tie_probability(d.detach().double(), self.log_tie)
        w = p.new_ones(p.shape) if weight is None else weight.to(p.dtype)
        parts = (w, w * p, w * p * (1 - p))
        for place, part in enumerate(parts):
            self.sums[place] += float(part.sum())

    def on_step_end(self, args, state, control, **kwargs):
        total, expected, information = map(float, map(self.sum_over_ranks, self.sums))
        self.sums = [0.0, 0.0, 0.0]
        if information > 0:
            step = RATE * (self.share * total - expected) / information
            self.log_tie += max(-LONGEST, min(LONGEST, step))

    def state_dict(self) -> dict[str, float]:
        return {"log_tie": self.log_tie}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.log_tie = state["log_tie"]


def tie_share(rows: Sequence[dict[str, Any]]) -> float:
    """Return the weighted share of ties in rows of `pair_rows`.

    Raises UserError where the tie parameter could not be learnt: no ties, or nothing else.
    """
    ties = total = 0.0
    for row in rows:
        weight = row.get("weight", 1.0)
        ties += weight * row.get("tie_prob", 0.0)
        total += weight
    share = ties / total if total else 0.0
    if not 0 < share < 1:
        found = "only ties" if share else "no ties"
        raise UserError(
            f"'ties' is davidson, but the training pairs hold {found}: votes 'tie' in a store, or a column "
            "tie_prob or votes, say which they are. Without them use: --ties soft"
        )
    return share
