"""What results allow to say, as numbers and records: `Results` -> report.json. Sentences are made
from it elsewhere.

Every estimate is a mean over seeds and groups of prompts, both drawn at random
(rlhf/stats/crossed.py). An experiment may have been cut short: each entry uses the seeds it has
and says which; a comparison uses those that both sides have.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlhf.compare.judged import judged, label
from rlhf.compare.results import Point, Results, key, mean_of, prompt_key, seeds_of
from rlhf.compare.selection import ended, rectangle
from rlhf.compare.verdict import notes, verdicts
from rlhf.errors import UserError, did_you_mean
from rlhf.stats.crossed import MIN_SEEDS, crossed_mean, outlying, share

JUDGES = ("gold", "referee")
# measures of a response beside its scores and KL
SHAPES = ("length", "words", "ended", "repetition")
# of these, those between 0 and 1
SHARES = ("ended", "repetition")
# prompts whose responses are shown
SAMPLES = 3
# programs that learn from, or choose by, a reward model
USES_REWARD = ("ppo", "best_of_n")


def summarise(results: Results, *, level: float = 0.95) -> dict[str, Any]:
    """Return report.json of an experiment or of single runs (`Results.kind`); it has no sentences.

    Without a judge (no gold score, no referee) nothing is decided: no curves, frontier, wins or
    over-optimisation. Raises UserError if there is nothing to compare or the judge cannot judge.
    """
    _check(results)
    initial = results.initial
    trained = []
    for method in results.measured_methods():
        if not results.methods[method].get("baseline"):
            trained.append(method)
    report: dict[str, Any] = {
        "name": results.meta.get("name", "experiment"),
        "kind": results.kind,
        "judge": results.judge,
        "score_kinds": dict(results.score_kinds),
        "scope": _scope(results, trained),
        "unit": _unit(results, level),
        "methods": {name: _method(results, name) for name in results.methods},
        "missing": list(_missing(results)),
        "initial_policy": {
            "method": initial.method,
            **_measures(results, [initial], level),
            "budget": initial.budget,
        },
        "points": list(_points(results, level)),
        "outliers": [],
        "claims": {"count": 0, "method": "Holm 1979", "alpha": 1 - level},
        "curves": {},
        "frontier": [],
        "wins": None,
        "tuned": {"methods": {}, "rows": []},
        "overoptimisation": [],
        "budget": budget(results),
        "power": None,
        "annotators": results.meta.get("annotators"),
        "votes": results.meta.get("votes"),
        "meta": results.meta,
    }
    # without a judge these parts stay empty: no other score may decide
    if results.judge is not None:
        report |= judged(results, trained, level)
        report["outliers"] = list(_outliers(report, trained, 1 - level))

    report["samples"] = samples(results, report["tuned"]["methods"])
    # records for the sentences; they read the finished numbers
    report["verdicts"] = list(map(asdict, verdicts(report)))
    report["notes"] = list(notes(report))
    return report


def _check(results: Results) -> None:
    resume = "continue with: rlhf experiment run FILE"
    if not any(point.seed is None for point in results.points):
        raise UserError(f"report: the initial policy was not measured; {resume}")
    if not results.measured_methods():
        raise UserError(f"report: no policy was measured but the initial one; {resume}")
    if len(set(results.groups)) < 2 and results.kind == "experiment":
        raise UserError(
            f"report: all {len(results.groups)} prompts belong to one group, and intervals need at least 2; "
            "measure on more prompts"
        )

    judge, kinds = results.judge, results.score_kinds
    if judge is None:
        return
    if judge not in kinds:
        raise UserError(
            f"report: the judge '{judge}' is not among the scores.{did_you_mean(judge, kinds)}"
        )
    if kinds[judge] not in JUDGES:
        raise UserError(
            f"report: the judge '{judge}' is of kind '{kinds[judge]}'; only a gold or referee score that no run has "
            "trained on can decide"
        )


def _scope(results: Results, trained: Sequence[str]) -> str:
    """Return "method" where every trained method has enough seeds to speak of the method, else
    "models": of those that were trained.
    """
    seeds = [len(rectangle(ended(results, method))[0]) for method in trained]
    return "method" if min(seeds, default=0) >= MIN_SEEDS else "models"


def _unit(results: Results, level: float) -> dict[str, Any]:
    """Return what an estimate is a mean over: seeds, groups, prompts and samples."""
    # all measures of all policies have this shape
    prompts, samples = next(iter(results.initial.values.values())).shape
    return {
        "seeds": seeds_of(results.points),
        "groups": len(set(results.groups)),
        "prompts": int(prompts),
        "samples_per_prompt": int(samples),
        "level": level,
    }


def _method(results: Results, name: str) -> dict[str, Any]:
    """Return what one method was; trials: swept values with a trial that has ended, the tries that
    its tuning had.
    """
    given = results.methods[name]
    return {
        "program": results.program(name),
        "swept": given.get("swept"),
        "swept_values": sorted(set(results.swept_values(name)) - {None}),
        "baseline": bool(given.get("baseline")),
        "trials": len({point.swept for point in results.ends(name)}),
        "seeds": seeds_of(results.of(name)),
    }


def _missing(results: Results) -> Iterator[dict[str, Any]]:
    """Yield the trials that have not ended, of those swept values and seeds that the experiment
    has anywhere.
    """
    for method, given in results.methods.items():
        # baselines have no trials of their own
        if given.get("baseline") or method == results.initial.method:
            continue
        done = {(point.swept, point.seed) for point in results.ends(method)}
        swept_values = results.swept_values(method) or [None]
        for swept, seed in itertools.product(swept_values, seeds_of(results.points)):
            if (swept, seed) not in done:
                yield {"method": method, "swept": swept, "seed": seed}


def _points(results: Results, level: float) -> Iterator[dict[str, Any]]:
    """Yield one entry for each method, swept value and step, over the seeds that have it."""
    for method in results.measured_methods():
        # the sort is stable, so that the seeds of an entry stay in order
        points = sorted(results.of(method), key=lambda point: (point.swept or 0.0, point.step))
        same_policy = itertools.groupby(points, key=lambda point: (point.swept, point.step))
        for (swept, step), group in same_policy:
            own = list(group)
            yield {
                "method": method,
                "swept": swept,
                "step": step,
                "last": any(point.last for point in own),
                "seeds": [point.seed for point in own],
                **_measures(results, own, level),
                "budget": mean_of(point.budget for point in own),
                "per_seed": [_seed(results, point) for point in own],
            }


def _measures(results: Results, points: Sequence[Point], level: float) -> dict[str, Any]:
    """Return the estimates of one policy over its seeds: `points` has one for each."""

    def estimate(measure: str, starts: Sequence[Point] = ()) -> dict[str, Any] | None:
        """Estimate over the seeds' initial policies where `starts` are given; None where a point
        lacks the measure.
        """
        if any(measure not in point.values for point in (*points, *starts)):
            return None
        values = results.stack(measure, [points])[0]
        if starts:
            values = values - results.stack(measure, [starts])[0]
        found = crossed_mean(values, level=level)
        # an interval of a share ends at 100 %
        if measure in SHARES:
            found = share(found, level)
        return found.to_dict()

    # a proxy is compared with the initial policy as the same seed's reward model scores it
    starts = []
    if points[0].seed is not None:
        starts = [results.initial_of(point.seed) for point in points]
    scores = {}
    for name in results.score_kinds:
        mean = estimate(f"score/{name}")
        if mean is not None:
            difference = estimate(f"score/{name}", starts) if starts else None
            scores[name] = {"mean": mean, "difference": difference}
    return {
        "kl": estimate("kl"),
        "scores": scores,
        **dict(zip(SHAPES, map(estimate, SHAPES), strict=True)),
        "numbers": mean_of(point.numbers for point in points),
    }


def _seed(results: Results, point: Point) -> dict[str, Any]:
    """Return the means of one seed's policy."""
    means = results.means[key(point)]
    scores = {}
    for name in results.score_kinds:
        if f"score/{name}" in means:
            scores[name] = float(means[f"score/{name}"].mean())
    return {"seed": point.seed, "kl": float(means["kl"].mean()), "scores": scores}


