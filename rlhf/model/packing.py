"""Rows of tokens behind one another in one row, apart in attention alone: no pass reads padding, and
what the two answers of a pair share is computed once.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from rlhf.ranks.divided import readable
from rlhf.text import say_once

# elements of the logits that exist at a time
LOGITS_ON_CPU, LOGITS_ON_GPU = 2**23, 2**28
# tokens that go through the trunk together: what a core's cache holds of a small model, and what
# fills a GPU
TOKENS_ON_CPU, TOKENS_ON_GPU = 1024, 16_384
# times as many positions as tokens in one pass, where rows are padded
MOST_PADDED = 1.5


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the trunk that gives hidden states and the language-model head, below any PEFT
    wrapping.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model, causal.get_output_embeddings()


def hidden_width(model: nn.Module) -> int:
    """Return the width of the last hidden state, which heads read; OPT-350m's is not its config's
    hidden_size.
    """
    return decoder_and_head(model)[1].in_features


def head_is_plain(model: nn.Module) -> bool:
    """Return whether logits are just head(hidden); false where a model scales or caps them (Gemma,
    Cohere, Granite).
    """
    decoder, head = decoder_and_head(model)
    # small logits hardly show a cap
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        return False
    # any ids do: what is compared are two ways to compute the same logits
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).reshape(2, 4)
    with torch.no_grad(), readable(model):
        full = model(input_ids=ids, use_cache=False).logits
        plain = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return torch.allclose(full, plain, rtol=1e-4, atol=1e-4)


def tokens_per_pass(device: torch.device, vocabulary: int = 0) -> int:
    """Return how many tokens go through the trunk together unless an option says otherwise.

    vocabulary: its size where the logits of a whole pass are kept; 0 where a portion is at a time.
    """
    tokens = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
    return min(tokens, max(1, LOGITS_ON_GPU // vocabulary)) if vocabulary else tokens


def group_rows(lengths: Sequence[int], tokens: int, rows: int) -> list[list[int]]:
    """Return groups of rows of similar length: at most `tokens` tokens in each, or one row, and at
    most `rows` rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # as many groups as are needed, of about as many tokens each
    aim = sum(lengths) / max(1, math.ceil(sum(lengths) / tokens))
    groups: list[list[int]] = []
    filled = 0
    for row in order:
        is_full = filled + lengths[row] > tokens or filled >= aim
        if groups and not is_full:
            # attention pads rows to the longest, which comes first
            padded = (len(groups[-1]) + 1) * lengths[groups[-1][0]]
            is_full = padded > MOST_PADDED * tokens or len(groups[-1]) == rows
        if not groups or is_full:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += lengths[row]
    return groups


@dataclass
class PackedRows:
    """B right-padded rows of at most L tokens without their padding: N tokens in one row."""

    # (1, N) tokens, and their positions within their own rows
    ids: Tensor
    position_ids: Tensor
    # (N,) each token's place in the padded rows (B * L); None where no row has padding
    places: Tensor | None
    batch: int
    length: int

    @classmethod
    def of(cls, ids: Tensor, attention: Tensor) -> Self:
        """Pack ids (B, L) where attention (B, L), right-padded, is 1."""
        lengths = attention.sum(-1)
        batch, length = len(ids), int(lengths.max())
        positions = torch.arange(length, device=ids.device).expand(batch, length)
        kept = (positions < lengths[:, None]).flatten().nonzero().squeeze(-1)
        return cls(
            ids[:, :length].flatten()[kept][None],
            positions.flatten()[kept][None],
            None if len(kept) == batch * length else kept,
            batch,
            length,
        )

    def pad(self, states: Tensor) -> Tensor:
        """Return (B, H, L, D) from (1, H, N, D), zeros at padding."""
        rows = states[0].transpose(0, 1)
        if self.places is not None:
            padded = rows.new_zeros(self.batch * self.length, *rows.shape[1:])
            rows = padded.index_copy(0, self.places, rows)
        return rows.reshape(self.batch, self.length, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, states: Tensor) -> Tensor:
        """Return (1, N, H, D) from (B, L, H, D)."""
        rows = states.reshape(self.batch * self.length, *states.shape[2:])
        return (rows if self.places is None else rows[self.places])[None]


