"""The parts of a brand voice that look at form: lengths, repetition, reading level, person,
contractions, emoji, punctuation and, where a judge measures it, tone.
"""

import itertools
import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from reward.voice.parts import Mark, Section, SomePhrases
from reward.voice.phrases import Text, quoted, spans_of
from rlhf.validation import Count, Number, Spec

# what each sign, emoji or pronoun too many leaves of its part
FAULT_FACTOR = 0.5


class Sentences(Section):
    """Longest sentence allowed, in words."""

    max_words: Count = Field(gt=0)

    def explain(self) -> str:
        return f"no sentence has more than {self.max_words} words"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return, with n_i the words of sentence i, sum_i n_i softly(n_i) / sum_i n_i.

        With `exact` only the longest sentence counts: 0 at one and a half times `max_words`.
        """
        longest, kept, whole, bad = 0, 0.0, 0, []
        for start, end, words in text.sentences:
            if words > self.max_words:
                bad.append((start, end))
            longest = max(longest, words)
            kept += words * softly_within(words, 0, self.max_words)
            whole += words
        note = f"the longest has {longest} words"
        score = within(longest, 0, self.max_words) if exact else kept / whole
        return Mark(score, bad=bad, note=note)


class Length(Section):
    """Words of the whole text."""

    min_words: Count = Field(1, ge=0)
    max_words: Count = Field(1000, gt=0)

    def explain(self) -> str:
        return f"the text has {_bounds(self, 'min_words', 'max_words')} words"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return `softly_within`; with `exact` `within`."""
        count = len(text.words)
        score = (within if exact else softly_within)(count, self.min_words, self.max_words)
        return Mark(score, note=f"{count} words")


class Variety(Section):
    """No repetition: full score up to a tenth of repeated word pairs, 0 at half of them."""

    def explain(self) -> str:
        return "at most a tenth of all word pairs are repetitions"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        pairs = list(itertools.pairwise(text.words))
        repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
        score = min(1.0, max(0.0, 1 - (repeated - 0.1) / 0.4))
        return Mark(score, note=f"{repeated:.0%} repeated")


class Reading(Section):
    """How hard the text is to read, at most `max_level`.

    flesch_kincaid: the US school grade (Kincaid et al. 1975), 0.39 words / sentences
    + 11.8 syllables / words - 15.59; for English.
    lix: words / sentences + 100 long / words, with long words of more than six letters (Björnsson
    1968); for any language with blanks between its words. 30 is easy, 40 a newspaper, 50 an office.
    """

    formula: Literal["flesch_kincaid", "lix"] = "flesch_kincaid"
    max_level: Number = Field(gt=0)

    def explain(self) -> str:
        names = {"flesch_kincaid": "the Flesch-Kincaid grade", "lix": "the LIX"}
        return f"{names[self.formula]} is at most {self.max_level:g}"

    def level(self, text: Text) -> float:
        """Return the level of a text that has a word."""
        words, sentences = text.words, len(text.sentences)
        if self.formula == "lix":
            long = sum(len(word) > 6 for word in words)
            return len(words) / sentences + 100 * long / len(words)
        syllables = sum(map(count_syllables, words))
        return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        # the formula of a text of short words may be below 0
        level = max(0.0, self.level(text))
        score = (within if exact else softly_within)(level, 0, self.max_level)
        return Mark(score, note=f"level {level:.1f}")


FIRST_PERSON = {
    "i": re.compile(r"\b(?:I|me|my|mine|myself)\b(?!\.)", re.IGNORECASE),
    # but not the country
    "we": re.compile(r"\b(?!(?-i:US)\b)(?:we|us|our|ours|ourselves)\b", re.IGNORECASE),
}
READER = re.compile(r"\b(?:you|your|yours|yourself|yourselves)\b", re.IGNORECASE)


