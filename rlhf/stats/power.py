"""How large an experiment has to be: pairs for a win rate, and what given seeds and prompts can
show.

Power is the share of repeats of an experiment in which the interval leaves out the null.
"""

import math
from bisect import bisect_left
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, ndtri, stdtrit

from rlhf.errors import UserError
from rlhf.stats.crossed import MIN_SEEDS, Estimate, Variances, checked, mean_squares

# no experiment has more
MOST_SEEDS = 1000
# probability that is left open on either side of a range
OPEN = 0.1


def pairs_needed(win_rate: float, power: float = 0.8, level: float = 0.95) -> int:
    """Return how many independent comparisons tell a true win rate from 1/2, two-sided: 783 for
    0.55.

        n = ( z_{1-alpha/2} / 2 + z_power sqrt(w (1 - w)) )^2 / (w - 1/2)^2

    Ties (counted half) have less variance than 1/4, so fewer would do with them. UserError unless 0
    < win_rate < 1 and win_rate is not 1/2.
    """
    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise UserError(
            f"pairs for a win rate of {win_rate}: expected a share above 0 and below 1 that is not 0.5"
        )

    root = ndtri(0.5 + level / 2) / 2 + ndtri(power) * math.sqrt(win_rate * (1 - win_rate))
    return math.ceil((root / (win_rate - 0.5)) ** 2)


def power_of(
    difference: float,
    v: Variances,
    seeds: int,
    groups: int,
    level: float = 0.95,
    share: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Return the power of `crossed.half_width`'s interval at a true difference, with true mean
    squares `v` over S x G.

        mean over U of Phi( (difference - half(U)) / sd ),   U ~ chi^2_(S-1) / (S-1),   half from U MS_seeds

    Without an effect of groups that is the noncentral t's; the groups' mean squares are taken as
    known. share (...): powers where MS_seeds is multiplied by this, not below MS_error; returns
    the same shape.
    """
    of_groups = float(stdtrit(groups - 1, 0.5 + level / 2)) ** 2
    rest = max(v.groups - v.error, 0.0)
    # with the seeds fixed their part is 0 and known
    seeds_part, known = np.zeros(np.shape(share)), np.zeros(1)
    if seeds >= MIN_SEEDS:
        seeds_part = np.maximum(np.asarray(share) * v.seeds, v.error)
        known = float(stdtrit(seeds - 1, 0.5 + level / 2)) ** 2 * _quantiles(seeds - 1)
    # the wider of the two intervals, as in `crossed.half_width`
    by_groups = of_groups * (rest + v.error)
    by_seeds = seeds_part[..., None] * known + of_groups * rest
    half = np.sqrt(np.maximum(by_groups, by_seeds))
    sd = np.sqrt(seeds_part + rest)[..., None]
    return ndtr((difference - half) / sd).mean(axis=-1)


def detectable(
    estimate: Estimate, power: float = 0.8, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the true difference that experiments of this kind show in `power` of their repeats,
    and its range.

    In the units of the estimate; nan where it has no interval.

    A mean square of n degrees of freedom is as uncertain as they leave it, by n / chi^2_n. The
    first number has the asked power on average over that of the seeds: 8.8 standard errors for 3
    seeds that alone matter, where 5.6 would do if the standard error were right. The range ends
    where the mean squares are at their 10th and 90th percentile.
    """
    if not math.isfinite(estimate.se) or estimate.se == 0:
        return estimate.se, estimate.se, estimate.se
    seeds, groups, random_seeds = estimate.seeds, estimate.groups, estimate.seeds >= MIN_SEEDS

    def solve(of_seeds: np.ndarray, of_groups: float) -> float:
        """Solve with the measured mean squares of seeds and groups multiplied by these factors."""
        v = Variances(estimate.se_seeds**2, of_groups * estimate.se_groups**2, estimate.se_error**2)

        def lacking(difference: float) -> float:
            return float(power_of(difference, v, seeds, groups, level, of_seeds).mean()) - power

        return float(brentq(lacking, 0.0, 1e6 * estimate.se, rtol=1e-6))

    def solve_at(quantile: float) -> float:
        """Solve with both mean squares at this quantile of what they may be."""
        of_seeds = 1 / _quantile(seeds - 1, quantile) if random_seeds else 1.0
        return solve(np.array([of_seeds]), 1 / _quantile(groups - 1, quantile))

    # averaged over what the mean square of the seeds may be, then at both ends of its range
    middle = solve(1 / _quantiles(seeds - 1) if random_seeds else np.ones(1), 1.0)
    return middle, solve_at(1 - OPEN), solve_at(OPEN)


def minimum_detectable_effect(estimate: Estimate, level: float = 0.95) -> dict[str, Any]:
    """Return the difference that would be shown in 4 of 5 repeats, and its range; None where there
    is no interval.
    """
    least, *ends = detectable(estimate, level=level)
    if not math.isfinite(least):
        least = ends = None
    return {"minimum_detectable_effect": least, "minimum_detectable_effect_range": ends}


def needed_seeds(
    values: np.ndarray,
    difference: float,
    *,
    groups: int | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> tuple[int | None, int | None, int | None]:
    """Return the fewest run seeds that would show `difference`, and the range of that number; from
    `values` (seeds, groups).

    The variance between seeds is as uncertain as S seeds leave it: the three numbers are those at
    its median, 10th and 90th percentile. `groups` (default: as many as there are) may differ from
    those measured. None where no number of seeds is enough (or more than MOST_SEEDS), because the
    prompts alone leave too much open. UserError with fewer than MIN_SEEDS seeds, whose spread is
    unknown.
    """
    values = checked(values)
    seeds, measured = values.shape
    if seeds < MIN_SEEDS or measured < 2:
        raise UserError(
            f"seeds needed: found {values.shape} (seeds, groups), expected at least {MIN_SEEDS} and 2"
        )
    v = mean_squares(values)
    _, of_groups, error = components(values)
    groups = groups or measured

    def fewest(quantile: float) -> int | None:
        """Solve with the mean square of the seeds at this quantile of what it may be."""
        share = 1 / _quantile(seeds - 1, quantile)
        of_seeds = max(0.0, share * v.seeds - v.error) * seeds

        def enough(n: int) -> bool:
            rest = error / (n * groups)
            parts = Variances(of_seeds / n + rest, of_groups / groups + rest, rest)
            return float(power_of(abs(difference), parts, n, groups, level)) >= power

        # where the prompts alone leave too much open, no number of seeds helps
        if not enough(MOST_SEEDS):
            return None
        return bisect_left(range(MOST_SEEDS), True, lo=MIN_SEEDS, key=enough)

    return fewest(0.5), fewest(1 - OPEN), fewest(OPEN)


def components(values: np.ndarray) -> tuple[float, float, float]:
    """Return the variances of seed, group and error in `values` (seeds, groups), none below 0."""
    values = checked(values)
    seeds, groups = values.shape
    v = mean_squares(values)
    return (
        max(0.0, v.seeds - v.error) * seeds,
        max(0.0, v.groups - v.error) * groups,
        v.error * seeds * groups,
    )


def _quantile(df: int, q: float) -> float:
    """Return the q-quantile of chi^2_df / df."""
    return float(chdtri(df, 1 - q)) / df


def _quantiles(df: int, count: int = 60) -> np.ndarray:
    """Return (count,) equally likely values of chi^2_df / df."""
    return chdtri(df, (np.arange(count) + 0.5) / count) / df
