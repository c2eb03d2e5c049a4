"""Proximal policy optimisation of a language model on adapter roles.

One step: sample a rollout, turn scores into token rewards, estimate advantages, then several epochs of clipped policy
and value updates over minibatches of it. The details follow *The N+ implementation details of RLHF with PPO*
(arXiv 2403.17031). Defaults are its recipe but for sizes that have to fit the machine (batch, episodes, lengths), the
temperature, and LoRA's step sizes; docs/algorithms.md lists each with its source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.advantages import KLController, gae, kl_k1, kl_k3, token_rewards
from rlhf.budget import Budget
from rlhf.config import UserError, option
from rlhf.data.records import Scorer
from rlhf.distributed import Learner, World, peak_memory
from rlhf.engines.hf import Sampling, generate
from rlhf.losses import policy_loss, value_loss
from rlhf.roles import Roles
from rlhf.rollout import Rollout, collect
from rlhf.stages import AdapterConfig, SamplingConfig, total_budget
from rlhf.tensors import explained_variance, masked_mean, masked_whiten


@dataclass(kw_only=True)
class PPOConfig(SamplingConfig, AdapterConfig):
    """PPO with a KL penalty to the SFT policy; policy, value, reference and reward are adapters on one base."""

    reward: list[dict] = option(help="scorers to learn from: [{model: runs/reward}, {voice: FILE, weight: 0.5}, ...]")
    total_episodes: int = option(10_000, "responses to sample and learn from", resume="free")
    rollout_batch_size: int = option(64, "responses in one rollout, over all devices")
    samples_per_prompt: int = option(1, "responses to each prompt of a rollout")
    num_ppo_epochs: int = option(4, "passes over each rollout")
    num_mini_batches: int = option(1, "optimizer steps in each pass")
    learning_rate: float = option(1e-5, "peak step size of the policy; LoRA stands more than the 3e-6 of 2403.17031")
    value_learning_rate: float | None = option(
        None, "that of the critic, default as the policy's. Adam is scale-invariant, so vf_coef hardly moves it"
    )
    lr_scheduler_type: Literal["linear", "constant"] = option("linear", "linear: down to 0 at the end of the run")
    adam_epsilon: float = option(1e-5, "AdamW's epsilon (2403.17031)")
    kl_coef: float = option(0.05, "weight of the KL to the reference in each token's reward; 0 lets the policy drift")
    kl_target: float | None = option(None, "adapt kl_coef towards this sequence KL in nats; default: fixed")
    kl_horizon: float = option(10_000, "responses over which an adaptive kl_coef moves")
    gamma: float = option(1.0, "discount of later rewards")
    gae_lambda: float = option(0.95, "trade of variance against bias in the advantages")
    clip_range: float = option(0.2, "how far the probability ratio may move in one rollout")
    value_clip_range: float | None = option(0.2, "how far a value may move in one rollout; none: no clipping")
    vf_coef: float = option(0.1, "weight of the value loss in the joint gradient norm; see value_learning_rate")
    whiten_advantages: bool = option(True, "mean 0 and variance 1 over all true tokens of the rollout")
    missing_eos_score: float | None = option(-1.0, "score of a response that does not end; none: the scorer's own")
    max_response_length: int = option(128, "tokens with EOS; a response is cut there and counts as not ended")

    def validate(self) -> None:
        super().validate()
        for name in ("rollout_batch_size", "samples_per_prompt", "num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected at least 1")
        if self.rollout_batch_size % self.samples_per_prompt:
            raise UserError(
                f"rollout_batch_size {self.rollout_batch_size} is no multiple of samples_per_prompt "
                f"{self.samples_per_prompt}"
            )
        if self.rollout_batch_size < self.num_mini_batches:
            raise UserError(f"{self.num_mini_batches} minibatches out of {self.rollout_batch_size} responses")
        if self.total_episodes < self.rollout_batch_size:
            raise UserError(
                f"total_episodes {self.total_episodes} is less than one rollout of {self.rollout_batch_size}"
            )
        if not self.reward:
            raise UserError("'reward' names no scorer; for example reward: [{model: runs/reward}]")
        if self.kl_target is not None and self.kl_target <= 0:
            raise UserError(f"'kl_target' is {self.kl_target}, expected more than 0 nats")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("'kl_target' adapts 'kl_coef' by factors, so 'kl_coef' cannot begin at 0")
        if self.kl_target is not None and self.kl_horizon < self.rollout_batch_size:
            raise UserError(f"'kl_horizon' is {self.kl_horizon}, less than one rollout of {self.rollout_batch_size}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected a number from 0 to 1")
        for name in ("kl_coef", "vf_coef", "value_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected 0 or more")
        for name in ("clip_range", "value_clip_range", "adam_epsilon"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected more than 0")

    @property
    def total_steps(self) -> int:
        """Whole rollouts; episodes beyond the last one are not sampled."""
        return self.total_episodes // self.rollout_batch_size

    @property
    def critic_rate(self) -> float:
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate


class PPOTrainer:
    """Holds the learner and the counters; `train` is the whole loop, `step` one rollout and its updates."""

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        scorer: Scorer,
        prompts: list[dict[str, Any]],
        tokenizer: Any,
        stop_ids: list[int],
        world: World,
        budget: Budget,
        deepspeed_config: dict[str, Any] | None = None,
        engine: Callable = generate,
    ):
        self.config, self.roles, self.scorer, self.prompts = config, roles, scorer, prompts
        self.tokenizer, self.stop_ids, self.world, self.budget, self.engine = (
            tokenizer, stop_ids, world, budget, engine,
        )  # fmt: skip
        self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        roles.train()
        self.learner = Learner(
            roles,
            [
                {"params": roles.parameters_of("policy"), "lr": config.learning_rate},
                {"params": roles.parameters_of("value"), "lr": config.critic_rate},
            ],
            world,
            deepspeed_config,
            config.max_grad_norm,
            config.adam_epsilon,
            config.per_device_train_batch_size,
        )

    def step(self, step: int) -> tuple[dict[str, float], Rollout]:
        """One rollout and its updates; step counts from 0. Returns the metrics and the rollout."""
        config, began = self.config, time.monotonic()
        rollout = collect(
            self.roles,
            self.prompts_of(step),
            self.engine,
            self.scorer,
            self.world,
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
            sampling=Sampling(config.max_response_length, config.temperature),
            seed=config.seed,
            step=step,
            samples_per_prompt=config.samples_per_prompt,
            missing_eos_score=config.missing_eos_score,
            micro_batch_size=config.per_device_train_batch_size,
            generation_batch_size=config.generation_batch_size,
            gathered=self.learner.gathered,
        )
        kl = kl_k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = token_rewards(rollout.scores, kl, rollout.mask, self.kl.coef)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.gae_lambda)
        metrics = self.describe(rollout, kl, rewards, advantages, returns)
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, rollout.mask)
        learn_began = time.monotonic()
        metrics |= self.learn(rollout, advantages, returns, step)
        now = time.monotonic()
        tokens = int(rollout.mask.sum())
        metrics |= rollout.seconds | {"time/learn": now - learn_began, "time/step": now - began}
        metrics["time/tokens_per_second"] = tokens / (now - began)
        self.kl.update(metrics["kl/sequence"], len(rollout))
        self._count(rollout)
        return metrics, rollout

    def prompts_of(self, step: int) -> list[dict[str, Any]]:
        """The prompts of one rollout: consecutive ones of an endless row of shuffled passes over the data."""
        count = self.config.rollout_batch_size // self.config.samples_per_prompt
        size, places = len(self.prompts), range(step * count, (step + 1) * count)
        orders = {turn: permutation(size, self.config.seed, turn) for turn in {place // size for place in places}}
        return [self.prompts[int(orders[place // size][place % size])] for place in places]

    def learn(self, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int) -> dict[str, float]:
        """num_ppo_epochs passes of num_mini_batches optimizer steps; returns means over the steps."""
        config, totals, first = self.config, {}, None
        rates = self.learning_rates(step)
        updates = config.num_ppo_epochs * config.num_mini_batches
        for epoch in range(config.num_ppo_epochs):
            order = permutation(len(rollout), config.seed, step, epoch)
            for rows in order.tensor_split(config.num_mini_batches):
                metrics = self.update(rollout, advantages, returns, rows, rates)
                first = metrics if first is None else first
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value / updates
        totals["ppo/ratio_first"] = first["ppo/ratio"]
        return totals | {"learning_rate": rates[0], "value/learning_rate": rates[1]}

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, rates: list[float]):
        """One optimizer step on these rows of the rollout. Every rank takes its share of them, in micro-batches.

        Losses are divided by the token count of all rows on all ranks, so cutting them differently changes nothing.
        """
        config, roles = self.config, self.roles
        rows = rows.to(rollout.mask.device)
        count = rollout.mask[rows].sum()
        sums: dict[str, Tensor] = {}
        for part, last in micro_batches(rows, self.world, config.per_device_train_batch_size):
            batch = {name: tensor[part] for name, tensor in rollout.batch.items()}
            mask = batch["mask"]
            if not len(part):  # a rank without rows still has to take part in the step
                mask, part = torch.zeros_like(rollout.mask[:1]), rows[:1]
                batch = {name: tensor[part] for name, tensor in rollout.batch.items()}
            with roles.use("policy"):
                logprobs, entropy = roles.logprobs(batch, config.temperature)
                loss, metrics = policy_loss(
                    logprobs, rollout.logprobs[part], advantages[part], mask, config.clip_range, count
                )
                self.learner.backward(loss, last=False)
            metrics |= {"loss/policy": loss.detach(), "response/entropy": masked_mean(entropy.detach(), mask, count)}
            with roles.use("value"):
                values = roles.values(batch)
                loss, more = value_loss(
                    values, rollout.values[part], returns[part], mask, config.value_clip_range, count
                )
                self.learner.backward(config.vf_coef * loss, last=last)
            metrics |= more | {"loss/value": loss.detach()}
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        norm = self.learner.step(rates)
        names = sorted(sums)
        summed = self.world.sum(torch.stack([sums[n].double() for n in names])).tolist()
        result = dict(zip(names, summed, strict=True))
        result["loss/total"] = result["loss/policy"] + config.vf_coef * result["loss/value"]
        return result | {"grad/norm": norm}

    def learning_rates(self, step: int) -> list[float]:
        """Step sizes of policy and critic; linear ones reach 0 after the last step."""
        config = self.config
        left = 1.0 - step / config.total_steps if config.lr_scheduler_type == "linear" else 1.0
        return [left * config.learning_rate, left * config.critic_rate]

    def describe(self, rollout: Rollout, kl, rewards, advantages, returns) -> dict[str, float]:
        """What the rollout was like, before learning from it."""
        mask = rollout.mask
        k3 = torch.where(mask, kl_k3(rollout.logprobs, rollout.ref_logprobs), torch.zeros_like(kl))
        spread = rollout.scores.std(unbiased=False) if len(rollout) > 1 else torch.zeros(())
        metrics = {
            "kl/sequence": torch.where(mask, kl, torch.zeros_like(kl)).sum(-1).mean(),
            "kl/token": masked_mean(kl, mask),
            "kl/k3": k3.sum(-1).mean(),
            "kl/coef": self.kl.coef,
            "score/total": rollout.scores.mean(),
            "score/std": spread,
            "response/length": mask.sum(-1).double().mean(),
            "response/ended": rollout.ended.double().mean(),
            "ppo/reward": rewards.sum(-1).mean(),
            "ppo/advantage_mean": masked_mean(advantages, mask),
            "ppo/advantage_std": masked_mean((advantages - masked_mean(advantages, mask)) ** 2, mask).sqrt(),
            "value/mean": masked_mean(rollout.values, mask),
            "value/return": masked_mean(returns, mask),
            "value/explained_variance": explained_variance(rollout.values, returns, mask),
            "rollout/logprob_gap": rollout.logprob_gap,
        }
        for name, values in rollout.breakdown.items():
            applies = [v for v in values if not math.isnan(v)]  # NaN: a part that does not apply to that prompt
            metrics[f"score/{name}"] = sum(applies) / len(applies) if applies else math.nan
        return {name: float(value) for name, value in metrics.items()}

    def _count(self, rollout: Rollout) -> None:
        """This rank's part of the cost: sampled, read by each role, then learnt from."""
        share = self.world.share(len(rollout))
        response = int(rollout.mask[share.start : share.stop].sum())
        whole = int(rollout.batch["attention"][share.start : share.stop].sum())
        self.budget.generate(len(share), whole - response, response)
        self.budget.forward((4 if "reward" in self.roles.heads else 3) * whole)
        for _ in range(2 * self.config.num_ppo_epochs):  # policy and critic each pass forward and backward
            self.budget.train(whole)

    def train(self, on_step: Callable[[int, dict[str, float], Rollout], None]) -> dict[str, float]:
        """All steps; `on_step(step, metrics, rollout)` is called after each (1, 2, ...). Returns the budget."""
        for step in range(self.config.total_steps):
            metrics, rollout = self.step(step)
            metrics["memory/peak"] = peak_memory(self.world.device)
            metrics |= total_budget(self.budget, self.world)
            on_step(step + 1, metrics, rollout)
        return total_budget(self.budget, self.world)


def micro_batches(rows: Tensor, world: World, size: int) -> list[tuple[Tensor, bool]]:
    """This rank's share of the rows, cut into micro-batches, with True beside the last one.

    All ranks get the same number, padded with empty ones, since backward passes are collective.
    """
    most = max(len(range(len(rows) * r // world.size, len(rows) * (r + 1) // world.size)) for r in range(world.size))
    share = world.share(len(rows))
    mine = rows[share.start : share.stop]
    number = max(1, -(-most // size))
    parts = [mine[i * size : (i + 1) * size] for i in range(number)]
    return [(part, i + 1 == number) for i, part in enumerate(parts)]


def permutation(count: int, *key: int) -> Tensor:
    """A permutation of range(count) that depends on the key alone: the same on every rank and after a resume."""
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
