"""How far annotators agree (alpha.py, rankings.py), and how far each can be relied on.

    for person in annotator_reliability(votes, controls={7: "a"}): print(person.annotator, person.flags)

A skip counts nowhere. Whatever cannot be computed (nobody judged the same pair, all said the same)
is nan, and None in `agreement_summary`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rlhf.data.alpha import (
    alpha_interval,
    cluster_of,
    clusters_of,
    pairwise_kappas,
    ratings_of,
)
from rlhf.data.rankings import tau_summary
from rlhf.data.votes import Vote, skills
from rlhf.files import json_safe
from rlhf.stats import fair_coin_p, wilson

# P-value below which an annotator gets a flag
SURE = 0.01
# Words a second: nobody reads faster
SKIM = 15.0
# Seconds below which nobody has looked at two answers
FASTEST = 1.0
# Share of too fast votes above which an annotator gets a flag
HASTE = 0.2
# Votes below which nobody gets a flag: of somebody with one hasty vote in twenty up to 5 % would be
# told that they vote too fast, from here on below 1 % (the other flags are tests at p < 0.01)
FEWEST = 20
# Share of the control pairs that a reliable annotator gets right
CONTROLS_RIGHT = 0.8


@dataclass
class Share:
    """`count` of `n` (a count may be fractional), with the Wilson (1927) score interval at 95 %."""

    count: float
    n: int
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def __post_init__(self):
        if self.n:
            self.estimate = self.count / self.n
            self.low, self.high = wilson(self.count, self.n)


@dataclass
class Reliability:
    """One annotator. `flags` says in words what is wrong; empty is good."""

    annotator: str
    # standing votes, skips and control pairs included; a ranking is one
    votes: int
    # of the same: a, b, tie, both_bad, skip, and rank for an order
    choices: dict[str, int]
    # of the other annotators' choices on the same pairs, those that were the same
    rest: Share
    # of the control pairs that were judged, those that were right
    controls: Share
    # Dawid-Skene: of the votes for a side where one is better, the share for that side
    skill: float
    # of the votes for a side, those for the answer shown on the left; 0.5 without a bias
    left: Share
    # exact binomial p-value of that share under 0.5
    left_p: float
    # median time of a vote
    seconds: float
    # votes in less time than it takes to skim both answers
    fast: Share
    flags: list[str] = field(default_factory=list)


def agreement_summary(
    votes: list[Vote], controls: dict[int, str] | None = None, words: dict[int, int] | None = None
) -> dict[str, Any]:
    """Return everything here about a set of votes, ready for JSON (None where it cannot be
    computed).

    What adjudicators say does not count here: they see disputed pairs alone.
    {"votes", "pairs", "pairs_judged_twice", "alpha": {"nominal": {"estimate", "low", "high"},
    "ordinal": ...}, "kappa": [{"one", "other", "kappa", "low", "high", "pairs"}], "tau":
    `tau_summary`, "annotators": [Reliability as a dict]}. Alpha and kappa are over the pairs that are
    not controls, those of rankings included; their intervals leave out a whole ranking at a time, and
    "votes" counts it once. controls, words: as in `annotator_reliability`.
    """
    controls = controls or {}
    normal = [v for v in votes if v.comparison not in controls and not v.is_final]
    nominal, clusters = ratings_of(normal), clusters_of(normal)
    alphas = {}
    for level in ("nominal", "ordinal"):
        found = alpha_interval(ratings_of(normal, level), level, clusters)
        alphas[level] = dict(zip(("estimate", "low", "high"), found, strict=True))
    summary = {
        "votes": len({vote.event for vote in normal}),
        "pairs": len(nominal),
        "pairs_judged_twice": sum(len(values) > 1 for values in nominal.values()),
        "alpha": alphas,
        "kappa": pairwise_kappas(nominal, clusters),
        "tau": tau_summary(normal),
        "annotators": list(map(asdict, annotator_reliability(votes, controls, words))),
    }
    return json_safe(summary, nan_as_null=True)


def annotator_reliability(
    votes: list[Vote], controls: dict[int, str] | None = None, words: dict[int, int] | None = None
) -> list[Reliability]:
    """Return one entry for each annotator, by name.

    votes: all that stand, those on control pairs included. controls: comparison -> the right
    answer, "a" or "b".
    words: comparison -> words of both answers together, so that a vote is too fast if it took less
    than skimming them (15 words a second, at least a second); without, less than a second.

    Flags are raised at p < 0.01 for each annotator and question, from `FEWEST` votes on: an honest
    one gets one in a hundred times. The side bias supposes that sides were drawn at random, as the
    web app does. Adjudicators have no entry: their word is what the others' skill is measured by.
    """
    controls, words = controls or {}, words or {}
    by_name: dict[str, list[Vote]] = {}
    people_votes = [vote for vote in votes if not vote.is_final]
    for vote in people_votes:
        by_name.setdefault(vote.annotator, []).append(vote)
    agreement = _agreement_with_the_rest(
        [vote for vote in people_votes if vote.comparison not in controls]
    )
    confusion = skills(votes, controls).confusion

    people = []
    for name, own in sorted(by_name.items()):
        # its share and its p are of the same votes
        left = _left_share(own)
        answers = {vote.event: _choice_of(vote) for vote in own}
        person = Reliability(
            annotator=name,
            votes=len(answers),
            choices=dict(Counter(answers.values())),
            rest=agreement.get(name, Share(0, 0)),
            controls=_controls_right(own, controls),
            skill=_skill(confusion.get(name)),
            left=left,
            left_p=fair_coin_p(int(left.count), left.n),
            seconds=_median_seconds(own),
            fast=_too_fast(own, words),
        )
        people.append(person)
    # compared with the others, so all have to be there first
    for person in people:
        others = [other for other in people if other is not person]
        if person.votes >= FEWEST:
            person.flags = _flags(person, others)
    return people


def _controls_right(votes: list[Vote], controls: dict[int, str]) -> Share:
    judged = [vote for vote in votes if vote.comparison in controls and vote.choice != "skip"]
    return Share(sum(vote.choice == controls[vote.comparison] for vote in judged), len(judged))


def _choice_of(vote: Vote) -> str:
    """Return the choice of a vote; of one that an order implies, where a and b are only names: rank."""
    is_order = vote.ranking is not None and vote.choice != "skip"
    return "rank" if is_order else vote.choice


def _skill(confusion: np.ndarray | None) -> float:
    """Return, of the votes for a side where "a" is truly better, the share for "a" (a and b are
    mirrored).
    """
    if confusion is None:
        return math.nan
    right, wrong = confusion[0, :2]
    return float(right / (right + wrong))


def _left_share(votes: list[Vote]) -> Share:
    sided = [vote for vote in votes if vote.choice in ("a", "b") and vote.left]
    return Share(sum(vote.choice == vote.left for vote in sided), len(sided))


def _median_seconds(votes: list[Vote]) -> float:
    # all votes of a ranking have its time
    durations = {vote.event: vote.duration_ms for vote in votes if vote.duration_ms is not None}
    return statistics.median(durations.values()) / 1000 if durations else math.nan


def _too_fast(votes: list[Vote], words: dict[int, int]) -> Share:
    fast: dict[int, bool] = {}
    for vote in votes:
        if vote.duration_ms is None:
            continue
        shortest = max(FASTEST, words.get(vote.comparison, 0) / SKIM)
        # who orders more answers has read the two longest at least
        fast[vote.event] = fast.get(vote.event, False) or vote.duration_ms < 1000 * shortest
    return Share(sum(fast.values()), len(fast))


def _agreement_with_the_rest(votes: list[Vote]) -> dict[str, Share]:
    """Return the mean over an annotator's pairs of the share of the others who said the same; a
    ranking counts as one pair, with the mean over its own.
    """
    clusters = clusters_of(votes)
    totals: dict[str, dict[Hashable, list[float]]] = {}
    for comparison, values in ratings_of(votes).items():
        # alone on a pair, there is nobody to agree with
        if len(values) == 1:
            continue
        counts = Counter(values.values())
        for name, value in values.items():
            share = (counts[value] - 1) / (len(values) - 1)
            cluster = cluster_of(comparison, clusters)
            totals.setdefault(name, {}).setdefault(cluster, []).append(share)
    found = {}
    for name, shares in totals.items():
        means = [math.fsum(own) / len(own) for own in shares.values()]
        found[name] = Share(math.fsum(means), len(means))
    return found


def _flags(person: Reliability, others: list[Reliability]) -> list[str]:
    """Return what can be said against an annotator beyond chance."""
    flags = []
    if person.left_p < SURE:
        side = "left" if person.left.estimate > 0.5 else "right"
        flags.append(f"prefers the {side} side ({person.left.estimate:.0%} left)")

    compared = sum(other.rest.n for other in others)
    usual = sum(other.rest.count for other in others) / compared if compared else math.nan
    if _surely_below(person.rest, usual):
        flags.append(
            f"agrees less with the rest ({person.rest.estimate:.0%}) than they do ({usual:.0%})"
        )
    if _surely_below(person.controls, CONTROLS_RIGHT):
        flags.append(
            f"fails control pairs ({person.controls.count:g} of {person.controls.n} right)"
        )
    if person.fast.n and person.fast.estimate > HASTE:
        flags.append(f"votes faster than one can read ({person.fast.estimate:.0%} of the votes)")
    return flags


def _surely_below(share: Share, bound: float) -> bool:
    """Return whether the share is below `bound` at p < SURE, by the exact binomial test.

    A count that is a sum of shares is rounded up.
    """
    if not share.n or math.isnan(bound):
        return False
    from scipy.special import bdtr

    return float(bdtr(math.ceil(share.count - 1e-9), share.n, bound)) < SURE
