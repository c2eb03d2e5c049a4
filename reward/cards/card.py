"""The report card of a reward model on held-out pairs: accuracy with intervals, calibration,
biases.

Pairs of one group are not independent (paraphrases share their answers), so intervals are over
groups, and the `n` of an interval is the number of groups. Scores are raw: P(chosen is better) =
sigmoid(score gap).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.records import Preference
from rlhf.stats import jackknife_interval

# a correlation by which length explains half of the variance
LENGTH_DETECTOR = math.sqrt(0.5)
# sources or annotators listed, the largest first
MAX_SLICES = 20


def report_card(
    pairs: Sequence[Preference],
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    title: str = "held-out pairs",
) -> dict[str, Any]:
    """Return everything the card says, as plain numbers (None where a number is not defined).

    All arguments have one entry per pair; lengths are in tokens including EOS.
    Raises ValueError if there are no pairs, the counts differ, or a score is not finite.
    """
    chosen, rejected = np.asarray(chosen_scores, float), np.asarray(rejected_scores, float)
    long_c, long_r = np.asarray(chosen_lengths, float), np.asarray(rejected_lengths, float)
    counts = set(map(len, (chosen, rejected, long_c, long_r)))
    if not pairs or counts != {len(pairs)}:
        raise ValueError(
            f"{len(pairs)} pairs, {len(chosen)} and {len(rejected)} scores: one of each per pair expected"
        )
    if not np.isfinite([chosen, rejected]).all():
        raise ValueError("a score is not finite")

    gaps = chosen - rejected
    right = pair_accuracy(gaps)
    groups = np.array([pair.group for pair in pairs])

    def accuracy_of(rows: np.ndarray) -> dict[str, Any]:
        return accuracy_with_interval(right[rows], groups[rows])

    def accuracy_by(field: str) -> dict[str, Any]:
        # as text: sorting would fail on names and None together
        values = np.array([str(getattr(pair, field)) for pair in pairs])
        names, counts = np.unique(values[values != "None"], return_counts=True)
        largest = names[np.argsort(-counts, kind="stable")][:MAX_SLICES]
        return {str(name): accuracy_of(values == name) for name in largest}

    return {
        "title": title,
        "pairs": len(pairs),
        "groups": len(set(groups)),
        "accuracy": accuracy_with_interval(right, groups),
        "ties": int((gaps == 0).sum()),
        "calibration": calibration(gaps),
        "length": length_bias(gaps, chosen, rejected, long_c, long_r, accuracy_of),
        "by_source": accuracy_by("source"),
        "by_annotator": accuracy_by("annotator"),
        "scores": {
            "chosen": distribution(chosen),
            "rejected": distribution(rejected),
            "gap": distribution(gaps),
        },
        "mistakes": worst_mistakes(pairs, gaps),
    }


def pair_accuracy(gaps: np.ndarray) -> np.ndarray:
    """Return (n,) 1 where the chosen response scores higher, 0 where lower, one half at a tie."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def accuracy_with_interval(right: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Return the mean of `right` over pairs, with its 95 % interval over groups
    (`jackknife_interval`, within 0 and 1).

    With one group, or none, there is no interval (None).
    """
    if not len(right):
        return {"accuracy": None, "low": None, "high": None, "n": 0, "pairs": 0}
    # each group counts by its pairs, but is left out as a whole
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, right), np.bincount(index)
    n, mean = len(counts), float(np.mean(right))

    low = high = None
    if n > 1:
        # the accuracy without each group
        without = (sums.sum() - sums) / (counts.sum() - counts)
        low, high, _ = jackknife_interval(mean, without, bounds=(0.0, 1.0))
    return {"accuracy": mean, "low": low, "high": high, "n": n, "pairs": len(right)}


def calibration(gaps: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Return how well sigmoid(gap) is calibrated: expected calibration error, Brier score and the
    reliability table.

    A pair has no natural order, so the model's confidence is max(p, 1 - p), in [0.5, 1], and it is
    right where the human choice agrees (half at a tie). ECE = sum over equal-width bins of share *
    |accuracy - confidence| (Naeini et al. 2015; Guo et al. 2017, eq. 3); Brier = mean (1 - p)^2, p
    the probability given to the choice made.

    ECE adds up what is off by chance in every bin, so that a calibrated model has one above 0 too.
    `ece_expected` is the mean ECE of a calibrated model with these confidences: the number right of
    a bin's pairs is then binomial with the bin's mean confidence. Pairs count as independent; a tie
    is right by half for certain and adds nothing.
    """
    p = 1 / (1 + np.exp(-np.clip(gaps, -500, 500)))
    confidence, right = np.maximum(p, 1 - p), pair_accuracy(gaps)
    # confidence begins at one half: see the docstring
    edges = np.linspace(0.5, 1.0, bins + 1)
    bin_of = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)

    table, by_chance = [], 0.0
    for b in np.unique(bin_of):
        rows = bin_of == b
        # a tie is right by half for certain, so chance adds nothing
        decided = confidence[rows & (gaps != 0)]
        if len(decided):
            by_chance += binomial_deviation(len(decided), float(decided.mean()))
        row = {
            "from": round(float(edges[b]), 6),
            "to": round(float(edges[b + 1]), 6),
            "pairs": int(rows.sum()),
            "confidence": float(confidence[rows].mean()),
            "accuracy": float(right[rows].mean()),
        }
        table.append(row)

    ece = sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(gaps)
    brier = float(((1 - p) ** 2).mean())
    return {"ece": float(ece), "ece_expected": by_chance / len(gaps), "brier": brier, "bins": table}


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


