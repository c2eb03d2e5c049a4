"""When enough votes are in: an interval of the win rate that may be looked at after every vote.

An ordinary 95 % interval that is read again and again, until it happens to exclude one half, errs
far more often than in 5 % of collections. A confidence sequence errs in 5 % of them at most,
however often and whenever it is read. This is the hedged capital sequence of Waudby-Smith and Ramdas
(2024, arXiv 2010.09686, section 4): a gambler bets against each possible win rate m, with
stakes that depend on what came before alone; m is given up once the capital has grown 1/alpha times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# win rates that are bet against
GRID = np.linspace(0.0, 1.0, 1001)
# the largest share of its capital that a bet may lose
TRUNCATION = 0.5
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

    shares: in [0, 1], each group's share for the first policy. equal_share: share of prompts to
    which both gave the same answer; they are known before anybody votes, so the sequence is of the
    other prompts, and its ends are moved towards one half.
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
    more = None if state != "open" or not shares else _more(shares, equal_share, alpha, margin)
    return Progress(state, float(low), float(high), len(shares), alpha, margin, more)


def confidence_sequence(shares: Sequence[float], alpha: float) -> tuple[float, float]:
    """Return the newest interval of the sequence, within all earlier ones; (0, 1) without a share.

        stake_t = sqrt( 2 log(2 / alpha) / (variance_(t-1) t log(1 + t)) )
        K_t(m) = max( prod(1 + min(stake, c / m) (x - m)), prod(1 - min(stake, c / (1 - m)) (x - m)) ) / 2

    A win rate m is kept while K(m) < 1 / alpha.
    """
    x = np.asarray(shares, dtype=np.float64)
    if not len(x):
        return 0.0, 1.0
    t = np.arange(1, len(x) + 1)
    # as if one half had been seen before, with variance 1/4
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    stake = np.sqrt(2 * math.log(2 / alpha) / (before * t * np.log1p(t)))

    with np.errstate(divide="ignore"):
        up = np.minimum(stake[:, None], TRUNCATION / GRID[None, :])
        down = np.minimum(stake[:, None], TRUNCATION / (1 - GRID)[None, :])
    gap = x[:, None] - GRID[None, :]
    capital = np.maximum(
        np.cumsum(np.log1p(up * gap), axis=0), np.cumsum(np.log1p(-down * gap), axis=0)
    )
    kept = GRID[np.all(capital - math.log(2) < math.log(1 / alpha), axis=0)]
    # shares that change along the way can rule out every constant one
    if not len(kept):
        return float(mean[-1]), float(mean[-1])
    # values between two points of the grid are kept if either is
    step = GRID[1]
    return max(0.0, float(kept[0]) - step), min(1.0, float(kept[-1]) + step)


def _more(shares: Sequence[float], equal_share: float, alpha: float, margin: float) -> int | None:
    """Return about how many further groups a decision takes if shares stay as they are.

    The width falls as sqrt(log t / t); the shortest way to a decision counts.
    """
    low, high = confidence_sequence(shares, alpha)
    n, half = len(shares), (high - low) / 2
    centre = 0.5 + (1 - equal_share) * ((low + high) / 2 - 0.5)
    distance = abs(centre - 0.5)
    needed = max(distance, margin - distance) / max(1 - equal_share, 1e-9)
    if needed <= 0:
        return None
    for total in np.unique(np.geomspace(n + 1, MOST_MORE, 200).astype(int)):
        shrunk = half * math.sqrt(math.log1p(total) / total * n / math.log1p(n))
        if shrunk <= needed:
            return int(total - n)
    return None
