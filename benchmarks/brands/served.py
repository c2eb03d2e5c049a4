"""Ask two brands' adapters by name, as `rlhf serve RUN RUN` serves them with their base.

Part of `python -m benchmarks.brands.two_brands --real`; needs the openai client.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.programs import serving
from rlhf.data.store import Store
from rlhf.files import write_atomic

# of each brand, the first of its test prompts
PROMPTS = 16
# users at a time
THREADS = 96
Rows = list[dict[str, Any]]


def served_answers(
    runs: Sequence[str], stores: Mapping[str, Path], file: Path, sampling: Mapping[str, Any]
) -> Rows:
    """Return what each served name answers to the test prompts, asked once and kept in `file`.

    stores: voice -> a store with its test prompts. sampling: max_response_length and temperature.
    """
    if not file.is_file():
        asked: Rows = []
        for voice, path in stores.items():
            asked += first_prompts(voice, path)
        with serving(runs) as (client, _):
            found = ask(client, asked, sampling)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        write_atomic(file, "".join(lines))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def first_prompts(voice: str, path: Path) -> Rows:
    """Return the first prompts of a store: {voice, prompt, messages, metadata}."""
    with Store.open(path, readonly=True) as store:
        prompts = {answer["prompt"]: answer for answer in store.at().answers()}
    found = []
    for number, answer in itertools.islice(prompts.items(), PROMPTS):
        own = {name: answer[name] for name in ("messages", "metadata")}
        found.append({"voice": voice, "prompt": number, **own})
    return found


def ask(client: Any, asked: Rows, sampling: Mapping[str, Any]) -> Rows:
    """Put every prompt to every served name; return {voice, prompt, ..., model, text, ended}.

    A prompt has the same seed with each name, so that the name is all that differs.
    """
    names = [card.id for card in client.models.list()]

    def answer(prompt: dict[str, Any], name: str) -> dict[str, Any]:
        choice = client.chat.completions.create(
            model=name,
            messages=prompt["messages"],
            max_tokens=sampling["max_response_length"],
            temperature=sampling["temperature"],
            seed=prompt["prompt"],
        ).choices[0]
        ended = choice.finish_reason == "stop"
        return {**prompt, "model": name, "text": choice.message.content, "ended": ended}

    # at once, as several users do: the server has to keep the names apart
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(answer, *zip(*itertools.product(asked, names), strict=True)))
