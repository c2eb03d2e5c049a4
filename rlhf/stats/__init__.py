"""Intervals of a statistic of independent clusters: the same for comparisons, report cards and
agreement.

A cluster is what was drawn at random: a group of prompts, an item that several people have judged.
What belongs to one cluster may depend on each other in any way.
benchmarks/results/2026-11-29-compare.md has the simulated coverage.
"""

import math
from collections.abc import Sequence

import numpy as np

# with fewer clusters an interval is shown and no verdict: it holds only for nearly normal values
MIN_CLUSTERS = 5
# a standard error below this share of the values is rounding
ROUNDING = 1e-12


def jackknife_interval(
    estimate: float,
    without: np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return (low, high, standard error) of a statistic of n independent clusters.

        se^2 = (n - 1) / n sum_i (without_i - mean of without)^2,    estimate +- t(n - 1) se

    without: (n,) the statistic computed again without each cluster (Tukey 1958). For the mean of
    the clusters this is Student's interval. bounds: what the statistic cannot leave; then the
    interval is `bounded_interval`. All nan with fewer than two clusters, or where the statistic is
    not defined without one of them.
    """
    n = len(without)
    if n < 2 or not math.isfinite(estimate) or not np.all(np.isfinite(without)):
        return math.nan, math.nan, math.nan
    se = math.sqrt((n - 1) / n * float(np.sum((without - np.mean(without)) ** 2)))
    se = se if se > ROUNDING * abs(estimate) else 0.0
    t = student_quantile(0.5 + level / 2, n - 1)
    if bounds is not None:
        return *bounded_interval(estimate, se, t, n, bounds=bounds), se
    half = t * se
    return estimate - half, estimate + half, se


def group_means(
    values: np.ndarray, groups: Sequence[str], kept: np.ndarray | None = None
) -> np.ndarray:
    """Return (G,) means of `values` (n,) over the members of each group, in the order of the names.

    kept: (n,) which members count, by default all; the mean of a group without any is NaN.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if kept is not None:
        values, index = np.asarray(values)[kept], index[kept]
    # a weighted count is a sum by group
    sums = np.bincount(index, weights=values, minlength=len(names))
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(index, minlength=len(names))


def mean_over_groups(
    values: np.ndarray,
    groups: Sequence[str],
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
) -> dict[str, float | int | None]:
    """Return the mean of `values` (n,), each counting once, and its interval over groups, which are
    left out as a whole (`jackknife_interval`).

    {"mean", "low", "high", "se", "n" (groups), "pairs"}; low, high and se are None with fewer than
    two groups, the mean too where there is no value.
    """
    found = dict.fromkeys(("mean", "low", "high", "se")) | {"n": 0, "pairs": len(values)}
    if not len(values):
        return found
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    found |= {"mean": float(np.mean(values)), "n": len(counts)}
    if len(counts) > 1:
        without = (sums.sum() - sums) / (counts.sum() - counts)
        interval = jackknife_interval(found["mean"], without, bounds=bounds, level=level)
        found |= dict(zip(("low", "high", "se"), interval, strict=True))
    return found


def bounded_interval(
    estimate: float, se: float, t: float, n: int, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Return (low, high) of a statistic within `bounds`: Wilson's score interval (1927) for
    clusters.

        p = (estimate - lowest) / (highest - lowest),    the q with (p - q)^2 <= t^2 q (1 - q) / N

    t is a quantile, N = `effective_size`, the independent observations of 0 or 1 that would be as
    exact. Unlike estimate +- t se it stays within the bounds and has a width where all clusters are
    alike (then N = n).
    """
    lowest, width = bounds[0], bounds[1] - bounds[0]
    p, se = min(1.0, max(0.0, (estimate - lowest) / width)), se / width
    share = t**2 / effective_size(p, se, n)
    middle = (p + share / 2) / (1 + share)
    half = math.sqrt(share * p * (1 - p) + share**2 / 4) / (1 + share)
    # without rounding p lies inside
    low, high = max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))
    return lowest + width * low, lowest + width * high


def effective_size(p: float, se: float, n: int) -> float:
    """Return how many independent observations of 0 or 1 have this standard error: p (1 - p) /
    se^2; n without any.
    """
    return p * (1 - p) / se**2 if se > ROUNDING and 0 < p < 1 else float(n)


def wilson(count: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share `count / n` of independent observations (Wilson 1927)."""
    return bounded_interval(count / n, 0.0, student_quantile(0.5 + level / 2, math.inf), n)


def fair_coin_p(count: int, n: int) -> float:
    """Return the two-sided exact p-value of `count` heads in `n` throws of a fair coin; nan without
    a throw.
    """
    if n == 0:
        return math.nan
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(count, n - count), n, 0.5)))


def clustered_se(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Return the standard error of the mean of `values`, of which those of one cluster are not
    independent.

        se = sqrt( G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2 ) / n

    The ratio estimator of a cluster sample (Cochran 1977, section 6.4), G clusters; with one value
    in each it is s / sqrt(n). None for fewer than two clusters: one prompt says nothing about the
    spread over prompts.
    """
    mean = sum(values) / len(values)
    sums = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(s * s for s in sums.values())) / len(values)


def student_quantile(p: float, df: float) -> float:
    """Return the quantile of Student's t; of the normal distribution at df infinite."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(p) if df == math.inf else stdtrit(df, p))
