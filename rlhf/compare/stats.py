"""Means, differences and win rates with intervals, where the unit is the group.

Rows are evaluation rows: anything with `.group`, `.prompt` (text or messages) and what `value(row)` reads.
Samples of a prompt and prompts of a group are not independent, so the samples are averaged within each prompt, the
prompts within each group, and the intervals are over groups (rlhf/stats.py). Each group counts once, however many rows
it has; with one group there is no interval (nan).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.stats import jackknife_interval

Value = Callable[[Any], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, its standard error (of the mean over groups) and the number of groups."""

    estimate: float
    low: float
    high: float
    se: float
    groups: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: nan becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def mean_interval(
    rows: Sequence, value: Value, *, bounds: tuple[float, float] | None = None, level: float = 0.95
) -> Interval:
    """Return the mean of `value` over groups; bounds: (0, 1) for a share."""
    return interval_of_mean(group_means(rows, value), bounds=bounds, level=level)


def mean_se(rows: Sequence, value: Value) -> tuple[float, float]:
    """Return the mean over groups and its standard error, clustered by group: sd of the n group means over sqrt(n).

    For the sequence KL, say, with several samples a prompt. With one group the standard error is nan.
    """
    found = mean_interval(rows, value)
    return found.estimate, found.se


def paired_difference(rows_a: Sequence, rows_b: Sequence, value: Value, *, level: float = 0.95) -> Interval:
    """Return the mean over groups of (A's mean - B's mean) of `value`; positive: A is higher.

    Both must cover the same prompts (ValueError otherwise). What makes a prompt hard or easy for both cancels, and so
    does the sampling noise that they share.
    """
    _check_same_prompts(rows_a, rows_b)
    return interval_of_mean(group_means(rows_a, value) - group_means(rows_b, value), level=level)  # sorted by group


def win_rate(
    rows_a: Sequence, rows_b: Sequence, value: Value, *, tie_margin: float = 0.0, level: float = 0.95
) -> Interval | None:
    """Return P(A's answer beats B's) to the same prompt, ties half; 0.5 is a draw. None where it cannot be estimated.

    Sample k of both was drawn with the same noise, so at each prompt sample k of A meets the samples l != k of B alone:
    answers that share their noise are alike where the policies are, and tell how near they stand to each other. With
    one sample there is no such pair. |a - b| <= tie_margin is a tie. Averaged within prompt and group.
    """
    _check_same_prompts(rows_a, rows_b)
    a, b = (_by_group(rows, lambda row: (row.sample, float(value(row)))) for rows in (rows_a, rows_b))
    rates = [[_wins(a[g][p], b[g][p], tie_margin) for p in sorted(a[g])] for g in sorted(a)]
    if any(rate is None for group in rates for rate in group):
        return None
    return interval_of_mean(np.array([np.mean(group) for group in rates]), bounds=(0.0, 1.0), level=level)


def interval_of_mean(values: np.ndarray, *, bounds: tuple[float, float] | None = None, level: float = 0.95) -> Interval:
    """Return the mean of independent `values` (n,) with Student's interval, or the bounded one of a share."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("no groups: nothing to average")
    if not np.all(np.isfinite(values)):
        raise ValueError("a group's mean is not a finite number")
    mean = float(np.mean(values))
    without = (mean * n - values) / (n - 1) if n > 1 else values
    return Interval(mean, *jackknife_interval(mean, without, bounds=bounds, level=level), n)


def group_means(rows: Sequence, value: Value) -> np.ndarray:
    """(groups,) means of `value`, sorted by group: over the samples of a prompt, then over the prompts of the group."""
    table = _by_group(rows, lambda row: float(value(row)))
    return np.array([np.mean([np.mean(table[g][p]) for p in sorted(table[g])]) for g in sorted(table)])


def prompt_key(prompt: Any) -> str:
    """A prompt (text or messages) as one text, the same for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _by_group(rows: Sequence, item: Callable[[Any], Any]) -> dict[str, dict[str, list]]:
    """group -> prompt -> its items, sorted so that the order of rows cannot matter to the last bit."""
    table: dict[str, dict[str, list]] = {}
    for row in rows:
        table.setdefault(row.group, {}).setdefault(prompt_key(row.prompt), []).append(item(row))
    return {g: {p: sorted(items) for p, items in prompts.items()} for g, prompts in table.items()}


def _check_same_prompts(rows_a: Sequence, rows_b: Sequence) -> None:
    a, b = ({(r.group, prompt_key(r.prompt)) for r in rows} for rows in (rows_a, rows_b))
    if a != b:
        raise ValueError(f"the rows do not cover the same prompts: {len(a - b)} only in A, {len(b - a)} only in B")


def _wins(a: list[tuple[int, float]], b: list[tuple[int, float]], tie_margin: float) -> float | None:
    """The share of the pairs with independent noise that A wins at one prompt, None without any; (sample, value)."""
    differences = np.array([x - y for k, x in a for other, y in b if k != other])
    if not len(differences):
        return None
    return float(np.mean((differences > tie_margin) + 0.5 * (np.abs(differences) <= tie_margin)))
