"""Find phrases in a text: whole words in any case, regularly inflected, or a regular expression
between slashes.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?:;]+(?=\s|$)|\n+")
Span = tuple[int, int]

# patterns that are kept: forms and facts may name the customers of a whole data set
PATTERNS = 10_000


class Text:
    """A cleaned text, its words in lower case, and its runs of word characters for a fast search."""

    def __init__(self, text: str):
        self.text = clean(text)
        self.words = WORD.findall(self.text.lower())
        self.pieces = set(re.findall(r"\w+", self.text.lower()))

    def find(self, phrase: str, inflect: bool) -> list[Span]:
        """Return where the phrase occurs, as (start, end) in `text`."""
        # 30 times faster than asking the pattern
        starts = first_pieces(phrase, inflect)
        if starts and self.pieces.isdisjoint(starts):
            return []
        return [match.span() for match in phrase_pattern(phrase, inflect).finditer(self.text)]

    def find_any(self, phrases: Iterable[str], inflect: bool) -> list[Span]:
        """Return where any of the phrases occurs."""
        spans = []
        for phrase in phrases:
            spans += self.find(phrase, inflect)
        return spans


def longest_sentence(text: str) -> int:
    """Return the number of words of the longest sentence in a cleaned text."""
    return max(len(WORD.findall(sentence)) for sentence in SENTENCE_END.split(text))


def clean(text: str) -> str:
    """Return the text in NFKC with straight apostrophes and single blanks; line ends stay."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    return re.sub(r"[^\S\n]+", " ", text).strip()


def is_regex(phrase: str) -> bool:
    """Return whether the phrase is a regular expression between slashes."""
    return len(phrase) > 2 and phrase.startswith("/") and phrase.endswith("/")


def distinct(phrases: Iterable[str]) -> set[str]:
    """Return the phrases that differ in more than case and white space, in lower case."""
    return {clean(phrase).lower() for phrase in phrases}


def check_phrases(phrases: list[str]) -> list[str]:
    """Return the phrases. Raises ValueError for one that is empty, broken, or would match
    everywhere.
    """
    for phrase in phrases:
        if not phrase.strip():
            raise ValueError("has an empty phrase, which would match everywhere")
        if not is_regex(phrase):
            continue
        try:
            pattern = re.compile(phrase[1:-1])
        except re.error as error:
            raise ValueError(f"{phrase} is not a regular expression: {error}") from None
        if pattern.match(""):
            raise ValueError(f"{phrase} matches the empty text, so it would match everywhere")
    return phrases


def inflections(word: str) -> set[str]:
    """Return a word's regular English forms in lower case: plural, third person, past, -ing,
    comparative, possessive.

    inflections("try") = {try, tries, tried, trying, tryer, tryest, trier, triest, try's}; words of
    one or two letters have only themselves. Forms that are not words do no harm: they occur in no
    text.
    """
    word = word.lower()
    # forms of short words, and of names with digits, would match by accident
    if len(word) < 3 or not word.isalpha():
        return {word}

    forms, stems = {word, word + "'s"}, {word}
    if word.endswith("e"):
        stems = {word[:-1]}
        forms.add(word + "s")
    elif word.endswith("y") and word[-2] not in "aeiou":
        stems.add(word[:-1] + "i")
        forms |= {word[:-1] + "ies", word + "ing"}
    elif word.endswith(("s", "x", "z", "ch", "sh", "o")):
        forms |= {word + "es", word + "s"}
    else:
        forms.add(word + "s")
    # stop -> stopped
    if re.search(r"[^aeiou][aeiou][^aeiouwxy]$", word):
        stems.add(word + word[-1])

    for ending in ("ed", "ing", "er", "est"):
        forms |= {stem + ending for stem in stems}
    return forms


def _forms(word: str, inflect: bool) -> set[str]:
    return inflections(word) if inflect else {word.lower()}


@functools.lru_cache(maxsize=PATTERNS)
def phrase_pattern(phrase: str, inflect: bool = True) -> re.Pattern:
    """Return a pattern for a word or phrase between word boundaries, each word inflected; /regex/
    as it is.
    """
    if is_regex(phrase):
        return re.compile(phrase[1:-1], re.IGNORECASE)
    words = []
    for word in clean(phrase).split():
        # longest first: alternatives are tried in order
        forms = sorted(_forms(word, inflect), key=lambda form: (-len(form), form))
        words.append(f"(?:{'|'.join(map(re.escape, forms))})")
    return re.compile(r"(?<!\w)" + r"\W+".join(words) + r"(?!\w)", re.IGNORECASE)


@functools.lru_cache(maxsize=PATTERNS)
def first_pieces(phrase: str, inflect: bool) -> set[str]:
    """Return the runs of word characters of which a text with the phrase has one; empty where that
    is unknown.
    """
    words = clean(phrase).lower().split()
    if is_regex(phrase) or not re.match(r"\w", words[0]):
        return set()
    return {re.match(r"\w+", form)[0] for form in _forms(words[0], inflect)}


@functools.lru_cache(maxsize=PATTERNS)
def edge_pattern(
    form: str, at_start: bool, values: tuple[tuple[str, str | None], ...]
) -> re.Pattern:
    """Return a pattern that finds a form at the start or at the end of a text.

    Punctuation at the edges of its words is free. `values` are those of its {placeholders}; None is
    any word.
    """
    # values come as pairs, since the cache needs something hashable
    known = dict(values)
    words = []
    for word in form.split():
        placeholder = re.fullmatch(r"\W*\{(\w+)\}\W*", word)
        if placeholder is None:
            words.append(re.escape(clean(word).strip(",.!;:")))
        elif known[placeholder[1]] is None:
            words.append(r"[\w'-]+")
        else:
            words.append(re.escape(clean(known[placeholder[1]])))
    # punctuation between words is free, as customers and models differ in it
    body = form[1:-1] if is_regex(form) else r"\W+".join(words)
    return re.compile(rf"^\W*(?:{body})\b" if at_start else rf"\b(?:{body})\W*$", re.IGNORECASE)


def plain_phrase(phrase: str) -> str:
    """Return a phrase as people write it: a regular expression loses its signs."""
    if not is_regex(phrase):
        return phrase
    # what may be missing is left out
    text = re.sub(r"\[[^\]]*\]\?|\w\?", "", phrase[1:-1].replace(" ?", " "))
    return re.sub(r"\\b|[\\()?\[\]^$]", "", text).replace("|", " / ")
