"""Text for people: one line of a long text, numbers with intervals, tables in Markdown, notices."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# in the place of a number that is not known
UNKNOWN = "–"


def clip(value: Any, width: int = 100) -> str:
    """Return `value` as one line of at most `width` characters, ending in "..." where it was cut."""
    line = " ".join(str(value).split())
    return line if len(line) <= width else line[: width - 3] + "..."


def short_names(paths: Sequence[str], taken: Iterable[str] = (), joint: str = "/") -> list[str]:
    """Return as few folders of each path as tell the paths apart: a/dpo, a/ppo -> dpo, ppo; a/ppo,
    b/ppo -> a/ppo, b/ppo.

    taken: names that none may have. joint: what stands between folders. Paths of which two are the
    same are returned as they are.
    """
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = [str(Path(*part[-depth:])).replace("/", joint) for part in parts]
        if len(set(names)) == len(names) and not set(names) & set(taken):
            return names
    return list(paths)


def reasons_of(counts: Mapping[str, int]) -> str:
    """Return counts by reason on one line: "3: too long; 1: empty"."""
    return "; ".join(f"{count}: {reason}" for reason, count in counts.items())


def escape_cell(value: Any) -> str:
    """Return `value` as the text of a Markdown table cell; it cannot end the cell or become HTML.

    Floats get four significant digits, and None an en dash.
    """
    if value is None:
        return UNKNOWN
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(character, escaped)
    return " ".join(text.split())


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    right: Iterable[int] = (),
    escape: Callable[[Any], str] = escape_cell,
) -> list[str]:
    """Return the lines of a Markdown table; the columns numbered in `right` (from 0) are aligned to
    the right.

    `escape` turns each cell of `rows` into text that cannot end the cell.
    """
    aligned = set(right)
    marks = ["---:" if column in aligned else "---" for column in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(marks) + " |"]
    for row in rows:
        cells = [escape(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def with_interval(
    estimate: Mapping[str, Any] | None, write: Callable[[float], str], unit: str = ""
) -> str:
    """Return "0.12 [0.03, 0.21]", each number as `write` gives it; without bounds the number alone.

    estimate: {"estimate", "low", "high"}, None where it is not known.
    """
    if estimate is None or estimate["estimate"] is None:
        return UNKNOWN
    text = write(estimate["estimate"]) + unit
    # reports of an earlier version have no bounds
    if estimate.get("low") is None:
        return text
    return f"{text} [{write(estimate['low'])}, {write(estimate['high'])}]"


_SAID: set[str] = set()


def say_once(text: str) -> None:
    """Print a line to standard error on the main rank, unless it was printed before."""
    if text not in _SAID and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    _SAID.add(text)
