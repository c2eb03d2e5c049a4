"""Where rows come from: files, the Hub, a preference store. Each yields (place, row, problem).

`place` is for messages ("data/prefs.jsonl row 118", rows counted from 1; in JSONL the line number); `problem` is None,
or says why there is no row at this place.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.data.schemas import SPLIT_NAMES
from rlhf.data.votes import Aggregate
from rlhf.errors import UserError, near_file

Item = tuple[str, dict[str, Any], str | None]

STORES = (".db", ".sqlite", ".sqlite3")
READABLE = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", *STORES)
# Endings that mean a file even where it is missing or cannot be read, so that the Hub is not asked for it
FILES = (*READABLE, ".gz", ".txt", ".tsv", ".yaml", ".yml", ".xlsx", ".arrow", ".zip", ".zst", ".ndjson")

_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.+%:\[\]-]+))?")


def rows(source: str, *, prompts: bool = False, aggregate: Aggregate = "each") -> Iterator[Item]:
    """Every row of one source. `prompts` asks a store for its prompts instead of its pairs. Raises UserError."""
    if is_store(source):
        yield from _store(source, prompts, aggregate)
    elif is_path(source):
        path = _existing(source)
        suffix = next((s for s in READABLE if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise UserError(f"{source}: cannot read '{path.suffix}' files; expected one of {', '.join(READABLE)}")
        reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[suffix.removesuffix(".gz")]
        yield from _progress(reader(path, source), source)
    else:
        yield from _progress(_hub(source), source)


def first_rows(source: str, count: int = 20) -> list[dict[str, Any]]:
    """A few rows to look at. Raises UserError, with the first reasons, where there is none."""
    problems: list[str] = []

    def good() -> Iterator[dict[str, Any]]:
        for place, row, problem in rows(source):
            if problem:
                problems.append(f"{place}: {problem}")
            else:
                yield row

    found = list(itertools.islice(good(), count))
    if not found:
        reasons = problems[:3] or [empty(source)]
        bad = f" ({len(problems)} bad)" if problems else ""
        raise UserError("\n  ".join([f"{source}: no row to read{bad}", *reasons]))
    return found


def empty(source: str) -> str:
    """Why a source without bad rows has none: what the votes of a store, or of a frozen one, were."""
    from rlhf.data.freeze import frozen
    from rlhf.data.store import Store

    choices = None
    if is_store(source):
        name, upto = split_event(source)
        with Store.open(name, readonly=True) as store:
            choices = store.at(upto).stats()["choices"]
    elif source.lower().endswith(".jsonl"):
        choices = (frozen(Path(source).expanduser()) or {}).get("votes")
    if choices is None:
        return "there is none"
    said = ", ".join(f"{choice} {count}" for choice, count in choices.items() if count)
    if not said:
        return "nobody has voted; its prompts can be read (--kind prompt)"
    return f"its votes ({said}) make no pair of which one answer is better"


def is_store(source: str) -> bool:
    """True for "votes.db" and "votes.db@118"."""
    return re.sub(r"@\d+$", "", source).lower().endswith(STORES)


def split_event(source: str) -> tuple[str, int | None]:
    """ "votes.db@118" -> ("votes.db", 118); without an event None."""
    found = re.fullmatch(r"(.+)@(\d+)", source)
    return (found[1], int(found[2])) if found else (source, None)


def is_path(source: str) -> bool:
    """True for what exists or can only be meant as a file; the Hub is asked for the rest."""
    starts = source.startswith(("/", "./", "../", "~", ".\\", "..\\"))
    return starts or source.lower().endswith(FILES) or os.path.lexists(source) or not _HUB.fullmatch(source)


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{source}: is a symbolic link to {os.readlink(path)}, which leads to no file")
        raise UserError(f"{source}: no such file{near_file(path)}")
    if path.is_dir():
        raise UserError(f"{source}: is a folder; give a file in it ({', '.join(READABLE)})")
    if not path.is_file():
        raise UserError(f"{source}: is a pipe or a device, and data is read more than once; write it into a file")
    return path


@contextlib.contextmanager
def _open(path: Path, source: str) -> Iterator[io.TextIOBase]:
    """The file as text, unpacked; what may go wrong inside is said plainly."""
    packed = path.name.lower().endswith(".gz")
    opened = gzip.open if packed else open
    try:
        with opened(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                remedy = "unpack it once" if packed else f"name it {path.name}.gz, or unpack it"
                raise UserError(f"{source}: is compressed{' twice' if packed else ''}; {remedy}")
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source}: is not a whole .gz file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _jsonl(path: Path, source: str) -> Iterator[Item]:
    header: dict | None = None
    count = 0
    with _open(path, source) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{source} row {number}"
            try:
                row = json.loads(line.rstrip())  # an error at its end is on this line
            except json.JSONDecodeError as error:
                yield f"{source} line {number} column {error.colno}", {}, f"not valid JSON: {error.msg}"
                continue
            except (RecursionError, ValueError) as error:
                yield place, {}, f"not valid JSON: {_beyond(error)}"
                continue
            if number == 1 and isinstance(row, dict) and isinstance(row.get("frozen"), dict) and len(row) == 1:
                header = row["frozen"]
                continue
            count += 1
            yield place, *_as_row(row)
    if header is not None and header.get("rows") != count:
        raise UserError(
            f"{source}: its first line promises {header.get('rows')} rows frozen from {header.get('store')}, found "
            f"{count}. Freeze it again"
        )


def _json(path: Path, source: str) -> Iterator[Item]:
    with _open(path, source) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One row a line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{source} line {error.lineno} column {error.colno}: not valid JSON: {error.msg}.{hint}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{source}: not valid JSON: {_beyond(error)}") from None
    if not isinstance(content, list):
        raise UserError(f"{source}: found {type(content).__name__}, expected a list of rows")
    for number, row in enumerate(content, 1):
        yield f"{source} row {number}", *_as_row(row)


def _csv(path: Path, source: str) -> Iterator[Item]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path, source) as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        while True:
            number += 1
            place = f"{source} row {number}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{place} (line {reader.line_num}): not valid CSV: {error}") from None
            if None in row:
                yield place, {}, f"found {len(row[None])} cells more than the header has columns"
            else:
                yield place, {name: _cell(name, value) for name, value in row.items()}, None


def _cell(name: str, value: str | None) -> Any:
    """A CSV cell; the metadata is written in it as JSON."""
    if name != "metadata" or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _beyond(error: Exception) -> str:
    """What JSON allows and Python's reader does not."""
    return "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def _parquet(path: Path, source: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    if isinstance(row.get("metadata"), str):  # of rows that differ in it, as JSON
                        row["metadata"] = _cell("metadata", row["metadata"])
                    yield f"{source} row {number}", row, None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({error})") from None


