"""What was measured, of an experiment or of single runs: one `Point` for each policy, all on the
same prompts.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rlhf.compare.text_metrics import repetition, variety
from rlhf.errors import UserError
from rlhf.stats import group_means
from rlhf.stats.best_of_n import best_of_n_kl

# what identifies a policy: method, swept value, seed, step
Key = tuple[str, float | None, int | None, int]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy: a checkpoint of a trial, a baseline, or the initial policy itself.

    method: the name in the experiment's file ("dpo", "ppo", "best_of_n") or of the run; "sft" for
    the initial policy.
    swept: the value of the option that varies; None where none does.
    seed: the run seed; None for the initial policy, which has none.
    step: of training; n for the best of n. last: whether it is the end of its trial.
    values: a (prompts, samples) array for each measure of a response, all points in the same order
    of prompts: "kl" (nats, to the initial policy), "score/<name>", "length" (tokens), "words",
    "ended" (0 or 1), "repetition" (share).
    numbers: what is one number for the whole policy: "distinct_1", "distinct_2" (of all responses),
    "perplexity/sft" and "perplexity/<domain>" of held-out texts.
    budget: counters of the trial alone, up to this step.
    noise: of each sample, the draws of sampling noise behind it; None: sample k has draw k.
    responses: the texts by prompt and sample; None where they were not kept.
    """

    method: str
    swept: float | None
    seed: int | None
    step: int
    last: bool
    values: dict[str, np.ndarray]
    numbers: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    noise: list[range] | None = None
    responses: list[list[str]] | None = None


def key(point: Point) -> Key:
    """Return what identifies a policy."""
    return point.method, point.swept, point.seed, point.step


@dataclass(frozen=True, kw_only=True)
class Results:
    """All points of an experiment, or of the runs of a comparison, and what they were measured on.

    kind: "runs" where each method is one run with one nominal seed.
    groups: the group of each prompt. prompts: text or messages.
    score_kinds: score name -> gold, referee, proxy or other. judge: the score that decides.
    methods: name -> {"program", "swept" (name of the option), "swept_values", "baseline": bool,
    "options"}.
    shared_budget: part ("pairs", "reward") -> counters, mean over seeds.
    meta: configs, commits, versions, fingerprints, hardware: all that is needed to repeat it.
    """

    kind: Literal["experiment", "runs"] = "experiment"
    points: list[Point]
    groups: list[str]
    prompts: list[Any]
    score_kinds: dict[str, str]
    judge: str | None
    methods: dict[str, dict[str, Any]]
    shared_budget: dict[str, dict[str, float]]
    meta: dict[str, Any]

    @property
    def initial(self) -> Point:
        """The policy that all methods start from, without the scores of the seeds' own reward
        models (proxies).
        """
        return next(point for point in self.points if point.seed is None)

    def initial_of(self, seed: int | None) -> Point:
        """Return the initial policy's responses as this seed's reward model scored them too, where
        it did.

        A proxy has another scale in each seed, so differences of a proxy are taken to this one.
        """
        return next(iter(self.of(self.initial.method, seed=seed)), self.initial)

    def of(self, method: str, swept: float | None = None, seed: int | None = None) -> list[Point]:
        """Return the points of a method, by swept value, seed and step; of one swept value or seed
        where given.
        """
        found = []
        for point in self.points:
            # None means all
            is_wanted = swept in (None, point.swept) and seed in (None, point.seed)
            if point.method == method and is_wanted:
                found.append(point)
        return sorted(found, key=lambda point: (point.swept or 0.0, point.seed or 0, point.step))

    def ends(self, method: str, swept: float | None = None) -> list[Point]:
        """Return the ends of the trials of a method, as `of` orders them; the initial policy has
        none.
        """
        return [point for point in self.of(method, swept) if point.last and point.seed is not None]

    def measured_methods(self) -> list[str]:
        """Return all methods with points but the initial policy, as the experiment's file orders
        them.
        """
        # of the initial policy there may be a point for each seed, scored by its own proxy
        trained = {point.method for point in self.points if point.seed is not None}
        trained.discard(self.initial.method)
        return [name for name in self.methods if name in trained]

    def swept_values(self, method: str) -> list[float | None]:
        """Return the swept values that a method has points of, in order; [None] where nothing is
        swept.
        """
        return list(dict.fromkeys(point.swept for point in self.of(method)))

    def program(self, method: str) -> str:
        """Return the program that trained a method: "ppo", "dpo", "best_of_n"."""
        return self.methods.get(method, {}).get("program", method)

    @cached_property
    def means(self) -> dict[Key, dict[str, np.ndarray]]:
        """The (groups,) means of all measures of all points.

        The KL of the best of n is `best_of_n_kl`; it has no log-probabilities of its own.
        """
        means = {}
        for point in self.points:
            own = {name: self.group_means(values) for name, values in point.values.items()}
            if self.program(point.method) == "best_of_n" and point.swept is not None:
                own["kl"] = np.full_like(own["kl"], best_of_n_kl(point.swept))
            means[key(point)] = own
        return means

    def stack(self, measure: str, rows: Iterable[Iterable[Point]]) -> np.ndarray:
        """Return (S, M, G) group means of a measure; rows: for each seed its M points."""
        stacked = []
        for row in rows:
            stacked.append([self.means[key(point)][measure] for point in row])
        return np.array(stacked)

    def group_means(self, values: np.ndarray) -> np.ndarray:
        """Return (groups,) means of `values` (prompts, samples): over samples, then over the
        prompts of each group.

        Groups are sorted by name, so that the order is the same for all points.
        """
        per_prompt = np.asarray(values, dtype=np.float64).mean(axis=1)
        return group_means(per_prompt, self.groups)


