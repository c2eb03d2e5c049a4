"""The parts of a report that a judge decides: curves, equal KL, tuned strengths, over-optimisation, wins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlhf.compare.crossed import MIN_SEEDS, holm, side
from rlhf.compare.frontier import Track, curve, equal_kl, kl_range
from rlhf.compare.overoptimisation import add_verdicts, overoptimisation
from rlhf.compare.power import pairs_needed
from rlhf.compare.results import Results
from rlhf.compare.selection import Means, ended, key, label, methods_with_points, rectangle
from rlhf.compare.tuned import minimum_detectable_effect, tuned
from rlhf.compare.verdict import Verdict
from rlhf.compare.wins import win_rate
from rlhf.stats import MIN_CLUSTERS

GRID = 9  # KLs at which a curve is given
ENDS = 3  # strengths, for a curve through the ends of trials
WIN_RATE = 0.55  # the difference that the sentence about power speaks of


def judged(results: Results, means: Means, trained: list[str], level: float) -> dict[str, Any]:
    """The parts of a report that a judge is needed for."""
    curves = {}
    for method in methods_with_points(results):
        seeds, swept_values = rectangle(ended(results, method))
        if not seeds:
            continue
        track = _track(results, means, method, seeds, swept_values)
        low, high = kl_range(track)
        if low < high:
            kls = np.linspace(np.sqrt(max(low, 0.0)), np.sqrt(high), GRID) ** 2
            kls[0], kls[-1] = low, high  # squares of roots may lie outside by rounding
            curves[method] = {"kl": kls.tolist(), "score": [e.to_dict() for e in curve(track, kls, level=level)]}
    frontier = [_frontier(results, means, a, b, level) for a, b in itertools.combinations(trained, 2)]
    chosen = tuned(results, means, level)
    signs = overoptimisation(results, means, level)
    differences = [*(row for pair in frontier for row in pair["rows"]), *chosen["rows"]]
    claims = [(row, row["difference"]) for row in differences]
    claims += [(entry, entry["judge"] | {"p": entry["p"]}) for entry in signs if entry["swept"] is None]
    # what single runs are compared by is about these runs, whatever the number of seeds
    count = adjust(claims, 1 if results.kind == "runs" else MIN_SEEDS)
    add_verdicts(signs, 1 - level)
    return {
        "claims": {"count": count, "method": "Holm 1979", "alpha": 1 - level},
        "curves": curves,
        "frontier": frontier,
        "wins": _wins(results, level),
        "tuned": chosen,
        "overoptimisation": signs,
        "power": {"win_rate": WIN_RATE, "pairs_needed": pairs_needed(WIN_RATE, level=level), "power": 0.8},
    }


def adjust(claims: Iterable[tuple[dict[str, Any], dict[str, Any]]], min_seeds: int = MIN_SEEDS) -> int:
    """Give each claim its "p_adjusted", Holm's over all of them: one family, all that the report claims.

    claims: (where the number goes, its estimate with "p", "seeds" and "groups"). What rests on fewer than `min_seeds`
    seeds or MIN_CLUSTERS groups, or has no interval, is no claim and gets None. Returns how many claims there are.
    """
    made = []
    for entry, estimate in claims:
        entry["p_adjusted"] = None
        if estimate["seeds"] >= min_seeds and estimate["groups"] >= MIN_CLUSTERS and estimate["p"] is not None:
            made.append((entry, estimate["p"]))
    adjusted = holm([p for _, p in made])
    for (entry, _), p in zip(made, adjusted, strict=True):
        entry["p_adjusted"] = p
    return len(made)


def verdicts(report: dict[str, Any]) -> list[Verdict]:
    """Return all that the report says of pairs and of over-optimisation, in the order of its sections."""
    found = [_at_kl(pair, row, report) for pair in report["frontier"] for row in pair["rows"]]
    found += [_tuned(row, report) for row in report["tuned"]["rows"]]
    found += [_exploited(point, report) for point in report["points"] if _is_exploited(point, report)]
    found += [_overoptimised(entry, report) for entry in report["overoptimisation"] if entry["swept"] is None]
    return found


def _at_kl(pair: dict[str, Any], row: dict[str, Any], report: dict[str, Any]) -> Verdict:
    sign, reservation = _shown(row, report)
    lines = next((r["difference"] for r in pair["sensitivity"] if r["kl"] == row["kl"]), row["difference"])
    if sign and lines["estimate"] * sign <= 0:
        sign, reservation = 0, "contradicted"
    elif sign and side(lines) != sign:
        reservation = "form"
    return _pair("equal_kl", pair, row, sign, reservation)


def _tuned(row: dict[str, Any], report: dict[str, Any]) -> Verdict:
    sign, reservation = _shown(row, report)
    wins = _win_rate_of(row["a"], row["b"], report)
    if sign and wins is not None and side(wins, 0.5) == -sign:
        reservation = "win_rate"
    return _pair("tuned", row, row, sign, reservation)


def _shown(row: dict[str, Any], report: dict[str, Any]) -> tuple[int | None, str | None]:
    """Return the sign of a row's difference, and whether only the correction hides one."""
    p, interval_side = row["p_adjusted"], side(row["difference"])
    if p is None:
        return None, None
    if p < report["claims"]["alpha"]:
        return interval_side, None
    return 0, "correction" if interval_side else None


