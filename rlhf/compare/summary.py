"""What results allow to say, as numbers and records: `Results` -> report.json. Sentences are made from it elsewhere.

Every estimate is a mean over seeds and groups of prompts, both drawn at random (rlhf/compare/crossed.py). An experiment
may have been cut short: each entry uses the seeds it has and says which; a comparison uses those that both sides have.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.compare.budgets import budget, mean_of
from rlhf.compare.crossed import MIN_SEEDS, crossed_mean, outlying
from rlhf.compare.judged import judged, verdicts
from rlhf.compare.notes import notes
from rlhf.compare.results import Point, Results, prompt_key
from rlhf.compare.selection import Means, ended, key, label, methods_with_points, rectangle, tabulate
from rlhf.config import UserError, did_you_mean

JUDGES = ("gold", "referee")
SHAPES = ("length", "words", "ended", "repetition")  # measures of a response beside its scores and KL
SAMPLES = 3


def summarise(results: Results, *, level: float = 0.95) -> dict[str, Any]:
    """Return report.json of an experiment or of single runs (`Results.kind`); it has no sentences.

    Without a judge (no gold score, no referee) nothing is decided: no curves, frontier, wins or over-optimisation.
    Raises UserError if there is nothing to compare or the judge cannot judge.
    """
    _check(results)
    means = tabulate(results)
    trained = [m for m in methods_with_points(results) if not results.methods[m].get("baseline")]
    report: dict[str, Any] = {
        "name": results.meta.get("name", "experiment"),
        "kind": results.kind,
        "judge": results.judge,
        "score_kinds": dict(results.score_kinds),
        "scope": "method" if trained and min(_seeds(results, m) for m in trained) >= MIN_SEEDS else "models",
        "unit": _unit(results, level),
        "methods": {m: _method(results, m) for m in results.methods},
        "missing": _missing(results),
        "foundation": {
            "method": results.initial.method,
            **_measures(results, means, [results.initial], level),
            "budget": results.initial.budget,
        },
        "points": _points(results, means, level),
        "outliers": [],
        "claims": {"count": 0, "method": "Holm 1979", "alpha": 1 - level},
        "curves": {},
        "frontier": [],
        "wins": None,
        "tuned": {"methods": {}, "rows": []},
        "overoptimisation": [],
        "budget": budget(results),
        "power": None,
    }
    if results.judge is not None:
        report |= judged(results, means, trained, level)
        report["outliers"] = _outliers(report, trained, 1 - level)
    report["samples"] = _samples(results, report["tuned"]["methods"])
    report["meta"] = results.meta
    report["annotators"] = results.meta.get("annotators")
    report["verdicts"] = [verdict.to_dict() for verdict in verdicts(report)]
    report["notes"] = notes(report)
    return report


def _check(results: Results) -> None:
    if not any(p.seed is None for p in results.points):
        raise UserError("the initial policy was not measured; continue with: rlhf experiment run FILE")
    if not methods_with_points(results):
        raise UserError("no policy was measured but the initial one; continue with: rlhf experiment run FILE")
    if len(set(results.groups)) < 2 and results.kind == "experiment":
        raise UserError(
            f"report: all {len(results.groups)} prompts belong to one group, and intervals need at least 2; "
            "measure on more prompts"
        )
    if results.judge is None:
        return
    if results.judge not in results.score_kinds:
        near = did_you_mean(results.judge, results.score_kinds)
        raise UserError(f"report: the judge '{results.judge}' is not among the scores.{near}")
    if results.score_kinds[results.judge] not in JUDGES:
        kind = results.score_kinds[results.judge]
        raise UserError(
            f"report: the judge '{results.judge}' is of kind '{kind}'; only a gold or referee score that no "
            "run has trained on can decide"
        )


def _seeds(results: Results, method: str) -> int:
    """How many its comparisons rest on."""
    return len(rectangle(ended(results, method))[0])


def _unit(results: Results, level: float) -> dict[str, Any]:
    shape = next(iter(results.initial.values.values())).shape
    return {
        "seeds": sorted({p.seed for p in results.points if p.seed is not None}),
        "groups": len(set(results.groups)),
        "prompts": int(shape[0]),
        "samples_per_prompt": int(shape[1]),
        "level": level,
    }


def _method(results: Results, name: str) -> dict[str, Any]:
    """Of one method; trials: strengths with a trial that has ended, the number of tries that its tuning had."""
    given, points = results.methods[name], results.of(name)
    return {
        "program": given.get("program", name),
        "swept": given.get("swept"),
        "swept_values": sorted({p.swept for p in points if p.swept is not None}),
        "baseline": bool(given.get("baseline")),
        "trials": len({p.swept for p in points if p.last and p.seed is not None}),
        "seeds": sorted({p.seed for p in points if p.seed is not None}),
    }


def _missing(results: Results) -> list[dict[str, Any]]:
    """Trials that have not ended, of those strengths and seeds that the experiment has anywhere."""
    seeds = sorted({p.seed for p in results.points if p.seed is not None})
    missing = []
    for method, given in results.methods.items():
        points = results.of(method)
        ended = {(p.swept, p.seed) for p in points if p.last}
        if given.get("baseline") or method == results.initial.method:
            continue
        swept_values = sorted({p.swept for p in points}, key=lambda s: s or 0.0)
        for swept, seed in itertools.product(swept_values or [None], seeds):
            if (swept, seed) not in ended:
                missing.append({"method": method, "swept": swept, "seed": seed})
    return missing


def _measures(results: Results, means: Means, points: Sequence[Point], level: float) -> dict[str, Any]:
    """The estimates of one policy over its seeds: `points` has one for each."""

    def estimate(name: str) -> dict[str, Any] | None:
        values = [means[key(p)][name] for p in points if name in means[key(p)]]
        return crossed_mean(np.array(values), level=level).to_dict() if len(values) == len(points) else None

    found: dict[str, Any] = {"kl": estimate("kl"), "scores": {}}
    for name in results.score_kinds:
        mean = estimate(f"score/{name}")
        if mean is not None:
            found["scores"][name] = {"mean": mean, "difference": _difference(results, means, points, name, level)}
    found |= {name: estimate(name) for name in SHAPES}
    return found | {"numbers": mean_of([p.numbers for p in points])}


def _difference(results: Results, means: Means, points: Sequence[Point], name: str, level: float) -> dict | None:
    """To the foundation, scored by the same seed's reward model where the score is a proxy."""
    name = f"score/{name}"
    bases = [means[key(results.initial_of(p.seed))] for p in points]
    if points[0].seed is None or any(name not in base for base in bases):
        return None
    values = [means[key(p)][name] - base[name] for p, base in zip(points, bases, strict=True)]
    return crossed_mean(np.array(values), level=level).to_dict()


