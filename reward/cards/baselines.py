"""Rules that a reward model must beat: the longer answer, the one shown first, a bag of words.

A model that does not beat them has learnt nothing from its pairs that could not be had without it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from reward.cards.accuracy import accuracy_with_interval, mean_with_interval, pair_accuracy
from reward.cards.bias import chosen_first
from rlhf.data.records import Preference

# words, and single marks: where a voice shows in its exclamation marks, words alone do not tell
TOKEN = re.compile(r"\w+|[^\w\s]")
# weight of |w|^2 / 2 beside the summed log-loss, that of common libraries
RIDGE = 1.0
# logits closer than this are the optimizer's rounding
ROUNDING = 1e-6


def baselines(
    pairs: Sequence[Preference],
    gaps: np.ndarray,
    length_gaps: np.ndarray,
    training: Sequence[Preference] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {name: {"rule", "accuracy", "difference"}} of each baseline that these pairs allow.

    accuracy: as in `accuracy_with_interval`; difference: the model's accuracy less the baseline's
    on the same pairs, with its interval over groups. Which way round a rule works ("the longer" or
    "the shorter") is decided on the training pairs, or on these very pairs without them, which
    favours the rule. The bag of words needs training pairs.
    """
    # 0 where nobody knows what was shown first
    first = np.array(list(map(chosen_first, pairs)))
    # which way round a rule works is learnt where the model learnt
    learnt = training or pairs
    learnt_first = np.array(list(map(chosen_first, learnt)))
    learnt_longer = _words_more(training) if training else length_gaps
    votes = {}
    longer = 1 if pair_accuracy(learnt_longer).mean() >= 0.5 else -1
    votes["length"] = ("the longer" if longer > 0 else "the shorter", longer * length_gaps)
    if np.any(first):
        sign = 1 if pair_accuracy(learnt_first).mean() >= 0.5 else -1
        votes["position"] = ("the first" if sign > 0 else "the second", sign * first)
    if training:
        rule = f"a bag of words, trained on the {len(training)} training pairs"
        votes["bag_of_words"] = (rule, bag_of_words(training, pairs))

    groups = np.array([pair.group for pair in pairs])
    found = {}
    for name, (rule, logits) in votes.items():
        right = pair_accuracy(logits)
        # where nobody knows the position, both are left out
        rows = first != 0 if name == "position" else np.ones(len(pairs), bool)
        better = (pair_accuracy(gaps) - right)[rows]
        found[name] = {
            "rule": rule,
            "accuracy": accuracy_with_interval(right[rows], groups[rows]),
            "difference": mean_with_interval(better, groups[rows], bounds=(-1.0, 1.0)),
        }
    return found


def _words_more(pairs: Sequence[Preference]) -> np.ndarray:
    return np.array([len(pair.chosen.split()) - len(pair.rejected.split()) for pair in pairs])


def bag_of_words(training: Sequence[Preference], pairs: Sequence[Preference]) -> np.ndarray:
    """Return (n,) logits that the chosen answer is the better one, by its words alone.

    Logistic regression on counts(chosen) - counts(rejected) of words and marks, in any case, with
    an L2 penalty and no intercept. Words that the training pairs lack count nothing; a pair without
    a known difference gets 0, a tie.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    places: dict[str, int] = {}
    for pair in training:
        for word in _counts(pair):
            places.setdefault(word, len(places))
    # most words are in few pairs
    seen = _matrix(training, places)

    # with its gradient, which the optimizer needs
    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = seen @ weights
        value = np.logaddexp(0, -logits).sum() + RIDGE / 2 * weights @ weights
        return value, RIDGE * weights - seen.T @ expit(-logits)

    # convex: it has one minimum, wherever it starts
    weights = minimize(loss, np.zeros(len(places)), jac=True, method="L-BFGS-B").x
    logits = _matrix(pairs, places) @ weights
    return np.where(np.abs(logits) > ROUNDING, logits, 0.0)


def _counts(pair: Preference) -> Counter:
    counts = Counter(TOKEN.findall(pair.chosen.casefold()))
    counts.subtract(TOKEN.findall(pair.rejected.casefold()))
    return counts


def _matrix(pairs: Sequence[Preference], places: dict[str, int]) -> Any:
    from scipy.sparse import csr_array

    rows, columns, values = [], [], []
    for i, pair in enumerate(pairs):
        for word, count in _counts(pair).items():
            if word in places:
                rows.append(i)
                columns.append(places[word])
                values.append(float(count))
    return csr_array((values, (rows, columns)), shape=(len(pairs), len(places)))
