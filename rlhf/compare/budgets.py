"""What each trial has cost, from the foundation on: its own training, the reward model it used, the pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf.compare.results import Results
from rlhf.compare.selection import program

USES_REWARD = ("ppo", "best_of_n")  # programs that learn from, or choose by, a reward model


def budget(results: Results) -> dict[str, Any]:
    """Rows for all trials that have ended, and whether those of the trained methods are matched.

    A row counts the pairs and the reward model in full, as if the trial had been the only one: they are shared by all
    trials of a seed. `ratio` is total over the experiment's total, mean over seeds, `ratio_own` the trial alone over
    it, `furthest` the ratio of the seed that is furthest from 1. `matched`: |ratio - 1| <= tolerance in every seed of
    every trial, and no trial has spent more than 1 + tolerance times another; None if none was to be matched.
    """
    asked = results.meta.get("budget") or {}
    counter, total = asked.get("match"), asked.get("total")
    match = None
    if counter not in (None, "none") and total:
        match = {"match": counter, "total": float(total), "tolerance": float(asked.get("tolerance", 0.1))}
    rows = [_row(results, *trial, match) for trial in _ended(results)]
    deciding = [row for row in rows if not row["baseline"]]
    matched = None
    if match and deciding:
        ratios, tolerance = [r for row in deciding for r in (row["ratio"], row["furthest"])], match["tolerance"]
        matched = None not in ratios and max(abs(r - 1) for r in ratios) <= tolerance
        matched = matched and max(ratios) <= (1 + tolerance) * min(ratios)
    return {"match": match, "rows": rows, "matched": matched}


def _ended(results: Results) -> list[tuple[str, float | None]]:
    initial = results.initial.method
    found = {(p.method, p.swept) for p in results.points if p.last and p.seed is not None and p.method != initial}
    return sorted(found, key=lambda t: (list(results.methods).index(t[0]), t[1] or 0.0))


def _row(results: Results, method: str, swept: float | None, match: dict[str, Any] | None) -> dict[str, Any]:
    own = mean_of([p.budget for p in results.of(method, swept) if p.last])
    uses_reward = program(results, method) in USES_REWARD
    reward = dict(results.shared_budget.get("reward", {})) if uses_reward else {}
    pairs = dict(results.shared_budget.get("pairs", {}))
    total = add([own, reward, pairs])
    row = {
        "method": method,
        "swept": swept,
        "baseline": bool(results.methods.get(method, {}).get("baseline")),
        "own": own,
        "reward": reward,
        "pairs": pairs,
        "total": total,
        "ratio": None,
        "ratio_own": None,
        "furthest": None,
    }
    if match and match["match"] in total:
        row["ratio"] = total[match["match"]] / match["total"]
        row["ratio_own"] = own.get(match["match"], 0.0) / match["total"]
        shared = (row["ratio"] - row["ratio_own"]) * match["total"]
        each = [p.budget.get(match["match"], 0.0) for p in results.of(method, swept) if p.last]
        row["furthest"] = max(((x + shared) / match["total"] for x in each), key=lambda r: abs(r - 1))
    return row


def mean_of(numbers: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over those that have it."""
    names = dict.fromkeys(name for n in numbers for name in n)
    return {name: float(np.mean([n[name] for n in numbers if name in n])) for name in names}


def add(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sum of each counter; of memory the peak, since the parts run one after the other."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            before = total.get(name, 0.0)
            total[name] = float(max(before, value) if "memory" in name else before + value)
    return total
