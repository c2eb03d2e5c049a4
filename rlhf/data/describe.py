"""`rlhf data show FILE`: what is in a data source, before anything is trained on it."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import load, schemas, sources
from rlhf.data.conversation import answers_of, message_text
from rlhf.data.records import SPLITS, Instruction, Labelled, Preference, Prompt, Record
from rlhf.data.split import assign
from rlhf.errors import UserError
from rlhf.text import clip

KINDS = {
    "prompt": Prompt,
    "instruction": Instruction,
    "preference": Preference,
    "labelled": Labelled,
}


@dataclass
class DescribeConfig:
    """Show what a data source holds: forms, rows, groups, splits, lengths, duplicates, bad rows,
    examples.
    """

    source: list[str] = option(
        help="file, preference store or Hub name, or several with commas between"
    )
    kind: Literal["auto", "prompt", "instruction", "preference", "labelled"] = option(
        "auto", "read the rows as this kind of record; auto goes by the columns of the first row"
    )
    validation_fraction: float = option(
        0.05, "share of the groups that is held out for validation", low=0, high=1
    )
    test_fraction: float = option(
        0.1, "share of the groups that is held out for the final comparison", low=0, high=1
    )
    examples: int = option(2, "how many rows to print", low=0)


def describe(config: DescribeConfig) -> dict[str, Any]:
    """Print what `load` makes of the source; return the same as a dict. Raises UserError if nothing
    can be read.
    """
    kind = KINDS.get(config.kind) or guess(config.source)
    table = load.read_table(config.source, kind)
    if not table.records:
        table.check_usable("skip")
    # two splits in one group would stop a run; here they are shown
    conflict = ""
    try:
        assign(table.records, config.validation_fraction, config.test_fraction, table.places)
    except UserError as error:
        conflict = str(error)
    summary = summarise(table)
    if conflict:
        summary["splits"] = [f"CANNOT BE USED: {conflict}", "as given:", *summary["splits"]]

    print(f"{table.name}: {kind.__name__}")
    print_summary(summary, width=12, indent="  ")
    for record in table.records[: config.examples]:
        example = {name: clip(text) for name, text in _texts(record).items()}
        print(f"\n{record.place}")
        print_summary(
            example | {"group": f"{record.group} ({record.split})"}, width=12, indent="  "
        )
    return summary


def print_summary(summary: dict[str, Any], *, width: int, indent: str = "") -> None:
    """Print a line for each name and value; of a value that is a list, one line for each entry."""
    for name, value in summary.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{indent}{name:<{width}} {line}")
            name = ""


def summarise(table: load.Table) -> dict[str, Any]:
    """Return what a table holds, by name, in words."""
    records = table.records
    groups = Counter(record.group for record in records)
    # a conflict leaves a group with several splits
    parts = {(record.split, record.group) for record in records}
    repeated = len(records) - len({(record.voice, *_texts(record).values()) for record in records})
    prompts = len(load.unique_prompts(records))
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record.metadata))

    summary: dict[str, Any] = {
        "form": ", ".join(
            f"{name.replace('+', ', ')} ({count})" for name, count in table.schemas.most_common()
        ),
        "rows": f"{len(records)} read, {len(table.bad)} bad",
        "groups": f"{len(parts)}, the largest of {max(groups.values())} rows",
        "splits": _splits(records),
        "duplicates": f"{repeated} rows repeat another's texts; {prompts} different prompts",
        "words": _lengths(records),
    }
    if isinstance(records[0], Preference):
        gaps = [len(record.chosen.split()) - len(record.rejected.split()) for record in records]
        longer, same = sum(gap > 0 for gap in gaps) / len(gaps), gaps.count(0) / len(gaps)
        summary["chosen"] = f"longer than rejected in {longer:.0%} of rows, as long in {same:.0%}"
    if isinstance(records[0], Labelled):
        summary["label"] = (
            f"true in {sum(record.label for record in records) / len(records):.0%} of rows"
        )
    summary["metadata"] = ", ".join(columns) or "none"
    summary["bad rows"] = table.bad_summary() or "none"
    summary["warnings"] = table.note_summary() or "none"
    summary["fingerprint"] = load.fingerprint(records)
    return summary


def guess(names: list[str]) -> type[Record]:
    """Return the kind that the columns of the first readable row suggest. Raises UserError if there
    is none.
    """
    failed = None
    for name in names:
        try:
            return schemas.guess_kind(sources.first_rows(name, 1)[0])
        except UserError as error:
            # the first source that cannot be read may still be followed by one that can
            failed = failed or error
    raise failed or UserError("no data source given")


def _splits(records: list[Record]) -> list[str]:
    lines = []
    for split in SPLITS:
        groups = [record.group for record in records if record.split == split]
        if groups:
            lines.append(f"{split}: {len(groups)} rows, {len(set(groups))} groups")
    return lines


def _lengths(records: list[Record]) -> list[str]:
    lengths: dict[str, list[int]] = {}
    for record in records:
        for name, text in _texts(record).items():
            lengths.setdefault(name, []).append(len(text.split()))
    lines = []
    for name, counts in lengths.items():
        counts.sort()
        # what a length limit has to let through
        high = counts[min(len(counts) - 1, int(0.95 * len(counts)))]
        lines.append(
            f"{name}: median {statistics.median(counts):g}, 95 % up to {high}, longest {counts[-1]}"
        )
    return lines


def _texts(record: Record) -> dict[str, str]:
    """Return the texts of a record by name, the prompt's messages as one."""
    if len(record.prompt) == 1:
        prompt = message_text(record.prompt[0])
    else:
        prompt = "\n".join(
            f"{message['role']}: {message_text(message)}" for message in record.prompt
        )
    return {"prompt": prompt} | answers_of(record)
