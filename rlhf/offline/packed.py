"""The forward passes of SFT, reward model and DPO without padding: the prompt that a pair shares is
computed once, and the output head is applied where there is a label.

Losses, batches and metrics stay TRL's: its trainers call the same model with the same arguments and
get the same numbers up to rounding.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import FusedCausalLMOutput

from rlhf.errors import UserError
from rlhf.model.logprobs import frozen_head_logprobs, head_is_frozen, scatter_to_mask
from rlhf.model.packing import (
    PairRows,
    decoder_and_head,
    head_is_plain,
    is_right_padded,
    packed_inputs,
    packs,
)
from rlhf.runs.budget import fused_head_positions

# what a trainer passes where rows can be packed: no router logits
PACKED_ARGUMENTS = {"input_ids", "attention_mask", "labels", "use_cache"}
# and where TRL has packed them itself (`packing`, `padding_free`), in one row
BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# times as many positions as tokens, where rows of a pack are padded
MOST_POSITIONS = 4
TRL_PACKED_ARGUMENTS = {"input_ids", "position_ids", "labels", "use_cache"} | BOUNDS


def pack_forward(model: nn.Module, *, paired: bool = False, own_head: bool = True) -> None:
    """Let a model with TRL's fused head compute packed rows, where that is the same function.

    `paired`: its batches are chosen rows, then the rejected ones of the same prompts. `own_head`:
    what `scored` returns is all that is read. The passes of other models, and calls without
    `fused_lm_head`, stay as they are.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    trl_forward, own_head = causal.forward, own_head and head_is_plain(causal)

    @functools.wraps(trl_forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        # PEFT passes on all arguments by name
        given = {name for name, value in kwargs.items() if value is not None}
        is_packed = fused_lm_head and given == TRL_PACKED_ARGUMENTS
        if is_packed and pays(kwargs) and packs(causal, int(kwargs["max_length_q"])):
            # attention then sees each row alone, instead of a pack with all but its rows masked
            kwargs, given = taken_apart(kwargs), PACKED_ARGUMENTS
        if not fused_lm_head or args or given != PACKED_ARGUMENTS:
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        ids, attention = kwargs["input_ids"], kwargs["attention_mask"]
        labels = kwargs["labels"]
        if not packs(causal, ids.shape[1]) or not is_right_padded(attention):
            return trl_forward(fused_lm_head=True, **kwargs)
        if own_head and head_is_frozen(causal.get_output_embeddings()):
            return scored(causal, PairRows.of(ids, attention, paired=paired), labels[:, 1:])
        return spread_out(trl_forward, PairRows.of(ids, attention), labels)

    causal.forward = types.MethodType(forward, causal)


def pays(packed: dict[str, Any]) -> bool:
    """Return whether rows (B of at most L tokens) cost less padded than as one pack of N tokens.

    Attention computes B L^2 pairs instead of N^2, and keeps B L positions instead of N.
    """
    lengths = packed["cu_seq_lens_q"].diff()
    tokens, longest = int(lengths.sum()), int(lengths.max())
    positions = len(lengths) * longest
    return positions <= MOST_POSITIONS * tokens and positions * longest <= tokens**2


def taken_apart(packed: dict[str, Any]) -> dict[str, Any]:
    """Return right-padded rows (B, L) of what TRL has packed into one row (1, N)."""
    lengths = packed["cu_seq_lens_q"].diff().tolist()

    def rows(values: Tensor, padding: int) -> Tensor:
        parts = values[0].split(lengths)
        return pad_sequence(parts, batch_first=True, padding_value=padding)

    ids = packed["input_ids"]
    return {
        "input_ids": rows(ids, 0),
        "attention_mask": rows(torch.ones_like(ids), 0),
        "labels": rows(packed["labels"], -100),
        "use_cache": packed["use_cache"],
    }


def check_apart(model: nn.Module) -> None:
    """Raise UserError if rows that TRL has packed itself (`packing`, `padding_free`) read one another.

    It tells rows apart by positions that restart, which convolutions and states that run on,
    as in Mamba, do not see.
    """
    device, was_training = next(model.parameters()).device, model.training
    # any two rows that differ, the second one also alone
    first, second = torch.arange(3, 8, device=device), torch.arange(9, 3, -1, device=device)
    ids = torch.cat([first, second])[None]
    restarting = torch.arange(len(first), device=device), torch.arange(len(second), device=device)
    positions = torch.cat(restarting)[None]
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = model(input_ids=second[None], use_cache=False).logits[0]
    model.train(was_training)
    # in standard deviations of the logits; rounding alone stays far below
    gap = (packed[len(first) :] - alone).abs().max() / alone.std().clamp(min=1e-6)
    bound = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 0.3
    if gap > bound:
        raise UserError(
            f"trl: 'packing' and 'padding_free' mix the rows of a {model.config.model_type} model. "
            "Leave them out"
        )


def scored(causal: nn.Module, rows: PairRows, labels: Tensor) -> FusedCausalLMOutput:
    """Return the per-token fields of TRL's output (B, L - 1), 0 where a label (B, L - 1) is -100.

    The head is applied at labels alone. `mean_logits`, the mean over the vocabulary, is the product
    with the mean row of the head.
    """
    decoder, head = decoder_and_head(causal)
    hidden = decoder(**packed_inputs(rows)).last_hidden_state
    mask = labels != -100
    states = rows.at_places(hidden)[:, :-1][mask]
    logprobs, entropy, is_top1 = frozen_head_logprobs(states, head, labels[mask])
    with torch.no_grad():
        mean_logits = states.float() @ head.weight.float().mean(0)
        if head.bias is not None:
            mean_logits += head.bias.float().mean()
    output = FusedCausalLMOutput(
        log_probs=scatter_to_mask(logprobs, mask),
        entropy=scatter_to_mask(entropy, mask),
        mean_logits=scatter_to_mask(mean_logits, mask),
        is_top1=scatter_to_mask(is_top1, mask),
        label_mask=mask,
    )
    # for the budget, which has counted them above
    output.head_positions = 0
    return output


def spread_out(trl_forward: Any, rows: PairRows, labels: Tensor) -> FusedCausalLMOutput:
    """Return TRL's own output (B, L - 1) for labels (B, L), computed on packed rows."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    packed = following.flatten()[rows.places][None]
    output = trl_forward(**packed_inputs(rows), shift_labels=packed, fused_lm_head=True)
    output.head_positions = fused_head_positions(packed)
    places = rows.places
    for name, value in output.items():
        if isinstance(value, Tensor) and value.shape == packed.shape:
            padded = value.new_zeros(rows.batch * rows.length).index_copy(0, places, value[0])
            output[name] = padded.view(rows.batch, rows.length)[:, :-1]
    return output
