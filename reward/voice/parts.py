"""The parts of a brand voice that look for phrases: greeting, closing, words, claims and facts.

Each scores a text between 0 and 1 and says which of its words it looked at. With `exact`, a part
counts as it did before partial credit. docs/brand-voice.md has the table of credits.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from reward.voice.nearness import LOOKED_AT, is_like_any, likeness, near_words, phrase_likeness
from reward.voice.phrases import (
    Span,
    Text,
    check_phrases,
    clean,
    distinct,
    edge_pattern,
    form_body,
    is_negated,
    is_regex,
    longest_sentence,
    quoted,
    spans_of,
    words_of,
)
from rlhf.validation import Count, Number, Spec

# a fact that is not mentioned is less bad than a wrong one (0)
MISSING_FACT = 0.1

# what each use of a word to avoid leaves of its part
AVOID_FACTOR = 0.25

# Partial credit, all below that of the exact phrase.
# the whole form, right beside its place
NEAR_FORM = 0.8
# a word that is nearly one of those to use
NEAR_WORD = 0.5
# a fact that is nearly said; a right one beside a wrong one has 0.5
NEAR_FACT = 0.4
# one forbidden claim; n of them leave this / n
ONE_CLAIM = 0.05

# words that make a claim none when one of them stands up to four words before it
ENGLISH_NEGATIONS = (
    "not", "no", "never", "nothing", "none", "neither", "nor", "without", "cannot", "hardly",
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """What one part says of a text: its score in [0, 1], the spans that earn it, cost it, or nearly
    earn it, and what was measured.
    """

    score: float
    good: list[Span] = field(default_factory=list)
    bad: list[Span] = field(default_factory=list)
    near: list[Span] = field(default_factory=list)
    note: str = ""


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

    A part that is scored has `mark(text, metadata, exact=...)`, which returns a Mark, and
    `explain()`, which returns its rule as half a sentence.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    weight: Number = Field(1.0, ge=0)

    @property
    def asked(self) -> list[str]:
        """The phrases that the part wants in the text."""
        return []


class Greeting(Section):
    """Accepted forms at the start of the text."""

    at_start: ClassVar[bool] = True
    phrases: SomePhrases = Field(alias="forms")

    @property
    def asked(self) -> list[str]:
        return self.phrases

    def explain(self) -> str:
        return f"the text {'begins' if self.at_start else 'ends'} with {quoted(self.phrases, 'or')}"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return 1 for a form in its place; with partial credit, what `near_form` gives else."""
        best = Mark(0.0)
        for form in self.phrases:
            values = _values(form, metadata)
            found = edge_pattern(form, self.at_start, values).search(text.text)
            if found:
                return Mark(1.0, good=[found.span()])
            if not exact:
                best = max(best, self.near_form(text, form, values), key=lambda mark: mark.score)
        return best

    def near_form(self, text: Text, form: str, values: tuple[tuple[str, str | None], ...]) -> Mark:
        """Return the partial credit of one form, the best over all stretches of the text.

            NEAR_FORM * likeness^3 * (1/2 + 1 / (2 + 2 away))

        likeness: that of the stretch (nearness.py), 1 for the whole form; away: the words between
        the stretch and the form's place. Cubed, so that a stray word of a form is worth next to
        nothing.
        """
        if is_regex(form):
            spans = spans_of(re.compile(form_body(form, values), re.IGNORECASE), text.text)
            if not spans:
                return Mark(0.0)
            span = spans[0] if self.at_start else spans[-1]
            return Mark(NEAR_FORM * _place(self._away(text, span)), near=[span])

        wanted = _wanted_words(form, values)
        if not wanted:
            return Mark(0.0)
        # read from the form's place: backwards at the start, so that a stretch ends beside it
        count = min(len(text.words), LOOKED_AT)
        read = text.words[:count][::-1] if self.at_start else text.words[-count:]
        likeness = phrase_likeness(wanted[::-1] if self.at_start else wanted, read)
        credits = [like**3 * _place(count - end) for end, like in enumerate(likeness)]
        best = max(credits)
        if not best:
            return Mark(0.0)
        end = credits.index(best)
        spans = text.word_spans[:count][::-1] if self.at_start else text.word_spans[-count:]
        near = []
        for place in range(max(0, end - 2 * len(wanted)), end):
            if is_like_any(read[place], wanted):
                near.append(spans[place])
        return Mark(NEAR_FORM * best, near=near)

    def _away(self, text: Text, span: Span) -> int:
        """Return the words between a span and the form's place."""
        if self.at_start:
            return sum(end <= span[0] for _, end in text.word_spans)
        return sum(start >= span[1] for start, _ in text.word_spans)

    def least_words(self) -> int:
        """Return the words of the shortest form's longest sentence; a regular expression may be of
        any length.
        """
        words = []
        for form in self.phrases:
            words.append(0 if is_regex(form) else longest_sentence(clean(form)))
        return min(words)


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
    def asked(self) -> list[str]:
        return self.phrases

    @property
    def enough(self) -> int:
        """How many distinct words earn the full score."""
        return min(2, len(distinct(self.phrases))) if self.at_least is None else self.at_least

    def explain(self) -> str:
        return (
            f"at least {self.enough} of {quoted(self.phrases)} are used, and not in more than "
            f"{self.max_share:.0%} of all words"
        )

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        """Return used / enough, and with partial credit NEAR_WORD * likeness^3 for each word still
        missing that the text nearly has. These count in the share of all words too, so that no text
        gains by misspelling them.
        """
        spans: list[Span] = []
        unused = []
        # a phrase that is listed twice counts once
        for word in dict.fromkeys(self.phrases):
            own = text.find(word, self.inflect)
            spans += own
            if not own:
                unused.append(word)
        count = len(set(self.phrases)) - len(unused)
        note = f"{count} of {self.enough}"
        used, credited, near = float(count), 0, []
        if count < self.enough and not exact:
            likenesses, nearly = [], []
            for word in unused:
                like = likeness(word, text)
                if like:
                    likenesses.append(like)
                    nearly.append(word)
            # the nearest ones stand for those that are missing
            best = sorted(likenesses)[count - self.enough :]
            credited = len(best)
            used += sum(NEAR_WORD * like**3 for like in best)
            near = near_words(nearly, text)
        share = (len(spans) + credited) / len(text.words)
        # a list of the words is not an answer
        stuffed = max(0.0, min(1.0, 2 - share / self.max_share))
        good, bad = (spans, []) if stuffed == 1 else ([], spans)
        return Mark(
            min(1.0, used / self.enough) * stuffed, good=good, bad=bad, near=near, note=note
        )


