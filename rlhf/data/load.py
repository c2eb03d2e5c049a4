"""Files, Hub data sets and preference stores -> records, with groups joined and splits assigned.

    train = load("data/prefs.jsonl", Preference, split="train")
    prompts = load("Anthropic/hh-rlhf", Prompt, split="validation", limit=200)

`schemas.py` says how rows become records, `split.py` what a group and a split are.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rlhf.data import schemas, sources
from rlhf.data.records import Prompt, Record, digest, prompt_group, tools_of
from rlhf.data.split import assign, check_fractions, first_by_hash, half_of, join_groups
from rlhf.data.votes import Aggregate
from rlhf.errors import UserError

R = TypeVar("R", bound=Record)

# What a reason says of the row's own values, which may be anything: "found ..." up to ", expected"
_FOUND = re.compile(
    r"(found (?!columns )|message \d+ (?:is|has role|has content) ).*, expected", re.DOTALL
)
# What differs between reasons that count as one
_SPECIFIC = re.compile(r"found .*?, expected|JSON: .*")
CHOICES = {
    "split": (None, "train", "validation", "test"),
    "half": ("all", "a", "b"),
    "on_error": ("stop", "skip"),
}


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
    quiet: bool = False,
) -> list[R]:
    """Return the records of one or several sources, in their order, each with its group and split.

    source: a .jsonl, .json, .csv (these also .gz) or .parquet file, a preference store ("votes.db",
    or "votes.db@118" for its state after event 118), a Hub name ("org/name",
    "org/name:config@split"), or a list of these.
    kind: Prompt, Instruction, Preference or Labelled. A Prompt comes once, however many rows share
    it. split, half: only these records; None and "all" keep everything. Groups are joined over the
    whole data before anything is left out, so no choice made here moves a row to another split.
    limit: at most this many records, by a hash of their group (`first_by_hash`), after everything
    else.
    on_error: "stop" raises on the first bad row; "skip" leaves bad rows out and counts them on
    stderr.
    aggregate: how a store's votes become pairs (votes.py); nothing else reads it.
    bad: where rows are skipped, this gets their number by reason, and under "read" that of all
    rows.
    quiet: nothing is said of rows that are skipped.

    Raises UserError: nothing to read, no schema of `kind`, bad rows, a group with two splits, or no
    record left for `split` None or "train". A small data set may have no validation or test group:
    then the list is empty.
    """
    check_fractions(validation_fraction, test_fraction)
    for name, value in (("split", split), ("half", half), ("on_error", on_error)):
        if value not in CHOICES[name]:
            raise UserError(
                f"{name}: found {value!r}, expected one of {', '.join(map(str, CHOICES[name]))}"
            )
    if limit is not None and limit < 1:
        raise UserError(f"limit: found {limit}, expected a whole number from 1 up, or none")

    table = read_table(source, kind, aggregate)
    table.check_usable(on_error)
    if not quiet:
        table.say_notes()
    if bad is not None and table.bad:
        bad.update({"read": len(table.records) + len(table.bad)} | table.bad_reasons())
    assign(table.records, validation_fraction, test_fraction, table.places)

    # after the splits, so that the prompts of pairs get the splits of the pairs
    records = unique_prompts(table.records) if kind is Prompt else table.records
    if split is not None:
        records = [record for record in records if record.split == split]
    if half != "all":
        records = [record for record in records if half_of(record.group) == half]
    if not records and split in (None, "train"):
        raise UserError(
            f"{table.name}: no record is left of {len(table.records)} with split={split or 'any'} and half={half}. "
            "Give more data, or smaller validation_fraction and test_fraction"
        )
    if limit is None:
        return records
    # those that are kept stay in the order of the data
    kept = set(map(id, first_by_hash(records, limit)))
    return [record for record in records if id(record) in kept]


def fingerprint(records: list[Record]) -> str:
    """Return 16 hex digits that identify a set of records, for result.json.

    It does not depend on the order of rows or on `source` (a file may be moved), and on everything
    else: kind, texts, group, split, labels, weight, metadata, and how often a record occurs.
    """
    rows = []
    for record in records:
        fields = {
            name: value for name, value in vars(record).items() if name not in ("source", "place")
        }
        # a field that came later: the same rows keep their fingerprint
        if fields.get("tie_prob", 0) is None:
            del fields["tie_prob"]
        rows.append(
            digest(json.dumps([type(record).__name__, fields], sort_keys=True, default=str))
        )
    return digest("\n".join(sorted(rows)))


@dataclass
class BadRow:
    """A row that could not be read: where and why."""

    source: str
    place: str
    reason: str
    wrong_schema: bool = False

    @property
    def key(self) -> str:
        """The reason without numbers and what was found, so that rows with the same fault count
        together.
        """
        return re.sub(r"\d+", "N", _SPECIFIC.sub("", self.reason))

    @property
    def reason_without_values(self) -> str:
        """The reason for files that others read."""
        return _FOUND.sub(r"\1..., expected", self.reason)


@dataclass
class Table:
    """What was read: records (groups joined, splits as given), where each stood, and the rows that
    were bad.
    """

    kind: type[Record]
    sources: list[str]
    records: list[Record] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    # whether the data names the group
    own_group: list[bool] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    # readable rows by source
    good: Counter = field(default_factory=Counter)
    schemas: Counter = field(default_factory=Counter)
    # rows by what may be meant otherwise than it was read
    notes: Counter = field(default_factory=Counter)
    # of each source, in order of appearance
    columns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(self.sources)

    def named_groups(self) -> set[str]:
        """Return the groups that the data names; the others may still be joined."""
        return {
            record.group for record, own in zip(self.records, self.own_group, strict=True) if own
        }

    def check_usable(self, on_error: Literal["stop", "skip"]) -> None:
        """Raise UserError on a source without any row of the kind, on bad rows unless they are
        skipped, on no rows.
        """
        for source in self.sources:
            if not self.good[source] and any(
                row.wrong_schema for row in self.bad if row.source == source
            ):
                raise UserError(self._wrong_schema(source))
        if self.bad and on_error == "stop":
            raise UserError(self._first_bad_row())
        if not self.records:
            reasons = sorted({row.reason for row in self.bad})[:3]
            found = f"{len(self.bad)} bad: {'; '.join(reasons)}"
            if not reasons:
                found = "; ".join(map(sources.why_empty, self.sources))
            raise UserError(f"{self.name}: no row to read ({found})")

    def say_notes(self) -> None:
        """Print what was skipped and what may be meant otherwise on stderr (rank 0)."""
        # every rank reads the data, and one message is enough
        if os.environ.get("RANK", "0") == "0":
            for line in self.bad_summary():
                print(f"skipped {line}", file=sys.stderr, flush=True)
            for source in self.sources:
                # among others that have rows, it would be missed
                if sources.is_store(source) and not self.good[source]:
                    print(f"WARNING: {source}: {sources.why_empty(source)}", file=sys.stderr)
            for line in self.note_summary():
                print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def bad_summary(self) -> list[str]:
        """Return a line for each kind of fault in each source: how many rows, the reason, and where
        first.

        Values are left out, since they may be anything, and this is written into files.
        """
        first: dict[tuple[str, str], BadRow] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for row in self.bad:
            first.setdefault((row.source, row.key), row)
            counts[row.source, row.key] += 1
        lines = []
        for key, row in first.items():
            lines.append(f"{_rows(counts[key])}: {row.reason_without_values} (first: {row.place})")
        return lines

    def note_summary(self) -> list[str]:
        """Return a line for each thing that may be meant otherwise than it was read."""
        return [f"WARNING: {_rows(count)}: {note}" for note, count in self.notes.items()]

    def bad_reasons(self) -> Counter:
        """Return how many rows were bad for each reason, values left out."""
        first: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for row in self.bad:
            counts[first.setdefault(row.key, row.reason_without_values)] += 1
        return counts

    def _first_bad_row(self) -> str:
        first = self.bad[0]
        alike = sum(row.key == first.key for row in self.bad)
        count, them = (f" ({alike} such rows)", "them") if alike > 1 else ("", "it")
        return f"{first.place}: {first.reason}{count}. Drop {them} with: --on_error skip"

    def _wrong_schema(self, source: str) -> str:
        message = (
            f"{source}: found columns {', '.join(self.columns[source]) or 'none'}; "
            f"expected for {self.kind.__name__}: {schemas.SCHEMAS[self.kind]}."
        )
        # a file of pairs given as instructions is the usual mistake: say so
        kinds = set(map(schemas.guess_kind, sources.first_rows(source)))
        if len(kinds) == 1 and not kinds & {self.kind, Prompt}:
            kind = kinds.pop()
            message += f" These rows look like {kind.__name__}: {schemas.SCHEMAS[kind]}."
        return message


def read_table(source: str | list[str], kind: type[Record], aggregate: Aggregate = "each") -> Table:
    """Read every row of every source into a table.

    Bad rows are kept as such. Groups are joined; splits are only those that the data gives.
    """
    if kind not in schemas.SCHEMAS:
        raise UserError(
            f"kind: found {kind!r}, expected one of {', '.join(k.__name__ for k in schemas.SCHEMAS)}"
        )
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise UserError("no data source given; expected a file, a preference store or a Hub name")

    table = Table(kind=kind, sources=names)
    rows: list[schemas.Row] = []
    for name in names:
        columns: dict[str, None] = {}
        for place, columns_of_row, problem in sources.rows(
            name, prompts=kind is Prompt, aggregate=aggregate
        ):
            if problem:
                table.bad.append(BadRow(name, place, problem))
                continue
            # rows may have different columns, so the first one does not tell
            columns.update(dict.fromkeys(columns_of_row))
            try:
                row = schemas.read_row(columns_of_row, kind, source=name)
            except ValueError as error:
                wrong_schema = isinstance(error, schemas.UnknownSchema)
                columns_found = f"found columns {', '.join(columns_of_row) or 'none'}, expected {schemas.SCHEMAS[kind]}"
                reason = columns_found if wrong_schema else str(error)
                table.bad.append(BadRow(name, place, reason, wrong_schema))
                continue
            row.record.place = place
            rows.append(row)
            table.good[name] += 1
            table.schemas[row.schema] += 1
            table.notes.update(row.notes)
        table.columns[name] = list(columns)

    _join_groups(rows)
    for row in rows:
        table.records.append(row.record)
        table.places.append(row.record.place)
        table.own_group.append(row.own_group)
    return table


def unique_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """Return the first of each identical prompt (same messages, tools and voice), in order."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        key = json.dumps(
            [prompt.prompt, prompt.voice, tools_of(prompt)], sort_keys=True, default=str
        )
        first.setdefault(key, prompt)
    return list(first.values())


def _join_groups(rows: list[schemas.Row]) -> None:
    """Join default groups over shared prompts and answer pairs, in place; a group that the data
    names stays.
    """
    free = [row for row in rows if not row.own_group]
    groups: list[str] = []
    links: list[list[Any]] = []
    for row in free:
        # a store's group already joins several prompts, so the prompt itself is a link too
        shared = [("prompt", prompt_group(row.record.prompt))]
        if row.pair:
            shared.append(("pair", row.pair))
        groups.append(row.record.group)
        links.append(shared)
    for row, group in zip(free, join_groups(groups, links), strict=True):
        row.record.group = group


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
