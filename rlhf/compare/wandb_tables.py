"""The report as W&B tables and images, through the tracker that every program writes with: flat rows, plain cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.compare.format import Report
from rlhf.compare.sentences import report_sentences, verdict_sentence
from rlhf.runs.tracking import Tracker

Row = dict[str, Any]


def log_report(report: Report, tracker: Tracker, figures: Mapping[str, str | Path] | None = None) -> None:
    """Write report.json's dict as tables/<name>.jsonl and, if the tracker has a W&B run, as its tables and images.

    figures: name -> PNG, as `rlhf.compare.figures.draw` returns them; they go to W&B alone. The tracker starts its
    files afresh: give it a folder of its own.
    """
    for name, rows in rows_of(report).items():
        tracker.table(name, rows, 0)
    if figures:
        tracker.images(figures, 0)


def rows_of(report: Report) -> dict[str, list[Row]]:
    """Table name -> rows; a table is empty where the report lacks the part."""
    sentences = [verdict_sentence(verdict, report) for verdict in report["verdicts"]] + report_sentences(report)
    return {
        "frontier": [_point(point) for point in report["points"]],
        "equal_kl": [_row(pair, row, kl=row["kl"]) for pair in report["frontier"] for row in pair["rows"]],
        "tuned": [_row(row, row) for row in report["tuned"]["rows"]],
        "wins": _wins(report["wins"]),
        "judge_of_pairs": [_judged(row) for row in (report.get("judge_of_pairs") or {"rows": []})["rows"]],
        "cost": [_cost(row) for row in report["budget"]["rows"]],
        "samples": [_sample(s["prompt"], name, r) for s in report["samples"] for name, r in s["responses"].items()],
        "sentences": [{"sentence": sentence} for sentence in sentences],
    }


def _number(name: str, estimate: dict | None) -> Row:
    """An estimate in three columns."""
    estimate = estimate or {}
    return {name: estimate.get("estimate"), f"{name}/low": estimate.get("low"), f"{name}/high": estimate.get("high")}


def _point(point: dict) -> Row:
    """A checkpoint: KL, each score and its difference to the foundation, the shape of the responses, its cost."""
    row = {name: point[name] for name in ("method", "swept", "last")} | {"training_step": point["step"]}
    row |= {"seeds": len(point["seeds"])} | _number("kl", point["kl"])
    for name, score in point["scores"].items():
        row |= _number(f"score/{name}", score["mean"]) | _number(f"over_foundation/{name}", score["difference"])
    for name in ("length", "words", "ended", "repetition"):
        row |= _number(name, point.get(name))
    return row | (point.get("numbers") or {}) | {f"budget/{k}": v for k, v in (point.get("budget") or {}).items()}


def _row(pair: dict, row: dict, **more: float) -> Row:
    """The difference a - b."""
    found = {"a": pair["a"], "b": pair["b"], **more, **_number("difference", row["difference"])}
    low, high = row.get("minimum_detectable_effect_range") or (None, None)
    found |= {"p_adjusted": row.get("p_adjusted"), "minimum_detectable_effect": row.get("minimum_detectable_effect")}
    return found | {"minimum_detectable_effect/low": low, "minimum_detectable_effect/high": high}


def _wins(wins: dict | None) -> list[Row]:
    """Each pair once: the later policy over the earlier one."""
    rows = []
    labels = [policy["label"] for policy in wins["policies"]] if wins else []
    for i, a in enumerate(labels):
        for j, b in enumerate(labels[:i]):
            if wins["raw"][i][j]:
                found = {"a": a, "b": b, **_number("raw", wins["raw"][i][j])}
                rows.append(found | _number("equal_length", wins["controlled"][i][j]))
    return rows


def _judged(row: dict) -> Row:
    """What a judge of pairs said of one meeting."""
    found = {"a": row["a"], "b": row["b"], **_number("raw", row["raw"]), **_number("equal_length", row["controlled"])}
    return found | {name: row.get(name) for name in ("ties", "consistency")}


def _cost(row: dict) -> Row:
    """A trial: each counter of its own run, the reward model, the pairs, and all of it."""
    found = {name: row.get(name) for name in ("method", "swept", "ratio", "ratio_own")}
    parts = ("own", "reward", "pairs", "total")
    return found | {f"{part}/{counter}": value for part in parts for counter, value in row[part].items()}


def _sample(prompt: Any, policy: str, response: dict) -> Row:
    found = {"prompt": prompt, "policy": policy, "response": response["response"], "ended": response["ended"]}
    return found | {"kl": response["kl"]} | {f"score/{name}": value for name, value in response["scores"].items()}
