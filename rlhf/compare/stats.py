"""Means, differences and win rates with intervals, where the unit is the group. Pure numpy.

Rows are evaluation rows: anything with `.group`, `.prompt` (text or messages) and what `value(row)` reads. Samples of
a prompt and prompts of a group are not independent, so the samples are averaged within each prompt, the prompts within
each group, and only groups are resampled. Each group counts once, however many rows it has.

Intervals are percentile intervals of the bootstrap, expanded for the number of groups (Hesterberg 2015, "What teachers
should know about the bootstrap", section 4.3): with n groups the quantile at alpha/2 moves to
Phi(-sqrt(n/(n-1)) t_{1-alpha/2, n-1}), since the plain interval is too narrow by about that factor. For two to five
groups all n^n resamples are enumerated; with one group there is no interval (nan).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

NORMAL = NormalDist()
ENUMERATE_UP_TO = 5  # groups: 5^5 = 3125 resamples
CHUNK = 4_000_000  # resampled indices held at a time

Value = Callable[[Any], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, its standard error (of the mean over groups) and the number of groups."""

    estimate: float
    low: float
    high: float
    se: float
    groups: int

    def above(self, x: float) -> bool:
        """True if the whole interval lies above x."""
        return self.low > x

    def below(self, x: float) -> bool:
        """True if the whole interval lies below x."""
        return self.high < x

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: nan becomes None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def mean_interval(
    rows: Sequence, value: Value, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `value` over groups, with its bootstrap interval."""
    return bootstrap(group_means(rows, value), level=level, resamples=resamples, seed=seed)


def mean_se(rows: Sequence, value: Value) -> tuple[float, float]:
    """Mean over groups and its standard error, clustered by group: sd of the n group means (n - 1) over sqrt(n).

    For the sequence KL, say, with several samples a prompt. With one group the standard error is nan.
    """
    means = group_means(rows, value)
    return float(np.mean(means)), _standard_error(means)


def paired_bootstrap(
    rows_a: Sequence, rows_b: Sequence, value: Value, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over groups of (A's mean - B's mean) of `value`; positive: A is higher.

    Both must cover the same prompts (ValueError otherwise); a resample draws a group for both at once, so what makes
    a prompt hard or easy for both cancels.
    """
    _check_same_prompts(rows_a, rows_b)
    differences = group_means(rows_a, value) - group_means(rows_b, value)  # both sorted by group
    return bootstrap(differences, level=level, resamples=resamples, seed=seed)


def win_rate(
    rows_a: Sequence,
    rows_b: Sequence,
    value: Value,
    *,
    tie_margin: float = 0.0,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Share of comparisons that A wins over B, ties half; 0.5 is a draw.

    At each prompt every sample of A meets every sample of B; |a - b| <= tie_margin is a tie. Averaged within prompt
    and group. Where every group is won outright (or lost) the bootstrap sees no variance; the bound then is the exact
    binomial one, (alpha/2)^(1/n).
    """
    _check_same_prompts(rows_a, rows_b)
    a, b = _by_group(rows_a, value), _by_group(rows_b, value)
    rates = np.array(
        [np.mean([_wins(a[g][p], b[g][p], tie_margin) for p in sorted(a[g])]) for g in sorted(a)], dtype=np.float64
    )
    interval = bootstrap(rates, level=level, resamples=resamples, seed=seed)
    if len(rates) > 1 and np.all(rates == rates[0]) and rates[0] in (0.0, 1.0):
        bound = ((1 - level) / 2) ** (1 / len(rates))
        low, high = (bound, 1.0) if rates[0] == 1.0 else (0.0, 1.0 - bound)
        return Interval(interval.estimate, low, high, interval.se, interval.groups)
    return interval


def bootstrap(values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of independent `values` (n,) with its expanded percentile interval; the same for the same seed."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("no groups: nothing to average")
    if not np.all(np.isfinite(values)):
        raise ValueError("a group's mean is not a finite number")
    estimate, se = float(np.mean(values)), _standard_error(values)
    if n == 1:
        return Interval(estimate, math.nan, math.nan, se, n)
    means = _resampled_means(values, resamples, seed)
    t = student_quantile(0.5 + level / 2, n - 1)
    tail = NORMAL.cdf(-math.sqrt(n / (n - 1)) * t)
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    # of equal values the resampled means differ from the estimate by rounding alone
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), se, n)


def group_means(rows: Sequence, value: Value) -> np.ndarray:
    """(groups,) means of `value`, sorted by group: over the samples of a prompt, then over the prompts of the group."""
    table = _by_group(rows, value)
    return np.array([np.mean([np.mean(table[g][p]) for p in sorted(table[g])]) for g in sorted(table)])


def prompt_key(prompt: Any) -> str:
    """A prompt (text or messages) as one text, the same for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def student_quantile(p: float, df: float) -> float:
    """The quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _by_group(rows: Sequence, value: Value) -> dict[str, dict[str, np.ndarray]]:
    """group -> prompt -> its samples' values, sorted so that the order of rows cannot matter to the last bit."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        table.setdefault(row.group, {}).setdefault(prompt_key(row.prompt), []).append(float(value(row)))
    return {g: {p: np.sort(np.array(v)) for p, v in prompts.items()} for g, prompts in table.items()}


def _check_same_prompts(rows_a: Sequence, rows_b: Sequence) -> None:
    a, b = ({(r.group, prompt_key(r.prompt)) for r in rows} for rows in (rows_a, rows_b))
    if a != b:
        raise ValueError(f"the rows do not cover the same prompts: {len(a - b)} only in A, {len(b - a)} only in B")


def _wins(a: np.ndarray, b: np.ndarray, tie_margin: float) -> float:
    difference = a[:, None] - b[None, :]
    return float(np.mean((difference > tie_margin) + 0.5 * (np.abs(difference) <= tie_margin)))


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    n = len(values)
    if n <= ENUMERATE_UP_TO:
        return values[np.array(list(itertools.product(range(n), repeat=n)))].mean(axis=1)
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return np.concatenate([values[rng.integers(0, n, (size, n), dtype=np.int32)].mean(axis=1) for size in sizes])