def _points(results: Results, means: Means, level: float) -> list[dict[str, Any]]:
    """One entry for each method, strength and step, over the seeds that have it."""
    entries = []
    for method in methods_with_points(results):
        table: dict[tuple, list[Point]] = {}
        for p in results.of(method):
            table.setdefault((p.swept, p.step), []).append(p)
        for (swept, step), points in sorted(table.items(), key=lambda item: (item[0][0] or 0.0, item[0][1])):
            entries.append(
                {
                    "method": method,
                    "swept": swept,
                    "step": step,
                    "last": any(p.last for p in points),
                    "seeds": [p.seed for p in points],
                    **_measures(results, means, points, level),
                    "budget": mean_of([p.budget for p in points]),
                    "per_seed": [_seed(results, means, p) for p in points],
                }
            )
    return entries


def _seed(results: Results, means: Means, point: Point) -> dict[str, Any]:
    found = means[key(point)]
    scores = {n: float(found[f"score/{n}"].mean()) for n in results.score_kinds if f"score/{n}" in found}
    return {"seed": point.seed, "kl": float(found["kl"].mean()), "scores": scores}


def _outliers(report: dict[str, Any], trained: Sequence[str], alpha: float) -> list[dict[str, Any]]:
    """Runs whose end the judge scores far from the other seeds of its strength, at alpha over all runs (Bonferroni)."""
    ends = [p for p in report["points"] if p["last"] and p["method"] in trained and len(p["seeds"]) >= MIN_SEEDS]
    runs = sum(len(p["seeds"]) for p in ends)
    found = []
    for p in ends:
        scores = [seed["scores"][report["judge"]] for seed in p["per_seed"]]
        for i, chance in enumerate(outlying(scores)):
            if chance * runs < alpha:
                others = scores[:i] + scores[i + 1 :]
                run = {"method": p["method"], "swept": p["swept"], "seed": p["seeds"][i], "score": scores[i]}
                found.append(run | {"others": [min(others), max(others)], "p_adjusted": chance * runs})
    return found


def _samples(results: Results, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts whose hash comes first, answered by the foundation and by each method at its tuned strength (where
    nothing was tuned, the first one), first seed, first sample: nobody picked them."""
    shown = {results.initial.method: results.initial}
    for method in methods_with_points(results):
        points = [p for p in results.of(method) if p.last]
        usual = chosen.get(method, {}).get("usual")
        points = [p for p in points if usual is None or p.swept == usual]
        if points:
            shown[label(results, method, points[0].swept)] = min(points, key=lambda p: (p.swept or 0.0, p.seed))
    texts = [prompt_key(p) for p in results.prompts]
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).hexdigest())
    return [
        {
            "prompt": results.prompts[i],
            "responses": {n: _response(results, p, i) for n, p in shown.items() if key(p) in results.responses},
        }
        for i in order[:SAMPLES]
    ]


def _response(results: Results, point: Point, i: int) -> dict[str, Any]:
    values = {name: float(v[i, 0]) for name, v in point.values.items()}
    return {
        "response": results.responses[key(point)][i][0],
        "ended": bool(values.get("ended", 1.0)),
        "kl": values.get("kl"),
        "length": values.get("length"),
        "scores": {name: values[f"score/{name}"] for name in results.score_kinds if f"score/{name}" in values},
    }