def _outliers(
    report: dict[str, Any], trained: Sequence[str], alpha: float
) -> Iterator[dict[str, Any]]:
    """Yield the runs whose end the judge scores far from the other seeds of its swept value, at
    alpha over all runs (Bonferroni).
    """
    trials = []
    for point in report["points"]:
        is_end = point["last"] and point["method"] in trained
        if is_end and len(point["seeds"]) >= MIN_SEEDS:
            trials.append(point)
    # Bonferroni: each run is one test
    runs = sum(len(point["seeds"]) for point in trials)
    for point in trials:
        scores = [seed["scores"][report["judge"]] for seed in point["per_seed"]]
        for i, p in enumerate(outlying(scores)):
            if p * runs < alpha:
                others = scores[:i] + scores[i + 1 :]
                yield {
                    "method": point["method"],
                    "swept": point["swept"],
                    "seed": point["seeds"][i],
                    "score": scores[i],
                    "others": [min(others), max(others)],
                    "p_adjusted": p * runs,
                }


def samples(results: Results, chosen: dict[str, Any], count: int = SAMPLES) -> list[dict[str, Any]]:
    """Return the `count` prompts whose hash comes first with their first responses, of the initial
    policy and of each method.

    A method answers at its chosen swept value (where none was chosen, at the first one) and first
    seed.
    """
    policies = {results.initial.method: results.initial}
    for method in results.measured_methods():
        ends = results.ends(method, chosen.get(method, {}).get("usual"))
        if ends:
            policies[label(results, method, ends[0].swept)] = ends[0]

    # by hash, so that nobody picks them and every report shows the same
    asked = map(str.encode, map(prompt_key, results.prompts))
    digests = [hashlib.sha256(prompt).hexdigest() for prompt in asked]
    found = []
    for i in np.argsort(digests, kind="stable")[:count].tolist():
        responses = {}
        for name, point in policies.items():
            # a policy may have been measured without its texts being kept
            if point.responses is not None:
                responses[name] = _response(results, point, i)
        found.append({"prompt": results.prompts[i], "responses": responses})
    return found


