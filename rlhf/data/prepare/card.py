"""What `rlhf data prepare` prints, and data_card.md."""

import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.data import load, sources
from rlhf.data.annotator_report import annotators_markdown, describe_alpha, describe_kappas
from rlhf.data.describe import print_summary
from rlhf.data.export import write_text
from rlhf.data.prepare.pii import masked
from rlhf.data.prepare.steps import Step
from rlhf.data.records import Labelled, Preference, Record
from rlhf.errors import UserError
from rlhf.text import escape_cell, markdown_table

# Lowest kappas that the terminal shows; the card has all
KAPPAS = 10
LIMITS = """\
- Personal data is found by its form. Names are not found, postal addresses only in some written forms (English and
  German streets, P.O. boxes), national telephone numbers only of the regions named. What is left may still hold some.
- Near duplicates and contamination are found by wording. A paraphrase or a translation is not found.
- Groups keep rows together that share a prompt, nearly so, or an answer pair; what is alike in meaning alone may still
  stand in two splits."""


def describe_sources(
    names: Sequence[str], table: load.Table, licences: Sequence[str]
) -> list[dict[str, Any]]:
    """Return {source, rows, bad, identity, licence} of each source. Call it before rows are left
    out.

    licences: one for all sources, one for each, or none. Licences that rows state in their metadata
    are counted.
    """
    if len(licences) <= 1:
        licences = [*licences, ""][:1] * len(names)
    bad = Counter(row.source for row in table.bad)
    found, start = [], 0
    for name, licence in zip(names, licences, strict=True):
        end = start + table.good[name]
        stated = _stated_licences(table.records[start:end])
        row = {
            "source": _without_folder(name),
            "rows": table.good[name],
            "bad": bad[name],
            "identity": _identity(name),
            "licence": "; ".join(filter(None, (licence, stated))) or "not stated",
        }
        found.append(row)
        start = end
    return found


def _stated_licences(records: Iterable[Record]) -> str:
    counts: Counter[str] = Counter()
    for record in records:
        licence = record.metadata.get("license") or record.metadata.get("licence")
        if licence:
            counts[masked(str(licence))] += 1
    return ", ".join(f"{licence} ({count} rows)" for licence, count in counts.most_common())


def balance(records: Sequence[Record]) -> dict[str, Any]:
    """Return in words how the rows spread over sources, voices, annotators, margins and so on; only
    what occurs.
    """
    found: dict[str, Any] = {}
    for name in ("source", "voice", "annotator"):
        counts = Counter(_values(records, name)).most_common()
        if len(counts) > 1 or (counts and name != "source"):
            found[name] = ", ".join(
                f"{value} {count / len(records):.0%}" for value, count in counts[:12]
            )
    for name in ("margin", "label_prob", "tie_prob", "weight"):
        values = sorted(_values(records, name))
        # equal weights say nothing
        if values and (name != "weight" or values[0] != values[-1]):
            mean, median = sum(values) / len(values), statistics.median_high(values)
            spread = f"mean {mean:.3g}, middle {median:.3g}, {values[0]:.3g} to {values[-1]:.3g}"
            found[name] = f"of {len(values)} rows: {spread}"
    if records and isinstance(records[0], Preference):
        found["first word"] = _first_words(records)
    if records and isinstance(records[0], Labelled):
        # a label that goes with length is a shortcut, like the first word
        by_length = sorted(records, key=lambda record: len(record.response))
        half = len(records) // 2
        shorter, longer = _share_true(by_length[:half]), _share_true(by_length[half:])
        found["label by length"] = (
            f"true in {shorter:.0%} of the shorter half, {longer:.0%} of the longer"
        )
    return found


def _values(records: Iterable[Record], name: str) -> list[Any]:
    values = [getattr(record, name, None) for record in records]
    return [value for value in values if value is not None]


def _share_true(records: Sequence[Labelled]) -> float:
    return sum(record.label for record in records) / max(1, len(records))


def _first_words(records: Sequence[Preference]) -> str:
    """Return the first word that tells chosen from rejected best: it is a shortcut that a reward
    model may learn.
    """
    chosen = Counter(record.chosen.split()[0] for record in records)
    rejected = Counter(record.rejected.split()[0] for record in records)
    word = max(chosen, key=lambda word: (abs(chosen[word] - rejected[word]), word))
    shares = chosen[word] / len(records), rejected[word] / len(records)
    return f"'{masked(word)}' begins {shares[0]:.0%} of chosen, {shares[1]:.0%} of rejected"


