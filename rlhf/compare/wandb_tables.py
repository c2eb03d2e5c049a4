"""The report as W&B tables and images, through the tracker that every program writes with: flat
rows, plain cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.compare.format import Number, Report
from rlhf.compare.sentences import all_sentences
from rlhf.compare.tables import pairs_of_policies
from rlhf.runs.tracking import Tracker

Row = dict[str, Any]


def log_report(
    report: Report, tracker: Tracker, figures: Mapping[str, str | Path] | None = None
) -> None:
    """Write report.json's dict as tables/<name>.jsonl and, if the tracker has a W&B run, as its
    tables and images.

    figures: name -> PNG, as `rlhf.compare.figures.draw` returns them; they go to W&B alone. The
    tracker starts its files afresh: give it a folder of its own.
    """
    for name, rows in rows_of(report).items():
        tracker.table(name, rows, 0)
    if figures:
        tracker.images(figures, 0)


def rows_of(report: Report) -> dict[str, list[Row]]:
    """Return table name -> flat rows; a table is empty where the report lacks the part."""
    asked = report.get("judge_of_pairs") or {"rows": []}
    equal_kl, samples = [], []
    for pair in report["frontier"]:
        equal_kl += [_sides(pair) | {"kl": row["kl"]} | _difference(row) for row in pair["rows"]]
    for sample in report["samples"]:
        for policy, response in sample["responses"].items():
            samples.append(_sample(sample["prompt"], policy, response))
    tuned = [_sides(row) | _difference(row) for row in report["tuned"]["rows"]]
    sentences = [{"sentence": sentence} for sentence in all_sentences(report)]
    return {
        "frontier": list(map(_point, report["points"])),
        "equal_kl": equal_kl,
        "tuned": tuned,
        "wins": _wins(report),
        "judge_of_pairs": list(map(_judged, asked["rows"])),
        "cost": list(map(_cost, report["budget"]["rows"])),
        "samples": samples,
        "sentences": sentences,
    }


def _estimate(name: str, estimate: Number | None) -> Row:
    """Return an estimate in three columns."""
    estimate = estimate or {}
    return {
        name: estimate.get("estimate"),
        f"{name}/low": estimate.get("low"),
        f"{name}/high": estimate.get("high"),
    }


def _prefixed(prefix: str, values: Mapping[str, Any]) -> Row:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _sides(row: Mapping[str, Any]) -> Row:
    return {"a": row["a"], "b": row["b"]}


def _point(point: dict[str, Any]) -> Row:
    """Return a checkpoint: KL, each score and its difference to the initial policy, shape of the
    responses, cost.
    """
    row = {
        "method": point["method"],
        "swept": point["swept"],
        "last": point["last"],
        "training_step": point["step"],
        "seeds": len(point["seeds"]),
        **_estimate("kl", point["kl"]),
    }
    for name, score in point["scores"].items():
        row |= _estimate(f"score/{name}", score["mean"]) | _estimate(
            f"over_initial/{name}", score["difference"]
        )
    for name in ("length", "words", "ended", "repetition"):
        row |= _estimate(name, point[name])
    return row | point["numbers"] | _prefixed("budget", point["budget"])


def _difference(row: Mapping[str, Any]) -> Row:
    """Return the difference a - b, its adjusted p and the effect that would have been shown."""
    # None where there is no interval
    low, high = row.get("minimum_detectable_effect_range") or (None, None)
    return {
        **_estimate("difference", row["difference"]),
        "p_adjusted": row.get("p_adjusted"),
        "minimum_detectable_effect": row.get("minimum_detectable_effect"),
        "minimum_detectable_effect/low": low,
        "minimum_detectable_effect/high": high,
    }


def _wins(report: Report) -> list[Row]:
    """Return each pair once: the later policy over the earlier one."""
    rows = []
    for later, earlier, raw, controlled in pairs_of_policies(report):
        sides = {"a": later["label"], "b": earlier["label"]}
        rows.append(sides | _estimate("raw", raw) | _estimate("equal_length", controlled))
    return rows


def _judged(row: Mapping[str, Any]) -> Row:
    """Return what a judge of pairs said of two policies."""
    return {
        **_sides(row),
        **_estimate("raw", row["raw"]),
        **_estimate("equal_length", row["controlled"]),
        "ties": row["ties"],
        "consistency": row["consistency"],
    }


def _cost(row: Mapping[str, Any]) -> Row:
    """Return a trial: each counter of its own run, the reward model, the pairs, and all of it."""
    found = {name: row[name] for name in ("method", "swept", "ratio", "ratio_own")}
    for part in ("own", "reward", "pairs", "total"):
        found |= _prefixed(part, row[part])
    return found


def _sample(prompt: Any, policy: str, response: Mapping[str, Any]) -> Row:
    return {
        "prompt": prompt,
        "policy": policy,
        "response": response["response"],
        "ended": response["ended"],
        "kl": response["kl"],
        **_prefixed("score", response["scores"]),
    }