class Person(Section):
    """Who speaks, and whether the reader is addressed. Each wrong pronoun leaves half; a reader who
    should be addressed and is not, half.
    """

    speaks_as: Literal["we", "i", "nobody"] | None = None
    addresses_reader: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.speaks_as is None and self.addresses_reader is None:
            raise ValueError("give speaks_as (we, i or nobody), addresses_reader, or both")
        return self

    def explain(self) -> str:
        speaks = {"we": 'speaks as "we", not "I"', "i": 'speaks as "I", not "we"'}
        rules = []
        if self.speaks_as:
            rules.append(speaks.get(self.speaks_as, 'says neither "I" nor "we"'))
        if self.addresses_reader is not None:
            rules.append('says "you"' if self.addresses_reader else 'does not say "you"')
        return f"the text {' and '.join(rules)}"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        good, bad = [], []
        for person, pattern in FIRST_PERSON.items():
            if self.speaks_as:
                spans = spans_of(pattern, text.text)
                (good if person == self.speaks_as else bad).extend(spans)
        faults = len(bad)
        if self.addresses_reader is not None:
            spans = spans_of(READER, text.text)
            (good if self.addresses_reader else bad).extend(spans)
            # one fault for the reader who is missing, one for each who should be
            faults += (not spans) if self.addresses_reader else len(spans)
        return Mark(FAULT_FACTOR**faults, good=good, bad=bad)


CONTRACTED = re.compile(
    r"\b\w+n't\b|\b(?:I'm|(?:you|we|they)'re|(?:he|she|it|that|there|here|what|who|let)'s|"
    r"(?:I|you|we|they)'ve|(?:I|you|he|she|it|we|they)'(?:ll|d))\b",
    re.IGNORECASE,
)
EXPANDED = re.compile(
    r"\b(?:is|are|was|were|do|does|did|have|has|had|would|could|should|will) not\b|\bcan ?not\b|"
    r"\bI am\b|\b(?:you|we|they) are\b|\b(?:he|she|it|that|there) is\b|\b(?:I|you|we|they) have\b|"
    r"\b(?:I|you|he|she|it|we|they) (?:will|would)\b|\blet us\b",
    re.IGNORECASE,
)


class Contractions(Section):
    """The share of places that are contracted ("we'll") or not ("we will") as the style wants."""

    style: Literal["use", "avoid"]

    def explain(self) -> str:
        if self.style == "use":
            return 'it is "we\'ll" and "don\'t", not "we will" and "do not"'
        return 'it is "we will" and "do not", not "we\'ll" and "don\'t"'

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return right / (right + wrong); 1 where there is no such place."""
        good, bad = spans_of(CONTRACTED, text.text), spans_of(EXPANDED, text.text)
        if self.style == "avoid":
            good, bad = bad, good
        score = len(good) / (len(good) + len(bad)) if good or bad else 1.0
        return Mark(score, good=good, bad=bad)


# pictographs and dingbats, with a skin tone or the sign that asks for a picture; a sequence joined
# by U+200D ("family") and a flag of two letters are one emoji
_PICTURE = "[\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55\u231a\u231b\u23e9-\u23f3]"
_TONED = f"{_PICTURE}[\ufe0f\U0001f3fb-\U0001f3ff]*"
EMOJI = re.compile(f"[\U0001f1e6-\U0001f1ff]{{2}}|{_TONED}(?:\u200d{_TONED})*")


class Emoji(Section):
    """How many emoji, and which. Each one too many or not allowed leaves half."""

    min: Count = Field(0, ge=0)
    max: Count = Field(1000, ge=0)
    allowed: SomePhrases | None = None

    def explain(self) -> str:
        only = f", only {quoted(self.allowed, 'or')}" if self.allowed else ""
        return f"the text has {_bounds(self, 'min', 'max')} emoji{only}"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return (found / min, at most 1) * FAULT_FACTOR^(too many + not allowed)."""
        known = None if self.allowed is None else set(map(_plain_emoji, self.allowed))
        good, bad = [], []
        for span in spans_of(EMOJI, text.text):
            is_known = known is None or _plain_emoji(text.at(span)) in known
            (good if is_known else bad).append(span)
        # those beyond the maximum count as faults, the last ones first
        bad += good[self.max :]
        good = good[: self.max]
        enough = min(1.0, len(good) / self.min) if self.min else 1.0
        return Mark(enough * FAULT_FACTOR ** len(bad), good=good, bad=bad)


SIGNS = {
    "exclamation_marks": re.compile(r"!"),
    "question_marks": re.compile(r"\?"),
    "semicolons": re.compile(r";"),
    "dashes": re.compile(r"[–—]|(?<!-)--(?!-)|(?<=\s)-(?=\s)"),
    "ellipses": re.compile(r"(?<!\.)\.{2,}"),
    "capitals": re.compile(r"\b[^\W\d_]{4,}\b"),
}


