"""The report card of a reward model on held-out pairs: can it be trusted before RL starts?

Pairs of one group are not independent (paraphrases share their answers), so intervals are over
groups, and the `n` of an interval is the number of groups. Scores are raw: P(chosen is better) =
sigmoid(score gap / temperature).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reward.cards.accuracy import accuracy_with_interval, mean_with_interval, pair_accuracy, slices
from reward.cards.baselines import baselines
from reward.cards.bias import bias_tests, chosen_first, length_bias
from reward.cards.calibration import with_temperature
from reward.cards.pairs import ScoredPairs
from rlhf.data.records import Preference, normalise, prompt_group
from rlhf.data.split import answer_pair


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
        "mistakes": list(worst_mistakes(scored.pairs, gaps)),
    }


def distribution(values: np.ndarray) -> dict[str, float]:
    """Return mean, standard deviation (n in the denominator) and quantiles."""
    names = ("mean", "std", "min", "p5", "median", "p95", "max")
    numbers = (values.mean(), values.std(), *np.percentile(values, [0, 5, 50, 95, 100]))
    return dict(zip(names, map(float, numbers), strict=True))


def worst_mistakes(
    pairs: Sequence[Preference], gaps: np.ndarray, count: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield the pairs that the model was most sure of and wrong about: bad labels or blind spots."""
    # the most negative gaps are the surest mistakes
    for i in np.argsort(gaps, kind="stable")[:count]:
        if gaps[i] < 0:
            pair, gap = pairs[int(i)], float(gaps[i])
            prompt = pair.prompt[-1]["content"]
            yield {"gap": gap, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def ceiling(pairs: Sequence[Preference], gaps: np.ndarray) -> dict[str, Any] | None:
    """Return how often two people choose the same answer, and how often the model chooses it: no
    model can foresee a choice better than people agree about it.

    Of the pairs that several people judged, each counting once, with intervals over groups:
      agreement   P(two of its votes are for the same answer) = sum_k n_k (n_k - 1) / (n (n - 1))
      model       share of its votes that are for the answer with the higher score
      difference  model - agreement: a model as good as one person has 0
    Votes are several records of one pair, or the counts that the data gives (`votes`). Ties are no
    votes. None where no pair has two.

    A record of counts has a winner, since one that is split evenly makes no pair. Those of an even
    number of votes are therefore left out: two votes of one record always agree.
    """
    # a pair may come as many records, or as one with counts
    votes = votes_of(pairs, gaps)
    judged = {}
    for key, count in votes.items():
        number = sum(count["votes"])
        if number > 1 and (number % 2 or not count["counted"]):
            judged[key] = count
    if not judged:
        return None
    agreement, model, groups = [], [], []
    for count in judged.values():
        one, other = count["votes"]
        n = one + other
        # two of the votes drawn without replacement
        agreement.append((one * (one - 1) + other * (other - 1)) / (n * (n - 1)))
        model.append((count["right"] * one + (1 - count["right"]) * other) / n)
        groups.append(count["group"])
    agreed, foreseen = np.array(agreement), np.array(model)
    return {
        "agreement": accuracy_with_interval(agreed, groups),
        "model": accuracy_with_interval(foreseen, groups),
        "difference": mean_with_interval(foreseen - agreed, groups, bounds=(-1.0, 1.0)),
    }


def votes_of(pairs: Sequence[Preference], gaps: np.ndarray) -> dict[tuple, dict[str, Any]]:
    """Return {pair of answers: {"votes": [for one, for the other], "right", "group", "counted"}}.

    right: 1 where the model scores the first of the two higher, one half at a tie. counted: whether
    a record holds counts.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for pair, right in zip(pairs, pair_accuracy(gaps), strict=True):
        key = (prompt_group(pair.prompt), answer_pair(pair.chosen, pair.rejected))
        entry = found.setdefault(
            key,
            {"votes": [0, 0], "right": right, "group": pair.group, "one": normalise(pair.chosen)},
        )
        # a record without counts is one vote for its chosen answer
        counts = counted_votes(pair)
        entry["counted"] = entry.get("counted", False) or counts is not None
        more, fewer = counts or (1, 0)
        is_first = normalise(pair.chosen) == entry["one"]
        entry["votes"][0 if is_first else 1] += more
        entry["votes"][1 if is_first else 0] += fewer
    return found


def counted_votes(pair: Preference) -> tuple[int, int] | None:
    """Return the votes for the chosen answer and for the other that a record of all of them holds.

    A store writes {"votes": {"a": 2, "b": 1}} under "vote", other data a list of each person's
    choice, 1 or 2, under `votes`; the chosen answer is the one with more of them.
    """
    vote = pair.metadata.get("vote")
    counts = vote.get("votes") if isinstance(vote, dict) else None
    sides = ("a", "b")
    if counts is None and isinstance(pair.metadata.get("votes"), list):
        counts, sides = Counter(map(str, pair.metadata["votes"])), ("1", "2")
    if not isinstance(counts, dict):
        return None
    one, other = int(counts.get(sides[0], 0)), int(counts.get(sides[1], 0))
    return max(one, other), min(one, other)
