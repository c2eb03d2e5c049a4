"""What a method is at its best swept value (`tuned`), and whether the judge falls from its peak while
the proxy goes on rising (`overoptimisation`). What is chosen is not scored by the cells that chose it
(rlhf/stats/choice.py).
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.compare.results import Point, Results, key
from rlhf.report.format import proxies_of
from rlhf.stats.choice import choose, chosen_mean, halves, take
from rlhf.stats.crossed import MIN_SEEDS, crossed_mean, side
from rlhf.stats.power import minimum_detectable_effect, needed_seeds

# an over-optimisation curve needs points beside the initial policy: with one there is nothing
# between start and end
FEWEST = 2


def rectangle(table: dict[int, dict[Any, Any]]) -> tuple[list[int], list[Any]]:
    """Return seeds and entries such that each seed has each entry: the largest such block, more
    seeds before more entries.

    table: seed -> what it has. An experiment that was cut short has seeds that lack most of the
    others' points.
    """
    # seeds with most entries first: those of a block are among the first
    ranked = sorted(table, key=lambda seed: (-len(table[seed]), seed))
    best: tuple[list[int], list[Any]] = ([], [])
    for count in range(1, len(ranked) + 1):
        seeds = sorted(ranked[:count])
        common = set.intersection(*[set(table[seed]) for seed in seeds])
        entries = [entry for entry in table[ranked[0]] if entry in common]
        if entries and count * len(entries) >= len(best[0]) * len(best[1]):
            best = (seeds, entries)
    return best


def ended(results: Results, method: str) -> dict[int, dict[float | None, Point]]:
    """Return seed -> swept value -> the policy at the end of its trial."""
    table: dict[int, dict[float | None, Point]] = {}
    for point in results.ends(method):
        table.setdefault(point.seed, {})[point.swept] = point
    return table


@dataclass(frozen=True)
class Chosen:
    """A method at the swept values that were chosen for each cell; the arrays are (seeds, groups)."""

    # by the judge
    scores: np.ndarray
    # nats
    kl: np.ndarray
    # index into `swept_values`
    choice: np.ndarray
    seeds: list[int]
    swept_values: list[float | None]


def at_best(results: Results, method: str, seeds: Sequence[int] | None = None) -> Chosen | None:
    """Return a method at its best swept values, by all seeds that have the same trials or by these;
    None without seeds.
    """
    table = ended(results, method)
    known, swept_values = rectangle(table)
    seeds = known if seeds is None else list(seeds)
    if not seeds:
        return None
    # the judge chooses; score and KL are read at its choice
    rows = [list(map(table[seed].get, swept_values)) for seed in seeds]
    scores = results.stack(f"score/{results.judge}", rows)
    choice = choose(scores, halves(results.groups))
    kl = take(results.stack("kl", rows), choice)
    return Chosen(take(scores, choice), kl, choice, seeds, swept_values)


def tuned(results: Results, level: float) -> dict[str, Any]:
    """Compare the methods, each at its best swept value, with each other and with the initial
    policy.

    Each method has its own KL, so this is not a comparison at equal KL. `adjust` adds
    p_adjusted to the rows.
    """
    found: dict[str, Chosen] = {}
    for method in results.measured_methods():
        chosen = at_best(results, method)
        if chosen is not None:
            found[method] = chosen

    rows = []
    for a, b in itertools.combinations(found, 2):
        seeds = sorted(set(found[a].seeds) & set(found[b].seeds))
        if seeds:
            sides = at_best(results, a, seeds), at_best(results, b, seeds)
            rows.append(_difference(a, b, *sides, level))
    initial = results.means[key(results.initial)]
    for a, chosen in found.items():
        start = Chosen(
            initial[f"score/{results.judge}"], initial["kl"], chosen.choice, chosen.seeds, [None]
        )
        rows.append(_difference(a, results.initial.method, chosen, start, level))
    half = halves(results.groups)
    return {
        "methods": {method: _shares(chosen, half, level) for method, chosen in found.items()},
        "rows": rows,
    }


def _shares(chosen: Chosen, half: np.ndarray, level: float) -> dict[str, Any]:
    """Return which swept values were chosen how often, and the scores and KL there."""
    values = chosen.swept_values
    often = Counter(chosen.choice.ravel().tolist())
    shares = {str(values[i]): count / chosen.choice.size for i, count in sorted(often.items())}
    # for each half of the groups, the most often over seeds
    by_half = []
    for own in np.unique(half):
        counter = Counter(chosen.choice[:, half == own].ravel().tolist())
        by_half.append(values[counter.most_common(1)[0][0]])
    return {
        "chosen": by_half,
        "usual": values[often.most_common(1)[0][0]],
        "shares": shares,
        "swept_values": values,
        "seeds": chosen.seeds,
        "score": chosen_mean(chosen.scores, len(values), level).to_dict(),
        "kl": chosen_mean(chosen.kl, len(values), level).to_dict(),
    }


def _difference(a: str, b: str, first: Chosen, second: Chosen, level: float) -> dict[str, Any]:
    """Return one row of `tuned`: a - b, what this experiment could have shown, and the seeds for
    half of that.
    """
    values = first.scores - second.scores
    choices = max(len(first.swept_values), len(second.swept_values))
    estimate = chosen_mean(values, choices, level)
    row = {
        "a": a,
        "b": b,
        "difference": estimate.to_dict(),
        "kl_difference": chosen_mean(first.kl - second.kl, choices, level).to_dict(),
        **minimum_detectable_effect(estimate, level),
        "seeds_for_half": None,
        "seeds_for_half_range": None,
    }
    effect = row["minimum_detectable_effect"]
    if effect and len(values) >= MIN_SEEDS:
        # the choice widens the interval, which `needed_seeds` does not know of
        wider = estimate.se / max(crossed_mean(values).se, 1e-300)
        needed, *between = needed_seeds(values, effect / 2 / wider, level=level)
        row |= {"seeds_for_half": needed, "seeds_for_half_range": between}
    return row


def overoptimisation(results: Results, level: float) -> Iterator[dict[str, Any]]:
    """Ask whether the proxy goes on rising where the judge falls (Gao et al. 2022, arXiv
    2210.10760; for DPO Rafailov et al. 2024, arXiv 2406.02900).

    Along a method's points, the initial policy first, by KL, the judge's mean has a peak somewhere.
    Two differences are asked, both of the point of the largest KL over the judge's peak: the
    judge's own (does it fall?) and the proxy's (does it rise all the same?). The peak is chosen on
    other groups and seeds than those it is scored on: chosen on the same ones, the judge would seem
    to fall even where it is flat, in 12 to 16 % of simulated experiments (3 to 10 seeds, 13
    points), against 4 % with the halves and 2.5 % that a 95 % interval promises.

    Yields one entry for each method along all its points (swept None) and for each swept value
    along its checkpoints, with one p for both differences together: the larger one, since both have
    to be shown. `add_outcomes` says what follows for the methods; single swept values are shown
    without a verdict.
    """
    proxies = proxies_of(results.score_kinds)
    for method in results.measured_methods():
        # None: along all points, which are those of the swept value where there is but one
        curves: list[float | None] = [None]
        swept_values = results.swept_values(method)
        if len(swept_values) > 1:
            curves += swept_values
        for swept, proxy in itertools.product(curves, proxies or [None]):
            entry = _curve(results, method, swept, proxy, level)
            if entry is not None:
                yield entry


def _curve(
    results: Results, method: str, swept: float | None, proxy: str | None, level: float
) -> dict[str, Any] | None:
    """Return one entry of `overoptimisation`; None with fewer than FEWEST points that all seeds
    have.
    """
    seeds, names, rows = _path(results, method, swept, proxy)
    if not seeds:
        return None
    judge = f"score/{results.judge}"
    scores, kl = results.stack(judge, rows), results.stack("kl", rows)
    half = halves(results.groups)
    peak, end = choose(scores, half), choose(kl, half)

    def mean(values: np.ndarray) -> dict[str, Any]:
        return chosen_mean(values, len(names), level).to_dict()

    fall = mean(take(scores, end) - take(scores, peak))
    rise = mean(take(scores, peak) - results.means[key(results.initial)][judge])
    of_proxy, other = None, rise
    if proxy is not None:
        proxies = results.stack(f"score/{proxy}", rows)
        change = mean(take(proxies, end) - take(proxies, peak))
        # DPO learns from the pairs: what it exploits is its own loss
        optimised = results.program(method) != "dpo"
        of_proxy = {"name": proxy, "change": change, "optimised": optimised}
        other = change if optimised else rise
    # both differences have to be shown, so the larger p counts
    both = [fall["p"], other["p"]]

    kls = kl.mean(axis=(0, 2))
    usual_peak = int(np.bincount(peak.ravel(), minlength=len(names)).argmax())
    return {
        "method": method,
        "swept": swept,
        "proxy": of_proxy,
        # at the largest KL, over the judge's peak
        "judge": fall,
        # at the peak, over the initial policy
        "rise": rise,
        "p": None if None in both else max(both),
        "p_adjusted": None,
        "peak": {
            "swept": names[usual_peak][0],
            "step": names[usual_peak][1],
            "kl": float(kls[usual_peak]),
        },
        "end": {"kl": float(kls.max())},
        # share of the cells whose peak is the end itself
        "ends_at_peak": float(np.mean(peak == end)),
        "seeds": seeds,
        "points": len(names),
    }


def _path(
    results: Results, method: str, swept: float | None, proxy: str | None
) -> tuple[list[int], list[tuple], list[list[Point]]]:
    """Return the seeds, the points (swept value, step) that all of them have, the initial policy
    first, and the policies there for each seed; nothing with fewer than FEWEST points.
    """
    needed = f"score/{proxy or results.judge}"
    table: dict[int, dict[tuple, Point]] = {}
    for point in results.of(method, swept):
        if needed in point.values:
            table.setdefault(point.seed, {})[point.swept, point.step] = point
    seeds, names = rectangle(table)
    if len(names) < FEWEST:
        return [], [], []

    rows = [list(map(table[seed].get, names)) for seed in seeds]
    # the initial policy opens the curve, unless its scores by the proxy are not known
    starts = list(map(results.initial_of, seeds))
    if all(needed in start.values for start in starts):
        rows = [[start, *row] for start, row in zip(starts, rows, strict=True)]
        names = [(None, 0), *names]
    return seeds, names, rows


def add_outcomes(entries: list[dict[str, Any]], alpha: float) -> None:
    """Give each entry its "sign": 1 reproduced, -1 not reproduced, 0 undecided; None for a swept
    value alone.

    Reproduced: the judge falls from its peak and the proxy rises, both beyond chance. Not
    reproduced: the judge falls and the proxy falls with it; a judge that is highest at the largest
    KL may still fall beyond it. The judge's fall alone is asked for without a proxy, and of a
    method that does not learn from it, provided that the judge had risen
    before: 2406.02900 shows how the judge rises and then falls against KL. With fewer than
    MIN_SEEDS seeds nothing is decided.
    """
    for entry in entries:
        optimised = bool(entry["proxy"]) and entry["proxy"]["optimised"]
        other = entry["proxy"]["change"] if optimised else entry["rise"]
        p = entry["p_adjusted"]
        shown = len(entry["seeds"]) >= MIN_SEEDS and p is not None and p < alpha
        falls = side(entry["judge"]) < 0
        sign = side(other) if shown and falls else 0
        entry["sign"] = sign if entry["swept"] is None else None
