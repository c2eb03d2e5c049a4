"""Rows of measured results in benchmarks/results/*.json, each with the bound that it was measured for."""

from __future__ import annotations

import json
import operator
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf.files import dumps, write_atomic

COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


def holds(value: float | bool, bound: str) -> bool:
    """Say whether a value keeps a bound such as ">= 0.9" or "== True"."""
    symbol, limit = bound.split(maxsplit=1)
    return bool(COMPARISONS[symbol](value, json.loads(limit.lower())))


def made_with(*packages: str) -> str:
    """Return "2 cores of an AMD EPYC, no GPU; Python 3.11.7, torch 2.13.0+cpu." of this machine, with
    the versions of torch and of further packages.
    """
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = [f"{name} {version(name)}" for name in ("torch", *packages)]
    return (
        f"{os.cpu_count()} cores ({processor}), {gpu}; Python {platform.python_version()}, "
        f"{', '.join(found)}."
    )


def add_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows into a results file, each in place of the one with its id.

    A row names `id`, `what`, `value` (a number or a truth value), `bound` (text: a comparison and
    a number) and `command`. The value is rounded here, `holds` is filled in, and `commit` (that of
    HEAD) where it is not given.
    """
    path = Path(path)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    by_id = {row["id"]: row for row in old}
    for row in rows:
        kept = holds(row["value"], row["bound"])
        value, commit = rounded(row["value"], row["bound"]), row.get("commit") or head_commit()
        by_id[row["id"]] = {**row, "value": value, "holds": kept, "commit": commit}
    write_atomic(path, dumps({"rows": list(by_id.values())}, indent=1) + "\n")


def row_of(id: str, what: str, value: float | bool, bound: str, command: str) -> dict[str, Any]:
    return {"id": id, "what": what, "value": value, "bound": bound, "command": command}


def rounded(value: float | bool, bound: str) -> float | bool:
    """Return a fraction with four significant digits, unless the bound would then hold where it does
    not, or the other way round; whole numbers and truth values as they are.
    """
    if isinstance(value, bool | int):
        return value
    value = float(value)
    short = float(f"{value:.4g}")
    return short if holds(short, bound) == holds(value, bound) else value


def head_commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()


def write_page(path: Path, lines: Iterable[str]) -> None:
    """Write a page of results; what was written by hand below its heading "What follows" stays."""
    mark = "\n## What follows\n"
    rest = path.read_text().partition(mark)[2] if path.is_file() else ""
    write_atomic(path, "\n".join(lines) + "\n" + (mark + rest if rest else ""))
