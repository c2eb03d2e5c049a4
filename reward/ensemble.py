"""Several reward models as one score that is harder to exploit than each of them (Coste et al.
2023, arXiv 2310.02743).

    {ensemble: [runs/reward-0, runs/reward-1, runs/reward-2], how: uncertainty, penalty: 0.1}

Members are models of the same pairs that differ in their seed. They must be on one scale:
normalised on the same reference answers (`normalise: mean_std` and one `reference_data` of
launch/reward.py). Nothing is shifted here.
"""

import math
from pathlib import Path
from statistics import fmean

from rlhf.data.records import Samples, Scorer, Scores
from rlhf.text import short_names

# of the authors' PPO runs (their configs/config_rl.yaml, and fig. 10)
PENALTY = 0.1
SPREAD = "spread"


def combine(scores: list[list[float]], how: str = "mean", penalty: float = PENALTY) -> list[float]:
    """Return one score a sample from K members: `scores` is K lists of B, the result a list of B.

    mean         (1/k) sum_i R_i                        (eq. 3)
    worst        min_i R_i                              (eq. 4)
    uncertainty  mean - penalty * variance              (eq. 5), variance = (1/k) sum_i (R_i - mean)^2
    """
    by_sample = zip(*scores, strict=True)
    if how == "worst":
        return list(map(min, by_sample))
    if how == "mean":
        penalty = 0.0
    return [fmean(row) - penalty * _variance(row) for row in by_sample]


def spread(scores: list[list[float]]) -> list[float]:
    """Return the standard deviation over K members (over k, as the variance of eq. 5) of each of B
    samples.
    """
    return [math.sqrt(_variance(row)) for row in zip(*scores, strict=True)]


def ensemble_scorer(
    members: dict[str, Scorer], how: str = "mean", penalty: float = PENALTY
) -> Scorer:
    """Return a scorer that combines the members; its breakdown holds the score of each, and their
    spread.
    """

    def score(samples: Samples) -> Scores:
        totals = {name: member(samples).total for name, member in members.items()}
        rows = list(totals.values())
        return Scores(combine(rows, how, penalty), {**totals, SPREAD: spread(rows)})

    return score


def member_names(folders: list[str]) -> list[str]:
    """Return a short name for each member: runs/a, runs/b -> a, b; s0/reward, s1/reward ->
    s0-reward, s1-reward.

    Raises ValueError where two are the same reward model.
    """
    if len({*map(Path, folders)}) == len(folders):
        return short_names(folders, taken={SPREAD}, joint="-")
    raise ValueError(
        f"{', '.join(folders)}: names a reward model twice, which would hide how far members differ"
    )


def _variance(values: tuple[float, ...]) -> float:
    # pvariance of the standard library rounds otherwise than eq. 5 in floats
    centre = fmean(values)
    return math.fsum((v - centre) ** 2 for v in values) / len(values)
