"""DPO's reference pass: the log-probabilities of all pairs under the frozen reference, computed
before training for the rows that the cache does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from rlhf.offline.reference_cache import ReferenceCache, reference_key, row_keys
from rlhf.runs.budget import Budget
from rlhf.runs.run import Run


def open_references(run: Run, args: Any, reference: nn.Module) -> ReferenceCache | None:
    """Return the cache of this run's reference: the adapter "ref" of a PeftModel, else the whole
    model.

    None where TRL's options make the reference move or random, or compute it in TRL's own way.
    """
    if args.sync_ref_model or args.precompute_ref_log_probs or not args.disable_dropout:
        return None
    adapter = "ref" if hasattr(reference, "peft_config") else None
    cast = "bf16" if args.bf16 else "fp16" * bool(args.fp16)
    precision = f"{cast} {torch.get_float32_matmul_precision()}"
    kind = {"autocast": precision, "device": run.world.device.type}
    return ReferenceCache(reference_key(reference, adapter, **kind), run.world, run.log)


class ReferencePass(TrainerCallback):
    """Fills the cache of a DPO trainer when training begins.

    Held-out pairs are always computed, training pairs where the steps make a whole pass over them.
    Where they do not, the trainer computes the pairs that it meets, and the cache keeps them at the
    end.
    """

    def __init__(self, trainer: Any, budget: Budget, log: Callable[[str], None]):
        self.trainer = trainer
        self.references = trainer.references
        self.budget = budget
        self.log = log

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if self.references is None:
            return
        pairs = [] if trainer.eval_dataset is None else list(trainer.eval_dataset)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if state.max_steps * step >= len(trainer.train_dataset):
            pairs += trainer.train_dataset

        missing, lengths, keys = [], [], set()
        for pair in pairs:
            # the collator decides what is left of a pair
            inputs = trainer.data_collator([pair])
            new = set(row_keys(inputs, trainer.ld_alpha)) - keys
            keys |= new
            if not all(key in self.references for key in new):
                missing.append(pair)
                lengths.append(inputs["input_ids"].shape[1])
        found = sum(key in self.references for key in keys)
        self.log(
            f"{found} of {len(keys)} reference log-probabilities from the cache "
            f"{self.references.folder}"
        )
        if missing:
            most = args.precompute_ref_batch_size or args.train_batch_size
            batches = batches_by_length(lengths, most * max(lengths))
            with self.budget.counting():
                self._compute([[missing[index] for index in batch] for batch in batches])
            self.references.save()

    def _compute(self, batches: list[list[dict[str, Any]]]) -> None:
        """Compute batches of pairs, every rank its share of them."""
        world = self.references.world
        # under ZeRO-3 ranks make their passes together, so that some may repeat a batch
        own = range(world.rank, len(batches) + -len(batches) % world.size, world.size)
        for index in tqdm(own, "reference", disable=None if world.is_main else True):
            inputs = self.trainer.data_collator(batches[index % len(batches)])
            self.trainer.reference_logprobs(self.trainer._prepare_inputs(inputs))

    def on_train_end(self, args, state, control, **kwargs):
        if self.references is not None:
            self.references.save()


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group the indices of rows, longest first, so that a batch padded to its longest row has at
    most max_tokens.

    A row that is longer than max_tokens is a batch of its own. Equal lengths keep their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # the first row of a batch is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
