"""Judges of pairs: a function or a service that says which of two answers to a prompt is the better one.

    {function: my_package.judges:prefer}      prefer(prompts, first, second) -> probabilities
    {http: https://judge.example.com/pairs, timeout: 60, retries: 5, batch_size: 16, token_env: JUDGE_TOKEN}

Three lists of equal length go in (a prompt is a list of messages); a probability that `first` is better comes back for
each. A service gets POST {"prompts": [...], "first": [...], "second": [...]} and answers {"probabilities": [...]}.

Judges favour a position (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so each pair is asked about in both orders.
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

from rlhf.compare.results import Point, Results, independent_pairs
from rlhf.errors import UserError, did_you_mean
from rlhf.http_client import Service, ask, check_url, read_token
from rlhf.plugins import import_function

OPTIONS = {"function": ("batch_size",), "http": ("batch_size", "timeout", "retries", "token_env")}
IN_FLIGHT = 4  # requests to a service at a time
Pair = tuple[Any, str, str]  # prompt, the answer shown first, the one shown second


@dataclass(frozen=True)
class Judge:
    """`ask(prompts, first, second)` gives what the judge answered; `name` tells its answers from another's."""

    name: str
    ask: Callable[[list, list[str], list[str]], Any]
    batch_size: int = 64
    in_flight: int = 1


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about two policies' answers, asked in both orders."""

    wins: np.ndarray  # (prompts, pairs) share that A's answer wins
    pairs: list[tuple[int, int]]  # (sample of A, sample of B), the same at each prompt
    consistency: float  # share of the pairs with the same winner, or a tie, in both orders; nan where none was asked
    prefers_first: float  # mean probability given to the answer shown first; 0.5 without a favourite position
    asked: int  # pairs whose two answers differ


def judge_wins(judge: Judge, results: Results, a: Point, b: Point, cache: str | Path) -> Verdicts:
    """Ask about each sample of `a` against one of `b` that does not share its sampling noise, at every prompt.

        p1 = P(first better) with A's answer first,    p2 = P(first better) with B's answer first
        share of A = (p1 + 1 - p2) / 2,    or 1/2 where both orders prefer the same position

    Equal answers are a tie and not asked about. `cache`: a JSONL file with every answer, so that nothing is asked
    twice; delete it when the judge behind a name has changed.
    """
    answers = [results.responses[p.method, p.swept, p.seed, p.step] for p in (a, b)]
    pairs = one_partner_each(independent_pairs(a, b))
    rows = [
        (prompt, own[k], other[m])
        for prompt, own, other in zip(results.prompts, *answers, strict=True)
        for k, m in pairs
    ]
    different = [(prompt, x, y) for prompt, x, y in rows if x != y]
    known = ask_all(judge, [pair for prompt, x, y in different for pair in ((prompt, x, y), (prompt, y, x))], cache)
    orders = np.array(known, dtype=np.float64).reshape(-1, 2)
    shares = iter(share_of_both_orders(orders[:, 0], orders[:, 1]).tolist())
    wins = np.array([next(shares) if x != y else 0.5 for _, x, y in rows]).reshape(len(results.prompts), -1)
    if not different:
        return Verdicts(wins, pairs, math.nan, math.nan, 0)
    same = np.sign(orders[:, 0] - 0.5) == -np.sign(orders[:, 1] - 0.5)
    return Verdicts(wins, pairs, float(same.mean()), float(orders.mean()), len(different))