def length_bias(gaps, chosen, rejected, long_c, long_r, accuracy_of) -> dict[str, Any]:
    """Return how much of the score is length.

    Accuracy where the chosen response is the longer, the shorter, or as long; Pearson correlations
    of score with length over all responses and of the score gap with the length gap over pairs; and
    the accuracy of the rule "the longer is better" (or "the shorter", whichever wins on these very
    pairs), which a model must beat.
    """
    gap = long_c - long_r
    longer_wins = float(pair_accuracy(gap).mean())
    return {
        "chosen_longer": accuracy_of(gap > 0),
        "chosen_shorter": accuracy_of(gap < 0),
        "same_length": accuracy_of(gap == 0),
        "correlation": correlation(
            np.concatenate([chosen, rejected]), np.concatenate([long_c, long_r])
        ),
        "gap_correlation": correlation(gaps, gap),
        "baseline": {
            "accuracy": max(longer_wins, 1 - longer_wins),
            "rule": "longer" if longer_wins >= 0.5 else "shorter",
        },
        "mean_chosen": float(long_c.mean()),
        "mean_rejected": float(long_r.mean()),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return Pearson's r, or None where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def distribution(values: np.ndarray) -> dict[str, float]:
    """Return mean, standard deviation (n in the denominator) and quantiles."""
    names = ("mean", "std", "min", "p5", "median", "p95", "max")
    numbers = (values.mean(), values.std(), *np.percentile(values, [0, 5, 50, 95, 100]))
    return dict(zip(names, map(float, numbers), strict=True))


def worst_mistakes(
    pairs: Sequence[Preference], gaps: np.ndarray, count: int = 5
) -> list[dict[str, Any]]:
    """Return the pairs that the model was most sure of and wrong about: bad labels or blind spots."""
    mistakes = []
    # the most negative gaps are the surest mistakes
    for i in np.argsort(gaps, kind="stable")[:count]:
        if gaps[i] < 0:
            pair, gap = pairs[int(i)], float(gaps[i])
            prompt = pair.prompt[-1]["content"]
            mistakes.append(
                {"gap": gap, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            )
    return mistakes


def doubts(card: dict[str, Any]) -> list[str]:
    """Return what a card says against learning from its reward model, one sentence each.

    At chance: the interval of the accuracy holds one half or lies below it. A length detector:
    length explains half or more of the variance of scores, or of score gaps (r^2 >= 1/2).
    """
    found, accuracy, length = [], card["accuracy"], card["length"]
    if accuracy["low"] is None:
        found.append(f"{accuracy['n']} group of held-out pairs: too few to know its accuracy")
    elif accuracy["low"] <= 0.5:
        finding = (
            "cannot be told from guessing" if accuracy["high"] >= 0.5 else "is worse than guessing"
        )
        found.append(
            f"its accuracy on held-out pairs is {accuracy['accuracy']:.3f} ({accuracy['low']:.3f} to "
            f"{accuracy['high']:.3f}), which {finding}: what is learnt from it is noise. Inspect the pairs and train "
            "it again"
        )

    # one reason is enough: the stronger of the two is named
    correlations = {
        "scores": length["correlation"] or 0.0,
        "score gaps": length["gap_correlation"] or 0.0,
    }
    name = max(correlations, key=lambda key: abs(correlations[key]))
    if abs(correlations[name]) >= LENGTH_DETECTOR:
        rule = length["baseline"]
        found.append(
            f"its {name} go with length (correlation {correlations[name]:+.2f}; 'the {rule['rule']} is better' alone "
            f"is right in {rule['accuracy']:.2f} of the pairs): the policy learns length. Balance the pairs, or set "
            "length_penalty"
        )
    return found


def doubts_of(folder: str | Path) -> list[str]:
    """Return `doubts` of the card in a reward model's folder; a folder without a card is one. Empty
    for a Hub name.
    """
    path = Path(folder) / "card.json"
    # a model on the Hub comes without our card
    if not Path(folder).is_dir():
        return []
    if not path.is_file():
        return [
            "no report card (card.json) there, so nothing is known of its accuracy on held-out pairs"
        ]
    try:
        return doubts(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"card.json cannot be read as a report card ({error!r})"]
