"""What the lengths of two answers alone say about which is preferred, to be taken out of the scores."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Newton's steps; a logistic regression of one slope takes five
STEPS = 50


def fit_length(rows: Sequence[dict[str, Any]], label_smoothing: float = 0.0) -> float:
    """Return the slope b of the length-only model on training pairs, in logits per token.

        P(chosen is better) = sigmoid(b (tokens of chosen - tokens of rejected))

    by maximum likelihood with the pairs' label_prob and weight, and a normal prior of one logit on
    the effect of a typical difference, so that lengths that tell all pairs apart have a slope too.
    There is no constant: which answer is called chosen is the label itself. 0 where no two lengths
    differ. rows: those of `pair_rows`.
    """
    gaps = length_gaps(rows)
    typical = math.sqrt(float(np.mean(gaps**2))) if len(gaps) else 0.0
    if typical == 0:
        return 0.0
    x = gaps / typical
    given = np.array([row.get("label_prob", math.nan) for row in rows], float)
    p = np.where(np.isnan(given), 1.0 - label_smoothing, given)
    w = np.array([row.get("weight", 1.0) for row in rows], float)

    slope = 0.0
    for _ in range(STEPS):
        says = 1 / (1 + np.exp(-np.clip(slope * x, -500, 500)))
        gradient = float(np.sum(w * (p - says) * x)) - slope
        slope += gradient / (float(np.sum(w * says * (1 - says) * x**2)) + 1.0)
    return slope / typical


def add_offsets(rows: Sequence[dict[str, Any]], slope: float) -> None:
    """Add to rows of `pair_rows` what the length-only model says, as the column `offset`, in
    logits.

    The loss reads score gap + offset, so the scores learn what length does not explain, and the
    offset is left out of them afterwards: a product of experts whose biased one is fitted first and
    held fixed (Clark et al. 2019, arXiv 1909.03683, "bias product"; for the length of answers and
    reward models Shen et al. 2023, arXiv 2310.05199). A number of each pair: neither batch nor rank
    changes it.
    """
    for row, gap in zip(rows, length_gaps(rows), strict=True):
        row["offset"] = slope * float(gap)


def length_gaps(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return (n,) tokens of the chosen answer minus those of the rejected one; the prompt is the
    same.
    """
    gaps = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    return np.array(gaps, float)
