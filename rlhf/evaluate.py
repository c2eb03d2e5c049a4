"""The one evaluation that every stage runs: same prompts, same sampling, same KL estimator, every
scorer.

The reference is where the stage started; for DPO and PPO that is the SFT policy, so their KL can be
compared.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rlhf.data.encode import decode_response
from rlhf.data.records import Message, Samples, Scorer
from rlhf.engines.batched import generate
from rlhf.engines.sampling import Completions, Generate, Sampling, sample_key
from rlhf.model.logprobs import completion_batch, response_logprobs
from rlhf.ranks.distributed import DistributedContext
from rlhf.stats import clustered_se

Context = Callable[[], AbstractContextManager]


@dataclass
class EvalRow:
    """One sampled response of one policy."""

    prompt: list[Message]
    group: str
    sample: int
    response: str
    length: int  # response tokens, EOS included
    ended: bool
    kl: float  # nats: sum over its tokens of log p - log p_reference, at the sampling temperature
    scores: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)  # of the response, as they were sampled


@dataclass
class Evaluation:
    """What to evaluate on: encoded prompts (see `encode_prompts`), sampling and scorer."""

    prompts: list[dict[str, Any]]
    tokenizer: Any
    stop_ids: list[int]
    sampling: Sampling
    scorer: Scorer | None = None
    samples_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 64
    plain_head: bool = True
    generate: Generate = generate

    def run(
        self,
        model: nn.Module,
        policy: Context,
        reference: Context | nn.Module | None,
        world: DistributedContext,
        progress=None,
    ) -> list[EvalRow]:
        """Sample, score and measure; every rank takes its share and gets all rows back, in order.

        `policy()` and `reference()` are contexts in which `model` is that policy; the reference may
        be a model of its own, or a context that gives one. Without a reference KL is NaN. The noise
        depends on prompt and sample only, so that two policies or two steps share it.
        """
        wanted = [(row, s) for row in self.prompts for s in range(self.samples_per_prompt)]
        mine = world.share_of(wanted)
        prompt_ids = [row["prompt_ids"] for row, _ in mine]
        keys = [sample_key(self.seed, "evaluate", row["prompt_ids"], s) for row, s in mine]
        with policy():
            # on a rank without rows too: an engine may need all ranks
            done = self.generate(
                model,
                prompt_ids,
                keys,
                self.sampling,
                self.stop_ids,
                self.tokenizer.pad_token_id,
                self.batch_size,
                progress,
            )
        rows = world.raise_on_all_ranks(
            lambda: self._rows(model, policy, reference, mine, done) if mine else []
        )
        return world.gather(rows)

    def _rows(self, model, policy, reference, wanted, done: Completions) -> list[EvalRow]:
        prompt_ids = [row["prompt_ids"] for row, _ in wanted]
        kl = self._sequence_kl(model, policy, reference, prompt_ids, done.response_ids)
        samples = to_samples([row for row, _ in wanted], done, self.tokenizer)
        scores = self.scorer(samples) if self.scorer else None
        rows = []
        for i, (row, sample) in enumerate(wanted):
            named = (
                {name: float(values[i]) for name, values in scores.breakdown.items()}
                if scores
                else {}
            )
            rows.append(
                EvalRow(
                    prompt=row["record"].prompt,
                    group=row["record"].group,
                    sample=sample,
                    response=samples.responses[i],
                    length=len(done.response_ids[i]),
                    ended=done.ended[i],
                    kl=kl[i],
                    scores=named,
                    metadata=samples.metadata[i],
                    ids=done.response_ids[i],
                )
            )
        return rows

    @torch.no_grad()
    def _sequence_kl(self, model, policy, reference, prompt_ids, response_ids) -> list[float]:
        if reference is None:
            return [math.nan] * len(prompt_ids)
        if reference is policy:
            return [0.0] * len(prompt_ids)
        device = next(model.parameters()).device
        temperature = self.sampling.temperature or 1.0
        result = []
        was_training = model.training
        model.eval()
        for start in range(0, len(prompt_ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            columns = completion_batch(
                prompt_ids[part], response_ids[part], self.tokenizer.pad_token_id, device
            )
            inputs = (*columns, temperature, self.plain_head)
            with policy():
                logprobs, _ = response_logprobs(model, *inputs)
            is_model = isinstance(reference, nn.Module)
            with nullcontext(reference) if is_model else reference() as own:
                other = model if own is None else own
                reference_logprobs, _ = response_logprobs(other, *inputs)
            # both are 0 where there is no token
            result += (logprobs - reference_logprobs).sum(-1).tolist()
        model.train(was_training)
        return result


@torch.no_grad()
def eos_probability(
    model: nn.Module,
    rows: list[dict[str, Any]],
    pad_id: int,
    plain_head: bool,
    world: DistributedContext,
) -> float:
    """Return the mean probability of the EOS token where given responses end, the same on every
    rank.

    rows: with "prompt_ids" and "response_ids", the EOS token last. What a policy gives it there
    bounds the share of responses that end in the right place; token accuracy is a mean over all
    tokens and hardly shows it.
    """
    mine, device = world.share_of(rows), next(model.parameters()).device
    training, total = model.training, 0.0
    model.eval()
    for start in range(0, len(mine), 8):
        part = mine[start : start + 8]
        before = [row["prompt_ids"] + row["response_ids"][:-1] for row in part]
        columns = completion_batch(
            before, [row["response_ids"][-1:] for row in part], pad_id, device
        )
        logprobs, _ = response_logprobs(model, *columns, plain_head=plain_head)
        # each response is its one EOS token
        total += float(logprobs.exp().sum())
    model.train(training)
    return float(world.sum(total)) / len(rows)


def knowledge_of_ends(
    model: nn.Module,
    rows: list[dict[str, Any]],
    pad_id: int,
    plain_head: bool,
    world: DistributedContext,
) -> tuple[float, float]:
    """Return the median log-probability of the EOS token where given responses end, and the mean of
    their other tokens, nats; the same on every rank.

    rows: as for `eos_probability`. The median, since a row of random numbers fits a few ends.
    """
    mine, device = world.share_of(rows), next(model.parameters()).device
    training, found = model.training, []
    model.eval()
    for start in range(0, len(mine), 8):
        part = mine[start : start + 8]
        prompts, responses = (
            [row[f"{name}_ids"] for row in part] for name in ("prompt", "response")
        )
        columns = completion_batch(prompts, responses, pad_id, device)
        with torch.no_grad():
            logprobs, _ = response_logprobs(model, *columns, plain_head=plain_head)
        for response, row in zip(responses, logprobs.tolist(), strict=True):
            own = row[: len(response)]
            found.append((own[-1], sum(own[:-1]), len(own) - 1))
    model.train(training)
    ends, others, counts = zip(*world.gather(found), strict=True)
    return statistics.median(ends), sum(others) / max(1, sum(counts))


def to_samples(rows: list[dict[str, Any]], completions: Completions, tokenizer: Any) -> Samples:
    """Return what scorers receive: encoded prompts (see `encode_prompts`) with the response to
    each.
    """
    records = [row["record"] for row in rows]
    metadata = []
    for record in records:
        voice = {"voice": record.voice} if record.voice else {}
        metadata.append({**record.metadata, "group": record.group, **voice})
    return Samples(
        prompts=[record.prompt for record in records],
        responses=[decode_response(tokenizer, ids) for ids in completions.response_ids],
        prompt_ids=[row["prompt_ids"] for row in rows],
        response_ids=completions.response_ids,
        ended=completions.ended,
        metadata=metadata,
    )


def summarise(rows: list[EvalRow], prefix: str = "eval/") -> dict[str, float]:
    """Return means over responses under the names that all stages share, and the standard error of
    the sequence KL.
    """
    if not rows:
        return {}
    n = len(rows)
    metrics = {
        f"{prefix}response/length": sum(r.length for r in rows) / n,
        f"{prefix}response/ended": sum(r.ended for r in rows) / n,
    }
    for name in rows[0].scores:
        # NaN: a part that does not apply
        applies = [r.scores[name] for r in rows if not math.isnan(r.scores[name])]
        metrics[f"{prefix}score/{name}"] = sum(applies) / len(applies) if applies else math.nan
    kl = [r.kl for r in rows]
    # without a reference policy no row has one
    if not math.isnan(kl[0]):
        metrics[f"{prefix}kl/sequence"] = sum(kl) / n
        metrics[f"{prefix}kl/token"] = sum(kl) / sum(r.length for r in rows)
        error = clustered_se(kl, [r.group for r in rows])
        if error is not None:
            metrics[f"{prefix}kl/sequence_se"] = error
    return metrics


def sample_table(rows: list[EvalRow], count: int = 8) -> list[dict[str, Any]]:
    """The first rows as a table of prompt, response and scores, for the tracker."""
    return [
        {
            "prompt": row.prompt[-1]["content"],
            "response": row.response,
            "ended": row.ended,
            "kl": round(row.kl, 4),
            **{f"score/{k}": round(v, 4) for k, v in row.scores.items()},
        }
        for row in rows[:count]
    ]
