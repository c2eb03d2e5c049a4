"""A scorer behind a URL: samples go out as JSON in batches, scores come back, and what fails is tried again.

    {http: https://scores.example.com/tone, timeout: 30, retries: 5, batch_size: 32, token_env: TONE_TOKEN}

The protocol is described in docs/scorers.md. The token is read from the environment and stands in no message.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from reward.compose import first_prompt
from rlhf.config import UserError
from rlhf.data.records import Samples, Scorer, Scores

FIRST_WAIT, MAX_WAIT = 1.0, 60.0  # seconds before the first retry, doubled each time up to the second
IN_FLIGHT = 4  # requests at a time


@dataclass(frozen=True)
class Service:
    """Where a scorer is asked and how patiently."""

    name: str
    url: str
    timeout: float
    retries: int
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """For messages: without the query, where a key may stand."""
        parts = urlsplit(self.url)
        return f"scorer '{self.name}' ({parts.scheme}://{parts.netloc}{parts.path})"


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

    timeout: seconds to wait for a connection, and for the next piece of an answer.
    retries: tries after the first, on connection errors, timeouts, HTTP 429 and 5xx.
    token_env: the environment variable with a bearer token.

    The scorer raises UserError when the service refuses, stays away or answers with something else than the protocol.
    """
    service = Service(name, url, timeout, retries, _token(token_env, f"scorer '{name}'"))

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
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        ok = False
    if "@" in url.rpartition("://")[2].partition("/")[0]:
        raise UserError(
            f"{where}: the URL holds a user name or a password ('@'), which would be written into the run's files. "
            "Put a token into an environment variable and name that: token_env: SCORER_TOKEN"
        )
    if not ok:
        raise UserError(f"{where}: 'http' is {url.partition('?')[0]!r}, expected http://HOST:PORT/PATH or https://...")
    timeout = options.get("timeout", 1)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise UserError(f"{where}: timeout is {timeout!r}, expected seconds above 0")
    for key, least in (("retries", 0), ("batch_size", 1)):
        value = options.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{where}: {key} is {value!r}, expected a whole number from {least} up")
    _token(options.get("token_env"), where)


def _token(variable: str | None, where: str) -> str | None:
    if variable is None:
        return None
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(
            f"{where}: token_env names an environment variable, in capitals, such as SCORER_TOKEN; found something "
            "else (not shown: it may be the token itself)"
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"{where}: the environment variable {variable} is not set. Set it: export {variable}=...")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"{where}: the token in {variable} holds a space or a character that no header can carry")
    return token


def _all(service: Service, parts: list[Samples]) -> list[Scores]:
    """An answer a part, in order; the first that fails stops the rest."""
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT)
    try:
        asked = [pool.submit(ask, service, part, stop) for part in parts]
        done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_EXCEPTION)
        for answer in [a for a in asked if a in done]:
            answer.result()  # raises what failed, before what still runs is waited for
        return [answer.result() for answer in asked]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def ask(service: Service, samples: Samples, stop: threading.Event) -> Scores:
    """One request until it is answered; UserError when it is refused or no try is left. `stop` ends the waiting."""
    import requests

    body, began, pause = json.dumps(_request(samples), allow_nan=False).encode(), time.monotonic(), FIRST_WAIT
    for attempt in range(1, service.retries + 2):
        told = 0.0
        try:
            answer = requests.post(
                service.url,
                data=body,
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                timeout=service.timeout,
                allow_redirects=False,  # a POST would come out at the other end as a GET
                auth=_signer(service),
            )
        except requests.Timeout:
            reason = f"no answer within {service.timeout:g} s"
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            reason = f"no connection: {_cause(error)}"
        except requests.RequestException as error:  # whose own words may hold the URL's query
            raise UserError(f"{service}: the request failed ({type(error).__name__})") from None
        else:
            if answer.status_code < 300:
                return _scores(service, answer, samples)
            reason = f"HTTP {answer.status_code}: {_words(service, answer)}"
            if answer.status_code < 400:
                raise UserError(f"{service} sends elsewhere (HTTP {answer.status_code}). Give the final URL")
            if answer.status_code != 429 and answer.status_code < 500:
                raise UserError(f"{service} refused the request. {reason}")
            told = retry_after(answer.headers.get("Retry-After"))
        if attempt <= service.retries:
            seconds = min(max(pause, told), MAX_WAIT)
            note = f"{service}: {reason}; retry {attempt} of {service.retries} in {seconds:.3g} s"
            print(note, file=sys.stderr, flush=True)
            if stop.wait(seconds):
                break
            pause = min(2 * pause, MAX_WAIT)
    raise UserError(
        f"{service} stayed away: tried {attempt} {'time' if attempt == 1 else 'times'} "
        f"in {time.monotonic() - began:.0f} s. Last: {reason}\n"
        f"  Check that the service runs and that this machine reaches it, that it scores {len(samples)} samples within "
        f"{service.timeout:g} s (else raise `timeout` or lower `batch_size`), or raise `retries` ({service.retries})."
    )


def retry_after(text: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number, or a date); 0 where there is none to be read."""
    from email.utils import parsedate_to_datetime

    if not text:
        return 0.0
    if re.fullmatch(r"\s*\d+\s*", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _signer(service: Service):
    """Puts the token on a request. Always given: requests would otherwise look for credentials in ~/.netrc."""

    def sign(request):
        if service.token:
            request.headers["Authorization"] = f"Bearer {service.token}"
        return request

    return sign


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


def _scores(service: Service, answer: Any, samples: Samples) -> Scores:
    try:
        content = answer.json()
    except ValueError:
        raise UserError(f"{service} answered with something that is not JSON: {_words(service, answer)}") from None
    total = content.get("scores") if isinstance(content, dict) else None
    breakdown = (content.get("breakdown") or {}) if isinstance(content, dict) else {}
    lists = [total, *breakdown.values()] if isinstance(breakdown, dict) else [None]
    if not all(isinstance(values, list) for values in lists):
        expected = '{"scores": [numbers], "breakdown": {name: [numbers]}}'
        raise UserError(f"{service} answered {_words(service, answer)}, expected {expected}")
    for what, values in (("scores", total), *breakdown.items()):
        if len(values) != len(samples):
            found = f"{service} returned {len(values)} numbers in '{what}' for {len(samples)} samples"
            raise UserError(f"{found}.\n{first_prompt(samples)}")
    return Scores(total, {k: [math.nan if v is None else v for v in values] for k, values in breakdown.items()})


def _words(service: Service, answer: Any, width: int = 300) -> str:
    """What the server said, on one line, without the token should it repeat that."""
    text = " ".join(answer.text.split()) or "(nothing)"
    if service.token:
        text = text.replace(service.token, "***")
    return text if len(text) <= width else text[: width - 3] + "..."


def _cause(error: BaseException) -> str:
    """The innermost reason ('Connection refused'): the outer ones repeat the URL."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _part(samples: Samples, start: int, stop: int) -> Samples:
    fields = dataclasses.fields(samples)
    return Samples(**{f.name: getattr(samples, f.name)[start:stop] for f in fields})
