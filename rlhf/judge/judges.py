"""A language model as a judge of pairs and as a scorer of single answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.judge.client import Client
from rlhf.judge.spec import EndpointSpec, ScoreSpec

# probability that the first of two answers is the better one; None: the model gave no verdict
Prefer = Callable[[list, list[str], list[str]], list[float | None]]


def pair_judge(spec: EndpointSpec, where: str = "judge", cache: Path | None = None):
    """Return a judge of pairs, a function `Prefer`, and its client; `cache`: file of answers where
    the specification names none.
    """
    client = Client(spec, where, cache)

    def prefer(prompts: list, first: list[str], second: list[str]) -> list[float | None]:
        texts = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            texts.append(client.question.text(prompt, first=one, second=other))
        return [reply.value for reply in client.ask(texts, f"{spec.model} judges")]

    return prefer, client


def score_answers(client: Client, prompts: list[Any], responses: list[str]) -> list[float | None]:
    """Return the score from 1 to `highest` of each response; None where the model gave none."""
    assert isinstance(client.spec, ScoreSpec)
    texts = []
    for prompt, response in zip(prompts, responses, strict=True):
        texts.append(client.question.text(prompt, response=response))
    return [reply.value for reply in client.ask(texts)]
