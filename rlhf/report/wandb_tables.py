"""The report as W&B tables and images, through the tracker that every program writes with: flat
rows, plain cells.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.report.format import Number, Report
from rlhf.report.sentences import all_sentences
from rlhf.report.tables import pairs_of_policies
from rlhf.runs.tracking import Tracker

Row = dict[str, Any]
# an estimate that is not known: its three columns are written all the same
ABSENT = {"estimate": None, "low": None, "high": None}
SAMPLE = ("response", "ended", "kl")
COST = ("method", "swept", "ratio", "ratio_own", "own", "reward", "pairs", "total")


def log_report(
    report: Report, tracker: Tracker, figures: Mapping[str, str | Path] | None = None
) -> None:
    """Write report.json's dict as tables/<name>.jsonl and, if the tracker has a W&B run, as its
    tables and images.

    figures: name -> PNG, as `rlhf.report.figures.draw` returns them; they go to W&B alone. The
    tracker starts its files afresh: give it a folder of its own.
    """
    for name, rows in rows_of(report).items():
        tracker.table(name, rows, 0)
    if figures:
        tracker.images(figures, 0)


def rows_of(report: Report) -> dict[str, list[Row]]:
    """Return table name -> flat rows; a table is empty where the report lacks the part."""
    asked = report.get("judge_of_pairs") or {"rows": []}
    equal_kl, wins, samples = [], [], []
    for pair in report["frontier"]:
        equal_kl += [_difference(pair, row, kl=row["kl"]) for row in pair["rows"]]
    for later, earlier, raw, controlled in pairs_of_policies(report):
        wins.append(_wins(later["label"], earlier["label"], raw, controlled))
    for sample in report["samples"]:
        for policy, response in sample["responses"].items():
            row = {"prompt": sample["prompt"], "policy": policy, "score": response["scores"]}
            for name in SAMPLE:
                row[name] = response[name]
            samples.append(_flat(row))
    cost = []
    for row in report["budget"]["rows"]:
        cost.append(_flat({name: row[name] for name in COST}))
    judged = []
    for row in asked["rows"]:
        shares = {"ties": row["ties"], "consistency": row["consistency"]}
        judged.append(_wins(row["a"], row["b"], row["raw"], row["controlled"]) | shares)
    return {
        "frontier": list(map(_point, report["points"])),
        "equal_kl": equal_kl,
        "tuned": [_difference(row, row) for row in report["tuned"]["rows"]],
        "wins": wins,
        "judge_of_pairs": judged,
        "cost": cost,
        "samples": samples,
        "sentences": [{"sentence": sentence} for sentence in all_sentences(report)],
    }


def _flat(row: Mapping[str, Any], prefix: str = "") -> Row:
    """Return nested mappings as one, their names joined by "/"; an estimate has three columns."""
    columns: Row = {}
    for name, value in row.items():
        full = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            columns[full] = value
        elif "estimate" in value:
            bounds = {f"{full}/low": value["low"], f"{full}/high": value["high"]}
            columns |= {full: value["estimate"]} | bounds
        else:
            columns |= _flat(value, f"{full}/")
    return columns


def _point(point: dict[str, Any]) -> Row:
    """Return a checkpoint: KL, each score and its difference to the initial policy, shape of the
    responses, cost.
    """
    scores, over_initial = {}, {}
    for name, score in point["scores"].items():
        scores[name] = score["mean"]
        over_initial[name] = score["difference"] or ABSENT
    row = {
        "method": point["method"],
        "swept": point["swept"],
        "last": point["last"],
        "training_step": point["step"],
        "seeds": len(point["seeds"]),
        "score": scores,
        "over_initial": over_initial,
        "budget": point["budget"],
    }
    for name in ("kl", "length", "words", "ended", "repetition"):
        row[name] = point[name] or ABSENT
    return _flat(row | point["numbers"])


def _difference(pair: Mapping[str, Any], row: Mapping[str, Any], **more: float) -> Row:
    """Return the difference a - b, its adjusted p and the effect that would have been shown."""
    # None where there is no interval
    low, high = row.get("minimum_detectable_effect_range") or (None, None)
    least = {"estimate": row.get("minimum_detectable_effect"), "low": low, "high": high}
    sides = {"a": pair["a"], "b": pair["b"], **more, "difference": row["difference"]}
    shown = {"p_adjusted": row.get("p_adjusted"), "minimum_detectable_effect": least}
    return _flat(sides | shown)


def _wins(a: str, b: str, raw: Number, controlled: Number | None) -> Row:
    return _flat({"a": a, "b": b, "raw": raw, "equal_length": controlled or ABSENT})
