"""A scorer behind a URL: samples go out as JSON in batches, scores come back; temporary failures
are retried.

    {http: https://scores.example.com/tone, timeout: 30, retries: 5, batch_size: 32, token_env:
    TONE_TOKEN}

docs/rewards.md describes the protocol. The token is read from the environment and appears in no
message.
"""

import concurrent.futures
import math
import threading
from typing import Any

from reward.checks import first_prompt
from reward.specs import HttpSpec
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.errors import UserError
from rlhf.files import json_safe
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
        batches = []
        for start in range(0, len(samples), spec.batch_size):
            end = start + spec.batch_size
            own = {name: column[start:end] for name, column in vars(samples).items()}
            batches.append(Samples(**own))

        scores = Scores([])
        for number, answer in enumerate(_ask_all(service, batches)):
            if number and answer.breakdown.keys() != scores.breakdown.keys():
                before = ", ".join(scores.breakdown) or "none"
                now = ", ".join(answer.breakdown) or "none"
                raise UserError(
                    f"{service}: the parts of the breakdown differ between two answers: {before} and {now}"
                )
            scores.total += answer.total
            for part, values in answer.breakdown.items():
                scores.breakdown.setdefault(part, []).extend(values)
        return scores

    return score


def _ask_all(service: Service, batches: list[Samples]) -> list[Scores]:
    """Return the answer to each batch, in order; the first that fails stops the rest."""
    # requests that wait for a retry end at once when another has failed
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
    columns = zip(samples.prompts, samples.responses, samples.ended, samples.metadata, strict=True)
    rows = []
    for prompt, response, ended, metadata in columns:
        row = {"prompt": prompt, "response": response, "ended": bool(ended)}
        rows.append(row | {"metadata": json_safe(metadata, nan_as_null=True)})
    answer = ask(service, {"samples": rows}, f"score {len(samples)} samples", stop)
    return _scores(service, answer, samples)


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
    is_mapping = isinstance(breakdown, dict)
    lists = [total, *breakdown.values()] if is_mapping else []
    if not is_mapping or not all(isinstance(values, list) for values in lists):
        raise UserError(f"{service} answered {answer.excerpt(service)}, expected {EXPECTED}")

    for name, values in (("scores", total), *breakdown.items()):
        # a shorter answer would shift scores to other samples
        if len(values) != len(samples):
            found = (
                f"{service} returned {len(values)} numbers in '{name}' for {len(samples)} samples"
            )
            raise UserError(f"{found}.\n{first_prompt(samples)}")
    parts = {}
    for name, values in breakdown.items():
        parts[name] = list(map(_nan_for_null, values))
    return Scores(total, parts)


def _nan_for_null(value: Any) -> Any:
    """Return a number of the breakdown; null says that its part does not apply to the sample."""
    return math.nan if value is None else value
