"""Choices that do not judge themselves: what is chosen on some groups and seeds is scored on the others.

The highest of several noisy means is too high on the data that chose it. Here each cell (seed, group) is scored at the
choice that the other half of the groups made and, from three seeds on, the other half of the seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf.compare.crossed import MIN_SEEDS, Estimate, crossed_mean
from rlhf.compare.results import Point, Results

CHOICE = 0.36  # what a choice adds to the variance of the mean at most, as a share of it: `chosen_mean`

Key = tuple[str, float | None, int | None, int]
Means = dict[Key, dict[str, np.ndarray]]  # policy -> measure -> (groups,)


def key(point: Point) -> Key:
    """How a policy is named: method, strength, seed, step."""
    return point.method, point.swept, point.seed, point.step


def tabulate(results: Results) -> Means:
    """The group means of all measures of all points. The KL of the best of n is log n - (n - 1) / n (Stiennon et al.
    2020, appendix G.3), which bounds it from above; it has no log-probabilities of its own."""
    means = {key(p): {name: results.group_means(v) for name, v in p.values.items()} for p in results.points}
    for p in results.points:
        if program(results, p.method) == "best_of_n" and p.swept is not None:
            exact = np.log(p.swept) - (p.swept - 1) / p.swept
            means[key(p)]["kl"] = np.full(len(set(results.groups)), exact)
    return means


def program(results: Results, method: str) -> str:
    return results.methods.get(method, {}).get("program", method)


def methods_with_points(results: Results) -> list[str]:
    """All methods but the foundation, as the experiment's file orders them."""
    found = {p.method for p in results.points if p.seed is not None and p.method != results.initial.method}
    return [name for name in results.methods if name in found]


def label(results: Results, method: str, swept: float | None) -> str:
    option = results.methods.get(method, {}).get("swept")
    return method if swept is None else f"{method} {option} {swept:g}"


def halves(groups: Iterable[str]) -> np.ndarray:
    """(groups,) 0 or 1 for each group, in the order of their names: by the hash of the name, equal in size."""
    names = sorted(set(groups))
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    half = np.empty(len(names), dtype=int)
    half[order] = np.arange(len(names)) % 2
    return half


def choose(values: np.ndarray, half: np.ndarray) -> np.ndarray:
    """(S, G) for each cell the index of the highest mean of `values` (S, M, G) on the other half of groups and seeds.

    Every second seed makes a half. With fewer than MIN_SEEDS seeds the seeds are what the report is about, and all of
    them choose.
    """
    seeds = len(values)
    seed_half = np.arange(seeds) % 2
    choice = np.zeros((seeds, values.shape[2]), dtype=int)
    if values.shape[1] == 1:
        return choice
    for h in np.unique(seed_half):
        others = values if seeds < MIN_SEEDS else values[seed_half != h]
        for g in np.unique(half):
            choice[np.ix_(seed_half == h, half == g)] = np.argmax(others[:, :, half != g].mean(axis=(0, 2)))
    return choice


def take(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """(S, G) of `values` (S, M, G) at the `choice` (S, G) of each cell."""
    return np.take_along_axis(values, choice[:, None, :], axis=1)[:, 0, :]


def chosen_mean(values: np.ndarray, choices: int, level: float) -> Estimate:
    """`crossed_mean` of values (S, G) that `take` has taken from `choices` alternatives, its interval with the choice.

    Two halves choose for each other, X_2 at the best of X_1 and X_1 at the best of X_2. Where the K alternatives are
    alike, independent and normal, with m the expected largest of K standard normals, what is taken of the two halves
    correlates with

        K (m / K)^2 + K (K - 1) (m / (K (K - 1)))^2 = m^2 / (K - 1):    .318, .358, .353, .338 for K = 2, 3, 4, 5

    which no mean square of the layout shows: the variance of their mean is 1 + that times as large. Where one
    alternative is clearly the best the correlation is 0, and the interval up to 17 % too wide.
    """
    return crossed_mean(values, level=level, variance_factor=1 + CHOICE if choices > 1 else 1.0)


def rectangle(table: dict[int, dict[Any, Any]]) -> tuple[list[int], list[Any]]:
    """Seeds and entries such that each seed has each entry: the largest such block, more seeds before more entries.

    table: seed -> what it has. An experiment that was cut short has seeds that lack most of the others' points.
    """
    ranked = sorted(table, key=lambda s: (-len(table[s]), s))
    best: tuple[list[int], list[Any]] = ([], [])
    for count in range(1, len(ranked) + 1):
        seeds = sorted(ranked[:count])
        entries = [e for e in table[ranked[0]] if all(e in table[s] for s in seeds)]
        if entries and count * len(entries) >= len(best[0]) * len(best[1]):
            best = (seeds, entries)
    return best


def ended(results: Results, method: str) -> dict[int, dict[float | None, Key]]:
    """seed -> strength -> the policy at the end of its trial."""
    table: dict[int, dict[float | None, Key]] = {}
    for p in results.of(method):
        if p.last and p.seed is not None:
            table.setdefault(p.seed, {})[p.swept] = key(p)
    return table


def stack(means: Means, measure: str, rows: Sequence[Sequence[Key]]) -> np.ndarray:
    """(S, M, G) group means of a measure, rows: for each seed the keys of its M points."""
    return np.array([[means[k][measure] for k in row] for row in rows])
