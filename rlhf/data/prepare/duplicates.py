"""Rows that say the same: exactly, nearly, or the other way round.

MinHash finds candidates; what decides is the Jaccard index of two texts' sets of character 4-grams, after Unicode NFKC
and collapsing white space; prompts of one group also after case folding. Two rows are near duplicates if their prompts
and, one by one, their answers are that similar and hold the same numbers. A pair whose own two answers are that similar
says something finer, and is compared with others word for word alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.conversation import answers_of, dialogue_text, message_text, user_text
from rlhf.data.records import Preference, Record, digest, normalise
from rlhf.data.split import answer_pair

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")
SHINGLE = 4
PERMUTATIONS = 120
MISSED = 1 / 80  # at most so many pairs at the threshold itself that MinHash may not find; fewer above
SAME_QUESTION = 0.9  # similarity of prompts with the same words from which opposite verdicts contradict
SAME_ANSWER = 0.8  # similarity from which a third answer is the first, where two pairs share the second
INSIDE = 8  # words that a text has at least to be looked for inside others
DOUBT = 0.2  # candidates whose MinHash estimate is further below the threshold are not looked at


@dataclass
class Findings:
    """Rows to leave out, by index; and examples to show: (row left out, row that stays or contradicts)."""

    drop: list[int] = field(default_factory=list)
    examples: list[tuple[int, int]] = field(default_factory=list)


def shingles(text: str, *, fold_case: bool = True) -> frozenset[str]:
    """Character 4-grams of the normalised text; a shorter text is its own and only one."""
    text = normalise(text) if fold_case else with_case(text)
    return frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def with_case(text: str) -> str:
    """Unicode NFKC, white space collapsed: "HELLO" may be the right answer, and "hello" the wrong one."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def jaccard(one: frozenset, other: frozenset) -> float:
    common = len(one & other)
    union = len(one) + len(other) - common
    return common / union if union else 1.0


def identical_answers(records: Sequence[Record]) -> Findings:
    """Pairs whose two answers differ in white space alone."""
    found = Findings()
    for i, record in enumerate(records):
        if isinstance(record, Preference) and record.chosen.split() == record.rejected.split():
            found.drop.append(i)
            found.examples.append((i, i))
    return found


def exact_duplicates(records: Sequence[Record]) -> Findings:
    """Rows whose texts, voice, label and annotator repeat those of an earlier row, however they are spaced."""
    found, first = Findings(), {}
    for i, record in enumerate(records):
        key = _key(record, [" ".join(text.split()) for text in answers_of(record).values()])
        if first.setdefault(key, i) != i:
            found.drop.append(i)
            found.examples.append((i, first[key]))
    return found


def contradictions(records: Sequence[Record]) -> Findings:
    """Rows that say the opposite of others: the same prompt and pair the other way round, or the same labelled answer
    good and bad. All of them go, since nothing says which is right.

    Rows of different named annotators are not touched: that is disagreement, and it has its own numbers. Where all are
    named, only those who contradict themselves lose theirs.
    """
    sides: dict[Any, dict[Any, list[int]]] = {}
    for i, record in enumerate(records):
        if isinstance(record, Preference):
            said = " ".join(record.chosen.split())
            pair = digest("\x00".join(sorted((said, " ".join(record.rejected.split())))))
            sides.setdefault((_question(record), pair), {}).setdefault(said, []).append(i)
        elif hasattr(record, "label"):
            answer = " ".join(record.response.split())
            sides.setdefault((_question(record), answer), {}).setdefault(record.label, []).append(i)
    found = Findings()
    for by_side in sides.values():
        if len(by_side) == 2:
            names = [{records[i].annotator for i in side} for side in by_side.values()]
            both, all_named = names[0] & names[1], None not in names[0] | names[1]
            one, other = (
                [i for i in side if not all_named or records[i].annotator in both] for side in by_side.values()
            )
            if one and other:
                found.drop += one + other
                found.examples.append((one[0], other[0]))
    found.drop.sort()
    return found


