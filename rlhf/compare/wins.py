"""Win rates of one policy over another, as they are and with the length of the answers held equal.

At each prompt the samples of A are compared with those samples of B whose sampling noise is
independent of theirs; a share of 0.5 is a draw. Both numbers have the standard error and the degrees of freedom of
seeds and groups crossed (rlhf/stats/crossed.py), each group counting once, and the interval of a
share (rlhf/stats).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rlhf.compare.results import Point, Results, independent_pairs
from rlhf.stats.crossed import Estimate, crossed_mean, crossed_statistic, share
from rlhf.stats.logistic import logistic_fit, separable, sigmoid

# on the slope, in units of the mean log-likelihood: the least that keeps a separable fit finite
RIDGE = 0.01


@dataclass(frozen=True)
class Verdicts:
    """What decides between two policies' answers: a score, or a judge asked in both orders.

    wins: (prompts, pairs) share that A's answer wins; nan where the judge gave no verdict in one of
    the orders. pairs: (sample of A, sample of B), the same at each prompt.
    consistency: share of the pairs with the same winner, or a tie, in both orders; nan where none
    was asked, as by a score.
    prefers_first: mean probability given to the answer shown first; 0.5 without a favourite
    position.
    asked: pairs whose two answers differ.
    """

    wins: np.ndarray
    pairs: list[tuple[int, int]]
    consistency: float = math.nan
    prefers_first: float = math.nan
    asked: int = 0


@dataclass(frozen=True)
class WinRate:
    """How often A wins over B. `raw` and `controlled` have the null 0.5.

    controlled: at equal length; nan where length and policy cannot be told apart.
    ties: share of the meetings, each group counting once. length_difference: tokens, A - B.
    ridge: the length decides all, so that the controlled fit needed a ridge; read it as a
    direction.
    consistency: of a judge asked in both orders, the share of pairs with one winner in both.
    no_verdict: of such a judge, the meetings that it could not decide; they are left out.
    """

    raw: Estimate
    controlled: Estimate
    ties: float
    length_difference: float
    ridge: bool
    consistency: float | None = None
    no_verdict: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "raw": self.raw.to_dict(), "controlled": self.controlled.to_dict()}


def win_rate(
    a: Sequence[Point],
    b: Sequence[Point],
    results: Results,
    judge: str | Sequence[Verdicts],
    *,
    tie_margin: float = 0.0,
    level: float = 0.95,
) -> WinRate | None:
    """Return how often the policies `a` win over `b`: a[i] and b[i] have the same seed, or
    one is the initial policy.

    judge: the name of a score, which decides all `independent_pairs` (a difference of at most
    `tie_margin` is a tie, which counts half); or for each i what a judge of pairs said about a[i]
    and b[i] (rlhf/judge/policies.py). None where no two samples have independent noise, as with one sample a
    prompt, or where nothing was decided.

    A meeting without a verdict is left out of its prompt's mean, a prompt without any in one of the
    seeds out of all.
    """
    if isinstance(judge, str):
        judge = [_by_score(x, y, judge, tie_margin) for x, y in zip(a, b, strict=True)]
    if not all(verdicts.pairs for verdicts in judge):
        return None
    outcomes, lengths, consistencies = [], [], []
    for x, y, verdicts in zip(a, b, judge, strict=True):
        outcomes.append(verdicts.wins)
        lengths.append(_differences(x, y, "length", verdicts.pairs))
        # nan: decided by a score, or no pair differed
        if not math.isnan(verdicts.consistency):
            consistencies.append(verdicts.consistency)

    wins, gaps = np.array(outcomes), np.array(lengths, dtype=np.float64)
    undecided = np.isnan(wins)
    decided = ~undecided.all(axis=2).any(axis=0)
    if not decided.any():
        return None
    results = replace(results, groups=list(itertools.compress(results.groups, decided)))
    wins = _filled(wins[:, decided], undecided[:, decided])
    gaps = _filled(gaps[:, decided], undecided[:, decided])

    per_seed = np.array(list(map(results.group_means, wins)))
    ties = list(map(results.group_means, wins == 0.5))
    length_differences = list(map(results.group_means, gaps))
    fit = LengthFit(wins, gaps, results.groups)
    controlled = crossed_statistic(fit, *per_seed.shape, null=0.5, level=level)
    return WinRate(
        raw=share(crossed_mean(per_seed, null=0.5, level=level), level),
        controlled=share(controlled, level),
        ties=float(np.mean(ties)),
        length_difference=float(np.mean(length_differences)),
        ridge=fit.ridge,
        consistency=float(np.mean(consistencies)) if consistencies else None,
        no_verdict=int(undecided.sum()),
    )


def _filled(table: np.ndarray, undecided: np.ndarray) -> np.ndarray:
    """Return (seeds, prompts, meetings) with the mean of the prompt's decided meetings in place of
    the undecided ones, which leaves them out of the prompt's mean.
    """
    if not undecided.any():
        return table
    means = np.nanmean(np.where(undecided, np.nan, table), axis=2, keepdims=True)
    return np.where(undecided, means, table)


def _by_score(a: Point, b: Point, score: str, tie_margin: float) -> Verdicts:
    """Return what a score says of all `independent_pairs`, as a judge of pairs would; a score
    favours no order.
    """
    pairs = independent_pairs(a, b)
    wins = np.empty((0, 0))
    if pairs:
        difference = _differences(a, b, f"score/{score}", pairs)
        wins = (difference > tie_margin) + 0.5 * (np.abs(difference) <= tie_margin)
    return Verdicts(wins, pairs)


def _differences(a: Point, b: Point, measure: str, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return (prompts, pairs) differences a - b of a measure at the pairs (sample of a, sample of
    b).
    """
    of_a, of_b = zip(*pairs, strict=True)
    return a.values[measure][:, of_a] - b.values[measure][:, of_b]


