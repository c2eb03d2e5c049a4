"""Choices that do not score themselves: what is chosen on some groups and seeds is scored on the
others.

The highest of several noisy means is too high on the data that chose it. Here each cell (seed,
group) is scored at the choice that the other half of the groups made and, from three seeds on, the
other half of the seeds.
"""

import hashlib
import itertools
from collections.abc import Iterable

import numpy as np

from rlhf.stats.crossed import MIN_SEEDS, Estimate, crossed_mean

# what a choice adds to the variance of the mean at most, as a share of it: `chosen_mean`
CHOICE = 0.36


def halves(groups: Iterable[str]) -> np.ndarray:
    """Return 0 or 1 for each group (groups,), in the order of their names: by the hash of the name,
    equal in size.
    """
    names = np.unique(list(groups))
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    half = np.empty(len(names), dtype=int)
    half[np.argsort(digests)] = np.arange(len(names)) % 2
    return half


def choose(values: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return for each cell (S, G) the index of the highest mean of `values` (S, M, G) on the other
    half.

    The other half is that of the groups and, with MIN_SEEDS seeds or more, of the seeds, of which
    every second one makes a half. With fewer the report is about these seeds, and all of them
    choose.
    """
    seeds, alternatives, groups = values.shape
    choice = np.zeros((seeds, groups), dtype=int)
    if alternatives == 1:
        return choice

    seed_half = np.arange(seeds) % 2
    for own_seeds, own_groups in itertools.product(np.unique(seed_half), np.unique(half)):
        others = values if seeds < MIN_SEEDS else values[seed_half != own_seeds]
        best = np.argmax(others[:, :, half != own_groups].mean(axis=(0, 2)))
        choice[np.ix_(seed_half == own_seeds, half == own_groups)] = best
    return choice


def take(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Return `values` (S, M, G) at the `choice` (S, G) of each cell, (S, G)."""
    return np.take_along_axis(values, choice[:, None, :], axis=1)[:, 0, :]


def chosen_mean(values: np.ndarray, choices: int, level: float) -> Estimate:
    """Return `crossed_mean` of `values` (S, G), which `take` took from `choices` alternatives; its
    interval holds the choice.

    Two halves choose for each other, X_2 at the best of X_1 and X_1 at the best of X_2. Where the K
    alternatives are alike, independent and normal, with m the expected largest of K standard
    normals, what is taken of the two halves correlates with

        K (m / K)^2 + K (K - 1) (m / (K (K - 1)))^2 = m^2 / (K - 1):    .318, .358, .353, .338 for K = 2, 3, 4, 5

    which no mean square of the layout shows: the variance of their mean is 1 + that times as large.
    Where one alternative is clearly the best the correlation is 0, and the interval up to 17 % too
    wide.
    """
    return crossed_mean(values, level=level, variance_factor=1 + CHOICE if choices > 1 else 1.0)
