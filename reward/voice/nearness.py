"""How near a text comes to a phrase that it should have had: the partial credit of a brand voice.

Words are compared by the edits between their letters, and a phrase with every stretch of the text by
the edits between their words (P. H. Sellers 1980, "The theory and computation of evolutionary
distances: pattern recognition").
"""

import functools
from collections.abc import Iterable, Sequence

from reward.voice.phrases import Span, Text, is_regex, words_of

# words that differ more than this are different words: "hallo" is like "hello" (0.8), "help" is not (0.6)
ALIKE = 2 / 3

# words of a text that are compared with a phrase, so that a long text costs no more than a short one
LOOKED_AT = 200

# longer runs of letters are no words
LONGEST_WORD = 40


def word_likeness(one: str, other: str) -> float:
    """Return 1 - edits / letters of the longer word, in [0, 1]; 0 where that is below ALIKE."""
    if one == other:
        return 1.0
    short, long = sorted((len(one), len(other)))
    # at least this many letters have to be added
    if long > LONGEST_WORD or short < ALIKE * long:
        return 0.0
    likeness = 1 - _letter_edits(one, other) / long
    return likeness if likeness >= ALIKE else 0.0


@functools.lru_cache(maxsize=100_000)
def _letter_edits(one: str, other: str) -> int:
    """Return Levenshtein's distance: letters added, removed or replaced."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            replaced = diagonal + (letter != wanted)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def phrase_likeness(phrase: Sequence[str], words: Sequence[str]) -> list[float]:
    """Return how like the phrase the most similar stretch of `words` is that ends before each place.

        likeness[j] = 1 - min over starts i of edits(phrase, words[i:j]) / len(phrase)

    at least 0, for j = 0 .. len(words). A missing or an additional word is one edit, and a replaced
    word 1 - `word_likeness` of the two. `phrase` has at least one word.
    """
    distinct = set(words)
    known = []
    for wanted in phrase:
        known.append({word: word_likeness(wanted, word) for word in distinct})
    # a phrase of which no word is there has no near stretch
    if not any(any(like.values()) for like in known):
        return [0.0] * (len(words) + 1)
    # a stretch may begin anywhere
    row = [0.0] * (len(words) + 1)
    for missing, like in enumerate(known, 1):
        diagonal, row[0] = row[0], float(missing)
        for j, word in enumerate(words, 1):
            replaced = diagonal + 1 - like[word]
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return [max(0.0, 1 - edits / len(phrase)) for edits in row]


def likeness(phrase: str, text: Text) -> float:
    """Return how like the phrase the most similar stretch among the text's first words is, in [0, 1]."""
    wanted = () if is_regex(phrase) else words_of(phrase)
    return max(phrase_likeness(wanted, text.words[:LOOKED_AT])) if wanted else 0.0


def is_like_any(word: str, wanted: Iterable[str]) -> bool:
    """Return whether a word is like one of the wanted words."""
    return any(word_likeness(own, word) for own in wanted)


def near_words(phrases: Iterable[str], text: Text) -> list[Span]:
    """Return where the text has a word that is like one of the phrases' words."""
    wanted: set[str] = set()
    for phrase in phrases:
        wanted.update(() if is_regex(phrase) else words_of(phrase))
    read = zip(text.words[:LOOKED_AT], text.word_spans[:LOOKED_AT], strict=True)
    return [span for word, span in read if is_like_any(word, wanted)]
