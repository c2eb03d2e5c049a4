"""Log-probabilities of responses under DPO's frozen reference: computed before training, and kept from
one run to the next.

    folder/<reference>/<hash of the content>.rows

A row holds a log-probability and what computing it has cost, which every run pays that uses it
(`pay`). A reference is named by what decides its numbers (`reference_key`), a row by its token ids
(`row_keys`). A file holds rows and is never changed: it is written under another name, then renamed
to the hash of its bytes, so that ranks and runs may write at the same time without a lock, and a
file that was cut off or altered is noticed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback

from rlhf.files import cache_folder, write_atomic
from rlhf.model.adapters import adapter_parameters
from rlhf.model.quantized import QuantizedLinear
from rlhf.model.weights import base_weights
from rlhf.ranks.distributed import DistributedContext
from rlhf.ranks.divided import shape_of, whole
from rlhf.runs.budget import Budget, Cost
from rlhf.runs.run import Run

# TRL's name of the adapter that is the reference
REFERENCE = "ref"

# a row's digest, its log-probability in nats, and its cost
ROW = np.dtype([("key", "V16"), ("logprob", "<f8"), ("flops", "<f8"), ("seconds", "<f8")])

# log-probability, FLOPs, seconds
Row = tuple[float, float, float]


def reference_key(model: nn.Module, adapter: str | None, **settings: Any) -> str:
    """Return 32 hex digits that name a reference by all that decides its log-probabilities.

    These are the bytes of the base's weights and of the adapter's (None: the bare base), with their
    dtypes; the settings of both; the kind of attention; the versions of torch, transformers and
    the rows; and `settings`, of the caller. An adapter that changes nothing yet, such as a new one, is left out,
    so that its random half does not count. Of a model that ZeRO-3 divides, all ranks ask together.
    """
    config = model.config.to_dict() | {"attention": model.config._attn_implementation}
    weights, lora = {}, {}
    # the same names whether an adapter is on the base or not
    for name, weight in base_weights(model).items():
        weights[name.removeprefix("base_model.model.")] = weight
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights[f"{name} scales"] = module.scales()
    held = adapter_parameters(model, adapter) if adapter else {}
    if not _changes_nothing(held):
        weights |= {f"adapter {name}": weight for name, weight in held.items()}
        lora = model.peft_config[adapter].to_dict()
    # the places of files say nothing about what is in them
    for place in ("_name_or_path", "base_model_name_or_path"):
        config.pop(place, None)
        lora.pop(place, None)
    versions = [torch.__version__, transformers.__version__, ROW.names]

    digest = hashlib.sha256()
    digest.update(_text([config, lora, versions, settings]).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {shape_of(weight)}".encode())
        with whole([weight]):
            flat = weight.detach().to("cpu").contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _changes_nothing(adapter: dict[str, Tensor]) -> bool:
    """Return whether an adapter adds 0 to all outputs: plain LoRA whose second factors are 0."""
    for name, weight in adapter.items():
        # the first factor may be anything
        if ".lora_A." in name:
            continue
        # DoRA, trained tokens, or a second factor that has learnt
        if ".lora_B." not in name or weight.any():
            return False
    return True


def _text(value: Any) -> str:
    """Return settings as text that does not depend on the order of sets and dicts."""
    return json.dumps(value, sort_keys=True, default=lambda other: str(_sorted(other)))


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value


def row_keys(inputs: dict[str, Tensor], ld_alpha: float | None = None) -> list[bytes]:
    """Return 16 bytes for each row of a batch of TRL's preference collator, chosen rows first.

    They hold the row's ids, after truncation and without padding, and where its response begins.
    `ld_alpha` (LD-DPO, arXiv 2409.06411) weighs the tokens of a pair beyond its shorter response,
    whose length then counts too.
    """
    ids, attention = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu().bool()
    completion = inputs["completion_mask"].cpu().bool()
    lengths = completion.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)

    keys = []
    for row, (row_ids, kept) in enumerate(zip(ids, attention, strict=True)):
        tokens = row_ids[kept].to(torch.int64)
        head = [len(tokens) - int(lengths[row])]
        if ld_alpha is not None:
            head += [ld_alpha, int(shared[row])]
        digest = hashlib.blake2b(_text(head).encode(), digest_size=16)
        digest.update(tokens.numpy().data)
        keys.append(digest.digest())
    return keys


class ReferenceCache:
    """The log-probabilities of one reference: {row: (nats, FLOPs, seconds)}, the same on all ranks.

    The main rank alone reads and writes the folder, which other machines need not share. `log` is
    told what cannot be read or written; nothing of that stops a run. `budget` pays for the rows.
    """

    def __init__(
        self,
        reference: str,
        world: DistributedContext,
        log: Callable[[str], None],
        budget: Budget | None = None,
    ) -> None:
        self.folder = cache_folder() / "reference-logprobs" / reference
        self.world = world
        self.log = log
        self.budget = budget or Budget()
        # what this run has been charged for
        self.paid: set[bytes] = set()
        self.fresh: dict[bytes, Row] = {}
        known = list(self._read().items()) if world.is_main else []
        self.known: dict[bytes, Row] = dict(world.gather(known))

    def __contains__(self, key: bytes) -> bool:
        return key in self.known

    def get(self, keys: Iterable[bytes]) -> list[float]:
        """Return the log-probabilities of rows that are known."""
        return [self.known[key][0] for key in keys]

    def add(self, keys: Sequence[bytes], logprobs: Sequence[float], cost: Cost) -> None:
        """Keep what this rank has computed at a cost that the rows share; other ranks know it after
        `save`.
        """
        # the other ranks have computed as many meanwhile
        share = (cost.flops / len(keys), cost.seconds / len(keys) / self.world.size)
        pairs = zip(keys, logprobs, strict=True)
        rows = {key: (logprob, *share) for key, logprob in pairs}
        self.fresh |= rows
        self.known |= rows

    def pay(self, keys: Sequence[bytes]) -> None:
        """Charge this rank's part of a batch as if the cache had been empty: in full, unless the
        run has paid for all of its rows before.
        """
        if self.paid.issuperset(keys):
            return
        self.paid.update(keys)
        self.charge(keys)

    def charge(self, keys: Sequence[bytes]) -> None:
        """Charge the run for this rank's rows, as much as it took to compute them."""
        rows = [self.known[key] for key in keys]
        flops = sum(row[1] for row in rows)
        seconds = sum(row[2] for row in rows)
        self.budget.charge_reference(flops, seconds * self.world.size)

    def save(self) -> None:
        """Write what all ranks have added since the last time; call on all ranks."""
        fresh = dict(self.world.gather(list(self.fresh.items())))
        self.fresh = {}
        self.known |= fresh
        if fresh and self.world.is_main:
            try:
                self._write(fresh)
            except OSError as error:
                self.log(
                    f"the reference log-probabilities cannot be kept for other runs: {error}. "
                    "Set RLHF_CACHE to a folder that can be written"
                )

    def _write(self, rows: dict[bytes, Row]) -> None:
        content = np.array([(key, *rows[key]) for key in sorted(rows)], dtype=ROW).tobytes()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{_hash(content)}.rows", content)

    def _read(self) -> dict[bytes, Row]:
        rows: dict[bytes, Row] = {}
        for file in sorted(self.folder.glob("*.rows")):
            try:
                content = file.read_bytes()
                if _hash(content) == file.stem:
                    for key, *row in np.frombuffer(content, dtype=ROW).tolist():
                        rows[key] = tuple(row)
                    continue
                file.unlink()
                self.log(f"{file}: removed, since it is damaged; its rows are computed again")
            except OSError as error:
                self.log(f"{file}: cannot be read ({error}); its rows are computed again")
        return rows


