"""Gates: a number with its interval, the bound that it has to keep, and whether that is shown.

A gate passes only where its whole interval keeps the bound. An adapter ships where every gate
passes, so that the chance of shipping one that breaks some bound is at most that of its gate's
interval missing it, and needs no correction for the number of gates (an intersection-union test,
Berger 1982, Technometrics 24).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rlhf.files import json_safe
from rlhf.stats import MIN_CLUSTERS, group_means, jackknife_interval
from rlhf.validation import Number, Spec, validate

Direction = Literal["above", "at least", "at most", "within"]
# of 95 %, two-sided
NORMAL_QUANTILE = 1.96
PASSED, FAILED, NOT_SHOWN, OFF, NONE = "passed", "failed", "not shown", "off", "not applicable"


class Gates(Spec):
    """The bound of each gate; null takes the gate out of the verdict."""

    score_gain: Number | None = 0.05
    preference: Number | None = Field(0.5, ge=0, le=1)
    facts: Number | None = -0.05
    perplexity: Number | None = Field(1.1, gt=0)
    task: Number | None = -0.05
    memorised: Number | None = 0.05
    refusals: Number | None = Field(0.05, ge=0, le=1)
    length: Number | None = Field(1.5, ge=1)


@dataclass(frozen=True)
class Kind:
    """What a gate measures, and on which side of its bound it passes."""

    what: str
    direction: Direction


KINDS = {
    "score_gain": Kind("gain in the voice's score over the base", "above"),
    "preference": Kind("share of votes for the adapter against the base", "above"),
    "facts": Kind("change in the share of answers with all facts right", "at least"),
    "perplexity": Kind("perplexity of other text, as a multiple of the base's", "at most"),
    "task": Kind("change in the share of other tasks solved", "at least"),
    "memorised": Kind("overlap with training answers beyond that with answers held out", "at most"),
    "refusals": Kind("change in the share of answers that refuse", "at most"),
    "length": Kind("words, as a multiple of the base's", "within"),
}

SENTENCES = {
    PASSED: "{what}: {value}; {bound} is shown.",
    FAILED: "{what}: {value}; {bound} does not hold.",
    NOT_SHOWN: "{what}: {value}; {bound} is not shown.",
    OFF: "{what}: not asked for.",
    NONE: "{what}: does not apply, since {why}.",
}


@dataclass(frozen=True)
class Measured:
    """An estimate with its 95 % interval over `groups` groups of prompts; nan where there is none.

    why: the reason for which the gate does not apply.
    """

    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    groups: int = 0
    why: str = ""


@dataclass(frozen=True)
class Gate:
    """One row of a verdict."""

    name: str
    status: str
    estimate: float
    low: float
    high: float
    groups: int
    direction: Direction
    threshold: float | None
    sentence: str

    @property
    def blocks(self) -> bool:
        """Whether the adapter does not ship because of it."""
        return self.status in (FAILED, NOT_SHOWN)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON: what is not a finite number becomes None."""
        return json_safe(asdict(self), nan_as_null=True)


def read_gates(given: Mapping[str, Any]) -> Gates:
    """Return the bounds, the defaults where none are given. Raises UserError on a wrong one."""
    return validate(Gates, dict(given), "gates")


def judge(measured: Mapping[str, Measured], bounds: Gates) -> list[Gate]:
    """Return every gate with its status, in the order of `KINDS`."""
    return [gate(name, measured.get(name), getattr(bounds, name)) for name in KINDS]


def gate(name: str, found: Measured | None, threshold: float | None) -> Gate:
    """Return one gate. `found` is None where nothing was measured: then nothing is shown."""
    kind = KINDS[name]
    found = found or Measured()
    # off goes first: who turned a gate off need not hear that it does not apply
    if threshold is None:
        status = OFF
    elif found.why:
        status = NONE
    else:
        status = status_of(found, kind.direction, threshold)
    sentence = SENTENCES[status].format(
        what=kind.what,
        value=shown(found),
        bound=bound_text(kind.direction, threshold),
        why=found.why,
    )
    values = (found.estimate, found.low, found.high, found.groups)
    sentence = sentence[0].upper() + sentence[1:]
    return Gate(name, status, *values, kind.direction, threshold, sentence)


def status_of(found: Measured, direction: Direction, threshold: float) -> str:
    """Return passed where the whole interval keeps the bound, failed where none of it does, else
    not shown. With fewer than MIN_CLUSTERS groups nothing is shown.
    """
    low, high = found.low, found.high
    # of so few groups the spread itself is hardly known
    if not (math.isfinite(low) and math.isfinite(high)) or found.groups < MIN_CLUSTERS:
        return NOT_SHOWN
    if direction == "above":
        keeps, breaks = low > threshold, high <= threshold
    elif direction == "at least":
        keeps, breaks = low >= threshold, high < threshold
    elif direction == "at most":
        keeps, breaks = high <= threshold, low > threshold
    else:
        # half as long is as far off as twice as long
        least = 1 / threshold
        keeps, breaks = least <= low and high <= threshold, high < least or low > threshold
    if keeps:
        return PASSED
    return FAILED if breaks else NOT_SHOWN


