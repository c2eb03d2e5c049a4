"""Win rates of a judge, corrected by people's votes on some of the pairs.

A judge errs, and more pairs make it no better. People's votes on a random part of the prompts say how
it errs there; the judge's verdicts on all prompts say what that part has missed. Prediction-powered
inference (Angelopoulos et al. 2023, arXiv 2301.09633), with the weight of the judge chosen from the data
(PPI++, Angelopoulos et al. 2023, arXiv 2311.01453):

    theta = mean_L(y) + lambda (mean_all(f) - mean_L(x))

It was chosen over the correction by sensitivity and specificity (Rogan and Gladen 1978), which divides
by sensitivity + specificity - 1 (useless for a judge near chance), has no place for ties and shares,
and needs errors that do not depend on the pair. Here a useless judge gets the weight 0, and the result
is the mean of the people's votes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf.files import json_safe
from rlhf.stats import bounded_interval, group_means, student_quantile

# with fewer labelled prompts the weight of the judge and its error are too uncertain to be shown
MIN_LABELLED = 10


@dataclass(frozen=True)
class Corrected:
    """A corrected win rate with its interval over prompts.

    labelled, groups: the groups of prompts with people's votes, and all. weight: lambda, 0 for a
    useless judge. people: the mean of the votes alone with its interval, on the same prompts.
    worth: votes of people alone that would be as exact, over those that were used.
    """

    estimate: float
    low: float
    high: float
    se: float
    labelled: int
    groups: int
    weight: float
    people: float
    people_low: float
    people_high: float
    worth: float

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON: what is not a finite number becomes None."""
        return json_safe(asdict(self), nan_as_null=True)


@dataclass(frozen=True)
class EqualAnswers:
    """Pairs of equal answers: a tie that everybody would see, and that nobody is asked about.

    They are known of all prompts, those without votes too, so that what the votes say holds of the
    other pairs alone: as a part of a win rate it is that rate which is drawn to one half.
    """

    # of all groups: (groups,) the share of their pairs that is equal
    shares: np.ndarray

    @property
    def asked(self) -> np.ndarray:
        """(groups,) whether a group has a pair that somebody can be asked about."""
        return self.shares < 1

    def within(self, means: np.ndarray) -> np.ndarray:
        """Return the means of the groups over all their pairs, from those over the asked ones."""
        return (1 - self.shares) * means + self.shares / 2

    def all_groups(self, mean: float, se: float) -> tuple[float, float]:
        """Return mean and standard error over all groups, from those over the groups with a pair to
        ask about. Which groups these are is random too.
        """
        kept = float(self.asked.mean())
        of_kept = (mean - 0.5) ** 2 * kept * (1 - kept) / len(self.shares)
        return 0.5 + kept * (mean - 0.5), math.sqrt((kept * se) ** 2 + of_kept)


def corrected_win_rate(
    people: np.ndarray,
    judge: np.ndarray,
    groups: Sequence[str],
    level: float = 0.95,
    *,
    equal: np.ndarray | None = None,
) -> Corrected | None:
    """Return the win rate that people would give, from votes on some pairs and a judge on all.

    people, judge: (pairs,) in [0, 1], the share that A's answer wins; nan where nobody voted, or
    where the judge gave no verdict. groups: of the prompts; each counts once, and those with votes
    must be drawn at random from all that have a pair to vote on. equal: (pairs,) where both answers
    are the same, a tie. None with fewer than MIN_LABELLED groups with votes.
    """
    people = np.asarray(people, dtype=np.float64)
    equal = np.zeros(len(people), bool) if equal is None else np.asarray(equal, bool)
    # f may be anything that is known of each pair: what it misses the votes correct
    judge = np.nan_to_num(np.asarray(judge, dtype=np.float64), nan=0.5)
    judge = np.where(equal, 0.5, judge)
    has_vote = np.isfinite(people) & ~equal
    ties = EqualAnswers(group_means(equal, groups))

    # of each group: the judge on all its pairs, and votes and judge on those with votes
    of_all = group_means(judge, groups)
    y = ties.within(group_means(people, groups, has_vote))
    x = ties.within(group_means(judge, groups, has_vote))
    labelled = np.isfinite(y)
    n = int(labelled.sum())
    if n < MIN_LABELLED:
        return None

    estimate, se, weight = prediction_powered(
        y[labelled], x[labelled], of_all[labelled], of_all[~labelled & ties.asked]
    )
    estimate, se = ties.all_groups(float(estimate), float(se))
    alone, alone_se = ties.all_groups(
        float(y[labelled].mean()), float(y[labelled].std(ddof=1)) / math.sqrt(n)
    )
    t = student_quantile(0.5 + level / 2, n - 1)
    low, high = bounded_interval(estimate, se, t, n)
    people_low, people_high = bounded_interval(alone, alone_se, t, n)
    return Corrected(
        estimate=min(1.0, max(0.0, estimate)),
        low=low,
        high=high,
        se=se,
        labelled=n,
        groups=len(y),
        weight=float(weight),
        people=alone,
        people_low=people_low,
        people_high=people_high,
        worth=(alone_se / se) ** 2 if se > 0 else math.nan,
    )