def seeds_of(points: Iterable[Point]) -> list[int]:
    """Return the seeds of policies, in order; the initial policy has none."""
    return sorted({point.seed for point in points if point.seed is not None})


def mean_of(numbers: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each name over those that have it."""
    table: dict[str, list[float]] = {}
    for own in numbers:
        for name, value in own.items():
            table.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in table.items()}


def independent_pairs(a: Point, b: Point) -> list[tuple[int, int]]:
    """Return the pairs (sample of a, sample of b) that share no draw of sampling noise, in order.

    All policies are measured with the same draws. Answers that share one are alike where the
    policies are, so their outcome tells how near the policies are to each other; P(a's answer
    beats b's) is estimated from these pairs.
    """
    draws = []
    for point in (a, b):
        samples = next(iter(point.values.values())).shape[1]
        # where none are listed, sample k has draw k
        draws.append(point.noise or [range(k, k + 1) for k in range(samples)])

    pairs = []
    for k, of_a in enumerate(draws[0]):
        for m, of_b in enumerate(draws[1]):
            if set(of_a).isdisjoint(of_b):
                pairs.append((k, m))
    return pairs


def measured_point(
    rows: Sequence[dict[str, Any]],
    scores: Sequence[str],
    prompts: int,
    numbers: dict[str, float],
    **about: Any,
) -> Point:
    """Return a policy from its responses, with these scores of each; `about` has the other fields.

    rows: {"prompt" (its number), "sample", "response", "length", "ended", "kl", "scores"}, one for
    each response. numbers: those of the policy beside the variety of its responses.
    """
    samples = 1 + max(row["sample"] for row in rows)
    measures = ["kl", "length", "words", "ended", "repetition"]
    measures += [f"score/{name}" for name in scores]
    # a response that is missing stays nan
    values = {name: np.full((prompts, samples), math.nan) for name in measures}
    texts = np.full((prompts, samples), "", dtype=object)
    for row in rows:
        cell = row["prompt"], row["sample"]
        for name in ("kl", "length", "ended"):
            values[name][cell] = row[name]
        values["words"][cell] = len(row["response"].split())
        values["repetition"][cell] = repetition(row["response"])
        for name in scores:
            values[f"score/{name}"][cell] = row["scores"][name]
        texts[cell] = row["response"]
    numbers = numbers | variety([row["response"] for row in rows])
    return Point(values=values, numbers=numbers, responses=texts.tolist(), **about)


def prompt_key(prompt: Any) -> str:
    """Return a prompt (text or messages) as one text, the same for equal prompts."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def check_finite(rows: dict[str, list], kinds: dict[str, str]) -> None:
    """Raise UserError where a response has a score or a KL that is not a finite number."""
    for run, own in rows.items():
        found = {"KL": [row.kl for row in own]}
        for name in kinds:
            found[f"score '{name}'"] = [row.scores.get(name, math.nan) for row in own]
        for name, values in found.items():
            bad = np.count_nonzero(~np.isfinite(values))
            if bad:
                raise UserError(
                    f"compare: {bad} of {len(own)} responses of '{run}' have no finite {name}"
                )
