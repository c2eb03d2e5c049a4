"""The parts of a report that a judge decides: curves, equal KL, best swept values,
over-optimisation, win rates.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.compare.results import Point, Results, key
from rlhf.compare.selection import add_outcomes, ended, overoptimisation, rectangle, tuned
from rlhf.compare.verdict import adjust
from rlhf.compare.wins import win_rate
from rlhf.stats.crossed import MIN_SEEDS
from rlhf.stats.frontier import Track, curve, equal_kl, kl_range
from rlhf.stats.power import minimum_detectable_effect, pairs_needed

# KLs at which a curve is given
GRID = 9
# swept values, for a curve through the ends of trials
ENDS = 3
# the win rate that the report's number of comparisons is for
WIN_RATE = 0.55


def judged(results: Results, trained: list[str], level: float) -> dict[str, Any]:
    """Return the parts of a report that need a judge; `trained` are the methods that are not
    baselines.
    """
    pairs = itertools.combinations(trained, 2)
    report = {
        "curves": _curves(results, level),
        "frontier": [_frontier(results, a, b, level) for a, b in pairs],
        "wins": _wins(results, level),
        "tuned": tuned(results, level),
        "overoptimisation": list(overoptimisation(results, level)),
        "power": {
            "win_rate": WIN_RATE,
            "pairs_needed": pairs_needed(WIN_RATE, level=level),
            "power": 0.8,
        },
    }

    # all that the report claims is one family; what single runs are compared by is about these runs
    claims = []
    for part in (*report["frontier"], report["tuned"]):
        for row in part["rows"]:
            claims.append((row, row["difference"]))
    for entry in report["overoptimisation"]:
        if entry["swept"] is None:
            claims.append((entry, entry["judge"] | {"p": entry["p"]}))
    count = adjust(claims, 1 if results.kind == "runs" else MIN_SEEDS)
    add_outcomes(report["overoptimisation"], 1 - level)
    return report | {"claims": {"count": count, "method": "Holm 1979", "alpha": 1 - level}}


def _curves(results: Results, level: float) -> dict[str, Any]:
    """Return method -> its score over the initial policy at GRID KLs; none where its points have
    one KL.
    """
    curves = {}
    for method in results.measured_methods():
        seeds, swept_values = rectangle(ended(results, method))
        if not seeds:
            continue
        track = _track(results, method, seeds, swept_values)
        low, high = kl_range(track)
        if low < high:
            kls = np.linspace(np.sqrt(max(low, 0.0)), np.sqrt(high), GRID) ** 2
            # squares of roots may lie outside by rounding
            kls[0], kls[-1] = low, high
            scores = [estimate.to_dict() for estimate in curve(track, kls, level=level)]
            curves[method] = {"kl": kls.tolist(), "score": scores}
    return curves


def _track(
    results: Results,
    method: str,
    seeds: Sequence[int],
    swept_values: Sequence,
    *,
    ends_only: bool = False,
) -> Track:
    """Return all checkpoints of these seeds and swept values, or the ends of the trials alone.

    Each seed has to have each swept value: a trial that is not there would shorten the range of KL
    for all.
    """
    score = f"score/{results.judge}"
    start = results.means[key(results.initial)][score]
    kl, scores = [], []
    for seed in seeds:
        own = []
        for point in results.of(method, seed=seed):
            if point.swept in swept_values and (point.last or not ends_only):
                own.append(point)
        kl.append(results.stack("kl", [own])[0])
        scores.append(results.stack(score, [own])[0] - start)
    return Track(kl=kl, score=scores)


def _frontier(results: Results, a: str, b: str, level: float) -> dict[str, Any]:
    """Return a over b at equal KL, by the seeds that both have.

    `rows` are over the ends of the trials, which have spent the same; `path` has the same over all
    checkpoints, which have not, but reach smaller KLs: it is shown without a verdict. With fewer
    than ENDS swept values the ends make no curve, and `rows` are over all.
    """
    seeds_a, values_a = rectangle(ended(results, a))
    seeds_b, values_b = rectangle(ended(results, b))
    seeds = sorted(set(seeds_a) & set(seeds_b))
    entry: dict[str, Any] = {
        "a": a,
        "b": b,
        "seeds": seeds,
        "overlap": None,
        "ranges": {},
        "rows": [],
        "path": None,
    }
    if not seeds:
        return entry

    def at_equal_kl(*, ends_only: bool) -> dict[str, Any]:
        tracks = {}
        for method, values in ((a, values_a), (b, values_b)):
            tracks[method] = _track(results, method, seeds, values, ends_only=ends_only)
        return _at_equal_kl(tracks, level)

    enough = min(len(values_a), len(values_b)) >= ENDS
    entry["over"] = "ends" if enough else "all checkpoints"
    entry |= at_equal_kl(ends_only=enough)
    if enough:
        entry["path"] = at_equal_kl(ends_only=False)
    return entry


def _at_equal_kl(tracks: dict[str, Track], level: float) -> dict[str, Any]:
    """Return the differences of two methods' tracks where their KLs overlap."""
    found = equal_kl(*tracks.values(), level=level)
    ranges = {method: list(kl_range(track)) for method, track in tracks.items()}
    if found.overlap is None:
        return {"overlap": None, "ranges": ranges, "rows": []}

    rows = []
    for row in found.rows:
        effect = minimum_detectable_effect(row["difference"], level)
        rows.append({"kl": float(row["kl"]), "difference": row["difference"].to_dict(), **effect})
    # the same by lines from point to point, which need no form of the curve
    sensitivity = []
    for row in found.sensitivity:
        sensitivity.append({"kl": row["kl"], "difference": row["difference"].to_dict()})
    return {
        "overlap": list(map(float, found.overlap)),
        "ranges": ranges,
        "rows": rows,
        "form": found.form,
        "residual": found.residual,
        "sensitivity": sensitivity,
        "disagreement": found.disagreement,
    }


