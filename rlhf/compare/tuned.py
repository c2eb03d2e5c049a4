"""Each method at its best strength, where the best was chosen on other groups and seeds than those it is scored on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np

from rlhf.compare.crossed import MIN_SEEDS, Estimate, crossed_mean
from rlhf.compare.power import detectable, needed_seeds
from rlhf.compare.results import Results
from rlhf.compare.selection import (
    Means,
    choose,
    chosen_mean,
    ended,
    halves,
    key,
    methods_with_points,
    rectangle,
    stack,
    take,
)


def tuned(results: Results, means: Means, level: float) -> dict[str, Any]:
    """Each method at its tuned strength against the foundation and the others; p_adjusted is still to be added.

    Intervals hold the choice of the strengths (`chosen_mean`). The methods stand at their own KL, so this is no
    comparison at equal KL.
    """
    tables = {m: ended(results, m) for m in methods_with_points(results)}
    methods, rows = {}, []
    for method, table in tables.items():
        seeds, swept_values = rectangle(table)
        if seeds:
            methods[method] = _method(results, means, table, seeds, swept_values, level)
    initial = results.initial
    base = means[key(initial)][f"score/{results.judge}"]
    for a, b in itertools.combinations(methods, 2):
        rows += _pair(results, means, a, b, tables, level)
    for a in methods:
        seeds, swept_values = rectangle(tables[a])
        values = _chosen(results, means, tables[a], seeds, swept_values)[0] - base
        rows.append(_compared(a, initial.method, values, len(swept_values), level))
    return {"methods": methods, "rows": rows}


def _chosen(
    results: Results, means: Means, table: dict, seeds: list[int], swept_values: list
) -> tuple[np.ndarray, ...]:
    """(S, G) judge and KL at the chosen strengths, and the choices."""
    rows = [[table[s][x] for x in swept_values] for s in seeds]
    scores = stack(means, f"score/{results.judge}", rows)
    choice = choose(scores, halves(results.groups))
    return take(scores, choice), take(stack(means, "kl", rows), choice), choice


def _method(
    results: Results, means: Means, table: dict, seeds: list[int], swept_values: list, level: float
) -> dict[str, Any]:
    scores, kl, choice = _chosen(results, means, table, seeds, swept_values)
    half = halves(results.groups)
    by_half = [Counter(choice[:, half == h].ravel().tolist()) for h in (0, 1)]
    often = Counter(choice.ravel().tolist())
    return {
        "chosen": [swept_values[c.most_common(1)[0][0]] for c in by_half if c],  # for each half, most often over seeds
        "usual": swept_values[often.most_common(1)[0][0]],
        "shares": {str(swept_values[i]): n / choice.size for i, n in sorted(often.items())},
        "swept_values": swept_values,
        "seeds": seeds,
        "score": chosen_mean(scores, len(swept_values), level).to_dict(),
        "kl": chosen_mean(kl, len(swept_values), level).to_dict(),
    }


def _pair(results: Results, means: Means, a: str, b: str, tables: dict, level: float) -> list[dict[str, Any]]:
    """No row if no seed has both."""
    blocks = {m: rectangle(tables[m]) for m in (a, b)}
    seeds = sorted(set(blocks[a][0]) & set(blocks[b][0]))
    if not seeds:
        return []
    scores = [_chosen(results, means, tables[m], seeds, blocks[m][1])[0] for m in (a, b)]
    choices = max(len(blocks[m][1]) for m in (a, b))
    return [_compared(a, b, scores[0] - scores[1], choices, level)]


def _compared(a: str, b: str, values: np.ndarray, choices: int, level: float) -> dict[str, Any]:
    estimate = chosen_mean(values, choices, level)
    row = {"a": a, "b": b, "difference": estimate.to_dict(), **minimum_detectable_effect(estimate, level)}
    row |= {"seeds_for_half": None, "seeds_for_half_range": None}
    effect = row["minimum_detectable_effect"]
    if effect and len(values) >= MIN_SEEDS:
        wider = estimate.se / max(crossed_mean(values).se, 1e-300)  # what the choice adds
        half, *ends = needed_seeds(values, effect / 2 / wider, level=level)
        row |= {"seeds_for_half": half, "seeds_for_half_range": ends}
    return row


def minimum_detectable_effect(estimate: Estimate, level: float) -> dict[str, Any]:
    """Return the difference that would be shown in 4 of 5 repeats, and its range; None where there is no interval."""
    least, *ends = detectable(estimate, level=level)
    known = math.isfinite(least)
    return {
        "minimum_detectable_effect": least if known else None,
        "minimum_detectable_effect_range": ends if known else None,
    }