class Avoid(Section):
    """Words to avoid: each use leaves a quarter of the part."""

    words: SomePhrases
    inflect: bool = True

    def explain(self) -> str:
        return f"none of {quoted(self.words)} is used; each use leaves a quarter"

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        bad = text.find_any(self.words, self.inflect)
        return Mark(AVOID_FACTOR ** len(bad), bad=bad)


class Claims(Avoid):
    """Claims that the brand must not make. With `exact` one of them makes the part 0; else n leave
    ONE_CLAIM / n.
    """

    words: SomePhrases = Field(alias="forbidden")
    # words that make a claim none; None (not given): the English ones, and none with `exact`
    negations: list[str] | None = None

    def explain(self) -> str:
        return f"none of {quoted(self.words)} is claimed"

    def denials(self, *, exact: bool) -> Iterable[str]:
        """Return the words after which a claim is none."""
        if self.negations is None:
            return () if exact else ENGLISH_NEGATIONS
        return self.negations

    def mark(self, text: Text, metadata: dict[str, Any], *, exact: bool) -> Mark:
        negations = self.denials(exact=exact)
        claims = text.find_any(self.words, self.inflect)
        denied, bad = [], []
        for span in claims:
            (denied if is_negated(text.text, span[0], negations) else bad).append(span)
        least = 0.0 if exact else ONE_CLAIM / max(1, len(bad))
        note = f"{len(denied)} negated" if denied else ""
        return Mark(least if bad else 1.0, good=denied, bad=bad, note=note)


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

    @property
    def asked(self) -> list[str]:
        return [*self.choices, *itertools.chain.from_iterable(self.phrasings.values())]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choices and self.phrasings:
            raise ValueError("has both 'choices' and 'phrasings'; keep one")
        ways = list(self.phrasings.items())
        # two choices may be spelled alike
        for number, value in enumerate(self.choices, 1):
            ways.append((f"{value} (entry {number})", [value]))
        value_of: dict[str, str] = {}
        for value, phrases in ways:
            if not phrases:
                raise ValueError(f"{value!r} has no phrase that says it")
            for phrase in distinct(phrases):
                other = value_of.setdefault(phrase, value)
                if other != value:
                    raise ValueError(f"{phrase!r} says both {other!r} and {value!r}")
        return self

    def mark_value(self, text: Text, value: str, *, exact: bool) -> Mark:
        """Return 1 for the right value, 1 / (1 + n) beside n wrong ones, 0 for wrong ones alone.

        Else MISSING_FACT; with partial credit up to NEAR_FACT where the value is nearly there:

            MISSING_FACT + (NEAR_FACT - MISSING_FACT) * likeness^3
        """
        ways = self.phrasings or {choice: [choice] for choice in self.choices}
        saying = ways.get(value, [value])
        right = text.find_any(saying, self.inflect)
        wrong, bad = 0, []
        for other, phrases in ways.items():
            if other != value:
                # "gift card" is not also the wrong answer "card"
                spans = text.find_any(phrases, self.inflect)
                outside = [span for span in spans if not _inside(span, right)]
                wrong += bool(outside)
                bad += outside
        if right:
            return Mark(1 / (1 + wrong), good=right, bad=bad)
        if wrong or exact:
            return Mark(0.0 if wrong else MISSING_FACT, bad=bad, note=f"needs {value!r}")
        like = max(likeness(phrase, text) for phrase in saying)
        score = MISSING_FACT + (NEAR_FACT - MISSING_FACT) * like**3
        near = near_words(saying, text) if like else []
        return Mark(score, near=near, note=f"needs {value!r}")


class Task(Spec):
    """What an answer must say to do its job: a fact for each key of the prompt's metadata."""

    # `item:` with nothing after it is a fact with all defaults
    facts: Annotated[
        dict[str, Annotated[Fact, BeforeValidator(lambda fact: fact or {})]],
        BeforeValidator(_text_keys),
    ] = Field(min_length=1)


def _values(form: str, metadata: dict[str, Any]) -> tuple[tuple[str, str | None], ...]:
    """Return the value of each {placeholder} of a form; one without a value stands for any word."""
    values = []
    for name in re.findall(r"\{(\w+)\}", form):
        value = metadata.get(name)
        values.append((name, None if value in (None, "") else str(value)))
    return tuple(values)


def _wanted_words(form: str, values: tuple[tuple[str, str | None], ...]) -> tuple[str, ...]:
    """Return the words of a form; a placeholder that stands for any word is none."""
    for name, value in values:
        form = form.replace("{" + name + "}", value or "")
    return words_of(form)


def _place(away: int) -> float:
    """Return what a distance of so many words from its place leaves of a form: 1, 3/4, 2/3, ... 1/2."""
    return 0.5 + 0.5 / (1 + away)


def _inside(span: Span, others: list[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)
