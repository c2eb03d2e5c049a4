"""Rows with the same texts: exactly, nearly, or with the verdict the other way round.

MinHash finds candidates; what decides is the Jaccard index of two texts' sets of character 4-grams,
after Unicode NFKC and collapsing white space; prompts of one group also after case folding. Two
rows are near duplicates if their prompts and, one by one, their answers are that similar and hold
the same numbers. A pair whose own two answers are that similar tests a finer difference, so only an
identical pair is its duplicate.
"""

import functools
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.data.conversation import answers_of, dialogue_text, message_text, turns_of, user_text
from rlhf.data.prepare.cleaning import collapse_spaces, words_of
from rlhf.data.records import Preference, Record, normalise
from rlhf.data.split import answer_pair

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")

SHINGLE = 4
PERMUTATIONS = 120
# Largest share of the pairs at the threshold itself that MinHash may miss; it misses fewer above
MISSED = 1 / 80
# Similarity of prompts with the same words from which opposite verdicts contradict each other
SAME_QUESTION = 0.9
# Similarity from which a third answer counts as the first, where two pairs share the second
SAME_ANSWER = 0.8
# Shortest text, in words, that is looked for inside others
INSIDE = 8
# Candidates whose MinHash estimate is further below the threshold than this are not compared
DOUBT = 0.2


@dataclass
class Findings:
    """Rows to leave out, by index, and examples to show: (row left out, row that stays or
    contradicts).
    """

    drop: list[int] = field(default_factory=list)
    examples: list[tuple[int, int]] = field(default_factory=list)

    def add(self, row: int, other: int) -> None:
        """Leave `row` out because of `other`."""
        self.drop.append(row)
        self.examples.append((row, other))


def shingles(text: str, *, fold_case: bool = True) -> frozenset[str]:
    """Return the character 4-grams of the normalised text; a shorter text is its own and only one."""
    text = normalise(text) if fold_case else with_case(text)
    starts = range(max(1, len(text) - SHINGLE + 1))
    return frozenset(text[start : start + SHINGLE] for start in starts)


def with_case(text: str) -> str:
    """Return `text` in NFKC with collapsed white space; case stays, since "HELLO" may be right and
    "hello" wrong.
    """
    return collapse_spaces(unicodedata.normalize("NFKC", text))


def jaccard(one: frozenset, other: frozenset) -> float:
    common = len(one & other)
    union = len(one) + len(other) - common
    return common / union if union else 1.0


def has_identical_answers(record: Record) -> bool:
    """Return whether this is a pair whose two answers differ in white space alone."""
    return isinstance(record, Preference) and record.chosen.split() == record.rejected.split()


def exact_duplicates(records: Sequence[Record]) -> Findings:
    """Return the rows that repeat texts, voice, label and annotator of an earlier row, white space
    aside.
    """
    found = Findings()
    first: dict[Hashable, int] = {}
    for i, record in enumerate(records):
        texts = tuple(map(collapse_spaces, answers_of(record).values()))
        key = (_question(record), texts, getattr(record, "label", None), record.annotator)
        if first.setdefault(key, i) != i:
            found.add(i, first[key])
    return found


def contradictions(records: Sequence[Record]) -> Findings:
    """Return the rows that contradict others: the same prompt and pair the other way round, or an
    answer good and bad.

    All of them go, since nothing tells which is right. Rows of different named annotators stay:
    that is disagreement, which has its own numbers. Where all are named, only those who contradict
    themselves lose their rows.
    """
    sides: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i, record in enumerate(records):
        if isinstance(record, Preference):
            verdict = collapse_spaces(record.chosen)
            subject = frozenset((verdict, collapse_spaces(record.rejected)))
        elif hasattr(record, "label"):
            subject, verdict = collapse_spaces(record.response), record.label
        else:
            continue
        by_verdict = sides.setdefault((_question(record), subject), {})
        by_verdict.setdefault(verdict, []).append(i)

    found = Findings()
    for by_verdict in sides.values():
        if len(by_verdict) == 2:
            one, other = _contradicting(records, *by_verdict.values())
            if one and other:
                found.drop += one + other
                found.examples.append((one[0], other[0]))
    found.drop.sort()
    return found