def open_reference_cache(
    run: Run, args: Any, reference: nn.Module, budget: Budget
) -> ReferenceCache | None:
    """Return the cache of this run's reference: the adapter `REFERENCE` of a PeftModel, else the
    whole model.

    None where TRL's options make the reference move or random, or compute it in TRL's own way.
    """
    if args.sync_ref_model or args.precompute_ref_log_probs or not args.disable_dropout:
        return None
    adapter = REFERENCE if hasattr(reference, "peft_config") else None
    cast = "bf16" if args.bf16 else "fp16" * bool(args.fp16)
    precision = f"{cast} {torch.get_float32_matmul_precision()}"
    kind = {"autocast": precision, "device": run.world.device.type}
    return ReferenceCache(reference_key(reference, adapter, **kind), run.world, run.log, budget)


class ReferencePass(TrainerCallback):
    """Computes, when the training of a DPO trainer begins, what its cache does not have.

    Held-out pairs are always computed, training pairs where the steps make a whole pass over them.
    Where they do not, the trainer computes the pairs that it meets, and the cache keeps them at the
    end. Pairs whose responses both have occurred in earlier ones need no pass of their own. The run
    pays for the others, in the cache or not.
    """

    def __init__(self, trainer: Any, log: Callable[[str], None]):
        self.trainer = trainer
        self.cache = trainer.reference_cache
        self.log = log

    @cached_property
    def pairs(self) -> tuple[Dataset, Dataset]:
        """The held-out pairs and the training pairs that need a pass."""
        trainer, seen = self.trainer, set()
        training = trainer.train_dataset
        held_out = trainer.eval_dataset or training.select([])
        return (
            held_out.select(with_new_response(held_out, seen, trainer.ld_alpha)),
            training.select(with_new_response(training, seen, trainer.ld_alpha)),
        )

    @property
    def pairs_per_step(self) -> int:
        args = self.trainer.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def sizes(self) -> dict[str, int]:
        """Return what decides how many pairs a run of so many steps pays for; empty without a
        cache.

        `held_out` and `training` are the pairs that need a pass, the latter at once in a run of at
        least `steps`; in a shorter one each step needs `per_step`.
        """
        if self.cache is None:
            return {}
        held_out, training = self.pairs
        steps = math.ceil(len(self.trainer.train_dataset) / self.pairs_per_step)
        sizes = {"held_out": len(held_out), "training": len(training)}
        return sizes | {"per_step": self.pairs_per_step, "steps": steps}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.cache is None:
            return
        held_out, training = self.pairs
        is_whole_pass = state.max_steps >= self.sizes()["steps"]
        pairs = chain(held_out, training) if is_whole_pass else held_out

        missing, lengths, keys_of = [], [], []
        for pair in pairs:
            # the collator decides what is left of a pair
            inputs = self.trainer.data_collator([pair])
            keys = row_keys(inputs, self.trainer.ld_alpha)
            keys_of.append(keys)
            if not all(key in self.cache for key in keys):
                missing.append(pair)
                lengths.append(inputs["input_ids"].shape[1])
        keys = set(chain.from_iterable(keys_of))
        found = sum(key in self.cache for key in keys)
        self.log(
            f"{found} of {len(keys)} reference log-probabilities from the cache {self.cache.folder}"
        )
        self.cache.paid |= keys
        if missing:
            most = args.precompute_ref_batch_size or args.train_batch_size
            batches = batches_by_length(lengths, most * max(lengths))
            self._compute([[missing[index] for index in batch] for batch in batches])
            self.cache.save()
        # what a resumed run has paid is in its counters
        if not state.global_step:
            world = self.cache.world
            for keys in keys_of[world.rank :: world.size]:
                self.cache.charge(keys)

    def _compute(self, batches: list[list[dict[str, Any]]]) -> None:
        """Compute batches of pairs, every rank its share of them."""
        world = self.cache.world
        # under ZeRO-3 ranks make their passes together, so that some may repeat a batch
        own = range(world.rank, len(batches) + -len(batches) % world.size, world.size)
        for index in tqdm(own, "reference", disable=None if world.is_main else True):
            inputs = self.trainer.data_collator(batches[index % len(batches)])
            self.trainer.reference_logprobs(self.trainer._prepare_inputs(inputs))

    def on_train_end(self, args, state, control, **kwargs):
        if self.cache is not None:
            self.cache.save()


def with_new_response(
    pairs: Iterable[dict[str, Any]], seen: set[int], ld_alpha: float | None = None
) -> list[int]:
    """Return the indices of the pairs of ids with a response that is not in `seen`, and add theirs
    to it.

    With `ld_alpha` a response depends on the other one's length (LD-DPO, arXiv 2409.06411).
    """
    found = []
    for index, pair in enumerate(pairs):
        prompt, shared = tuple(pair["prompt_ids"]), None
        if ld_alpha is not None:
            shared = min(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        sides = (pair["chosen_ids"], pair["rejected_ids"])
        responses = {hash((prompt, tuple(ids), shared)) for ids in sides}
        if not responses <= seen:
            found.append(index)
            seen |= responses
    return found


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


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
