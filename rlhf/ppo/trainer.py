"""Proximal policy optimisation of a language model on adapter roles.

One step: sample a rollout, turn scores into token rewards, estimate advantages, then several epochs
of clipped policy and value updates over minibatches of it. The details follow *The N+
implementation details of RLHF with PPO* (arXiv 2403.17031). The options are in rlhf/options/ppo.py;
docs/algorithms.md has each equation with its function.

Three parts can be exchanged: what samples (`RolloutCollector.generate`), what measures
log-probabilities and values (`rollout.measure`), and what learns (`OptimizerEngine`).
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import BadScore, Scorer
from rlhf.distributed import DistributedContext, peak_memory
from rlhf.engines.batched import generate, prepare
from rlhf.engines.sampling import Sampling
from rlhf.optimizer_engine import make_engine
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.advantages import (
    KL_ESTIMATORS,
    KLController,
    RunningMoments,
    gae,
    grpo,
    kl_k1,
    reinforce,
    rloo,
    shape_scores,
    token_rewards,
)
from rlhf.ppo.guards import Decision, Guards
from rlhf.ppo.losses import kl_loss, policy_loss, ptx_loss, value_loss
from rlhf.ppo.rollout import (
    Generate,
    Rollout,
    RolloutCollector,
    RolloutSettings,
    describe_rollout,
    padded_batch,
)
from rlhf.roles import Roles
from rlhf.runs.budget import Budget
from rlhf.tensors import explained_variance, masked_mean, masked_sum_rows, masked_whiten


@dataclass
class TrainingData:
    """What PPO trains on, tokenised with the policy's tokenizer."""

    # rows of `encode_prompts`: "prompt_ids" and "record"
    prompts: list[dict[str, Any]]
    tokenizer: Any
    # tokens that end a response
    stop_ids: list[int]
    # rows with "prompt_ids" and "response_ids" for PPO-ptx; empty without
    pretraining: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Experience:
    """A rollout of N responses with what its updates learn from."""

    rollout: Rollout
    # (N,) after normalisation, clipping, EOS rule and length penalty
    scores: Tensor
    # (N, T) rewards: KL penalty at each token, the score at the last one
    rewards: Tensor
    # (N, T) advantages; whitened if so configured
    advantages: Tensor
    # (N, T) what the critic predicts
    returns: Tensor


@dataclass
class MicroBatch:
    """B rows of a rollout that make one forward and backward pass together.

    Backward passes are collective, so a rank that has no rows left takes part with one row and an
    empty mask.
    """

    # (B,) positions in the rollout
    rows: Tensor
    # these rows of `Rollout.batch`
    batch: dict[str, Tensor]
    # (B, T) response tokens that count
    mask: Tensor
    # response tokens of the whole update, over all micro-batches and ranks
    count: Tensor
    # the same number of pretraining rows, as `batch`; their `count`. Empty without PPO-ptx
    pretraining: dict[str, Tensor]
    pretraining_count: Tensor | None
    is_idle: bool


