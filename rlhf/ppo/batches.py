"""Which prompts a step samples from, and which rows of its rollout learn together.

All of it is a function of seed, step and place alone: the same on every rank and after a resume.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.model.packing import group_rows, tokens_per_pass
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.rollout import Rollout, padded_batch
from rlhf.ranks.distributed import DistributedContext


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


@dataclass
class Batches:
    """The batches of a run."""

    config: PPOConfig
    data: TrainingData
    world: DistributedContext
    # the size of the vocabulary where a pass keeps its logits (`Roles.kept_vocabulary`), else 0
    vocabulary: int = 0

    def prompts_of(self, step: int) -> list[dict[str, Any]]:
        """Return the prompts of one rollout: consecutive ones of endless shuffled passes over the
        data.
        """
        count = self.config.rollout_batch_size // self.config.samples_per_prompt
        places = range(step * count, (step + 1) * count)
        return cycle_shuffled(self.data.prompts, places, self.config.seed)

    def mini_batches(self, count: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each update in the run, and the rows of the rollout that it learns
        from.
        """
        config = self.config
        for epoch in range(config.num_ppo_epochs):
            order = permutation(count, config.seed, step, epoch)
            before = (step * config.num_ppo_epochs + epoch) * config.num_mini_batches
            yield from enumerate(order.tensor_split(config.num_mini_batches), before)

    def micro_batches(self, rollout: Rollout, rows: Tensor, number: int) -> list[MicroBatch]:
        """Return this rank's share of the rows of update `number`, in micro-batches; all ranks get
        as many.
        """
        rows = rows.to(rollout.mask.device)
        count = rollout.mask[rows].sum()
        pretraining = self.pretraining_batch(number, len(rows))
        pretraining_count = pretraining["mask"].sum() if pretraining else None

        parts = []
        lengths = rollout.batch["attention"][rows].sum(-1)
        if pretraining:
            # a row learns together with its pretraining row
            lengths = torch.maximum(lengths, pretraining["attention"].sum(-1))
        for group in self.own_groups(lengths.tolist()):
            is_idle = not group
            # positions within `rows`, and within the rollout
            chosen = torch.tensor(group or [0], device=rows.device)
            in_rollout = rows[chosen]
            batch = {name: column[in_rollout] for name, column in rollout.batch.items()}
            if is_idle:
                batch["mask"] = torch.zeros_like(batch["mask"])
            own_pretraining = {name: column[chosen] for name, column in pretraining.items()}
            part = MicroBatch(
                in_rollout, batch, batch["mask"], count, own_pretraining, pretraining_count, is_idle
            )
            parts.append(part)
        return parts

    def own_groups(self, lengths: list[int]) -> list[list[int]]:
        """Return which of some rows, by their lengths, this rank takes together, one group a pass.

        There are as many groups as on the rank with most; those that are missing are empty.
        """
        world = self.world
        # of all ranks, since each has to know how many passes the others make
        by_rank = []
        for rank in range(world.size):
            own = range(len(lengths) * rank // world.size, len(lengths) * (rank + 1) // world.size)
            groups = group_rows([lengths[i] for i in own], *self.limits())
            by_rank.append([[own[i] for i in group] for group in groups])
        most = max(1, *map(len, by_rank))
        idle: list[list[int]] = [[]] * (most - len(by_rank[world.rank]))
        return by_rank[world.rank] + idle

    def limits(self) -> tuple[int, int]:
        """Return how many tokens, and how many rows, go through one pass at most."""
        own = tokens_per_pass(self.world.device, self.vocabulary)
        return self.config.micro_batch_tokens or own, self.config.per_device_train_batch_size

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