def shown(found: Measured) -> str:
    """Return "0.12 [0.08, 0.16]"."""
    if not math.isfinite(found.estimate):
        return "not measured"
    if not math.isfinite(found.low):
        return f"{found.estimate:.3g} without an interval"
    return f"{found.estimate:.3g} [{found.low:.3g}, {found.high:.3g}]"


def bound_text(direction: Direction, threshold: float | None) -> str:
    """Return "above 0.05", or "within 0.667 and 1.5"; an en dash without a bound."""
    if threshold is None:
        return "–"
    if direction == "within":
        return f"within {1 / threshold:.3g} and {threshold:g}"
    return f"{direction} {threshold:g}"


def mean_of_groups(
    values: Sequence[tuple[str, float]], bounds: tuple[float, float] | None = None
) -> Measured:
    """Return the mean over groups of their means, with the jackknife interval over groups.

    values: (group, value). bounds: what the mean cannot leave (rlhf/stats).
    """
    if not values:
        return Measured()
    groups, numbers = zip(*values, strict=True)
    # a group with many prompts counts once, as it is one observation
    means = group_means(numbers, groups)
    return ratio_of_groups(means, np.ones(len(means)), bounds)


def ratio_of_groups(
    top: Sequence[float], bottom: Sequence[float], bounds: tuple[float, float] | None = None
) -> Measured:
    """Return sum(top) / sum(bottom), one number of each for every group, with the jackknife
    interval over groups.
    """
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    if not len(top) or not bottom.sum():
        return Measured()
    estimate = float(top.sum() / bottom.sum())
    # where all of the bottom is in one group, the ratio without it is not defined: no interval
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (top.sum() - top) / (bottom.sum() - bottom)
    low, high, _ = jackknife_interval(estimate, without, bounds=bounds)
    return Measured(estimate, low, high, len(top))


def difference_of_shares(means: Mapping[str, tuple[float, float]]) -> Measured:
    """Return the mean over groups of (run - base) of two shares of the same groups, with square-and-add
    limits (Newcombe 1998, Statistics in Medicine 17:2635, method 10), each share's own ends being
    `bounded_interval` and c `correlation`:

        low = d - sqrt(x^2 - 2 c x y + y^2),     x = r - r_low,    y = b_high - b
        high = d + sqrt(x^2 - 2 c x y + y^2),    x = r_high - r,   y = b - b_low

    means: group -> (base's share b, run's share r). Unlike the interval of the mean difference it has
    a width where neither ever does it.
    """
    of_base, of_run = [], []
    for group, (base_share, run_share) in means.items():
        of_base.append((group, base_share))
        of_run.append((group, run_share))
    base = mean_of_groups(of_base, bounds=(0.0, 1.0))
    run = mean_of_groups(of_run, bounds=(0.0, 1.0))
    change = run.estimate - base.estimate
    alike = correlation(list(means.values()))
    below = _add_squares(run.estimate - run.low, base.high - base.estimate, alike)
    above = _add_squares(run.high - run.estimate, base.estimate - base.low, alike)
    return Measured(change, change - below, change + above, run.groups)


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the correlation of n pairs of shares with Newcombe's correction, 0 where one is constant.

    A covariance above 0 is taken 1 / (2 n) smaller, to 0 at most: few pairs alike may be chance.
    """
    if not pairs:
        return 0.0
    spread = np.cov(np.array(pairs), rowvar=False, ddof=0)
    covariance = float(spread[0, 1])
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * len(pairs)))
    scale = math.sqrt(float(spread[0, 0] * spread[1, 1]))
    return covariance / scale if scale else 0.0


def _add_squares(x: float, y: float, alike: float) -> float:
    # rounding may take it below 0
    return math.sqrt(max(0.0, x**2 - 2 * alike * x * y + y**2))


def least_increase_shown(groups: int) -> float:
    """Return the smallest bound on an increase of a share that an adapter can keep whose share is 0,
    as its base's: the upper end of `difference_of_shares`; inf with fewer than MIN_CLUSTERS groups.
    """
    if groups < MIN_CLUSTERS:
        return math.inf
    return difference_of_shares({str(group): (0.0, 0.0) for group in range(groups)}).high


def groups_needed(bound: float) -> int | None:
    """Return the fewest groups with which an increase above `bound` can be excluded; None where no
    number can. 76 for 0.05.
    """
    if bound <= 0:
        return None
    # Student's quantile is above the normal's: never enough, so that counting up from it finds the first
    groups = max(MIN_CLUSTERS, math.floor(NORMAL_QUANTILE**2 * (1 - bound) / bound))
    while least_increase_shown(groups) > bound:
        groups += 1
    return groups
