"""Agreement of annotators, and how far each can be relied on.

    ratings = ratings_of(votes)                       # {comparison: {annotator: "a"}}
    alpha, low, high = alpha_interval(ratings)
    for person in annotator_reliability(votes, controls={7: "a"}): print(person.annotator, person.flags)

A skip counts nowhere. Whatever cannot be computed (nobody judged the same pair, all said the same)
is nan, and None in `agreement_summary`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rlhf.data.dawid_skene import Ratings
from rlhf.data.rankings import tau_summary
from rlhf.data.votes import Vote, skills
from rlhf.files import json_safe
from rlhf.stats import fair_coin_p, jackknife_interval, wilson

Level = Literal["nominal", "ordinal"]
# item -> what its values depend on beside it: the ranking that it is a pair of
Clusters = dict[Hashable, Hashable]

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
    # standing votes, skips and control pairs included
    votes: int
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


def ratings_of(votes: list[Vote], level: Level = "nominal") -> Ratings:
    """Return {comparison: {annotator: value}} of votes, without skips.

    nominal: the choice (a, b, tie, both_bad). ordinal: from -3 (b by far) over 0 (tie or both bad)
    to 3 (a by far); a vote without a strength counts as 1.
    """
    ratings: Ratings = {}
    for vote in votes:
        # a skip says nothing about the pair
        if vote.choice == "skip":
            continue
        value: Hashable = vote.choice
        if level == "ordinal":
            value = {"a": 1, "b": -1}.get(vote.choice, 0) * (vote.strength or 1)
        ratings.setdefault(vote.comparison, {})[vote.annotator] = value
    return ratings


def clusters_of(votes: list[Vote]) -> Clusters:
    """Return {comparison: the ranking that it is a pair of}, of those comparisons alone."""
    return {vote.comparison: vote.ranking for vote in votes if vote.ranking is not None}


def alpha_interval(
    ratings: Ratings, level: Level = "nominal", clusters: Clusters | None = None
) -> tuple[float, float, float]:
    """Return Krippendorff's alpha (1 perfect, 0 as by chance) and its 95 % interval (low, high).

        alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck
        o_ck = sum_items (pairs of values c, k in the item) / (values in the item - 1),   n_c = sum_k o_ck

    nominal: d_ck = [c != k]. ordinal: d_ck = (sum of n_g for g from c to k, less (n_c + n_k) /
    2)^2, of numbers.
    ratings: {item: {annotator: value}}; items with one value count nowhere. nan if all values are
    the same or no item has two. The interval is over items that have two values or more
    (`jackknife_interval`), those of one cluster together. Source: Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability".
    """
    names = [item for item, values in ratings.items() if len(values) > 1]
    return _interval(_coincidences(ratings), lambda sums: _alpha(sums, level), names, clusters)


def kappa_interval(
    one: dict[Hashable, Hashable],
    other: dict[Hashable, Hashable],
    clusters: Clusters | None = None,
) -> tuple[float, float, float]:
    """Return Cohen's kappa (1960) of two annotators' values by item and its 95 % interval (low,
    high).

        kappa = (p_o - p_e) / (1 - p_e),   p_e = sum_k p_one(k) p_other(k)

    Both are over the items that both judged (`jackknife_interval`), those of one cluster together.
    nan if no item is common, or both said one and the same value throughout.
    """
    names = [item for item in one if item in other]
    return _interval(_crossed(one, other), _kappa, names, clusters)


def pairwise_kappas(ratings: Ratings, clusters: Clusters | None = None) -> list[dict[str, Any]]:
    """Return Cohen's kappa of every two annotators who have judged an item in common, by name.

    [{"one", "other", "kappa", "low", "high" (its 95 % interval), "pairs" (judged by both)}].
    """
    by_name: dict[str, dict[Hashable, Hashable]] = {}
    for item, values in ratings.items():
        for name, value in values.items():
            by_name.setdefault(name, {})[item] = value
    found = []
    for one, other in itertools.combinations(sorted(by_name), 2):
        common = len(by_name[one].keys() & by_name[other].keys())
        # of two who share no pair nothing can be said
        if common:
            interval = kappa_interval(by_name[one], by_name[other], clusters)
            row = dict(zip(("kappa", "low", "high"), interval, strict=True))
            found.append({"one": one, "other": other, **row, "pairs": common})
    return found


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
        person = Reliability(
            annotator=name,
            votes=len({vote.event for vote in own}),
            choices=dict(Counter(vote.choice for vote in own)),
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
            cluster = _cluster(comparison, clusters)
            totals.setdefault(name, {}).setdefault(cluster, []).append(share)
    found = {}
    for name, shares in totals.items():
        means = [math.fsum(own) / len(own) for own in shares.values()]
        found[name] = Share(math.fsum(means), len(means))
    return found


def _cluster(item: Hashable, clusters: Clusters) -> Hashable:
    """Return what an item is dependent on: its ranking, else itself."""
    return ("ranking", clusters[item]) if item in clusters else item


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


def _coincidences(ratings: Ratings) -> np.ndarray:
    """Return (N, K, K): each item's share in the coincidences, values sorted; items with one value
    are left out.
    """
    usable = [list(values.values()) for values in ratings.values() if len(values) > 1]
    found = set(itertools.chain.from_iterable(usable))
    are_numbers = all(isinstance(value, (int, float)) for value in found)
    order = sorted(found, key=None if are_numbers else str)
    counts = np.zeros((len(usable), len(order)))
    for i, values in enumerate(usable):
        for value in values:
            counts[i, order.index(value)] += 1
    # a rater does not pair with themselves
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs[:, range(len(order)), range(len(order))] -= counts
    return pairs / (counts.sum(axis=1) - 1)[:, None, None]


def _alpha(sums: np.ndarray, level: Level) -> np.ndarray:
    """Return (R,) alphas of (R, K, K) coincidence matrices."""
    n_c = sums.sum(axis=2)
    n = n_c.sum(axis=1)
    if level == "ordinal":
        # mid-ranks: their distance is the sum in the docstring of alpha_interval
        middle = n_c.cumsum(axis=1) - n_c / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        distance = np.broadcast_to(1.0 - np.eye(sums.shape[1]), sums.shape)
    observed = (sums * distance).sum(axis=(1, 2))
    expected = (n_c[:, :, None] * n_c[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1.0 - (n - 1) * observed / expected, np.nan)


def _crossed(one: dict, other: dict) -> np.ndarray:
    """Return (N, K, K): for each common item a 1 at (value of one, value of the other)."""
    items = [item for item in one if item in other]
    values = {one[item] for item in items}
    values |= {other[item] for item in items}
    order = sorted(values, key=str)
    cells = np.zeros((len(items), len(order), len(order)))
    for i, item in enumerate(items):
        cells[i, order.index(one[item]), order.index(other[item])] = 1
    return cells


def _kappa(sums: np.ndarray) -> np.ndarray:
    """Return (R,) kappas of (R, K, K) tables of counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = sums / sums.sum(axis=(1, 2), keepdims=True)
        observed = np.trace(share, axis1=1, axis2=2)
        chance = (share.sum(axis=2) * share.sum(axis=1)).sum(axis=1)
        return np.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), np.nan)


def _interval(
    cells: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    items: list[Hashable],
    clusters: Clusters | None,
) -> tuple[float, float, float]:
    """Return the statistic of the sum of (N, K, K) cells, one an item, and its 95 % interval over
    clusters of items; nan where undefined.
    """
    if not len(cells):
        return math.nan, math.nan, math.nan
    total = cells.sum(axis=0)
    estimate = float(statistic(total[None])[0])
    numbers: dict[Hashable, int] = {}
    for item in items:
        numbers.setdefault(_cluster(item, clusters or {}), len(numbers))
    sums = np.zeros((len(numbers), *total.shape))
    np.add.at(sums, [numbers[_cluster(item, clusters or {})] for item in items], cells)
    low, high, _ = jackknife_interval(estimate, statistic(total - sums), bounds=(-1.0, 1.0))
    return estimate, low, high
