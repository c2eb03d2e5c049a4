"""Log-probabilities of responses under a causal model, without logits for the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf.tensors import selected_logprobs


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
    # any ids do: what is compared are two ways to compute the same logits
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).reshape(2, 4)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        plain = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return torch.allclose(full, plain, rtol=1e-4, atol=1e-4)


def completion_batch(
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    pad_id: int,
    device="cpu",
    width=None,
):
    """Build right-padded completions for one forward pass.

    Returns input_ids (B, L), attention_mask (B, L), positions (B, T): the column of input_ids whose
    next token is response token t, response ids (B, T) and their mask (B, T). `width` = (L, T)
    fixes the shape.
    """
    length = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    # at least one column, so that a batch of empty responses has a shape
    tokens = max(1, max(len(r) for r in response_ids))
    length, tokens = width or (length, tokens)
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


def gather_columns(hidden: Tensor, positions: Tensor) -> Tensor:
    """Gather hidden (B, L, H) at positions (B, T) -> (B, T, H)."""
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def response_logprobs(
    model: nn.Module,
    ids,
    attention,
    positions,
    responses,
    temperature: float = 1.0,
    plain_head: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return log p(response token t | everything before it) and the entropy there, both (B, T), in nats.

    The head is applied at the response's positions alone, so that no (B, L, V) tensor exists;
    `plain_head=False` takes the model's own logits for those that transform them.
    """
    if plain_head:
        decoder, head = decoder_and_head(model)
        hidden = decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = head(gather_columns(hidden, positions))
    else:
        full = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logits = gather_columns(full, positions)
    return selected_logprobs(logits, responses, temperature)