def _pair(kind: str, pair: dict[str, Any], row: dict[str, Any], sign: int | None, reservation: str | None) -> Verdict:
    return Verdict(
        kind=kind,
        a=pair["a"],
        b=pair["b"],
        difference=row["difference"],
        sign=sign,
        p_adjusted=row["p_adjusted"],
        minimum_detectable_effect=row["minimum_detectable_effect"],
        kl=row.get("kl"),
        reservation=reservation,
        evidence=row,
    )


def _win_rate_of(a: str, b: str, report: dict[str, Any]) -> dict[str, Any] | None:
    """Return the raw win rate of two methods at the values that were chosen most often."""
    table = report["wins"]
    place = {(policy["method"], policy["swept"]): i for i, policy in enumerate(table["policies"])}
    chosen = {method: entry["usual"] for method, entry in report["tuned"]["methods"].items()}
    first, second = (place.get((method, chosen.get(method))) for method in (a, b))
    return None if first is None or second is None else table["raw"][first][second]


def _is_exploited(point: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether a single run raised a proxy while the judge fell; of an experiment `overoptimisation` asks that."""
    if report["kind"] != "runs" or report["judge"] is None or report["unit"]["groups"] < MIN_CLUSTERS:
        return False
    return side(point["scores"][report["judge"]]["difference"]) < 0 and bool(_raised_proxies(point, report))


def _exploited(point: dict[str, Any], report: dict[str, Any]) -> Verdict:
    return Verdict(
        kind="exploited_proxy",
        a=point["method"],
        b=report["foundation"]["method"],
        difference=point["scores"][report["judge"]]["difference"],
        sign=-1,
        evidence={"proxies": _raised_proxies(point, report)},
    )


def _raised_proxies(point: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    differences = {name: point["scores"][name]["difference"] for name in point["scores"]}
    kinds = report["score_kinds"]
    return {name: found for name, found in differences.items() if kinds[name] == "proxy" and side(found) > 0}


def _overoptimised(entry: dict[str, Any], report: dict[str, Any]) -> Verdict:
    signs = {"reproduced": 1, "not reproduced": -1, "undecided": 0, None: None}
    return Verdict(
        kind="over_optimisation",
        a=entry["method"],
        b=report["foundation"]["method"],
        difference=entry["judge"],
        sign=signs[entry["verdict"]],
        p_adjusted=entry["p_adjusted"],
        evidence=entry,
    )


def _track(
    results: Results, means: Means, method: str, seeds: Sequence[int], swept_values: Sequence, ends: bool = False
) -> Track:
    """All checkpoints of these seeds and strengths, or the ends of the trials alone: each seed has each strength, or a
    trial that is not there would shorten the range of KL for all."""
    score = f"score/{results.judge}"
    base = means[key(results.initial)][score]
    kept = [[p for p in results.of(method, seed=s) if p.swept in swept_values and (p.last or not ends)] for s in seeds]
    points = [[means[key(p)] for p in own] for own in kept]
    return Track(
        kl=[np.array([m["kl"] for m in found]) for found in points],
        score=[np.array([m[score] - base for m in found]) for found in points],
    )


def _frontier(results: Results, means: Means, a: str, b: str, level: float) -> dict[str, Any]:
    """a over b at equal KL, by the seeds that both have; `rows` get their p_adjusted later.

    `rows` are over the ends of the trials, which have spent the same; `path` has the same over all checkpoints, which
    have not, but reach smaller KLs: it is shown without a verdict. With fewer than ENDS strengths the ends make no
    curve, and `rows` are over all.
    """
    blocks = {m: rectangle(ended(results, m)) for m in (a, b)}
    seeds = sorted(set(blocks[a][0]) & set(blocks[b][0]))
    entry: dict[str, Any] = {"a": a, "b": b, "seeds": seeds, "overlap": None, "ranges": {}, "rows": [], "path": None}
    if not seeds:
        return entry

    def tracks(ends: bool) -> list[Track]:
        return [_track(results, means, m, seeds, swept_values, ends) for m, (_, swept_values) in blocks.items()]

    enough = min(len(swept_values) for _, swept_values in blocks.values()) >= ENDS
    entry |= {"over": "ends" if enough else "all checkpoints"} | _at_equal_kl(a, b, tracks(enough), level)
    if enough:
        entry["path"] = _at_equal_kl(a, b, tracks(False), level)
    return entry


def _at_equal_kl(a: str, b: str, tracks: list[Track], level: float) -> dict[str, Any]:
    found = equal_kl(*tracks, level=level)
    entry: dict[str, Any] = {"overlap": None, "rows": []}
    entry["ranges"] = {m: [float(x) for x in kl_range(t)] for m, t in zip((a, b), tracks, strict=True)}
    if found.overlap is None:
        return entry
    entry |= {"overlap": [float(x) for x in found.overlap], "form": found.form, "residual": found.residual}
    entry["rows"] = [_row(row, level) for row in found.rows]
    entry["sensitivity"] = [{"kl": r["kl"], "difference": r["difference"].to_dict()} for r in found.sensitivity]
    entry["disagreement"] = found.disagreement
    return entry


def _row(row: dict[str, Any], level: float) -> dict[str, Any]:
    estimate = row["difference"]
    return {"kl": float(row["kl"]), "difference": estimate.to_dict(), **minimum_detectable_effect(estimate, level)}


def _wins(results: Results, level: float) -> dict[str, Any]:
    """Who wins against whom: the ends of all trials and the foundation, each pair by the seeds that both have.

    Shares with their intervals, of which nothing is claimed: whether a method is ahead is what `tuned` asks, and a
    strength that was chosen on these prompts is not judged by them."""
    initial = results.initial
    policies: list[tuple[str, float | None]] = [(initial.method, None)]
    for method in methods_with_points(results):
        policies += sorted({(method, p.swept) for p in results.of(method) if p.last}, key=lambda t: t[1] or 0.0)
    ends = [{p.seed: p for p in results.of(m, s) if p.last and p.seed is not None} for m, s in policies]
    n = len(policies)
    raw, controlled, ties, longer = ([[None] * n for _ in range(n)] for _ in range(4))
    for i, j in itertools.combinations(range(n), 2):
        seeds = sorted(ends[j] if i == 0 else set(ends[i]) & set(ends[j]))
        if not seeds:
            continue
        a = [ends[j][s] for s in seeds]
        b = [initial if i == 0 else ends[i][s] for s in seeds]
        found = win_rate(a, b, results, results.judge, level=level)
        if found is None:
            continue
        told = math.isfinite(found.controlled.estimate) and not found.ridge  # else length and policy are one
        for matrix, estimate in ((raw, found.raw), (controlled, found.controlled if told else None)):
            if estimate is not None:
                matrix[j][i] = estimate.to_dict()
                matrix[i][j] = _mirrored(matrix[j][i])
        ties[i][j] = ties[j][i] = found.ties
        longer[j][i], longer[i][j] = found.length_difference, -found.length_difference
    labels = [{"label": label(results, m, s), "method": m, "swept": s} for m, s in policies]
    return {"policies": labels, "raw": raw, "controlled": controlled, "ties": ties, "length_difference": longer}


def _mirrored(rate: dict[str, Any]) -> dict[str, Any]:
    """The other side's win rate: ties count half, so the two sum to 1."""
    low, high = rate["high"], rate["low"]
    return rate | {
        "estimate": 1 - rate["estimate"],
        "low": None if low is None else 1 - low,
        "high": None if high is None else 1 - high,
    }
