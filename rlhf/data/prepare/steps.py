"""The steps of `rlhf data prepare`, in their order. Each takes rows out of the work and says what it found."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlhf.data import load, sources
from rlhf.data.conversation import answers_of
from rlhf.data.prepare import contamination, duplicates
from rlhf.data.prepare import pii as forms_of
from rlhf.data.prepare.cleaning import clean, each_string, mapped, strings
from rlhf.data.prepare.pii import masked
from rlhf.data.records import SPLITS, Record, RecordError
from rlhf.data.split import join_groups

LARGE_GROUP = 0.1  # share of the rows above which one group is worth a word


@dataclass
class Step:
    """What one step did: its parameters, what it found in words, how many rows it left out, examples."""

    name: str
    parameters: str
    found: str
    dropped: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Work:
    """The rows that are left, where each stood, whether the data named its group, and the steps so far."""

    records: list[Record]
    places: list[str]
    own_group: list[bool]
    examples: int
    regions: Sequence[str] = forms_of.REGIONS  # whose telephone numbers no example shows
    steps: list[Step] = field(default_factory=list)

    def done(self, name: str, parameters: str, found: str, drop: Sequence[int] = (), examples: Sequence[str] = ()):
        """Write a step down and take its rows out."""
        gone = set(drop)
        for column in ("records", "places", "own_group"):
            setattr(self, column, [value for i, value in enumerate(getattr(self, column)) if i not in gone])
        self.steps.append(Step(name, parameters, found, len(gone), list(examples)[: self.examples]))

    def shown(self, i: int) -> list[str]:
        """The texts of a row without personal data: examples are printed and written, whatever becomes of the row."""
        return [masked(clean(text), self.regions) for text in texts(self.records[i])]

    def show(self, i: int) -> str:
        return f"{self.places[i]}: {shorten(' | '.join(self.shown(i)))}"

    def show_two(self, i: int, j: int) -> str:
        """Two rows, as far as they differ."""
        one, other = self.shown(i), self.shown(j)
        differ = [k for k in range(min(len(one), len(other))) if one[k] != other[k]] or [0]
        said = " <> ".join(shorten(text[differ[0]], 55) for text in (one, other))
        return f"{self.places[i]}, {self.places[j]}: {said}"


def read(table: load.Table, aggregate: str) -> Step:
    """What reading found already: rows that are no records, pairs of identical answers among them."""
    same = sum("are the same text" in bad.reason for bad in table.bad)
    found = f"{len(table.records)} rows, {len(table.bad)} that cannot be used"
    found += f" ({same} of them pairs of identical answers)" if same else ""
    parameters = f"as {table.kind.__name__}"
    if any(map(sources.is_store, table.sources)):
        parameters += f", votes by {aggregate}"
    said = [masked(line) for line in [*table.bad_summary(), *table.note_summary()]]
    return Step("read", parameters, found, len(table.bad), said)


def text(work: Work) -> None:
    """Clean every text; rows whose answers become empty or the same go."""
    changed, same, empty = [], [], []
    for i, record in enumerate(work.records):
        try:
            new = mapped(record, clean)
        except RecordError as error:
            (same if "same text" in str(error) else empty).append(i)
            continue
        if texts(new) != texts(record):
            changed.append(i)
        work.records[i] = new
    same += [i for i in duplicates.identical_answers(work.records).drop if i not in same]
    found = f"{len(changed)} rows changed, {len(same)} pairs of identical answers, {len(empty)} empty answers"
    shown = [work.show(i) for i in (same + empty + changed)[: work.examples]]
    work.done("text", "NFC, line ends, invisible characters, blanks at ends", found, same + empty, shown)


def personal(work: Work, action: str, regions: Sequence[str]) -> None:
    """Find personal data in every text and every string of the metadata; mask it, drop its rows, or only report it."""
    counts: Counter = Counter()
    rows, drop, shown = [], [], []
    hide = functools.partial(masked, regions=regions)
    for i, record in enumerate(work.records):
        said = [*texts(record), *strings(record.metadata)]
        found = [place for t in said for place in forms_of.find(t, regions=regions)]
        if not found:
            continue
        rows.append(i)
        counts.update(place.kind for place in found)
        shown.append(f"{work.places[i]}: {_around_mask(next(t for t in map(hide, said) if _MASK.search(t)))}")
        if action == "drop":
            drop.append(i)
        elif action == "mask":
            try:
                work.records[i] = replace(mapped(record, hide), metadata=each_string(record.metadata, hide))
            except RecordError:  # the answers differed in what is masked now
                drop.append(i)
    kinds = ", ".join(f"{kind} {counts[kind]}" for kind in forms_of.KINDS if counts[kind])
    found = f"{counts.total()} places in {len(rows)} rows" + (f": {kinds}" if kinds else "")
    work.done("personal data", f"{action}; telephone numbers of {', '.join(regions)} and +", found, drop, shown)


def repeats(work: Work, threshold: float) -> None:
    """Exact duplicates, contradictions, near duplicates and near contradictions."""

    def take(name: str, parameters: str, found: duplicates.Findings, said: str) -> None:
        shown = [work.show_two(i, j) for i, j in found.examples[: work.examples]]
        work.done(name, parameters, said.format(len(found.examples), len(found.drop)), found.drop, shown)

    same = "texts, label, voice and annotator alike but for white space; the first stays"
    take("exact duplicates", same, duplicates.exact_duplicates(work.records), "{1} rows")
    both = "one question, opposite verdicts; all go but those of different annotators"
    take("contradictions", both, duplicates.contradictions(work.records), "{0} pairs of answers, {1} rows")
    if threshold < 1:
        near = f"prompt and each answer alike: {threshold:g} or more (Jaccard, character 4-grams), the same numbers"
        again, opposite = duplicates.near_duplicates(work.records, threshold)
        shift = sorted(again.drop)
        take("near duplicates", f"{near}; the first stays", again, "{1} rows")
        new = {old: old - sum(d < old for d in shift) for old in opposite.drop}
        opposite.drop = [new[i] for i in opposite.drop]
        opposite.examples = [(new[i], new[j]) for i, j in opposite.examples if i in new and j in new]
        take("near contradictions", f"{near} crosswise; both go", opposite, "{1} rows")


def leaks(work: Work, against: Sequence[str], n: int, overlap: float, near: float) -> None:
    """Rows that hold a prompt of an evaluation, or all of whose answers are its."""
    prompts, said, count = contamination.evaluation_texts(against, n)
    found = contamination.leaks(work.records, prompts, said, overlap, near)
    whole = sum(leak.share == 1.0 for leak in found)
    shown = [
        f"{work.places[leak.row]}: {leak.what} of {leak.where} ({leak.share:.0%}): "
        + shorten(masked(clean(leak.text), work.regions))
        for leak in found[: work.examples]
    ]
    parameters = f"{', '.join(against)} ({count} rows); the same text, {overlap:.0%} of its {n}-grams, or "
    parameters += f"a prompt of similarity {near:g} or more"
    words = f"{len(found)} rows, {whole} of them word for word"
    work.done("leakage", parameters, words, [leak.row for leak in found], shown)


def groups(work: Work, threshold: float) -> None:
    """Rows that share a prompt, nearly so, or an answer pair get one group, and so do a row and another whose prompt
    holds its prompt or answer; a group that the data names stays.

    Where rows of one group were given different splits, those of the split that is held out longest stay.
    """
    before = len({r.group for r in work.records})
    similar = duplicates.similar_prompts(work.records, threshold) if threshold < 1 else []
    known = {frozenset(pair) for pair in similar}
    inside = [pair for pair in duplicates.contained_texts(work.records) if frozenset(pair) not in known]
    free = [i for i, own in enumerate(work.own_group) if not own]
    shared = duplicates.links(work.records, [*similar, *inside])
    joined = join_groups([work.records[i].group for i in free], [shared[i] for i in free])
    for i, group in zip(free, joined, strict=True):
        work.records[i].group = group
    rank: dict[str, int] = {}
    for record in work.records:
        if record.split:
            rank[record.group] = max(rank.get(record.group, 0), SPLITS.index(record.split))
    drop = [i for i, r in enumerate(work.records) if r.split and SPLITS.index(r.split) < rank[r.group]]
    sizes = Counter(record.group for record in work.records)
    largest = max(sizes.values(), default=0)
    found = f"{before} groups before, {len(sizes)} after; the largest has {largest} rows"
    found += f"; {len({i for i, _ in inside})} rows have a text inside another's prompt" if inside else ""
    found += f"; {len(drop)} rows would have given another split away" if drop else ""
    if largest > max(2, LARGE_GROUP * len(work.records)):
        found += ". One group goes to one split as a whole: check that these rows belong together, or raise `near`"
    parameters = "prompt, answer pair, a text inside another's prompt"
    parameters += f", prompts of similarity {threshold:g} or more" if threshold < 1 else ""
    together = [(i, j) for i, j in (*similar, *inside) if work.records[i].group == work.records[j].group]
    if apart := len(similar) + len(inside) - len(together):
        found += f"; {apart} such pairs of rows stay apart, because the data names their groups"
    examples = [work.show_two(i, j) for i, j in together[: work.examples]]
    work.done("groups", parameters, found, drop, examples)


_MASK = re.compile(r"\[(?:" + "|".join(kind.upper() for kind in forms_of.KINDS) + r")\]")


def texts(record: Record) -> list[str]:
    """Every text of a record: its messages, then its answers."""
    spoken = [text for m in record.prompt for text in strings({**m, "role": None})]
    return spoken + list(answers_of(record).values())


def shorten(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _around_mask(text: str, width: int = 40) -> str:
    """The neighbourhood of the first mask, so that an example tells nothing it should not."""
    place = _MASK.search(text)
    assert place is not None
    start, end = max(0, place.start() - width), place.end() + width
    return ("..." if start else "") + " ".join(text[start:end].split()) + ("..." if end < len(text) else "")
