"""Find phrases in a text: whole words in any case, regularly inflected, or a regular expression
between slashes.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable

# not within a run of these: a long run that ends no sentence would be tried from each of its signs
SENTENCE_END = re.compile(r"(?<![.!?:;])[.!?:;]+(?=\s|$)|\n+")
Span = tuple[int, int]


def _combining_marks() -> str:
    """Return the signs of a character class: marks that belong to the letter before them, which \\w
    leaves out (vowel signs of Hindi and Thai, points of Hebrew). Variation selectors of emoji are none.
    """
    marks = [c for c in map(chr, range(0x300, 0xFE00)) if unicodedata.category(c) in ("Mn", "Mc")]
    return "".join(marks)


MARKS = _combining_marks()
MARK = re.compile(f"[{MARKS}]")
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
MARKED_WORD = re.compile(rf"(?:[^\W_]|[{MARKS}])+(?:['-](?:[^\W_]|[{MARKS}])+)*")
# thirty marks on one letter are more than any language has (Unicode annex 15, stream-safe text);
# sorting a longer run takes quadratic time
MANY_MARKS = re.compile(rf"([{MARKS}]{{30}})[{MARKS}]+")

# patterns that are kept: forms and facts may name the customers of a whole data set
PATTERNS = 10_000


class Text:
    """A cleaned text, its words in lower case with their places, and its runs of word characters for
    a fast search.
    """

    def __init__(self, text: str):
        self.text = clean(text)
        self.has_marks = bool(MARK.search(self.text))
        self.word_spans = spans_of(MARKED_WORD if self.has_marks else WORD, self.text)
        self.words = [self.at(span).lower() for span in self.word_spans]
        self.pieces = set(re.findall(r"\w+", self.text.lower()))

    def at(self, span: Span) -> str:
        """Return what stands at a place of `text`."""
        return self.text[slice(*span)]

    @functools.cached_property
    def sentences(self) -> list[tuple[int, int, int]]:
        """Return (start, end, words) of each sentence that has a word, as places in `text`."""
        found, start = [], 0
        for stop, following in [*spans_of(SENTENCE_END, self.text), (len(self.text), 0)]:
            count = count_words(self.text[start:stop])
            if count:
                found.append((start, stop, count))
            start = following
        return found

    def find(self, phrase: str, inflect: bool) -> list[Span]:
        """Return where the phrase occurs, as (start, end) in `text`."""
        # 30 times faster than asking the pattern
        starts = first_pieces(phrase, inflect)
        if starts and self.pieces.isdisjoint(starts):
            return []
        spans = spans_of(phrase_pattern(phrase, inflect), self.text)
        return list(itertools.filterfalse(self._cuts_a_letter, spans))

    def find_any(self, phrases: Iterable[str], inflect: bool) -> list[Span]:
        """Return where any of the phrases occurs."""
        spans = []
        for phrase in phrases:
            spans += self.find(phrase, inflect)
        return spans

    def _cuts_a_letter(self, span: Span) -> bool:
        """Return whether a combining mark continues the word after the span."""
        following = self.text[span[1] : span[1] + 1]
        return self.has_marks and bool(MARK.match(following))


def spans_of(pattern: re.Pattern, text: str) -> list[Span]:
    """Return the places of all matches, as (start, end)."""
    return [match.span() for match in pattern.finditer(text)]


def count_words(text: str) -> int:
    """Return the number of words of a cleaned text."""
    return len((MARKED_WORD if MARK.search(text) else WORD).findall(text))


def longest_sentence(text: str) -> int:
    """Return the number of words of the longest sentence in a cleaned text."""
    return max(map(count_words, SENTENCE_END.split(text)))


def clean(text: str) -> str:
    """Return the text in NFKC with straight apostrophes and single blanks; line ends stay."""
    text = unicodedata.normalize("NFKC", MANY_MARKS.sub(r"\1", text))
    text = text.replace("’", "'").replace("‘", "'")
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
        forms.update(stem + ending for stem in stems)
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
    body = form_body(form, values)
    return re.compile(rf"^\W*(?:{body})\b" if at_start else rf"\b(?:{body})\W*$", re.IGNORECASE)


def form_body(form: str, values: tuple[tuple[str, str | None], ...]) -> str:
    """Return the pattern of a form without its place in the text; `values` as in `edge_pattern`."""
    if is_regex(form):
        return form[1:-1]
    # values come as pairs, since a cache needs something hashable
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
    return r"\W+".join(words)


@functools.lru_cache(maxsize=PATTERNS)
def words_of(phrase: str) -> tuple[str, ...]:
    """Return the words of a phrase in lower case."""
    return tuple(Text(phrase).words)


# words before a claim among which a negation is looked for
NEGATION_REACH = 4
# "not only strong but unbreakable" and "no doubt unbreakable" claim it
NO_NEGATION = {"only", "just", "merely", "simply", "doubt", "question", "wonder"}
CLAUSE_END = re.compile(r"[.,;:!?\n]|\bbut\b", re.IGNORECASE)


def is_negated(text: str, start: int, negations: Iterable[str]) -> bool:
    """Return whether one of `negations` stands among the four words before `start`, in its clause.

    A word in n't is one where "not" is. What negates after the word ("unbreakable it is not") is not
    seen.
    """
    known = set(negations)
    before = text[max(0, start - 100) : start]
    words = WORD.findall(CLAUSE_END.split(before)[-1].lower())[-NEGATION_REACH:]
    for place, word in enumerate(words):
        negates = word in known or ("not" in known and word.endswith("n't"))
        follows = words[place + 1] if place + 1 < len(words) else ""
        if negates and follows not in NO_NEGATION:
            return True
    return False


def quoted(phrases: list[str], last: str = "and", most: int = 8) -> str:
    """Return phrases as people write them: "a", "b" and "c"; of more than `most` the first."""
    shown = [f'"{plain_phrase(phrase)}"' for phrase in phrases[:most]]
    more = len(phrases) - len(shown)
    if more:
        shown.append(f"{more} more")
    if len(shown) > 1:
        shown = [", ".join(shown[:-1]), shown[-1]]
    return f" {last} ".join(shown)


def plain_phrase(phrase: str) -> str:
    """Return a phrase as people write it: a regular expression loses its signs."""
    if not is_regex(phrase):
        return phrase
    # what may be missing is left out
    text = re.sub(r"\[[^\]]*\]\?|\w\?", "", phrase[1:-1].replace(" ?", " "))
    return re.sub(r"\\b|[\\()?\[\]^$]", "", text).replace("|", " / ")