class LengthFit:
    """The win rate at equal length, as a function of the weights of seeds and groups.

        logit P(A wins) = theta + phi tanh(d / sd(d)),    d = length of A's answer - length of B's,    P at d = 0

    after the length-controlled AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475, eq. 2) without
    its term for the difficulty of each instruction, which is estimated there from other models'
    answers. Outcomes may be fractions. sd(d) and the fit are done again for each set of weights.
    nan where d is the same, but not 0, in all meetings: the length then cannot be told from the
    policy.
    """

    def __init__(self, outcomes: np.ndarray, lengths: np.ndarray, groups: Sequence[str]):
        """outcomes (seeds, prompts, meetings) in [0, 1], lengths (seeds, prompts, meetings), groups
        (prompts,).
        """
        seeds, _, meetings = outcomes.shape
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        size = np.bincount(group)
        # each group counts once
        each = (1 / size[group] / meetings)[None, :, None]
        # wins and losses in a table of (seed, group) x length difference: a resample costs a
        # product and a small fit
        self.d, column = np.unique(lengths, return_inverse=True)
        shape = (seeds * len(size), len(self.d))
        row = np.arange(seeds)[:, None, None] * len(size) + group[None, :, None]
        cell = (row * len(self.d) + column.reshape(lengths.shape)).ravel()

        def table(weights: np.ndarray) -> np.ndarray:
            return np.bincount(
                cell, weights=weights.ravel(), minlength=shape[0] * shape[1]
            ).reshape(shape)

        self.wins, self.losses = table(each * outcomes), table(each * (1 - outcomes))
        self.start = np.zeros(2)
        self.ridge = False

    def __call__(self, seed_weights: np.ndarray, group_weights: np.ndarray) -> float:
        """Return the win rate at equal length with these weights."""
        weights = np.outer(seed_weights, group_weights).ravel()
        wins, losses = weights @ self.wins, weights @ self.losses
        used = wins + losses > 0
        d, w = self.d[used], (wins + losses)[used]
        y, w = wins[used] / w, w / w.sum()
        mean = float(w @ y)
        # a variance of 0 may come out negative by rounding
        variance = float(w @ d**2 - (w @ d) ** 2)
        sd = math.sqrt(max(0.0, variance))

        # no fit where the length never varies, or one side wins all
        if sd < 1e-9:
            return mean if np.all(d == 0) else math.nan
        if np.all(y == 0) or np.all(y == 1):
            return float(y[0])
        x = np.tanh(d / sd)
        if separable(x, y):
            self.ridge = True
            return float(sigmoid(logistic_fit(x, y, w, RIDGE, np.zeros(2))[0]))
        # the next fit starts near this one: left-out groups change little
        self.start = logistic_fit(x, y, w, 0.0, self.start)
        return float(sigmoid(self.start[0]))