def print_steps(steps: Sequence[Step]) -> None:
    """Print what each step found."""
    for step in steps:
        left = f"; {step.dropped} left out" if step.dropped else ""
        print_summary(
            {step.name: [f"{step.found}{left}", *(f"  {example}" for example in step.examples)]},
            width=20,
        )


def print_report(report: dict[str, Any]) -> None:
    """Print agreement, the annotators with remarks, and what is left."""
    for name, summary in report["annotators"].items():
        lines = [f"{_without_folder(name)}: {describe_alpha(summary)}"]
        kappas = describe_kappas(summary)
        lines += [f"  Cohen's kappa: {line}" for line in kappas[:KAPPAS]]
        if len(kappas) > KAPPAS:
            lines.append(f"  and {len(kappas) - KAPPAS} more, in the card")
        for person in summary["annotators"]:
            lines += [f"  {person['annotator']}: {flag}" for flag in person["flags"]]
        print_summary({"agreement": lines}, width=20)
    print_summary(report["summary"], width=20)


def card_path(output: Path) -> Path:
    """Return data_card.md beside the output, or `<name>_card.md` where that is not a card of this
    output.

    Raises UserError if neither can be written.
    """
    first, second = output.with_name("data_card.md"), output.with_name(f"{output.stem}_card.md")
    # the usual name, unless the card there is of another output
    if not first.exists():
        return first
    if first.is_file():
        lines = first.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines[:1] == [_title(output.name)]:
            return first
    if second.is_dir():
        raise UserError(
            f"{second}: is a folder, and the data card is written there. Move it, or name another output"
        )
    return second


def write_card(report: dict[str, Any], path: Path) -> None:
    """Write the card of a report, with the names of its sources but not the folders of this
    machine.
    """
    text = f"{_title(report['output'])}\n\n{card_markdown(report)}"
    for name in (*report["options"]["source"], *report["options"]["against"]):
        # a card is for others: no folders of this machine in it
        text = text.replace(name, _without_folder(name))
    write_text(path, text)


def card_markdown(report: dict[str, Any]) -> str:
    """Return the card below its title."""
    lines = [
        f"{report['rows']} rows of form `{report['form']}` ({report['kind']}), fingerprint `{report['fingerprint']}`.",
        "Made by `rlhf data prepare`; the same input and options give the same file.",
    ]
    rows = [list(source.values()) for source in report["sources"]]
    lines += [
        "",
        "## Sources",
        "",
        *markdown_table(["source", "rows", "not usable", "content", "licence"], rows),
    ]

    rows = [(step.name, step.parameters, step.found, step.dropped) for step in report["steps"]]
    lines += [
        "",
        "## Steps",
        "",
        *markdown_table(["step", "parameters", "found", "left out"], rows),
    ]

    rows = []
    for name, value in report["summary"].items():
        rows.append((name, "; ".join(value) if isinstance(value, list) else value))
    lines += ["", "## What is in it", "", *markdown_table(["", ""], rows)]

    for name, summary in report["annotators"].items():
        lines += [
            "",
            f"## Annotators: {escape_cell(_without_folder(name))}",
            "",
            *annotators_markdown(summary),
        ]

    examples = []
    for step in report["steps"]:
        examples += [f"- {step.name}: {_code_span(example)}" for example in step.examples]
    if examples:
        lines += ["", "## Examples", "", *examples]

    options = []
    for name, value in report["options"].items():
        if name not in ("source", "output"):
            options.append(f"{name} {escape_cell(str(value))}")
    lines += ["", "## Options", "", f"{', '.join(options)}.", "", "## Limits", "", LIMITS]
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    return f"# Data card of {name}"


def _identity(name: str) -> str:
    """Return what identifies the content: a file's SHA-256 (its first digits), a store's
    fingerprint at its event.
    """
    path, event = sources.split_event(name)
    if sources.is_store(name):
        from rlhf.data.store import Store

        with Store.open(path, readonly=True) as store:
            return f"event {event}, fingerprint `{store.at(event).fingerprint()}`"
    file = Path(name).expanduser()
    if not file.is_file():
        return "Hub"
    return f"SHA-256 `{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}`"


def place_without_folder(place: str) -> str:
    """Return "pairs.jsonl row 3" of "folder/pairs.jsonl row 3"."""
    name, word, row = place.rpartition(" row ")
    return f"{_without_folder(name)}{word}{row}"


def _without_folder(name: str) -> str:
    return Path(name).name if sources.is_path(sources.split_event(name)[0]) else name


def _code_span(text: str) -> str:
    """Return text of the data as a code span, in which no Markdown counts: its fence is longer than
    any in the text.
    """
    text = " ".join(text.split())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (1 + longest)
    return f"{fence} {text} {fence}"
