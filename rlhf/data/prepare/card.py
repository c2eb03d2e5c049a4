"""What `rlhf data prepare` prints, and data_card.md."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import UserError
from rlhf.data import load, sources
from rlhf.data.annotator_report import annotators_markdown, describe_alpha, describe_kappas
from rlhf.data.export import write_text
from rlhf.data.prepare.pii import masked
from rlhf.data.records import Labelled, Preference, Record

KAPPAS = 10  # how many the terminal shows, the lowest
LIMITS = """\
- Personal data is found by its form. Names are not found, postal addresses only in some written forms (English and
  German streets, P.O. boxes), national telephone numbers only of the regions named. What is left may still hold some.
- Near duplicates and leaks are found by wording. A paraphrase or a translation is not found.
- Groups keep rows together that share a prompt, nearly so, or an answer pair; what is alike in meaning alone may still
  stand in two splits."""


def origins(names: Sequence[str], table: load.Table, licences: Sequence[str]) -> list[dict[str, Any]]:
    """Where the rows come from: {source, rows, bad, identity, licence}; call before rows are left out."""
    bad = Counter(b.source for b in table.bad)
    stated: dict[str, Counter] = {name: Counter() for name in names}
    place = iter(table.records)
    for name in names:
        for _ in range(table.good[name]):
            record = next(place)
            given = record.metadata.get("license") or record.metadata.get("licence")
            if given:
                stated[name][masked(str(given))] += 1
    found = []
    for i, name in enumerate(names):
        told = licences[i if len(licences) > 1 else 0] if licences else ""
        rows = ", ".join(f"{licence} ({count} rows)" for licence, count in stated[name].most_common())
        row = {"source": _shown(name), "rows": table.good[name], "bad": bad[name], "identity": _identity(name)}
        found.append(row | {"licence": "; ".join(filter(None, (told, rows))) or "not stated"})
    return found


def balance(records: Sequence[Record]) -> dict[str, Any]:
    """How the rows spread over what they carry, in words; only what occurs."""
    found: dict[str, Any] = {}
    for name in ("source", "voice", "annotator"):
        counts = Counter(value for r in records if (value := getattr(r, name)) is not None)
        if len(counts) > 1 or (counts and name != "source"):
            found[name] = ", ".join(f"{value} {n / len(records):.0%}" for value, n in counts.most_common(12))
    for name in ("margin", "label_prob", "weight"):
        values = sorted(v for r in records if (v := getattr(r, name, None)) is not None)
        if values and (name != "weight" or values[0] != values[-1]):
            middle, mean, ends = values[len(values) // 2], sum(values) / len(values), (values[0], values[-1])
            found[name] = f"of {len(values)} rows: mean {mean:.3g}, middle {middle:.3g}, {ends[0]:.3g} to {ends[1]:.3g}"
    if records and isinstance(records[0], Preference):
        found["first word"] = _first_words(records)
    if records and isinstance(records[0], Labelled):
        by_length = sorted(records, key=lambda r: len(r.response))
        half = len(records) // 2
        shares = [sum(r.label for r in part) / max(1, len(part)) for part in (by_length[:half], by_length[half:])]
        found["label by length"] = f"true in {shares[0]:.0%} of the shorter half, {shares[1]:.0%} of the longer"
    return found


def _first_words(records: Sequence[Record]) -> str:
    """The commonest way in which chosen and rejected begin: one that tells them apart is a shortcut to learn."""
    words = [Counter(getattr(r, side).split()[0] for r in records) for side in ("chosen", "rejected")]
    word, _ = max(words[0].items(), key=lambda item: (abs(item[1] - words[1][item[0]]), item[0]))
    shares = [words[side][word] / len(records) for side in (0, 1)]
    return f"'{masked(word)}' begins {shares[0]:.0%} of chosen, {shares[1]:.0%} of rejected"


def show_steps(steps: Sequence[Any]) -> None:
    """What each step found, on the terminal."""
    for step in steps:
        left = f"; {step.dropped} left out" if step.dropped else ""
        print(f"{step.name:<20} {step.found}{left}")
        for example in step.examples:
            print(f"{'':<20}   {example}")


def show(report: dict[str, Any]) -> None:
    """The annotators and what is left, on the terminal."""
    for line in annotator_lines(report["annotators"]):
        print(line)
    for name, value in report["summary"].items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{name if i == 0 else '':<20} {line}")


def annotator_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Agreement and the annotators who stand out, one line each."""
    lines = []
    for name, summary in found.items():
        lines.append(f"{'agreement':<20} {_shown(name)}: {describe_alpha(summary)}")
        said = describe_kappas(summary)
        lines += [f"{'':<20}   Cohen's kappa: {pair}" for pair in said[:KAPPAS]]
        lines += [f"{'':<20}   and {len(said) - KAPPAS} more, in the card"] if len(said) > KAPPAS else []
        for person in summary["annotators"]:
            for flag in person["flags"]:
                lines.append(f"{'':<20}   {person['annotator']}: {flag}")
    return lines


