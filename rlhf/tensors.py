"""Masked arithmetic on (B, T) tensors. True in a mask means: this token was sampled by the policy
and counts.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over true entries; what stands under False is never read, not even NaN."""
    return torch.where(
        mask, values, torch.zeros((), dtype=values.dtype, device=values.device)
    ).sum()


def masked_sum_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return (B,) from (B, T): each row's sum over its true entries."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(
        -1
    )


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Return the sum over true entries divided by `count`, by default the number of true entries.

    A loss over several micro-batches or ranks passes the count of all its tokens, so that its parts
    add up to the mean over all tokens however unevenly they are cut.
    """
    total = masked_sum(values, mask)
    return total / (mask.sum().clamp(min=1) if count is None else count)


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) over true entries (population variance); 0 elsewhere.

    With shift_mean False the mean is added back, which scales rewards without moving their zero.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros((), dtype=values.dtype, device=values.device))


def selected_logprobs(
    logits: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature)[ids] and the entropy of that distribution, in
    float32 or better.

    logits (..., V), ids (...). Returns two tensors shaped like ids, nats.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return chosen, entropy


def pad_right(
    rows: list[list[float]], value: float = 0, width: int | None = None, dtype=torch.long
) -> Tensor:
    """Return a (B, width) tensor of ragged rows; width defaults to the longest."""
    width = max((len(r) for r in rows), default=0) if width is None else width
    return torch.tensor(
        [[*row, *([value] * (width - len(row)))] for row in rows], dtype=dtype
    ).reshape(len(rows), width)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - Var[returns - values] / Var[returns] over response tokens: 1 is perfect, 0 no
    better than the mean.
    """
    mean_return = masked_mean(returns, mask)
    variance = masked_mean((returns - mean_return) ** 2, mask)
    residual = returns - values
    unexplained = masked_mean((residual - masked_mean(residual, mask)) ** 2, mask)
    return 1 - unexplained / variance.clamp(min=1e-12)
