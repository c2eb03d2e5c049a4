"""`rlhf data export`: records as files that other programs read, and `load` again.

rows: TRL's conversational columns (prompt, chosen and rejected, or completion and label) and all
that is known beside.
unpaired: prompt, completion and label as TRL's KTO reads them; a pair becomes two rows, without
margin, label_prob and what was cut off (chosen_ended, rejected_ended), for which the form has no
place.
hh: pairs as chosen and rejected, "\\n\\nHuman: ...\\n\\nAssistant: ...", and nothing else.
argilla, label_studio: a store's pairs with everybody's votes (rlhf/exchange).
openai: pairs as input, preferred_output and non_preferred_output; instructions as messages; nothing
else.
"""

import base64
import contextlib
import functools
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

Form = Literal["rows", "unpaired", "hh", "openai", "argilla", "label_studio"]
SUFFIXES = (".jsonl", ".parquet")


@dataclass
class ExportConfig:
    """Write what a source holds as JSONL or Parquet, in a form that other programs read."""

    source: list[str] = option(
        help="file, preference store or Hub name, or several with commas between"
    )
    output: str = option(help="the file to write, .jsonl or .parquet")
    form: Form = option(
        "rows",
        "rows: TRL's conversational columns and all others; unpaired (KTO), hh, openai; argilla, "
        "label_studio: pairs with everybody's votes, .json",
    )
    users: str | None = option(
        None, "argilla, label_studio: JSON file {name here: id or e-mail address there}"
    )
    kind: Literal["auto", "prompt", "instruction", "preference", "labelled"] = option(
        "auto", "read the rows as this kind of record; auto goes by the columns of the first row"
    )
    aggregate: Aggregate = option(
        "each", "how a store's votes become pairs: each, majority or skill"
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "what to do with rows that cannot be used", old_name="on_bad"
    )


def export(config: ExportConfig) -> None:
    """Write what the sources hold. Raises UserError on bad rows, and on rows that the form cannot
    hold.
    """
    check_output(config.output, config.source)
    table = load.read_table(
        config.source, KINDS.get(config.kind) or guess(config.source), config.aggregate
    )
    table.check_usable(config.on_error)
    rows = rows_of(table.records, config.form)
    write_rows(rows, config.output)
    print(
        f"{config.output}: {len(rows)} rows ({config.form}) of {len(table.records)} {table.kind.__name__} records"
    )