def _wins(results: Results, level: float) -> dict[str, Any]:
    """Return who wins against whom: the ends of all trials and the initial policy, by the seeds
    that both have.

    Matrices of shares with their intervals, of which nothing is claimed: whether a method is ahead
    is what `tuned` asks, and a swept value that was chosen on these prompts is not scored by them.
    """
    initial = results.initial
    # the initial policy, then the end of each trial
    policies: list[dict[str, Any]] = [
        {"label": initial.method, "method": initial.method, "swept": None}
    ]
    ends: list[dict[int, Point]] = [{}]
    for method in results.measured_methods():
        for swept in results.swept_values(method):
            own = {point.seed: point for point in results.ends(method, swept)}
            if own:
                policies.append(
                    {"label": label(results, method, swept), "method": method, "swept": swept}
                )
                ends.append(own)

    # each pair is computed once; the other side mirrors it
    size = len(policies)
    raw, controlled, ties, longer = np.full((4, size, size), None).tolist()
    for j, i in itertools.combinations(range(size), 2):
        # the initial policy has no seed: it is compared with each of the other's
        other = dict.fromkeys(ends[i], initial) if j == 0 else ends[j]
        seeds = sorted(set(ends[i]) & set(other))
        if not seeds:
            continue
        first, second = list(map(ends[i].get, seeds)), list(map(other.get, seeds))
        found = win_rate(first, second, results, results.judge, level=level)
        if found is None:
            continue
        raw[i][j], raw[j][i] = _both_sides(found.raw.to_dict())
        # otherwise length and policy cannot be told apart
        if math.isfinite(found.controlled.estimate) and not found.ridge:
            controlled[i][j], controlled[j][i] = _both_sides(found.controlled.to_dict())
        ties[i][j] = ties[j][i] = found.ties
        longer[i][j], longer[j][i] = found.length_difference, -found.length_difference
    return {
        "policies": policies,
        "raw": raw,
        "controlled": controlled,
        "ties": ties,
        "length_difference": longer,
    }


def label(results: Results, method: str, swept: float | None) -> str:
    """Return a policy's name: the method, and the option that is swept with its value."""
    option = results.methods.get(method, {}).get("swept")
    return method if swept is None else f"{method} {option} {swept:g}"


def _both_sides(rate: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a win rate and the other side's: ties count half, so the two sum to 1."""
    mirrored = rate | {"estimate": 1 - rate["estimate"], "low": None, "high": None}
    # what is above one side is below the other; an end that is not known stays unknown
    if rate["high"] is not None:
        mirrored["low"] = 1 - rate["high"]
    if rate["low"] is not None:
        mirrored["high"] = 1 - rate["low"]
    return rate, mirrored
