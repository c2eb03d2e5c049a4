"""The losses of PPO as functions of tensors: policy, critic, KL, pretraining text.

`count` is the number of response tokens of the whole update (one optimizer step), over all
micro-batches and ranks: each part brings its own sum divided by it, so that the parts add up to the
mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.tensors import masked_mean


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    count: Tensor | float | None = None,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute PPO's clipped surrogate loss, averaged over response tokens (Schulman et al. 2017,
    eq. 7).

        L = -E[ min(r A, clip(r, 1 - e, 1 + e_high) A) ],    r = exp(logprobs - old_logprobs)

    e_high is e unless `clip_range_high` is given (Yu et al. 2025, arXiv 2503.14476, eq. 10:
    clip-higher). All inputs are (B, T); mask is True where the policy sampled the token. Returns
    the loss and its metrics: ppo/clip_fraction (where the clipped branch was the smaller),
    ppo/approx_kl (k3 of new against old) and ppo/ratio.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask, count)
    with torch.no_grad():
        metrics = {
            "ppo/clip_fraction": masked_mean((clipped < unclipped).to(ratio.dtype), mask, count),
            "ppo/approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask, count),
            "ppo/ratio": masked_mean(ratio, mask, count),
        }
    return loss, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped squared error of the critic, averaged over response tokens (2403.17031).

        L = 1/2 E[ max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) ]

    All inputs are (B, T); clip_range None leaves the plain squared error. Metric:
    value/clip_fraction.
    """
    squared = (values - returns) ** 2
    if clip_range is None:
        return 0.5 * masked_mean(squared, mask, count), {}
    near = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    squared_near = (near - returns) ** 2
    with torch.no_grad():
        fraction = masked_mean((squared_near > squared).to(values.dtype), mask, count)
    return 0.5 * masked_mean(torch.maximum(squared, squared_near), mask, count), {
        "value/clip_fraction": fraction
    }


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    estimator: Callable[[Tensor, Tensor], Tensor],
    count: Tensor | float | None = None,
) -> Tensor:
    """Return the mean over response tokens of a KL estimate that carries gradients (one of
    KL_ESTIMATORS).

    On samples of p itself k2 has the gradient of KL(p || p_ref) and k3 that of KL(p_ref || p), as GRPO does it
    (2402.03300, eq. 4), both of one token given those before it. Neither is the gradient of the sequence KL, which also
    has how a token changes what is met later; k1 in the reward has that. The expected gradient of k1 here is 0.
    """
    # where nothing was sampled k3 may overflow, and a gradient through infinity is NaN whatever the
    # mask
    return masked_mean(
        estimator(torch.where(mask, logprobs, ref_logprobs), ref_logprobs), mask, count
    )


def ptx_loss(logprobs: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Compute -log p of pretraining data, averaged over response tokens: PPO-ptx (Ouyang et al.
    2022, eq. 2).
    """
    return -masked_mean(logprobs, mask, count)
