"""When enough votes are in: an interval of the win rate that may be looked at after every vote.

An ordinary 95 % interval that is read again and again, until it happens to exclude one half, errs
far more often than in 5 % of collections. A confidence sequence errs in 5 % of them at most,
however often and whenever it is read. This one is by betting (Waudby-Smith and Ramdas 2024, arXiv
2010.09686, section 4): gamblers bet against each possible win rate m, and m is given up once their
capital has grown 1/alpha times, which in fair bets has a chance of at most alpha (Ville 1939).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# win rates that are bet against
GRID = np.linspace(0.0, 1.0, 501)
# Shares of its capital that a gambler risks at each step. Narrower in trials than stakes that are
# planned from what came before: 0.17 against 0.22 after 200 votes
FRACTIONS = (0.1, 0.2, 0.4)
# in the place of 1 / 0, at the ends of the grid
LARGEST_BET = 1e6
# collections are not planned further ahead than this
MOST_MORE = 100_000

State = Literal["one", "other", "equal", "open"]


@dataclass(frozen=True)
class Progress:
    """What the complete pairs allow to say at any time, with an error of at most `alpha`.

    state: "one" or "other" is ahead, "equal" within one half +- margin, or "open": go on. low, high:
    the confidence sequence of the win rate, given these annotators. more: about how many further
    groups the decision takes if the win rate stays what it is; None where that is not in sight.
    """

    state: State
    low: float
    high: float
    groups: int
    alpha: float
    margin: float
    more: int | None


def follow(
    shares: Sequence[float], *, equal_share: float = 0.0, alpha: float = 0.05, margin: float = 0.1
) -> Progress:
    """Return where the collection stands after groups with these shares, in the order of their end.

    shares: in [0, 1], each group's share for the first policy. equal_share: share of groups to
    which both gave the same answers; they are known before anybody votes, so the sequence is of the
    other groups, and its ends are moved towards one half.
    """
    low, high = confidence_sequence(shares, alpha)
    low, high = (0.5 + (1 - equal_share) * (end - 0.5) for end in (low, high))
    state: State = "open"
    if low > 0.5:
        state = "one"
    elif high < 0.5:
        state = "other"
    elif 0.5 - margin <= low and high <= 0.5 + margin:
        state = "equal"
    more = (
        None if state != "open" or not shares else _groups_to_go(shares, equal_share, alpha, margin)
    )
    return Progress(state, float(low), float(high), len(shares), alpha, margin, more)


def confidence_sequence(shares: Sequence[float], alpha: float) -> tuple[float, float]:
    """Return the newest interval of the sequence, within all earlier ones; (0, 1) without a share.

        K_t(m) = mean over f and both signs of prod_s (1 + f (x_s - m) / m),  prod_s (1 - f (x_s - m) / (1 - m))

    the capital of gamblers who risk a fixed share f of it on the win rate lying above m, or below. A
    win rate m is kept while K(m) < 1 / alpha at all times.
    """
    x = np.asarray(shares, dtype=np.float64)
    if not len(x):
        return 0.0, 1.0
    gap = x[:, None] - GRID[None, :]
    with np.errstate(divide="ignore"):
        above, below = np.minimum(1 / GRID, LARGEST_BET), np.minimum(1 / (1 - GRID), LARGEST_BET)
    logs = []
    for fraction in FRACTIONS:
        logs.append(np.cumsum(np.log1p(fraction * above * gap), axis=0))
        logs.append(np.cumsum(np.log1p(-fraction * below * gap), axis=0))
    log_capital = np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))
    is_kept = np.all(log_capital < math.log(1 / alpha), axis=0)
    kept = GRID[is_kept]
    # shares that change along the way can rule out every constant one
    if not len(kept):
        return float(x.mean()), float(x.mean())
    # values between two points of the grid are kept if either is
    step = GRID[1]
    return max(0.0, float(kept[0]) - step), min(1.0, float(kept[-1]) + step)


def _groups_to_go(
    shares: Sequence[float], equal_share: float, alpha: float, margin: float
) -> int | None:
    """Return about how many further groups a decision takes if shares stay as they are.

    The width falls as sqrt(log t / t); the shortest way to a decision counts.
    """
    low, high = confidence_sequence(shares, alpha)
    n, half = len(shares), (high - low) / 2
    centre = 0.5 + (1 - equal_share) * ((low + high) / 2 - 0.5)
    distance = abs(centre - 0.5)
    # the half width that excludes one half, or that stays within it +- margin: whichever is wider
    # comes first; of the groups that are voted on, like `half`
    needed = max(distance, margin - distance) / max(1 - equal_share, 1e-9)
    if needed <= 0:
        return None
    for total in np.unique(np.geomspace(n + 1, MOST_MORE, 200).astype(int)):
        shrunk = half * math.sqrt(math.log1p(total) / total * n / math.log1p(n))
        if shrunk <= needed:
            return int(total - n)
    return None
