"""Agreement of annotators beyond chance: Krippendorff's alpha and Cohen's kappa, with intervals.

    ratings = ratings_of(votes)                       # {comparison: {annotator: "a"}}
    alpha, low, high = alpha_interval(ratings, clusters=clusters_of(votes))

A skip counts nowhere. Whatever cannot be computed (nobody judged the same pair, all said the same)
is nan.
"""

import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any, Literal

import numpy as np

from rlhf.data.dawid_skene import Ratings
from rlhf.data.votes import Vote
from rlhf.stats import jackknife_interval

Level = Literal["nominal", "ordinal"]
# item -> what its values depend on beside it: the ranking that it is a pair of
Clusters = dict[Hashable, Hashable]


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


def cluster_of(item: Hashable, clusters: Clusters) -> Hashable:
    """Return what an item is dependent on: its ranking, else itself."""
    return ("ranking", clusters[item]) if item in clusters else item


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
        numbers.setdefault(cluster_of(item, clusters or {}), len(numbers))
    sums = np.zeros((len(numbers), *total.shape))
    np.add.at(sums, [numbers[cluster_of(item, clusters or {})] for item in items], cells)
    low, high, _ = jackknife_interval(estimate, statistic(total - sums), bounds=(-1.0, 1.0))
    return estimate, low, high