def _contradicting(
    records: Sequence[Record], one: list[int], other: list[int]
) -> tuple[list[int], list[int]]:
    """Return the rows of two opposite verdicts that contradict each other, whoever gave them."""
    # people may disagree with each other, but not with themselves
    by_one = {records[i].annotator for i in one}
    by_other = {records[i].annotator for i in other}
    if None in by_one | by_other:
        return one, other
    both = by_one & by_other
    rows = [i for i in one if records[i].annotator in both]
    return rows, [i for i in other if records[i].annotator in both]


def near_duplicates(records: Sequence[Record], threshold: float) -> tuple[Findings, Findings]:
    """Return (repeats, opposites) among rows that are not identical.

    repeats: near duplicates of an earlier row. opposites: rows nearly the other way round of an
    earlier row (chosen like its rejected, the prompt in the same words), both of which go. Rows
    that differ in voice, or come from different named annotators, are not compared.
    """
    repeats, opposites = Findings(), Findings()
    repeated: set[int] = set()
    opposed: set[int] = set()
    for i, candidates in _candidates(list(map(_tagged_shingles, records)), threshold):
        same, against = [], []
        for j in sorted(candidates):
            # its first copy represents it
            if j in repeated or not _comparable(records[i], records[j]):
                continue
            relation = _relation(records[i], records[j], threshold)
            # a row like one that was contradicted is part of the contradiction
            if relation == "opposite" or (relation and j in opposed):
                against.append(j)
            elif relation == "same":
                same.append(j)
        if against:
            opposed.update([i, *against])
            opposites.examples.append((i, against[0]))
        elif same:
            repeated.add(i)
            repeats.add(i, same[0])
    opposites.drop = sorted(opposed)
    return repeats, opposites


def similar_prompts(records: Sequence[Record], threshold: float) -> list[tuple[int, int]]:
    """Return (row, earlier row) for every two different prompts, as the user spoke them, that are
    near duplicates.
    """
    first_row: dict[str, int] = {}
    for i, record in enumerate(records):
        first_row.setdefault(normalise(user_text(record)), i)

    texts, rows = list(first_row), list(first_row.values())
    cached_shingles = functools.lru_cache(maxsize=50_000)(shingles)
    pairs = []
    for i, candidates in _candidates(list(map(shingles, texts)), threshold):
        for j in sorted(candidates):
            if jaccard(cached_shingles(texts[i]), cached_shingles(texts[j])) >= threshold:
                pairs.append((rows[i], rows[j]))
    return pairs


def contained_texts(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Return (row, other row) where a text of the one is inside the other's prompt.

    Texts are the prompt, each user turn of it and the answers, of `INSIDE` words or more; compared
    word for word after case folding.
    """
    by_start: dict[tuple[str, ...], list[tuple[list[str], int]]] = {}
    for i, record in enumerate(records):
        for text in {user_text(record), *turns_of(record, "user"), *answers_of(record).values()}:
            words = words_of(text)
            if len(words) >= INSIDE:
                by_start.setdefault(tuple(words[:INSIDE]), []).append((words, i))

    found: set[tuple[int, int]] = set()
    for j, record in enumerate(records):
        for text in {user_text(record), *(message["content"] for message in record.prompt)}:
            words = words_of(text)
            for start in range(len(words) - INSIDE + 1):
                for inner, i in by_start.get(tuple(words[start : start + INSIDE]), ()):
                    if i != j and words[start : start + len(inner)] == inner:
                        found.add((i, j))
    return sorted(found)


def similar_texts(
    texts: Sequence[str], others: Sequence[str], threshold: float
) -> dict[int, tuple[int, float]]:
    """Return {text: (other, similarity)} by index, the nearest other of each text that has a near
    duplicate there.
    """
    sets = list(map(shingles, (*others, *texts)))
    nearest = {}
    for i, candidates in _candidates(sets, threshold, known=len(others)):
        # of equals the earliest
        share, negative = max((jaccard(sets[i], sets[j]), -j) for j in candidates)
        if share >= threshold:
            nearest[i - len(others)] = (-negative, share)
    return nearest


def links(records: Sequence[Record], pairs: Iterable[tuple[int, int]]) -> list[list[Any]]:
    """Return what each row shares with others, as `join_groups` takes it: prompt, answer pair, and
    `pairs` of rows.
    """
    shared: list[list[Any]] = []
    for record in records:
        # system messages aside: the question is the same
        own: list[Any] = [("prompt", normalise(user_text(record)))]
        if isinstance(record, Preference):
            own.append(("pair", answer_pair(record.chosen, record.rejected)))
        shared.append(own)
    for number, pair in enumerate(pairs):
        for row in pair:
            shared[row].append(("similar", number))
    return shared


def bands(threshold: float) -> int:
    """Return the fewest bands of at most 5 rows that miss at most `MISSED` of the pairs of this
    similarity.

    A pair of similarity s is missed with probability (1 - s^rows)^bands; at 0.7 there are 24 bands.
    """
    for rows in (5, 4, 3, 2):
        count = PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= MISSED:
            return count
    return PERMUTATIONS


def _candidates(
    sets: Sequence[frozenset], threshold: float, known: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yield (i, earlier indices that may be as similar as `threshold`) for each i that has any.
    MinHash with LSH.

    known: with it, only the first `known` sets are candidates, and only the sets after them are
    looked up.
    """
    from rensa import RMinHash, RMinHashLSH
    from tqdm import tqdm

    lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands(threshold))
    sketches: list[Any] = []
    for i, tokens in enumerate(
        tqdm(sets, desc="near duplicates", unit=" rows", delay=5, mininterval=5, leave=False)
    ):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(sorted(tokens))
        if known is None or i >= known:
            near = [
                j for j in lsh.query(sketch) if sketch.jaccard(sketches[j]) >= threshold - DOUBT
            ]
            if near:
                yield i, near
        if known is None or i < known:
            lsh.insert(i, sketch)
            sketches.append(sketch)


