"""Length and position bias: of the score and of the people's choices, with p-values.

Whether a longer answer is preferred because it is longer cannot be told from preferences alone: it
may be the better one. So a bias is what length or position explains beyond a measure of quality:
the true (gold) score where one is known, else the model's own.

    labels      P(chosen) = sigmoid(a q + b l + c f)        logistic regression, no intercept
    score       raw score gap = a q + a' q^3 + b l          least squares, no intercept

q is the gap in quality, l that in length, f = 1 where the chosen answer was shown first, -1 where
second, 0 where nobody knows; all are chosen - rejected, so that it does not matter which answer
comes first. The score of an answer does not depend on where it was shown, so position can only be
in the labels. Standard errors leave out one group at a time.
"""

import math
from typing import Any

import numpy as np

from reward.cards.accuracy import accuracy_with_interval, pair_accuracy
from rlhf.data.records import Preference
from rlhf.stats import jackknife_interval

# p-value of a finding. A card has at most three tests, so that of a hundred cards without a bias at
# most three show one
SURE = 0.01
# share of what quality leaves open in the score that length must explain: below it a bias of the
# score may be sure, but it is too small to steer a policy
NOTABLE = 0.05
# with fewer groups a jackknife of several coefficients is too rough for p-values this small
MIN_GROUPS = 10
# prior precision of standardised coefficients, so that they exist where quality separates all pairs
RIDGE = 0.01
# unit of the length coefficients
TOKENS = 10


def chosen_first(pair: Preference) -> float:
    """Return 1 where the chosen answer was shown first (on the left), -1 where second, 0 where
    nobody knows.

    A preference store knows it; other data says it in a column `chosen_first` (true or false).
    """
    shown = pair.metadata.get("vote", {})
    if isinstance(shown, dict) and shown.get("shown") in ("left", "right"):
        return 1.0 if shown["shown"] == "left" else -1.0
    first = pair.metadata.get("chosen_first")
    if isinstance(first, bool):
        return 1.0 if first else -1.0
    return 0.0


def bias_tests(
    gaps: np.ndarray,
    length_gaps: np.ndarray,
    first: np.ndarray,
    groups: np.ndarray,
    gold_gaps: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return the tests that these pairs allow, each {"kind", "of", "beyond", "effect", "low",
    "high", "p", "n", "found"}.

    All arguments are (n,). Kinds, and their effect for `TOKENS` tokens more:
      labels_length    log-odds that people give to the longer answer, gold alike (with gold alone)
      labels_position  log-odds that people give to the answer shown first
      score_length     raw score that the model gives to the longer answer, gold alike (with gold);
                       "share" is the part of what gold leaves open that length explains
      score_overuse    log-odds by which people give less to the longer answer than the model does
                       (without gold; it sees only what the labels do not share)
    """
    if len(set(groups)) < MIN_GROUPS:
        return []
    # a gold that tells no two answers apart measures no quality
    if gold_gaps is not None and not np.any(gold_gaps):
        gold_gaps = None
    quality = gaps if gold_gaps is None else gold_gaps
    beyond = "the model's score" if gold_gaps is None else "gold"
    columns = {"quality": quality, "length": length_gaps / TOKENS, "first": first}
    # a column of zeros has no coefficient
    columns = {name: column for name, column in columns.items() if np.any(column)}

    found = []
    # what people prefer, beyond quality
    logistic = logistic_coefficients(columns, groups)
    if gold_gaps is not None:
        if "length" in logistic:
            found.append({"kind": "labels_length", **logistic["length"]})
            found.append({"kind": "score_length", **_score_length(gaps, columns, groups)})
    elif "length" in logistic:
        found.append({"kind": "score_overuse", **_mirrored(logistic["length"])})
    if "first" in logistic:
        found.append({"kind": "labels_position", **logistic["first"]})
    for test in found:
        test |= {"beyond": beyond, "found": _is_found(test)}
    return found


def _is_found(test: dict[str, Any]) -> bool:
    sure = test["p"] is not None and test["p"] < SURE
    if test["kind"] == "score_length":
        return sure and test["share"] >= NOTABLE
    # that people value length more than the model does is no bias of the model
    return sure and (test["kind"] != "score_overuse" or test["effect"] > 0)


def _mirrored(test: dict[str, Any]) -> dict[str, Any]:
    return test | {"effect": -test["effect"], "low": -test["high"], "high": -test["low"]}


def _score_length(
    gaps: np.ndarray, columns: dict[str, np.ndarray], groups: np.ndarray
) -> dict[str, Any]:
    quality = columns["quality"]
    # a cubic, as the score need not be linear in gold
    controls = {"quality": quality, "cubed": quality**3}
    test = linear_coefficients(gaps, controls | {"length": columns["length"]}, groups)["length"]
    # partial correlation: what both leave open beyond gold
    rest = _residual(gaps, controls)
    length = _residual(columns["length"], controls)
    product = float(rest @ length) ** 2
    size = float(rest @ rest) * float(length @ length)
    return test | {"share": product / size if size else 0.0}


def _residual(values: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    design = np.column_stack(list(columns.values()))
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def logistic_coefficients(
    columns: dict[str, np.ndarray], groups: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the coefficients of P(chosen) = sigmoid(sum_k b_k x_k) by column, {"effect", "low",
    "high", "p", "n"}.

    Newton's method on standardised columns with a ridge of `RIDGE`; without a group by one Newton
    step from the whole estimate.
    """
    # standardised, so that one ridge suits tokens and scores
    design, sizes = _standardised(columns)
    b = np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ b, -500, 500)))
        slope = design.T @ (1 - p) - RIDGE * b
        curvature = _information(design, p * (1 - p))
        step = np.linalg.solve(curvature, slope)
        b = b + step
        if np.abs(step).max() < 1e-10:
            break
    p = 1 / (1 + np.exp(-np.clip(design @ b, -500, 500)))
    return _tests(columns, b, sizes, design, 1 - p, p * (1 - p), groups)


