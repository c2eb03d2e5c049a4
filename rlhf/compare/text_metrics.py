"""Measures of a policy beside its scores: diversity, repetition, and how well it still models given
texts.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.data.records import Instruction

# words of a repeated run: shorter ones recur in good prose
REPEATED = 4


def word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the runs of n words (separated by white space) of a text, in order; none where it is
    shorter.
    """
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return distinct word n-grams over all word n-grams of all texts (distinct-n, Li et al. 2016);
    0 without n-grams.

    It falls with the number of texts: compare it only between equally many.
    """
    grams = list(itertools.chain.from_iterable(word_ngrams(text, n) for text in texts))
    return len(set(grams)) / len(grams) if grams else 0.0


def variety(texts: Sequence[str]) -> dict[str, float]:
    """Return what `Point.numbers` has of a policy's responses: "distinct_1" and "distinct_2"."""
    return {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}


def repetition(text: str, n: int = REPEATED) -> float:
    """Return the share of a text's word n-grams that occurred in it before; 0 for one of fewer than
    n words.
    """
    grams = word_ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class TextLoss:
    """One held-out response: its group, the sum of -log p over its tokens (nats), and how many
    tokens it has.
    """

    group: str
    nll: float
    tokens: int


def encode_texts(
    records: list[Instruction], tokenizer: Any, max_prompt_length: int, max_response_length: int
):
    """Return rows {"prompt_ids", "response_ids", "group"} of held-out answers, without those that
    are too long.
    """
    from rlhf.data.encode import encode, kept

    encoded = encode(records, tokenizer, max_prompt_length, max_response_length)
    texts = []
    for row in kept(encoded, "held-out answers"):
        texts.append(
            {
                "group": row["record"].group,
                "prompt_ids": row["prompt_ids"],
                "response_ids": row["response_ids"],
            }
        )
    return texts


def text_losses(
    model: Any,
    policy: Callable[[], AbstractContextManager],
    rows: list[dict[str, Any]],
    pad_id: int,
    world: Any,
    *,
    batch_size: int = 64,
    plain_head: bool = True,
) -> list[TextLoss]:
    """Return how `model`, in the context `policy()`, predicts the response of each row given its
    prompt, EOS included.

    At temperature 1, whatever responses are sampled with. Every rank takes its share and gets all
    back, in order.
    """
    mine = world.share_of(rows)
    own = partial(_losses, model, policy, mine, pad_id, batch_size, plain_head)
    return world.gather(world.raise_on_all_ranks(own))


def _losses(model, policy, rows, pad_id, batch_size, plain_head) -> list[TextLoss]:
    """Return the losses of one rank's rows."""
    import torch

    from rlhf.model.logprobs import completion_batch, response_logprobs

    device, was_training = next(model.parameters()).device, model.training
    result = []
    model.eval()
    # in the order of the rows, so that every rank count gives the same sums
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompt_ids = [row["prompt_ids"] for row in part]
        response_ids = [row["response_ids"] for row in part]
        columns = completion_batch(prompt_ids, response_ids, pad_id, device)
        with torch.no_grad(), policy():
            logprobs, _ = response_logprobs(model, *columns, plain_head=plain_head)
        # a long response has more tokens than float32 sums exactly
        nats = (-logprobs).sum(-1, dtype=torch.float64).tolist()
        groups = [row["group"] for row in part]
        tokens = columns[-1].sum(-1).tolist()
        result += map(TextLoss, groups, nats, tokens)
    model.train(was_training)
    return result


def perplexity(losses: Sequence[TextLoss]) -> tuple[float, float]:
    """Return exp(L) with L = sum of nats over sum of tokens, and its standard error clustered by
    group (nan for one group).

        se(L) = sqrt( G/(G-1) sum_g (N_g - L T_g)^2 ) / sum_g T_g,    se(exp L) = exp(L) se(L)

    N_g, T_g: nats and tokens of group g; the ratio estimator (Cochran 1977, section 6.4) and the
    delta method. Raises ValueError without any token.
    """
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for loss in losses:
        nats[loss.group] = nats.get(loss.group, 0.0) + loss.nll
        tokens[loss.group] = tokens.get(loss.group, 0) + loss.tokens
    total = sum(tokens.values())
    if not total:
        raise ValueError("no tokens: nothing to measure a perplexity of")

    mean, count = sum(nats.values()) / total, len(nats)
    squares = sum((nats[group] - mean * tokens[group]) ** 2 for group in nats)
    se = math.sqrt(count / (count - 1) * squares) / total if count > 1 else math.nan
    return math.exp(mean), math.exp(mean) * se
