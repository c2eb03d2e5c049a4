"""Rows that contaminate an evaluation: they hold its prompts or answers, word for word, nearly, or
in long pieces.

A row is contaminated if its prompt, or a user's turn of it, is a prompt or turn of the evaluation,
or if its answers (both of a pair) are those of one row of the evaluation and one of them has n
words or more. So it is if a prompt of the evaluation, or an answer of n words or more, is
inside its prompt, in any turn, or its prompt of n words or more inside one of the evaluation. Texts
are compared as words, after Unicode NFKC and case folding. A text of the evaluation also counts as
present where a share `overlap` of its n-grams is in one text of the row (compare Brown et al.
2020, appendix C, and Chowdhery et al. 2022, section 8: longer n-grams, longer texts); a text of
five words up to n is one n-gram. A prompt also counts where it is a near duplicate as in
duplicates.py.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.data import schemas, sources
from rlhf.data.conversation import answers_of, turns_of, user_text
from rlhf.data.prepare.cleaning import clean, words_of
from rlhf.data.prepare.duplicates import similar_texts
from rlhf.data.records import Record, normalise
from rlhf.errors import UserError

# Words; shorter texts are only looked for as a whole
SHORTEST = 5

# Of what a text holds of an evaluation: {row of the evaluation: (share, the evaluation's text)}
Hits = dict[str, tuple[float, str]]


@dataclass
class Leak:
    """Row `row` of the data holds a share (1: all) of a text of the evaluation."""

    row: int
    what: Literal["prompt", "answer"]
    # file and row of the evaluation
    where: str
    share: float
    text: str


@dataclass
class IndexedText:
    """One text of an evaluation: its number of distinct n-grams, and the rows that have it."""

    text: str
    size: int
    places: list[str]


@dataclass
class Index:
    """The texts of an evaluation: whole, and by n-gram."""

    n: int
    texts: list[IndexedText] = field(default_factory=list)
    exact: dict[str, int] = field(default_factory=dict)
    grams: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    # of the n-grams: n, and those of shorter texts
    lengths: set[int] = field(default_factory=set)

    def add(self, text: str, place: str) -> None:
        text = clean(text)
        key = normalise(text)
        if key in self.exact:
            self.texts[self.exact[key]].places.append(place)
        elif key:
            number = self.exact[key] = len(self.texts)
            words = words_of(text)
            # a text of fewer than n words is one n-gram of its own length
            grams = _ngrams(words, min(self.n, len(words))) if len(words) >= SHORTEST else set()
            for gram in grams:
                self.grams.setdefault(gram, []).append(number)
                self.lengths.add(len(gram))
            self.texts.append(IndexedText(text, len(grams), [place]))

    def hits(self, text: str, overlap: float, *, inside: bool = False) -> Hits:
        """Return what `text` holds of it; the same text has share 1.

        inside: or what its text holds of `text`, whichever is more.
        """
        words = words_of(text)
        grams = set()
        for length in self.lengths:
            grams |= _ngrams(words, length)
        shares = {}
        for number, count in self._occurrences(grams).items():
            shares[number] = count / self.texts[number].size
        # a prompt that was cut out of a longer one of the evaluation
        if inside and len(words) >= self.n:
            own = _ngrams(words, self.n)
            for number, count in self._occurrences(own).items():
                shares[number] = max(shares[number], count / len(own))
        key = normalise(text)
        if key in self.exact:
            shares[self.exact[key]] = 1.0

        found: Hits = {}
        for number, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
            if share >= overlap:
                for place in self.texts[number].places:
                    found.setdefault(place, (share, self.texts[number].text))
        return found

    def _occurrences(self, grams: Iterable[tuple[str, ...]]) -> Counter[int]:
        counts: Counter[int] = Counter()
        for gram in grams:
            counts.update(self.grams.get(gram, ()))
        return counts


@dataclass
class Evaluation:
    """What data must not contain: the prompts and answers of `rows` rows."""

    prompts: Index
    answers: Index
    rows: int = 0


def read_evaluation(names: Sequence[str], n: int) -> Evaluation:
    """Read evaluation sources with rows of any kind. Raises UserError on one of which no row can be
    read.
    """
    evaluation = Evaluation(Index(n), Index(n))
    for name in names:
        bad, before = 0, evaluation.rows
        for place, row, problem in sources.rows(name):
            record = None if problem else _any_record(row)
            # an evaluation may hold rows of all kinds, and some that are no record
            if record is None:
                bad += 1
                continue
            evaluation.rows += 1
            evaluation.prompts.add(user_text(record), place)
            for number, turn in enumerate(turns_of(record, "user")):
                # a later short turn, such as "Go on.", identifies no conversation
                if number == 0 or len(words_of(turn)) >= n:
                    evaluation.prompts.add(turn, place)
            for text in (*turns_of(record, "assistant"), *answers_of(record).values()):
                evaluation.answers.add(text, place)
        if evaluation.rows == before:
            raise UserError(
                f"{name}: no row of this evaluation can be read ({bad} bad); see: rlhf data show {name}"
            )
    return evaluation


def find_leaks(
    records: Sequence[Record], evaluation: Evaluation, overlap: float, near: float = 1.0
) -> list[Leak]:
    """Return a leak for each contaminated row, in order; with `near` 1 near duplicates of prompts
    do not count.
    """
    prompts = evaluation.prompts
    similar: dict[int, tuple[int, float]] = {}
    if near < 1:
        known = [indexed.text for indexed in prompts.texts]
        similar = similar_texts(list(map(user_text, records)), known, near)

    found = []
    for i, record in enumerate(records):
        hits = _prompt_hits(record, prompts, overlap)
        if not hits and i in similar:
            number, share = similar[i]
            hits = {prompts.texts[number].places[0]: (share, prompts.texts[number].text)}

        what = "prompt" if hits else "answer"
        hits = hits or _answer_hits(record, evaluation.answers, overlap)
        if hits:
            # the largest share counts, of equal ones the first
            where = max(hits, key=lambda place: hits[place][0])
            found.append(Leak(i, what, where, *hits[where]))
    return found


def _prompt_hits(record: Record, prompts: Index, overlap: float) -> Hits:
    """Look for prompts of the evaluation in the user's words, together and by turn, and in other
    long turns.
    """
    texts = [user_text(record), *turns_of(record, "user")]
    for message in record.prompt:
        if message["role"] != "user" and len(words_of(message["content"])) >= SHORTEST:
            texts.append(message["content"])
    for text in dict.fromkeys(texts):
        hits = prompts.hits(text, overlap, inside=True)
        if hits:
            return hits
    return {}


def _answer_hits(record: Record, answers: Index, overlap: float) -> Hits:
    """Look for answers of the evaluation in all the row's answers together, and in each message of
    its prompt.
    """
    groups = [list(answers_of(record).values())]
    for message in record.prompt:
        groups.append([message["content"]])
    for texts in filter(None, groups):
        hits = _common_hits([answers.hits(text, overlap) for text in texts], answers.n)
        if hits:
            return hits
    return {}


def _common_hits(hits: list[Hits], shortest: int) -> Hits:
    """Return the rows of the evaluation that all texts hold something of, each with its smallest
    hit.

    One of the hits must have `shortest` words or more: many rows answer "Yes.".
    """
    common = {}
    for place in hits[0]:
        own = [by_place[place] for by_place in hits if place in by_place]
        longest = max(len(words_of(text)) for _, text in own)
        if len(own) == len(hits) and longest >= shortest:
            common[place] = min(own)
    return common


def _any_record(row: dict[str, Any]) -> Record | None:
    """Return the row as a record of the likeliest kind, else of any; None if it is none."""
    for kind in dict.fromkeys((schemas.guess_kind(row), *schemas.SCHEMAS)):
        try:
            return schemas.read_row(row, kind).record
        except ValueError:
            continue
    return None


def _ngrams(words: list[str], n: int) -> set[tuple[str, ...]]:
    starts = range(len(words) - n + 1)
    return {tuple(words[start : start + n]) for start in starts}
