"""Does the proxy go on rising where the judge falls? (Gao et al. 2022, 2210.10760; for DPO Rafailov et al., 2406.02900)

Along a method's points, the foundation first, by KL: the judge's mean has a peak somewhere. Two differences are asked,
both between the point of the largest KL and the judge's peak: the judge's own (does it fall?) and the proxy's (does it
rise all the same?). The peak is chosen on other groups and seeds than those it is scored on (selection.py);
chosen on the same ones, the judge would seem to fall even where it is flat: in 12 to 16 % of simulated experiments (3
to 10 seeds, 13 points), against 4 % with the halves and 2.5 % that a 95 % interval promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.compare.crossed import MIN_SEEDS, side
from rlhf.compare.results import Point, Results
from rlhf.compare.selection import (
    Means,
    choose,
    chosen_mean,
    halves,
    key,
    methods_with_points,
    rectangle,
    stack,
    take,
)

FEWEST = 2  # points beside the foundation: with one there is nothing between the start and the end


def overoptimisation(results: Results, means: Means, level: float) -> list[dict[str, Any]]:
    """One entry for each method along all its points (strength None) and for each strength along its checkpoints.

    Each has the two differences as estimates, the peak, and one p for both together: the larger of the two, since both
    have to be shown. `add_verdicts` says what follows for the methods; single strengths are shown without a verdict.
    """
    assert results.judge is not None
    proxies = [name for name, kind in results.score_kinds.items() if kind == "proxy"]
    entries = []
    for method in methods_with_points(results):
        swept_values = sorted({p.swept for p in results.of(method)}, key=lambda s: s or 0.0)
        for swept in [None, *(swept_values if len(swept_values) > 1 else [])]:
            for proxy in proxies or [None]:
                entry = _entry(results, means, method, swept, proxy, level)
                if entry is not None:
                    entries.append(entry)
    return entries


def _entry(
    results: Results, means: Means, method: str, swept: float | None, proxy: str | None, level: float
) -> dict[str, Any] | None:
    judge = f"score/{results.judge}"
    table: dict[int, dict[tuple, Point]] = {}
    for p in results.of(method, swept):
        if proxy is None or f"score/{proxy}" in p.values:
            table.setdefault(p.seed, {})[p.swept, p.step] = p
    seeds, names = rectangle(table)
    if len(names) < FEWEST:
        return None
    rows = [[key(results.initial_of(s)), *(key(table[s][name]) for name in names)] for s in seeds]
    if proxy is not None and any(f"score/{proxy}" not in means[row[0]] for row in rows):
        rows = [row[1:] for row in rows]  # the proxy's scores of the foundation are not known: its points alone
    else:
        names = [(None, 0), *names]
    scores, kl = stack(means, judge, rows), stack(means, "kl", rows)
    half = halves(results.groups)
    peak, end = choose(scores, half), choose(kl, half)
    change = None
    if proxy is not None:
        proxies = stack(means, f"score/{proxy}", rows)
        change = chosen_mean(take(proxies, end) - take(proxies, peak), len(names), level).to_dict()
    fall = chosen_mean(take(scores, end) - take(scores, peak), len(names), level).to_dict()
    rise = chosen_mean(take(scores, peak) - means[key(results.initial)][judge], len(names), level).to_dict()
    kls = kl.mean(axis=(0, 2))
    optimised = proxy is not None and learns(results, method)
    both = [fall["p"], (change if optimised else rise)["p"]]
    at = int(np.bincount(peak.ravel(), minlength=len(names)).argmax())
    return {
        "method": method,
        "swept": swept,
        "proxy": None if proxy is None else {"name": proxy, "change": change, "optimised": optimised},
        "judge": fall,  # at the largest KL, over its peak
        "rise": rise,  # at its peak, over the foundation
        "p": None if None in both else max(both),
        "p_adjusted": None,
        "peak": {"swept": names[at][0], "step": names[at][1], "kl": float(kls[at])},  # the one chosen most often
        "end": {"kl": float(kls.max())},
        "ends_at_peak": float(np.mean(peak == end)),  # share of cells whose peak is the end itself
        "seeds": seeds,
        "points": len(names),
    }


def learns(results: Results, method: str) -> bool:
    """Whether a method learns from the reward model: PPO and best of n do, DPO learns from the pairs."""
    return results.methods[method].get("program") != "dpo"


def add_verdicts(entries: list[dict[str, Any]], alpha: float) -> None:
    """The verdict of each entry: reproduced, not reproduced or undecided; None for a strength alone.

    Reproduced: the judge falls from its peak and the proxy rises, both beyond chance. Not reproduced: the judge falls
    and the proxy falls with it; a judge that is highest at the largest KL may still fall beyond it. The judge's fall
    alone is asked for without a proxy, and of a method that does not learn from it, provided that the judge had risen
    before: what DPO exploits is its own loss, and 2406.02900 shows how the judge rises and then falls against KL. With
    fewer than MIN_SEEDS seeds all is undecided.
    """
    for e in entries:
        optimised = bool(e["proxy"]) and e["proxy"]["optimised"]
        shown = e["p_adjusted"] is not None and e["p_adjusted"] < alpha
        fell, rose = side(e["judge"]), side(e["proxy"]["change"] if optimised else e["rise"])
        if e["swept"] is not None:
            e["verdict"] = None
        elif len(e["seeds"]) < MIN_SEEDS:
            e["verdict"] = "undecided"
        elif shown and fell < 0 and rose > 0:
            e["verdict"] = "reproduced"
        elif shown and fell < 0 and rose < 0:
            e["verdict"] = "not reproduced"
        else:
            e["verdict"] = "undecided"
