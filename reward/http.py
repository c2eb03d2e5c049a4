"""A scorer behind a URL: samples go out as JSON in batches, scores come back; temporary failures
are retried.

    {http: https://scores.example.com/tone, timeout: 30, retries: 5, batch_size: 32, token_env:
    TONE_TOKEN}

docs/rewards.md describes the protocol. The token is read from the environment and appears in no
message.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import threading
from typing import Any

from reward.checks import first_prompt
from reward.specs import HttpSpec
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.errors import UserError
from rlhf.http_client import Answer, Service, ask, read_token

REQUESTS_AT_A_TIME = 4
EXPECTED = '{"scores": [numbers], "breakdown": {name: [numbers]}}'


def http_scorer(spec: HttpSpec) -> Scorer:
    """Return a scorer that asks the service, `spec.batch_size` samples a request, and keeps the
    samples' order.

    The scorer raises UserError when the service refuses, does not respond, or breaks the protocol.
    """
    where = f"scorer '{spec.name}'"
    service = Service(
        where, spec.http, spec.timeout, spec.retries, read_token(spec.token_env, where)
    )

    def score(samples: Samples) -> Scores:
        starts = range(0, len(samples), spec.batch_size)
        answers = _ask_all(
            service, [_slice(samples, start, start + spec.batch_size) for start in starts]
        )
        parts = list(answers[0].breakdown) if answers else []
        for answer in answers:
            if set(answer.breakdown) != set(parts):
                found = f"{', '.join(parts) or 'none'} and {', '.join(answer.breakdown) or 'none'}"
                raise UserError(
                    f"{service}: the parts of the breakdown differ between two answers: {found}"
                )

        total = itertools.chain.from_iterable(answer.total for answer in answers)
        breakdown: dict[str, list[float]] = {part: [] for part in parts}
        for answer in answers:
            for part, values in answer.breakdown.items():
                breakdown[part] += values
        return Scores(list(total), breakdown)

    return score


def _ask_all(service: Service, batches: list[Samples]) -> list[Scores]:
    """Return the answer to each batch, in order; the first that fails stops the rest."""
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(REQUESTS_AT_A_TIME)
    try:
        requests = [pool.submit(_ask, service, batch, stop) for batch in batches]
        done, _ = concurrent.futures.wait(requests, return_when=concurrent.futures.FIRST_EXCEPTION)
        # raise what has failed before waiting for requests that still run
        for request in requests:
            if request in done:
                request.result()
        return [request.result() for request in requests]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _ask(service: Service, samples: Samples, stop: threading.Event) -> Scores:
    """Return the service's scores of one batch."""
    columns = zip(
        samples.prompts,
        samples.responses,
        map(bool, samples.ended),
        map(_json_value, samples.metadata),
        strict=True,
    )
    rows = [
        dict(zip(("prompt", "response", "ended", "metadata"), row, strict=True)) for row in columns
    ]
    answer = ask(service, {"samples": rows}, f"score {len(samples)} samples", stop)
    return _scores(service, answer, samples)


def _json_value(value: Any) -> Any:
    """Return metadata as JSON can hold it: NaN and infinity become null, unknown objects their
    text.
    """
    # numpy
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _scores(service: Service, answer: Answer, samples: Samples) -> Scores:
    """Return what the service answered. Raises UserError where that is not the protocol."""
    try:
        content = answer.json()
    except ValueError:
        raise UserError(
            f"{service} answered with something that is not JSON: {answer.excerpt(service)}"
        ) from None

    content = content if isinstance(content, dict) else {}
    total, breakdown = content.get("scores"), content.get("breakdown") or {}
    # None stands for a breakdown that is not a mapping
    lists = [total, *breakdown.values()] if isinstance(breakdown, dict) else [None]
    if not all(isinstance(values, list) for values in lists):
        raise UserError(f"{service} answered {answer.excerpt(service)}, expected {EXPECTED}")

    for name, values in (("scores", total), *breakdown.items()):
        if len(values) != len(samples):
            found = (
                f"{service} returned {len(values)} numbers in '{name}' for {len(samples)} samples"
            )
            raise UserError(f"{found}.\n{first_prompt(samples)}")
    # null says that a part does not apply to a sample
    parts = {
        name: [math.nan if v is None else v for v in values] for name, values in breakdown.items()
    }
    return Scores(total, parts)


def _slice(samples: Samples, start: int, stop: int) -> Samples:
    columns = {name: values[start:stop] for name, values in vars(samples).items()}
    return Samples(**columns)
