"""Generation by plain cached forward passes of the model itself: slow, and right. Other engines are
held against it.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from rlhf.engines.sampling import Completions, EachToken, Sampling, draw
from rlhf.model.packing import why_inexact
from rlhf.text import say_once


def generate(
    model: nn.Module,
    prompt_ids: list[list[int]],
    keys: list[int],
    sampling: Sampling,
    stop_ids: list[int],
    pad_id: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    each_token: EachToken | None = None,
) -> Completions:
    """Sample one response per prompt with the adapter that is active now.

    Prompts of similar length share a batch, rows that ended leave it. `progress(n)` is called when
    n more are done, `each_token` for each token that is drawn. A model whose cache does not give its
    own logits back samples without it, in batches of equal length, which need no padding: slower,
    and said once.
    """
    # a stable sort: prompts of one length keep their order
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    responses: list[list[int]] = [[] for _ in prompt_ids]
    logprobs: list[list[float]] = [[] for _ in prompt_ids]
    was_training = model.training
    model.eval()
    stops = set(stop_ids)
    with router_logits_off(model):
        cached = cache_is_exact(model)
        batches = [order]
        if not cached:
            batches = [
                list(rows) for _, rows in itertools.groupby(order, key=lambda i: len(prompt_ids[i]))
            ]
        for rows in (
            batch[i : i + batch_size] for batch in batches for i in range(0, len(batch), batch_size)
        ):
            _generate_batch(
                *(model, rows, prompt_ids, keys, sampling, stops, pad_id),
                *(responses, logprobs, cached, each_token),
            )
            if progress is not None:
                progress(len(rows))
    model.train(was_training)
    ended = [bool(r) and r[-1] in stops for r in responses]
    return Completions(responses, ended, logprobs)


@contextlib.contextmanager
def router_logits_off(model: nn.Module):
    """TRL has mixtures of experts compute their router's loss, which no cached step can."""
    config = model.config.get_text_config()
    before = vars(config).get("output_router_logits")
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


# by the model below the adapters
_EXACT: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def cache_is_exact(model: nn.Module) -> bool:
    """Whether cached steps, after padding on the left and after a row has left, give the logits of
    whole passes.

    Tried once for each model on a few tokens. Hybrid and recurrent models of transformers keep
    their state in several ways, some of them without telling the cache, and some cannot mask their
    padding.
    """
    return tried_once(model, _EXACT, _cache_gap, "without its cache")


def tried_once(
    model: nn.Module,
    known: MutableMapping[nn.Module, bool],
    gap_of: Callable[[nn.Module], float],
    instead: str,
) -> bool:
    """Return whether a fast way to sample is exact, by `why_inexact` at the first call for a model;
    says how it is sampled from `instead`.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal not in known:
        reason = why_inexact(model, gap_of)
        known[causal] = not reason
        if reason:
            kind = model.config.model_type
            say_once(f"sampling from {kind} {instead}, which is slower ({reason})")
    return known[causal]


def trial(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ids (3, 16) to try a cache on, and log-probabilities (3, 16, V) of a whole pass."""
    ids = torch.arange(1, 49, device=next(model.parameters()).device).reshape(3, 16)
    # a prime, to spread them over the vocabulary; an adapter may stand in the place of the
    # embeddings
    ids = ids * 7919 % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return ids, logits.float().log_softmax(-1)


def _cache_gap(model: nn.Module) -> float:
    """Return how far the log-probabilities of cached steps are from those of whole passes, over
    their spread.

    In a batch of three rows, one of which leaves; the mean over the vocabulary, of the worst step.
    """
    ids, whole = trial(model)
    lengths = torch.tensor([6, 9, 7])  # of which the batch begins with so many, padded on the left
    batch = _Batch(
        model, [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)], 0, cached=True
    )
    rows, gaps = torch.arange(3), []
    for step in range(7):
        found, expected = (
            batch.logits().float().log_softmax(-1),
            whole[rows, lengths[rows] + step - 1],
        )
        gaps.append((found - expected).abs().mean() / expected.std().clamp(min=1e-6))
        staying = [0, 2] if step == 0 else range(len(rows))
        batch.append(ids[rows, lengths[rows] + step], staying)
        rows = rows[list(staying)]
    return float(torch.stack(gaps).max())


class _Batch:
    """Rows of ids, padded on the left, with what a forward pass reads beside them."""

    def __init__(self, model: nn.Module, rows: list[list[int]], pad_id: int, cached: bool):
        from transformers import DynamicCache

        device, width = next(model.parameters()).device, max(map(len, rows))
        self.model = model
        self.ids = torch.tensor(
            [[pad_id] * (width - len(row)) + row for row in rows], device=device
        )
        self.attention = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )
        self.position = (self.attention.cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config) if cached else None

    def logits(self) -> Tensor:
        """(B, V) of the tokens that come next."""
        return self.model(
            input_ids=self.ids,
            attention_mask=self.attention,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
        ).logits[:, -1]

    def append(self, tokens: Tensor, staying: Sequence[int]) -> None:
        """Put one token (B,) behind each row, then keep the rows at the places `staying`."""
        column, position = tokens[:, None], self.position[:, -1:] + 1
        self.attention = torch.cat([self.attention, torch.ones_like(column)], dim=1)
        if self.cache is None:
            self.ids, self.position = (
                torch.cat([self.ids, column], 1),
                torch.cat([self.position, position], 1),
            )
        else:
            self.ids, self.position = column, position
        if len(staying) == len(column):
            return
        keep = torch.tensor(staying, device=column.device)
        self.ids, self.position, self.attention = (
            self.ids[keep],
            self.position[keep],
            self.attention[keep],
        )
        if self.cache is not None:
            self.cache.reorder_cache(keep)  # batch_select_indices does the same for attention alone


@torch.no_grad()
def _generate_batch(
    model,
    rows,
    prompt_ids,
    keys,
    sampling,
    stops,
    pad_id,
    responses,
    logprobs,
    cached,
    each_token,
) -> None:
    batch = _Batch(model, [prompt_ids[r] for r in rows], pad_id, cached)
    row_keys = torch.tensor([keys[r] for r in rows], dtype=torch.int64, device=batch.ids.device)
    alive = list(rows)
    for step in range(sampling.max_new_tokens):
        tokens, chosen = draw(batch.logits(), row_keys, step, sampling)
        going = []
        for place, (row, token, logprob) in enumerate(
            zip(alive, tokens.tolist(), chosen.tolist(), strict=True)
        ):
            responses[row].append(token)
            logprobs[row].append(logprob)
            is_ended = each_token is not None and each_token(row, token, logprob)
            if token not in stops and not is_ended:
                going.append(place)
        if not going or step + 1 == sampling.max_new_tokens:
            return
        batch.append(tokens, going)
        alive, row_keys = [alive[i] for i in going], row_keys[going]
