"""How far a judge agrees with people, beside how far people agree with each other, and what it favours:
length, and answers of its own kind.

Shares are means over pairs with the delete-one-group jackknife (rlhf/stats): pairs of one group of
prompts depend on each other.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.files import json_safe
from rlhf.judge.pairs import JudgedPair
from rlhf.stats import jackknife_interval
from rlhf.stats.crossed import crossed_statistic
from rlhf.stats.logistic import logistic_fit, separable

# on the slope of a fit in which the length decides all
RIDGE = 0.01
# a row of numbers of each pair: what is counted, and of how much
Count = tuple[float, float]


def agreement(pairs: Sequence[JudgedPair]) -> dict[str, Any] | None:
    """Return how far the judge agrees with people; None where no pair has a vote and a verdict.

    judge: of the people's choices on a pair, the share that is the judge's (a, b, or a tie; both
    bad is a tie). people: each annotator against the rest, the same share among the others on the
    pair. difference: judge less people, on the pairs that both are known of. decided: the same
    three of choices and verdicts for a side alone. annotators: each against the rest, and with the
    judge. After Zheng et al. 2023 (arXiv 2306.05685, section 4.2, setups S1 and S2).
    """
    voted = [pair for pair in pairs if pair.people and not math.isnan(pair.share)]
    if not voted:
        return None
    groups = [pair.group for pair in voted]
    found: dict[str, Any] = {"pairs": len(voted), "groups": len(set(groups))}
    # setup S1 counts ties, S2 leaves them out
    for name, decided in (("all", False), ("decided", True)):
        by_judge = [_with_judge(pair, decided) for pair in voted]
        by_people = [_among_people(pair, decided) for pair in voted]
        found[name] = {
            "judge": ratio(by_judge, groups),
            "people": ratio(by_people, groups),
            "difference": difference(by_judge, by_people, groups),
        }
    found["annotators"] = _annotators(voted, groups)
    return found


def choice_of(share: float) -> str:
    """Return a share of A's wins as a choice."""
    return "tie" if share == 0.5 else "a" if share > 0.5 else "b"


def _said(pair: JudgedPair, decided: bool) -> list[str]:
    """Return the people's choices on a pair; with `decided` those for a side."""
    said = ["tie" if choice == "both_bad" else choice for choice in pair.people.values()]
    return [choice for choice in said if choice != "tie"] if decided else said


def _with_judge(pair: JudgedPair, decided: bool) -> Count:
    """Return (share of the people who chose as the judge, 1), or (0, 0) where nothing is compared."""
    verdict, said = choice_of(pair.share), _said(pair, decided)
    if not said or (decided and verdict == "tie"):
        return 0.0, 0.0
    return said.count(verdict) / len(said), 1.0


def _among_people(pair: JudgedPair, decided: bool) -> Count:
    """Return (mean over the annotators of the share of the others who chose the same, 1)."""
    said = _said(pair, decided)
    if len(said) < 2:
        return 0.0, 0.0
    # each against the others, themselves left out
    same = sum(said.count(choice) - 1 for choice in said)
    return same / (len(said) * (len(said) - 1)), 1.0


def _annotators(pairs: Sequence[JudgedPair], groups: Sequence[str]) -> dict[str, Any]:
    """Return, for each annotator, the shares of the rest and of the judge that chose as they did."""
    found = {}
    for name in sorted({name for pair in pairs for name in pair.people}):
        rest, judge = [], []
        for pair in pairs:
            own = pair.people.get(name)
            own = "tie" if own == "both_bad" else own
            said = _said(pair, decided=False)
            others = len(said) - 1
            rest.append(((said.count(own) - 1) / others, 1.0) if own and others else (0.0, 0.0))
            judge.append((float(choice_of(pair.share) == own), 1.0) if own else (0.0, 0.0))
        found[name] = {"rest": ratio(rest, groups), "judge": ratio(judge, groups)}
    return found


def ratio(counts: Sequence[Count], groups: Sequence[str]) -> dict[str, float | None]:
    """Return sum of parts over sum of wholes, in [0, 1], with its interval over groups."""
    return _estimate(lambda sums: sums[..., 0] / sums[..., 1], counts, groups, (0.0, 1.0))


def difference(
    one: Sequence[Count], other: Sequence[Count], groups: Sequence[str]
) -> dict[str, float | None]:
    """Return the difference of two ratios over the items that both have, with its interval."""
    both = [(*a, *b) for a, b in zip(one, other, strict=True) if a[1] and b[1]]
    kept = [g for a, b, g in zip(one, other, groups, strict=True) if a[1] and b[1]]

    def statistic(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    return _estimate(statistic, both, kept, None)


def _estimate(
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: Sequence[tuple[float, ...]],
    groups: Sequence[str],
    bounds: tuple[float, float] | None,
) -> dict[str, float | None]:
    """Return a statistic of sums over pairs with its jackknife interval over groups."""
    table = np.array(counts, dtype=np.float64)
    if not len(table) or not np.all(table[:, 1::2].sum(axis=0)):
        return {"estimate": None, "low": None, "high": None, "pairs": 0}
    # pairs of one group depend on each other, so it is left out whole
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, group, table)
    # groups that count nothing are no clusters of this share
    sums = sums[sums[:, 1] > 0]
    total = sums.sum(axis=0)
    estimate = float(statistic(total))
    # without its only group a share is not defined: then there is no interval
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high, _ = jackknife_interval(estimate, statistic(total - sums), bounds=bounds)
    row = {"estimate": estimate, "low": low, "high": high, "pairs": int(table[:, 1].sum())}
    return json_safe(row, nan_as_null=True)


