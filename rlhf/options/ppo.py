"""The options of PPO. Defaults are those of *The N+ implementation details of RLHF with PPO* (arXiv
2403.17031) but for sizes that have to fit the machine (batch, episodes, lengths), the temperature,
and LoRA's step sizes; docs/algorithms.md gives the reasons.
"""

from dataclasses import dataclass, fields
from typing import Literal

from rlhf.config import option
from rlhf.errors import UserError
from rlhf.options.guards import check_guards
from rlhf.options.shared import AdapterConfig, SamplingConfig


@dataclass(kw_only=True)
class RolloutOptions:
    """Rollouts and the schedule."""

    total_episodes: int = option(10_000, "responses to sample and learn from", resume="free", low=1)
    rollout_batch_size: int = option(64, "responses in one rollout, over all devices", low=1)
    samples_per_prompt: int = option(1, "responses to each prompt of a rollout", low=1)
    num_ppo_epochs: int = option(4, "passes over each rollout", low=1)
    num_mini_batches: int = option(1, "optimizer steps in each pass", low=1)
    micro_batch_tokens: int = option(
        0,
        "tokens in one pass of a device, in learning and measuring: a cut for memory and speed that changes "
        "results by rounding only; 0: 1,024 on a CPU, 16,384 on a GPU",
        low=0,
    )
    per_device_train_batch_size: int = option(
        512, "rows in one pass of a device at most; micro_batch_tokens is what usually cuts", low=1
    )
    old_logprobs: Literal["auto", "learner"] = option(
        "auto",
        "log-probabilities of the policy that sampled; auto: those of the generation engine while they are "
        "the learner's but for rounding, which saves a pass; learner: always measured by a pass of the learner",
    )
    lr_scheduler_type: Literal["linear", "constant"] = option(
        "linear", "linear: decays to 0 at the end of the run"
    )
    adam_epsilon: float = option(1e-5, "AdamW's epsilon (2403.17031)", above=0)


@dataclass(kw_only=True)
class ScoreOptions:
    """Scores."""

    reward: list[dict] = option(
        help="scorers to learn from: [{model: runs/reward}, {voice: FILE, weight: 0.5}, ...]"
    )
    normalize_scores: bool = option(
        False, "standardise scores by their running mean and standard deviation"
    )
    score_clip: float | None = option(
        None, "clip scores to plus and minus this, after normalisation", above=0
    )
    missing_eos: Literal["min", "replace", "subtract"] = option(
        "min",
        "min: a truncated response scores at most missing_eos_score; replace: exactly that (2403.17031); subtract: its "
        "score plus missing_eos_score, which is negative",
    )
    missing_eos_score: float | None = option(
        -1.0, "see missing_eos; none: a truncated response is scored like any other"
    )
    length_penalty: float = option(0.0, "subtracted from the score for each token of the response")


@dataclass(kw_only=True)
class AdvantageOptions:
    """Advantages."""

    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce"] = option(
        "gae",
        "gae: with a critic; rloo: minus the mean of the prompt's other samples; grpo: standardised over the prompt's "
        "samples (GRPO also has kl_in loss and kl_estimator k3); reinforce: minus a running mean",
    )
    gamma: float = option(1.0, "discount of later rewards, in gae", low=0, high=1)
    gae_lambda: float = option(0.95, "bias-variance trade-off of gae", low=0, high=1)
    whiten_advantages: bool | None = option(
        None,
        "advantages with mean 0 and variance 1 over all response tokens of the rollout; default: only for gae",
    )
    whiten_rewards: bool = option(
        False, "scale the token rewards of a rollout to variance 1, keeping their mean"
    )


