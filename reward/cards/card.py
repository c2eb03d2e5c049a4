"""The report card of a reward model on held-out pairs: can it be trusted before RL starts?

Pairs of one group are not independent (paraphrases share their answers), so intervals are over
groups, and the `n` of an interval is the number of groups. Scores are raw: P(chosen is better) =
sigmoid(score gap / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reward.cards.accuracy import accuracy_with_interval, pair_accuracy, slices
from reward.cards.baselines import baselines
from reward.cards.bias import bias_tests, chosen_first, length_bias
from reward.cards.calibration import with_temperature
from reward.cards.ceiling import ceiling
from reward.cards.pairs import ScoredPairs
from rlhf.data.records import Preference


def report_card(
    scored: ScoredPairs,
    *,
    title: str = "held-out pairs",
    training: Sequence[Preference] | None = None,
    gold_gaps: np.ndarray | None = None,
    category: str = "category",
    temperature: float | None = None,
) -> dict[str, Any]:
    """Return what the card says of these pairs, as plain numbers (None where a number is not
    defined).

    training: the pairs that the model was trained on, from which the baselines learn.
    gold_gaps: (n,) true score of the chosen answer less that of the rejected one, by which bias is
    judged.
    category: the metadata field that accuracy is listed by.
    temperature: one that was fitted on other pairs; without it one is fitted on these.
    """
    gaps, length_gaps, groups = scored.gaps, scored.length_gaps, scored.groups
    right = pair_accuracy(gaps)
    first = np.array(list(map(chosen_first, scored.pairs)))
    scores = np.concatenate([scored.chosen, scored.rejected])
    lengths = np.concatenate([scored.chosen_lengths, scored.rejected_lengths])
    return {
        "title": title,
        "pairs": len(scored.pairs),
        "groups": len(set(groups)),
        "accuracy": accuracy_with_interval(right, groups),
        "ties": int((gaps == 0).sum()),
        "baselines": baselines(scored.pairs, gaps, length_gaps, training),
        "ceiling": ceiling(scored.pairs, gaps),
        "calibration": with_temperature(gaps, groups, temperature),
        "length": length_bias(gaps, scores, lengths, length_gaps, groups),
        "bias": bias_tests(gaps, length_gaps, first, groups, gold_gaps),
        **slices(scored.pairs, right, groups, length_gaps, category),
        "scores": {
            "chosen": distribution(scored.chosen),
            "rejected": distribution(scored.rejected),
            "gap": distribution(gaps),
        },
        "mistakes": worst_mistakes(scored.pairs, gaps),
    }


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
