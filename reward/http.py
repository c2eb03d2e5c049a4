"""A scorer behind a URL: samples go out as JSON in batches, scores come back, and what fails is tried again.

    {http: https://scores.example.com/tone, timeout: 30, retries: 5, batch_size: 32, token_env: TONE_TOKEN}

The protocol is described in docs/scorers.md. The token is read from the environment and stands in no message.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import threading
from typing import Any

from reward.compose import first_prompt
from rlhf.config import UserError
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.http_client import Answer, Service, ask, check_url, read_token

IN_FLIGHT = 4  # requests at a time


def http_scorer(
    url: str,
    name: str = "http",
    *,
    timeout: float = 60.0,
    retries: int = 5,
    batch_size: int = 64,
    token_env: str | None = None,
) -> Scorer:
    """A service as a scorer: `batch_size` samples a request, a few requests at a time, scores in the samples' order.

    timeout: seconds to wait for a connection, and for the whole answer.
    retries: tries after the first, on connection errors, timeouts, HTTP 429 and 5xx.
    token_env: the environment variable with a bearer token.

    The scorer raises UserError when the service refuses, stays away or answers with something else than the protocol.
    """
    where = f"scorer '{name}'"
    service = Service(where, url, timeout, retries, read_token(token_env, where))

    def score(samples: Samples) -> Scores:
        rows = [range(len(samples))[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        answers = _all(service, [_part(samples, part.start, part.stop) for part in rows])
        parts = list(answers[0].breakdown) if answers else []
        for answer in answers:
            if set(answer.breakdown) != set(parts):
                found = f"{', '.join(parts) or 'none'} and {', '.join(answer.breakdown) or 'none'}"
                raise UserError(f"{service}: the parts of the breakdown differ between two answers: {found}")
        breakdown = {part: [v for answer in answers for v in answer.breakdown[part]] for part in parts}
        return Scores([s for answer in answers for s in answer.total], breakdown)

    return score


def check_http(url: str, options: dict[str, Any], where: str) -> None:
    """Raises UserError, naming `where`, on a URL, an option or a token that cannot be used; shows no credentials."""
    check_url(url, where)
    timeout = options.get("timeout", 1)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise UserError(f"{where}: timeout is {timeout!r}, expected seconds above 0")
    for key, least in (("retries", 0), ("batch_size", 1)):
        value = options.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{where}: {key} is {value!r}, expected a whole number from {least} up")
    read_token(options.get("token_env"), where)


def _all(service: Service, parts: list[Samples]) -> list[Scores]:
    """An answer a part, in order; the first that fails stops the rest."""
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT)
    try:
        asked = [pool.submit(_ask, service, part, stop) for part in parts]
        done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_EXCEPTION)
        for answer in [a for a in asked if a in done]:
            answer.result()  # raises what failed, before what still runs is waited for
        return [answer.result() for answer in asked]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _ask(service: Service, samples: Samples, stop: threading.Event) -> Scores:
    return _scores(service, ask(service, _request(samples), f"score {len(samples)} samples", stop), samples)


def _request(samples: Samples) -> dict[str, Any]:
    rows = zip(samples.prompts, samples.responses, samples.ended, samples.metadata, strict=True)
    return {
        "samples": [
            {"prompt": prompt, "response": response, "ended": bool(ended), "metadata": _plain(metadata)}
            for prompt, response, ended, metadata in rows
        ]
    }


def _plain(value: Any) -> Any:
    """What JSON can say of it: NaN and infinity become null, anything unknown its text."""
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _scores(service: Service, answer: Answer, samples: Samples) -> Scores:
    try:
        content = answer.json()
    except ValueError:
        raise UserError(f"{service} answered with something that is not JSON: {answer.words(service)}") from None
    total = content.get("scores") if isinstance(content, dict) else None
    breakdown = (content.get("breakdown") or {}) if isinstance(content, dict) else {}
    lists = [total, *breakdown.values()] if isinstance(breakdown, dict) else [None]
    if not all(isinstance(values, list) for values in lists):
        expected = '{"scores": [numbers], "breakdown": {name: [numbers]}}'
        raise UserError(f"{service} answered {answer.words(service)}, expected {expected}")
    for what, values in (("scores", total), *breakdown.items()):
        if len(values) != len(samples):
            found = f"{service} returned {len(values)} numbers in '{what}' for {len(samples)} samples"
            raise UserError(f"{found}.\n{first_prompt(samples)}")
    return Scores(total, {k: [math.nan if v is None else v for v in values] for k, values in breakdown.items()})


def _part(samples: Samples, start: int, stop: int) -> Samples:
    fields = dataclasses.fields(samples)
    return Samples(**{f.name: getattr(samples, f.name)[start:stop] for f in fields})