def check_output(output: str, inputs: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return the output's path. Raises UserError on an unknown ending, a missing folder, or one of
    the inputs.
    """
    path = Path(output)
    if path.suffix not in suffixes:
        raise UserError(
            f"output: found '{output}', expected a file that ends in {' or '.join(suffixes)}"
        )
    if path.exists() and not path.is_file():
        raise UserError(
            f"{output}: is {'a folder' if path.is_dir() else 'no file'}; expected a file to write"
        )
    if not path.parent.is_dir():
        raise UserError(f"{output}: its folder {path.parent} does not exist; make it first")
    for name in inputs:
        given = Path(name).expanduser()
        # the same file by another name, too
        if path.exists() and given.exists() and path.samefile(given):
            raise UserError(
                f"{output}: is one of the files that are read, and those are never changed. Name another"
            )
    return path


def rows_of(records: Sequence[Record], form: Form = "rows") -> list[dict[str, Any]]:
    """Return records as rows of a form. Raises UserError where the form cannot hold them."""
    if form not in _FORMS:
        raise UserError(f"form: found {form!r}, expected one of {', '.join(_FORMS)}")
    rows: list[dict[str, Any]] = []
    for record in records:
        rows.extend(_FORMS[form](record))
    return rows


def write_rows(rows: Sequence[dict[str, Any]], output: str | Path) -> None:
    """Write JSONL or Parquet, by the ending; the file appears whole or not at all.

    What JSON cannot hold and Parquet may have brought is written as text: times as ISO 8601, bytes
    as base64, decimals as they are written; nan and infinity as null. Raises UserError if Parquet
    cannot hold a column.
    """
    plain = list(map(_plain, rows))
    if Path(output).suffix == ".parquet":
        write_whole(output, functools.partial(_write_parquet, plain))
    else:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in plain]
        write_text(output, "".join(lines))


def write_text(output: str | Path, text: str) -> None:
    """Write UTF-8 with \\n as line end, whole or not at all."""
    write_whole(output, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(output: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a temporary file, flush it to disk, and replace `output` with it."""
    path = Path(output)
    # in the same folder: renaming across disks is a copy
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            # or a crash could leave the new name with no content
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as Parquet, with metadata as JSON text, and prompts too if they have tool calls.

    Their keys differ from row to row, and Parquet would give every row all of them.
    """
    import pyarrow
    import pyarrow.parquet

    names: dict[str, None] = {}
    as_text = {"metadata"}
    for row in rows:
        names.update(dict.fromkeys(row))
        if any("tool_calls" in message for message in row.get("prompt") or []):
            as_text.add("prompt")

    full = []
    for row in rows:
        cells = dict.fromkeys(names) | row
        for name in as_text & row.keys():
            cells[name] = json.dumps(row[name], ensure_ascii=False)
        full.append(cells)
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), path)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise UserError(
            f"these rows cannot be written as Parquet ({error}). Name a .jsonl file"
        ) from None


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
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
        row |= {"chosen": _assistant(record.chosen), "rejected": _assistant(record.rejected)}
        row |= _given(record, ("margin", "label_prob", "tie_prob"), None)
        row |= _given(record, ("chosen_ended", "rejected_ended"), True)
    elif not isinstance(record, Prompt):
        row["completion"] = _assistant(record.response)
    if isinstance(record, Labelled):
        row["label"] = record.label
    return [row | _other_fields(record)]


def _unpaired_rows(record: Record) -> list[dict[str, Any]]:
    if isinstance(record, Labelled):
        return _plain_rows(record)
    if not isinstance(record, Preference):
        raise UserError(
            f"form 'unpaired' holds pairs and labelled rows, found {type(record).__name__}"
        )
    good = {"prompt": record.prompt, "completion": _assistant(record.chosen), "label": True}
    bad = {"prompt": record.prompt, "completion": _assistant(record.rejected), "label": False}
    return [good | _other_fields(record), bad | _other_fields(record)]


def _hh_rows(record: Record) -> list[dict[str, Any]]:
    if not isinstance(record, Preference):
        raise UserError(f"form 'hh' holds pairs, found {type(record).__name__}")
    chosen = _transcript([*record.prompt, *_assistant(record.chosen)])
    rejected = _transcript([*record.prompt, *_assistant(record.rejected)])
    return [{"chosen": chosen, "rejected": rejected}]


def _openai_rows(record: Record) -> list[dict[str, Any]]:
    tools = tools_of(record)
    if isinstance(record, Instruction):
        row: dict[str, Any] = {"messages": [*record.prompt, *_assistant(record.response)]}
        return [row | {"tools": tools} if tools else row]
    if not isinstance(record, Preference):
        raise UserError(
            f"form 'openai' holds pairs and instructions, found {type(record).__name__}"
        )
    row = {
        "input": {"messages": record.prompt, "tools": tools or [], "parallel_tool_calls": True},
        "preferred_output": _assistant(record.chosen),
        "non_preferred_output": _assistant(record.rejected),
    }
    return [row]


_FORMS = {
    "rows": _plain_rows,
    "unpaired": _unpaired_rows,
    "hh": _hh_rows,
    "openai": _openai_rows,
}


def _other_fields(record: Record) -> dict[str, Any]:
    fields = _given(record, ("group", "split", "source", "annotator", "voice"), None)
    fields |= _given(record, ("weight",), 1.0)
    return fields | _given(record, ("metadata",), {})


def _given(record: Record, names: Sequence[str], default: Any) -> dict[str, Any]:
    """Return the fields of these names that differ from their default."""
    return {name: getattr(record, name) for name in names if getattr(record, name) != default}


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _transcript(messages: list[Message]) -> str:
    """Return messages as HH-RLHF's text.

    Raises UserError if reading it again would not give the same messages but for white space around
    them.
    """
    speakers = {"user": "Human", "assistant": "Assistant"}
    stripped, text = [], ""
    for message in messages:
        content = message["content"].strip()
        stripped.append({**message, "content": content})
        text += f"\n\n{speakers.get(message['role'], message['role'])}: {content}"

    # a text that would be read back otherwise is refused, not written
    known_roles = all(message["role"] in speakers for message in messages)
    if not known_roles or parse_turns(text) != stripped:
        raise UserError(
            f"form 'hh' has turns of Human and Assistant in exchange and nothing else, and cannot hold {text[:80]!r}. "
            "Use another form"
        )
    return text
