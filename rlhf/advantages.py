"""From scores to advantages: KL estimates, token rewards, generalised advantage estimation, the KL controller.

Column t of every (B, T) tensor is about response token t: its log-probability, the value of the state before it, its
reward, its advantage. The mask is True exactly where the policy sampled a token, the end token included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log p_ref of the sampled token: the unbiased estimate of KL(p || p_ref), which may be negative
    (Schulman 2020, "Approximating KL divergence", k1)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = p_ref / p: unbiased too, never negative, of lower variance (ibid., k3)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, and the response's score is added at its last true token (Ziegler et al. 2019, eq. 2).

    scores (B,), kl and mask (B, T) -> (B, T), 0 where the mask is False.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.sum(-1) - 1
    has_tokens = last >= 0
    rows = torch.arange(len(scores), device=scores.device)[has_tokens]
    rewards[rows, last[has_tokens]] += scores[has_tokens].to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the state after the last true token is worth 0.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t

    All (B, T). Returns advantages and returns, 0 where the mask is False.
    """
    mask_f = mask.to(values.dtype)
    values, rewards = values * mask_f, rewards * mask_f
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask_f[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask_f


@dataclass
class KLController:
    """The weight of the KL in the reward: fixed, or adapted towards a target (Ziegler et al. 2019, sec. 2.2).

    With a target, after a step of n responses that measured `kl` nats a response:
        e = clip(kl / target - 1, -0.2, 0.2),    coef <- coef * (1 + e * n / horizon)
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, responses: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon
