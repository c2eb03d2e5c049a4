"""`rlhf data export`: records as files that other programs read, and `load` again.

rows: TRL's conversational columns (prompt, chosen and rejected, or completion and label) and all that is known beside.
unpaired: prompt, completion and label as TRL's KTO reads them; a pair becomes two rows, without margin, label_prob and
    what was cut off (chosen_ended, rejected_ended), for which the form has no place.
hh: pairs as chosen and rejected, "\\n\\nHuman: ...\\n\\nAssistant: ...", and nothing else.
openai: pairs as input, preferred_output and non_preferred_output; instructions as messages; nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option
from rlhf.data import load
from rlhf.data.conversation import parse_turns
from rlhf.data.describe import KINDS, guess
from rlhf.data.records import Instruction, Labelled, Message, Preference, Prompt, Record, tools_of
from rlhf.data.votes import Aggregate
from rlhf.errors import UserError

Form = Literal["rows", "unpaired", "hh", "openai"]
SUFFIXES = (".jsonl", ".parquet")


@dataclass
class ExportConfig:
    """Write what a source holds as JSONL or Parquet, in a form that other programs read."""

    source: list[str] = option(help="file, preference store or Hub name, or several with commas between")
    output: str = option(help="the file to write, .jsonl or .parquet")
    form: Form = option("rows", "rows: TRL's conversational columns and all others; unpaired (KTO), hh, openai")
    kind: Literal["auto", "prompt", "instruction", "preference", "labelled"] = option(
        "auto", "read the rows as this kind of record; auto goes by the columns of the first row"
    )
    aggregate: Aggregate = option("each", "how a store's votes become pairs: each, majority or skill")
    on_error: Literal["stop", "skip"] = option("stop", "what to do with rows that cannot be used", old_name="on_bad")


def export(config: ExportConfig) -> None:
    """Raises UserError on bad rows, and on rows that the form cannot hold."""
    check_output(config.output, config.source)
    table = load.collect(config.source, KINDS.get(config.kind) or guess(config.source), config.aggregate)
    table.check_usable(config.on_error)
    rows = rows_of(table.records, config.form)
    write_rows(rows, config.output)
    print(f"{config.output}: {len(rows)} rows ({config.form}) of {len(table.records)} {table.kind.__name__} records")


def check_output(output: str, inputs: Sequence[str]) -> Path:
    """The output's path. Raises UserError on an unknown ending, a missing folder, or one of the inputs."""
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise UserError(f"output: found '{output}', expected a file that ends in {' or '.join(SUFFIXES)}")
    if path.exists() and not path.is_file():
        raise UserError(f"{output}: is {'a folder' if path.is_dir() else 'no file'}; expected a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{output}: its folder {path.parent} does not exist")
    for name in inputs:
        given = Path(name).expanduser()
        if path.exists() and given.exists() and path.samefile(given):
            raise UserError(f"{output}: is one of the files that are read, and those are never changed. Name another")
    return path


def rows_of(records: Sequence[Record], form: Form = "rows") -> list[dict[str, Any]]:
    """Records as rows of a form. Raises UserError where the form cannot hold them."""
    make = {"rows": _plain_rows, "unpaired": _unpaired_rows, "hh": _hh_rows, "openai": _openai_rows}
    if form not in make:
        raise UserError(f"form: found {form!r}, expected one of {', '.join(make)}")
    return [row for record in records for row in make[form](record)]


