"""Proximal policy optimisation of a language model on adapter roles.

One step: sample a rollout, turn scores into token rewards, estimate advantages, then several epochs of clipped policy
and value updates over minibatches of it. The details follow *The N+ implementation details of RLHF with PPO*
(arXiv 2403.17031). The options are in rlhf/options/ppo.py; docs/algorithms.md has each equation with its function.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import BadScore, Scorer
from rlhf.distributed import DistributedContext, peak_memory
from rlhf.engines.hf import Sampling, cache_is_exact, generate
from rlhf.logprobs import completion_batch
from rlhf.optimizer_engine import make_engine
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.advantages import (
    KL_ESTIMATORS,
    KLController,
    RunningMoments,
    gae,
    grpo,
    kl_k1,
    kl_k3,
    reinforce,
    rloo,
    shape_scores,
    token_rewards,
)
from rlhf.ppo.guards import Decision, Guards, repetition
from rlhf.ppo.losses import kl_loss, policy_loss, ptx_loss, value_loss
from rlhf.ppo.rollout import Rollout, collect
from rlhf.roles import Roles
from rlhf.runs.budget import Budget
from rlhf.stats import clustered_se
from rlhf.tensors import explained_variance, masked_mean, masked_sum_rows, masked_whiten

# name -> advantages (N, T) of (trainer, token rewards (N, T), rollout); only gae has a critic, and returns for it
ESTIMATORS: dict[str, Callable[[Any, Tensor, Rollout], Tensor]] = {
    "gae": lambda t, r, x: gae(r, x.values, x.mask, t.config.gamma, t.config.gae_lambda)[0],
    "rloo": lambda t, r, x: rloo(r, x.mask, x.group_index),
    "grpo": lambda t, r, x: grpo(r, x.mask, x.group_index),
    "reinforce": lambda t, r, x: reinforce(r, x.mask, t.baseline_of(r, x.mask)),
}


class PPOTrainer:
    """Holds the learner and what changes over a run; `train` is the whole loop, `step` one rollout and its updates."""

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        scorer: Scorer,
        prompts: list[dict[str, Any]],
        tokenizer: Any,
        stop_ids: list[int],
        world: DistributedContext,
        budget: Budget,
        deepspeed_config: dict[str, Any] | None = None,
        engine: Callable = generate,
        ptx: list[dict[str, Any]] | None = None,
        monitored: list[str] | None = None,
    ):
        self.config, self.roles, self.scorer, self.prompts = config, roles, scorer, prompts
        self.tokenizer, self.stop_ids, self.world, self.budget, self.engine = (
            tokenizer, stop_ids, world, budget, engine,
        )  # fmt: skip
        self.ptx = ptx or []
        self.kl = KLController(config.kl_coef, config.kl_target, config.horizon)
        self.scores, self.returns = RunningMoments(), RunningMoments()  # of raw scores; of whole rewards (reinforce)
        self.guards = Guards(config.guards, monitored or [])
        self.done = 0  # steps made
        self.pending_decision: Decision | None = None  # the stop or rollback that a guard has decided on in this step
        self.passes = ["policy", *(["ptx"] if config.ptx_coef else []), *(["value"] if roles.has_critic else [])]
        roles.train()
        budget.watch(roles.trunk)
        groups = [{"params": roles.parameters_of("policy"), "lr": config.learning_rate}]
        if roles.has_critic:
            groups.append({"params": roles.parameters_of("value"), "lr": config.critic_rate})
        self.learner = make_engine(
            roles,
            groups,
            world,
            deepspeed_config,
            config.max_grad_norm,
            config.adam_epsilon,
            config.per_device_train_batch_size,
        )

    def train(
        self,
        on_step: Callable[[int, dict[str, float], Rollout | None], None],
        roll_back: Callable[[Decision], bool] = lambda decision: False,
    ) -> Decision | None:
        """The steps that are left; `on_step(step, metrics, rollout)` is called after each (1, 2, ...), and before what
        `urgent` asks for is done.

        `roll_back` restores an earlier state, or says that it cannot. Returns the decision of the guard that stopped
        the run, or None at its end.
        """
        while self.done < self.config.total_steps:
            metrics, rollout = self.step(self.done)
            self.done += 1
            if self.pending_decision is None and rollout is not None:
                decision = self.guards.step(self.done, metrics)
                self.pending_decision = (
                    decision if decision is not None and decision.action in ("stop", "rollback") else None
                )
            metrics |= self.guards.metrics() | self.budget.total(self.world)
            metrics["memory/peak"] = peak_memory(self.world.device)
            on_step(self.done, metrics, rollout)
            decision, self.pending_decision = self.pending_decision, None
            if decision is not None and not (decision.action == "rollback" and roll_back(decision)):
                return decision
        return None

    def step(self, step: int) -> tuple[dict[str, float], Rollout | None]:
        """One rollout and its updates; step counts from 0. Returns the metrics, and the rollout unless it was skipped.

        Raises BadScore when a scorer's numbers cannot be used and the guard does not pass over it (again).
        """
        config, began = self.config, time.monotonic()
        try:
            rollout = self.collect(step)
        except BadScore as error:
            decision = self.guards.scores(step + 1, str(error))
            if decision is None or decision.action == "stop":
                raise
            self.pending_decision = decision if decision.action == "rollback" else None
            return {"time/step": time.monotonic() - began}, None
        kl = KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, rollout.penalty_logprobs)
        scores = self.shaped(rollout)
        rewards = token_rewards(scores, kl, rollout.mask, self.kl.coef if config.kl_in == "reward" else 0.0)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
        advantages = ESTIMATORS[config.advantage_estimator](self, rewards, rollout)
        returns = advantages + rollout.values
        metrics = self.describe(rollout, scores, rewards, advantages, returns)
        decision = None
        if not self.guards.updates:
            decision = self.guards.first(step + 1, metrics, self.spread(scores), len(scores))
        if decision is not None and decision.action == "stop":
            self.pending_decision = decision
            return metrics | rollout.seconds | {"time/step": time.monotonic() - began}, rollout
        if config.whitens:
            advantages = masked_whiten(advantages, rollout.mask)
        learn_began = time.monotonic()
        with self.budget.counting():
            metrics |= self.learn(rollout, advantages, returns, step)
        now = time.monotonic()
        metrics |= rollout.seconds | {"time/learn": now - learn_began, "time/step": now - began}
        metrics["time/tokens_per_second"] = int(rollout.mask.sum()) / (now - began)
        self.kl.update(metrics["kl/sequence"], len(rollout))
        self.returns.update(masked_sum_rows(rewards, rollout.mask))
        if config.reference_ema is not None:
            moving = [*self.roles.moving_parameters(), *self.roles.parameters_of("policy")]
            with self.learner.gathered(moving, modify=True):
                self.roles.follow(config.reference_ema)
        return metrics, rollout

    def collect(self, step: int) -> Rollout:
        config = self.config
        with self.learner.gathered():
            cache_is_exact(self.roles.trunk)  # tried once, by passes that belong to no step
            with self.budget.counting():
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
                    micro_batch_size=config.per_device_train_batch_size,
                    generation_batch_size=config.generation_batch_size,
                )
        share = self.world.shard(len(rollout))
        self.budget.episodes += len(share)
        self.budget.tokens_generated += int(rollout.mask[share.start : share.stop].sum())
        return rollout

    def prompts_of(self, step: int) -> list[dict[str, Any]]:
        """The prompts of one rollout: consecutive ones of an endless row of shuffled passes over the data."""
        count = self.config.rollout_batch_size // self.config.samples_per_prompt
        return cycle_shuffled(self.prompts, range(step * count, (step + 1) * count), self.config.seed)

    def shaped(self, rollout: Rollout) -> Tensor:
        """The scores that are learnt from, (N,): normalised, clipped, EOS rule and length penalty as configured."""
        config = self.config
        self.scores.update(rollout.scores)
        return shape_scores(
            rollout.scores,
            rollout.ended,
            rollout.mask.sum(-1),
            moments=(self.scores.mean, self.scores.std) if config.normalize_scores else None,
            clip=config.score_clip,
            missing_eos=config.missing_eos,
            missing_eos_score=config.missing_eos_score,
            length_penalty=config.length_penalty,
        )

    def spread(self, scores: Tensor) -> float:
        """The largest difference between scores (N,) that are compared: those of one prompt's samples, or all."""
        groups = self.config.advantage_estimator in ("rloo", "grpo")
        compared = scores.view(-1, self.config.samples_per_prompt if groups else len(scores))
        return float((compared.amax(-1) - compared.amin(-1)).max())

    def baseline_of(self, rewards: Tensor, mask: Tensor) -> float:
        """The mean of all earlier responses' rewards; of these at the very first step, which has no earlier ones."""
        return self.returns.mean if self.returns.count else float(masked_sum_rows(rewards, mask).mean())

    def learn(self, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int) -> dict[str, float]:
        """num_ppo_epochs passes of num_mini_batches optimizer steps; returns means over the steps that were made."""
        config, made, first = self.config, [], None
        rates = self.learning_rates(step)
        for epoch in range(config.num_ppo_epochs):
            order = permutation(len(rollout), config.seed, step, epoch)
            for number, rows in enumerate(order.tensor_split(config.num_mini_batches)):
                update = (step * config.num_ppo_epochs + epoch) * config.num_mini_batches + number
                metrics, decision = self.update(rollout, advantages, returns, rows, rates, step, update)
                first = metrics if first is None else first
                if decision is None or decision.action == "warn":
                    made.append(metrics)
                if decision is not None and decision.action in ("end", "stop", "rollback"):  # no more of this rollout
                    self.pending_decision = decision if decision.action in ("stop", "rollback") else None
                    break
            else:
                continue
            break
        means = {name: sum(m[name] for m in made) / len(made) for name in (made[0] if made else {})}
        means |= {"ppo/ratio_first": first["ppo/ratio"], "ppo/updates": len(made), "learning_rate": rates[0]}
        return means | ({"value/learning_rate": rates[1]} if self.roles.has_critic else {})

    def update(
        self,
        rollout: Rollout,
        advantages: Tensor,
        returns: Tensor,
        rows: Tensor,
        rates: list[float],
        step: int = 0,
        update: int = 0,
    ) -> tuple[dict[str, float], Decision | None]:
        """One optimizer step on these rows of the rollout. Every rank takes its share of them, in micro-batches.

        Losses are divided by the token count of all rows on all ranks, so cutting them differently changes nothing.
        Returns the metrics and what a guard decided; a step that it skips leaves weights and moments as they were.
        """
        config, rows = self.config, rows.to(rollout.mask.device)
        count, ptx = rollout.mask[rows].sum(), self.ptx_batch(update, len(rows))
        parts = micro_batches(len(rows), self.world, config.per_device_train_batch_size)
        sums: dict[str, Tensor] = {}
        jobs = [(part, name) for part in parts for name in self.passes]
        for number, (part, name) in enumerate(jobs, 1):
            idle = not len(part)
            at = rows[part] if not idle else rows[:1]  # a rank without rows still has to take part in the step
            batch = {k: v[at] for k, v in rollout.batch.items()}
            mask = torch.zeros_like(batch["mask"]) if idle else batch["mask"]
            learns = name == "value" or step >= config.critic_warmup_steps
            with self.roles.use("value" if name == "value" else "policy"), torch.set_grad_enabled(learns):
                if name == "policy":
                    loss, metrics = self.policy_pass(rollout, batch, mask, at, advantages, count)
                elif name == "ptx":
                    loss, metrics = self.ptx_pass(ptx, part)
                else:
                    loss, metrics = self.value_pass(rollout, batch, mask, at, returns, count)
                if learns:
                    metrics = metrics | {"loss/total": loss}
                    self.learner.backward(loss, last=number == len(jobs))
            if learns and not idle:
                read = ptx["attention"][part] if name == "ptx" else batch["attention"]
                self.budget.tokens_trained += int(read.sum())
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value.detach()
        result = self.summed(sums)
        decision = self.guards.update(step + 1, result)
        keep = decision is None or decision.action == "warn"
        result["grad/norm"] = self.learner.step(rates, discard=not keep)
        if keep and not math.isfinite(result["grad/norm"]):
            decision = self.guards.update(step + 1, result)
        return result, decision

    def policy_pass(self, rollout, batch, mask, at, advantages, count) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate, with KL and entropy where they count in the loss."""
        config = self.config
        logprobs, entropy = self.roles.logprobs(batch, config.temperature)
        loss, metrics = policy_loss(
            logprobs, rollout.logprobs[at], advantages[at], mask, config.clip_range, count, config.clip_range_high
        )
        bits = masked_mean(entropy, mask, count)
        metrics |= {"loss/policy": loss, "response/entropy": bits}
        if config.kl_in == "loss":
            estimator = KL_ESTIMATORS[config.kl_estimator]
            kl = kl_loss(logprobs, rollout.penalty_logprobs[at], mask, estimator, count)
            metrics["loss/kl"] = self.kl.coef * kl
            loss = loss + metrics["loss/kl"]
        if config.entropy_coef:
            metrics["loss/entropy"] = -config.entropy_coef * bits
            loss = loss + metrics["loss/entropy"]
        return loss, metrics

    def value_pass(self, rollout, batch, mask, at, returns, count) -> tuple[Tensor, dict[str, Tensor]]:
        values = self.roles.values(batch)
        loss, metrics = value_loss(values, rollout.values[at], returns[at], mask, self.config.value_clip_range, count)
        return self.config.vf_coef * loss, metrics | {"loss/value": loss}

    def ptx_pass(self, ptx: dict[str, Tensor], part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Given answers, as many as there are responses in the step."""
        at = part if len(part) else part.new_zeros(1)
        batch = {k: v[at] for k, v in ptx.items()}
        mask = batch["mask"] & bool(len(part))
        loss = self.config.ptx_coef * ptx_loss(self.roles.logprobs(batch)[0], mask, ptx["mask"].sum())
        return loss, {"loss/ptx": loss}

    def ptx_batch(self, update: int, count: int) -> dict[str, Tensor]:
        """The instructions of one update, (count, ...) tensors as in `Rollout.batch`; empty when there are none."""
        if not self.ptx:
            return {}
        rows = cycle_shuffled(self.ptx, range(update * count, (update + 1) * count), self.config.seed + 1)
        columns = completion_batch(
            [row["prompt_ids"] for row in rows],
            [row["response_ids"] for row in rows],
            self.tokenizer.pad_token_id,
            self.world.device,
        )
        return dict(zip(("ids", "attention", "positions", "responses", "mask"), columns, strict=True))

    def summed(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        summed = self.world.sum(torch.stack([sums[n].double() for n in names])).tolist()
        return dict(zip(names, summed, strict=True))

    def learning_rates(self, step: int) -> list[float]:
        """Step sizes of policy and critic; linear ones reach 0 after the last step, and a rollback lowers them."""
        config = self.config
        left = 1.0 - step / config.total_steps if config.lr_scheduler_type == "linear" else 1.0
        rates = [config.learning_rate, config.critic_rate][: 1 + self.roles.has_critic]
        return [left * self.guards.rate_scale * rate for rate in rates]

    def describe(self, rollout: Rollout, scores, rewards, advantages, returns) -> dict[str, float]:
        """What the rollout was like, before learning from it."""
        mask, n = rollout.mask, len(rollout)
        k1 = kl_k1(rollout.logprobs, rollout.ref_logprobs)
        sequence = masked_sum_rows(k1, mask)
        metrics = {
            "kl/sequence": sequence.mean(),
            "kl/token": masked_mean(k1, mask),
            "kl/k3": masked_sum_rows(kl_k3(rollout.logprobs, rollout.ref_logprobs), mask).mean(),
            "kl/coef": self.kl.coef,
            "score/total": scores.mean(),
            "score/raw": rollout.scores.mean(),
            "score/std": scores.std(unbiased=False) if n > 1 else 0.0,
            "response/length": mask.sum(-1).double().mean(),
            "response/ended": rollout.ended.double().mean(),
            "response/repetition": sum(repetition(ids) for ids in rollout.samples.response_ids) / n,
            "ppo/reward": rewards.sum(-1).mean(),
            "ppo/advantage_mean": masked_mean(advantages, mask),
            "ppo/advantage_std": masked_mean((advantages - masked_mean(advantages, mask)) ** 2, mask).sqrt(),
            "rollout/logprob_gap": rollout.logprob_gap,
        }
        lengths = mask.sum(-1).double()
        if n > 1 and lengths.std() > 0 and rollout.scores.std() > 0:
            both = torch.stack([rollout.scores.double(), lengths])
            metrics["score/length_correlation"] = torch.corrcoef(both)[0, 1]
        error = clustered_se(sequence.tolist(), [about["group"] for about in rollout.samples.metadata])
        if error is not None:
            metrics["kl/sequence_se"] = error
        if self.roles.has_critic:
            metrics["value/mean"] = masked_mean(rollout.values, mask)
            metrics["value/return"] = masked_mean(returns, mask)
            metrics["value/explained_variance"] = explained_variance(rollout.values, returns, mask)
        if self.roles.has_moving_reference:
            moved = kl_k1(rollout.logprobs, rollout.penalty_logprobs)
            metrics["kl/penalty"] = masked_sum_rows(moved, mask).mean()
        if self.config.normalize_scores:
            metrics |= {"score/mean_running": self.scores.mean, "score/std_running": self.scores.std}
        for name, values in rollout.breakdown.items():
            applies = [v for v in values if not math.isnan(v)]  # NaN: a part that does not apply to that prompt
            metrics[f"score/{name}"] = sum(applies) / len(applies) if applies else math.nan
        return {name: float(value) for name, value in metrics.items()}

    def save(self, folder: Path) -> None:
        """Everything the next step depends on; call it on all ranks. `load` reads it back to the last bit."""
        self.learner.save(folder / "learner")
        with self.learner.gathered():
            if self.world.is_main and self.roles.has_moving_reference:
                torch.save([p.detach().cpu() for p in self.roles.moving_parameters()], folder / "moving.pt")
        state = {
            "step": self.done,
            "kl_coef": self.kl.coef,
            "scores": self.scores.state_dict(),
            "returns": self.returns.state_dict(),
            "guards": self.guards.state_dict(),
            "budgets": self.world.gather([self.budget.state_dict()]),
        }
        if self.world.is_main:
            (folder / "ppo.json").write_text(json.dumps(state, indent=2) + "\n")

    def load(self, folder: Path, after: Decision | None = None) -> None:
        """Go back to what `save` wrote; `after` a guard's decision, whose counts and lower step size are kept."""
        self.learner.load(folder / "learner")
        if self.roles.has_moving_reference:
            moving = self.roles.moving_parameters()
            with self.learner.gathered(moving, modify=True), torch.no_grad():
                for parameter, value in zip(moving, torch.load(folder / "moving.pt", weights_only=True), strict=True):
                    parameter.copy_(value)
        state = json.loads((folder / "ppo.json").read_text())
        self.done, self.kl.coef = state["step"], state["kl_coef"]
        self.scores, self.returns = RunningMoments(**state["scores"]), RunningMoments(**state["returns"])
        if after is None:
            self.guards.load_state_dict(state["guards"])
            self.budget.load_state_dict(state["budgets"][self.world.rank])
        else:  # what the steps that are thrown away have cost stays counted
            self.guards.rolled_back(after, state["guards"])


def micro_batches(count: int, world: DistributedContext, size: int) -> list[Tensor]:
    """This rank's share of `count` rows as micro-batches of positions.

    All ranks get the same number, padded with empty ones, since backward passes are collective.
    """
    most = max(len(range(count * r // world.size, count * (r + 1) // world.size)) for r in range(world.size))
    share = world.shard(count)
    mine = torch.arange(share.start, share.stop, device=world.device)
    return [mine[i * size : (i + 1) * size] for i in range(max(1, -(-most // size)))]


def cycle_shuffled(rows: list[Any], places: range, seed: int) -> list[Any]:
    """The rows at these places of an endless row of shuffled passes over them."""
    orders = {turn: permutation(len(rows), seed, turn) for turn in {place // len(rows) for place in places}}
    return [rows[int(orders[place // len(rows)][place % len(rows)])] for place in places]


def permutation(count: int, *key: int) -> Tensor:
    """A permutation of range(count) that depends on the key alone: the same on every rank and after a resume."""
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
