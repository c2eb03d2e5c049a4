"""Rows that would give an evaluation away: its prompts or answers, word for word, nearly, or in long pieces.

A row leaks if its prompt, or a user's turn of it, is a prompt or turn of the evaluation, or if its answers (of a pair
both) are those of one row of the evaluation and one of them has n words or more. It leaks too if a prompt of the
evaluation, or an answer of n words or more, stands inside its prompt, in whatever turn, or its prompt of n words or
more inside one of the evaluation. Texts are compared after Unicode NFKC and case folding, as words. A
text of the evaluation also counts as present where a share `overlap` of its n-grams stands in one text of the row
(compare Brown et al. 2020, appendix C, and Chowdhery et al. 2022, section 8: longer n-grams, longer texts); a text of
five words up to n is one n-gram. A prompt also counts where it is a near duplicate as duplicates.py has it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import UserError
from rlhf.data import schemas as forms
from rlhf.data import sources
from rlhf.data.conversation import answers_of, user_text
from rlhf.data.prepare.cleaning import clean
from rlhf.data.prepare.duplicates import similar_texts
from rlhf.data.records import Record, normalise

_WORD = re.compile(r"\w+")
SHORTEST = 5  # words; what is shorter is only looked for as a whole text


@dataclass
class Leak:
    """Row `row` of the data and the text of the evaluation that it holds, and how much of it (1: all)."""

    row: int
    what: str  # "prompt" or "answer"
    where: str  # file and row of the evaluation
    share: float
    text: str


@dataclass
class Index:
    """The texts of an evaluation: whole, and by n-gram."""

    n: int
    exact: dict[str, int] = field(default_factory=dict)
    grams: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)  # of the n-grams: n, and those of shorter texts
    sizes: list[int] = field(default_factory=list)  # distinct n-grams of each text
    texts: list[str] = field(default_factory=list)
    places: list[list[str]] = field(default_factory=list)  # the rows that have the text

    def add(self, text: str, place: str) -> None:
        key = normalise(text)
        if key in self.exact:
            self.places[self.exact[key]].append(place)
        elif key:
            number = self.exact[key] = len(self.sizes)
            words = _WORD.findall(key)
            own = _grams(words, min(self.n, len(words))) if len(words) >= SHORTEST else set()
            for gram in own:
                self.grams.setdefault(gram, []).append(number)
                self.lengths.add(len(gram))
            self.sizes.append(len(own))
            self.texts.append(text)
            self.places.append([place])

    def hits(self, text: str, overlap: float, inside: bool = False) -> dict[str, tuple[float, str]]:
        """By row of the evaluation: (share, its text) of what `text` holds of it; the same text has share 1.

        inside: or what its text holds of `text`, whichever is more.
        """
        key = normalise(text)
        words = _WORD.findall(key)
        own = set().union(*(_grams(words, length) for length in self.lengths))
        counts = Counter(number for gram in own for number in self.grams.get(gram, ()))
        shares = {number: count / self.sizes[number] for number, count in counts.items()}
        if inside and len(words) >= self.n:
            long = _grams(words, self.n)
            held = Counter(number for gram in long for number in self.grams.get(gram, ()))
            shares |= {number: max(shares[number], count / len(long)) for number, count in held.items()}
        if key in self.exact:
            shares[self.exact[key]] = 1.0
        found: dict[str, tuple[float, str]] = {}
        for number, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
            if share >= overlap:
                for place in self.places[number]:
                    found.setdefault(place, (share, self.texts[number]))
        return found


def evaluation_texts(names: Sequence[str], n: int) -> tuple[Index, Index, int]:
    """(prompts, answers, rows) of evaluation sources of any form. Raises UserError on what cannot be read at all."""
    prompts, said, count = Index(n), Index(n), 0
    for name in names:
        bad, good = 0, 0
        for place, row, problem in sources.rows(name):
            record = None if problem else _record(row)
            if record is None:
                bad += 1
                continue
            good += 1
            prompts.add(clean(user_text(record)), place)
            turns = [m["content"] for m in record.prompt if m["role"] == "user"]
            for number, turn in enumerate(turns):
                if number == 0 or len(_WORD.findall(turn)) >= n:  # "Go on." is everybody's later turn
                    prompts.add(clean(turn), place)
            before = [m["content"] for m in record.prompt if m["role"] == "assistant"]
            for text in (*before, *answers_of(record).values()):
                said.add(clean(text), place)
        if not good:
            raise UserError(f"{name}: no row of this evaluation can be read ({bad} bad); see: rlhf data show {name}")
        count += good
    return prompts, said, count


def leaks(records: Sequence[Record], prompts: Index, said: Index, overlap: float, near: float = 1.0) -> list[Leak]:
    """One entry for each row that leaks, in order; `near` 1: near duplicates of prompts do not count."""
    similar = similar_texts([user_text(record) for record in records], prompts.texts, near) if near < 1 else {}
    found = []
    for i, record in enumerate(records):
        texts = list(answers_of(record).values())
        leak = None
        for turn in _turns(record):
            leak = leak or _leak(i, "prompt", [turn], prompts, overlap, inside=True)
        if leak is None and i in similar:
            number, share = similar[i]
            leak = Leak(i, "prompt", prompts.places[number][0], share, prompts.texts[number])
        for held in (texts, *([m["content"]] for m in record.prompt)):
            leak = leak or _leak(i, "answer", held, said, overlap, shortest=said.n)  # "Yes." is everybody's answer
        if leak:
            found.append(leak)
    return found


def _turns(record: Record) -> list[str]:
    """What the user said together and turn by turn, and other turns that are long enough to be somebody's own."""
    others = [m["content"] for m in record.prompt if m["role"] != "user"]
    turns = [m["content"] for m in record.prompt if m["role"] == "user"]
    return list(dict.fromkeys([user_text(record), *turns, *(t for t in others if len(_WORD.findall(t)) >= SHORTEST)]))


def _leak(
    row: int,
    what: str,
    texts: Sequence[str],
    index: Index,
    overlap: float,
    *,
    shortest: int = 0,
    inside: bool = False,
) -> Leak | None:
    """A row of the evaluation that all texts hold something of, one of them of `shortest` words or more."""
    if not texts:
        return None
    hits = [index.hits(text, overlap, inside) for text in texts]
    common = {
        place: min(hit[place] for hit in hits)
        for place in hits[0]
        if all(place in hit for hit in hits) and max(len(_WORD.findall(hit[place][1])) for hit in hits) >= shortest
    }
    if not common:
        return None
    place = max(common, key=lambda name: common[name][0])
    return Leak(row, what, place, *common[place])


def _record(row: dict[str, Any]) -> Record | None:
    kind = forms.guess_kind(row)
    for attempt in dict.fromkeys((kind, *forms.FORMS)):
        try:
            return forms.read(row, attempt).record
        except ValueError:
            continue
    return None


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
