"""The losses of a PPO update, each from a pass through the model: policy, pretraining data, value.

A pass takes the rollout with its advantages and a micro-batch of it. It returns its loss, a sum over
the micro-batch's tokens divided by the count of all tokens of the update, and metrics of that form.
"""

from collections.abc import Callable

from torch import Tensor

from rlhf.options.ppo import PPOConfig
from rlhf.ppo import losses
from rlhf.ppo.advantages import KL_ESTIMATORS
from rlhf.ppo.batches import MicroBatch
from rlhf.ppo.experience import Estimator, Experience
from rlhf.roles.one_base import Roles
from rlhf.tensors import masked_mean

Pass = Callable[[Experience, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


class LossPasses:
    """The passes of an update by name, in their order; `estimator` has the weight of the KL."""

    def __init__(self, config: PPOConfig, roles: Roles, estimator: Estimator):
        self.config, self.roles, self.estimator = config, roles, estimator
        self.by_name: dict[str, Pass] = {"policy": self.policy_pass}
        if config.ptx_coef:
            self.by_name["ptx"] = self.ptx_pass
        if roles.has_critic and roles.critic_trunk == "policy":
            self.by_name["policy"] = self.policy_and_value_pass
        elif roles.critic_learns:
            self.by_name["value"] = self.value_pass

    def policy_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `policy_loss` from a pass through the policy."""
        learns = bool(self.config.entropy_coef)
        found = self.roles.logprobs(part.batch, self.config.temperature, entropy_learns=learns)
        return self.policy_loss(experience, part, *found)

    def policy_and_value_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of `policy_pass` and `value_pass` from one pass through the policy."""
        logprobs, entropy, values = self.roles.logprobs_and_values(
            part.batch, self.config.temperature, entropy_learns=bool(self.config.entropy_coef)
        )
        policy, metrics = self.policy_loss(experience, part, logprobs, entropy)
        value, of_value = self.value_loss(experience, part, values)
        return policy + value, metrics | of_value

    def policy_loss(
        self, experience: Experience, part: MicroBatch, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_policy of log-probabilities and entropies (B, T), with the KL and the entropy
        where they count in the loss, and metrics.
        """
        config, rollout, rows = self.config, experience.rollout, part.rows
        loss, metrics = losses.policy_loss(
            logprobs,
            rollout.logprobs[rows],
            experience.advantages[rows],
            part.mask,
            config.clip_range,
            part.count,
            config.clip_range_high,
        )
        mean_entropy = masked_mean(entropy, part.mask, part.count)
        gap = (logprobs.detach() - rollout.logprobs[rows]).abs()
        metrics |= {
            "loss/policy": loss,
            "response/entropy": mean_entropy,
            "rollout/logprob_gap": masked_mean(gap, part.mask, part.count),
        }
        if config.kl_in == "loss":
            estimator = KL_ESTIMATORS[config.kl_estimator]
            kl = losses.kl_loss(
                logprobs, rollout.penalty_logprobs[rows], part.mask, estimator, part.count
            )
            metrics["loss/kl"] = self.estimator.kl.coef * kl
            loss = loss + metrics["loss/kl"]
        if config.entropy_coef:
            metrics["loss/entropy"] = -config.entropy_coef * mean_entropy
            loss = loss + metrics["loss/entropy"]
        return loss, metrics

    def value_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `value_loss` from a pass through the critic."""
        return self.value_loss(experience, part, self.roles.values(part.batch))

    def value_loss(
        self, experience: Experience, part: MicroBatch, values: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return vf_coef L_value of values (B, T), and metrics."""
        old_values, returns = experience.rollout.values[part.rows], experience.returns[part.rows]
        loss, metrics = losses.value_loss(
            values, old_values, returns, part.mask, self.config.value_clip_range, part.count
        )
        return self.config.vf_coef * loss, metrics | {"loss/value": loss}

    def ptx_pass(
        self, experience: Experience, part: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ptx_coef L_ptx on pretraining data, at temperature 1, and metrics."""
        batch = part.pretraining
        mask = batch["mask"] & (not part.is_idle)
        logprobs, _ = self.roles.logprobs(batch)
        loss = self.config.ptx_coef * losses.ptx_loss(logprobs, mask, part.pretraining_count)
        return loss, {"loss/ptx": loss}
