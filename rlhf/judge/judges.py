"""Judges: a function, a service or a language model that says which of two answers to a prompt is the
better one; a language model gives single answers a score too.

    {function: my_package.judges:prefer}      prefer(prompts, first, second) -> probabilities
    {http: https://judge.example.com/pairs, timeout: 60, retries: 5, batch_size: 16, token_env: JUDGE_TOKEN}
    {openai: http://localhost:8000/v1, model: qwen}                           see rlhf/judge/spec.py

Three lists of equal length go in (a prompt is a list of messages); a probability that `first` is
better comes back for each, or None (null) for no verdict. A service gets
POST {"prompts": [...], "first": [...], "second": [...]} and answers {"probabilities": [...]}.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf.errors import UserError
from rlhf.http_client import Service, ask, check_url, read_token
from rlhf.judge.client import AnswerFile, Client
from rlhf.judge.spec import EndpointSpec, ScoreSpec
from rlhf.plugins import import_function
from rlhf.validation import Count, Number, Spec, validate

# requests to a service at a time
IN_FLIGHT = 4

FORMS = "{function: module:function}, {http: URL} or {openai: URL, model: NAME}"

# prompt, the answer shown first, the one shown second
Pair = tuple[Any, str, str]


class FunctionSpec(Spec):
    """A judge in this process."""

    function: str
    batch_size: Count = Field(64, ge=1)


class ServiceSpec(Spec):
    """A judge behind a URL; timeout in seconds, retries of a request that failed."""

    http: str
    timeout: Number = Field(60, ge=0.001)
    retries: Count = Field(5, ge=0)
    batch_size: Count = Field(16, ge=1)
    token_env: str | None = None


@dataclass(frozen=True)
class Judge:
    """`ask(prompts, first, second)` gives what the judge answered; `name` tells its answers from
    another's.

    client: what a language model is asked through; it keeps its answers itself, counts tokens and
    knows how many questions to ask at a time.
    """

    name: str
    ask: Callable[[list, list[str], list[str]], Any]
    batch_size: int = 64
    in_flight: int = 1
    client: Any = None


def ask_all(judge: Judge, pairs: Sequence[Pair], cache: str | Path) -> list[float]:
    """Return the judge's probability for each pair as it is ordered, nan where it gave no verdict;
    what the file `cache` lacks is asked for and added.
    """
    # it keeps its answers with their texts and tokens
    if judge.client is not None:
        return _ask(judge, list(pairs)) if pairs else []
    answers = AnswerFile(Path(cache), lambda row: math.nan if row["p"] is None else float(row["p"]))
    # equal questions have one key, and are asked once
    keys = [_key(judge, pair) for pair in pairs]
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in answers.known}
    names = list(missing)
    batches = [names[i : i + judge.batch_size] for i in range(0, len(names), judge.batch_size)]
    pool = ThreadPoolExecutor(judge.in_flight)
    try:
        found = pool.map(lambda batch: _ask(judge, [missing[name] for name in batch]), batches)
        # answers are written as they come, so that a kill loses one batch at most
        for batch, probabilities in zip(batches, found, strict=True):
            for name, p in zip(batch, probabilities, strict=True):
                answers.add(name, p, {"p": None if math.isnan(p) else p})
    finally:
        # a batch that failed ends the rest
        pool.shutdown(cancel_futures=True)
    return [answers.known[key] for key in keys]


def _ask(judge: Judge, pairs: list[Pair]) -> list[float]:
    """Ask about one batch. Raises UserError unless the answer is a list with a probability for each
    pair.
    """
    prompts, first, second = map(list, zip(*pairs, strict=True))
    answer = judge.ask(prompts, first, second)
    # arrays of numpy and torch
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, (list, tuple)) or len(answer) != len(pairs):
        found = (
            f"{len(answer)} answers"
            if isinstance(answer, (list, tuple))
            else f"{type(answer).__name__}"
        )
        raise UserError(
            f"judge {judge.name}: {found} for {len(pairs)} pairs, expected a list with a probability each"
        )
    for p, prompt in zip(answer, prompts, strict=True):
        # no verdict
        if p is None:
            continue
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise UserError(
                f"judge {judge.name}: answered {p!r}, expected the probability (0 to 1) that the first answer is the "
                f"better one; prompt: {str(prompt)[:200]}"
            )
    return [math.nan if p is None else float(p) for p in answer]


def _key(judge: Judge, pair: Pair) -> str:
    return hashlib.sha256(json.dumps([judge.name, *pair], sort_keys=True).encode()).hexdigest()[:32]


def load_judge(spec: dict[str, Any], answers: Path | None = None) -> Judge:
    """Return the judge that `{function: ...}`, `{http: ...}` or `{openai: ...}` describes. Raises
    UserError on anything else.

    answers: the file of a language model's answers where its specification names none.
    """
    if "function" in spec:
        given = validate(FunctionSpec, spec, "judge")
        return Judge(given.function, import_function(given.function, "judge"), given.batch_size)
    if "openai" in spec:
        endpoint = validate(EndpointSpec, spec, "judge")
        endpoint.check("judge")
        client = Client(endpoint, "judge", answers)
        return Judge(client.name, _prefers(client), client=client)
    if "http" not in spec:
        raise UserError(f"judge: found {spec}, expected {FORMS}")
    asked = validate(ServiceSpec, spec, "judge")
    return Judge(asked.http.partition("?")[0], _service(asked), asked.batch_size, IN_FLIGHT)


def _service(spec: ServiceSpec) -> Callable[..., Any]:
    """Return a function that asks the service; what fails is tried again."""
    check_url(spec.http, "judge")
    service = Service(
        "judge", spec.http, spec.timeout, spec.retries, read_token(spec.token_env, "judge")
    )

    def asking(prompts: list, first: list[str], second: list[str]) -> Any:
        content = {"prompts": prompts, "first": first, "second": second}
        answer = ask(service, content, f"judge {len(prompts)} pairs")
        try:
            return answer.json()["probabilities"]
        except (ValueError, KeyError, TypeError):
            expected = '{"probabilities": [numbers]}'
            raise UserError(
                f"{service} answered {answer.excerpt(service)}, expected {expected}"
            ) from None

    return asking


def _prefers(client: Client) -> Callable[..., list[float | None]]:
    """Return a function that asks a language model about pairs."""

    def prefer(prompts: list, first: list[str], second: list[str]) -> list[float | None]:
        texts = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            texts.append(client.question.text(prompt, first=one, second=other))
        return [reply.value for reply in client.ask(texts, f"{client.spec.model} judges")]

    return prefer


def score_answers(client: Client, prompts: list[Any], responses: list[str]) -> list[float | None]:
    """Return the score from 1 to `highest` of each response; None where the model gave none."""
    assert isinstance(client.spec, ScoreSpec)
    texts = []
    for prompt, response in zip(prompts, responses, strict=True):
        texts.append(client.question.text(prompt, response=response))
    return [reply.value for reply in client.ask(texts)]
