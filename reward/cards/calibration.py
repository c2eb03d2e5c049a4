"""Whether a score gap says how sure the model may be, and the temperature that makes it say so.

P(chosen is better) = sigmoid(raw score gap / temperature). The temperature is for probabilities
alone: it changes no order of answers, no accuracy, and no score that PPO learns from.
"""

import itertools
import math
from typing import Any

import numpy as np

from reward.cards.accuracy import pair_accuracy
from rlhf.data.records import digest

# parts of the pairs, each judged by the temperature of the others
FOLDS = 5


def probability(gaps: np.ndarray) -> np.ndarray:
    """Return sigmoid(gaps)."""
    return 1 / (1 + np.exp(-np.clip(gaps, -500, 500)))


def calibration(gaps: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Return how well sigmoid(gap) is calibrated: expected calibration error, Brier score, log-loss
    and the reliability table.

    A pair has no natural order, so the model's confidence is max(p, 1 - p), in [0.5, 1], and it is
    right where the human choice agrees (half at a tie). ECE = sum over equal-width bins of share *
    |accuracy - confidence| (Naeini et al. 2015; Guo et al. 2017, eq. 3); Brier = mean (1 - p)^2,
    log-loss = mean -log p, p the probability given to the choice made.

    ECE adds up what is off by chance in every bin, so that a calibrated model has one above 0 too.
    `ece_expected` is the mean ECE of a calibrated model with these confidences: the number right of
    a bin's pairs is then binomial with the bin's mean confidence. Pairs count as independent; a tie
    is right by half for certain and adds nothing.
    """
    p = probability(gaps)
    confidence, right = np.maximum(p, 1 - p), pair_accuracy(gaps)
    # confidence begins at one half: see the docstring
    edges = np.linspace(0.5, 1.0, bins + 1)
    bin_of = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)

    # sums over pairs: how far accuracy lies from confidence, and how far it would by chance
    table, distance, by_chance = [], 0.0, 0.0
    for number in np.unique(bin_of):
        rows = bin_of == number
        pairs = int(rows.sum())
        mean_confidence, accuracy = float(confidence[rows].mean()), float(right[rows].mean())
        distance += pairs * abs(accuracy - mean_confidence)
        # a tie is right by half for certain, so chance adds nothing
        decided = confidence[rows & (gaps != 0)]
        if len(decided):
            by_chance += binomial_deviation(len(decided), float(decided.mean()))
        table.append(
            {
                "from": round(float(edges[number]), 6),
                "to": round(float(edges[number + 1]), 6),
                "pairs": pairs,
                "confidence": mean_confidence,
                "accuracy": accuracy,
            }
        )
    return {
        "ece": distance / len(gaps),
        "ece_expected": by_chance / len(gaps),
        "brier": float(((1 - p) ** 2).mean()),
        "log_loss": log_loss(gaps),
        "bins": table,
    }


def log_loss(gaps: np.ndarray) -> float:
    """Return mean -log sigmoid(gap): log 2 = 0.693 for a model that always says one half."""
    return float(np.logaddexp(0, -gaps).mean())


def binomial_deviation(n: int, p: float) -> float:
    """Return E|X - n p| of a binomial X: 2 (1 - p) v P(X = v) with v = floor(n p) + 1 (de Moivre
    1730).
    """
    if p <= 0 or p >= 1:
        return 0.0
    v = math.floor(n * p) + 1
    # by logarithms: powers and binomial coefficients leave the range of floats
    ways = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
    return 2 * (1 - p) * v * math.exp(ways + v * math.log(p) + (n - v) * math.log1p(-p))


def fit_sharpness(gaps: np.ndarray) -> float:
    """Return the s = 1 / temperature >= 0 under which sigmoid(s gap) is most likely (Guo et al.
    2017, sec. 4.2).

        maximise mean[ t log sigmoid(s g) + (1 - t) log sigmoid(-s g) ],   t = (n + 1) / (n + 2)

    t is Platt's target (1999): with t = 1 there is no maximum where every pair is right. 0 (an
    infinite temperature, one half for every pair) where the model is no better than chance.
    """
    from scipy.optimize import brentq

    # a little below 1, so that the likelihood has a maximum
    target = (len(gaps) + 1) / (len(gaps) + 2)

    def slope(s: float) -> float:
        return float(np.mean(gaps * (target - probability(s * gaps))))

    # the slope falls in s
    if slope(0.0) <= 0:
        return 0.0
    # a bracket for the root
    high = 1 / float(np.abs(gaps).mean())
    while slope(high) > 0:
        high *= 2
    return float(brentq(slope, 0.0, high, xtol=1e-12, rtol=1e-12))


def as_temperature(sharpness: float) -> float | None:
    """Return 1 / s; None (infinite, which JSON cannot say) for 0."""
    return 1 / sharpness if sharpness else None


def cross_fitted(gaps: np.ndarray, groups: np.ndarray, folds: int = FOLDS) -> np.ndarray | None:
    """Return (n,) gaps over a temperature that was fitted without the pair's own fold.

    Groups are dealt to folds by a hash of their names, so that paraphrases stay together and a
    repeated call gives the same. None with fewer than two groups.
    """
    # by hash: the order of names may tell the kind
    names = sorted(set(map(str, groups)), key=lambda name: digest(f"fold {name}"))
    if len(names) < 2:
        return None
    # dealt out in turn
    fold_of = dict(zip(names, itertools.cycle(range(folds)), strict=False))
    own = np.array([fold_of[str(group)] for group in groups])
    scaled = np.empty(len(gaps))
    for fold in np.unique(own):
        rows = own == fold
        scaled[rows] = gaps[rows] * fit_sharpness(gaps[~rows])
    return scaled


def with_temperature(
    gaps: np.ndarray, groups: np.ndarray, kept: float | None = None
) -> dict[str, Any]:
    """Return `calibration` of the gaps as they are and, under "after", with a temperature.

    kept: a temperature that was fitted on other pairs (inf: one half for every pair), which is then
    applied. Without one it is
    fitted on these: "temperature" on all of them, and "after" with that of the other folds
    (`cross_fitted`), so that no pair is judged by a temperature that has seen it.
    """
    found = calibration(gaps)
    if kept is not None:
        return found | {
            "temperature": kept if math.isfinite(kept) else None,
            "temperature_from": "other pairs",
            "after": calibration(gaps / kept),
        }
    # no pair is judged by a temperature that has seen it
    scaled = cross_fitted(gaps, groups)
    return found | {
        "temperature": as_temperature(fit_sharpness(gaps)),
        "temperature_from": "these pairs",
        "after": None if scaled is None else calibration(scaled),
    }
