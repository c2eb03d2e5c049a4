"""What every engine shares: how to sample, the key of a response, the drawing of a token.

Randomness of a token is a function of (seed, step, prompt, sample, position) through Gumbel noise
on the logits, so it does not depend on rank, batch or resume: argmax(logits / temperature + Gumbel)
is a draw from the softmax (Maddison et al. 2014).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to sample. Training uses temperature alone; top_k and top_p belong to evaluation.
    Temperature 0 is greedy.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Completions:
    """B responses: ids with the stop token where there is one, whether each ended, and the
    log-probabilities (nats, under the distribution that was sampled from) as the engine saw them.
    """

    response_ids: list[list[int]]
    ended: list[bool]
    logprobs: list[list[float]]


def sample_key(seed: int, purpose: str, prompt_ids: list[int], sample: int) -> int:
    """The 63-bit key of one response's noise.

    `purpose` keeps apart what must be independent, and holds the step where there is one:
    "collect", "evaluate", "rollout/7". Two policies that are compared share sampling noise by the
    same key.
    """
    name = f"{seed}/{purpose}/{prompt_ids}/{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def draw(logits: Tensor, keys: Tensor, position: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (B, V) and its log-probability under the sampled
    distribution.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    logprobs = torch.log_softmax(
        restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p), -1
    )
    tokens = (logprobs + gumbel(keys, position, logits.shape[-1])).argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest and outside the smallest set whose probability reaches top_p
    (0 and 1 are off).
    """
    if top_k > 0 and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def gumbel(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """(B, V) standard Gumbel noise, a pure function of (key, position, token id), the same on every
    device.
    """
    row = _mix(keys + _signed(0x9E3779B97F4A7C15 * (position + 1)))
    column = torch.arange(vocabulary, dtype=torch.int64, device=keys.device) * _signed(
        0xD1342543DE82EF95
    )
    bits = _mix(row[:, None] + column[None, :])
    uniform = ((bits >> 12) & ((1 << 52) - 1)).to(torch.float64)
    uniform = (uniform + 0.5) / float(1 << 52)  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), on int64 with wrap-around."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # int64 shifts keep the sign; this one does not


def _signed(constant: int) -> int:
    constant %= 1 << 64
    return constant - (1 << 64) if constant >= 1 << 63 else constant