def one_partner_each(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of the pairs (sample of a, sample of b) one for each sample of a: with the next sample of b after its own number,
    in a circle, so that no sample is asked about more often than it must be."""
    found: dict[int, int] = {}
    size = 1 + max((m for _, m in pairs), default=0)
    for k, m in pairs:
        if k not in found or (m - k - 1) % size < (found[k] - k - 1) % size:
            found[k] = m
    return list(found.items())


def share_of_both_orders(p1: np.ndarray, p2: np.ndarray) -> np.ndarray:
    """(n,) A's share from P(first better) with A first (p1) and with B first (p2); see `judge_wins`."""
    contradiction = (p1 - 0.5) * (p2 - 0.5) > 0
    return np.where(contradiction, 0.5, (p1 + 1 - p2) / 2)


def ask_all(judge: Judge, pairs: Sequence[Pair], cache: str | Path) -> list[float]:
    """The judge's probability for each pair as it is ordered; asks for what the cache does not hold, and adds it."""
    keys = [_key(judge, pair) for pair in pairs]
    known = _read(Path(cache))
    missing = list({k: pair for k, pair in zip(keys, pairs, strict=True) if k not in known}.items())
    batches = [missing[i : i + judge.batch_size] for i in range(0, len(missing), judge.batch_size)]
    if batches:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(judge.in_flight)
        try:
            with open(cache, "a", encoding="utf-8") as file:
                answers = pool.map(lambda batch: _ask(judge, [pair for _, pair in batch]), batches)
                for batch, found in zip(batches, answers, strict=True):
                    for (key, _), p in zip(batch, found, strict=True):
                        known[key] = p
                        file.write(json.dumps({"key": key, "p": p}) + "\n")
                    file.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    return [known[key] for key in keys]


def _ask(judge: Judge, pairs: list[Pair]) -> list[float]:
    """One batch, checked."""
    prompts, first, second = (list(column) for column in zip(*pairs, strict=True))
    answer = judge.ask(prompts, first, second)
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, (list, tuple)) or len(answer) != len(pairs):
        found = f"{len(answer)} answers" if isinstance(answer, (list, tuple)) else f"{type(answer).__name__}"
        raise UserError(f"judge {judge.name}: {found} for {len(pairs)} pairs, expected a list with a probability each")
    for p, prompt in zip(answer, prompts, strict=True):
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise UserError(
                f"judge {judge.name}: answered {p!r}, expected the probability (0 to 1) that the first answer is the "
                f"better one; prompt: {str(prompt)[:200]}"
            )
    return [float(p) for p in answer]


def _key(judge: Judge, pair: Pair) -> str:
    return hashlib.sha256(json.dumps([judge.name, *pair], sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, float]:
    """The answers in a cache; half a line at its end, left by a kill, is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    try:
        rows = [json.loads(line) for line in content[:whole].splitlines()]
        return {row["key"]: float(row["p"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no cache of a judge's answers; delete it and they are asked for again") from None


def load_judge(spec: dict[str, Any]) -> Judge:
    """The judge that `{function: ...}` or `{http: ...}` describes. Raises UserError on anything else."""
    kind = next((kind for kind in OPTIONS if kind in spec), None)
    if kind is None:
        raise UserError(f"judge: found {spec}, expected {{function: module:function}} or {{http: URL}}")
    for name in spec:
        if name != kind and name not in OPTIONS[kind]:
            near = did_you_mean(name, OPTIONS[kind])
            raise UserError(f"judge: unknown option '{name}' of {kind}.{near} Options: {', '.join(OPTIONS[kind])}")
    for name, least in (("batch_size", 1), ("timeout", 0.001), ("retries", 0)):
        value = spec.get(name, least)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float) if name == "timeout" else int)
            or value < least
        ):
            raise UserError(f"judge: {name} is {value!r}, expected a number from {least} up")
    if kind == "function":
        return Judge(spec["function"], _function(spec["function"]), spec.get("batch_size", 64))
    ask = _service(spec["http"], spec.get("timeout", 60), spec.get("retries", 5), spec.get("token_env"))
    return Judge(spec["http"].partition("?")[0], ask, spec.get("batch_size", 16), IN_FLIGHT)


def _function(path: str) -> Callable[..., Any]:
    module_name, colon, name = str(path).partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"judge: function '{path}' should be written module:function")
    return import_function(module_name, name, "judge")


def _service(url: str, timeout: float, retries: int, token_env: str | None) -> Callable[..., Any]:
    """Asks the service at `url`; what fails is tried again."""
    check_url(url, "judge")
    service = Service("judge", url, timeout, retries, read_token(token_env, "judge"))

    def asking(prompts: list, first: list[str], second: list[str]) -> Any:
        content = {"prompts": prompts, "first": first, "second": second}
        answer = ask(service, content, f"judge {len(prompts)} pairs")
        try:
            return answer.json()["probabilities"]
        except (ValueError, KeyError, TypeError):
            expected = '{"probabilities": [numbers]}'
            raise UserError(f"{service} answered {answer.excerpt(service)}, expected {expected}") from None

    return asking
