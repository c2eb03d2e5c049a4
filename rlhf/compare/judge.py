"""Judges of pairs: a function or a service that says which of two answers to a prompt is the better
one.

    {function: my_package.judges:prefer}      prefer(prompts, first, second) -> probabilities
    {http: https://judge.example.com/pairs, timeout: 60, retries: 5, batch_size: 16, token_env: JUDGE_TOKEN}
    {openai: http://localhost:8000/v1, model: qwen}                           see rlhf/judge/spec.py

Three lists of equal length go in (a prompt is a list of messages); a probability that `first` is
better comes back for each, or None (null) for no verdict. A service gets
POST {"prompts": [...], "first": [...], "second": [...]} and answers {"probabilities": [...]}.

Judges favour a position (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so each pair is asked
about in both orders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from rlhf.compare.results import Point, Results, independent_pairs, key
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.http_client import Service, ask, check_url, read_token
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


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about two policies' answers, asked in both orders.

    wins: (prompts, pairs) share that A's answer wins; nan where the judge gave no verdict in one of
    the orders. pairs: (sample of A, sample of B), the same at each prompt.
    orders: (prompts, pairs, 2) P(first better) with A's answer first and with B's.
    consistency: share of the pairs with the same winner, or a tie, in both orders; nan where none
    was asked.
    prefers_first: mean probability given to the answer shown first; 0.5 without a favourite
    position.
    asked: pairs whose two answers differ.
    """

    wins: np.ndarray
    pairs: list[tuple[int, int]]
    consistency: float
    prefers_first: float
    asked: int
    orders: np.ndarray | None = None


def judge_wins(judge: Judge, results: Results, a: Point, b: Point, cache: str | Path) -> Verdicts:
    """Ask about each sample of `a` against one of `b` that does not share its sampling noise, at
    every prompt.

        p1 = P(first better) with A's answer first,    p2 = P(first better) with B's answer first
        share of A = (p1 + 1 - p2) / 2,    or 1/2 where both orders prefer the same position

    Equal answers are a tie and not asked about. `cache`: a JSONL file with every answer, so that
    nothing is asked twice; delete it when the judge behind a name has changed.
    """
    pairs = one_partner_each(independent_pairs(a, b))
    rows = []
    for prompt, of_a, of_b in zip(
        results.prompts, results.responses[key(a)], results.responses[key(b)], strict=True
    ):
        rows += [(prompt, of_a[k], of_b[m]) for k, m in pairs]
    asked = [row for row in rows if row[1] != row[2]]
    both_orders = []
    for prompt, x, y in asked:
        both_orders += [(prompt, x, y), (prompt, y, x)]
    p1, p2 = np.array(ask_all(judge, both_orders, cache), dtype=np.float64).reshape(-1, 2).T

    # equal answers are a tie
    orders = np.full((len(rows), 2), 0.5)
    orders[[x != y for _, x, y in rows]] = np.stack([p1, p2], axis=1)
    wins = share_of_both_orders(*orders.T).reshape(len(results.prompts), -1)
    orders = orders.reshape(*wins.shape, 2)
    told = np.isfinite(p1) & np.isfinite(p2)
    if not told.any():
        return Verdicts(wins, pairs, math.nan, math.nan, len(asked), orders)
    same_winner = np.sign(p1[told] - 0.5) == -np.sign(p2[told] - 0.5)
    prefers_first = float(np.stack([p1, p2])[:, told].mean())
    return Verdicts(wins, pairs, float(same_winner.mean()), prefers_first, len(asked), orders)


def one_partner_each(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return one of the pairs (sample of a, sample of b) for each sample of a.

    Sample k of a is paired with the next sample of b after k, cyclically, so that no sample is asked about
    more often than it must be.
    """
    size = 1 + max((m for _, m in pairs), default=0)
    found: dict[int, int] = {}
    for k, m in sorted(pairs, key=lambda pair: (pair[0], (pair[1] - pair[0] - 1) % size)):
        found.setdefault(k, m)
    return list(found.items())


def share_of_both_orders(p1: np.ndarray, p2: np.ndarray) -> np.ndarray:
    """Return (n,) A's share from P(first better) with A first (p1) and with B first (p2); see
    `judge_wins`.
    """
    # both orders prefer the same position
    contradiction = (p1 - 0.5) * (p2 - 0.5) > 0
    return np.where(contradiction, 0.5, (p1 + 1 - p2) / 2)


def ask_all(judge: Judge, pairs: Sequence[Pair], cache: str | Path) -> list[float]:
    """Return the judge's probability for each pair as it is ordered, nan where it gave no verdict;
    what the cache lacks is asked for and added.
    """
    # it keeps its answers with their texts and tokens
    if judge.client is not None:
        return _ask(judge, list(pairs)) if pairs else []
    keys = [_key(judge, pair) for pair in pairs]
    known = _read(Path(cache))
    missing = {name: pair for name, pair in zip(keys, pairs, strict=True) if name not in known}
    names = list(missing)
    batches = [names[i : i + judge.batch_size] for i in range(0, len(names), judge.batch_size)]
    if not batches:
        return [known[name] for name in keys]

    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    # answers are written as they come, so that a kill loses one batch at most
    pool = ThreadPoolExecutor(judge.in_flight)
    try:
        with open(cache, "a", encoding="utf-8") as file:
            answers = pool.map(
                lambda batch: _ask(judge, [missing[name] for name in batch]), batches
            )
            for batch, found in zip(batches, answers, strict=True):
                for name, p in zip(batch, found, strict=True):
                    known[name] = p
                    file.write(dumps({"key": name, "p": None if math.isnan(p) else p}) + "\n")
                file.flush()
    finally:
        # a batch that failed ends the rest
        pool.shutdown(cancel_futures=True)
    return [known[name] for name in keys]


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


def _read(path: Path) -> dict[str, float]:
    """Return the answers in a cache; half a line at its end, left by a kill, is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    # half a line would spoil the next one
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    try:
        rows = map(json.loads, content[:whole].splitlines())
        return {row["key"]: math.nan if row["p"] is None else float(row["p"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not a cache of a judge's answers; delete it and they are asked for again"
        ) from None


def load_judge(spec: dict[str, Any], answers: Path | None = None) -> Judge:
    """Return the judge that `{function: ...}`, `{http: ...}` or `{openai: ...}` describes. Raises
    UserError on anything else.

    answers: the file of a language model's answers where its specification names none.
    """
    if "function" in spec:
        given = validate(FunctionSpec, spec, "judge")
        return Judge(given.function, import_function(given.function, "judge"), given.batch_size)
    if "openai" in spec:
        from rlhf.judge.judges import pair_judge
        from rlhf.judge.spec import EndpointSpec

        endpoint = validate(EndpointSpec, spec, "judge")
        endpoint.check("judge")
        prefer, client = pair_judge(endpoint, "judge", answers)
        return Judge(client.name, prefer, client=client)
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
