"""What was measured, of an experiment or of single runs: one `Point` for each policy, all on the same prompts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlhf.compare.text_metrics import repetition


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy: a checkpoint of a trial, a baseline, or the foundation itself.

    `values` has a (prompts, samples) array for each measure of a response, all points in the same order of prompts:
    "kl" (nats, to the foundation), "score/<name>", "length" (tokens), "words", "ended" (0 or 1), "repetition" (share).
    `numbers` has what is one number for the whole policy: "distinct_1", "distinct_2" (of all responses),
    "perplexity/sft" and "perplexity/<domain>" of held-out texts.
    """

    method: str  # the name in the experiment's file: "dpo", "ppo", "ppo_rloo", "best_of_n"; "sft" for the foundation
    swept: float | None  # the value of the option that varies; None for the foundation
    seed: int | None  # the run seed; None for the foundation, which has none
    step: int  # of training; n for the best of n
    last: bool  # the end of its trial
    values: dict[str, np.ndarray]
    numbers: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)  # of the trial alone, up to this step
    noise: list[range] | None = None  # of each sample, the draws of sampling noise behind it; None: sample k has draw k


@dataclass(frozen=True, kw_only=True)
class Results:
    """All points of an experiment, or of the runs of a comparison, and what they were measured on."""

    kind: Literal["experiment", "runs"] = "experiment"  # runs: a method is one run, with one nominal seed
    points: list[Point]
    groups: list[str]  # (prompts,) the group of each prompt
    prompts: list[Any]  # (prompts,) text or messages
    responses: dict[tuple[str, float | None, int | None, int], list[list[str]]]  # (method, strength, seed, step)
    score_kinds: dict[str, str]  # score name -> gold, referee, proxy or other
    judge: str | None  # the score that decides
    methods: dict[str, dict[str, Any]]  # name -> {"program", "strength" (name of the option), "baseline": bool}
    shared_budget: dict[str, dict[str, float]]  # part ("pairs", "reward") -> counters, mean over seeds
    meta: dict[str, Any]  # configs, commits, versions, fingerprints, hardware: all that is needed to repeat it

    @property
    def initial(self) -> Point:
        """The policy that all methods start from, without the scores of the seeds' own reward models (proxies)."""
        return next(p for p in self.points if p.seed is None)

    def initial_of(self, seed: int | None) -> Point:
        """The same responses of the foundation, scored by this seed's reward model too: a proxy is another scale in
        each seed, so differences of a proxy are taken to this one."""
        return next((p for p in self.points if p.method == self.initial.method and p.seed == seed), self.initial)

    def of(self, method: str, swept: float | None = None, seed: int | None = None) -> list[Point]:
        """The points of a method, by strength, seed and step; narrowed to one strength or one seed where given."""
        found = [p for p in self.points if p.method == method and swept in (None, p.swept) and seed in (None, p.seed)]
        return sorted(found, key=lambda p: (p.swept or 0.0, p.seed or 0, p.step))

    def group_means(self, values: np.ndarray) -> np.ndarray:
        """(groups,) means of a (prompts, samples) array: over samples, then over the prompts of each group.

        Groups are sorted by name, so that the order is the same for all points.
        """
        return group_means(values, self.groups)


def independent_pairs(a: Point, b: Point) -> list[tuple[int, int]]:
    """The pairs (sample of a, sample of b) that share no draw of sampling noise, in order.

    All policies are measured with the same draws. Answers that share one are alike where the policies are, so their
    outcome tells how near the policies stand to each other; P(a's answer beats b's) is estimated from these pairs.
    """
    samples = [next(iter(p.values.values())).shape[1] for p in (a, b)]
    draws = [p.noise or [range(k, k + 1) for k in range(n)] for p, n in zip((a, b), samples, strict=True)]
    every = itertools.product(enumerate(draws[0]), enumerate(draws[1]))
    return [(k, m) for (k, x), (m, y) in every if not set(x) & set(y)]


def group_means(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """(groups,) means of `values` (prompts, samples): samples first, then prompts, groups sorted by name."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    per_prompt = np.asarray(values, dtype=np.float64).mean(axis=1)
    return np.bincount(index, weights=per_prompt, minlength=len(names)) / np.bincount(index, minlength=len(names))


def measured_values(rows: Sequence[dict[str, Any]], scores: Sequence[str], prompts: int) -> dict[str, np.ndarray]:
    """Return measure -> (prompts, samples) of responses; the measures are those of `Point.values`.

    rows: {"prompt" (its number), "sample", "response", "length", "ended", "kl", "scores"}, one for each response.
    """
    samples = 1 + max(row["sample"] for row in rows)
    measures = ["kl", "length", "words", "ended", "repetition", *(f"score/{name}" for name in scores)]
    values = {name: np.full((prompts, samples), math.nan) for name in measures}
    for row in rows:
        cell = row["prompt"], row["sample"]
        for name in ("kl", "length", "ended"):
            values[name][cell] = row[name]
        values["words"][cell] = len(row["response"].split())
        values["repetition"][cell] = repetition(row["response"])
        for name in scores:
            values[f"score/{name}"][cell] = row["scores"][name]
    return values


def response_texts(rows: Sequence[dict[str, Any]], prompts: int) -> list[list[str]]:
    """Return the text of each response, by prompt and sample; rows as in `measured_values`."""
    samples = 1 + max(row["sample"] for row in rows)
    texts = [[""] * samples for _ in range(prompts)]
    for row in rows:
        texts[row["prompt"]][row["sample"]] = row["response"]
    return texts


def prompt_key(prompt: Any) -> str:
    """Return a prompt (text or messages) as one text, the same for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