def linear_coefficients(
    target: np.ndarray, columns: dict[str, np.ndarray], groups: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return the coefficients of target = sum_k b_k x_k by least squares, as
    `logistic_coefficients`.
    """
    design, sizes = _standardised(columns)
    ones = np.ones(len(target))
    b = np.linalg.solve(_information(design, ones), design.T @ target)
    return _tests(columns, b, sizes, design, target - design @ b, ones, groups)


def _standardised(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    design = np.column_stack([np.asarray(column, float) for column in columns.values()])
    sizes = np.sqrt((design**2).mean(axis=0))
    return design / sizes, sizes


def _information(design: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (design * weights[:, None]).T @ design + RIDGE * np.eye(design.shape[1])


def _tests(
    columns: dict[str, np.ndarray],
    b: np.ndarray,
    sizes: np.ndarray,
    design: np.ndarray,
    residuals: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """Return effect, interval and p of each coefficient by leaving out one group at a time."""
    # of each group: its part of gradient and curvature
    names, index = np.unique(groups, return_inverse=True)
    slopes = np.zeros((len(names), len(b)))
    np.add.at(slopes, index, design * residuals[:, None])
    information = np.zeros((len(names), len(b), len(b)))
    outer = design[:, :, None] * design[:, None, :] * weights[:, None, None]
    np.add.at(information, index, outer)
    # all left-out fits in one step each, from the sums of their groups
    whole = _information(design, weights)
    without = b - np.linalg.solve(whole - information, slopes[:, :, None])[:, :, 0]

    found = {}
    for k, name in enumerate(columns):
        low, high, se = jackknife_interval(float(b[k]), without[:, k])
        found[name] = {
            "effect": float(b[k] / sizes[k]),
            "low": float(low / sizes[k]),
            "high": float(high / sizes[k]),
            "p": two_sided_p(float(b[k]), se, len(names) - 1),
            "n": len(names),
        }
    return found


def two_sided_p(estimate: float, se: float, df: int) -> float | None:
    """Return P(|t| >= |estimate| / se) of Student's t; None without a standard error."""
    from scipy.special import stdtr

    if not math.isfinite(se) or se <= 0:
        return None
    return float(2 * stdtr(df, -abs(estimate) / se))


def length_bias(
    gaps: np.ndarray,
    scores: np.ndarray,
    lengths: np.ndarray,
    length_gaps: np.ndarray,
    groups: np.ndarray,
) -> dict[str, Any]:
    """Return how much of the score is length.

    scores, lengths: (2n,) of the chosen answers, then the rejected ones. Accuracy where the chosen
    response is the longer, the shorter, or as long; Pearson correlations of score with length over
    all responses and of the score gap with the length gap over pairs; and the accuracy of the rule
    "the longer is better" (or "the shorter", whichever wins on these very pairs).
    """
    right = pair_accuracy(gaps)
    # a model that goes by length is right in one part and wrong in the other
    parts = {
        "chosen_longer": length_gaps > 0,
        "chosen_shorter": length_gaps < 0,
        "same_length": length_gaps == 0,
    }
    accuracies = {}
    for name, rows in parts.items():
        accuracies[name] = accuracy_with_interval(right[rows], groups[rows])
    longer_wins = float(pair_accuracy(length_gaps).mean())
    return {
        **accuracies,
        "correlation": correlation(scores, lengths),
        "gap_correlation": correlation(gaps, length_gaps),
        "baseline": {
            "accuracy": max(longer_wins, 1 - longer_wins),
            "rule": "longer" if longer_wins >= 0.5 else "shorter",
        },
        "mean_chosen": float(lengths[: len(gaps)].mean()),
        "mean_rejected": float(lengths[len(gaps) :].mean()),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Pearson's r, or None where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
