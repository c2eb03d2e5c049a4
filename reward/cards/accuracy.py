"""Accuracy on pairs and means over pairs, with intervals over groups.

Pairs of one group are not independent (paraphrases share their answers), so a group is left out as
a whole, and the `n` of an interval is the number of groups.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.data.records import Preference
from rlhf.files import json_safe
from rlhf.stats import jackknife_interval, mean_over_groups

# slices of one kind that are listed, the largest first
MAX_SLICES = 20
# quantiles that cut margins and length differences into five parts
FIFTHS = (0.2, 0.4, 0.6, 0.8)
# a field with so few different values is shown by value
FEW_VALUES = 5


def pair_accuracy(gaps: np.ndarray) -> np.ndarray:
    """Return (n,) 1 where the chosen response scores higher, 0 where lower, one half at a tie."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def accuracy_with_interval(
    right: np.ndarray, groups: Sequence[str], level: float = 0.95
) -> dict[str, Any]:
    """Return the mean of `right` over pairs, with its interval over groups (within 0 and 1).

    With one group, or none, there is no interval (None).
    """
    found = mean_with_interval(right, groups, bounds=(0.0, 1.0), level=level)
    return {"accuracy": found.pop("mean"), **found}


def mean_with_interval(values: np.ndarray, groups: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return {"mean", "low", "high", "n" (groups), "pairs"} of `rlhf.stats.mean_over_groups`."""
    found = mean_over_groups(values, groups, **options)
    del found["se"]
    return found


def difference_with_interval(
    one: np.ndarray, one_groups: Sequence[str], other: np.ndarray, other_groups: Sequence[str]
) -> dict[str, Any]:
    """Return mean(one) - mean(other) of two sets of pairs, and its interval over the groups of both.

    A group that is in both sets is left out of both at once, so that what the two share (a prompt)
    does not count as noise. Keys as in `mean_with_interval`, of which `pairs` counts those of `one`.
    """
    names, index = np.unique(np.concatenate([one_groups, other_groups]), return_inverse=True)
    sides = []
    for values, own in ((one, index[: len(one)]), (other, index[len(one) :])):
        sums = np.bincount(own, values, minlength=len(names))
        sides.append((sums, np.bincount(own, minlength=len(names))))
    mean = float(np.mean(one) - np.mean(other))

    # a group in both sets is left out of both at once
    without = np.zeros(len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        for sign, (sums, counts) in zip((1, -1), sides, strict=True):
            without += sign * (sums.sum() - sums) / (counts.sum() - counts)
    low, high, _ = jackknife_interval(mean, without, bounds=(-1.0, 1.0))
    found = {"mean": mean, "low": low, "high": high, "n": len(names), "pairs": len(one)}
    return json_safe(found, nan_as_null=True)


def slices(
    pairs: Sequence[Preference],
    right: np.ndarray,
    groups: np.ndarray,
    length_gaps: np.ndarray,
    category: str = "category",
) -> dict[str, dict[str, Any]]:
    """Return the accuracy by source, annotator, category, margin and length difference.

    category: the field of the pairs' metadata. Each part is {name: as in `accuracy_with_interval`
    and "surely_wrong", whether it lies below one half by an interval for all slices together},
    empty where the pairs do not have it.
    """
    # a pair without a margin, None, becomes nan and is in no part of that scale
    margins = np.array([pair.margin for pair in pairs], float)
    names = {
        "by_source": [pair.source for pair in pairs],
        "by_annotator": [pair.annotator for pair in pairs],
        "by_category": [pair.metadata.get(category) for pair in pairs],
    }
    scales = {"by_margin": cut(margins), "by_length_difference": cut(length_gaps, " tokens")}
    # names by size, scales in their order
    rows = {name: _largest(values) for name, values in names.items()}
    for name, (values, order) in scales.items():
        parts = _largest(values)
        rows[name] = {part: parts[part] for part in order if part in parts}

    # so that of all slices together one is falsely called wrong in a card out of twenty
    level = 1 - 0.05 / max(1, sum(map(len, rows.values())))
    found: dict[str, dict[str, Any]] = {}
    for name, parts in rows.items():
        found[name] = {}
        for part, own in parts.items():
            strict = accuracy_with_interval(right[own], groups[own], level)
            is_wrong = strict["high"] is not None and strict["high"] < 0.5
            found[name][part] = accuracy_with_interval(right[own], groups[own])
            found[name][part]["surely_wrong"] = is_wrong
    return found


def _largest(values: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return {value: (n,) mask of its rows}, the most frequent first; None is no value."""
    shown = []
    for value in values:
        # as text: sorting would fail on names and None together
        shown.append("" if value is None else str(value))
    texts = np.array(shown)
    names, counts = np.unique(texts[texts != ""], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_SLICES]
    return {str(name): texts == name for name in names[order]}


def cut(values: np.ndarray, unit: str = "") -> tuple[list[str | None], list[str]]:
    """Return for each value the name of its fifth, such as "-3 to 4 tokens" (None for nan), and the
    names along the scale.

    A fifth holds its upper end. A scale of few different values is cut at each of them.
    """
    known = values[np.isfinite(values)]
    ends = np.unique(known)
    if len(ends) > FEW_VALUES:
        ends = np.unique(np.quantile(known, FIFTHS))
        texts = [f"{end:.4g}" for end in ends]
        order = [f"up to {texts[0]}{unit}"]
        order += [f"{low} to {high}{unit}" for low, high in itertools.pairwise(texts)]
        order += [f"above {texts[-1]}{unit}"]
    else:
        order = [f"{end:.4g}{unit}" for end in ends]
    # the first end that is not below: a part holds its upper end
    places = np.searchsorted(ends, values)
    names = []
    for value, place in zip(values, places, strict=True):
        names.append(order[place] if np.isfinite(value) else None)
    return names, order
