"""Intervals where run seeds and prompts are both random, and crossed: every seed's policy answers
every prompt.

The model of a value, a mean over the samples of the prompts of one group, is

    Y[s, g] = mu + A[s] + B[g] + E[s, g]

with independent effects of the seed (variance a), of the group (b) and of their meeting (e). The
mean over S seeds and G groups then has the variance a/S + b/G + e/(SG). Seeds alone (S numbers)
leave out b, prompts alone leave out a. docs/statistics.md has the derivation, and the simulated
coverage of the intervals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace

import numpy as np

from rlhf.errors import UserError
from rlhf.stats import ROUNDING, bounded_interval, student_quantile

# with fewer seeds their spread cannot be measured and they count as fixed: "these trained models"
MIN_SEEDS = 3
# blocks of groups that a jackknife leaves out one at a time: 49 degrees of freedom are nearly a
# normal
BLOCKS = 50
# smaller p-values are given as this
LEAST_P = 1e-15


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, standard error and two-sided p against its null.

    se_seeds, se_groups, se_error: the roots of `Variances`, which the interval is made of. se_seeds
    is the standard error of S seed means on these groups, se_groups that of G group means of these
    seeds.
    """

    estimate: float
    low: float
    high: float
    se: float
    p: float
    seeds: int
    groups: int
    se_seeds: float = math.nan
    se_groups: float = math.nan
    se_error: float = math.nan

    def to_dict(self) -> dict[str, float | int | None]:
        """Return it for JSON: what is not a finite number becomes None."""
        numbers = {}
        for name, value in asdict(self).items():
            numbers[name] = value if math.isfinite(value) else None
        return numbers


def side(estimate: dict[str, float | int | None], null: float = 0.0) -> int:
    """Return 1 or -1 where the whole interval of `Estimate.to_dict()` lies on that side of `null`,
    else 0.
    """
    if estimate["low"] is None:
        return 0
    return int(estimate["low"] > null) - int(estimate["high"] < null)


@dataclass(frozen=True)
class Variances:
    """The mean squares of seeds, groups and error, each over S x G: what each adds to the variance
    of the mean.
    """

    seeds: float
    groups: float
    error: float


def crossed_mean(
    values: np.ndarray, *, null: float = 0.0, level: float = 0.95, variance_factor: float = 1.0
) -> Estimate:
    """Return the mean of `values` (seeds, groups), both random. Raises UserError unless all are
    finite numbers.

    se^2 is (MS_seeds + MS_groups - MS_error) / (S G), the unbiased variance of the two-way layout
    without replication, with MS_seeds and MS_groups not below MS_error (a component is not below
    0). The interval is that of `half_width`. With fewer than MIN_SEEDS seeds it is Student's
    interval of the group means over the given seeds. All mean squares are multiplied by
    `variance_factor` (choice.chosen_mean).
    """
    values = checked(values)
    squares = mean_squares(values)
    variances = Variances(*(variance_factor * square for square in astuple(squares)))
    return interval(float(values.mean()), variances, *values.shape, null=null, level=level)


def crossed_statistic(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    seeds: int,
    groups: int,
    *,
    null: float = 0.0,
    level: float = 0.95,
    blocks: int = BLOCKS,
) -> Estimate:
    """Return a statistic other than a mean, with the interval of the two-way delete-one jackknife.

    statistic(seed weights (S,), group weights (G,)) is computed again, with all that it contains,
    without each seed, without each block of groups, and without both at once: about S x B times for
    B = min(blocks, groups) blocks. For a mean over seeds and groups that is `crossed_mean`, exactly
    so with as many blocks as groups.
    """
    every_seed, weights = np.ones(seeds), block_weights(groups, blocks)

    def resampled(seed_weights: np.ndarray) -> np.ndarray:
        """Return the statistic with all groups, then without each block."""
        return np.array([statistic(seed_weights, group_weights) for group_weights in weights])

    # row 0 of each is with all groups, so that seeds, blocks and both are left out in turn
    full = resampled(every_seed)
    of_seeds = of_error = 0.0
    if seeds >= MIN_SEEDS:
        without = np.array([resampled(every_seed - one) for one in np.eye(seeds)])
        of_seeds = (seeds - 1) / seeds * float(np.sum((without[:, 0] - without[:, 0].mean()) ** 2))
        of_error = _error_variance((seeds - 1) * _centred(without[:, 1:]), weights)
    variances = Variances(of_seeds, _block_variance(full[0], full[1:], weights), of_error)
    return interval(
        float(full[0]), variances, seeds, groups, null=null, level=level, blocks=len(weights) - 1
    )


