"""Log-probabilities of responses under a causal model, without padding and without logits for the
prompt.

Rows go through the trunk packed: behind one another in one row of tokens, and apart in attention
alone. Models for which that is not the same function get padded rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.model.packing import (
    LOGITS_ON_CPU,
    LOGITS_ON_GPU,
    PackedRows,
    decoder_and_head,
    packed_inputs,
    packs,
)
from rlhf.ranks.divided import is_divided
from rlhf.tensors import selected_logprobs


def completion_batch(
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad_id: int,
    device="cpu",
):
    """Build right-padded completions for one forward pass.

    Returns input_ids (B, L), attention_mask (B, L), positions (B, T): the column of input_ids whose
    next token is response token t, response ids (B, T) and their mask (B, T).
    """
    length = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    # at least one column, so that a batch of empty responses has a shape
    tokens = max(1, max(len(r) for r in response_ids))
    ids = torch.full((len(prompt_ids), length), pad_id, dtype=torch.long)
    attention = torch.zeros((len(prompt_ids), length), dtype=torch.long)
    positions = torch.zeros((len(prompt_ids), tokens), dtype=torch.long)
    responses = torch.zeros((len(prompt_ids), tokens), dtype=torch.long)
    mask = torch.zeros((len(prompt_ids), tokens), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        whole = len(prompt) + len(response)
        ids[row, :whole] = torch.tensor(prompt + response)
        attention[row, :whole] = 1
        # the logits at a column predict the next one
        positions[row, : len(response)] = torch.arange(len(prompt) - 1, whole - 1)
        responses[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return tuple(t.to(device) for t in (ids, attention, positions, responses, mask))


def response_places(attention: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Return a mask (B, L) of the states before response tokens, from `completion_batch`'s columns."""
    places = torch.zeros_like(attention, dtype=torch.bool)
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    places[rows[mask], positions[mask]] = True
    return places


