"""The curve of the best of n: every score against n and KL, where the scores that count turn down, and
the laws of over-optimisation of Gao, Schulman and Hilton 2022 (arXiv 2210.10760), section 3.1.

The unit is the group of prompts: samples and subsets are averaged within the prompt, prompts within
the group, and each group counts once.

With d = sqrt(KL to the initial policy), the gold score over that of the initial policy is

    best of n    R(d) = d (alpha - beta d)          highest at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)      highest at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so that least squares has a closed form.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf.files import json_safe
from rlhf.stats import MIN_CLUSTERS, jackknife_interval
from rlhf.stats.best_of_n import best_of_n_kl, best_of_n_means
from rlhf.stats.choice import choose, chosen_mean, halves, take
from rlhf.stats.crossed import crossed_mean, side

# resamples of the groups for the interval of the turning point
RESAMPLES = 2000
# sizes of n between n and 2 n at which the turning point is looked for
STEPS_PER_DOUBLING = 8
Law = Literal["best_of_n", "rl"]


def table_sizes(total: int) -> list[int]:
    """Return 1, 2, 4, ... up to `total`, and `total` itself."""
    doublings = [2**power for power in range(total.bit_length()) if 2**power < total]
    return [*doublings, total]


def fine_sizes(total: int) -> list[int]:
    """Return the sizes at which the turning point is looked for: those of the table among them."""
    count = STEPS_PER_DOUBLING * math.ceil(math.log2(total)) + 1
    spaced = np.rint(np.geomspace(1, total, count)).astype(int)
    return sorted({*spaced.tolist(), *table_sizes(total)})


def group_curves(
    proxy: np.ndarray, scores: Mapping[str, np.ndarray], groups: Sequence[str], sizes: list[int]
) -> dict[str, np.ndarray]:
    """Return score -> (G, M) expected score of the best of n by the proxy, of each group and size.

    proxy and each of the scores: (P, N); groups: of each prompt. Groups are sorted by name.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(index, minlength=len(names))[:, None]
    curves = {}
    for name, values in scores.items():
        sums = np.zeros((len(names), len(sizes)))
        np.add.at(sums, index, best_of_n_means(proxy, values, sizes))
        curves[name] = sums / counts
    return curves


def summarise(
    proxy: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: Sequence[str],
    level: float = 0.95,
) -> dict[str, Any]:
    """Return the table of the curve, and for each score where it turns down and the law of best of
    n.

    proxy: (P, N). scores: the scores that count, by name, each (P, N). groups: of each prompt.
    """
    total = proxy.shape[1]
    # the turn is looked for between the sizes of the table too
    sizes, table = fine_sizes(total), table_sizes(total)
    curves = group_curves(proxy, {"proxy": proxy, **scores}, groups, sizes)
    places = list(map(sizes.index, table))
    kl = np.array(list(map(best_of_n_kl, sizes)))
    # one half chooses the peak that the other is measured at
    half = halves(groups)

    rows = []
    for n, place in zip(table, places, strict=True):
        row: dict[str, Any] = {"n": n, "kl": float(kl[place]), "scores": {}}
        for name, curve in curves.items():
            gain = curve[:, place] - curve[:, 0]
            row["scores"][name] = {
                "mean": crossed_mean(curve[None, :, place], level=level).to_dict(),
                "gain": crossed_mean(gain[None, :], level=level).to_dict(),
            }
        rows.append(row)

    turning, laws = {}, {}
    for name in scores:
        curve = curves[name]
        turning[name] = turning_point(sizes, kl, curve, half, level)
        # the points of the table, which lie evenly in log n; at n = 1 there is no gain to fit
        gains = curve[:, places[1:]] - curve[:, :1]
        d = np.sqrt(kl[places[1:]])
        laws[name] = fit_with_intervals("best_of_n", d, gains, level) if len(d) > 1 else None
    return {"curve": rows, "turning": turning, "laws": laws}


def turning_point(
    sizes: list[int], kl: np.ndarray, curve: np.ndarray, half: np.ndarray, level: float = 0.95
) -> dict[str, Any]:
    """Return the n at which the mean of `curve` (G, M) is highest, its interval, and the fall from
    there to the largest n.

    half: 0 or 1 for each group. The interval is the percentile bootstrap over groups: the place of
    a maximum is no smooth statistic, for which a jackknife would hold. The fall is measured on
    other groups than those that chose the peak (`choice.choose`), because the highest of several
    noisy means would fall by chance. `outcome`: "turns down" where the fall's interval lies below 0,
    "not within n" where it does not, "undecided" with fewer than MIN_CLUSTERS groups.
    """
    groups, last = curve.shape[0], len(sizes) - 1
    # groups are resampled whole: their prompts depend on each other
    peak = int(np.argmax(curve.mean(axis=0)))
    draws = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    peaks = np.argmax(draws @ curve, axis=1)
    outside = [(1 - level) / 2, (1 + level) / 2]
    low, high = map(int, np.quantile(peaks, outside, method="inverted_cdf"))

    # one "seed": the policy and the samples are given
    cells = curve.T[None]
    chosen = choose(cells, half) if groups > 1 else np.full((1, 1), peak)
    fall = chosen_mean(cells[:, last] - take(cells, chosen), len(sizes), level).to_dict()
    outcome = "not within n"
    if groups < MIN_CLUSTERS:
        outcome = "undecided"
    elif side(fall) < 0:
        outcome = "turns down"
    return {
        "outcome": outcome,
        "n": {"estimate": sizes[peak], "low": sizes[low], "high": sizes[high]},
        "kl": {"estimate": float(kl[peak]), "low": float(kl[low]), "high": float(kl[high])},
        # share of the resamples that are highest at the largest n
        "highest_at_last": float(np.mean(peaks == last)),
        "last": sizes[last],
        "gain": float(np.mean(curve[:, peak] - curve[:, 0])),
        "fall": fall,
    }


