"""Claims of a report as records: which differences are shown after the correction, and what limits
the report.

The records are those of rlhf/compare/verdict.py; they are read from the finished numbers of
report.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf.compare.crossed import holm, side
from rlhf.compare.format import Report, proxies_of, usual_values, win_rate_of
from rlhf.compare.verdict import Verdict, note
from rlhf.stats import MIN_CLUSTERS


def adjust(claims: Iterable[tuple[dict[str, Any], dict[str, Any]]], min_seeds: int) -> int:
    """Give each claim its "p_adjusted", Holm's over all of them: one family, all that the report
    claims.

    claims: (where the number goes, its estimate with "p", "seeds" and "groups"). What rests on
    fewer than `min_seeds` seeds or MIN_CLUSTERS groups, or has no interval, is no claim and gets
    None. Returns how many claims there are.
    """
    made = []
    for entry, estimate in claims:
        entry["p_adjusted"] = None
        if (
            estimate["seeds"] >= min_seeds
            and estimate["groups"] >= MIN_CLUSTERS
            and estimate["p"] is not None
        ):
            made.append((entry, estimate["p"]))
    # all at once: adding a claim makes the others harder to show
    for (entry, _), p in zip(made, holm([p for _, p in made]), strict=True):
        entry["p_adjusted"] = p
    return len(made)


def verdicts(report: Report) -> list[Verdict]:
    """Return all that the report says of pairs and of over-optimisation, in the order of its
    sections.
    """
    found = []
    for pair in report["frontier"]:
        found += [_at_equal_kl(pair, row, report) for row in pair["rows"]]
    found += [_tuned(row, report) for row in report["tuned"]["rows"]]
    if report["kind"] == "runs" and report["judge"] is not None:
        found += _exploited(report)
    found += [
        _overoptimised(entry, report)
        for entry in report["overoptimisation"]
        if entry["swept"] is None
    ]
    return found


def _at_equal_kl(pair: dict[str, Any], row: dict[str, Any], report: Report) -> Verdict:
    sign, reservation = _shown(row, report)
    # the same by lines from point to point, which do not depend on the form of the curve
    by_lines = {other["kl"]: other["difference"] for other in pair["sensitivity"]}
    lines = by_lines.get(row["kl"], row["difference"])
    if sign and lines["estimate"] * sign <= 0:
        sign, reservation = 0, "contradicted"
    elif sign and side(lines) != sign:
        reservation = "form"
    return _of_pair("equal_kl", pair, row, sign, reservation)


def _tuned(row: dict[str, Any], report: Report) -> Verdict:
    sign, reservation = _shown(row, report)
    chosen = usual_values(report)
    a, b = ((method, chosen.get(method)) for method in (row["a"], row["b"]))
    wins = win_rate_of(report, a, b)
    if sign and wins is not None and side(wins, 0.5) == -sign:
        reservation = "win_rate"
    return _of_pair("tuned", row, row, sign, reservation)


def _shown(row: dict[str, Any], report: Report) -> tuple[int | None, str | None]:
    """Return the sign of a row's difference, and "correction" where only that hides one."""
    p, sign = row["p_adjusted"], side(row["difference"])
    if p is None:
        return None, None
    if p < report["claims"]["alpha"]:
        return sign, None
    return 0, "correction" if sign else None


def _of_pair(
    kind: str, pair: dict[str, Any], row: dict[str, Any], sign: int | None, reservation: str | None
) -> Verdict:
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


def _exploited(report: Report) -> Iterator[Verdict]:
    """Yield a verdict for each single run that raised a proxy while the judge fell."""
    # too few groups: nothing is claimed of anything
    if report["unit"]["groups"] < MIN_CLUSTERS:
        return
    for run in report["points"]:
        raised = {}
        for name in proxies_of(report["score_kinds"]):
            difference = run["scores"][name]["difference"]
            if side(difference) > 0:
                raised[name] = difference
        fall = run["scores"][report["judge"]]["difference"]
        if raised and side(fall) < 0:
            yield Verdict(
                kind="exploited_proxy",
                a=run["method"],
                b=report["initial_policy"]["method"],
                difference=fall,
                sign=-1,
                evidence={"proxies": raised},
            )


def _overoptimised(entry: dict[str, Any], report: Report) -> Verdict:
    return Verdict(
        kind="over_optimisation",
        a=entry["method"],
        b=report["initial_policy"]["method"],
        difference=entry["judge"],
        sign=entry["sign"],
        p_adjusted=entry["p_adjusted"],
        evidence=entry,
    )


def notes(report: Report) -> list[dict[str, Any]]:
    """Return all limits of a report, the most important first."""
    judge, kinds = report["judge"], report["score_kinds"]
    proxies = proxies_of(kinds)
    found = [note("no_judge", proxies=proxies)]
    if judge is not None:
        found = [note("judge", score=judge, score_kind=kinds[judge], proxies=proxies)]
    found += _missing(report)
    found += [note("outlier", **outlier) for outlier in report["outliers"]]
    if judge is not None and report["unit"]["groups"] < MIN_CLUSTERS:
        found.append(note("few_groups", groups=report["unit"]["groups"], needed=MIN_CLUSTERS))
    # Single runs have one point each, and so no curve: their KLs are in the first table
    for pair in report["frontier"] if report["kind"] == "experiment" else []:
        if not pair["seeds"]:
            found.append(note("no_common_seed", a=pair["a"], b=pair["b"]))
        elif not pair["rows"]:
            found.append(note("no_overlap", a=pair["a"], b=pair["b"], ranges=pair["ranges"]))
    if report["unit"]["samples_per_prompt"] < 2:
        found.append(note("no_win_rate"))
    return found


def _missing(report: Report) -> Iterator[dict[str, Any]]:
    methods, meta = report["methods"], report["meta"]
    for method, entry in methods.items():
        if not entry["seeds"] and not entry["baseline"]:
            yield note("not_measured", method=method)
    if report["missing"]:
        yield note("missing_trials", trials=report["missing"])
    for run, reason in meta.get("stopped", {}).items():
        yield note("stopped", run=run, reason=reason)

    # what the experiment still has to measure
    names = [name for name in meta.get("missing", []) if name.startswith("measure/seed-")]
    if names:
        yield note("missing_measurements", names=[name.removeprefix("measure/") for name in names])
    for method, entry in report["tuned"]["methods"].items():
        lacking = [
            value for value in methods[method]["swept_values"] if value not in entry["swept_values"]
        ]
        if lacking:
            yield note("left_out", method=method, swept_values=lacking)
