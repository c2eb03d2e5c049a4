"""Where rows come from: files, the Hub, a preference store. Each yields (place, row, problem).

`place` is for messages ("data/prefs.jsonl row 118", rows counted from 1; in JSONL the line number);
`problem` is None, or says why there is no row at this place.
"""

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

from rlhf.data.columns import SPLIT_NAMES
from rlhf.data.votes import Aggregate, no_preference
from rlhf.errors import UserError, near_file

Item = tuple[str, dict[str, Any], str | None]

STORES = (".db", ".sqlite", ".sqlite3")
READABLE = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet", *STORES)
# Endings that mean a file even where it is missing or cannot be read, so that the Hub is not asked
# for it
FILES = (
    *READABLE,
    ".gz",
    ".txt",
    ".tsv",
    ".yaml",
    ".yml",
    ".xlsx",
    ".arrow",
    ".zip",
    ".zst",
    ".ndjson",
)
LOCAL = ("/", "./", "../", "~", ".\\", "..\\")
GZIP = b"\x1f\x8b"

# what helps where no vote prefers an answer
ALL_TIES_HELP = (
    "Sample answers that differ more (--temperature, another policy); whether a brand voice tells them "
    "apart: rlhf voice check VOICE --answers STORE"
)

# "name" or "org/name", then ":config" and "@split", where a split may be "train[:10%]" or
# "train+test"
_HUB = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(@(?P<split>[\w.+%:\[\]-]+))?"
)


def rows(source: str, *, prompts: bool = False, aggregate: Aggregate = "each") -> Iterator[Item]:
    """Yield every row of one source. `prompts` asks a store for its prompts instead of its pairs.
    Raises UserError.
    """
    if is_store(source):
        yield from _store(source, prompts, aggregate)
        return
    from tqdm import tqdm

    items = _file(source) if is_path(source) else _hub(source)
    yield from tqdm(
        items, desc=f"reading {source}", unit=" rows", delay=5, mininterval=5, leave=False
    )


