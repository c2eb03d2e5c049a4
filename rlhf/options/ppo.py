"""The options of PPO. Defaults are those of *The N+ implementation details of RLHF with PPO* (arXiv 2403.17031) but
for sizes that have to fit the machine (batch, episodes, lengths), the temperature, and LoRA's step sizes;
docs/algorithms.md lists each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config import UserError, option
from rlhf.options.guards import check_guards
from rlhf.options.shared import AdapterConfig, SamplingConfig


@dataclass(kw_only=True)
class PPOConfig(SamplingConfig, AdapterConfig):
    """PPO with a KL penalty to the SFT policy; policy, value, reference and reward are adapters on one base."""

    reward: list[dict] = option(help="scorers to learn from: [{model: runs/reward}, {voice: FILE, weight: 0.5}, ...]")
    total_episodes: int = option(10_000, "responses to sample and learn from", resume="free", low=1)
    rollout_batch_size: int = option(64, "responses in one rollout, over all devices", low=1)
    samples_per_prompt: int = option(1, "responses to each prompt of a rollout", low=1)
    num_ppo_epochs: int = option(4, "passes over each rollout", low=1)
    num_mini_batches: int = option(1, "optimizer steps in each pass", low=1)
    learning_rate: float = option(
        1e-5, "peak step size of the policy; LoRA stands more than the 3e-6 of 2403.17031", above=0, high=1
    )
    value_learning_rate: float | None = option(
        None,
        "that of the critic, default as the policy's; this sets the size of its steps, vf_coef hardly does",
        low=0,
        high=1,
    )
    lr_scheduler_type: Literal["linear", "constant"] = option("linear", "linear: down to 0 at the end of the run")
    adam_epsilon: float = option(1e-5, "AdamW's epsilon (2403.17031)", above=0)

    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce"] = option(
        "gae",
        "gae: with a critic; rloo: less the mean of the prompt's other samples; grpo: in deviations of them (all of "
        "GRPO also has kl_in loss, kl_estimator k3); reinforce: less a running mean",
    )
    gamma: float = option(1.0, "discount of later rewards, in gae", low=0, high=1)
    gae_lambda: float = option(0.95, "trade of variance against bias in gae", low=0, high=1)
    whiten_advantages: bool | None = option(
        None, "mean 0 and variance 1 over all true tokens of the rollout; default: for gae alone"
    )
    whiten_rewards: bool = option(False, "variance 1 of the token rewards of a rollout, their mean kept")
    normalize_scores: bool = option(False, "scores minus their running mean, by their running standard deviation")
    score_clip: float | None = option(None, "scores are cut at plus and minus this (after normalisation)", above=0)
    missing_eos: Literal["min", "replace", "subtract"] = option(
        "min",
        "a response that does not end scores at most missing_eos_score, or just that (2403.17031), or so much less "
        "(missing_eos_score being negative)",
    )
    missing_eos_score: float | None = option(-1.0, "see missing_eos; none: such a response scores as the others do")
    length_penalty: float = option(0.0, "taken from the score for each token of the response")

    kl_coef: float = option(0.05, "weight of the KL to the reference; 0 lets the policy drift", low=0)
    kl_in: Literal["reward", "loss"] = option(
        "reward", "where the KL counts: each token's reward, or the policy's loss"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k1",
        "k1 for the reward, where its gradient is the sequence KL's; in the loss k2 has that of each token's KL given "
        "those before it, k3 (GRPO's) that of the KL the other way round, and k1 pulls nowhere on average",
    )
    kl_target: float | None = option(None, "adapt kl_coef towards this sequence KL in nats; default: fixed", above=0)
    kl_horizon: float | None = option(
        None,
        "responses over which an adaptive kl_coef moves; default: a tenth of the run's, one rollout at least",
        above=0,
    )
    reference_ema: float | None = option(
        None, "decay of a reference that follows the policy, for the penalty alone; default: it stays", low=0, high=1
    )

    clip_range: float = option(0.2, "how far the probability ratio may move in one rollout", above=0)
    clip_range_high: float | None = option(None, "the same upwards, default as clip_range", above=0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0)
    ptx_coef: float = option(0.0, "weight of the loss on given answers mixed into each update (PPO-ptx)", low=0)
    ptx_data: list[str] | None = option(None, "the instructions for it")

    critic_from: Literal["auto", "reward", "policy", "fresh"] = option(
        "auto", "what the critic starts as; auto: the reward model where it is a role on the base, else the policy"
    )
    critic_warmup_steps: int = option(0, "first steps in which the critic alone learns", low=0)
    value_clip_range: float | None = option(0.2, "how far a value may move in one rollout; none: no clipping", above=0)
    vf_coef: float = option(
        0.1,
        "weight of the value loss. AdamW hardly minds the scale of a loss, but both are clipped to one joint norm: a "
        "large one shrinks the policy's gradient towards adam_epsilon, and the policy's steps with it",
        low=0,
    )

    guards: dict = option(
        {}, "changes to the guards of docs/guards.md, e.g. {max_kl: {threshold: 30}, length: off}", resume="free"
    )
    max_response_length: int = option(128, "tokens with EOS; a response is cut there and counts as not ended", low=1)
    save_steps: int = option(
        10, "checkpoint every so many steps, with each evaluation and at the end", resume="free", low=0
    )

    def validate(self) -> None:
        super().validate()
        check_guards(self.guards)
        size = self.rollout_batch_size
        if size % self.samples_per_prompt:
            raise UserError(f"rollout_batch_size {size} is no multiple of samples_per_prompt {self.samples_per_prompt}")
        if size < self.num_mini_batches:
            raise UserError(f"{self.num_mini_batches} minibatches out of {size} responses")
        if self.total_episodes < size:
            raise UserError(f"total_episodes {self.total_episodes} is less than one rollout of {size}")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("'kl_target' adapts 'kl_coef' by factors, so 'kl_coef' cannot begin at 0")
        if self.kl_target is not None and self.horizon < size:
            raise UserError(f"'kl_horizon' is {self.kl_horizon}, less than one rollout of {size}")
        if self.missing_eos == "subtract" and (self.missing_eos_score or 0.0) > 0:
            raise UserError(
                f"'missing_eos_score' is {self.missing_eos_score} and 'missing_eos' subtract, so that not ending would "
                f"pay. To take {self.missing_eos_score} off: --missing_eos_score {-self.missing_eos_score}"
            )
        if self.advantage_estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise UserError(
                f"advantage_estimator {self.advantage_estimator} compares samples of one prompt, and there is 1; for "
                "example --samples_per_prompt 4"
            )
        if not self.has_critic and self.critic_warmup_steps:
            raise UserError(f"'critic_warmup_steps' is set, but {self.advantage_estimator} has no critic")
        if bool(self.ptx_coef) != bool(self.ptx_data):
            raise UserError("'ptx_coef' and 'ptx_data' belong together: the weight, and the instructions it is for")

    @property
    def total_steps(self) -> int:
        """Whole rollouts; episodes beyond the last one are not sampled."""
        return self.total_episodes // self.rollout_batch_size

    @property
    def horizon(self) -> float:
        """Responses over which an adaptive kl_coef moves."""
        if self.kl_horizon is not None:
            return self.kl_horizon
        return max(self.rollout_batch_size, 0.1 * self.total_steps * self.rollout_batch_size)

    @property
    def critic_rate(self) -> float:
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def whitens(self) -> bool:
        return self.advantage_estimator == "gae" if self.whiten_advantages is None else self.whiten_advantages