@dataclass(kw_only=True)
class KLOptions:
    """The KL penalty."""

    kl_coef: float = option(
        0.05, "weight of the per-token KL penalty to the reference policy; 0 disables it", low=0
    )
    kl_in: Literal["reward", "loss"] = option(
        "reward", "where the KL enters: each token's reward, or the policy's loss"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k1",
        "k1 in the reward, where its gradient is that of the sequence KL; in the loss k2 has the gradient of each "
        "token's conditional KL, k3 (GRPO's) that of the KL in the other direction, and k1 none in expectation",
    )
    kl_target: float | None = option(
        None, "adapt kl_coef towards this sequence KL in nats; default: kl_coef is fixed", above=0
    )
    kl_horizon: float | None = option(
        None,
        "responses over which an adaptive kl_coef moves; default: a tenth of the run, at least one rollout",
        above=0,
    )
    reference_ema: float | None = option(
        None,
        "decay of an exponential moving average of the policy that serves as reference of the penalty; default: none",
        low=0,
        high=1,
    )


@dataclass(kw_only=True)
class PolicyLossOptions:
    """The policy's loss."""

    clip_range: float = option(0.2, "clip range of the probability ratio", above=0)
    clip_range_high: float | None = option(None, "upper clip range, by default clip_range", above=0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0)
    ptx_coef: float = option(
        0.0, "weight of the loss on pretraining data mixed into each update (PPO-ptx)", low=0
    )
    ptx_data: list[str] | None = option(None, "instructions that serve as pretraining data")


@dataclass(kw_only=True)
class CriticOptions:
    """The critic."""

    value_learning_rate: float | None = option(
        None,
        "peak step size of the critic, by default the policy's; it sets the size of the steps, vf_coef hardly does",
        low=0,
        high=1,
    )
    critic_from: Literal["auto", "reward", "policy", "fresh"] = option(
        "auto",
        "what the critic starts from; auto: the reward model where it is a role on the base, or, with use_peft false, "
        "a model of whole weights like the base; else the policy",
    )
    critic_trunk: Literal["auto", "own", "reward", "policy"] = option(
        "auto",
        "whose hidden states the critic's head reads; own: weights of its own; policy: the policy's, which "
        "then learns from both losses; reward: the frozen reward model's, which scoring has computed anyway, by "
        "ridge regression after each rollout; auto: reward where the reward model is a role on the base and no option "
        "of the critic's learning is set, else own",
        before="own",
    )
    critic_warmup_steps: int = option(0, "first steps, in which only the critic learns", low=0)
    value_clip_range: float | None = option(
        0.2, "clip range of the values; none: no clipping", above=0
    )
    vf_coef: float = option(
        0.1,
        "weight of the value loss. AdamW is nearly invariant to the scale of a loss, but both losses are clipped to "
        "one joint norm: a large weight shrinks the policy's gradient, and its steps once that nears adam_epsilon",
        low=0,
    )


# how a critic learns that has parameters to train
CRITIC_LEARNING = (
    "value_learning_rate",
    "critic_from",
    "critic_warmup_steps",
    "value_clip_range",
    "vf_coef",
)