class Punctuation(Section):
    """The most of each sign in a text; each one more leaves half. None: any number.

    capitals: words of four or more capital letters.
    """

    exclamation_marks: Count | None = Field(None, ge=0)
    question_marks: Count | None = Field(None, ge=0)
    semicolons: Count | None = Field(None, ge=0)
    dashes: Count | None = Field(None, ge=0)
    ellipses: Count | None = Field(None, ge=0)
    capitals: Count | None = Field(None, ge=0)

    @property
    def most(self) -> dict[str, int]:
        """The signs that are limited, with their most."""
        return self.model_dump(include=set(SIGNS), exclude_none=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.most:
            raise ValueError(f"limits no sign; give one of {', '.join(SIGNS)}")
        return self

    def explain(self) -> str:
        one = {"ellipses": "ellipsis", "dashes": "dash", "capitals": "word in capitals"}
        many = {"capitals": "words in capitals"}
        rules = []
        for name, most in self.most.items():
            said = many.get(name, name.replace("_", " "))
            if most == 1:
                said = one.get(name, said.removesuffix("s"))
            rules.append(f"at most {most} {said}" if most else f"no {said}")
        return f"the text has {', '.join(rules)}"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        bad = []
        for name, most in self.most.items():
            spans = spans_of(SIGNS[name], text.text)
            if name == "capitals":
                spans = [span for span in spans if text.at(span).isupper()]
            bad += spans[most:]
        return Mark(FAULT_FACTOR ** len(bad), bad=bad)


class Tone(Spec):
    """Sliders from 0 to 1 that a judge measures, such as {formal: 0.2, warm: 0.9}.

    Each is a part of the score, 1 - |measured - wanted|, and has its share of the weight. Without a
    judge they are left out.
    """

    weight: Number = Field(1.0, ge=0)
    sliders: dict[str, Number] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self.sliders.items():
            if not 0 <= value <= 1:
                raise ValueError(f"sliders.{name}: found {value:g}, expected a number from 0 to 1")
        return self

    def mark(self, name: str, measured: float) -> Mark:
        note = f"measured {measured:.2f}, wanted {self.sliders[name]:.2f}"
        return Mark(1 - abs(measured - self.sliders[name]), note=note)


def within(n: float, low: float, high: float) -> float:
    """Return 1 for low <= n <= high, falling linearly to 0 at low / 2 and at 1.5 high."""
    if n < low:
        return max(0.0, 2 * n / low - 1)
    return max(0.0, min(1.0, 3 - 2 * n / high))


def softly_within(n: float, low: float, high: float) -> float:
    """Return 1 for low <= n <= high, (n / low)^3 below and (high / n)^3 above: never quite 0, so
    that nearer is always better.
    """
    if n < low:
        return (max(0.0, n) / low) ** 3
    return min(1.0, (high / n) ** 3) if n > high else 1.0


# "-e" is silent but in "-le" after a consonant (ap-ple, but mile), and "-ed" but after d and t
_SILENT_E = re.compile(r"(?<![^aeiouy]l)(?<=[^aeiouy])e$|(?<=[^aeiouydt])ed$")
_VOWELS = re.compile(r"[aeiouy]+")


def count_syllables(word: str) -> int:
    """Return the syllables of an English word in lower case: its groups of vowels without a silent
    e, at least 1.
    """
    spoken = _SILENT_E.sub("", word.removesuffix("'s"))
    return max(1, len(_VOWELS.findall(spoken)))


def _bounds(section: Section, low: str, high: str) -> str:
    """Return the bounds that the file gives, as "at least 2 and at most 9"."""
    given = section.model_dump(include={low, high}, exclude_unset=True)
    said = []
    for name, words in ((low, "at least"), (high, "at most")):
        if name in given:
            said.append(f"{words} {given[name]}")
    return " and ".join(said) or "any number of"


def _plain_emoji(sign: str) -> str:
    """Return an emoji without its skin tone and the sign that asks for a picture."""
    return re.sub("[\ufe0f\U0001f3fb-\U0001f3ff]", "", sign.strip())
