"""The passes of the programs on a model of fake tensors: the code that a run executes, without
weights and without numbers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlhf.engines import sampling
from rlhf.engines.batched import CHUNK
from rlhf.engines.slots import Slots
from rlhf.model import logprobs, packing
from rlhf.plan.ledger import Ledger, Peak, Reduction, peak_of, size_of


@dataclass(frozen=True)
class Rows:
    """Rows of one pass, all of the greatest length; paired ones share their prompts two and two."""

    count: int
    prompt: int
    response: int
    paired: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Return how many tokens go through the trunk."""
        shared = self.count // 2 * self.prompt if self.paired else 0
        return self.count * self.length - shared

    @property
    def pairs(self) -> int:
        """Return the pairs of query and key that attention computes: each row for itself."""
        return self.count * self.length**2

    @property
    def labels(self) -> int:
        return self.count * self.response

    def packed(self, *, gathered: bool) -> packing.PackedRows:
        """Return the rows as a pass reads them; `gathered`: by TRL's trainers, which look each place
        of the padded rows up.
        """
        ids = torch.zeros(1, self.tokens, dtype=torch.long)
        if not gathered:
            return packing.PackedRows(ids, ids, None, self.count, self.length)
        sources = torch.zeros(self.count * self.length, dtype=torch.long)
        return packing.PairRows(ids, ids, ids[0], self.count, self.length, sources)


def learn(model: nn.Module, rows: Rows, kind: str, ledger: Ledger) -> None:
    """Make the forward and the backward pass of a loss on `rows`; see `forward` for its kinds."""
    forward(model, rows, kind, ledger).sum().backward()


def forward(model: nn.Module, rows: Rows, kind: str, ledger: Ledger) -> Tensor:
    """Return something that stands for the loss of each token or row.

    kind: "sft", "dpo" or "reward" by TRL's trainers; "policy", "entropy" (a policy whose entropy
    learns too) or "value" in PPO and evaluations.
    """
    by_trl = kind in ("sft", "dpo", "reward")
    decoder, head = packing.decoder_and_head(model)
    packed = rows.packed(gathered=by_trl)
    is_packed = decoder.config.get_text_config()._attn_implementation == "sdpa"
    inputs = packing.packed_inputs(packed) if is_packed else _padded_inputs(rows, model)
    hidden = decoder(**inputs).last_hidden_state
    gathers = by_trl and is_packed
    if kind == "reward":
        return _scalar((packed.at_places(hidden) if gathers else hidden)[:, -1])

    ids = torch.zeros(rows.labels, dtype=torch.long)
    if by_trl and not (is_packed and logprobs.head_is_frozen(head)):
        with ledger.in_head():
            return _by_trls_head(head, hidden)
    states = packed.at_places(hidden)[:, :-1] if gathers else hidden
    # boolean masks of fake tensors have no known size
    states = states.reshape(-1, states.shape[-1])[ids]
    if kind == "value":
        return _scalar(states)
    with ledger.in_head():
        found = logprobs.token_logprobs(states, head, ids, 0.7, kind == "entropy")
        if by_trl:
            # TRL logs the mean logit, the product with the mean row of the head
            with torch.no_grad():
                states.float() @ head.weight.float().mean(0)
    return torch.stack(found) if kind == "entropy" else found[0]


def _padded_inputs(rows: Rows, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a pass on padded rows, for attention that cannot keep packed ones
    apart.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    shape = (rows.count, rows.length)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(rows.count, 1, rows.length, rows.length, dtype=dtype),
        "use_cache": False,
    }


def _scalar(states: Tensor) -> Tensor:
    """Return (n,) of states (n, H) by a head in float32."""
    return states.float() @ states.new_zeros(states.shape[-1], dtype=torch.float32)


def _by_trls_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """Return the log-probabilities of all positions by the head that TRL uses where it is trained."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    states = hidden.reshape(-1, hidden.shape[-1])
    ids = torch.zeros(len(states), dtype=torch.long)
    inputs = (states, head.weight, head.bias, ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE)
    return ChunkedLogProbFunction.apply(*inputs)[0]


@contextlib.contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """Let passes on fake tensors, which are on a CPU, take the sizes and branches of a run on `device`
    ("cpu" or "cuda") inside the context.
    """
    # as `try_packing` does in a run
    AttentionInterface.register("sdpa", packing.attend)
    if device == "cpu":
        # where drawing is not recorded it looks into about as many blocks again as it begins with,
        # a number that fake tensors do not have
        with patch.object(sampling, "RECORDED_BLOCKS", sampling.FIRST_BLOCKS):
            yield
        return
    from trl.kernels import chunked_logprob

    larger_portions = patch.object(logprobs, "LOGITS_ON_CPU", logprobs.LOGITS_ON_GPU)
    # on a GPU a kernel takes the place of these, which makes no tensor of its own
    no_tiles = patch.multiple(
        chunked_logprob,
        _forward_tile=lambda *args, **kwargs: None,
        _backward_tile=lambda *args, **kwargs: None,
    )
    with larger_portions, no_tiles:
        yield


def learning_peak(
    model: nn.Module, rows: Rows, kinds: list[str], reduction: Reduction, *, repeated: bool
) -> Peak:
    """Return the peak of the passes `kinds` after each other; see `peak_of` for the rest."""

    def passes(ledger: Ledger) -> None:
        for kind in kinds:
            learn(model, rows, kind, ledger)
            ledger.end_pass(reduction)

    return peak_of(model, passes, repeated=repeated, reduction=reduction)


@torch.no_grad()
def measuring_peak(model: nn.Module, rows: Rows, kind: str) -> Peak:
    """Return the peak of a pass without gradients."""
    return peak_of(model, lambda ledger: forward(model, rows, kind, ledger))


@torch.no_grad()
def sampling_peak(
    model: nn.Module, slots: int, prompt: int, response: int, device: str
) -> tuple[int, Peak]:
    """Return the bytes of keys and values of `slots` responses, and the peak of sampling them."""
    caches: list[int] = []

    def passes(ledger: Ledger) -> None:
        cache = Slots(model, slots, prompt + response)
        # prompts that differ: equal ones would share a pass
        prompts = [[row, *[0] * (prompt - 1)] for row in range(slots)]
        cache.admit(prompts, list(range(slots)), CHUNK[device])
        logits = cache.plain_pass(slots, prompt + response)
        keys = torch.zeros(slots, dtype=torch.long)
        with ledger.in_head():
            sampling.draw_recorded(logits, keys, keys, sampling.Sampling(response, 0.7))
        tensors: list[Tensor] = []
        for layer in cache.cache.layers:
            tensors += [layer.keys, layer.values]
        caches.append(size_of(tensors))

    peak = peak_of(model, passes)
    return caches[0], peak