def _relation(one: Record, other: Record, threshold: float) -> Literal["same", "opposite"] | None:
    """Return how two rows relate: near duplicates, near contradictions, or neither."""
    question = _similarity(dialogue_text(one), dialogue_text(other))
    if question < threshold:
        return None
    same, crossed = _answer_similarities(one, other, threshold)
    if max(same, crossed) < threshold:
        return None
    if same >= crossed:
        return "same"
    # "Is a cat a pet?" and "Is a rock a pet?" may well have opposite answers
    words = [set(_WORD.findall(with_case(dialogue_text(record)))) for record in (one, other)]
    return "opposite" if question >= SAME_QUESTION and words[0] == words[1] else None


def _answer_similarities(one: Record, other: Record, threshold: float) -> tuple[float, float]:
    """Return the least similarity of the answers side by side, and crosswise; (0, 0) where they
    cannot be compared.
    """
    a, b = list(answers_of(one).values()), list(answers_of(other).values())
    if len(a) < 2:
        alike = _similarity(a[0], b[0]) if a else 1.0
        same_label = getattr(one, "label", None) == getattr(other, "label", None)
        return (alike, 0.0) if same_label else (0.0, alike)

    # rows of a ranking of similar answers
    if max(_similarity(*a), _similarity(*b)) >= threshold:
        return 0.0, 0.0
    same = min(_similarity(a[0], b[0]), _similarity(a[1], b[1]))
    crossed = min(_similarity(a[0], b[1]), _similarity(a[1], b[0]))
    # one answer in common: the first may be better than a second that is better than a third
    shares_one = (a[0] == b[1]) != (a[1] == b[0])
    return same, 0.0 if shares_one and crossed < SAME_ANSWER else crossed


def _similarity(one: str, other: str) -> float:
    """Return the Jaccard index of two texts, 0 if their numbers differ: "10 in binary" is not "5 in
    binary".
    """
    if one == other:
        return 1.0
    if _NUMBER.findall(one) != _NUMBER.findall(other):
        return 0.0
    return jaccard(_cased_shingles(one), _cased_shingles(other))


@functools.lru_cache(maxsize=20_000)
def _cased_shingles(text: str) -> frozenset[str]:
    return shingles(text, fold_case=False)


def _tagged_shingles(record: Record) -> frozenset[str]:
    """Return the shingles of prompt and answers, kept apart: if both are similar, so is the whole."""
    prompt = shingles(dialogue_text(record), fold_case=False)
    answers = shingles("\n".join(answers_of(record).values()), fold_case=False)
    return frozenset(map("p".__add__, prompt)) | frozenset(map("a".__add__, answers))


def _comparable(one: Record, other: Record) -> bool:
    if one.voice != other.voice:
        return False
    return one.annotator == other.annotator or None in (one.annotator, other.annotator)


def _question(record: Record) -> tuple[str | None, str]:
    """Return the voice and the whole prompt with its system message, white space collapsed."""
    lines = [
        f"{message['role']}: {collapse_spaces(message_text(message))}" for message in record.prompt
    ]
    return record.voice, "\n".join(lines)
