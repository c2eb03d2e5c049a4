"""What limits a report, as records (rlhf/compare/verdict.py): what is missing, odd, or cannot be said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.compare.verdict import note
from rlhf.stats import MIN_CLUSTERS

Report = dict[str, Any]


def notes(report: Report) -> list[dict[str, Any]]:
    """Return all limits of a report, the most important first."""
    found = [_judge(report), *_missing(report)]
    found += [note("outlier", **outlier) for outlier in report["outliers"]]

    if report["judge"] is not None and report["unit"]["groups"] < MIN_CLUSTERS:
        found.append(note("few_groups", groups=report["unit"]["groups"], needed=MIN_CLUSTERS))
    for pair in report["frontier"]:
        if not pair["seeds"]:
            found.append(note("no_common_seed", a=pair["a"], b=pair["b"]))
        elif not pair["rows"]:
            found.append(note("no_overlap", a=pair["a"], b=pair["b"], ranges=pair["ranges"]))
    if report["unit"]["samples_per_prompt"] < 2:
        found.append(note("no_win_rate"))
    return found


def _judge(report: Report) -> dict[str, Any]:
    judge, kinds = report["judge"], report["score_kinds"]
    proxies = [name for name, kind in kinds.items() if kind == "proxy"]
    if judge is None:
        return note("no_judge", proxies=proxies)
    return note("judge", score=judge, score_kind=kinds[judge], proxies=proxies)


def _missing(report: Report) -> Iterator[dict[str, Any]]:
    for method, entry in report["methods"].items():
        begun = entry["trials"] or entry["seeds"] or entry["baseline"]
        if not begun and method != report["foundation"]["method"]:
            yield note("not_measured", method=method)
    if report["missing"]:
        yield note("missing_trials", trials=report["missing"])
    for run, reason in report["meta"].get("stopped", {}).items():
        yield note("stopped", run=run, reason=reason)

    measurements = [name for name in report["meta"].get("missing", []) if name.startswith("measure/seed-")]
    if measurements:
        yield note("missing_measurements", names=[name.removeprefix("measure/") for name in measurements])
    for method, entry in report["tuned"]["methods"].items():
        lacking = [value for value in report["methods"][method]["swept_values"] if value not in entry["swept_values"]]
        if lacking:
            yield note("left_out", method=method, swept_values=lacking)