def near_duplicates(records: Sequence[Record], threshold: float) -> tuple[Findings, Findings]:
    """(repeats, opposites) among rows that differ: near duplicates of an earlier row, and rows nearly the other way
    round of an earlier row (chosen like its rejected; the prompt in the same words), which both go.

    Rows that differ in voice, or come from different named annotators, are not compared.
    """
    parts = [_parts(record) for record in records]
    repeats, opposites = Findings(), Findings()
    repeated: set[int] = set()
    opposed: set[int] = set()
    for i, candidates in _candidates([_tagged(texts) for texts in parts], threshold):
        standing = [j for j in sorted(candidates) if j not in repeated and _comparable(records[i], records[j])]
        relations = {j: _relation(records[i], records[j], threshold) for j in standing}
        # what is like a row that was contradicted is part of the contradiction
        against = [j for j, found in relations.items() if found == "opposite" or (found and j in opposed)]
        same = [j for j, found in relations.items() if found == "same"]
        if against:
            opposed |= {i, *against}
            opposites.examples.append((i, against[0]))
        elif same:
            repeated.add(i)
            repeats.drop.append(i)
            repeats.examples.append((i, same[0]))
    opposites.drop = sorted(opposed)
    return repeats, opposites


def similar_prompts(records: Sequence[Record], threshold: float) -> list[tuple[int, int]]:
    """(row, earlier row) for each two different prompts, as the user spoke them, that are near duplicates."""
    texts: dict[str, int] = {}
    for i, record in enumerate(records):
        texts.setdefault(normalise(user_text(record)), i)
    rows, sets = list(texts.values()), functools.lru_cache(maxsize=50_000)(shingles)
    words = list(texts)
    return [
        (rows[i], rows[j])
        for i, candidates in _candidates([shingles(text) for text in words], threshold)
        for j in sorted(candidates)
        if jaccard(sets(words[i]), sets(words[j])) >= threshold
    ]


def contained_texts(records: Sequence[Record]) -> list[tuple[int, int]]:
    """(row, other row) where the one's prompt, a user's turn of it, or an answer stands inside the other's prompt.

    Word for word, after case folding; of texts of `INSIDE` words or more.
    """
    by_start: dict[tuple[str, ...], list[tuple[list[str], int]]] = {}
    for i, record in enumerate(records):
        turns = [m["content"] for m in record.prompt if m["role"] == "user"]
        for text in {user_text(record), *turns, *answers_of(record).values()}:
            words = _WORD.findall(normalise(text))
            if len(words) >= INSIDE:
                by_start.setdefault(tuple(words[:INSIDE]), []).append((words, i))
    found: set[tuple[int, int]] = set()
    for j, record in enumerate(records):
        for text in {user_text(record), *(m["content"] for m in record.prompt)}:
            words = _WORD.findall(normalise(text))
            for start in range(len(words) - INSIDE + 1):
                for inner, i in by_start.get(tuple(words[start : start + INSIDE]), ()):
                    if i != j and words[start : start + len(inner)] == inner:
                        found.add((i, j))
    return sorted(found)


