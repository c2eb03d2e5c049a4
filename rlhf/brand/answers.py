"""What two policies' answers to the same prompts say for the gates: score, facts, refusals, words,
copies of training answers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.brand.gates import Measured, difference_of_shares, mean_of_groups, ratio_of_groups
from rlhf.compare.text_metrics import word_ngrams
from rlhf.data.records import Samples, Scorer

# words of a run that counts as copied: shorter ones recur in any two texts of one voice
COPIED_WORDS = 8
# openings and phrases by which a model declines; English
REFUSALS = (
    r"\bi(?:'m| am) (?:sorry,? (?:but )?i |unable to|not able to)",
    r"\b(?:i|we) (?:can't|cannot|can not|won't|will not) "
    r"(?:help|assist|answer|provide|do that|discuss|comply)",
    r"\bas an? (?:ai|artificial|language model)\b",
    r"\bi (?:do not|don't) have (?:access|information|the ability)",
)


@dataclass(frozen=True)
class Scored:
    """One answer with its score, and whether all facts are right (None where the prompt has none)."""

    group: str
    prompt: int
    text: str
    score: float
    facts: bool | None
    messages: list[dict[str, Any]]

    @property
    def words(self) -> int:
        """Words between white space."""
        return len(self.text.split())


def scored_answers(answers: Sequence[Mapping[str, Any]], scorer: Scorer) -> dict[str, list[Scored]]:
    """Return model -> its answers, scored; models in the order in which they come.

    answers: rows as `StoreView.answers` returns them.
    """
    samples = samples_of(answers)
    # all at once: a judge of the tone is asked in parallel
    scores = scorer(samples)
    # of facts alone it matters whether they are right; how nearly is in the score
    facts = [own for name, own in scores.breakdown.items() if "/task/" in name]
    found: dict[str, list[Scored]] = {}
    for place, answer in enumerate(answers):
        scored = Scored(
            group=answer["metadata"]["group"],
            prompt=answer["prompt"],
            text=answer["text"],
            score=scores.total[place],
            facts=all_right([own[place] for own in facts]),
            messages=answer["messages"],
        )
        found.setdefault(answer["model"], []).append(scored)
    return found


def all_right(facts: Sequence[float]) -> bool | None:
    """Return whether an answer has all facts right (1 each); None where its prompt has none (nan)."""
    asked = [fact for fact in facts if not math.isnan(fact)]
    if not asked:
        return None
    return all(fact == 1 for fact in asked)


def samples_of(answers: Sequence[Mapping[str, Any]]) -> Samples:
    """Return answers of a store as a scorer that reads texts receives them; they have no ids."""
    samples = Samples()
    for answer in answers:
        # None: not known, which counts as ended
        ended = answer["ended"] != 0
        samples.add(answer["messages"], answer["text"], answer["metadata"], ended=ended)
    return samples


def measure_answers(
    base: Sequence[Scored], run: Sequence[Scored], phrases: Iterable[str] = ()
) -> dict[str, Measured]:
    """Return what answers to the same prompts measure: score_gain, facts, refusals, length.

    phrases: regular expressions of refusals beside REFUSALS.
    """
    score = by_group(base, run, lambda answer: answer.score)
    facts = by_group(base, run, lambda answer: answer.facts)
    words = by_group(base, run, lambda answer: answer.words)
    pattern = refusal_pattern(phrases)
    refused = by_group(base, run, lambda answer: bool(pattern.search(answer.text)))
    no_facts = Measured(why="the voice names no facts that these prompts have")
    words_of_base = [own for own, _ in words.values()]
    words_of_run = [own for _, own in words.values()]
    return {
        # the same prompts were put to both, so differences are taken within a group
        "score_gain": difference(score),
        "facts": difference(facts) if facts else no_facts,
        "refusals": difference_of_shares(refused),
        # a ratio of sums: one terse answer of the base would rule a mean of ratios
        "length": ratio_of_groups(words_of_run, words_of_base),
    }


def by_group(base: Sequence[Scored], run: Sequence[Scored], value) -> dict[str, tuple]:
    """Return group -> (mean of the base's values, mean of the run's), of groups that both have.

    value: of an answer; None leaves it out.
    """
    sums: list[dict[str, list[float]]] = [{}, {}]
    for own, answers in zip(sums, (base, run), strict=True):
        for answer in answers:
            found = value(answer)
            # a prompt without facts says nothing about them
            if found is not None:
                own.setdefault(answer.group, []).append(float(found))
    of_base, of_run = sums
    means = {}
    for group, values in of_run.items():
        if group in of_base:
            before = sum(of_base[group]) / len(of_base[group])
            means[group] = before, sum(values) / len(values)
    return means


def difference(means: Mapping[str, tuple[float, float]]) -> Measured:
    """Return the mean over groups of (run - base)."""
    return mean_of_groups([(group, run - base) for group, (base, run) in means.items()])


def refusal_pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of a refusal."""
    # each in a group of its own: a phrase may hold a |
    alternatives = map("(?:{})".format, (*REFUSALS, *phrases))
    return re.compile("|".join(alternatives), re.IGNORECASE)


def memorised(run: Sequence[Scored], trained: Sequence[str], held_out: Sequence[str]) -> Measured:
    """Return by how much answers repeat training answers more than answers that were held out.

    An answer's overlap with a set is the largest share of its runs of COPIED_WORDS words that stand
    in one answer of the set. What is in the brand's style repeats both sets; what was memorised
    repeats the trained one more. A larger set has larger overlaps, so of the trained answers the
    expectation over random subsets of the other's size counts.
    """
    if not trained or not held_out:
        return Measured(why="no pairs were held out from training to compare with")
    indexes = list(map(ngram_index, (trained, held_out)))
    size = min(len(trained), len(held_out))
    values = []
    for answer in run:
        grams = set(word_ngrams(answer.text.lower(), COPIED_WORDS))
        # too short to copy anything that counts
        if not grams:
            continue
        overlaps = []
        for texts, index in zip((trained, held_out), indexes, strict=True):
            # per training answer: runs from many different ones are style, not a copy
            counts: Counter[int] = Counter()
            for gram in grams:
                counts.update(index.get(gram, ()))
            shares = [count / len(grams) for count in counts.values()]
            overlaps.append(expected_largest(shares, len(texts), size))
        values.append((answer.group, overlaps[0] - overlaps[1]))
    if not values:
        return Measured(why=f"no answer has {COPIED_WORDS} words")
    return mean_of_groups(values)


def ngram_index(texts: Sequence[str]) -> dict[tuple[str, ...], set[int]]:
    """Return the places of the texts in which each run of words stands."""
    index: dict[tuple[str, ...], set[int]] = {}
    for place, text in enumerate(texts):
        for gram in word_ngrams(text.lower(), COPIED_WORDS):
            index.setdefault(gram, set()).add(place)
    return index


def expected_largest(values: Sequence[float], count: int, size: int) -> float:
    """Return the expected largest of `size` draws without replacement from `count` values, those not
    listed being 0.

        E = sum_j v_(j) C(count - j, size - 1) / C(count, size)    over the values, largest first

    v_(j) is the largest drawn where it is drawn and the j - 1 larger ones are not.
    """
    total, chance = 0.0, size / count
    for place, value in enumerate(sorted(values, reverse=True), 1):
        total += value * chance
        # C(n - j - 1, k - 1) / C(n - j, k - 1)
        left = count - place
        if left < size:
            break
        chance *= (left - size + 1) / left
    return total