def mean_over_seeds(
    resampled: np.ndarray, weights: np.ndarray, *, null: float = 0.0, level: float = 0.95
) -> Estimate:
    """Return `crossed_statistic` of a mean over seeds of each seed's own statistic, from (1 + B,
    seeds) of them.

    Row 0 is computed with weights[0], all groups, row b without block b, where `weights` is
    `block_weights(...)`. To leave out a seed takes no further fit then, so that B + 1 fits a seed
    are enough.
    """
    seeds, groups = resampled.shape[1], weights.shape[1]
    full, without = resampled[0], resampled[1:]
    estimate = float(full.mean())
    of_seeds = of_error = 0.0
    if seeds >= MIN_SEEDS:
        of_seeds = float(full.var(ddof=1)) / seeds
        of_error = _error_variance(_centred(without.T), weights)
    variances = Variances(
        of_seeds, _block_variance(estimate, without.mean(axis=1), weights), of_error
    )
    return interval(estimate, variances, seeds, groups, null=null, level=level, blocks=len(without))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjustment (1979): the i-th smallest p times m - i + 1, never falling,
    at most 1.

    A p that is nan stays nan and does not count.
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(len(p), math.nan)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted.tolist()


def outlying(values: Sequence[float]) -> list[float]:
    """Return for each value of a few the two-sided p of its distance from the others, before any
    correction.

        t = (x_i - mean of the others) / (their sd sqrt(1 + 1 / (n - 1))),   n - 2 degrees of freedom

    The externally studentised residual; Grubbs' test (1950) is its largest. From 3 values on: with
    3 values the others have one degree of freedom, and hardly anything is an outlier.
    """
    from scipy.special import stdtr

    values = np.asarray(values, dtype=np.float64)
    n, found = len(values), []
    for i, value in enumerate(values):
        others = np.delete(values, i)
        distance = abs(value - others.mean())
        sd = others.std(ddof=1) * math.sqrt(1 + 1 / (n - 1))
        if distance <= ROUNDING * abs(value):
            found.append(1.0)
        else:
            found.append(2 * float(stdtr(n - 2, -distance / sd)) if sd > 0 else 0.0)
    return found