def prediction_powered(
    y: np.ndarray, x: np.ndarray, f: np.ndarray, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (...) estimates, their standard errors and the weights lambda, each group counting once.

    y (..., n): people's mean of a labelled group; x, f (..., n): the judge's mean over the pairs of
    that group with votes, and over all its pairs; rest (..., m): over all pairs of the others. With
    w = n / (n + m) and h = x - w f

        theta = mean(y - lambda h) + lambda (1 - w) mean(rest)
        lambda = cov(y, h) / (var(h) + n (1 - w)^2 var(rest) / m)           (2311.01453, section 6)

    which has the least variance. The standard error is the jackknife's of two independent samples,
    lambda estimated again without each group, so that its own error counts.
    """
    n, m = y.shape[-1], rest.shape[-1]
    w = n / (n + m)
    h = x - w * f
    first = (n, y.sum(-1), h.sum(-1), (y * h).sum(-1), (h * h).sum(-1))
    second = (m, rest.sum(-1), (rest * rest).sum(-1))
    estimate, weight = _from_sums(first, second, w)

    wide = [np.asarray(total)[..., None] for total in (*first, *second)]
    # from the sums each group is left out without a loop
    without = [n - 1, wide[1] - y, wide[2] - h, wide[3] - y * h, wide[4] - h * h]
    variance = _jackknife(_from_sums(tuple(without), (m, *wide[6:]), w)[0])
    if m > 1:
        left = (m - 1, wide[6] - rest, wide[7] - rest * rest)
        variance = variance + _jackknife(_from_sums((n, *wide[1:5]), left, w)[0])
    return estimate, np.sqrt(variance), weight


def _from_sums(first: tuple, second: tuple, w: float) -> tuple[np.ndarray, np.ndarray]:
    """Return theta and lambda from (count, sums of y, h, y h, h^2) and (count, sums of rest,
    rest^2).
    """
    n, sum_y, sum_h, sum_yh, sum_hh = first
    m, sum_r, sum_rr = second
    covariance = (sum_yh - sum_y * sum_h / n) / (n - 1)
    spread = (sum_hh - sum_h * sum_h / n) / (n - 1)
    if m > 1:
        spread = spread + n * (1 - w) ** 2 * (sum_rr - sum_r * sum_r / m) / (m - 1) / m
    # a judge that says the same throughout tells nothing
    useful = spread > 1e-12
    weight = np.where(useful, covariance / np.where(useful, spread, 1.0), 0.0)
    of_rest = (1 - w) * sum_r / m if m else 0.0
    return sum_y / n - weight * sum_h / n + weight * of_rest, weight


def _jackknife(without: np.ndarray) -> np.ndarray:
    """Return the jackknife's variance from (..., n) statistics without each group."""
    n = without.shape[-1]
    return (n - 1) / n * ((without - without.mean(-1, keepdims=True)) ** 2).sum(-1)
