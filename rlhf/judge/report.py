"""What a judge said of pairs, how far it can be believed, and what it cost: as numbers and as
Markdown.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from rlhf.judge.agreement import agreement, length_bias, same_family, self_preference
from rlhf.judge.client import Client
from rlhf.judge.correct import MIN_LABELLED, EqualAnswers, corrected_win_rate
from rlhf.judge.pairs import JudgedPair, ordered, orders
from rlhf.report.format import share as share_text
from rlhf.stats import group_means, student_quantile
from rlhf.stats.crossed import crossed_mean, share
from rlhf.text import UNKNOWN, markdown_table, with_interval

LEVEL = 0.95


def judge_report(
    pairs: Sequence[JudgedPair],
    name: str,
    *,
    client: Client | None = None,
    own: Sequence[str] = (),
    policies: Sequence[str] = (),
) -> dict[str, Any]:
    """Return everything about a judge's verdicts, ready for JSON.

    name: the judge's. client: of a language model, which knows what was spent, and its name, to find
    policies of its family; `own` names them instead. policies: in the order in which the first of
    two is the one compared with.
    """
    # the first of two names is the policy whose wins are counted
    pairs = ordered(pairs, policies)
    named = list(dict.fromkeys(itertools.chain.from_iterable((p.a, p.b) for p in pairs)))
    own = list(own) or same_family(client.spec.model if client else "", named)
    return {
        "name": name,
        "pairs": len(pairs),
        **orders(pairs),
        "agreement": agreement(pairs),
        "length": length_bias(pairs),
        "self_preference": self_preference(pairs, own),
        "win_rates": list(win_rates(pairs)),
        "usage": asdict(client.usage) if client else None,
    }


def win_rates(pairs: Sequence[JudgedPair]) -> Iterator[dict[str, Any]]:
    """Yield, for each two policies, how often the first wins by the judge, by the judge corrected
    by people's votes, and by those votes alone; each group of prompts counts once.
    """
    by_policies: dict[tuple[str, str], list[JudgedPair]] = {}
    for pair in pairs:
        # two answers of one policy say nothing about it
        if pair.a != pair.b:
            by_policies.setdefault((pair.a, pair.b), []).append(pair)
    for (a, b), found in by_policies.items():
        shares = np.array([pair.share for pair in found])
        votes = np.array([pair.votes for pair in found])
        groups = [pair.group for pair in found]
        equal = np.array([pair.answer_a == pair.answer_b for pair in found])
        corrected = corrected_win_rate(votes, shares, groups, LEVEL, equal=equal)
        yield {
            "a": a,
            "b": b,
            "pairs": len(found),
            "groups": len(set(groups)),
            "voted": int(np.isfinite(votes).sum()),
            "judge": _mean(shares, groups),
            "people": _by_people(votes, equal, groups),
            "corrected": None if corrected is None else corrected.to_dict(),
        }


def _by_people(
    votes: np.ndarray, equal: np.ndarray, groups: Sequence[str]
) -> dict[str, Any] | None:
    """Return the win rate by people's votes, equal answers being ties that nobody is asked about."""
    # equal answers are known of prompts without votes too
    ties = EqualAnswers(group_means(equal, groups))
    voted = np.isfinite(votes) & ~equal
    if not voted.any():
        return None
    means = ties.within(group_means(votes, groups, voted))
    # of the groups with a vote
    means = means[np.isfinite(means)]
    found = crossed_mean(means[None], null=0.5, level=LEVEL)
    estimate, se = ties.all_groups(found.estimate, found.se)
    half = student_quantile(0.5 + LEVEL / 2, len(means) - 1) * se if len(means) > 1 else math.nan
    found = replace(found, estimate=estimate, se=se, low=estimate - half, high=estimate + half)
    row = share(found, LEVEL).to_dict()
    return {name: row[name] for name in ("estimate", "low", "high", "groups")}


def _mean(values: np.ndarray, groups: Sequence[str]) -> dict[str, Any] | None:
    """Return the mean over groups of the values that are there, with the interval of a share."""
    known = np.isfinite(values)
    if not known.any():
        return None
    means = group_means(values[known], np.asarray(groups)[known])
    found = share(crossed_mean(means[None], null=0.5, level=LEVEL), LEVEL).to_dict()
    return {name: found[name] for name in ("estimate", "low", "high", "groups")}