@dataclass
class PairRows(PackedRows):
    """Packed rows of which some begin with tokens of another row, which are there and computed once: the
    prompt that two answers share.
    """

    # (batch * length,) which of the N tokens stands at each place of the padded rows
    sources: Tensor

    @classmethod
    def of(cls, ids: Tensor, attention: Tensor, *, paired: bool = False) -> Self:
        """Pack right-padded ids (B, L) where attention (B, L) is 1.

        `paired`: rows i and i + B/2 are two answers to one prompt, and their longest common
        beginning is kept once. A causal model computes the same states for it in both.
        """
        batch, length = ids.shape
        own = attention.bool()
        columns = torch.arange(length, device=ids.device).expand(batch, length)
        is_shared = torch.zeros_like(own)
        if paired:
            both = own.view(2, batch // 2, length).all(0)
            first, second = ids.view(2, batch // 2, length)
            is_shared[batch // 2 :] = (both & (first == second)).cumprod(-1).bool()
        own = own & ~is_shared

        numbers = (own.flatten().cumsum(0) - 1).view(batch, length)
        # at padding any token will do: a causal mask keeps the others from it
        sources = torch.where(is_shared, numbers.roll(batch // 2, 0), numbers)
        places = own.flatten().nonzero().squeeze(-1)
        return cls(
            ids=ids.flatten()[places][None],
            position_ids=columns.flatten()[places][None],
            places=places,
            batch=batch,
            length=length,
            sources=sources.flatten(),
        )

    def pad(self, states: Tensor) -> Tensor:
        """Return (B, H, L, D) from (1, H, N, D)."""
        rows = states[0].transpose(0, 1)[self.sources]
        return rows.reshape(self.batch, self.length, *rows.shape[1:]).transpose(1, 2)

    def at_places(self, states: Tensor) -> Tensor:
        """Return (B, L, D) from (1, N, D): the state of each place, any state at padding."""
        return states[0, self.sources].view(self.batch, self.length, -1)


def is_right_padded(attention: Tensor) -> bool:
    """Return whether no row of attention (B, L) has padding before a token."""
    kept = attention.bool()
    return bool((kept[:, 1:] <= kept[:, :-1]).all())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' `sdpa` attention, of packed rows each row for itself.

    Rows are padded on the right, where a causal mask alone keeps every token from padding.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (packed_rows.pad(states) for states in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
    return packed_rows.unpad(output), None


def packed_inputs(rows: PackedRows) -> dict[str, Any]:
    """Return the arguments of a forward pass on packed rows."""
    return {
        "input_ids": rows.ids,
        "position_ids": rows.position_ids,
        # one of four dimensions is left as it is, so that no mask is made
        "attention_mask": rows.ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "packed_rows": rows,
        "use_cache": False,
    }


@torch.no_grad()
def why_inexact(model: nn.Module, gap_of: Callable[[nn.Module], float]) -> str:
    """Return why another way to compute, whose results are off by `gap_of(model)` of their spread,
    does not stand for the plain one, or "".
    """
    was_training = model.training
    model.eval()
    try:
        gap = gap_of(model)
    except Exception as error:  # whatever a model's own code raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(was_training)
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    # Llama: 1e-6, and 0.05 in bfloat16
    if gap < (2e-5 if precise else 0.1):
        return ""
    return f"results are off by {gap:.1g} of their spread"


def smallest_window(model: nn.Module) -> int | None:
    """Return how many tokens a layer that attends to a window sees at least, or None without one."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    # GPT-Neo calls it window_size
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [getattr(config, name, None) for name in names]
    layers = DynamicCache(config=model.config).layers
    windows += [getattr(layer, "sliding_window", None) for layer in layers]
    return min((window for window in windows if isinstance(window, int)), default=None)


_PACKS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def packs(model: nn.Module, length: int) -> bool:
    """Return whether packed rows of up to `length` tokens are the same function as single ones."""
    if not try_packing(model):
        return False
    window = smallest_window(model)
    return window is None or length <= window


def try_packing(model: nn.Module) -> bool:
    """Return whether packed rows of any length that a window allows are the same function as single
    ones.

    Tried once for each model, by passes over a few tokens, which say what a model does with
    positions, with masks and with arguments that it passes on. Who counts passes, or must not make
    them later, calls this beforehand.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal not in _PACKS:
        _PACKS[causal] = _packing_is_exact(model)
    return _PACKS[causal]


def _packing_is_exact(model: nn.Module) -> bool:
    decoder, _ = decoder_and_head(model)
    config = decoder.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", attend)
    reason = why_inexact(model, _packing_gap)
    if reason:
        say_once(f"rows of {model.config.model_type} are padded, which is slower ({reason})")
    return not reason


@torch.no_grad()
def _packing_gap(model: nn.Module) -> float:
    """Return how far states of packed rows are from those of single rows, over their spread."""
    decoder, _ = decoder_and_head(model)
    lengths = (5, 9, 7)
    device = next(decoder.parameters()).device
    # a prime, to spread them over the vocabulary; an adapter may stand in place of the embeddings
    ids = torch.arange(1, 28, device=device).reshape(3, 9) * 7919
    ids = ids % decoder.config.get_text_config().vocab_size
    attention = torch.stack([torch.arange(9, device=device) < length for length in lengths]).long()
    packed = decoder(**packed_inputs(PackedRows.of(ids, attention))).last_hidden_state[0].float()
    single = [
        decoder(input_ids=row[None, :length], use_cache=False).last_hidden_state[0].float()
        for row, length in zip(ids, lengths, strict=True)
    ]
    expected = torch.cat(single)
    return float((packed - expected).abs().max() / expected.std().clamp(min=1e-6))
