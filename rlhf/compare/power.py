"""How large an experiment has to be: pairs for a win rate, and what given seeds and prompts can show.

Power is the share of repeats of an experiment in which the interval leaves out the null. The formulas are the usual
normal ones, with Student's quantiles where the standard error is estimated.
"""

from __future__ import annotations

import math

import numpy as np

from rlhf.compare.crossed import MIN_SEEDS, Estimate, Variances, checked, degrees, mean_squares, total
from rlhf.config import UserError

MOST_SEEDS = 1000


def pairs_needed(win_rate: float, power: float = 0.8, level: float = 0.95) -> int:
    """Independent comparisons until a true win rate is told from 1/2, two-sided: 783 for 0.55.

        n = ( z_{1-alpha/2} / 2 + z_power sqrt(w (1 - w)) )^2 / (w - 1/2)^2

    Ties (counted half) have less variance than 1/4, so fewer would do with them. UserError unless 0 < win_rate < 1 and
    win_rate is not 1/2.
    """
    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise UserError(f"pairs for a win rate of {win_rate}: expected a share above 0 and below 1 that is not 0.5")
    from scipy.special import ndtri

    root = ndtri(0.5 + level / 2) / 2 + ndtri(power) * math.sqrt(win_rate * (1 - win_rate))
    return math.ceil((root / (win_rate - 0.5)) ** 2)


def detectable(estimate: Estimate, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference that an experiment of this standard error shows in `power` of its repeats.

        (t_{1-alpha/2} + t_power) se,   both of Student's quantiles with the estimate's degrees of freedom

    In the units of the estimate; nan where it has no interval.
    """
    return _detectable(estimate.se**2, estimate.df, power, level)


def needed_seeds(
    values: np.ndarray, difference: float, *, groups: int | None = None, power: float = 0.8, level: float = 0.95
) -> int | None:
    """The fewest run seeds that would show `difference`, given the variance parts of `values` (seeds, groups).

    `groups` (default: as many as there are) may differ from those measured. None where no number of seeds is enough,
    because the prompts alone leave too much open. From few seeds this is rough: the variance of 3 seeds is off by a
    factor of 2 as often as not. UserError with fewer than MIN_SEEDS seeds, whose spread is unknown.
    """
    values = checked(values)
    if len(values) < MIN_SEEDS or values.shape[1] < 2:
        raise UserError(f"seeds needed: found {values.shape} (seeds, groups), expected at least {MIN_SEEDS} and 2")
    of_seeds, of_groups, error = components(values)
    groups = groups or values.shape[1]
    for seeds in range(MIN_SEEDS, MOST_SEEDS + 1):
        rest = error / (seeds * groups)
        v = Variances(of_seeds / seeds + rest, of_groups / groups + rest, rest)
        if _detectable(total(v), degrees(v, seeds, groups), power, level) <= abs(difference):
            return seeds
    return None


def components(values: np.ndarray) -> tuple[float, float, float]:
    """The variances of seed, group and error in `values` (seeds, groups), none below 0."""
    values = checked(values)
    seeds, groups = values.shape
    v = mean_squares(values)
    return max(0.0, v.seeds - v.error) * seeds, max(0.0, v.groups - v.error) * groups, v.error * seeds * groups


def _detectable(variance: float, df: float, power: float, level: float) -> float:
    from scipy.special import stdtrit

    if variance == 0:
        return 0.0
    return float(stdtrit(df, 0.5 + level / 2) + stdtrit(df, power)) * math.sqrt(variance)
