"""Rankings of more than two answers, and the pairs that they stand for.

An order of k answers says something of each of its k (k - 1) / 2 pairs, but these are not so many
independent votes: k - 1 choices made it (the best of k, the best of the rest, ...: Plackett 1975,
"The analysis of permutations"). So a ranking counts as one answer in counts, shares and intervals,
and its pairs are trained on, and tell annotators' skill, with the weight of k - 1. Bradley and
Terry's model on all pairs of Plackett's is consistent with whatever weight (Azari Soufiani et al.
2013, "Generalized method-of-moments for rank aggregation": full breaking).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.data.spans import renamed
from rlhf.data.votes import Vote
from rlhf.errors import UserError
from rlhf.stats import jackknife_interval

# ids of responses, the best first, equally good ones together: [[7], [5, 9]]
Order = list[list[int]]


@dataclass
class Ranked:
    """A ranking that stands; `order` is empty where the annotator skipped it."""

    event: int
    ranking: int
    annotator: str
    order: Order
    # the ids as they stood on the page
    shown: list[int] | None = None
    reason: str | None = None
    tags: list[str] = field(default_factory=list)
    duration_ms: int | None = None
    created: str = ""
    source: str = "human"
    # marked passages, as in rlhf/data/spans.py; "answer" is the response's id
    spans: list[dict[str, Any]] = field(default_factory=list)


def check_order(order: Sequence[Sequence[int]], responses: Sequence[int]) -> None:
    """Raise UserError unless the order places each of these responses once."""
    placed = list(itertools.chain.from_iterable(order))
    if sorted(placed) != sorted(responses) or not all(order):
        raise UserError(
            f"order: found {[list(equal) for equal in order]}, expected each of {sorted(responses)} once, equally good "
            "ones together"
        )


def order_of_places(responses: Sequence[int], places: Sequence[int]) -> Order:
    """Return the order of responses by the place that each was given, 1 the best.

    The same place is equally good. Only which place is before which counts: 1, 1, 3 says what 1, 1,
    2 says.
    """
    groups: dict[int, list[int]] = {}
    for response, place in zip(responses, places, strict=True):
        groups.setdefault(place, []).append(response)
    return [sorted(groups[place]) for place in sorted(groups)]


def pair_choices(order: Order) -> dict[tuple[int, int], str]:
    """Return what an order says of every two responses (a, b), a < b: "a", "b" or "tie"."""
    places: dict[int, int] = {}
    for place, equal in enumerate(order):
        places |= dict.fromkeys(equal, place)
    found = {}
    for a, b in itertools.combinations(sorted(places), 2):
        choice = "a" if places[a] < places[b] else "b"
        found[a, b] = "tie" if places[a] == places[b] else choice
    return found


def votes_of(ranked: Ranked, pairs: Iterable[tuple[int, int, int]]) -> list[Vote]:
    """Return what a ranking says of its pairs (comparison, a, b): of each a skip where it was
    skipped.
    """
    choices = pair_choices(ranked.order)
    answers = sum(map(len, ranked.order))
    votes = []
    for comparison, a, b in pairs:
        vote = Vote(
            ranked.event,
            comparison,
            ranked.annotator,
            choices.get((a, b), "skip"),
            reason=ranked.reason,
            tags=ranked.tags,
            duration_ms=ranked.duration_ms,
            created=ranked.created,
            source=ranked.source,
            ranking=ranked.ranking,
            # a skip says nothing, whatever it counts
            weight=pair_weight(answers) if answers else 1.0,
            spans=renamed(ranked.spans, {a: "a", b: "b"}),
        )
        votes.append(vote)
    return votes


def pair_weight(answers: int) -> float:
    """Return what each pair of a ranking of k answers counts, 2 / k, so that all count k - 1.

    That lies between InstructGPT's 1 (Ouyang et al. 2022, eq. 1: one batch element a ranking) and
    2 (k - H_k), the information of a ranking of equals in that of a pair (k = 4: 3.83).
    """
    return 2 / answers


def kendall_tau(one: dict[int, str], other: dict[int, str]) -> float:
    """Return Kendall's tau-b (1945) of two annotators' choices by pair of one ranking.

        tau_b = (C - D) / sqrt((n - ties of one) (n - ties of other))

    C, D: of the n pairs those in the same and in the opposite order. nan where one of them calls
    all answers equally good.
    """
    agree = sum(_sign(choice) * _sign(other[pair]) for pair, choice in one.items())
    sided = [sum(choice != "tie" for choice in choices.values()) for choices in (one, other)]
    return agree / math.sqrt(sided[0] * sided[1]) if all(sided) else math.nan


def _sign(choice: str) -> int:
    return {"a": 1, "b": -1}.get(choice, 0)


def tau_summary(votes: Iterable[Vote]) -> dict[str, Any]:
    """Return how far annotators order answers alike: {"rankings" (ordered by two or more), "estimate",
    "low", "high"}.

    The mean over rankings of the mean of Kendall's tau-b over every two annotators; the 95 %
    interval is over rankings. votes: of which those of rankings are read.
    """
    choices: dict[int, dict[str, dict[int, str]]] = {}
    for vote in votes:
        if vote.ranking is not None and vote.choice != "skip":
            own = choices.setdefault(vote.ranking, {}).setdefault(vote.annotator, {})
            own[vote.comparison] = vote.choice
    means = []
    for by_annotator in choices.values():
        every_two = itertools.combinations(by_annotator.values(), 2)
        taus = [kendall_tau(one, other) for one, other in every_two]
        known = [tau for tau in taus if not math.isnan(tau)]
        if known:
            means.append(math.fsum(known) / len(known))
    if not means:
        return {"rankings": 0, "estimate": math.nan, "low": math.nan, "high": math.nan}
    values = np.array(means)
    estimate = float(values.mean())
    without = (values.sum() - values) / max(1, len(values) - 1)
    low, high, _ = jackknife_interval(estimate, without, bounds=(-1.0, 1.0))
    return {"rankings": len(values), "estimate": estimate, "low": low, "high": high}