def sound_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of every row of one source. Raises UserError at the first bad one."""
    for place, row, problem in rows(source):
        if problem is not None:
            raise UserError(f"{place}: {problem}")
        yield place, row


def first_rows(source: str, count: int = 20) -> list[dict[str, Any]]:
    """Return the first readable rows. Raises UserError, with the first reasons, where there is
    none.
    """
    problems: list[str] = []

    def readable() -> Iterator[dict[str, Any]]:
        for place, row, problem in rows(source):
            if problem is None:
                yield row
            else:
                problems.append(f"{place}: {problem}")

    # read no further than asked: a source may be large or far away
    found = list(itertools.islice(readable(), count))
    if not found:
        bad = f" ({len(problems)} bad)" if problems else ""
        reasons = problems[:3] or [why_empty(source)]
        raise UserError("\n  ".join([f"{source}: no row to read{bad}", *reasons]))
    return found


def why_empty(source: str) -> str:
    """Return why a source without bad rows has none: what the votes of a store, or of a frozen one,
    were.
    """
    from rlhf.data.freeze import frozen
    from rlhf.data.store import Store

    choices = None
    if is_store(source):
        name, event = split_event(source)
        with Store.open(name, readonly=True) as store:
            choices = store.at(event).stats()["normal_choices"]
    elif source.lower().endswith(".jsonl"):
        choices = (frozen(Path(source).expanduser()) or {}).get("votes")
    if choices is None:
        return "there is none"
    votes = ", ".join(f"{choice} {count}" for choice, count in choices.items() if count)
    nothing = no_preference(choices)
    if nothing:
        return f"{nothing}. {ALL_TIES_HELP}"
    if not votes:
        return "nobody has voted; its prompts can be read (--kind prompt)"
    return f"its votes ({votes}) make no pair with a winner"


def is_store(source: str) -> bool:
    """Return whether this is a preference store: "votes.db" or "votes.db@118"."""
    return split_event(source)[0].lower().endswith(STORES)


def split_event(source: str) -> tuple[str, int | None]:
    """Return ("votes.db", 118) of "votes.db@118"; without an event the second is None."""
    found = re.fullmatch(r"(.+)@(\d+)", source)
    return (found[1], int(found[2])) if found else (source, None)


def is_path(source: str) -> bool:
    """Return whether this exists or can only be meant as a file; the Hub is asked for the rest."""
    if source.startswith(LOCAL) or source.lower().endswith(FILES):
        return True
    return os.path.lexists(source) or not _HUB.fullmatch(source)


def _file(source: str) -> Iterator[Item]:
    path = Path(source).expanduser()
    # "no such file" would be puzzling where the link is plain to see
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{source}: is a symbolic link to {os.readlink(path)}, which leads to no file"
        )
    if not path.exists():
        raise UserError(f"{source}: no such file{near_file(path)}")
    if path.is_dir():
        raise UserError(f"{source}: is a folder; give a file in it ({', '.join(READABLE)})")
    if not path.is_file():
        raise UserError(
            f"{source}: is a pipe or a device, and data is read more than once; write it into a file"
        )

    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    packed = path.name.lower().endswith((".jsonl.gz", ".json.gz", ".csv.gz"))
    ending = Path(path.stem if packed else path.name).suffix.lower()
    if ending not in readers:
        raise UserError(
            f"{source}: cannot read '{path.suffix}' files; expected one of {', '.join(READABLE)}"
        )
    return readers[ending](path, source)


@contextlib.contextmanager
def _open(path: Path, source: str) -> Iterator[io.TextIOBase]:
    """Open the file as text, unpacked. Raises UserError for whatever goes wrong while it is read."""
    packed = path.name.lower().endswith(".gz")
    opener = gzip.open if packed else open
    try:
        with opener(path, "rb") as file:
            is_packed = file.read(2) == GZIP
        if is_packed and packed:
            raise UserError(f"{source}: is compressed twice; unpack it once")
        if is_packed:
            raise UserError(f"{source}: is compressed; name it {path.name}.gz, or unpack it")
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{source}: is not a whole .gz file ({error}); fetch or compress it again"
        ) from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None


def _jsonl(path: Path, source: str) -> Iterator[Item]:
    header: dict[str, Any] | None = None
    count = 0
    with _open(path, source) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                # without the line end, an error at its end is on this line
                row = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                place = f"{source} row {number}"
                if isinstance(error, json.JSONDecodeError):
                    place = f"{source} line {number} column {error.colno}"
                yield place, {}, _not_json(error)
                continue
            # the first line of a frozen store
            if (
                number == 1
                and isinstance(row, dict)
                and row.keys() == {"frozen"}
                and isinstance(row["frozen"], dict)
            ):
                # what it promises is compared with the rows at the end
                header = row["frozen"]
                continue
            count += 1
            yield _item(source, number, row)
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
        hint = (
            ". One row a line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        )
        place = f"{source} line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: {_not_json(error)}{hint}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{source}: {_not_json(error)}") from None
    if not isinstance(content, list):
        raise UserError(f"{source}: found {type(content).__name__}, expected a list of rows")
    for number, row in enumerate(content, 1):
        yield _item(source, number, row)


def _not_json(error: Exception) -> str:
    """Return what is wrong with a text: its syntax, or what JSON allows and Python's reader does
    not.
    """
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg}"
    reason = (
        "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
    )
    return f"not valid JSON: {reason}"


def _item(source: str, number: int, row: Any) -> Item:
    place = f"{source} row {number}"
    if not isinstance(row, dict):
        return place, {}, f"found {type(row).__name__}, expected an object with columns"
    return place, row, None


def _csv(path: Path, source: str) -> Iterator[Item]:
    # the default, 131,072 characters, is less than some conversations
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number = 0
    with _open(path, source) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                number += 1
                place = f"{source} row {number}"
                # cells without a header: the row is broken, or a comma was not quoted
                if None in row:
                    yield (
                        place,
                        {},
                        f"found {len(row[None])} cells more than the header has columns",
                    )
                else:
                    yield place, _with_metadata(row), None
        except csv.Error as error:
            place = f"{source} row {number + 1} (line {reader.line_num})"
            raise UserError(f"{place}: not valid CSV: {error}") from None


def _parquet(path: Path, source: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    numbers = itertools.count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{source} row {next(numbers)}", _with_metadata(row), None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({error})") from None


def _with_metadata(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its metadata parsed, which files of columns hold as JSON text."""
    if isinstance(row.get("metadata"), str):
        with contextlib.suppress(ValueError, RecursionError):
            row["metadata"] = json.loads(row["metadata"])
    return row


def _store(source: str, prompts: bool, aggregate: Aggregate) -> Iterator[Item]:
    from rlhf.data.store import Store

    name, event = split_event(source)
    with Store.open(name, readonly=True) as store:
        view = store.at(event)
        found = view.prompt_rows() if prompts else view.rows(aggregate)
    for number, row in enumerate(found, 1):
        yield f"{source} row {number}", row, None


def _hub(source: str) -> Iterator[Item]:
    """Yield the rows of a Hub data set. Without "@split" every split is read, and each row keeps
    its split.

    Rows of one named split are cut by group, except that rows named test or validation remain so.
    """
    found = _HUB.fullmatch(source)
    name, config, split = found["name"], found["config"], found["split"]
    # a misspelt path would otherwise be looked for on the Hub
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

    parts = dict(data) if isinstance(data, dict) else {split or "train": data}
    unknown = [part for part in parts if part not in SPLIT_NAMES]
    # which of its parts are for training only its owner knows
    if split is None and len(parts) > 1 and unknown:
        raise UserError(
            f"{source}: has splits {', '.join(parts)}; name one or several, such as {source}@{unknown[0]}"
        )
    for part, part_rows in parts.items():
        # of "train[:10%]" and "train+test" the first name counts
        given = SPLIT_NAMES.get(re.split(r"[\[_+]", part)[0])
        # all its rows are called train, which decides nothing
        if given == "train" and len(parts) == 1:
            given = None
        suffix = f" of {part}" if split is None else ""
        for number, row in enumerate(part_rows, 1):
            if given is not None and row.get("split") is None:
                row["split"] = given
            yield f"{source} row {number}{suffix}", row, None
