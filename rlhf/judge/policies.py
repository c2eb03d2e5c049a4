"""A judge's word on the policies of a comparison or an experiment."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.compare.judge import Judge, Verdicts, judge_wins, load_judge
from rlhf.compare.results import Point, Results, key
from rlhf.compare.wins import win_rate
from rlhf.judge.pairs import JudgedPair, add_votes, store_pairs, write_pairs
from rlhf.judge.report import judge_report

# what the judge said, pair by pair, for `rlhf judge`
JUDGED = "judged.jsonl"
# of judges that are functions or services, P(first better) by pair
CACHE = "judge.jsonl"
# of language models, with their texts
ANSWERS = "judge-answers.jsonl"


def judge_policies(
    spec: dict[str, Any],
    methods: Iterable[str],
    results: Results,
    report: dict[str, Any],
    folder: Path,
    votes: str | None = None,
) -> dict[str, Any]:
    """Ask a judge of pairs about the tuned ends of all methods, against each other and against the
    initial policy; return what is report["judge_of_pairs"].

    votes: a preference store; its votes on the same answers say how far the judge can be believed,
    and correct its win rates. Answers are kept in `folder`, so that a report that was cut off asks
    only for what it lacks.
    """
    judge = load_judge(spec, folder / ANSWERS)
    ends = ends_to_ask(methods, results, report)
    initial = results.initial.method
    pairs = [*itertools.combinations(ends, 2), *itertools.product(ends, [initial])]
    # it has no seed: it is compared with the policies of each
    ends[initial] = dict.fromkeys(report["unit"]["seeds"], results.initial)

    rows, judged = [], []
    for a, b in pairs:
        seeds = sorted(set(ends[a]) & set(ends[b]))
        if not seeds:
            continue
        first, second = [ends[a][seed] for seed in seeds], [ends[b][seed] for seed in seeds]
        answers = []
        for one, other in zip(first, second, strict=True):
            verdicts = judge_wins(judge, results, one, other, folder / CACHE)
            answers.append(verdicts)
            judged += judged_pairs(results, one, other, verdicts)
        found = win_rate(first, second, results, answers)
        # with one sample a prompt no two answers have independent noise
        if found is not None:
            rows.append({"a": a, "b": b, "seeds": seeds, **found.to_dict()})
    return {"name": judge.name, **_believed(judge, judged, rows, list(ends), folder, votes)}


def _believed(
    judge: Judge,
    judged: list[JudgedPair],
    rows: list[dict[str, Any]],
    policies: list[str],
    folder: Path,
    votes: str | None,
) -> dict[str, Any]:
    """Return the rows with corrected win rates, and the report on the judge itself."""
    if votes:
        add_votes(judged, store_pairs(votes))
    write_pairs(folder / JUDGED, judged)
    client = judge.client
    # the initial policy, the last, is the one compared with
    report = judge_report(
        judged,
        judge.name,
        model=client.spec.model if client else "",
        policies=policies[::-1],
        usage=client.usage.to_dict() if client else None,
    )
    corrected = {(row["a"], row["b"]): row["corrected"] for row in report["win_rates"]}
    for row in rows:
        row["corrected"] = corrected.get((row["a"], row["b"]))
    return {"rows": rows, "judge": report}


def ends_to_ask(
    methods: Iterable[str], results: Results, report: dict[str, Any]
) -> dict[str, dict[int, Point]]:
    """Return method -> seed -> the end of its trial; of a swept option at one value."""
    ends = {}
    for method in methods:
        swept = swept_to_ask(report, method)
        # single runs sweep nothing
        if swept is not None or results.kind == "runs":
            ends[method] = {point.seed: point for point in results.ends(method, swept)}
    return ends


def swept_to_ask(report: dict[str, Any], method: str) -> float | None:
    """Return the swept value that a score has chosen, else the middle one; None where none is
    measured.
    """
    if method in report["tuned"]["methods"]:
        return report["tuned"]["methods"][method]["usual"]
    # no score has chosen a value: ask about the middle one
    values = report["methods"][method]["swept_values"]
    return values[len(values) // 2] if values else None


def judged_pairs(results: Results, a: Point, b: Point, verdicts: Verdicts) -> list[JudgedPair]:
    """Return what a judge said of two policies, pair by pair."""
    pairs = []
    of_a, of_b = results.responses[key(a)], results.responses[key(b)]
    for i, prompt in enumerate(results.prompts):
        for j, (k, m) in enumerate(verdicts.pairs):
            p_ab, p_ba = map(float, verdicts.orders[i, j])
            pair = JudgedPair(
                prompt=prompt,
                group=results.groups[i],
                a=a.method,
                b=b.method,
                answer_a=of_a[i][k],
                answer_b=of_b[i][m],
                p_ab=p_ab,
                p_ba=p_ba,
            )
            pairs.append(pair)
    return pairs
