"""From the scores of a rollout to rewards, advantages and returns.

r_t = -kl_coef kl_t + [t is the last token] score,    A = estimator(r),    R = A + V
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
from rlhf.ppo.rollout import Rollout, describe_rollout
from rlhf.tensors import explained_variance, masked_mean, masked_sum_rows, masked_whiten


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


class Estimator:
    """Turns rollouts into experience. It remembers of earlier ones the KL's weight, the moments of
    scores, and those of responses' rewards.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        self.kl = KLController(config.kl_coef, config.kl_target, config.horizon)
        self.score_moments = RunningMoments()
        self.reward_moments = RunningMoments()

    def estimate(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Return what is to be learnt from a rollout, and its metrics."""
        config, mask = self.config, rollout.mask
        scores = self.shape_scores(rollout)
        kl = KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, rollout.penalty_logprobs)
        rewards = token_rewards(scores, kl, mask, self.kl.coef if config.kl_in == "reward" else 0.0)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)

        advantages = self.advantages(rewards, rollout)
        returns = advantages + rollout.values
        experience = Experience(rollout, scores, rewards, advantages, returns)
        metrics = describe_rollout(rollout) | self.describe(experience)
        if config.whitens:
            experience.advantages = masked_whiten(advantages, mask)
        return experience, metrics

    def shape_scores(self, rollout: Rollout) -> Tensor:
        """Return the scores that are learnt from, (N,), shaped as configured."""
        config, moments = self.config, None
        self.score_moments.update(rollout.scores)
        if config.normalize_scores:
            moments = (self.score_moments.mean, self.score_moments.std)
        return shape_scores(
            rollout.scores,
            rollout.ended,
            rollout.mask.sum(-1),
            moments=moments,
            clip=config.score_clip,
            missing_eos=config.missing_eos,
            missing_eos_score=config.missing_eos_score,
            length_penalty=config.length_penalty,
        )

    def advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
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
        baseline = self.reward_moments.mean
        if not self.reward_moments.count:
            baseline = float(masked_sum_rows(rewards, mask).mean())
        return reinforce(rewards, mask, baseline)

    def describe(self, experience: Experience) -> dict[str, float]:
        """Return the metrics of shaped scores, rewards, unwhitened advantages and values."""
        config, rollout, mask = self.config, experience.rollout, experience.rollout.mask
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
        if config.has_critic:
            metrics["value/mean"] = masked_mean(rollout.values, mask)
            metrics["value/return"] = masked_mean(experience.returns, mask)
            variance = explained_variance(rollout.values, experience.returns, mask)
            metrics["value/explained_variance"] = variance
        if config.reference_ema is not None:
            penalty = kl_k1(rollout.logprobs, rollout.penalty_logprobs)
            metrics["kl/penalty"] = masked_sum_rows(penalty, mask).mean()
        if config.normalize_scores:
            metrics["score/mean_running"] = self.score_moments.mean
            metrics["score/std_running"] = self.score_moments.std
        return {name: float(value) for name, value in metrics.items()}

    def largest_difference(self, scores: Tensor) -> float:
        """Return the largest difference between scores (N,) that are compared: of one prompt's
        samples, or of all.
        """
        compares_samples = self.config.advantage_estimator in ("rloo", "grpo")
        count = self.config.samples_per_prompt if compares_samples else len(scores)
        compared = scores.view(-1, count)
        return float((compared.amax(-1) - compared.amin(-1)).max())

    def remember(self, experience: Experience, sequence_kl: float) -> None:
        """Take a step's KL and rewards into the KL coefficient and the baseline of the next one."""
        rollout = experience.rollout
        self.kl.update(sequence_kl, len(rollout))
        self.reward_moments.update(masked_sum_rows(experience.rewards, rollout.mask))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "kl_coef": self.kl.coef,
            "scores": self.score_moments.state_dict(),
            # its name in checkpoints from the start
            "returns": self.reward_moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.coef = state["kl_coef"]
        self.score_moments = RunningMoments(**state["scores"])
        self.reward_moments = RunningMoments(**state["returns"])
