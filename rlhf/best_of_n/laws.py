"""The laws of over-optimisation of Gao, Schulman and Hilton 2022 (arXiv 2210.10760), section 3.1.

With d = sqrt(KL to the initial policy), the gold score over that of the initial policy is

    best of n    R(d) = d (alpha - beta d)          highest at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)      highest at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so that least squares has a closed form.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf.stats import jackknife_interval

Law = Literal["best_of_n", "rl"]


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
    without = [fit_law(law, d, (total - own) / (count - 1)) for own in scores] if count > 1 else []

    def estimate(name: str) -> dict[str, float | None]:
        values = np.array([getattr(other, name) for other in without])
        low, high, _ = jackknife_interval(getattr(fit, name), values, level=level)
        return {"estimate": getattr(fit, name), "low": _number(low), "high": _number(high)}

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
    bounds = [logs[0], low, high]
    d, lowest, highest = [_number(math.exp(log)) if log < 700 else None for log in bounds]
    return {"estimate": d, "low": lowest, "high": highest}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