def checked(values: np.ndarray) -> np.ndarray:
    """Return `values` as a (seeds, groups) array. Raises UserError unless it is one of finite
    numbers.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise UserError(
            f"seeds and groups: found an array of shape {values.shape}, expected (seeds, groups)"
        )
    if not np.all(np.isfinite(values)):
        s, g = np.argwhere(~np.isfinite(values))[0]
        raise UserError(
            f"seeds and groups: {values[s, g]} at seed {s}, group {g}; expected finite numbers only"
        )
    return values


def mean_squares(values: np.ndarray) -> Variances:
    """Return the mean squares of `values` (seeds, groups) over S x G; seeds and error 0 where the
    seeds are fixed.
    """
    seeds, groups = values.shape
    if groups == 1:
        return Variances(math.nan, math.nan, math.nan)
    # with too few seeds they are fixed, and the groups alone are random
    by_group = float(values.mean(axis=0).var(ddof=1)) / groups
    if seeds < MIN_SEEDS:
        return Variances(0.0, by_group, 0.0)
    by_seed = float(values.mean(axis=1).var(ddof=1)) / seeds
    error = float(np.sum(_centred(values) ** 2)) / ((seeds - 1) * (groups - 1))
    return Variances(by_seed, by_group, error / (seeds * groups))


def total(v: Variances) -> float:
    """Return the variance of the mean, no component below 0."""
    return max(v.seeds, v.error) + max(v.groups, v.error) - v.error


def half_width(v: Variances, seeds: int, blocks: int, alpha: float) -> float:
    """Return half the width of the 1 - alpha interval, of numbers or of arrays in `v`.

    With t_n Student's two-sided quantile at alpha for n degrees of freedom:

        half^2 = ( t_(S-1)^2 MS_seeds + t_(G-1)^2 max(MS_groups - MS_error, 0) ) / (S G),
                 at least t_(G-1)^2 max(MS_groups, MS_error) / (S G), what it is with the seeds
                 fixed

    MS_seeds / (S G) estimates a/S + e/(SG), the rest b/G; together they are the variance of the
    mean. Banerjee (1961, Sankhya A 23): with mean M and independent variances v_i, estimated by
    s_i^2 with n_i degrees of freedom, P(M^2 <= sum t_i^2 s_i^2) >= 1 - alpha whatever the v_i are,
    since the distribution of chi^2_1 is concave (Jensen). So it holds at every alpha, far out in
    the tail too, where Satterthwaite's single t is several times too short with a handful of seeds
    (benchmarks/statistics/coverage.py).
    """
    from scipy.special import stdtrit

    # the interval with the seeds fixed is the least
    of_groups = float(stdtrit(blocks - 1, alpha / 2)) ** 2
    fixed = of_groups * np.maximum(v.groups, v.error)
    if seeds < MIN_SEEDS:
        return np.sqrt(fixed)
    of_seeds = float(stdtrit(seeds - 1, alpha / 2)) ** 2
    return np.sqrt(
        np.maximum(fixed, of_seeds * v.seeds + of_groups * np.maximum(v.groups - v.error, 0.0))
    )


def p_value(distance: float, v: Variances, seeds: int, blocks: int) -> float:
    """Return the alpha at which `half_width` is `distance`, at least LEAST_P.

    An interval of level 1 - p just holds the null.
    """
    from scipy.optimize import brentq

    def beyond(log_alpha: float) -> float:
        return half_width(v, seeds, blocks, math.exp(log_alpha)) - distance

    # the root lies below what is told apart
    if beyond(math.log(LEAST_P)) <= 0:
        return LEAST_P
    return math.exp(brentq(beyond, math.log(LEAST_P), 0.0, xtol=1e-12)) if distance > 0 else 1.0


def interval(
    estimate: float,
    v: Variances,
    seeds: int,
    groups: int,
    *,
    null: float,
    level: float,
    blocks: int | None = None,
) -> Estimate:
    """Return an estimate with the interval of `half_width`.

    Where the data cannot say how far they are off (one group, nan) the interval is nan; where
    nothing varies it is the number itself, and p is nan unless that is the null.
    """
    variance = total(v)
    if not math.isfinite(variance) or not math.isfinite(estimate) or groups < 2:
        return Estimate(estimate, math.nan, math.nan, math.nan, math.nan, seeds, groups)
    se = math.sqrt(variance)
    parts = list(map(math.sqrt, astuple(v)))

    # nothing varies: what is left of the standard error is rounding
    if se <= ROUNDING * abs(estimate):
        same = math.isclose(estimate, null, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return Estimate(
            estimate, estimate, estimate, 0.0, 1.0 if same else math.nan, seeds, groups, *parts
        )
    half = float(half_width(v, seeds, blocks or groups, 1 - level))
    p = p_value(abs(estimate - null), v, seeds, blocks or groups)
    return Estimate(estimate, estimate - half, estimate + half, se, p, seeds, groups, *parts)


def share(estimate: Estimate, level: float) -> Estimate:
    """Return the estimate with the interval of a share, and without a p: nothing is claimed of it.

    Where nothing varies the interval is that of as many groups.
    """
    if not math.isfinite(estimate.estimate) or not math.isfinite(estimate.se):
        return estimate
    t = student_quantile(0.5 + level / 2, estimate.groups - 1)
    if estimate.se > 0:
        t = (estimate.high - estimate.low) / 2 / estimate.se
    low, high = bounded_interval(estimate.estimate, estimate.se, t, estimate.groups)
    return replace(estimate, low=low, high=high, p=math.nan)


def block_weights(groups: int, blocks: int = BLOCKS) -> np.ndarray:
    """Return (1 + B, groups) weights of the groups: all, then all but one block, each of about
    groups / B groups.

    Which groups make a block is drawn, the same at every call: in the order of their names, where a
    name may tell the kind, each block would have as many of every kind, and blocks would differ
    less than draws do.
    """
    block = np.random.default_rng(0).permutation(groups) % min(blocks, groups)
    return np.concatenate(
        [np.ones((1, groups)), block[None, :] != np.arange(block.max() + 1)[:, None]]
    )


def _block_variance(full: float, without: np.ndarray, weights: np.ndarray) -> float:
    """Return the delete-one-block jackknife's variance for blocks of unequal size (Busing, Meijer
    and van der Leeden 1999).

    With n groups and h = n / (size of the block), the pseudo-value of a block is h full - (h - 1)
    without.
    """
    if len(without) < 2:
        return math.nan
    h = _inverse_shares(weights)
    pseudo = h * full - (h - 1) * without
    return float(np.mean((pseudo - np.sum(pseudo / h)) ** 2 / (h - 1)))


def _error_variance(without: np.ndarray, weights: np.ndarray) -> float:
    """Return MS_error / (S G) from what the statistic of a seed without a block has beyond seed and
    block, (S, B).
    """
    seeds, blocks = without.shape
    if blocks < 2:
        return math.nan
    h = _inverse_shares(weights)
    return float(np.sum(without**2 * (h - 1)) / (seeds * (seeds - 1) * blocks))


def _inverse_shares(weights: np.ndarray) -> np.ndarray:
    """Return (B,) groups over the size of each left-out block."""
    groups = weights.shape[1]
    return groups / (groups - weights[1:].sum(axis=1))


def _centred(table: np.ndarray) -> np.ndarray:
    """Return the table without its row and column means."""
    return (
        table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    )