def trim(ids: Tensor, attention: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns (B, L) up to the longest row's end."""
    length = int(attention.sum(-1).max())
    return ids[:, :length], attention[:, :length], places[:, :length]


def response_states(model: nn.Module, ids: Tensor, attention: Tensor, places: Tensor) -> Tensor:
    """Return the trunk's last hidden states (n, H) at `places`, a mask (B, L) in row order."""
    decoder, _ = decoder_and_head(model)
    ids, attention, places = trim(ids, attention, places)
    if packs(model, ids.shape[1]):
        hidden = decoder(**packed_inputs(PackedRows.of(ids, attention))).last_hidden_state[0]
        return hidden[places[attention.bool()]]
    hidden = decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return hidden[places]


def response_logprobs(
    model: nn.Module,
    ids: Tensor,
    attention: Tensor,
    positions: Tensor,
    responses: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    plain_head: bool = True,
    entropy_learns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log p(response token t | everything before it) and the entropy there, both (B, T), in
    nats, 0 outside the mask.

    Arguments are as from `completion_batch`. The head is applied to the response's tokens alone,
    a few at a time; `plain_head=False` takes the model's own logits for those that transform them.
    Gradients flow through the entropy only if `entropy_learns`.
    """
    places = response_places(attention, positions, mask)
    chosen = responses[mask]
    if plain_head:
        states = response_states(model, ids, attention, places)
        head = decoder_and_head(model)[1]
        logprobs, entropy = token_logprobs(states, head, chosen, temperature, entropy_learns)
    else:
        logits = _own_logits(model, ids, attention, places)
        logprobs, entropy = selected_logprobs(logits, chosen, temperature)
    return scatter_to_mask(logprobs, mask), scatter_to_mask(entropy, mask)


def scatter_to_mask(numbers: Tensor, mask: Tensor) -> Tensor:
    """Return (B, T) with `numbers` (n,) where the mask is true, in row order, and 0 elsewhere."""
    zeros = torch.zeros(mask.shape, dtype=numbers.dtype, device=mask.device)
    return zeros.masked_scatter(mask, numbers)


def _own_logits(model: nn.Module, ids: Tensor, attention: Tensor, places: Tensor) -> Tensor:
    """Return the model's logits (n, V) at `places`."""
    ids, attention, places = trim(ids, attention, places)
    if packs(model, ids.shape[1]):
        kept = places[attention.bool()].nonzero().squeeze(-1)
        rows = PackedRows.of(ids, attention)
        return model(**packed_inputs(rows), logits_to_keep=kept).logits[0]
    return model(input_ids=ids, attention_mask=attention, use_cache=False).logits[places]


def watch_portions(head: nn.Module, watcher: Callable[[int, bool], None]) -> None:
    """Call `watcher(tokens, learns)` where a head's weight is read without its forward hooks."""
    # on the head itself, so that both are freed together
    vars(head).setdefault("portion_watchers", []).append(watcher)


def token_logprobs(
    states: Tensor,
    head: nn.Module,
    ids: Tensor,
    temperature: float = 1.0,
    entropy_learns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(head(states) / temperature)[ids] and that distribution's entropy, (n,).

    states (n, H), ids (n,). A frozen linear head makes its logits in portions and keeps none.
    """
    if not head_is_frozen(head) or entropy_learns:
        return selected_logprobs(head(states), ids, temperature)
    return frozen_head_logprobs(states, head, ids, temperature)[:2]


def head_is_frozen(head: nn.Module) -> bool:
    """Return whether a head is a linear layer whose weight does not learn now and is whole here."""
    # first of all: a head whose rows are trained would make its weight, from parts that ZeRO-3 keeps
    if type(head) is not nn.Linear:
        return False
    # ZeRO-3 brings weights together when their own module is called, which is bypassed here
    learns = head.weight.requires_grad and torch.is_grad_enabled()
    return not learns and not is_divided(head.weight)


def frozen_head_logprobs(
    states: Tensor, head: nn.Linear, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropies and whether each id is the likeliest, all (n,)."""
    for watcher in vars(head).get("portion_watchers", ()):
        watcher(len(states), states.requires_grad and torch.is_grad_enabled())
    return HeadLogprobs.apply(states, head.weight, head.bias, ids, temperature)


class HeadLogprobs(Function):
    """Log-probabilities and entropies of a frozen linear head, with the gradient for its input, and
    which tokens are the likeliest.

    With l = (W h + b) / T, p = softmax(l) and q = sum_v p_v W_v, for one token y:

        log p_y = l_y - logsumexp(l),   d log p_y / d h = (W_y - q) / T,
        entropy = logsumexp(l) - sum_v p_v l_v

    The gradient is made in the forward pass, where p is at hand, so that logits are made once and
    only for a portion of the tokens at a time. None flows through the entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        learns = ctx.needs_input_grad[0]
        limit = LOGITS_ON_GPU if states.is_cuda else LOGITS_ON_CPU
        portion = max(1, limit // weight.shape[0])
        logprobs = states.new_empty(len(states), dtype=exact)
        entropy = torch.empty_like(logprobs)
        is_top = torch.empty_like(ids, dtype=torch.bool)
        slope = torch.empty_like(states) if learns else None
        for start in range(0, len(states), portion):
            part = slice(start, start + portion)
            logits = nn.functional.linear(states[part], weight, bias).to(exact)
            if temperature != 1.0:
                logits.div_(temperature)
            chosen = logits.gather(-1, ids[part, None]).squeeze(-1)
            largest = logits.amax(-1, keepdim=True)
            is_top[part] = chosen == largest.squeeze(-1)
            p = (logits - largest).exp_()
            total = p.sum(-1)
            normaliser = total.log() + largest.squeeze(-1)
            logprobs[part] = chosen - normaliser
            entropy[part] = normaliser - logits.mul_(p).sum(-1) / total
            if slope is not None:
                # p - 1 before rounding to the weights' dtype, in which W_y - q would cancel for a
                # token of high probability
                p.scatter_add_(-1, ids[part, None], -total[:, None])
                p.div_(total[:, None])
                slope[part] = (p.to(weight.dtype) @ weight) / -temperature
            # or the next portion's would be made beside them
            del logits, p
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, is_top)
        return logprobs, entropy, is_top

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * of_logprobs[:, None]).to(slope.dtype), None, None, None, None
