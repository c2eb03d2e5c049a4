"""Files, Hub data sets and preference stores -> records, with groups joined and splits assigned.

    train = load("data/prefs.jsonl", Preference, split="train")
    prompts = load("Anthropic/hh-rlhf", Prompt, split="validation", limit=200)

The forms a row may have stand in `forms.py`, what a group and a split are in `split.py`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rlhf.config import UserError
from rlhf.data import schemas as forms
from rlhf.data import sources
from rlhf.data.records import Prompt, Record, digest, prompt_group, tools_of
from rlhf.data.split import assign, check_fractions, half_of, join_groups, some
from rlhf.data.votes import Aggregate

R = TypeVar("R", bound=Record)
_VALUE = re.compile(r"(found (?!columns )|message \d+ (?:is|has role|has content) ).*, expected", re.DOTALL)


def load(
    source: str | list[str],
    kind: type[R],
    *,
    split: Literal["train", "validation", "test"] | None = None,
    half: Literal["all", "a", "b"] = "all",
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    limit: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    aggregate: Aggregate = "each",
    bad: Counter | None = None,
) -> list[R]:
    """The records of one or several sources, in their order, each with its group and split.

    source: a .jsonl, .json, .csv (these also .gz) or .parquet file, a preference store ("votes.db", or "votes.db@118"
        for its state after event 118), a Hub name ("org/name", "org/name:config@split"), or a list of these.
    kind: Prompt, Instruction, Preference or Labelled. A Prompt comes once, however many rows share it.
    split, half: only these records; None and "all" keep everything. Groups are joined over the whole data before
        anything is left out, so no choice made here moves a row to another split.
    limit: at most so many records, by a hash of their group (`split.some`), after everything else.
    on_error: "stop" raises on the first bad row; "skip" leaves bad rows out and counts them on stderr.
    aggregate: how a store's votes become pairs (store.py); nothing else reads it.
    bad: where rows are skipped, this gets their number by reason, and under "read" that of all rows.

    Raises UserError: nothing to read, not a form of `kind`, bad rows, a group with two splits, or no record left for
    `split` None or "train". A small data set may have no validation or test group: then the list is empty.
    """
    check_fractions(validation_fraction, test_fraction)
    for name, value, choices in (
        ("split", split, (None, "train", "validation", "test")),
        ("half", half, ("all", "a", "b")),
        ("on_error", on_error, ("stop", "skip")),
    ):
        if value not in choices:
            raise UserError(f"{name}: found {value!r}, expected one of {', '.join(map(str, choices))}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: found {limit}, expected a whole number from 1 up, or none")
    table = collect(source, kind, aggregate)
    table.complain(on_error)
    if bad is not None and table.bad:
        bad.update({"read": len(table.records) + len(table.bad)} | table.bad_reasons())
    assign(table.records, validation_fraction, test_fraction, table.places)
    records = unique_prompts(table.records) if kind is Prompt else table.records
    records = [r for r in records if split in (None, r.split) and half in ("all", half_of(r.group))]
    if not records and split in (None, "train"):
        raise UserError(
            f"{table.name}: no record is left of {len(table.records)} with split={split or 'any'} and half={half}. "
            "Give more data, or smaller validation_fraction and test_fraction"
        )
    if limit is None:
        return records
    kept = set(map(id, some(records, limit)))
    return [r for r in records if id(r) in kept]


def fingerprint(records: list[Record]) -> str:
    """16 hex digits that name a set of records, for result.json.

    It does not depend on the order of rows or on `source` (a file may lie elsewhere), and on everything else: kind,
    texts, group, split, labels, weight, metadata, and how often a record occurs.
    """
    rows = []
    for record in records:
        fields = {k: v for k, v in vars(record).items() if k not in ("source", "place")}
        rows.append(digest(json.dumps([type(record).__name__, fields], sort_keys=True, default=str)))
    return digest("\n".join(sorted(rows)))


@dataclass
class Bad:
    """A row that could not be read: where, why, and the key under which it is counted with its like."""

    source: str
    place: str
    reason: str
    wrong_form: bool = False

    @property
    def key(self) -> str:
        """The reason without what was found, so that rows with the same fault count together."""
        return re.sub(r"\d+", "N", re.sub(r"found .*?, expected|JSON: .*", "", self.reason))

    @property
    def said(self) -> str:
        """The reason without values, which may be anything, for files that others read."""
        return _VALUE.sub(r"\1..., expected", self.reason)


@dataclass
class Table:
    """What was read: records (groups joined, splits as given), where each stood, and the rows that were bad."""

    kind: type[Record]
    sources: list[str]
    records: list[Record] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    own_group: list[bool] = field(default_factory=list)  # the data names the group
    bad: list[Bad] = field(default_factory=list)
    good: Counter = field(default_factory=Counter)  # by source
    forms: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)  # what may be meant otherwise than it was read: rows
    columns: dict[str, list[str]] = field(default_factory=dict)  # of each source, in order of appearance

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    def named_groups(self) -> set[str]:
        """The groups that the data names; the others may still be joined."""
        return {record.group for record, own in zip(self.records, self.own_group, strict=True) if own}

    def complain(self, on_error: Literal["stop", "skip"]) -> None:
        """Raise on a source that has no row of the right form, on bad rows unless they are skipped, on no rows."""
        for source in self.sources:
            if not self.good[source] and any(b.wrong_form for b in self.bad if b.source == source):
                raise UserError(self.wrong_form(source))
        counts = Counter(bad.key for bad in self.bad)
        if self.bad and on_error == "stop":
            first = self.bad[0]
            such = counts[first.key]
            more = f" ({such} such rows)" if such > 1 else ""
            raise UserError(f"{first.place}: {first.reason}{more}. Drop {_them(such)} with: --on_error skip")
        if not self.records:
            reasons = "; ".join(sorted({bad.reason for bad in self.bad})[:3])
            found = f"{len(self.bad)} bad: {reasons}" if reasons else "; ".join(map(sources.empty, self.sources))
            raise UserError(f"{self.name}: no row to read ({found})")
        if os.environ.get("RANK", "0") == "0":
            for line in (f"skipped {line}" for line in self.bad_summary()):
                print(line, file=sys.stderr, flush=True)
            for line in self.note_summary():
                print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def bad_summary(self) -> list[str]:
        """One line for each kind of fault: how many rows, what, and where first; values are left out, since they may be
        anything, and this is written into files."""
        kinds: dict[tuple[str, str], list[Bad]] = {}
        for bad in self.bad:
            kinds.setdefault((bad.source, bad.key), []).append(bad)
        said = [(len(b), b[0].said, b[0].place) for b in kinds.values()]
        return [f"{count} {_rows(count)}: {reason} (first: {place})" for count, reason, place in said]

    def note_summary(self) -> list[str]:
        """One line for each thing that may be meant otherwise than it was read."""
        return [f"WARNING: {count} {_rows(count)}: {note}" for note, count in self.notes.items()]

    def bad_reasons(self) -> Counter:
        """How many rows were bad for each reason, values left out."""
        first = {bad.key: bad.said for bad in reversed(self.bad)}
        return Counter(first[bad.key] for bad in self.bad)

    def wrong_form(self, source: str) -> str:
        kinds = {forms.guess_kind(row) for row in sources.first_rows(source)}
        other = kinds.pop() if len(kinds) == 1 and kinds != {self.kind} else None
        hint = f" These rows look like {other.__name__}: {forms.FORMS[other]}." if other not in (None, Prompt) else ""
        return (
            f"{source}: found columns {', '.join(self.columns[source]) or 'none'}; "
            f"expected for {self.kind.__name__}: {forms.FORMS[self.kind]}.{hint}"
        )


def collect(source: str | list[str], kind: type[Record], aggregate: Aggregate = "each") -> Table:
    """Read every row of every source; bad rows are kept as such. Groups are joined, splits only as the data gives."""
    if kind not in forms.FORMS:
        raise UserError(f"kind: found {kind!r}, expected one of {', '.join(k.__name__ for k in forms.FORMS)}")
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise UserError("no data source given; expected a file, a preference store or a Hub name")
    table = Table(kind=kind, sources=names)
    rows: list[forms.Row] = []
    for name in names:
        seen: dict[str, None] = {}
        for place, row, problem in sources.rows(name, prompts=kind is Prompt, aggregate=aggregate):
            if problem:
                table.bad.append(Bad(name, place, problem))
                continue
            seen.update(dict.fromkeys(row))
            try:
                rows.append(forms.read(row, kind, source=name))
            except forms.NotThisForm:
                reason = f"found columns {', '.join(row) or 'none'}, expected {forms.FORMS[kind]}"
                table.bad.append(Bad(name, place, reason, wrong_form=True))
            except ValueError as error:
                table.bad.append(Bad(name, place, str(error)))
            else:
                table.good[name] += 1
                table.forms[rows[-1].form] += 1
                table.notes.update(rows[-1].notes)
                table.places.append(place)
                rows[-1].record.place = place
        table.columns[name] = list(seen)
    _join(rows)
    table.records = [row.record for row in rows]
    table.own_group = [row.own_group for row in rows]
    return table


def unique_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """The first of each identical prompt (same messages, tools and voice), in order."""
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        key = json.dumps([prompt.prompt, prompt.voice, tools_of(prompt)], sort_keys=True, default=str)
        seen.setdefault(key, prompt)
    return list(seen.values())


def _join(rows: list[forms.Row]) -> None:
    """Join default groups over shared prompts and answer pairs, in place; a group that the data names stays."""
    free = [row for row in rows if not row.own_group]
    links: list[list[Any]] = []
    for row in free:
        # a store's group already joins several prompts, so the prompt itself is a link too
        links.append([("prompt", prompt_group(row.record.prompt))] + ([("pair", row.pair)] if row.pair else []))
    for row, group in zip(free, join_groups([row.record.group for row in free], links), strict=True):
        row.record.group = group


def _them(count: int) -> str:
    return "them" if count > 1 else "it"


def _rows(count: int) -> str:
    return "rows" if count > 1 else "row"