def length_bias(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return how the judge's choice follows the difference in length, and the people's beside it.

        logit P(A wins) = theta + phi tanh(d / sd(d)),    d = words of A's answer - words of B's

    longer: of the verdicts for a side, the share for the longer answer. slope: phi, 0 where length
    does not count (the form of Dubois et al. 2024, arXiv 2404.04475, eq. 2). people: both of the
    votes. excess: the judge's slope less the people's on the pairs that have votes: beyond what
    length is worth to people. Intervals over groups.
    """
    told = [pair for pair in pairs if not math.isnan(pair.share)]
    # the people's own bias is what the judge's is read against
    voted = [pair for pair in told if pair.people]
    found = {"judge": _length(told, [pair.share for pair in told]), "people": None, "excess": None}
    if voted:
        found["people"] = _length(voted, [pair.votes for pair in voted])
        # on the same pairs, so that what length is worth there cancels
        shares = [[pair.share for pair in voted], [pair.votes for pair in voted]]
        found["excess"] = _slope(voted, shares)
    return found


def _length(pairs: Sequence[JudgedPair], shares: Sequence[float]) -> dict[str, Any]:
    longer = []
    for pair, share in zip(pairs, shares, strict=True):
        gap = pair.length_difference
        counts = share != 0.5 and gap != 0
        longer.append((float((share > 0.5) == (gap > 0)), 1.0) if counts else (0.0, 0.0))
    return {"longer": ratio(longer, [p.group for p in pairs]), "slope": _slope(pairs, [shares])}


def _slope(pairs: Sequence[JudgedPair], shares: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return the slope on the length difference, or the difference of the slopes of two, with its
    interval over groups; None where it cannot be told.
    """
    gap = np.array([pair.length_difference for pair in pairs], dtype=np.float64)
    names, group = np.unique([pair.group for pair in pairs], return_inverse=True)
    if not len(pairs) or gap.std() == 0 or len(names) < 2:
        return None
    outcomes = [np.asarray(own, dtype=np.float64) for own in shares]

    def statistic(_: np.ndarray, group_weights: np.ndarray) -> float:
        # left-out groups leave the fit and the scale of the lengths
        weight = group_weights[group]
        kept = weight > 0
        x, w = gap[kept], weight[kept] / weight.sum()
        x = np.tanh(x / math.sqrt(max(1e-12, float(w @ x**2 - (w @ x) ** 2))))
        slopes = [_fitted_slope(x, y[kept], w) for y in outcomes]
        return slopes[0] - slopes[1] if len(slopes) == 2 else slopes[0]

    found = crossed_statistic(statistic, 1, len(names)).to_dict()
    return {name: found[name] for name in ("estimate", "low", "high", "p")}


def _fitted_slope(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Return phi; 0 where one side wins all, a ridge where the length decides all."""
    if np.all(y == y[0]):
        return 0.0
    ridge = RIDGE if separable(x, y) else 0.0
    return float(logistic_fit(x, y, w, ridge, np.zeros(2))[1])


def self_preference(pairs: Sequence[JudgedPair], own: Sequence[str]) -> dict[str, Any] | None:
    """Return how often answers of the judge's own kind win against others, by the judge and by
    people; None where no pair has exactly one such answer.

    own: names of policies. difference: judge less people on the pairs with votes, the bias that
    Panickssery et al. 2024 (arXiv 2404.13076) find where it is above 0; without votes the judge's
    share alone says nothing about a bias.
    """
    by_judge: list[Count] = []
    by_people: list[Count] = []
    groups = []
    for pair in pairs:
        if math.isnan(pair.share) or (pair.a in own) == (pair.b in own):
            continue
        # seen from the judge's own kind
        mine = pair if pair.a in own else pair.turned()
        by_judge.append((mine.share, 1.0))
        by_people.append((mine.votes, 1.0) if pair.people else (0.0, 0.0))
        groups.append(pair.group)
    if not groups:
        return None
    return {
        "own": list(own),
        "judge": ratio(by_judge, groups),
        "people": ratio(by_people, groups),
        "difference": difference(by_judge, by_people, groups),
    }


def same_family(model: str, policies: Sequence[str]) -> list[str]:
    """Return the policies whose name begins with the same letters as the judge's model: qwen3-8b
    and Qwen/Qwen2.5-7B.
    """

    def family(name: str) -> str:
        first = re.match(r"[a-z]+", name.rpartition("/")[2].lower())
        return first[0] if first else ""

    return [name for name in policies if family(name) and family(name) == family(model)]
