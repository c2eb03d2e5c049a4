"""Prompts -> completions -> scores -> log-probabilities and values: one rollout, the same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import BadScore, Samples, Scorer, Scores
from rlhf.distributed import DistributedContext
from rlhf.engines.hf import Completions, Sampling, sample_key
from rlhf.evaluate import to_samples
from rlhf.logprobs import completion_batch
from rlhf.roles import MOVING, Roles

Engine = Callable[..., Completions]  # as rlhf.engines.hf.generate


@dataclass
class Rollout:
    """N responses of the policy, whole on every rank. (N, T) tensors are aligned on response tokens.

    `batch` holds what a forward pass reads: ids and attention (N, L), positions, responses and mask (N, T).
    """

    batch: dict[str, Tensor]
    logprobs: Tensor  # (N, T) of the policy that sampled, by the learner's own forward pass
    ref_logprobs: Tensor  # (N, T) of the policy that training began with
    penalty_logprobs: Tensor  # (N, T) of the reference that the KL penalty is measured to; ref_logprobs unless it moves
    values: Tensor  # (N, T) of the state before each token; 0 without a critic
    entropy: Tensor  # (N, T)
    scores: Tensor  # (N,) as the scorer gave them
    ended: Tensor  # (N,) bool
    group_index: Tensor  # (N,) which prompt of the rollout a response answers
    breakdown: dict[str, list[float]]
    samples: Samples
    seconds: dict[str, float] = field(default_factory=dict)
    logprob_gap: float = 0.0  # mean |engine's - learner's| log-probability of a true token

    @property
    def mask(self) -> Tensor:
        return self.batch["mask"]

    def __len__(self) -> int:
        return len(self.scores)


def collect(
    roles: Roles,
    prompts: list[dict[str, Any]],
    engine: Engine,
    scorer: Scorer,
    world: DistributedContext,
    *,
    tokenizer: Any,
    stop_ids: list[int],
    sampling: Sampling,
    seed: int,
    step: int,
    samples_per_prompt: int = 1,
    micro_batch_size: int = 8,
    generation_batch_size: int = 64,
) -> Rollout:
    """Sample `samples_per_prompt` responses to each prompt with the policy and measure them in every role.

    Each rank handles its share; ids are gathered before the forward passes, so that all of them have one width and
    the first ratio of learning is exactly 1. Parameters have to be whole (ranks make different numbers of passes). What
    a scorer raises on one rank (BadScore, where a score is no number) is raised on all.
    """
    seconds: dict[str, float] = {}
    wanted = [(i, s) for i in range(len(prompts)) for s in range(samples_per_prompt)]
    keys = sample_keys(prompts, samples_per_prompt, seed, step)
    mine = [wanted[i] for i in world.shard(len(wanted))]
    began = time.monotonic()
    with roles.use("policy"):
        done = engine(
            roles.trunk,
            [prompts[i]["prompt_ids"] for i, _ in mine],
            [keys[i] for i in world.shard(len(wanted))],
            sampling,
            stop_ids,
            tokenizer.pad_token_id,
            generation_batch_size,
        )
    seconds["time/generate"] = time.monotonic() - began

    samples = to_samples(
        [prompts[i]["record"] for i, _ in mine],
        [prompts[i]["prompt_ids"] for i, _ in mine],
        done.response_ids,
        done.ended,
        tokenizer,
    )
    began = time.monotonic()
    local = world.raise_on_all_ranks(lambda: checked(scorer(samples), samples) if mine else None)
    seconds["time/score"] = time.monotonic() - began
    fields = ("prompts", "responses", "prompt_ids", "response_ids", "ended", "metadata")
    samples = Samples(**{name: world.gather(getattr(samples, name)) for name in fields})
    total = world.gather(list(local.total) if local else [])
    parts = world.gather([{k: v[i] for k, v in local.breakdown.items()} for i in range(len(mine))] if local else [])
    engine_logprobs = world.gather(done.logprobs)

    began = time.monotonic()
    columns = completion_batch(samples.prompt_ids, samples.response_ids, tokenizer.pad_token_id, world.device)
    batch = dict(zip(("ids", "attention", "positions", "responses", "mask"), columns, strict=True))
    rows = world.shard(len(samples))
    parts_of = measure(roles, batch, rows, micro_batch_size, sampling.temperature)
    mask, measured = batch["mask"], {}
    for name, part in parts_of.items():
        whole = torch.cat(world.gather([part.cpu()])).to(world.device)
        measured[name] = torch.where(mask, whole, torch.zeros_like(whole))
    logprobs = measured["logprobs"]
    measured.setdefault("penalty_logprobs", measured["ref_logprobs"])
    measured.setdefault("values", torch.zeros_like(logprobs))
    seconds["time/forward"] = time.monotonic() - began

    seen = torch.zeros_like(logprobs)
    for row, numbers in enumerate(engine_logprobs):
        seen[row, : len(numbers)] = torch.tensor(numbers, dtype=seen.dtype)
    gap = float((torch.where(mask, seen - logprobs, torch.zeros_like(seen)).abs().sum() / mask.sum()).item())

    return Rollout(
        batch=batch,
        **measured,
        scores=torch.tensor(total, dtype=logprobs.dtype, device=world.device),
        ended=torch.tensor(samples.ended, device=world.device),
        group_index=torch.tensor([i for i, _ in wanted], device=world.device),
        breakdown={name: [p[name] for p in parts] for name in (parts[0] if parts else {})},
        samples=samples,
        seconds=seconds,
        logprob_gap=gap,
    )


def sample_keys(prompts: list[dict[str, Any]], samples_per_prompt: int, seed: int, step: int) -> list[int]:
    """One noise key a response, samples of a prompt together; a prompt that comes twice gets fresh samples."""
    keys, seen = [], {}
    for row in prompts:
        name = tuple(row["prompt_ids"])
        first = seen.get(name, 0)
        keys += [sample_key(seed, f"rollout/{step}", row["prompt_ids"], first + s) for s in range(samples_per_prompt)]
        seen[name] = first + samples_per_prompt
    return keys


def checked(scores: Scores, samples: Samples) -> Scores:
    """The scores. Raises BadScore for a total that is NaN or infinite, with the prompt it was given for."""
    for i, value in enumerate(scores.total):
        if not math.isfinite(value):
            prompt = samples.prompts[i][-1]["content"]
            raise BadScore(f"the score of a response is {value}: prompt {prompt!r}", "total", i, value)
    return scores


@torch.no_grad()
def measure(
    roles: Roles, batch: dict[str, Tensor], rows: range, micro_batch_size: int, temperature: float
) -> dict[str, Tensor]:
    """logprobs, entropy, ref_logprobs and, where these roles are there, penalty_logprobs and values of these rows,
    each (len(rows), T)."""
    found: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "ref_logprobs": []}
    found |= {"penalty_logprobs": []} if roles.has_moving_reference else {}
    found |= {"values": []} if roles.has_critic else {}
    for start in range(rows.start, rows.stop, micro_batch_size):
        part = {k: v[start : min(start + micro_batch_size, rows.stop)] for k, v in batch.items()}
        with roles.use("policy"):
            logprobs, entropy = roles.logprobs(part, temperature)
        found["logprobs"].append(logprobs)
        found["entropy"].append(entropy)
        with roles.use("reference"):
            found["ref_logprobs"].append(roles.logprobs(part, temperature)[0])
        if roles.has_moving_reference:
            with roles.use(MOVING):
                found["penalty_logprobs"].append(roles.logprobs(part, temperature)[0])
        if roles.has_critic:
            with roles.use("value"):
                found["values"].append(roles.values(part))
    nothing = batch["mask"].new_zeros((0, batch["mask"].shape[1]), dtype=torch.float32)
    return {name: torch.cat(parts) if parts else nothing for name, parts in found.items()}


def role_scorer(roles: Roles, pad_id: int, batch_size: int = 32, name: str = "reward") -> Scorer:
    """The reward role as a scorer: reads the ids that were sampled, as the reward model read them in training."""

    @torch.no_grad()
    def score(samples: Samples) -> Scores:
        device = next(roles.parameters()).device
        totals: list[float] = []
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            ids, attention, *_ = completion_batch(samples.prompt_ids[part], samples.response_ids[part], pad_id, device)
            with roles.use("reward"):
                totals += roles.scores(ids, attention).tolist()
        return Scores(totals, {name: totals})

    return score