def _store(source: str, prompts: bool, aggregate: str) -> Iterator[Item]:
    from rlhf.data.store import Store

    name, upto = split_event(source)
    with Store.open(name, readonly=True) as store:
        view = store.at(upto)
        found = view.prompt_rows() if prompts else view.rows(aggregate)
    for number, row in enumerate(found, 1):
        yield f"{source} row {number}", row, None


def _hub(source: str) -> Iterator[Item]:
    """Rows of a Hub data set. Without "@split" every split is read, and train, validation and test stay what they are.

    Rows of one named split are cut by group, except that rows named test or validation remain so.
    """
    found = _HUB.fullmatch(source)
    name, config, split = found["name"], found["config"], found["split"]
    near = near_file(name) if "/" in name else ""
    if near:
        raise UserError(f"{source}: no such file{near}")
    try:
        import datasets

        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise UserError(
            f"{source}: neither a file here nor a data set that could be loaded from the Hub "
            f"({type(error).__name__}: {str(error).strip() or 'no reason given'})"
        ) from error
    parts = {split or "train": data} if not isinstance(data, dict) else dict(data)
    strange = [part for part in parts if part not in SPLIT_NAMES]
    if split is None and len(parts) > 1 and strange:
        raise UserError(f"{source}: has splits {', '.join(parts)}; name one or several, such as {source}@{strange[0]}")
    for part, part_rows in parts.items():
        given = _given_split(part, alone=len(parts) == 1)
        for number, row in enumerate(part_rows, 1):
            yield f"{source} row {number}" + (f" of {part}" if split is None else ""), _with_split(row, given), None


def _given_split(part: str, alone: bool) -> str | None:
    split = SPLIT_NAMES.get(re.split(r"[\[_+]", part)[0])
    return None if alone and split == "train" else split


def _with_split(row: dict[str, Any], given: str | None) -> dict[str, Any]:
    return row if given is None or row.get("split") is not None else {**row, "split": given}


def _as_row(value: Any) -> tuple[dict[str, Any], str | None]:
    if isinstance(value, dict):
        return value, None
    return {}, f"found {type(value).__name__}, expected an object with columns"


def _progress(items: Iterator[Item], source: str) -> Iterator[Item]:
    """Only where reading takes long: one bar on stderr, renewed every five seconds."""
    from tqdm import tqdm

    yield from tqdm(items, desc=f"reading {source}", unit=" rows", delay=5, mininterval=5, leave=False)
