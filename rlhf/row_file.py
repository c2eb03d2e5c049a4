"""A file of rows that grows while they are made and that an interrupted call goes on with.

{"made_from": {...}}     the first line: what the rows depend on
{...}                    one row a line
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.files import write_atomic


def read_rows(file: Path, made_from: dict[str, Any]) -> list[dict] | None:
    """Return the complete rows of a file that were made from the same; None where there are none.

    A line that a crash has cut off is removed from the file.
    """
    if not file.is_file():
        return None
    # not splitlines, which also breaks at other separators inside a response
    *lines, rest = file.read_text(encoding="utf-8").split("\n")
    if not lines or json.loads(lines[0]) != json.loads(to_line({"made_from": made_from})):
        return None
    if rest:
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines[1:]]


def continue_scores(file: Path, made_from: dict[str, Any], others: str) -> list[dict]:
    """Return the scores to go on with; a file without any is started, one of `others` again."""
    rows = read_rows(file, made_from)
    if rows is None:
        if file.is_file():
            print(f"{file}: of other {others}; all answers are scored again")
        start_rows(file, made_from)
        rows = []
    return rows


def start_rows(file: Path, made_from: dict[str, Any]) -> None:
    """Write a file without rows, in place of one that is there."""
    write_atomic(file, to_line({"made_from": made_from}))


def add_rows(file: Path, rows: Iterable[dict]) -> None:
    """Append rows to a file that was started."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("".join(map(to_line, rows)))


def to_line(value: dict) -> str:
    """Return a row as it is written; NaN in a prompt's metadata stays what it is."""
    return json.dumps(value, ensure_ascii=False) + "\n"
