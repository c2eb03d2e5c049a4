"""The claims of a report and what limits it, as records made from the finished numbers of
report.json; rlhf/report/sentences.py has a template for each kind.

A difference is claimed where its p, adjusted for all claims of the report (Holm 1979), is below 1 -
level. A claim about methods needs MIN_SEEDS run seeds and MIN_CLUSTERS groups; a comparison of runs
claims something about those runs alone and needs the groups only. Everything else has its interval
and `sign` None: it is shown without a verdict.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.report.format import Report, proxies_of, usual_values, win_rate_of
from rlhf.stats import MIN_CLUSTERS
from rlhf.stats.crossed import holm, side

VerdictKind = Literal["equal_kl", "tuned", "over_optimisation", "exploited_proxy"]
Reservation = Literal["form", "contradicted", "correction", "win_rate"]
NoteKind = Literal[
    # score, score_kind, proxies: what decides, and what methods learnt from and so does not
    "judge",
    # proxies: nothing decides
    "no_judge",
    # method: nothing of it has been measured yet
    "not_measured",
    # trials: [{method, swept, seed}] that have not ended
    "missing_trials",
    # run, reason: a guard ended it
    "stopped",
    # names: the experiment is not finished
    "missing_measurements",
    # method, swept_values: lack seeds, so that they could not be chosen
    "left_out",
    # method, swept, seed, score, others: [lowest, highest], p_adjusted
    "outlier",
    # a, b: not compared at equal KL
    "no_common_seed",
    # a, b, ranges: {method: [lowest, highest KL]}: nothing can be said at equal KL
    "no_overlap",
    # groups, needed: no verdict on anything
    "few_groups",
    # one sample a prompt: no two answers with independent noise
    "no_win_rate",
]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison by the judge, and what may be said of it.

    kind:
      equal_kl: `a` over `b` at the same `kl`.
      tuned: `a` over `b`, each at its best swept value (at its end, where nothing is swept), at KLs
          of their own.
      over_optimisation: `a` from the judge's peak to the largest KL; sign 1 reproduced, -1 not
          reproduced, 0 undecided.
      exploited_proxy: run `a` raised the scores named in `evidence["proxies"]` over `b` while the
          judge fell.
    reservation, why the numbers allow to say less than they seem to:
      form: the fitted curve shows the difference, lines from point to point do not (equal_kl).
      contradicted: lines from point to point lie on the other side, so that `sign` is 0 (equal_kl).
      correction: the interval alone leaves out 0, the adjusted p does not, so that `sign` is 0.
      win_rate: the win rate is on the other side: a few comparisons decide the mean (tuned).
    """

    kind: VerdictKind
    a: str
    b: str
    # Estimate.to_dict() of a - b by the judge
    difference: dict[str, Any]
    # 1: a is ahead, -1: behind, 0: no difference can be shown, None: no verdict
    sign: int | None
    p_adjusted: float | None = None
    # in the judge's units, shown in 4 of 5 repeats
    minimum_detectable_effect: float | None = None
    # nats; None: each at its own
    kl: float | None = None
    reservation: Reservation | None = None
    # the row of the report it was read from: ranges, chosen values, peak, end
    evidence: dict[str, Any] | None = None


def note(kind: NoteKind, **fields: Any) -> dict[str, Any]:
    """Return one limit of a report for report.json; the fields of each kind are listed at `NoteKind`."""
    return {"kind": kind, **fields}


def adjust(claims: Iterable[tuple[dict[str, Any], dict[str, Any]]], min_seeds: int) -> int:
    """Give each claim its "p_adjusted", Holm's over all of them: one family, all that the report
    claims.

    claims: (where the number goes, its estimate with "p", "seeds" and "groups"). What rests on
    fewer than `min_seeds` seeds or MIN_CLUSTERS groups, or has no interval, is no claim and gets
    None. Returns how many claims there are.
    """
    entries, ps = [], []
    for entry, estimate in claims:
        entry["p_adjusted"] = None
        if (
            estimate["seeds"] >= min_seeds
            and estimate["groups"] >= MIN_CLUSTERS
            and estimate["p"] is not None
        ):
            entries.append(entry)
            ps.append(estimate["p"])
    # all at once: adding a claim makes the others harder to show
    for entry, p in zip(entries, holm(ps), strict=True):
        entry["p_adjusted"] = p
    return len(entries)


def verdicts(report: Report) -> Iterator[Verdict]:
    """Yield all that the report says of pairs and of over-optimisation, in the order of its
    sections.
    """
    for pair in report["frontier"]:
        for row in pair["rows"]:
            yield _at_equal_kl(pair, row, report)
    for row in report["tuned"]["rows"]:
        yield _tuned(row, report)
    if report["kind"] == "runs" and report["judge"] is not None:
        yield from _exploited(report)
    # single swept values are shown without a verdict
    for entry in report["overoptimisation"]:
        if entry["swept"] is None:
            yield Verdict(
                kind="over_optimisation",
                a=entry["method"],
                b=report["initial_policy"]["method"],
                difference=entry["judge"],
                sign=entry["sign"],
                p_adjusted=entry["p_adjusted"],
                evidence=entry,
            )


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
    a, b = row["a"], row["b"]
    wins = win_rate_of(report, (a, chosen.get(a)), (b, chosen.get(b)))
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


def notes(report: Report) -> Iterator[dict[str, Any]]:
    """Yield all limits of a report, the most important first."""
    judge, kinds = report["judge"], report["score_kinds"]
    proxies = proxies_of(kinds)
    if judge is None:
        yield note("no_judge", proxies=proxies)
    else:
        yield note("judge", score=judge, score_kind=kinds[judge], proxies=proxies)
    yield from _missing(report)
    for outlier in report["outliers"]:
        yield note("outlier", **outlier)
    if judge is not None and report["unit"]["groups"] < MIN_CLUSTERS:
        yield note("few_groups", groups=report["unit"]["groups"], needed=MIN_CLUSTERS)
    # single runs have one point each, and so no curve: their KLs are in the first table
    if report["kind"] == "experiment":
        yield from _not_at_equal_kl(report)
    if report["unit"]["samples_per_prompt"] < 2:
        yield note("no_win_rate")


def _not_at_equal_kl(report: Report) -> Iterator[dict[str, Any]]:
    """Yield the pairs of methods that were not compared at equal KL, and why."""
    for pair in report["frontier"]:
        if not pair["seeds"]:
            yield note("no_common_seed", a=pair["a"], b=pair["b"])
        elif not pair["rows"]:
            yield note("no_overlap", a=pair["a"], b=pair["b"], ranges=pair["ranges"])


def _missing(report: Report) -> Iterator[dict[str, Any]]:
    """Yield what was to be trained or measured and is not in the report."""
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