def similar_texts(texts: Sequence[str], others: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """For each text that is a near duplicate of one of the others: which (the nearest), and their similarity."""
    sets = [shingles(text) for text in (*others, *texts)]
    found = {}
    for i, candidates in _candidates(sets, threshold, known=len(others)):
        share, j = max((jaccard(sets[i], sets[j]), -j) for j in candidates)
        if share >= threshold:
            found[i - len(others)] = (-j, share)
    return found


def links(records: Sequence[Record], pairs: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """For each row what it shares with others, as `join_groups` takes it: prompt, answer pair, similar prompts."""
    shared: list[list[Any]] = []
    for record in records:
        shared.append([("prompt", normalise(user_text(record)))])
        if isinstance(record, Preference):
            shared[-1].append(("pair", answer_pair(record.chosen, record.rejected)))
    for number, (i, j) in enumerate(pairs):
        for row in (i, j):
            shared[row].append(("similar", number))
    return shared


def bands(threshold: float) -> int:
    """The fewest bands of up to 5 rows that find a pair of this similarity but for a share `MISSED`: 24 at 0.7.

    A pair of similarity s is missed with probability (1 - s^rows)^bands.
    """
    fits = (PERMUTATIONS // r for r in (5, 4, 3, 2) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED)
    return next(fits, PERMUTATIONS)


def _candidates(
    sets: Sequence[frozenset], threshold: float, known: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """(i, earlier indices that may be as similar as `threshold`), for each i that has some. MinHash with LSH.

    known: only the first so many are looked for, among all that come after them.
    """
    from rensa import RMinHash, RMinHashLSH
    from tqdm import tqdm

    lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands(threshold))
    sketches: list[Any] = []
    for i, tokens in enumerate(tqdm(sets, desc="near duplicates", unit=" rows", delay=5, mininterval=5, leave=False)):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(sorted(tokens))
        if known is None or i >= known:
            found = [j for j in lsh.query(sketch) if sketch.jaccard(sketches[j]) >= threshold - DOUBT]
            if found:
                yield i, found
        if known is None or i < known:
            lsh.insert(i, sketch)
            sketches.append(sketch)


def _relation(one: Record, other: Record, threshold: float) -> str | None:
    """ "same", "opposite" or None. "Is a cat a pet?" and "Is a rock a pet?" may well have opposite answers."""
    question = _alike(dialogue_text(one), dialogue_text(other))
    if question < threshold:
        return None
    a, b = list(answers_of(one).values()), list(answers_of(other).values())
    if len(a) == 2 and max(_alike(*a), _alike(*b)) >= threshold:
        return None  # rows of a ranking of similar answers
    same = min((_alike(x, y) for x, y in zip(a, b, strict=True)), default=1.0)
    if len(a) < 2:
        crossed = same if getattr(one, "label", None) != getattr(other, "label", None) else 0.0
        same = same if not crossed else 0.0
    else:
        crossed = min(_alike(a[0], b[1]), _alike(a[1], b[0]))
        if (a[0] == b[1]) != (a[1] == b[0]) and crossed < SAME_ANSWER:
            crossed = 0.0  # one is better than a second, which is better than a third
    if max(same, crossed) < threshold:
        return None
    if same >= crossed:
        return "same"
    words = [set(_WORD.findall(with_case(dialogue_text(record)))) for record in (one, other)]
    return "opposite" if question >= SAME_QUESTION and words[0] == words[1] else None


@functools.lru_cache(maxsize=20_000)
def _shingles(text: str) -> frozenset[str]:
    return shingles(text, fold_case=False)


def _alike(one: str, other: str) -> float:
    """Similarity, 0 where the numbers differ: "10 in binary" is not "5 in binary"."""
    if one == other:
        return 1.0
    return jaccard(_shingles(one), _shingles(other)) if _NUMBER.findall(one) == _NUMBER.findall(other) else 0.0


def _parts(record: Record) -> tuple[str, str]:
    return dialogue_text(record), "\n".join(answers_of(record).values())


def _tagged(parts: tuple[str, str]) -> frozenset[str]:
    """Shingles of the prompt and of the answers, kept apart: if both are similar, so is the whole."""
    return frozenset(
        f"{tag}{shingle}" for tag, text in zip("pa", parts, strict=True) for shingle in shingles(text, fold_case=False)
    )


def _comparable(one: Record, other: Record) -> bool:
    named = None not in (one.annotator, other.annotator)
    return one.voice == other.voice and not (named and one.annotator != other.annotator)


def _question(record: Record) -> str:
    """The prompt with its system message, and the voice."""
    whole = "\n".join(f"{m['role']}: {' '.join(message_text(m).split())}" for m in record.prompt)
    return f"{record.voice}\x00{whole}"


def _key(record: Record, texts: list[str]) -> str:
    return digest("\x00".join([_question(record), *texts, str(getattr(record, "label", "")), str(record.annotator)]))