def write_rows(rows: Sequence[dict[str, Any]], output: str | Path) -> None:
    """JSONL or Parquet, by the ending; the file appears whole or not at all.

    What JSON cannot hold and Parquet may have brought is written as text: times as ISO 8601, bytes as base64, decimals
    as they are written; nan and infinity as null. Raises UserError if Parquet cannot hold a column.
    """
    rows = [_plain(row) for row in rows]
    if Path(output).suffix == ".parquet":
        write_whole(output, lambda part: _write_parquet(rows, part))
    else:
        write_text(output, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_text(output: str | Path, text: str) -> None:
    """UTF-8 with \\n, whole or not at all."""
    write_whole(output, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(output: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write another file beside, see it on disk, and put it in the place of `output`."""
    path = Path(output)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Metadata goes as JSON text: its keys differ from row to row, and Parquet would give every row all of them. So do
    prompts with tool calls."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    full = [{name: row.get(name) for name in names} for row in rows]
    as_text = ["metadata"]
    if any("tool_calls" in message for row in full for message in row.get("prompt") or []):
        as_text.append("prompt")
    for row in full:
        row |= {name: json.dumps(row[name], ensure_ascii=False) for name in as_text if row.get(name) is not None}
    try:
        table = pyarrow.Table.from_pylist(full)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise UserError(f"these rows cannot be written as Parquet ({error}). Name a .jsonl file") from None
    pyarrow.parquet.write_table(table, path)


def _plain(value: Any) -> Any:
    """The same value of what JSON knows."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _plain_rows(record: Record) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"prompt": record.prompt}
    if isinstance(record, Preference):
        row |= {"chosen": _said(record.chosen), "rejected": _said(record.rejected)}
        row |= {name: getattr(record, name) for name in ("margin", "label_prob") if getattr(record, name) is not None}
        row |= {name: False for name in ("chosen_ended", "rejected_ended") if not getattr(record, name)}
    elif not isinstance(record, Prompt):
        row["completion"] = _said(record.response)
    if isinstance(record, Labelled):
        row["label"] = record.label
    return [row | _about(record)]


def _unpaired_rows(record: Record) -> list[dict[str, Any]]:
    if isinstance(record, Labelled):
        return _plain_rows(record)
    if not isinstance(record, Preference):
        raise UserError(f"form 'unpaired' holds pairs and labelled rows, found {type(record).__name__}")
    about = _about(record)
    return [
        {"prompt": record.prompt, "completion": _said(text), "label": label} | about
        for text, label in ((record.chosen, True), (record.rejected, False))
    ]


def _hh_rows(record: Record) -> list[dict[str, Any]]:
    if not isinstance(record, Preference):
        raise UserError(f"form 'hh' holds pairs, found {type(record).__name__}")
    return [{name: _turns([*record.prompt, *_said(getattr(record, name))]) for name in ("chosen", "rejected")}]


def _openai_rows(record: Record) -> list[dict[str, Any]]:
    if isinstance(record, Instruction):
        tools = tools_of(record)
        return [{"messages": [*record.prompt, *_said(record.response)]} | ({"tools": tools} if tools else {})]
    if not isinstance(record, Preference):
        raise UserError(f"form 'openai' holds pairs and instructions, found {type(record).__name__}")
    given = {"messages": record.prompt, "tools": tools_of(record) or [], "parallel_tool_calls": True}
    outputs = {"preferred_output": _said(record.chosen), "non_preferred_output": _said(record.rejected)}
    return [{"input": given, **outputs}]


def _about(record: Record) -> dict[str, Any]:
    about = {name: getattr(record, name) for name in ("group", "split", "source", "annotator", "voice")}
    about = {name: value for name, value in about.items() if value is not None}
    if record.weight != 1.0:
        about["weight"] = record.weight
    return about | ({"metadata": record.metadata} if record.metadata else {})


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _turns(messages: list[Message]) -> str:
    """HH-RLHF text; UserError if reading it again would not give the same messages but for white space around them."""
    speakers = {"user": "Human", "assistant": "Assistant"}
    messages = [{**m, "content": m["content"].strip()} for m in messages]  # as the form is read again
    text = "".join(f"\n\n{speakers.get(m['role'], m['role'])}: {m['content']}" for m in messages)
    if {m["role"] for m in messages} - set(speakers) or parse_turns(text) != messages:
        raise UserError(
            f"form 'hh' has turns of Human and Assistant in exchange and nothing else, and cannot hold {text[:80]!r}. "
            "Use another form"
        )
    return text
