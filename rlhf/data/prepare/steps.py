"""The steps of `rlhf data prepare`, in their order. Each removes rows from the work and records
what it found.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from rlhf.data import load, sources
from rlhf.data.prepare import contamination, duplicates, pii
from rlhf.data.prepare.cleaning import clean, map_strings, map_texts, strings_in, texts_of
from rlhf.data.records import SPLITS, Record, RecordError
from rlhf.data.split import join_groups
from rlhf.text import clip

# Share of the rows above which the step warns of one large group
LARGE_GROUP = 0.1
_MASK = re.compile(rf"\[(?:{'|'.join(pii.KINDS).upper()})\]")


@dataclass
class Step:
    """What one step did: its parameters, what it found in words, how many rows it left out,
    examples.
    """

    name: str
    parameters: str
    found: str
    dropped: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Work:
    """The rows that are left, where each stood, whether the data named its group, and the steps so
    far.
    """

    records: list[Record]
    places: list[str]
    own_group: list[bool]
    examples: int
    # the countries whose telephone numbers are masked in examples
    regions: Sequence[str] = pii.REGIONS
    steps: list[Step] = field(default_factory=list)

    def add(
        self,
        name: str,
        parameters: str,
        found: str,
        drop: Iterable[int] = (),
        examples: Iterable[str] = (),
    ) -> None:
        """Record a step. Its rows stay until `remove`, so that several steps may look at the same
        rows.
        """
        self.steps.append(
            Step(name, parameters, found, len(set(drop)), list(examples)[: self.examples])
        )

    def remove(self, drop: Iterable[int]) -> None:
        gone = set(drop)
        left = [i for i in range(len(self.records)) if i not in gone]
        for column in (self.records, self.places, self.own_group):
            column[:] = [column[i] for i in left]

    def show(self, i: int) -> str:
        return f"{self.places[i]}: {clip(' | '.join(self._shown(i)), 110)}"

    def show_two(self, i: int, j: int) -> str:
        """Return the first text in which two rows differ, of both."""
        one, other = self._shown(i), self._shown(j)
        texts = next(
            (pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]),
            (one[0], other[0]),
        )
        return (
            f"{self.places[i]}, {self.places[j]}: {' <> '.join(clip(text, 55) for text in texts)}"
        )

    def show_pairs(self, pairs: Sequence[tuple[int, int]]) -> list[str]:
        return [self.show_two(i, j) for i, j in pairs[: self.examples]]

    def _shown(self, i: int) -> list[str]:
        """Return the texts of a row without personal data, which is never shown, whatever becomes
        of the row.
        """
        return [pii.masked(clean(text), self.regions) for text in texts_of(self.records[i])]


def report_reading(table: load.Table, aggregate: str) -> Step:
    """Return what reading found: rows that are not records, pairs of identical answers among them."""
    found = f"{len(table.records)} rows, {len(table.bad)} that cannot be used"
    identical = sum("are the same text" in bad.reason for bad in table.bad)
    if identical:
        found += f" ({identical} of them pairs of identical answers)"
    parameters = f"as {table.kind.__name__}"
    if any(map(sources.is_store, table.sources)):
        parameters += f", votes by {aggregate}"
    examples = list(map(pii.masked, table.bad_summary() + table.note_summary()))
    return Step("read", parameters, found, len(table.bad), examples)


def clean_texts(work: Work) -> None:
    """Clean every text; rows whose answers become empty or the same are removed."""
    changed, identical, empty = [], [], []
    for i, record in enumerate(work.records):
        try:
            cleaned = map_texts(record, clean)
        except RecordError as error:
            # a record refuses both, and the card counts them apart
            (identical if "same text" in str(error) else empty).append(i)
            continue
        if texts_of(cleaned) != texts_of(record):
            changed.append(i)
        work.records[i] = cleaned

    # pairs that differ in white space alone
    for i, record in enumerate(work.records):
        if i not in identical and duplicates.has_identical_answers(record):
            identical.append(i)
    found = f"{len(changed)} rows changed, {len(identical)} pairs of identical answers, {len(empty)} empty answers"
    examples = map(work.show, (identical + empty + changed)[: work.examples])
    work.add(
        "text",
        "NFC, line ends, invisible characters, blanks at ends",
        found,
        identical + empty,
        examples,
    )
    work.remove(identical + empty)


def exclude_contaminated(
    work: Work, against: Sequence[str], n: int, overlap: float, near: float
) -> None:
    """Remove rows that hold a prompt of an evaluation, or all of whose answers are those of one of
    its rows.
    """
    evaluation = contamination.read_evaluation(against, n)
    leaks = contamination.find_leaks(work.records, evaluation, overlap, near)

    examples = []
    for leak in leaks[: work.examples]:
        text = clip(pii.masked(clean(leak.text), work.regions), 110)
        examples.append(
            f"{work.places[leak.row]}: {leak.what} of {leak.where} ({leak.share:.0%}): {text}"
        )
    # a copy is certain, a share is a judgement: both are told
    verbatim = sum(leak.share == 1.0 for leak in leaks)
    parameters = (
        f"{', '.join(against)} ({evaluation.rows} rows); the same text, {overlap:.0%} of its {n}-grams, or "
        f"a prompt of similarity {near:g} or more"
    )
    drop = [leak.row for leak in leaks]
    work.add(
        "contamination",
        parameters,
        f"{len(leaks)} rows, {verbatim} of them word for word",
        drop,
        examples,
    )
    work.remove(drop)


def handle_personal_data(work: Work, action: str) -> None:
    """Find personal data in texts and in strings of the metadata; mask it, drop its rows, or only
    report it.
    """
    hide = functools.partial(pii.masked, regions=work.regions)
    counts: Counter[str] = Counter()
    drop, examples = [], []
    for i, record in enumerate(work.records):
        example = ""
        for text in (*texts_of(record), *strings_in(record.metadata)):
            found = pii.find(text, regions=work.regions)
            counts.update(place.kind for place in found)
            if found and not example:
                example = f"{work.places[i]}: {_around_mask(pii.mask(text, found))}"
        if not example:
            continue
        examples.append(example)
        if action == "drop":
            drop.append(i)
        elif action == "mask":
            try:
                work.records[i] = replace(
                    map_texts(record, hide), metadata=map_strings(record.metadata, hide)
                )
            except RecordError:
                # the answers differed only in what is masked now
                drop.append(i)

    said = f"{counts.total()} places in {len(examples)} rows"
    kinds = [f"{kind} {counts[kind]}" for kind in pii.KINDS if counts[kind]]
    if kinds:
        said += f": {', '.join(kinds)}"
    parameters = f"{action}; telephone numbers of {', '.join(work.regions)} and +"
    work.add("personal data", parameters, said, drop, examples)
    work.remove(drop)


def deduplicate(work: Work, threshold: float) -> None:
    """Remove exact duplicates, contradictions, near duplicates and near contradictions."""
    exact = duplicates.exact_duplicates(work.records)
    parameters = "texts, label, voice and annotator alike but for white space; the first stays"
    _add_findings(work, "exact duplicates", parameters, exact)
    work.remove(exact.drop)

    opposite = duplicates.contradictions(work.records)
    parameters = "one question, opposite verdicts; all go but those of different annotators"
    pairs = f"{len(opposite.examples)} pairs of answers, "
    _add_findings(work, "contradictions", parameters, opposite, pairs)
    work.remove(opposite.drop)

    if threshold < 1:
        near, turned = duplicates.near_duplicates(work.records, threshold)
        alike = f"prompt and each answer alike: {threshold:g} or more (Jaccard, character 4-grams), the same numbers"
        _add_findings(work, "near duplicates", f"{alike}; the first stays", near)
        _add_findings(work, "near contradictions", f"{alike} crosswise; both go", turned)
        work.remove(near.drop + turned.drop)


def _add_findings(
    work: Work, name: str, parameters: str, found: duplicates.Findings, more: str = ""
) -> None:
    """Record a step that found rows like other rows."""
    said = f"{more}{len(found.drop)} rows"
    work.add(name, parameters, said, found.drop, work.show_pairs(found.examples))


def join_groups_of_similar_rows(work: Work, threshold: float) -> None:
    """Give rows one group that share a prompt, nearly so, or an answer pair, or of which one's text
    is in the other.

    A group that the data names stays. Where rows of one group were given different splits, those of
    the split that is held out longest stay.
    """
    before = len({record.group for record in work.records})
    similar = duplicates.similar_prompts(work.records, threshold) if threshold < 1 else []
    # a pair that is similar anyway is not counted a second time
    known = set(map(frozenset, similar))
    inside = [
        pair for pair in duplicates.contained_texts(work.records) if frozenset(pair) not in known
    ]
    pairs = [*similar, *inside]

    # what the data calls a group is not ours to change
    free = [i for i, own in enumerate(work.own_group) if not own]
    links = duplicates.links(work.records, pairs)
    joined = join_groups([work.records[i].group for i in free], [links[i] for i in free])
    for i, group in zip(free, joined, strict=True):
        work.records[i].group = group

    drop = _given_away(work.records)
    sizes = Counter(record.group for record in work.records)
    largest = max(sizes.values(), default=0)
    together = [(i, j) for i, j in pairs if work.records[i].group == work.records[j].group]
    apart = len(pairs) - len(together)

    found = f"{before} groups before, {len(sizes)} after; the largest has {largest} rows"
    if inside:
        found += f"; {len(dict(inside))} rows have a text inside another's prompt"
    if drop:
        found += f"; {len(drop)} rows would have leaked into another split"
    if largest > max(2, LARGE_GROUP * len(work.records)):
        found += ". One group goes to one split as a whole: check that these rows belong together, or raise `near`"
    if apart:
        found += f"; {apart} such pairs of rows stay apart, because the data names their groups"
    parameters = "prompt, answer pair, a text inside another's prompt"
    if threshold < 1:
        parameters += f", prompts of similarity {threshold:g} or more"
    work.add("groups", parameters, found, drop, work.show_pairs(together))
    work.remove(drop)


def _given_away(records: Sequence[Record]) -> list[int]:
    """Return the rows whose group also has rows that were given a split that is held out longer."""
    longest: dict[str, int] = {}
    given = [
        (i, record.group, SPLITS.index(record.split))
        for i, record in enumerate(records)
        if record.split
    ]
    for _, group, rank in given:
        longest[group] = max(rank, longest.get(group, 0))
    return [i for i, group, rank in given if rank < longest[group]]


def _around_mask(text: str, width: int = 40) -> str:
    """Return the first mask and what is around it."""
    place = _MASK.search(text)
    assert place is not None
    start, end = max(0, place.start() - width), place.end() + width
    before, after = "..." if start else "", "..." if end < len(text) else ""
    return before + " ".join(text[start:end].split()) + after
