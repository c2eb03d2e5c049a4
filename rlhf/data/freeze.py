"""Freeze a preference store into a file of pairs, so that a run reads the same rows whenever it is
resumed.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from rlhf.data.store import Store
from rlhf.data.votes import Aggregate
from rlhf.errors import UserError
from rlhf.files import write_atomic


def freeze(
    store: str | Path,
    out: str | Path,
    upto_event: int | None = None,
    aggregate: Aggregate = "each",
    *,
    keep_ties: bool = False,
) -> int:
    """Write the store's preferences after event `upto_event` (default: the newest) as JSONL;
    returns that event's id.

    The first line is a header {"frozen": {"store", "event", "fingerprint", "aggregate", "votes",
    "rows"}}, which `load` checks and skips; `frozen` reads it. The file appears whole or not at
    all. `keep_ties`: what has no winner is in it too (votes.py).
    """
    with Store.open(store, readonly=True) as opened:
        view = opened.at(upto_event)
        rows = view.rows(aggregate, keep_ties=keep_ties)
        stats = view.stats()
        # the count of rows tells a whole file from one that was cut off while it was copied
        header = {
            "store": opened.path.name,
            "event": view.event,
            "fingerprint": view.fingerprint(),
            "aggregate": aggregate,
            "votes": stats["choices"] | ({"rank": stats["ranked"]} if stats["ranked"] else {}),
            "rows": len(rows),
        }
    lines = [json.dumps(row, ensure_ascii=False) for row in ({"frozen": header}, *rows)]
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return view.event


def frozen(path: str | Path) -> dict[str, Any] | None:
    """Return the header of a file that `freeze` wrote, None for any other file."""
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    # any other file may be asked about
    with contextlib.suppress(json.JSONDecodeError):
        row = json.loads(line)
        if isinstance(row, dict) and len(row) == 1:
            return row.get("frozen")
    return None
