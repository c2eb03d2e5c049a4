"""Several reward models as one score that is harder to exploit than each of them (Coste et al. 2023, arXiv 2310.02743).

    {ensemble: [runs/reward-0, runs/reward-1, runs/reward-2], how: uncertainty, penalty: 0.1}

Members are models of the same pairs that differ in their seed. They must be on one scale: normalised on the same
reference answers (`normalise: mean_std` and one `reference_data` of launch/reward.py). Nothing is shifted here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlhf.config import UserError, did_you_mean
from rlhf.data.records import Samples, Scorer, Scores

HOW = ("mean", "worst", "uncertainty")
PENALTY = 0.1  # of the authors' PPO runs (their configs/config_rl.yaml, and fig. 10)
SPREAD = "spread"


def combine(scores: list[list[float]], how: str = "mean", penalty: float = PENALTY) -> list[float]:
    """One score a sample from K members: `scores` is K lists of B, the result a list of B.

    mean         (1/k) sum_i R_i                        (eq. 3)
    worst        min_i R_i                              (eq. 4)
    uncertainty  mean - penalty * variance              (eq. 5), variance = (1/k) sum_i (R_i - mean)^2
    """
    if how == "worst":
        return [min(row) for row in zip(*scores, strict=True)]
    if how == "mean":
        penalty = 0.0
    return [_mean(row) - penalty * _variance(row) for row in zip(*scores, strict=True)]


def spread(scores: list[list[float]]) -> list[float]:
    """The standard deviation over K members (over k, as the variance of eq. 5) of each of B samples."""
    return [math.sqrt(_variance(row)) for row in zip(*scores, strict=True)]


def ensemble_scorer(members: dict[str, Scorer], how: str = "mean", penalty: float = PENALTY) -> Scorer:
    """The members' scores combined; the breakdown holds each member's under its name, and their spread."""

    def score(samples: Samples) -> Scores:
        each = {name: member(samples).total for name, member in members.items()}
        rows = list(each.values())
        return Scores(combine(rows, how, penalty), {**each, SPREAD: spread(rows)})

    return score


def member_names(folders: list[str]) -> list[str]:
    """A short name for each member: runs/a, runs/b -> a, b; s0/reward, s1/reward -> s0-reward, s1-reward."""
    parts = [Path(folder).parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]).replace("/", "") for part in parts]
        if len({*names, SPREAD}) == len(names) + 1:
            return names
    raise UserError(f"{', '.join(folders)}: names a reward model twice, which would hide how far members differ")


def check_ensemble(folders: Any, options: dict[str, Any], where: str) -> None:
    """Raises UserError, naming `where`, unless these are two or more folders with options that go together."""
    if not isinstance(folders, list) or len(folders) < 2 or not all(isinstance(f, str) and f for f in folders):
        raise UserError(f"{where}: 'ensemble' is {folders!r}, expected two or more reward models: [runs/a, runs/b]")
    try:
        member_names(folders)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    how, penalty = options.get("how", "mean"), options.get("penalty", PENALTY)
    if how not in HOW:
        raise UserError(f"{where}: how is {how!r}, expected one of {', '.join(HOW)}.{did_you_mean(str(how), HOW)}")
    number = isinstance(penalty, (int, float)) and not isinstance(penalty, bool)
    if not number or not 0 <= penalty < math.inf:
        raise UserError(f"{where}: penalty is {penalty!r}, expected a number from 0 up")
    if "penalty" in options and how != "uncertainty":
        raise UserError(f"{where}: 'penalty' does nothing with how: {how}. Set how: uncertainty, or take it out")


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: tuple[float, ...]) -> float:
    centre = _mean(values)
    return math.fsum((v - centre) ** 2 for v in values) / len(values)
