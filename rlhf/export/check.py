"""What an exported model computes, beside the policy that it was made from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data.encode import encode_prompt
from rlhf.model.tokenizer import stop_ids

# plain questions; digits, white space and accents are where tokenizers differ
PROMPTS = (
    "Where is my parcel? I ordered 12 lamps on 3 May 2024.",
    "Explain in two sentences how rain forms.",
    "Please write a short, friendly reply to a customer whose chair arrived broken.",
    "What is 17 + 25?",
    "Translate into French: the café opens at 9:30.",
    "List three things to check\n\n  1) before a long trip\n  2) after it",
    "Why is the sky blue?",
    "I'd like to return the blue jacket. It doesn't fit, what's next?",
    "Do you ship to Norway?",
    "Who wrote Hamlet, and in which century?",
)
NEW_TOKENS = 32


@dataclass
class Answer:
    """A greedy answer: the prompt's ids, its tokens (T,), and the logits (T, V) they were chosen by."""

    prompt: list[int]
    tokens: Tensor
    logits: Tensor


def greedy_answers(model: nn.Module, tokenizer: Any, count: int) -> list[Answer]:
    """Return greedy answers of up to 32 tokens to the first `count` prompts."""
    stops = set(stop_ids(tokenizer, model))
    answers = []
    for text in PROMPTS[:count]:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        answers.append(_greedy(model, prompt, stops))
    return answers


@torch.no_grad()
def _greedy(model: nn.Module, prompt: list[int], stops: set[int]) -> Answer:
    device = next(model.parameters()).device
    ids, cache, rows = torch.tensor([prompt], device=device), None, []
    for _ in range(NEW_TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, row = out.past_key_values, out.logits[0, -1].float()
        rows.append(row.cpu())
        ids = row.argmax().view(1, 1)
        if int(ids) in stops:
            break
    logits = torch.stack(rows)
    return Answer(prompt, logits.argmax(-1), logits)


@torch.no_grad()
def logits_on(model: nn.Module, answer: Answer) -> Tensor:
    """Return a model's logits (T, V) for each token of an answer, given those before it."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*answer.prompt, *answer.tokens.tolist()]], device=device)
    start = len(answer.prompt) - 1
    return model(input_ids=ids).logits[0, start:-1].float().cpu()


def compare(model: nn.Module, tokenizer: Any, answers: list[Answer]) -> dict[str, Any]:
    """Return how an exported model and its tokenizer differ from the policy that gave `answers`.

    same_ids: whether all prompts have the same ids; the rest is measured on the policy's ids.
    """
    stops = set(stop_ids(tokenizer, model))
    rows, same_ids = [], True
    # fewer answers than prompts where fewer were asked for
    for text, answer in zip(PROMPTS, answers, strict=False):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        same_ids = same_ids and ids == answer.prompt
        own = _greedy(model, answer.prompt, stops)
        rows.append(differences(answer, own.tokens, logits_on(model, answer)))
    return {"same_ids": same_ids, **summary(rows)}


def differences(answer: Answer, own_tokens: Tensor, logits: Tensor) -> dict[str, Any]:
    """Compare one answer (T tokens) with another model's.

    own_tokens: what the other answers by itself, (S,). logits: its own on the policy's answer, (T, V).
    Returns equal (tokens at which it would choose the same), kl (sum of KL(policy || other) over the
    tokens, nats), first (the first token at which the answers differ, or None), and logit_gap: by how
    much the policy preferred its own token there, None where one of the answers has ended.
    """
    length = min(len(answer.tokens), len(own_tokens))
    differs = (answer.tokens[:length] != own_tokens[:length]).nonzero()
    first = int(differs[0]) if len(differs) else None
    gap = None
    # one goes on where the other has ended
    if first is None and len(answer.tokens) != len(own_tokens):
        first = length
    elif first is not None:
        row = answer.logits[first]
        gap = float(row[answer.tokens[first]] - row[own_tokens[first]])
    # on the policy's own answer, so that one early difference is not counted to the end
    logprobs, others = answer.logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - others)).sum(-1)
    return {
        "tokens": len(answer.tokens),
        "equal": int((logits.argmax(-1) == answer.tokens).sum()),
        "kl": float(kl.double().sum()),
        "first": first,
        "logit_gap": gap,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of all answers together; `differing` lists those whose tokens differ."""
    tokens = equal = kl = 0
    differing = []
    for number, row in enumerate(rows):
        tokens += row["tokens"]
        equal += row["equal"]
        kl += row["kl"]
        if row["first"] is not None:
            place = {"prompt": number, "token": row["first"]}
            differing.append({**place, "logit_gap": row["logit_gap"]})
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "answers_equal": len(rows) - len(differing),
        "tokens_equal": equal / tokens,
        "kl_per_token": kl / tokens,
        "differing": differing,
    }
