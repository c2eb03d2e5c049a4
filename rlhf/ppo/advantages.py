"""From scores to advantages: score shaping, KL estimates, token rewards, advantage estimators, the
KL controller.

Column t of every (B, T) tensor is about response token t: its log-probability, the value of the
state before it, its reward, its advantage. The mask is True exactly where the policy sampled a
token, EOS included.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.tensors import masked_sum_rows


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log p - log p_ref of the sampled token: the unbiased estimate of KL(p || p_ref), which may be negative
    (Schulman 2020, "Approximating KL divergence", k1).
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (log p - log p_ref)^2 / 2: biased, never negative (ibid., k2).

    Its mean gradient on-policy is that of a token's KL given the tokens before it.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (r - 1) - log r with r = p_ref / p: unbiased too, never negative, of lower variance
    (ibid., k3).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    lengths: Tensor,
    *,
    moments: tuple[float, float] | None = None,
    clip: float | None = None,
    missing_eos: str = "min",
    missing_eos_score: float | None = None,
    length_penalty: float = 0.0,
) -> Tensor:
    """Return the score that is learnt from, shaped in this order, where asked for; all (B,):

    s <- (s - mean) / std                  moments = (mean, std), running over the run (Zheng et al. 2023, sec. 5.3.1)
    s <- clip(s, -clip, clip)              (ibid.)
    s <- EOS rule                          where the response did not end, by `missing_eos`
    s <- s - length_penalty * length       length in tokens

    EOS rule, m = missing_eos_score: `min` min(s, m), so that not ending never pays; `replace` m
    (2403.17031, detail 23); `subtract` s + m, m being negative (TRL's missing_eos_penalty is -m).
    """
    if moments is not None:
        scores = (scores - moments[0]) / moments[1]
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    if missing_eos_score is not None:
        unended = {
            "min": scores.clamp(max=missing_eos_score),
            "replace": torch.full_like(scores, missing_eos_score),
            "subtract": scores + missing_eos_score,
        }
        scores = torch.where(ended, scores, unended[missing_eos])
    return scores - length_penalty * lengths.to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the rewards of tokens from the scores of responses (Ziegler et al. 2019, eq. 2).

        r_t = -kl_coef kl_t + [t is the response's last token] score

    scores (B,), kl and mask (B, T) -> (B, T), 0 where the mask is False.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.sum(-1) - 1
    has_tokens = last >= 0
    rows = torch.arange(len(scores), device=scores.device)[has_tokens]
    rewards[rows, last[has_tokens]] += scores[has_tokens].to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE (Schulman et al. 2016, eq. 16); the state after the last token is
    worth 0.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t

    All (B, T). Returns advantages and returns, 0 where the mask is False.
    """
    nothing = torch.zeros((), dtype=values.dtype, device=values.device)
    values, rewards = torch.where(mask, values, nothing), torch.where(mask, rewards, nothing)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, nothing)
        advantages[:, t] = running
    return advantages, advantages + values


def rloo(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Estimate advantages against the mean of the prompt's other samples (Ahmadian et al. 2024,
    arXiv 2402.14740).

        A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean R),      R_i = sum_t r_t of response i

    rewards (B, T), group (B,) which prompt a row answers, k >= 2 rows each. Returns A_i on every
    token, (B, T).
    """
    totals = masked_sum_rows(rewards, mask)
    mean, size, _ = _group_moments(totals, group)
    return _on_tokens(size / (size - 1) * (totals - mean), mask)


def grpo(rewards: Tensor, mask: Tensor, group: Tensor, eps: float = 1e-4) -> Tensor:
    """Return the score in standard deviations of its group (Shao et al. 2024, arXiv 2402.03300,
    sec. 4.1.2).

        A_i = (R_i - mean R) / (std R + eps),      std over k - 1

    Shapes as in `rloo`.
    """
    totals = masked_sum_rows(rewards, mask)
    mean, size, squares = _group_moments(totals, group)
    return _on_tokens((totals - mean) / ((squares / (size - 1)).sqrt() + eps), mask)


def reinforce(rewards: Tensor, mask: Tensor, baseline: float) -> Tensor:
    """Return A_i = R_i - baseline on every response token; rewards (B, T) -> (B, T).

    The baseline is the mean of all earlier R (Williams 1992; 2402.14740's moving average).
    """
    return _on_tokens(masked_sum_rows(rewards, mask) - baseline, mask)


def _group_moments(totals: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, size and sum of squared deviations of each row's group, (B,) each."""
    _, index = torch.unique(group, return_inverse=True)
    size = torch.bincount(index).to(totals.dtype)
    mean = torch.zeros_like(size).index_add_(0, index, totals) / size
    squares = torch.zeros_like(size).index_add_(0, index, (totals - mean[index]) ** 2)
    return mean[index], size[index], squares[index]


def _on_tokens(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, rows[:, None], torch.zeros((), dtype=rows.dtype, device=rows.device))


@dataclass
class RunningMoments:
    """Mean and population variance of all numbers seen (Chan, Golub and LeVeque 1979: batches
    merged exactly).
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, values: Tensor) -> None:
        """Count these numbers, (n,), too."""
        n, values = len(values), values.double()
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        shift = mean - self.mean
        total = self.count + n
        self.squares += squares + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Return the standard deviation; 1 as long as all numbers are the same, so that dividing by
        it does no harm.
        """
        return math.sqrt(self.squares / self.count) if self.count and self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class KLController:
    """The weight of the KL in the reward: fixed, or adapted towards a target (Ziegler et al. 2019,
    sec. 2.2).

    With a target, after a step of n responses that measured `kl` nats a response:
        e = clip(kl / target - 1, -0.2, 0.2),    coef <- coef * (1 + e * n / horizon)
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, responses: int) -> None:
        """Adapt the weight after a step."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon
