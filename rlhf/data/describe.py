"""`rlhf data show FILE`: what is in a data source, before anything is trained on it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import UserError, option
from rlhf.data import load, sources
from rlhf.data import schemas as forms
from rlhf.data.conversation import message_text
from rlhf.data.records import Instruction, Labelled, Preference, Prompt, Record
from rlhf.data.split import assign

KINDS = {"prompt": Prompt, "instruction": Instruction, "preference": Preference, "labelled": Labelled}


@dataclass
class DescribeConfig:
    """Show what a data source holds: forms, rows, groups, splits, lengths, duplicates, bad rows, examples."""

    source: list[str] = option(help="file, preference store or Hub name, or several with commas between")
    kind: Literal["auto", "prompt", "instruction", "preference", "labelled"] = option(
        "auto", "read the rows as this kind of record; auto goes by the columns of the first row"
    )
    validation_fraction: float = option(0.05, "share of the groups that is held out for validation", low=0, high=1)
    test_fraction: float = option(0.1, "share of the groups that is held out for the final comparison", low=0, high=1)
    examples: int = option(2, "how many rows to print", low=0)


def describe(config: DescribeConfig) -> dict[str, Any]:
    """Print what `load` makes of the source; returns the same as a dict. Raises UserError if nothing can be read."""
    kind = KINDS.get(config.kind) or guess(config.source)
    table = load.collect(config.source, kind)
    if not table.records:
        table.complain("skip")
    conflict = ""
    try:
        assign(table.records, config.validation_fraction, config.test_fraction, table.places)
    except UserError as error:
        conflict = str(error)
    summary = summarise(table)
    if conflict:
        summary["splits"] = [f"CANNOT BE USED: {conflict}", "as given:", *summary["splits"]]
    print(f"{table.name}: {kind.__name__}")
    for name, value in summary.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"  {name if i == 0 else '':<12} {line}")
    for record, place in list(zip(table.records, table.places, strict=True))[: config.examples]:
        print(f"\n{place}")
        for name, text in _texts(record):
            print(f"  {name:<12} {_shorten(text)}")
        print(f"  {'group':<12} {record.group} ({record.split})")
    return summary


def summarise(table: load.Table) -> dict[str, Any]:
    """What a table holds, by name, in words."""
    records = table.records
    splits = Counter(record.split for record in records)
    groups = {split: len({r.group for r in records if r.split == split}) for split in splits}
    different = len({(record.voice, *_texts(record)) for record in records})
    largest = max(Counter(record.group for record in records).values())
    prompts = len(load.unique_prompts(records))
    summary: dict[str, Any] = {
        "form": ", ".join(f"{form.replace('+', ', ')} ({count})" for form, count in table.forms.most_common()),
        "rows": f"{len(records)} read, {len(table.bad)} bad",
        "groups": f"{sum(groups.values())}, the largest of {largest} rows",
        "splits": [f"{s}: {splits[s]} rows, {groups[s]} groups" for s in ("train", "validation", "test") if splits[s]],
        "duplicates": f"{len(records) - different} rows repeat another's texts; {prompts} different prompts",
        "words": _lengths(records),
    }
    if isinstance(records[0], Preference):
        gaps = [len(r.chosen.split()) - len(r.rejected.split()) for r in records]
        longer, same = sum(gap > 0 for gap in gaps) / len(gaps), gaps.count(0) / len(gaps)
        summary["chosen"] = f"longer than rejected in {longer:.0%} of rows, as long in {same:.0%}"
    if isinstance(records[0], Labelled):
        summary["label"] = f"true in {sum(r.label for r in records) / len(records):.0%} of rows"
    columns = Counter(name for record in records for name in record.metadata)
    summary["metadata"] = ", ".join(columns) or "none"
    summary["bad rows"] = table.bad_summary() or "none"
    summary["warnings"] = table.note_summary() or "none"
    summary["fingerprint"] = load.fingerprint(records)
    return summary


def guess(names: list[str]) -> type[Record]:
    """The kind that the columns of the first row suggest. Raises UserError if there is none."""
    failed = None
    for name in names:
        try:
            return forms.guess_kind(sources.first_rows(name, 1)[0])
        except UserError as error:
            failed = failed or error
    raise failed or UserError("no data source given")


def _lengths(records: list[Record]) -> list[str]:
    lengths: dict[str, list[int]] = {}
    for record in records:
        for name, text in _texts(record):
            lengths.setdefault(name, []).append(len(text.split()))
    lines = []
    for name, counts in lengths.items():
        counts.sort()
        high = counts[min(len(counts) - 1, int(0.95 * len(counts)))]
        middle, most = statistics.median(counts), counts[-1]
        lines.append(f"{name}: median {middle:g}, 95 % up to {high}, longest {most}")
    return lines


def _texts(record: Record) -> list[tuple[str, str]]:
    """The texts of a record by name, the prompt's messages as one."""
    prompt = record.prompt
    lines = [message_text(m) if len(prompt) == 1 else f"{m['role']}: {message_text(m)}" for m in prompt]
    names = [name for name in ("response", "chosen", "rejected") if hasattr(record, name)]
    return [("prompt", "\n".join(lines))] + [(name, getattr(record, name)) for name in names]


def _shorten(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