@dataclass(kw_only=True)
class PPOConfig(
    RolloutOptions,
    ScoreOptions,
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    CriticOptions,
    SamplingConfig,
    AdapterConfig,
):
    """PPO with a KL penalty to the SFT policy; policy, value, reference and reward are adapters on
    one base, or policy and value whole models beside it.
    """

    learning_rate: float = option(
        1e-5,
        "peak step size of the policy; LoRA tolerates more than the 3e-6 of 2403.17031",
        above=0,
        high=1,
    )
    optim: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "adamw_8bit: moments in 8 bits (bitsandbytes)"
    )
    use_peft: bool = option(
        True,
        "train LoRA adapters on one frozen base; false: whole weights, the critic's too, which want a smaller "
        "learning_rate (3e-6 in 2403.17031)",
    )
    guards: dict = option(
        {},
        "changes to the guards of docs/guards.md, e.g. {max_kl: {threshold: 30}, length: off}",
        resume="free",
    )
    max_response_length: int = option(
        128, "tokens with EOS; a longer response is truncated there", low=1
    )
    save_steps: int = option(
        10,
        "save a checkpoint every this many steps, with each evaluation and at the end",
        resume="free",
        low=0,
    )

    def validate(self) -> None:
        super().validate()
        check_guards(self.guards)
        if not self.use_peft:
            self._check_whole()
        size = self.rollout_batch_size
        if size % self.samples_per_prompt:
            raise UserError(
                f"rollout_batch_size {size} is not a multiple of samples_per_prompt {self.samples_per_prompt}"
            )
        if size < self.num_mini_batches:
            raise UserError(
                f"'num_mini_batches' is {self.num_mini_batches}, more than the {size} responses of a rollout "
                "(rollout_batch_size). Lower it"
            )
        if self.total_episodes < size:
            raise UserError(
                f"total_episodes {self.total_episodes} is less than one rollout of {size}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(
                "'kl_target' adapts 'kl_coef' by factors, so 'kl_coef' cannot start at 0"
            )
        if self.kl_target is not None and self.horizon < size:
            raise UserError(f"'kl_horizon' is {self.kl_horizon}, less than one rollout of {size}")
        if self.missing_eos == "subtract" and (self.missing_eos_score or 0.0) > 0:
            raise UserError(
                f"'missing_eos_score' is {self.missing_eos_score} and 'missing_eos' subtract, which would reward "
                f"truncation. To subtract {self.missing_eos_score}: --missing_eos_score {-self.missing_eos_score}"
            )
        if self.advantage_estimator in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise UserError(
                f"advantage_estimator {self.advantage_estimator} compares samples of one prompt, and there is 1; for "
                "example --samples_per_prompt 4"
            )
        if not self.has_critic and self.critic_warmup_steps:
            raise UserError(
                f"'critic_warmup_steps' is set, but {self.advantage_estimator} has no critic. Leave it out"
            )
        unused = self.unused_critic_options()
        if unused:
            raise UserError(
                f"with critic_trunk {self.critic_trunk} nothing reads {', '.join(unused)}. Leave it out, or "
                "use --critic_trunk own"
            )
        if bool(self.ptx_coef) != bool(self.ptx_data):
            raise UserError(
                "'ptx_coef' and 'ptx_data' belong together: a weight and the data that it applies to"
            )

    def _check_whole(self) -> None:
        """Raise UserError for options that whole weights do not read."""
        defaults = vars(AdapterConfig())
        adapters = [name for name, value in defaults.items() if getattr(self, name) != value]
        if adapters:
            raise UserError(
                f"'use_peft' is false, and nothing reads '{adapters[0]}': no adapter is trained. Leave it out, or "
                "use --use_peft true"
            )
        if self.reference_ema is not None:
            raise UserError(
                "'reference_ema' averages an adapter, and 'use_peft' is false: of whole weights it would be one more "
                "model in float32. Leave it out, or use --use_peft true"
            )

    @property
    def total_steps(self) -> int:
        """Return the number of whole rollouts; episodes beyond the last one are not sampled."""
        return self.total_episodes // self.rollout_batch_size

    @property
    def horizon(self) -> float:
        """Return the responses over which an adaptive kl_coef moves."""
        if self.kl_horizon is not None:
            return self.kl_horizon
        return max(self.rollout_batch_size, 0.1 * self.total_steps * self.rollout_batch_size)

    def set_critic_options(self) -> list[str]:
        """Return the options of a critic's learning that are not at their defaults."""
        defaults = {field.name: field.default for field in fields(CriticOptions)}
        return [name for name in CRITIC_LEARNING if getattr(self, name) != defaults[name]]

    def unused_critic_options(self) -> list[str]:
        """Return the options that are set and that this critic_trunk does not read."""
        if self.critic_trunk in ("auto", "own"):
            return []
        # a head on the policy's trunk learns by the policy's steps, with a loss of its own
        read = ("value_clip_range", "vf_coef") if self.critic_trunk == "policy" else ()
        return [name for name in self.set_critic_options() if name not in read]

    @property
    def critic_rate(self) -> float:
        return self.learning_rate if self.value_learning_rate is None else self.value_learning_rate

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def whitens(self) -> bool:
        return (
            self.advantage_estimator == "gae"
            if self.whiten_advantages is None
            else self.whiten_advantages
        )