def path(output: Path) -> Path:
    """data_card.md beside the output, or `<name>_card.md` where the former is something else than this output's card.

    Raises UserError if neither can be written.
    """
    first, second = output.with_name("data_card.md"), output.with_name(f"{output.stem}_card.md")
    if not first.exists():
        return first
    if first.is_file() and first.read_text(encoding="utf-8", errors="replace").splitlines()[:1] == [
        _title(output.name)
    ]:
        return first
    if second.is_dir():
        raise UserError(f"{second}: is a folder, and the data card is to stand there. Move it, or name another output")
    return second


def _title(name: str) -> str:
    return f"# Data card of {name}"


def write(report: dict[str, Any], path: Path) -> Path:
    """The card at this path, which is returned."""
    text = f"{_title(report['output'])}\n\n{markdown(report)}"
    for name in (*report["options"]["source"], *report["options"]["against"]):
        text = text.replace(name, _shown(name))  # the folders of one machine mean nothing on another
    write_text(path, text)
    return path


def markdown(report: dict[str, Any]) -> str:
    """The card below its title."""
    lines = [
        f"{report['rows']} rows of form `{report['form']}` ({report['kind']}), fingerprint `{report['fingerprint']}`."
    ]
    lines += ["Made by `rlhf data prepare`; the same input and options give the same file.", "", "## Sources", ""]
    rows = [[s["source"], str(s["rows"]), str(s["bad"]), s["identity"], s["licence"]] for s in report["sources"]]
    lines += _table(["source", "rows", "not usable", "content", "licence"], rows)
    lines += ["", "## Steps", ""]
    lines += _table(
        ["step", "parameters", "found", "left out"],
        [[s.name, s.parameters, s.found, str(s.dropped)] for s in report["steps"]],
    )
    lines += ["", "## What is in it", ""]
    rows = [[name, "; ".join(v) if isinstance(v, list) else str(v)] for name, v in report["summary"].items()]
    lines += _table(["", ""], rows)
    for name, summary in report["annotators"].items():
        lines += ["", f"## Annotators: {_cell(_shown(name))}", "", *annotators_markdown(summary)]
    shown = [step for step in report["steps"] if step.examples]
    if shown:
        lines += ["", "## Examples", ""]
        lines += [f"- {step.name}: {_code(example)}" for step in shown for example in step.examples]
    options = ", ".join(f"{k} {_cell(str(v))}" for k, v in report["options"].items() if k not in ("source", "output"))
    lines += ["", "## Options", "", f"{options}.", "", "## Limits", "", LIMITS]
    return "\n".join(lines) + "\n"


def _identity(name: str) -> str:
    """What names the content: the first digits of a file's SHA-256, a store's fingerprint at its event."""
    if sources.is_store(name):
        from rlhf.data.store import Store

        path, _, event = name.rpartition("@")
        with Store.open(path, readonly=True) as store:
            return f"event {event}, fingerprint `{store.at(int(event)).fingerprint()}`"
    path = Path(name).expanduser()
    if not path.is_file():
        return "Hub"
    return f"SHA-256 `{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}`"


def shown_place(place: str) -> str:
    """ "folder/pairs.jsonl row 3" without the folder."""
    name, word, row = place.rpartition(" row ")
    return f"{_shown(name)}{word}{row}"


def _shown(name: str) -> str:
    """A file by its name, without the folders of one machine."""
    return Path(name).name if sources.is_path(re.sub(r"@\d+$", "", name)) else name


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_cell(c) for c in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _code(text: str) -> str:
    """Text of the data as a code span, in which no Markdown counts; the fence is longer than any in the text."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"


def _cell(text: str) -> str:
    """Text of the data as it is, on one line: no HTML, no table border."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(text.split())