def repeated_share(responses: Sequence[Sequence[str]]) -> float:
    """Return the share of responses that another response to their prompt equals; with many the KL
    is well below its bound.
    """
    repeated = total = 0
    for own in responses:
        # equal texts are equal to the scorer, whatever their ids
        counts = Counter(own)
        repeated += sum(count for count in counts.values() if count > 1)
        total += len(own)
    return repeated / total


@dataclass(frozen=True)
class Fit:
    """A fitted law. rmse: of its points, in units of the score."""

    law: Law
    alpha: float
    beta: float
    rmse: float

    def __call__(self, d: np.ndarray | float) -> np.ndarray:
        """Return the score over the initial policy's at d, the root of the KL in nats."""
        return design(self.law, d) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> float:
        """The d at which the law is highest; infinite where it never falls, 0 where it only falls."""
        if self.beta <= 0:
            return math.inf
        if self.law == "rl":
            # exp overflows where beta is next to nothing
            return math.exp(min(self.alpha / self.beta - 1, 700.0))
        return max(0.0, self.alpha / (2 * self.beta))


def design(law: Law, d: np.ndarray | float) -> np.ndarray:
    """Return (..., 2) what alpha and beta are multiplied by at d."""
    d = np.asarray(d, dtype=float)
    if law == "best_of_n":
        return np.stack([d, -(d**2)], axis=-1)
    # d log d is 0 at d = 0
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def fit_law(law: Law, d: np.ndarray, score: np.ndarray) -> Fit:
    """Return the law that is nearest to the points (d, score over the initial policy's) by least
    squares.

    d, score: (M,). Raises ValueError with fewer than two different d above 0, which do not
    determine it.
    """
    d, score = np.asarray(d, dtype=float), np.asarray(score, dtype=float)
    if len(np.unique(d[d > 0])) < 2:
        raise ValueError(f"a law needs points at two different KL above 0, found d = {d.tolist()}")
    # linear in alpha and beta
    columns = design(law, d)
    (alpha, beta), *_ = np.linalg.lstsq(columns, score, rcond=None)
    residual = score - columns @ np.array([alpha, beta])
    return Fit(law, float(alpha), float(beta), float(np.sqrt(np.mean(residual**2))))


def fit_with_intervals(law: Law, d: np.ndarray, scores: np.ndarray, level: float = 0.95) -> dict:
    """Return the law fitted to the mean of `scores` (G, M) over independent clusters, with
    jackknife intervals of alpha, beta and the peak's d.

    d: (M,). The clusters are groups of prompts, or seeds. The interval of the peak is that of its
    logarithm; it is None where some cluster left out leaves no peak.
    """
    count, total = len(scores), scores.sum(axis=0)
    fit = fit_law(law, d, total / count)
    # the jackknife: fitted again without each cluster
    without = []
    if count > 1:
        without = [fit_law(law, d, (total - own) / (count - 1)) for own in scores]

    def estimate(name: str) -> dict[str, float | None]:
        values = np.array([getattr(other, name) for other in without])
        low, high, _ = jackknife_interval(getattr(fit, name), values, level=level)
        found = {"estimate": getattr(fit, name), "low": low, "high": high}
        # an interval that is not defined is None
        return json_safe(found, nan_as_null=True)

    return {
        "law": law,
        "alpha": estimate("alpha"),
        "beta": estimate("beta"),
        "rmse": fit.rmse,
        "peak": peak_interval(fit, without, level),
    }


def peak_interval(fit: Fit, without: list[Fit], level: float) -> dict[str, float | None]:
    """Return the d of the peak with the jackknife interval of its logarithm; None where it is not a
    positive number.
    """
    # the peak is a ratio, whose logarithm is nearer to a normal
    logs = []
    for own in [fit, *without]:
        logs.append(math.log(own.peak) if 0 < own.peak < math.inf else math.nan)
    low, high, _ = jackknife_interval(logs[0], np.array(logs[1:]), level=level)
    return {"estimate": _exp(logs[0]), "low": _exp(low), "high": _exp(high)}


def _exp(log: float) -> float | None:
    """Return exp(log); None of what is not a number or would overflow."""
    return math.exp(log) if log < 700 else None
