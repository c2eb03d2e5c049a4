"""The reward model's objective: Bradley-Terry on pairs, as a function of tensors and numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_prob: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negative log-likelihood of the preferences, averaged over pairs.

        d = r_chosen - r_rejected - margin
        L = mean[ w ( -p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (r_chosen + r_rejected)^2 ) ]

    p = 1 is Bradley and Terry (1952) as in Ouyang et al. 2022, eq. 1; the margin is Touvron et al.
    2023 (Llama 2), eq. 2; p < 1 is a soft label, or label smoothing e with p = 1 - e; c centres the
    scores, which the likelihood leaves free to drift (Eisenstein et al. 2023, arXiv 2312.09244;
    TRL's `center_rewards_coefficient`).

    chosen, rejected: (B,) scores. margin, label_prob, weight: (B,) or None; a row without a margin
    has 0, a row without a soft label NaN, which takes 1 - label_smoothing. The mean divides by B,
    not by the sum of the weights, so that micro-batches and ranks of equal size add up to the whole
    batch: give weights a mean of 1 over the data. Returns the loss and detached metrics: `accuracy`
    (a tie counts half), `margin` (mean r_chosen - r_rejected) and `reward` (mean over both
    responses). Raises ValueError on shapes that differ.
    """
    for name, value in (
        ("rejected", rejected),
        ("margin", margin),
        ("label_prob", label_prob),
        ("weight", weight),
    ):
        if value is not None and value.shape != chosen.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, chosen has {tuple(chosen.shape)}"
            )
    # a bf16 margin would be rounded to 3 digits
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(dtype), rejected.to(dtype)
    gap = chosen - rejected
    d = gap if margin is None else gap - margin.to(dtype)
    p = torch.full_like(d, 1.0 - label_smoothing)
    if label_prob is not None:
        p = torch.where(label_prob.isnan(), p, label_prob.to(dtype))
    rows = -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d)
    if center_coefficient:
        rows = rows + center_coefficient * (chosen + rejected) ** 2
    if weight is not None:
        rows = rows * weight.to(dtype)
    with torch.no_grad():
        metrics = {
            "accuracy": pair_accuracy(gap).mean(),
            "margin": gap.mean(),
            "reward": (chosen.mean() + rejected.mean()) / 2,
        }
    return rows.mean(), metrics


def pair_accuracy(gap: Tensor) -> Tensor:
    """Return (B,) 1 where the chosen response scores higher, 0 where it scores lower, one half
    where they tie.
    """
    return (gap > 0).float() + 0.5 * (gap == 0).float()
