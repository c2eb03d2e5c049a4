"""A judge's word on the policies of a comparison or an experiment."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.compare.results import Point, Results, independent_pairs
from rlhf.compare.wins import Verdicts, win_rate
from rlhf.judge.judges import Judge, load_judge
from rlhf.judge.pairs import JudgedPair, add_votes, ask, orders, store_pairs, write_pairs
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
        first, second = (list(map(ends[name].get, seeds)) for name in (a, b))
        answers = []
        for one, other in zip(first, second, strict=True):
            verdicts, asked = judge_wins(judge, results, one, other, folder / CACHE)
            answers.append(verdicts)
            judged += asked
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
    # the initial policy, the last, is the one compared with
    report = judge_report(judged, judge.name, client=judge.client, policies=policies[::-1])
    # the report on the judge has them by pairs of policies
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


def judge_wins(
    judge: Judge, results: Results, a: Point, b: Point, cache: str | Path
) -> tuple[Verdicts, list[JudgedPair]]:
    """Ask about each sample of `a` against one of `b` that does not share its sampling noise, at
    every prompt; return what decides between them, and what the judge said pair by pair.
    """
    partners = one_partner_each(independent_pairs(a, b))
    judged = []
    for i, prompt in enumerate(results.prompts):
        for k, m in partners:
            answers = {"answer_a": a.responses[i][k], "answer_b": b.responses[i][m]}
            sides = {"a": a.method, "b": b.method, **answers}
            judged.append(JudgedPair(prompt=prompt, group=results.groups[i], **sides))
    ask(judge, judged, cache)
    found = orders(judged)
    shares = np.array([pair.share for pair in judged]).reshape(len(results.prompts), len(partners))
    if found["consistency"] is None:
        return Verdicts(shares, partners, asked=found["asked"]), judged
    said = (found[name] for name in ("consistency", "prefers_first", "asked"))
    return Verdicts(shares, partners, *said), judged


def one_partner_each(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return one of the pairs (sample of a, sample of b) for each sample of a.

    Sample k of a is paired with the next sample of b after k, cyclically, so that no sample is asked about
    more often than it must be.
    """
    size = 1 + max((m for _, m in pairs), default=0)
    found: dict[int, int] = {}
    for k, m in sorted(pairs, key=lambda pair: (pair[0], (pair[1] - pair[0] - 1) % size)):
        found.setdefault(k, m)
    return list(found.items())