def _response(results: Results, point: Point, prompt: int) -> dict[str, Any]:
    """Return a policy's first response to a prompt (its number) with all that was measured of it."""
    values = {name: float(array[prompt, 0]) for name, array in point.values.items()}
    found = {
        "response": point.responses[prompt][0],
        "ended": bool(values.get("ended", 1.0)),
        "kl": values.get("kl"),
        "length": values.get("length"),
        "scores": {},
    }
    for name in results.score_kinds:
        if f"score/{name}" in values:
            found["scores"][name] = values[f"score/{name}"]
    return found


def budget(results: Results) -> dict[str, Any]:
    """Return what each trial that has ended cost from the initial policy on, and whether the
    trained ones are matched.

    A row counts the pairs and the reward model in full, as if the trial had been the only one: they
    are shared by all trials of a seed. `ratio` is total over the experiment's total, mean over
    seeds, `ratio_own` the trial alone over it, `furthest` the ratio of the seed that is furthest
    from 1. `matched`: |ratio - 1| <= tolerance in every seed of every trial, and no trial has spent
    more than 1 + tolerance times another; None if none was to be matched.
    """
    asked = results.meta.get("budget") or {}
    match = None
    if asked.get("match", "none") != "none" and asked.get("total"):
        match = {
            "match": asked["match"],
            "total": float(asked["total"]),
            "tolerance": float(asked.get("tolerance", 0.1)),
        }
    rows = []
    for method in results.measured_methods():
        # each swept value once, in order
        ended_values = dict.fromkeys(point.swept for point in results.ends(method))
        for swept in ended_values:
            rows.append(_cost(results, method, swept, match))

    ratios = []
    for row in rows:
        # a baseline trains nothing and has no budget to match
        if not row["baseline"]:
            ratios += [row["ratio"], row["furthest"]]
    matched = None
    if match and ratios:
        matched = None not in ratios and _are_near(ratios, match["tolerance"])
    return {"match": match, "rows": rows, "matched": matched}


def _are_near(ratios: Sequence[float], tolerance: float) -> bool:
    """Return whether all ratios are near 1, and near each other."""
    low, high = min(ratios), max(ratios)
    return max(high - 1, 1 - low) <= tolerance and high <= (1 + tolerance) * low


def _cost(
    results: Results, method: str, swept: float | None, match: dict[str, Any] | None
) -> dict[str, Any]:
    """Return one row of `budget`."""
    budgets = [point.budget for point in results.ends(method, swept)]
    own = mean_of(budgets)
    # shared parts count in full, as if the trial had been the only one
    uses_reward = results.program(method) in USES_REWARD
    reward = dict(results.shared_budget.get("reward", {})) if uses_reward else {}
    pairs = dict(results.shared_budget.get("pairs", {}))
    row = {
        "method": method,
        "swept": swept,
        "baseline": bool(results.methods[method].get("baseline")),
        "own": own,
        "reward": reward,
        "pairs": pairs,
        "total": total_of([own, reward, pairs]),
        "ratio": None,
        "ratio_own": None,
        "furthest": None,
    }
    if match and match["match"] in row["total"]:
        counter, whole = match["match"], match["total"]
        ratio, ratio_own = row["total"][counter] / whole, own.get(counter, 0.0) / whole
        # the parts that are shared are the same for each seed
        of_seeds = [budget.get(counter, 0.0) / whole + ratio - ratio_own for budget in budgets]
        furthest = max(of_seeds, key=lambda ratio: abs(ratio - 1))
        row |= {"ratio": ratio, "ratio_own": ratio_own, "furthest": furthest}
    return row


def total_of(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the sum of each counter; of memory the peak, since the parts run one after the other."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            before = total.get(name, 0.0)
            together = max(before, value) if "memory" in name else before + value
            total[name] = float(together)
    return total
