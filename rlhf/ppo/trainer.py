"""Proximal policy optimisation of a language model on adapter roles.

One step: sample a rollout, turn scores into token rewards, estimate advantages, then several epochs
of clipped policy and value updates over minibatches of it. The details follow *The N+
implementation details of RLHF with PPO* (arXiv 2403.17031). The options are in rlhf/options/ppo.py;
docs/algorithms.md has each equation with its function.

Three parts can be exchanged: what samples (`RolloutCollector.generate`), what measures
log-probabilities and values (`rollout.measure`), and what learns (`OptimizerEngine`).
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import BadScore, Scorer
from rlhf.engines.batched import generate, try_cache
from rlhf.engines.sampling import Generate, Sampling
from rlhf.guards import Decision
from rlhf.model.packing import try_packing
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.batches import Batches, TrainingData
from rlhf.ppo.experience import Estimator, Experience
from rlhf.ppo.guards import Guards
from rlhf.ppo.passes import LossPasses
from rlhf.ppo.rollout import Rollout, RolloutCollector, RolloutSettings
from rlhf.ranks.distributed import DistributedContext, peak_memory
from rlhf.ranks.optimizer_engine import make_engine
from rlhf.roles.critic import LeastSquaresCritic
from rlhf.roles.one_base import Roles
from rlhf.runs.budget import Budget
from rlhf.tensors import masked_mean

# largest mean |engine's - learner's| log-probability of a token, nats, that counts as rounding:
# float32 gives 1e-6 to 1e-5, bfloat16 1e-2
ENGINE_GAP = 1e-4


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
        spreads: Sequence[str] = (),
    ):
        """`monitored` names scores that should not fall while the optimised score rises (guard
        `hacking`), `spreads` those that say how far an ensemble disagrees (guard `disagreement`).
        """
        self.config, self.roles, self.data, self.world = config, roles, data, world
        self.budget = budget or Budget()
        roles.train()
        for model in roles.models:
            self.budget.watch(model)
        groups = [{"params": roles.parameters_of("policy"), "lr": config.learning_rate}]
        if roles.critic_learns:
            groups.append({"params": roles.parameters_of("value"), "lr": config.critic_rate})
        self.learner = make_engine(
            roles,
            groups,
            world,
            deepspeed_config,
            config.max_grad_norm,
            config.adam_epsilon,
            config.per_device_train_batch_size,
            config.optim,
        )

        # asked of the wrapped roles: under ZeRO-3 the head is not whole from here on
        vocabulary = roles.kept_vocabulary(entropy_learns=config.entropy_coef > 0)
        self.batches = Batches(config, data, world, vocabulary)
        settings = RolloutSettings(
            Sampling(config.max_response_length, config.temperature),
            seed=config.seed,
            samples_per_prompt=config.samples_per_prompt,
            pass_limits=self.batches.limits(),
            generation_batch_size=config.generation_batch_size,
        )
        self.collector = RolloutCollector(
            roles, scorer, data.tokenizer, data.stop_ids, world, settings, engine
        )

        # state of the run, all of it in checkpoints
        self.steps_done = 0
        self.estimator = Estimator(config)
        self.guards = Guards(config.guards, monitored, spreads)
        # the stop or rollback that a guard has decided on in this step
        self.pending_decision: Decision | None = None

        self.passes = LossPasses(config, roles, self.estimator)
        # a critic on fixed states has no pass
        self.fitted_critic: LeastSquaresCritic | None = None
        if roles.has_critic and not roles.critic_learns:
            self.fitted_critic = LeastSquaresCritic(roles.heads["value"])

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
            metrics |= self.guards.decisions.metrics() | self.budget.total(self.world)
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
        self.world.note_step(step + 1)
        try:
            rollout = self.collect(step)
        except BadScore as error:
            decision = self.guards.scores(step + 1, str(error))
            if decision is None or decision.action == "stop":
                raise
            self.pending_decision = decision if decision.action == "rollback" else None
            return {"time/step": time.monotonic() - began}, None

        experience, metrics = self.estimator.estimate(rollout)
        metrics |= rollout.seconds
        if self.stops_before_learning(step, experience, metrics):
            return metrics | {"time/step": time.monotonic() - began}, rollout

        learning_began = time.monotonic()
        with self.budget.counting():
            metrics |= self.learn(experience, step)
        if self.fitted_critic is not None:
            metrics["loss/value"] = self.fit_critic(experience)
        now = time.monotonic()
        metrics |= {"time/learn": now - learning_began, "time/step": now - began}
        metrics["time/tokens_per_second"] = int(rollout.mask.sum()) / (now - began)

        self.estimator.remember(experience, metrics["kl/sequence"])
        self.watch_engine(rollout, metrics)
        if self.config.reference_ema is not None:
            changed = [*self.roles.ema_parameters(), *self.roles.parameters_of("policy")]
            with self.learner.gathered(changed, modify=True):
                self.roles.update_ema(self.config.reference_ema)
        return metrics, rollout

    # 1. sample

    def collect(self, step: int) -> Rollout:
        """Return the rollout of `step`, the same on every rank."""
        prompts = self.batches.prompts_of(step)
        with self.learner.readable():
            # what a model allows is found out once, by passes that are not counted
            if self.collector.generate is generate:
                try_cache(self.roles.model)
            for model in self.roles.models:
                try_packing(model)
            with self.budget.counting():
                rollout = self.collector.collect(prompts, step)
        shard = self.world.shard(len(rollout))
        self.budget.episodes += len(shard)
        self.budget.tokens_generated += int(rollout.mask[shard.start : shard.stop].sum())
        return rollout

    # 2. estimate

    def stops_before_learning(
        self, step: int, experience: Experience, metrics: dict[str, float]
    ) -> bool:
        """Let the guards see the rollout before the run's first update; return whether one of them
        stops the run.
        """
        if self.guards.updates:
            return False
        scores = experience.scores
        difference = self.estimator.largest_difference(scores)
        decision = self.guards.first(step + 1, metrics, difference, len(scores))
        stops = decision is not None and decision.action == "stop"
        self.pending_decision = decision if stops else None
        return stops

    def watch_engine(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Decide whether the engine's log-probabilities stand for the learner's in the next rollout.

        They do while the two were equal but for rounding: where both were measured in this one, or
        by its first update, which makes the learner's anyway.
        """
        if not math.isnan(rollout.logprob_gap):
            metrics["rollout/logprob_gap"] = rollout.logprob_gap
        gap = metrics["rollout/logprob_gap"]
        is_wanted = self.config.old_logprobs == "auto"
        # what a server computes with is out of sight: its numbers are logged, never learnt from
        is_wanted = is_wanted and self.config.vllm_url is None
        # engines sample in float32, which a base in float64 is there to be better than
        is_wanted = is_wanted and self.roles.precision == torch.float32
        self.collector.trusts_engine = is_wanted and gap <= ENGINE_GAP

    # 3. learn

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """Make num_ppo_epochs passes of num_mini_batches updates; return means over the updates
        that were made.
        """
        rates = self.learning_rates(step)
        made: list[dict[str, float]] = []
        first: dict[str, float] = {}
        for number, rows in self.batches.mini_batches(len(experience.rollout), step):
            metrics, decision = self.update(experience, rows, rates, step, number)
            gap = metrics.pop("rollout/logprob_gap")
            first = first or {"ppo/ratio_first": metrics["ppo/ratio"], "rollout/logprob_gap": gap}
            if decision is None or decision.action == "warn":
                made.append(metrics)
            elif decision.action != "skip":
                # no further update of this rollout
                self.pending_decision = decision if decision.interrupts_run else None
                break

        means = {}
        for name in made[0] if made else ():
            means[name] = sum(metrics[name] for metrics in made) / len(made)
        means |= first | {"ppo/updates": len(made)}
        return means | dict(zip(("learning_rate", "value/learning_rate"), rates, strict=False))

    def fit_critic(self, experience: Experience) -> float:
        """Fit a critic on fixed states to the rollout; return half its squared error before, the
        mean over response tokens.
        """
        rollout, mask = experience.rollout, experience.rollout.mask
        shard = self.world.shard(len(rollout))
        own = slice(shard.start, shard.stop)
        returns = experience.returns[own][mask[own]]
        with self.learner.gathered(self.roles.parameters_of("value"), modify=True):
            self.fitted_critic.fit(rollout.own_states, returns, self.world.sum)
        return float(0.5 * masked_mean((rollout.values - experience.returns) ** 2, mask))

    def learning_rates(self, step: int) -> list[float]:
        """Return the step sizes of policy and critic.

        Linear ones reach 0 after the last step; each rollback of the run has halved them.
        """
        config = self.config
        left = 1.0 - step / config.total_steps if config.lr_scheduler_type == "linear" else 1.0
        rates = [config.learning_rate]
        if self.roles.critic_learns:
            rates.append(config.critic_rate)
        return [left * self.guards.decisions.rate_scale * rate for rate in rates]

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
        parts = self.batches.micro_batches(experience.rollout, rows, number)
        passes = list(itertools.product(parts, self.passes.by_name))
        sums: dict[str, Tensor] = {}
        for position, (part, name) in enumerate(passes, 1):
            is_last = position == len(passes)
            learns = name == "value" or step >= self.config.critic_warmup_steps
            role = self.roles.use_critic() if name == "value" else self.roles.use("policy")
            # the role is held through forward and backward pass
            with role, torch.set_grad_enabled(learns):
                loss, metrics = self.passes.by_name[name](experience, part)
                if learns:
                    metrics["loss/total"] = loss
                    self.learner.backward(loss, last=is_last)
            if learns and not part.is_idle:
                read = part.pretraining if name == "ptx" else part.batch
                self.budget.tokens_trained += int(read["attention"].sum())
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value.detach()
            # the next pass needs the memory: checkpointing keeps the embeddings and their gradient
            # as long as the loss
            del loss, metrics, value

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
        if self.fitted_critic is not None:
            with self.learner.gathered(self.roles.parameters_of("value")):
                state = self.fitted_critic.state_dict()
            if self.world.is_main:
                torch.save(state, folder / "critic.pt")
        if self.roles.has_ema_reference:
            moving = self.roles.ema_parameters()
            with self.learner.gathered(moving):
                if self.world.is_main:
                    torch.save([p.detach().cpu() for p in moving], folder / "moving.pt")
        state = {
            "step": self.steps_done,
            **self.estimator.state_dict(),
            "trusts_engine": self.collector.trusts_engine,
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
        if self.fitted_critic is not None:
            parameters = self.roles.parameters_of("value")
            state = torch.load(folder / "critic.pt", weights_only=True)
            with self.learner.gathered(parameters, modify=True):
                self.fitted_critic.load_state_dict(state)
        if self.roles.has_ema_reference:
            parameters = self.roles.ema_parameters()
            values = torch.load(folder / "moving.pt", weights_only=True)
            with self.learner.gathered(parameters, modify=True), torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)

        state = json.loads((folder / "ppo.json").read_text())
        self.steps_done = state["step"]
        self.estimator.load_state_dict(state)
        # checkpoints of earlier versions do not say
        self.collector.trusts_engine = state.get("trusts_engine", False)
        if after is None:
            self.guards.load_state_dict(state["guards"])
            self.budget.load_shares(state["budgets"], self.world)
        else:
            self.guards.rolled_back(state["guards"])