def markdown(report: dict[str, Any]) -> list[str]:
    """Return the report as lines of Markdown."""
    lines = [f"## The judge {report['name']}", "", _asked(report), ""]
    if report["win_rates"]:
        lines += _win_rate_table(report["win_rates"])
    header = ["what it follows", "judge", "people", "judge less people"]
    lines += ["", *markdown_table(header, belief(report), right=(1, 2, 3)), ""]
    if report["agreement"]:
        lines += _annotator_table(report["agreement"]["annotators"])
    lines.append(
        "Agreement: of the people's choices the share that is the judge's; of people, each annotator "
        "against the rest. Slope: log-odds of winning against the length difference. 95 % over groups "
        "of prompts. Corrected: prediction-powered (arXiv 2311.01453); the pairs with votes must be a "
        "random part."
    )
    return lines


def _asked(report: dict[str, Any]) -> str:
    """Return what was asked, what could not be read, and what it cost, as one line."""
    parts = [f"{report['asked']} of {report['pairs']} pairs asked about in both orders"]
    if report["consistency"] is not None:
        parts.append(f"{100 * report['consistency']:.1f} % with one winner in both")
        parts.append(f"first place gets {100 * report['prefers_first']:.1f} %")
    parts.append(f"{report['no_verdict']} without a verdict")
    usage = report["usage"]
    if usage:
        parts.append(f"{usage['asked']} questions now, {usage['cached']} known before")
        parts.append(f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens")
        if usage["cost"] is not None:
            parts.append(f"cost {usage['cost']:.4g}")
    return "; ".join(parts) + "."


def _win_rate_table(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        corrected = row["corrected"]
        text = f"needs {MIN_LABELLED} voted prompts" if row["voted"] else UNKNOWN
        worth = UNKNOWN
        if corrected:
            text = percent(corrected)
            worth = f"{corrected['worth']:.2f}" if corrected["worth"] else UNKNOWN
        voted = f"{row['voted']} of {row['pairs']}"
        judge, people = percent(row["judge"]), percent(row["people"])
        cells.append([f"{row['a']} over {row['b']}", judge, text, people, voted, worth])
    header = ["wins [95 %]", "judge", "judge corrected", "people alone", "pairs with votes"]
    return markdown_table([*header, "a vote is worth"], cells, right=(1, 2, 3, 4, 5))


def belief(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of agreement, length and own answers."""
    rows = []
    found = report["agreement"]
    for name, title in (("all", "agreement"), ("decided", "agreement where both took a side")):
        if found:
            own = found[name]
            rows.append([title, *map(percent, (own["judge"], own["people"]))])
            rows[-1].append(percent(own["difference"], signed=True))
    length = report["length"]
    people = length["people"] or {"longer": None, "slope": None}
    longer = [percent(length["judge"]["longer"]), percent(people["longer"]), UNKNOWN]
    rows.append(["the longer answer", *longer])
    slopes = [length["judge"]["slope"], people["slope"], length["excess"]]
    rows.append(["slope on length", *map(_number, slopes)])
    own = report["self_preference"]
    if own:
        cells = [percent(own["judge"]), percent(own["people"])]
        cells.append(percent(own["difference"], signed=True))
        rows.append([f"own answers win ({', '.join(own['own'])})", *cells])
    return rows


def _annotator_table(annotators: dict[str, Any]) -> list[str]:
    rows = []
    for name, own in annotators.items():
        rows.append([name, percent(own["rest"]), percent(own["judge"])])
    header = ["annotator", "with the other people", "with the judge"]
    return [*markdown_table(header, rows, right=(1, 2)), ""]


def percent(value: dict[str, Any] | None, *, signed: bool = False) -> str:
    """Return a share with its interval, or with a sign a difference of shares."""
    if not signed:
        return share_text(value)
    return with_interval(value, lambda share: f"{100 * share:+.1f}")


def _number(value: dict[str, Any] | None) -> str:
    return with_interval(value, "{:+.2f}".format)
