"""FLOPs, tokens and seconds of a run, in the units that runs count (`rlhf.runs.budget`)."""

import math
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from rlhf.model.packing import decoder_and_head
from rlhf.plan.devices import (
    CPU_SAMPLING_SHARE,
    CPU_SHARE,
    LEARNING_SHARE,
    SAMPLING_SHARE,
    Device,
)
from rlhf.plan.memory import Setup
from rlhf.plan.passes import Rows
from rlhf.plan.roles import critic_trunk, reward_models, shares_prompts
from rlhf.runs.budget import DecoderShape, active_adapters, decoder_shape


@dataclass(frozen=True)
class Work:
    """What one kind of work takes in the whole run, over all ranks; seconds of the clock."""

    name: str
    tokens: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """FLOPs of passes through one model: its decoder, and `head` multiply-adds of a position."""

    decoder: DecoderShape
    head: float
    head_learns: bool
    to_embeddings: bool
    recomputed: bool

    @classmethod
    def of(cls, model: nn.Module, *, recomputed: bool) -> Self:
        decoder, head = decoder_and_head(model)
        shape = decoder_shape(decoder.get_decoder(), active_adapters(decoder))
        learns = head.weight.requires_grad
        # adapters alone ask for gradients behind the embeddings, but where those learn too
        to_embeddings = learns or recomputed
        return cls(shape, head.weight.numel(), learns, to_embeddings, recomputed)

    def forward(self, rows: Rows, heads: int) -> float:
        """Return the FLOPs of a pass over rows, `heads` of whose positions get logits."""
        return self.decoder.forward(rows.tokens, rows.pairs) + 2.0 * self.head * heads

    def learning(self, rows: Rows, heads: int) -> float:
        """Return the FLOPs of a pass forth and back."""
        backward = self.decoder.backward(
            rows.tokens,
            rows.pairs,
            to_embeddings=self.to_embeddings,
            fused=True,
            recomputed=self.recomputed,
        )
        # the gradient of the states; where the head learns also its own, from logits made again
        products = 3 if self.head_learns else 1
        return self.forward(rows, heads) + backward + 2.0 * products * self.head * heads


def work_of(
    program: str,
    config: Any,
    costs: Costs,
    setup: Setup,
    device: Device,
    lengths: tuple[int, int],
    rows: int | None,
    sampled_bytes: tuple[float, float],
) -> tuple[int, list[Work]]:
    """Return the optimizer steps of a run (PPO: rollouts) and its work.

    lengths: mean tokens of prompt and response. rows: of the training data; None makes one step.
    sampled_bytes: of the weights that a step of sampling reads, and of a token's keys and values.
    """
    clock = Clock(device, setup, sampled_bytes)
    if program == "ppo":
        steps = config.total_steps
        found = ppo_work(config, costs, clock, lengths, steps)
    else:
        steps = steps_of(config, setup, rows)
        found = offline_work(program, config, costs, clock, lengths, steps, rows)
    if getattr(config, "eval_prompts", 0):
        times = 2 + (steps // config.eval_steps if config.eval_steps else 0)
        count = times * config.eval_prompts
        found.append(clock.sampling("evaluate", costs, Rows(count, *lengths), config))
    return steps, found


@dataclass(frozen=True)
class Clock:
    """How long work takes on some devices."""

    device: Device
    setup: Setup
    sampled_bytes: tuple[float, float]

    def passes(self, name: str, tokens: float, flops: float) -> Work:
        share = LEARNING_SHARE if self.setup.device == "cuda" else CPU_SHARE
        rate = self.device.flops * share * self.setup.ranks
        return Work(name, tokens, flops, flops / rate)

    def sampling(self, name: str, costs: Costs, rows: Rows, config: Any) -> Work:
        """Return the work of sampling the responses of `rows`.

        On a GPU prompts are a pass like others, and then each step reads the weights once, and keys and
        values of all that went before; on a CPU products take the time.
        """
        flops = costs.forward(rows, rows.labels)
        if self.setup.device == "cpu":
            rate = self.device.flops * CPU_SAMPLING_SHARE * self.setup.ranks
            return Work(name, rows.tokens, flops, flops / rate)
        weights, kept = self.sampled_bytes
        own = -(-rows.count // self.setup.ranks)
        slots = min(config.generation_batch_size, own)
        steps = own * rows.response / max(slots, 1)
        read = weights + slots * (rows.prompt + rows.response / 2) * kept
        reading = steps * read / (SAMPLING_SHARE * self.device.bandwidth)
        prompts = self.passes(name, 0, costs.forward(Rows(rows.count, rows.prompt, 0), 0))
        return Work(name, rows.tokens, flops, prompts.seconds + reading)


def steps_of(config: Any, setup: Setup, rows: int | None) -> int:
    """Return the optimizer steps of SFT, a reward model or DPO; 1 where neither max_steps nor the
    data's rows are known.
    """
    if config.max_steps > 0:
        return config.max_steps
    if rows is None:
        return 1
    held_out = config.validation_fraction + config.test_fraction
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * setup.ranks
    # as the trainer counts: the last batch of an epoch is a step too
    steps_of_epoch = math.ceil(round(rows * (1 - held_out)) / batch)
    return max(1, math.ceil(steps_of_epoch * config.num_train_epochs))


def offline_work(
    program: str,
    config: Any,
    costs: Costs,
    clock: Clock,
    lengths: tuple[int, int],
    steps: int,
    rows: int | None,
) -> list[Work]:
    """Return the work of SFT, a reward model or DPO."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch *= clock.setup.ranks
    count = batch if program == "sft" else 2 * batch
    step = Rows(count, *lengths, shares_prompts(program, config))
    heads = 0 if program == "reward" else step.labels
    found = [clock.passes("learn", steps * step.tokens, steps * costs.learning(step, heads))]
    if program == "dpo":
        # once for each pair, however often it is learnt from
        passes = min(steps, -(-rows // batch)) if rows else steps
        flops = passes * costs.forward(step, heads)
        found.append(clock.passes("reference", passes * step.tokens, flops))
    return found


def ppo_work(
    config: Any, costs: Costs, clock: Clock, lengths: tuple[int, int], steps: int
) -> list[Work]:
    """Return the work of PPO: each rollout is sampled, scored, measured and learnt from."""
    rows = Rows(config.rollout_batch_size, *lengths)
    everything = Rows(config.rollout_batch_size * steps, *lengths)
    trunk_only, whole = costs.forward(rows, 0), costs.forward(rows, rows.labels)
    has_critic = critic_trunk(config) == "own"
    scored = steps * reward_models(config) * trunk_only
    # the policy is measured again where the engine's numbers do not stand for the learner's: bfloat16
    own_pass = clock.setup.device == "cuda" or config.old_logprobs == "learner"
    measured = steps * ((1 + own_pass) * whole + has_critic * trunk_only)
    learnt = costs.learning(rows, rows.labels) + has_critic * costs.learning(rows, 0)
    epochs = steps * config.num_ppo_epochs
    return [
        clock.sampling("sample", costs, everything, config),
        clock.passes("score", steps * reward_models(config) * rows.tokens, scored),
        clock.passes("measure", steps * (1 + own_pass + has_critic) * rows.tokens, measured),
        clock.passes("learn", epochs * (1 + has_critic) * rows.tokens, epochs * learnt),
    ]