class PPOTrainer:
    """Holds the learner and everything that changes during a run.

    `train` makes all steps, `step` makes one rollout and its updates, `update` makes one optimizer
    step.
    """

    def __init__(
        self,
        config: PPOConfig,
        roles: Roles,
        scorer: Scorer,
        data: TrainingData,
        world: DistributedContext,
        *,
        budget: Budget | None = None,
        deepspeed_config: dict[str, Any] | None = None,
        engine: Generate = generate,
        monitored: Sequence[str] = (),
    ):
        """`monitored` names scores that should not fall while the optimised score rises (guard
        `hacking`).
        """
        self.config, self.roles, self.data, self.world = config, roles, data, world
        self.budget = budget or Budget()
        settings = RolloutSettings(
            Sampling(config.max_response_length, config.temperature),
            seed=config.seed,
            samples_per_prompt=config.samples_per_prompt,
            micro_batch_size=config.per_device_train_batch_size,
            generation_batch_size=config.generation_batch_size,
        )
        self.collector = RolloutCollector(
            roles, scorer, data.tokenizer, data.stop_ids, world, settings, engine
        )

        # state of the run, all of it in checkpoints
        self.steps_done = 0
        self.kl = KLController(config.kl_coef, config.kl_target, config.horizon)
        self.score_moments = RunningMoments()
        self.reward_moments = RunningMoments()
        self.guards = Guards(config.guards, monitored)
        # the stop or rollback that a guard has decided on in this step
        self.pending_decision: Decision | None = None

        # the losses of an update, in the order of their passes
        self.passes: dict[
            str, Callable[[Experience, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
        ] = {"policy": self.policy_pass}
        if config.ptx_coef:
            self.passes["ptx"] = self.ptx_pass
        if roles.has_critic:
            self.passes["value"] = self.value_pass

        roles.train()
        self.budget.watch(roles.trunk)
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

    # the run

    def train(
        self,
        on_step: Callable[[int, dict[str, float], Rollout | None], None],
        roll_back: Callable[[Decision], bool] = lambda decision: False,
    ) -> Decision | None:
        """Make the remaining steps and return the decision of the guard that stopped the run, or
        None at its end.

        `on_step(step, metrics, rollout)` is called after each step (1, 2, ...), before a pending
        stop or rollback is carried out. `roll_back` restores an earlier state and returns True, or
        returns False if it cannot.
        """
        while self.steps_done < self.config.total_steps:
            metrics, rollout = self.step(self.steps_done)
            self.steps_done += 1
            if self.pending_decision is None and rollout is not None:
                decision = self.guards.step(self.steps_done, metrics)
                if decision is not None and decision.interrupts_run:
                    self.pending_decision = decision
            metrics |= self.guards.metrics() | self.budget.total(self.world)
            metrics["memory/peak"] = peak_memory(self.world.device)
            on_step(self.steps_done, metrics, rollout)

            decision, self.pending_decision = self.pending_decision, None
            if decision is not None:
                rolled_back = decision.action == "rollback" and roll_back(decision)
                if not rolled_back:
                    return decision
        return None

    def step(self, step: int) -> tuple[dict[str, float], Rollout | None]:
        """Make one rollout and its updates; `step` counts from 0.

        Returns the metrics, and the rollout unless it was skipped. Raises BadScore when a score is
        not finite and the guard `not_finite` does not skip the rollout.
        """
        began = time.monotonic()
        try:
            rollout = self.collect(step)
        except BadScore as error:
            decision = self.guards.scores(step + 1, str(error))
            if decision is None or decision.action == "stop":
                raise
            self.pending_decision = decision if decision.action == "rollback" else None
            return {"time/step": time.monotonic() - began}, None

        experience, metrics = self.estimate(rollout)
        metrics |= rollout.seconds
        if self.stops_before_learning(step, experience, metrics):
            return metrics | {"time/step": time.monotonic() - began}, rollout

        learning_began = time.monotonic()
        with self.budget.counting():
            metrics |= self.learn(experience, step)
        now = time.monotonic()
        metrics |= {"time/learn": now - learning_began, "time/step": now - began}
        metrics["time/tokens_per_second"] = int(rollout.mask.sum()) / (now - began)

        self.kl.update(metrics["kl/sequence"], len(rollout))
        self.reward_moments.update(masked_sum_rows(experience.rewards, rollout.mask))
        if self.config.reference_ema is not None:
            changed = [*self.roles.ema_parameters(), *self.roles.parameters_of("policy")]
            with self.learner.gathered(changed, modify=True):
                self.roles.update_ema(self.config.reference_ema)
        return metrics, rollout

    # 1. sample

    def collect(self, step: int) -> Rollout:
        """Return the rollout of `step`, the same on every rank."""
        prompts = self.prompts_of(step)
        with self.learner.gathered():
            # tried once for each model, by passes that belong to no step
            prepare(self.roles.trunk)
            with self.budget.counting():
                rollout = self.collector.collect(prompts, step)
        shard = self.world.shard(len(rollout))
        self.budget.episodes += len(shard)
        self.budget.tokens_generated += int(rollout.mask[shard.start : shard.stop].sum())
        return rollout

    def prompts_of(self, step: int) -> list[dict[str, Any]]:
        """Return the prompts of one rollout: consecutive ones of endless shuffled passes over the
        data.
        """
        count = self.config.rollout_batch_size // self.config.samples_per_prompt
        return cycle_shuffled(
            self.data.prompts, range(step * count, (step + 1) * count), self.config.seed
        )

    # 2. scores -> rewards -> advantages

    def estimate(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Return what is to be learnt from a rollout, and its metrics.

        r_t = -kl_coef kl_t + [t is the last token] score,    A = estimator(r),    R = A + V
        """
        config, mask = self.config, rollout.mask
        scores = self.shape_scores(rollout)
        kl = KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, rollout.penalty_logprobs)
        rewards = token_rewards(scores, kl, mask, self.kl.coef if config.kl_in == "reward" else 0.0)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)

        advantages = self.estimate_advantages(rewards, rollout)
        experience = Experience(
            rollout, scores, rewards, advantages, returns=advantages + rollout.values
        )
        metrics = describe_rollout(rollout) | self.describe(experience)
        if config.whitens:
            experience.advantages = masked_whiten(advantages, mask)
        return experience, metrics

    def shape_scores(self, rollout: Rollout) -> Tensor:
        """Return the scores that are learnt from, (N,), shaped as configured."""
        config = self.config
        self.score_moments.update(rollout.scores)
        return shape_scores(
            rollout.scores,
            rollout.ended,
            rollout.mask.sum(-1),
            moments=(self.score_moments.mean, self.score_moments.std)
            if config.normalize_scores
            else None,
            clip=config.score_clip,
            missing_eos=config.missing_eos,
            missing_eos_score=config.missing_eos_score,
            length_penalty=config.length_penalty,
        )

    def estimate_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Return the advantages (N, T) of token rewards (N, T) by the configured estimator."""
        config, mask = self.config, rollout.mask
        if config.advantage_estimator == "gae":
            return gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)[0]
        if config.advantage_estimator == "rloo":
            return rloo(rewards, mask, rollout.group_index)
        if config.advantage_estimator == "grpo":
            return grpo(rewards, mask, rollout.group_index)

        # REINFORCE: the mean of all earlier responses' rewards; at the first step, which has none,
        # of these
        is_first = not self.reward_moments.count
        baseline = (
            float(masked_sum_rows(rewards, mask).mean()) if is_first else self.reward_moments.mean
        )
        return reinforce(rewards, mask, baseline)

    def describe(self, experience: Experience) -> dict[str, float]:
        """Return the metrics of shaped scores, rewards, unwhitened advantages and values."""
        rollout, mask = experience.rollout, experience.rollout.mask
        scores, advantages = experience.scores, experience.advantages
        mean_advantage = masked_mean(advantages, mask)
        metrics = {
            "kl/coef": self.kl.coef,
            "score/total": scores.mean(),
            "score/std": scores.std(unbiased=False) if len(scores) > 1 else 0.0,
            "ppo/reward": experience.rewards.sum(-1).mean(),
            "ppo/advantage_mean": mean_advantage,
            "ppo/advantage_std": masked_mean((advantages - mean_advantage) ** 2, mask).sqrt(),
        }
        if self.roles.has_critic:
            metrics["value/mean"] = masked_mean(rollout.values, mask)
            metrics["value/return"] = masked_mean(experience.returns, mask)
            metrics["value/explained_variance"] = explained_variance(
                rollout.values, experience.returns, mask
            )
        if self.roles.has_ema_reference:
            penalty = kl_k1(rollout.logprobs, rollout.penalty_logprobs)
            metrics["kl/penalty"] = masked_sum_rows(penalty, mask).mean()
        if self.config.normalize_scores:
            metrics["score/mean_running"] = self.score_moments.mean
            metrics["score/std_running"] = self.score_moments.std
        return {name: float(value) for name, value in metrics.items()}

    def stops_before_learning(
        self, step: int, experience: Experience, metrics: dict[str, float]
    ) -> bool:
        """Let the guards see the rollout before the run's first update; return whether one of them
        stops the run.
        """
        if self.guards.updates:
            return False
        scores = experience.scores
        decision = self.guards.first(step + 1, metrics, self.spread(scores), len(scores))
        stops = decision is not None and decision.action == "stop"
        self.pending_decision = decision if stops else None
        return stops

    def spread(self, scores: Tensor) -> float:
        """Return the largest difference between scores (N,) that are compared: of one prompt's
        samples, or of all.
        """
        compares_samples = self.config.advantage_estimator in ("rloo", "grpo")
        compared = scores.view(
            -1, self.config.samples_per_prompt if compares_samples else len(scores)
        )
        return float((compared.amax(-1) - compared.amin(-1)).max())

    # 3. learn

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """Make num_ppo_epochs passes of num_mini_batches updates; return means over the updates
        that were made.
        """
        rates = self.learning_rates(step)
        made: list[dict[str, float]] = []
        ratios: list[float] = []
        for number, rows in self.mini_batches(len(experience.rollout), step):
            metrics, decision = self.update(experience, rows, rates, step, number)
            ratios.append(metrics["ppo/ratio"])
            if decision is None or decision.action == "warn":
                made.append(metrics)
            elif decision.action != "skip":
                # no further update of this rollout
                self.pending_decision = decision if decision.interrupts_run else None
                break

        means = {
            name: sum(metrics[name] for metrics in made) / len(made)
            for name in (made[0] if made else ())
        }
        means |= {"ppo/ratio_first": ratios[0], "ppo/updates": len(made)}
        return means | dict(zip(("learning_rate", "value/learning_rate"), rates, strict=False))

    def mini_batches(self, count: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each update in the run, and the rows of the rollout that it learns
        from.
        """
        config = self.config
        for epoch in range(config.num_ppo_epochs):
            order = permutation(count, config.seed, step, epoch)
            for part, rows in enumerate(order.tensor_split(config.num_mini_batches)):
                yield (step * config.num_ppo_epochs + epoch) * config.num_mini_batches + part, rows

    def learning_rates(self, step: int) -> list[float]:
        """Return the step sizes of policy and critic.

        Linear ones reach 0 after the last step; each rollback of the run has halved them.
        """
        config = self.config
        left = 1.0 - step / config.total_steps if config.lr_scheduler_type == "linear" else 1.0
        rates = (
            [config.learning_rate, config.critic_rate]
            if self.roles.has_critic
            else [config.learning_rate]
        )
        return [left * self.guards.rate_scale * rate for rate in rates]

    def update(
        self,
        experience: Experience,
        rows: Tensor,
        rates: list[float],
        step: int = 0,
        number: int = 0,
    ) -> tuple[dict[str, float], Decision | None]:
        """Make one optimizer step on these rows of the rollout.

            L = L_policy + kl_coef L_kl - entropy_coef H + ptx_coef L_ptx + vf_coef L_value

        Every rank takes its share of the rows, in micro-batches. Each loss is a sum divided by the
        token count of all rows on all ranks, so that cutting them differently changes nothing.
        Returns the metrics and a guard's decision; an update that a guard skips leaves weights and
        moments as they were.
        """
        parts = self.micro_batches(experience.rollout, rows, number)
        passes = list(itertools.product(parts, self.passes))
        sums: dict[str, Tensor] = {}
        for position, (part, name) in enumerate(passes, 1):
            is_last = position == len(passes)
            role = "value" if name == "value" else "policy"
            learns = role == "value" or step >= self.config.critic_warmup_steps
            # the role is held through forward and backward pass
            with self.roles.use(role), torch.set_grad_enabled(learns):
                loss, metrics = self.passes[name](experience, part)
                if learns:
                    metrics["loss/total"] = loss
                    self.learner.backward(loss, last=is_last)
            if learns and not part.is_idle:
                read = part.pretraining if name == "ptx" else part.batch
                self.budget.tokens_trained += int(read["attention"].sum())
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value.detach()

        # the guards judge the sums over all ranks before the weights change
        result = self.sum_over_ranks(sums)
        decision = self.guards.update(step + 1, result)
        keep = decision is None or decision.action == "warn"
        result["grad/norm"] = self.learner.step(rates, discard=not keep)
        if keep and not math.isfinite(result["grad/norm"]):
            decision = self.guards.update(step + 1, result)
        if keep:
            result |= zip(
                ("grad/norm_policy", "grad/norm_value"), self.learner.group_norms, strict=False
            )
        return result, decision

    def policy_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_policy, with the KL and the entropy where they count in the loss, and metrics."""
        config, rollout, rows = self.config, experience.rollout, part.rows
        logprobs, entropy = self.roles.logprobs(part.batch, config.temperature)
        loss, metrics = policy_loss(
            logprobs,
            rollout.logprobs[rows],
            experience.advantages[rows],
            part.mask,
            config.clip_range,
            part.count,
            config.clip_range_high,
        )
        mean_entropy = masked_mean(entropy, part.mask, part.count)
        metrics |= {"loss/policy": loss, "response/entropy": mean_entropy}
        if config.kl_in == "loss":
            estimator = KL_ESTIMATORS[config.kl_estimator]
            kl = kl_loss(logprobs, rollout.penalty_logprobs[rows], part.mask, estimator, part.count)
            metrics["loss/kl"] = self.kl.coef * kl
            loss = loss + metrics["loss/kl"]
        if config.entropy_coef:
            metrics["loss/entropy"] = -config.entropy_coef * mean_entropy
            loss = loss + metrics["loss/entropy"]
        return loss, metrics

    def value_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return vf_coef L_value, and metrics."""
        values = self.roles.values(part.batch)
        old_values, returns = experience.rollout.values[part.rows], experience.returns[part.rows]
        loss, metrics = value_loss(
            values, old_values, returns, part.mask, self.config.value_clip_range, part.count
        )
        return self.config.vf_coef * loss, metrics | {"loss/value": loss}

    def ptx_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ptx_coef L_ptx on pretraining data, at temperature 1, and metrics."""
        batch = part.pretraining
        mask = batch["mask"] & (not part.is_idle)
        loss = self.config.ptx_coef * ptx_loss(
            self.roles.logprobs(batch)[0], mask, part.pretraining_count
        )
        return loss, {"loss/ptx": loss}

    def micro_batches(self, rollout: Rollout, rows: Tensor, number: int) -> list[MicroBatch]:
        """Return this rank's share of the rows of update `number`, in micro-batches; all ranks get
        as many.
        """
        rows = rows.to(rollout.mask.device)
        count = rollout.mask[rows].sum()
        pretraining = self.pretraining_batch(number, len(rows))
        pretraining_count = pretraining["mask"].sum() if pretraining else None

        parts = []
        for positions in micro_batch_positions(
            len(rows), self.world, self.config.per_device_train_batch_size
        ):
            is_idle = not len(positions)
            if is_idle:
                positions = positions.new_zeros(1)
            at = rows[positions]
            batch = {name: column[at] for name, column in rollout.batch.items()}
            mask = torch.zeros_like(batch["mask"]) if is_idle else batch["mask"]
            own_pretraining = {name: column[positions] for name, column in pretraining.items()}
            parts.append(
                MicroBatch(at, batch, mask, count, own_pretraining, pretraining_count, is_idle)
            )
        return parts

    def pretraining_batch(self, number: int, count: int) -> dict[str, Tensor]:
        """Return the pretraining rows of update `number`, (count, ...) as in `Rollout.batch`; empty
        without any.
        """
        if not self.data.pretraining:
            return {}
        places = range(number * count, (number + 1) * count)
        rows = cycle_shuffled(self.data.pretraining, places, self.config.seed + 1)
        return padded_batch(
            [row["prompt_ids"] for row in rows],
            [row["response_ids"] for row in rows],
            self.data.tokenizer.pad_token_id,
            self.world.device,
        )

    def sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return each number's sum over ranks, in one collective operation."""
        names = sorted(sums)
        summed = self.world.sum(torch.stack([sums[name].double() for name in names])).tolist()
        return dict(zip(names, summed, strict=True))

    # checkpoints

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on; called on all ranks. `load` restores it
        to the last bit.
        """
        self.learner.save(folder / "learner")
        with self.learner.gathered():
            if self.world.is_main and self.roles.has_ema_reference:
                torch.save(
                    [p.detach().cpu() for p in self.roles.ema_parameters()], folder / "moving.pt"
                )
        state = {
            "step": self.steps_done,
            "kl_coef": self.kl.coef,
            "scores": self.score_moments.state_dict(),
            "returns": self.reward_moments.state_dict(),
            "guards": self.guards.state_dict(),
            "budgets": self.world.gather([self.budget.state_dict()]),
        }
        if self.world.is_main:
            (folder / "ppo.json").write_text(json.dumps(state, indent=2) + "\n")

    def load(self, folder: Path, after: Decision | None = None) -> None:
        """Restore what `save` wrote.

        After a guard's decision to roll back, its counts and lower step size are kept, and so is
        what the steps that are thrown away have cost.
        """
        self.learner.load(folder / "learner")
        if self.roles.has_ema_reference:
            parameters = self.roles.ema_parameters()
            values = torch.load(folder / "moving.pt", weights_only=True)
            with self.learner.gathered(parameters, modify=True), torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)

        state = json.loads((folder / "ppo.json").read_text())
        self.steps_done = state["step"]
        self.kl.coef = state["kl_coef"]
        self.score_moments = RunningMoments(**state["scores"])
        self.reward_moments = RunningMoments(**state["returns"])
        if after is None:
            self.guards.load_state_dict(state["guards"])
            self.budget.load_state_dict(state["budgets"][self.world.rank])
        else:
            self.guards.rolled_back(after, state["guards"])


def micro_batch_positions(count: int, world: DistributedContext, size: int) -> list[Tensor]:
    """Return this rank's share of `count` rows as micro-batches of positions.

    All ranks get the same number of them, padded with empty ones, since backward passes are
    collective.
    """
    shares = [
        len(range(count * rank // world.size, count * (rank + 1) // world.size))
        for rank in range(world.size)
    ]
    own = torch.tensor(world.shard(count), dtype=torch.long, device=world.device)
    return [own[start : start + size] for start in range(0, max(1, *shares), size)]


def cycle_shuffled(rows: list[Any], places: range, seed: int) -> list[Any]:
    """Return the rows at these places of endless shuffled passes over them."""
    passes = sorted({place // len(rows) for place in places})
    orders = {number: permutation(len(rows), seed, number) for number in passes}
    return [rows[int(orders[place // len(rows)][place % len(rows)])] for place in places]


def permutation(count: int, *key: int) -> Tensor:
    """Return a permutation of range(count) that depends on the key alone: the same on every rank
    and after a resume.
    """
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
