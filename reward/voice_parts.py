"""The parts of a brand voice: each section of its file scores a text between 0 and 1."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from reward.phrases import (
    Text,
    check_phrases,
    clean,
    distinct,
    edge_pattern,
    is_regex,
    longest_sentence,
)
from rlhf.validation import Count, Number, Spec

# a fact that is not mentioned is less bad than a wrong one (0)
MISSING_FACT = 0.1

# what each use of a word to avoid leaves of its part
AVOID_FACTOR = 0.25


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _refuse_empty(phrases: list[str]) -> list[str]:
    if not phrases:
        raise ValueError("is empty; leave the section out instead")
    return phrases


def _text_keys(value: Any) -> Any:
    # YAML reads the keys 1 and yes as a number and a truth value
    if not isinstance(value, dict):
        return value
    return {str(key): content for key, content in value.items()}


Phrases = Annotated[list[str], BeforeValidator(_as_list), AfterValidator(check_phrases)]

SomePhrases = Annotated[Phrases, AfterValidator(_refuse_empty)]


class Section(Spec):
    """A part of the voice. Phrases may be numbers in YAML.

    A part that is scored has `score(text, metadata)`, which returns a number between 0 and 1.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    weight: Number = Field(1.0, ge=0)


class Greeting(Section):
    """Accepted forms at the start of the text."""

    at_start: ClassVar[bool] = True
    phrases: SomePhrases = Field(alias="forms")

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        for form in self.phrases:
            values = []
            for name in re.findall(r"\{(\w+)\}", form):
                value = metadata.get(name)
                # a placeholder without a value stands for any word
                values.append((name, None if value in (None, "") else str(value)))
            if edge_pattern(form, self.at_start, tuple(values)).search(text.text):
                return 1.0
        return 0.0

    def least_words(self) -> int:
        """Return the words of the shortest form's longest sentence; a regular expression may be of
        any length.
        """
        return min(0 if is_regex(form) else longest_sentence(clean(form)) for form in self.phrases)


class Closing(Greeting):
    """Accepted forms at the end of the text."""

    at_start: ClassVar[bool] = False


class Use(Section):
    """Words to use: `at_least` distinct ones have the full score; more earn nothing, and a stuffed
    text loses.
    """

    phrases: SomePhrases = Field(alias="words")
    # None (not given): 2, or all words where there are fewer
    at_least: Count = Field(default=None, ge=1)
    # of all words; above it the score falls, to 0 at twice that
    max_share: Number = Field(0.2, gt=0)
    inflect: bool = True

    @property
    def enough(self) -> int:
        """How many distinct words earn the full score."""
        return min(2, len(distinct(self.phrases))) if self.at_least is None else self.at_least

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        counts = [len(text.find(word, self.inflect)) for word in self.phrases]
        share = sum(counts) / len(text.words)
        used = min(1.0, sum(count > 0 for count in counts) / self.enough)
        # a list of the words is not an answer
        return used * max(0.0, min(1.0, 2 - share / self.max_share))


class Avoid(Section):
    """Words to avoid: each use leaves a quarter of the part."""

    words: SomePhrases
    inflect: bool = True

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        return AVOID_FACTOR ** len(text.find_any(self.words, self.inflect))


class Claims(Avoid):
    """Claims that the brand must not make: with one of them the part is 0."""

    words: SomePhrases = Field(alias="forbidden")

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        return float(not text.find_any(self.words, self.inflect))


class Sentences(Section):
    """Longest sentence allowed, in words; the part reaches 0 at one and a half times that."""

    max_words: Count = Field(gt=0)

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        return within(longest_sentence(text.text), 0, self.max_words)


class Length(Section):
    """Words of the whole text; the part falls to 0 at half of `min_words` and at one and a half
    times `max_words`.
    """

    min_words: Count = Field(1, ge=0)
    max_words: Count = Field(1000, gt=0)

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        return within(len(text.words), self.min_words, self.max_words)


class Variety(Section):
    """No repetition: full score up to a tenth of repeated word pairs, 0 at half of them."""

    def score(self, text: Text, metadata: dict[str, Any]) -> float:
        pairs = list(itertools.pairwise(text.words))
        repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
        return min(1.0, max(0.0, 1 - (repeated - 0.1) / 0.4))


class Fact(Section):
    """A value of the prompt's metadata that the text must contain.

    phrasings: for each possible value, the phrases that express it; phrases of another value are
    wrong.
    choices: all possible values, each expressed by itself. With neither, the value itself must be
    in the text.
    """

    choices: Phrases = Field([], validation_alias=AliasChoices("choices", "among"))
    phrasings: Annotated[dict[str, Phrases], BeforeValidator(_text_keys)] = Field(
        {}, validation_alias=AliasChoices("phrasings", "said_as")
    )
    inflect: bool = True

    @model_validator(mode="after")
    def _check(self) -> Fact:
        if self.choices and self.phrasings:
            raise ValueError("has both 'choices' and 'phrasings'; keep one")
        ways = self.phrasings or {
            f"{value} (entry {i})": [value] for i, value in enumerate(self.choices, 1)
        }
        value_of: dict[str, str] = {}
        for value, phrases in ways.items():
            if not phrases:
                raise ValueError(f"{value!r} has no phrase that says it")
            for phrase in distinct(phrases):
                other = value_of.setdefault(phrase, value)
                if other != value:
                    raise ValueError(f"{phrase!r} says both {other!r} and {value!r}")
        return self

    def score_value(self, text: Text, value: str) -> float:
        """Return 1 for the right value, 1 / (1 + n) beside n wrong ones, 0 for wrong ones alone,
        else MISSING_FACT.
        """
        ways = self.phrasings or {choice: [choice] for choice in self.choices}
        right = text.find_any(ways.get(value, [value]), self.inflect)
        wrong = 0
        for other, phrases in ways.items():
            if other != value:
                spans = text.find_any(phrases, self.inflect)
                # "gift card" is not also the wrong answer "card"
                wrong += any(not _inside(span, right) for span in spans)
        if right:
            return 1 / (1 + wrong)
        return 0.0 if wrong else MISSING_FACT


class Task(Spec):
    """What an answer must say to do its job: a fact for each key of the prompt's metadata."""

    # `item:` with nothing after it is a fact with all defaults
    facts: Annotated[
        dict[str, Annotated[Fact, BeforeValidator(lambda fact: fact or {})]],
        BeforeValidator(_text_keys),
    ] = Field(min_length=1)


def within(n: float, low: float, high: float) -> float:
    """Return 1 for low <= n <= high, falling linearly to 0 at low / 2 and at 1.5 high."""
    if n < low:
        return max(0.0, 2 * n / low - 1)
    return max(0.0, min(1.0, 3 - 2 * n / high))


def _inside(span: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)
