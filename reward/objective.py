"""The reward model's objective: Bradley-Terry or Davidson on pairs, as functions of tensors and
numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_prob: Tensor | None = None,
    tie_prob: Tensor | None = None,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    log_tie: float | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negative log-likelihood of the preferences, averaged over pairs.

        d = r_chosen - r_rejected - margin + offset
        L = mean[ w ( -p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (r_chosen + r_rejected)^2 ) ]

    p = 1 is Bradley and Terry (1952) as in Ouyang et al. 2022, eq. 1; the margin is Touvron et al.
    2023 (Llama 2), eq. 2; p < 1 is a soft label, or label smoothing e with p = 1 - e; c centres the
    scores, which the likelihood leaves free to drift (Eisenstein et al. 2023, arXiv 2312.09244;
    TRL's `center_rewards_coefficient`). With `log_tie` the likelihood is Davidson's of three
    outcomes (`pair_log_loss`). The offset is what the lengths alone say (`reward.length`).

    chosen, rejected: (B,) scores. margin, label_prob, tie_prob, weight, offset: (B,) or None; a row
    without a margin, tie_prob or offset has 0, a row without a soft label NaN, which takes
    1 - label_smoothing. The mean divides by B, not by the sum of the weights, so that micro-batches
    and ranks of equal size add up to the whole batch: give weights a mean of 1 over the data.

    Returns the loss and detached metrics: `accuracy` over the pairs with a winner (an equal score
    counts half; NaN without such a pair), `margin` (mean r_chosen - r_rejected), `reward` (mean
    over both responses) and `log_loss` (B,), the likelihood alone: without margin, weight,
    smoothing and centring. Raises ValueError on shapes that differ.
    """
    extras = {"margin": margin, "label_prob": label_prob, "tie_prob": tie_prob}
    extras |= {"weight": weight, "offset": offset}
    for name, value in {"rejected": rejected, **extras}.items():
        if value is not None and value.shape != chosen.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, chosen has {tuple(chosen.shape)}"
            )
    # a bf16 margin would be rounded to 3 digits
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    gap = chosen - rejected
    fitted = gap if offset is None else gap + offset.to(dtype)
    given = torch.full_like(gap, math.nan) if label_prob is None else label_prob.to(dtype)
    p = torch.where(given.isnan(), 1.0 - label_smoothing, given)

    d = fitted if margin is None else fitted - margin.to(dtype)
    rows = pair_log_loss(d, p, tie_prob, log_tie)
    if center_coefficient:
        rows = rows + center_coefficient * (chosen + rejected) ** 2
    if weight is not None:
        rows = rows * weight.to(dtype)
    with torch.no_grad():
        label = torch.where(given.isnan(), 1.0, given)
        has_winner = label != 0.5
        metrics = {
            "accuracy": pair_accuracy(gap)[has_winner].mean(),
            "margin": gap.mean(),
            "reward": (chosen.mean() + rejected.mean()) / 2,
            "log_loss": pair_log_loss(fitted, label, tie_prob, log_tie),
        }
    return rows.mean(), metrics


def pair_log_loss(
    d: Tensor, p: Tensor, tie_prob: Tensor | None = None, log_tie: float | None = None
) -> Tensor:
    """Return the negative log-likelihood of each pair, (B,), in nats.

        without log_tie:  -p log sigmoid(d) - (1 - p) log sigmoid(-d)
        with log_tie:     -a log P(chosen) - t log P(tie) - b log P(rejected)
                          = log Z - (a - b) d / 2 - t log v,    a = p - t / 2,   b = 1 - p - t / 2

    The second is Davidson (1970, "On extending the Bradley-Terry model to accommodate ties in
    paired comparison experiments", eq. 2.4): with worths exp(r) and the tie parameter v, the
    outcomes have probabilities exp(d / 2) / Z, v / Z and exp(-d / 2) / Z. v = 0 is Bradley and
    Terry. d: (B,) differences of scores; p: (B,) the chance that chosen is better, half of the ties
    included; tie_prob t: (B,) or None for no ties.
    """
    if log_tie is None:
        return -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d)
    log_z = davidson_log_z(d, log_tie)
    # a - b
    lean = 2 * p - 1
    rows = log_z - lean * d / 2
    return rows if tie_prob is None else rows - tie_prob.to(d.dtype) * log_tie


def davidson_log_z(d: Tensor, log_tie: float) -> Tensor:
    """Return log Z = log(exp(d / 2) + v + exp(-d / 2)) of Davidson's model, (B,)."""
    terms = torch.stack([d / 2, torch.full_like(d, log_tie), -d / 2])
    return torch.logsumexp(terms, 0)


def tie_probability(d: Tensor, log_tie: float) -> Tensor:
    """Return P(tie) = v / Z of Davidson's model, (B,)."""
    return torch.exp(log_tie - davidson_log_z(d, log_tie))


def pair_accuracy(gap: Tensor) -> Tensor:
    """Return (B,) 1 where the chosen response scores higher, 0 where it scores lower, one half
    where they tie.
    """
    return (gap > 0).float() + 0.5 * (gap == 0).float()
