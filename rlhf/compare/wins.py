"""Win rates of one policy over another, as they are and with the length of the answers held equal.

At each prompt the samples of A meet those samples of B whose sampling noise is independent of theirs; a share of 0.5 is
a draw. Both numbers have the standard error and the degrees of freedom of seeds and groups crossed
(rlhf/compare/crossed.py), each group counting once, and the interval of a share (rlhf/stats.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rlhf.compare.crossed import Estimate, crossed_mean, crossed_statistic
from rlhf.compare.judge import Verdicts
from rlhf.compare.results import Point, Results, independent_pairs
from rlhf.config import UserError
from rlhf.stats import bounded_interval, student_quantile

RIDGE = 0.01  # on the slope, in units of the mean log-likelihood: the least that keeps a separable fit finite


@dataclass(frozen=True)
class WinRate:
    """How often A wins over B. `raw` and `controlled` have the null 0.5."""

    raw: Estimate
    controlled: Estimate  # nan where length and policy cannot be told apart
    ties: float  # share of the meetings, each group counting once
    length_difference: float  # tokens, A - B
    ridge: bool  # the length decides all, so that the controlled fit needed a ridge: read it as a direction
    consistency: float | None = None  # of a judge asked in both orders: share of pairs with one winner in both

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**asdict(self), "raw": self.raw.to_dict(), "controlled": self.controlled.to_dict()}


def win_values(a: np.ndarray, b: np.ndarray, pairs: Sequence[tuple[int, int]], tie_margin: float = 0.0) -> np.ndarray:
    """(P, pairs) outcomes for A: 1 won, 0 lost, 0.5 a tie; scores a (P, K) and b (P, K'), pairs (sample of a, of b).

    |a - b| <= tie_margin is a tie.
    """
    difference = _differences(a, b, pairs)
    return (difference > tie_margin) + 0.5 * (np.abs(difference) <= tie_margin)


def _differences(a: np.ndarray, b: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    of_a, of_b = zip(*pairs, strict=True)
    return np.asarray(a, dtype=np.float64)[:, of_a] - np.asarray(b, dtype=np.float64)[:, of_b]


def win_rate(
    a: Sequence[Point],
    b: Sequence[Point],
    results: Results,
    judge: str | Sequence[Verdicts],
    *,
    tie_margin: float = 0.0,
    level: float = 0.95,
) -> WinRate | None:
    """How often the policies `a` win over `b`: a[i] meets b[i], of the same seed; the foundation may meet every seed.

    judge: the name of a score, by which all `independent_pairs` meet; or for each i what a judge of pairs said about
    a[i] and b[i] (`judge_wins`). None where no two samples have independent noise, as with one sample a prompt.
    Raises UserError where the seeds do not fit, or a score is no number.
    """
    _check_seeds(a, b)
    if isinstance(judge, str):
        met = [independent_pairs(x, y) for x, y in zip(a, b, strict=True)]
    else:
        met = [verdicts.pairs for verdicts in judge]
    if not all(met):
        return None
    matches = list(zip(a, b, met, strict=True))
    lengths = [_differences(_values(x, "length"), _values(y, "length"), pairs) for x, y, pairs in matches]
    if isinstance(judge, str):
        name = f"score/{judge}"
        outcomes = [win_values(_values(x, name), _values(y, name), pairs, tie_margin) for x, y, pairs in matches]
        consistency = None
    else:
        outcomes = [verdicts.wins for verdicts in judge]
        asked = [v.consistency for v in judge if not math.isnan(v.consistency)]
        consistency = float(np.mean(asked)) if asked else None
    per_seed = np.array([results.group_means(outcome) for outcome in outcomes])
    fit = LengthFit(np.array(outcomes), np.array(lengths), results.groups)
    controlled = crossed_statistic(fit, *per_seed.shape, null=0.5, level=level)
    return WinRate(
        raw=_share(crossed_mean(per_seed, null=0.5, level=level), level),
        controlled=_share(controlled, level),
        ties=float(np.mean([results.group_means(np.asarray(o) == 0.5) for o in outcomes])),
        length_difference=float(np.mean([results.group_means(length) for length in lengths])),
        ridge=fit.ridge,
        consistency=consistency,
    )


def _check_seeds(a: Sequence[Point], b: Sequence[Point]) -> None:
    seeds = [[p.seed for p in points] for points in (a, b)]
    if not a or len(a) != len(b) or any(x != y and None not in (x, y) for x, y in zip(*seeds, strict=True)):
        raise UserError(
            f"win rate: seeds {seeds[0]} cannot meet seeds {seeds[1]}; expected the same seeds in one order"
        )


def _values(point: Point, name: str) -> np.ndarray:
    values = np.asarray(point.values[name], dtype=np.float64)
    if not np.all(np.isfinite(values)):
        count = int((~np.isfinite(values)).sum())
        raise UserError(f"win rate: {count} values of '{name}' of {point.method} are no finite numbers")
    return values


def _share(estimate: Estimate, level: float) -> Estimate:
    """The same with the interval of a share (where nothing varies, that of as many groups), and without a p: nothing
    is claimed of it."""
    if not math.isfinite(estimate.estimate) or not math.isfinite(estimate.se):
        return estimate
    t = student_quantile(0.5 + level / 2, estimate.groups - 1)
    if estimate.se > 0:
        t = (estimate.high - estimate.low) / 2 / estimate.se
    low, high = bounded_interval(estimate.estimate, estimate.se, t, estimate.groups)
    return replace(estimate, low=low, high=high, p=math.nan)


class LengthFit:
    """The win rate at equal length, as a function of the weights of seeds and groups.

        logit P(A wins) = theta + phi tanh(d / sd(d)),    d = length of A's answer - length of B's,    P at d = 0

    after the length-controlled AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, eq. 2) without its term for the
    difficulty of each instruction, which is estimated there from other models' answers. Outcomes may be fractions.
    sd(d) and the fit are done again for each set of weights. nan where d is the same, but not 0, in all meetings: the
    length then cannot be told from the policy.
    """

    def __init__(self, outcomes: np.ndarray, lengths: np.ndarray, groups: Sequence[str]):
        """outcomes (seeds, prompts, meetings) in [0, 1], lengths (seeds, prompts, meetings), groups (prompts,)."""
        seeds, _, meetings = outcomes.shape
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        size = np.bincount(group)
        each = (1 / size[group] / meetings)[None, :, None]  # so that each group counts once
        self.d, column = np.unique(lengths, return_inverse=True)  # a resample then costs a product and a small fit
        row = (np.arange(seeds)[:, None, None] * len(size) + group[None, :, None]) * len(self.d)
        cell = (row + column.reshape(lengths.shape)).ravel()
        shape = (seeds * len(size), len(self.d))
        self.wins, self.losses = (
            np.bincount(cell, weights=(each * y).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
            for y in (outcomes, 1 - outcomes)
        )
        self.start = np.zeros(2)
        self.ridge = False

    def __call__(self, seed_weights: np.ndarray, group_weights: np.ndarray) -> float:
        weights = np.outer(seed_weights, group_weights).ravel()
        wins, losses = weights @ self.wins, weights @ self.losses
        used = wins + losses > 0
        d, w = self.d[used], (wins + losses)[used]
        y, w = wins[used] / w, w / w.sum()
        sd, mean = math.sqrt(max(0.0, float(w @ d**2 - (w @ d) ** 2))), float(w @ y)
        if sd < 1e-9:
            return mean if np.all(d == 0) else math.nan
        if np.all(y == 0) or np.all(y == 1):
            return float(y[0])
        x = np.tanh(d / sd)
        ridge = RIDGE if separable(x, y) else 0.0
        self.ridge |= ridge > 0
        found = logistic_fit(x, y, w, ridge, np.zeros(2) if ridge else self.start)
        if not ridge:
            self.start = found  # near the next one's: left-out groups change little
        return float(_sigmoid(found[0]))


def separable(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether a threshold on x parts all wins from all losses, so that the steepest slope fits best (y in [0, 1])."""
    wins, losses = x[y > 0], x[y < 1]
    return bool(wins.min() >= losses.max() or losses.min() >= wins.max())


def logistic_fit(x: np.ndarray, y: np.ndarray, w: np.ndarray, ridge: float, start: np.ndarray) -> np.ndarray:
    """(theta, phi) that maximise sum w [y log p + (1 - y) log(1 - p)] - ridge phi^2 / 2 by Newton's method, where
    p = sigmoid(theta + phi x). x, y, w (n,), w sums to 1, y in [0, 1]."""
    theta, phi = start
    for _ in range(200):
        p = _sigmoid(theta + phi * x)
        rest, curve = w * (y - p), w * p * (1 - p)
        first, second = rest.sum(), rest @ x - ridge * phi
        h11, h12, h22 = curve.sum(), curve @ x, curve @ x**2 + ridge
        determinant = h11 * h22 - h12**2
        step = np.array([h22 * first - h12 * second, h11 * second - h12 * first]) / max(determinant, 1e-300)
        step /= max(1.0, np.abs(step).max())  # far off, a full step can overshoot
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-11:
            break
    return np.array([theta, phi])


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))
