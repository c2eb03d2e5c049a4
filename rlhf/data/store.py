"""The preference store: one SQLite file with responses, comparisons, and what annotators said, never changed after.

    with Store.open("votes.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        a, b = (store.add_response(prompt, text, model="runs/sft") for text in ("Hello!", "What?"))
        pair = store.add_comparison(a, b)
        event = store.vote(pair, store.add_annotator("ann"), "a")
        store.preferences(upto_event=event)

Votes and undos are events, numbered in the order in which they were committed; the state after event n is the same for
ever, so a run names the event it read up to. The tables are explained in docs/data.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rlhf.config import UserError, near_file
from rlhf.data import store_queries, store_schema
from rlhf.data.records import (
    Message,
    Preference,
    Prompt,
    Record,
    check_text,
    check_unicode,
    digest,
    one_name,
    prompt_group,
)
from rlhf.data.votes import CHOICES, Aggregate, Vote

BUSY_SECONDS = 60.0  # how long a writer waits for the others


class Store:
    """An open store. Every method that writes commits before it returns, unless inside `transaction()`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, readonly: bool = False):
        self.path, self.readonly, self._db, self._depth = path, readonly, connection, 0
        self.clock: Callable[[], float] = time.time  # seconds since 1970; what `created` and `changed` say

    @classmethod
    def open(cls, path: str | Path, create: bool = False, readonly: bool = False) -> Store:
        """Open a store, bringing an older file to this version; with `create`, make it if it is missing.

        readonly: the file is not written; one of an older version is brought to this one in memory.
        Raises UserError: no such file, not a preference store, or made by a newer version. One that turns out to be
        damaged ends a `with` block with a UserError too.
        """
        path = Path(path).expanduser()
        if not path.exists() and not create:
            raise UserError(f"{path}: no such preference store{near_file(path)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder {path.parent} does not exist")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file, so it cannot be a preference store")
        if not create and path.stat().st_size == 0:
            raise UserError(f"{path}: is an empty file, not a preference store")
        connection = None
        try:
            connection = _connect(path, readonly)
            connection.row_factory = sqlite3.Row
            if not readonly:
                store_schema.prepare(connection, path)
            elif store_schema.version(connection, path) < store_schema.VERSION:
                connection = _copy(connection, path)
        except (sqlite3.Error, UserError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be opened as a preference store ({error})") from None
        return cls(path, connection, readonly)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError, json.JSONDecodeError):
            raise UserError(
                f"{self.path}: cannot be read or written ({str(error)[:100]}). If it is damaged, take an earlier copy, "
                f"or save what can be read: sqlite3 {self.path.name} .recover | sqlite3 new.db"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are committed together at the end, or none if an exception leaves it. May be nested."""
        if self._depth == 0:
            try:
                self._db.execute("BEGIN" if self.readonly else "BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise UserError(f"{self.path}: cannot be written ({error})") from None
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._db.execute("COMMIT")
        except BaseException:
            if self._depth == 1 and self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1

    def add_prompt(
        self,
        messages: list[Message],
        *,
        group: str | None = None,
        default_group: str | None = None,
        voice: str | None = None,
        split: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> int:
        """Its id; the same prompt again (all arguments but default_group alike) gives the same id. Raises RecordError.

        group: as the data names it, to stay. default_group: one that may be joined with others over shared answers;
        default: by the prompt's hash. split: only where the data gives it; else the group decides at reading.
        """
        Prompt(prompt=messages, split=split)
        content = {"messages": messages, "own_group": group, "voice": voice, "split": split, "metadata": metadata or {}}
        key = digest(_json({k: v for k, v in content.items() if v is not None}))
        default = default_group or prompt_group(messages)
        row = {**content, "messages": _json(messages), "metadata": _json(metadata or {}), "default_group": default}
        return self._add("prompts", key, row)

    def add_response(
        self,
        prompt: int,
        text: str,
        *,
        model: str | None = None,
        model_fingerprint: str | None = None,
        adapter_fingerprint: str | None = None,
        sampling: dict[str, Any] | None = None,
        ended: bool | None = None,
    ) -> int:
        """Its id; the same text from the same model and sampling settings gives the same id.

        `sampling` holds temperature, top_p, seed, ...; `ended` is False for a response cut off at its length limit.
        """
        if not isinstance(text, str):
            check_text("text", text)
        check_unicode("text", text)  # empty text is what some models say; it just cannot be compared
        row = {"prompt": prompt, "text": text, "model": model, "model_fingerprint": model_fingerprint}
        row |= {"adapter_fingerprint": adapter_fingerprint, "sampling": _json(sampling or {}), "ended": ended}
        return self._add("responses", digest(_json(row)), row)

    def add_comparison(
        self, one: int, other: int, *, kind: Literal["normal", "control"] = "normal", expected: int | None = None
    ) -> int:
        """A question to annotators: which of two responses to one prompt is better? Returns its id.

        The response that was added to the store first is "a", in whatever order they are given; the same two again
        give the same id. A control comparison has a known answer: the id of the `expected` response.
        Raises UserError if the responses answer different prompts, are the same text, or one is empty.
        """
        a, b = sorted((one, other))
        texts = {
            r["id"]: r for r in self._db.execute("SELECT id, prompt, text FROM responses WHERE id IN (?, ?)", (a, b))
        }
        if len(texts) != 2:
            raise UserError(
                f"{self.path}: comparison of responses {one} and {other}: expected two that are in the store"
            )
        if texts[a]["prompt"] != texts[b]["prompt"]:
            raise UserError(f"{self.path}: responses {a} and {b} answer different prompts and cannot be compared")
        if texts[a]["text"].strip() == texts[b]["text"].strip():
            raise UserError(f"{self.path}: responses {a} and {b} are the same text; there is nothing to compare")
        for id in (a, b):
            if not texts[id]["text"].strip():
                raise UserError(f"{self.path}: response {id} is empty; there is nothing to compare")
        if (kind == "control") != (expected is not None) or expected not in (None, a, b):
            raise UserError(
                f"expected={expected}: a control comparison, and no other, has one of its two responses here"
            )
        side = None if expected is None else "ab"[expected == b]
        row = {"prompt": texts[a]["prompt"], "a": a, "b": b, "kind": kind, "expected": side}
        id = self._add("comparisons", f"{a}-{b}-{kind}", row)
        if (found := self._one("SELECT expected FROM comparisons WHERE id = ?", id)["expected"]) != side:
            raise UserError(f"{self.path}: control comparison {id} of these responses expects {found}, not {side}")
        return id

    def add_annotator(
        self, name: str, kind: Literal["person", "model", "rule"] = "person", token: str | None = None
    ) -> int:
        """The id of the annotator of this name (see `one_name`), who is added if new. Of a sign-in token only the hash
        is kept."""
        name = one_name(name)
        found = next((row for row in self.annotators() if one_name(row["name"]) == name), None)
        name = found["name"] if found else name
        row = {"name": name, "kind": kind, "token_hash": token and token_hash(token)}
        if found and found["kind"] != kind:
            raise UserError(f"{self.path}: annotator '{name}' is a {found['kind']}, not a {kind}; choose another name")
        return self._add("annotators", name, row, key_column="name")

    def annotators(self) -> list[dict[str, Any]]:
        """Every annotator by id: {id, name, kind, token_hash (None: no link of theirs opens)}."""
        return [dict(r) for r in self._db.execute("SELECT id, name, kind, token_hash FROM annotators ORDER BY id")]

    def set_token(self, annotator: int, token: str | None) -> None:
        """Let the annotator sign in with this token and no other; None: with none. Only its hash is kept."""
        with self.transaction():
            self._db.execute(
                "UPDATE annotators SET token_hash = ? WHERE id = ?", (token and token_hash(token), annotator)
            )

    def setting(self, name: str, default: str | None = None) -> str | None:
        """What the collection was set up with under this name."""
        found = self._one("SELECT value FROM settings WHERE name = ?", name)
        return found["value"] if found else default

    def set_setting(self, name: str, value: str) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", (name, value, self._now()))

    def assign(self, comparison: int, annotator: int, *, left: Literal["a", "b"] | None = None) -> int:
        """Record that the comparison was handed to the annotator (and what stands left); returns the event's id."""
        with self.transaction():
            return self._event(comparison=comparison, annotator=annotator, kind="assign", left=left)

    def vote(
        self,
        comparison: int,
        annotator: int,
        choice: str | int,
        *,
        left: Literal["a", "b"] | None = None,
        strength: int | None = None,
        reason: str | None = None,
        tags: list[str] | None = None,
        duration_ms: int | None = None,
        request: str | None = None,
    ) -> int:
        """Record a vote and return its event's id.

        choice: "a", "b", "tie", "both_bad", "skip", or the id of the better response.
        left: which response was shown on the left (first). strength: 1 slightly, 2 clearly, 3 by far.
        request: a name the caller gives to this one click; sent twice, it is recorded once.
        Raises UserError if a vote of this annotator on this comparison stands already (undo it first).
        """
        with self.transaction():
            if request is not None and (done := self._one("SELECT id FROM events WHERE request = ?", request)):
                return done["id"]
            pair = self._one("SELECT a, b FROM comparisons WHERE id = ?", comparison)
            if pair is None:
                raise UserError(f"{self.path}: there is no comparison {comparison}")
            if isinstance(choice, int):
                choice = {pair["a"]: "a", pair["b"]: "b"}.get(choice, choice)
            if choice not in CHOICES:
                raise UserError(
                    f"choice: found {choice!r}, expected {', '.join(CHOICES)} or one of the pair's responses"
                )
            standing = self._one(
                "SELECT id FROM events e WHERE comparison = ? AND annotator = ? AND kind = 'vote' "
                "AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)",
                comparison,
                annotator,
            )
            if standing:
                raise UserError(
                    f"{self.path}: annotator {annotator} has voted on comparison {comparison} already (event "
                    f"{standing['id']}); undo that vote first"
                )
            return self._event(
                comparison=comparison,
                annotator=annotator,
                kind="vote",
                choice=choice,
                left=left,
                strength=strength,
                reason=reason,
                tags=_json(tags or []),
                duration_ms=duration_ms,
                request=request,
            )

    def undo(self, event: int, *, request: str | None = None) -> int:
        """Take a vote back by a new event, whose id is returned. Raises UserError unless it is a vote that stands."""
        with self.transaction():
            if request is not None and (done := self._one("SELECT id FROM events WHERE request = ?", request)):
                return done["id"]
            found = self._one("SELECT * FROM events WHERE id = ?", event)
            if found is None or found["kind"] != "vote":
                raise UserError(f"{self.path}: event {event} is {found['kind'] if found else 'missing'}, not a vote")
            if self._one("SELECT id FROM events WHERE undoes = ?", event):
                raise UserError(f"{self.path}: the vote of event {event} is undone already")
            about = {"comparison": found["comparison"], "annotator": found["annotator"]}
            return self._event(**about, kind="undo", undoes=event, request=request)

    def release(self, comparison: int, annotator: int) -> int:
        """Record that the annotator gave the comparison back unanswered; returns the event's id."""
        with self.transaction():
            return self._event(comparison=comparison, annotator=annotator, kind="release")

    def request(self, name: str) -> dict[str, Any] | None:
        """The event that this request made, if it did."""
        found = self._one("SELECT * FROM events WHERE request = ?", name)
        return found and dict(found)

    def events(self, after: int = 0) -> Iterator[sqlite3.Row]:
        """Events newer than `after` in their order: id, comparison, annotator, kind, choice, left, duration_ms, undoes,
        created."""
        names = 'id, comparison, annotator, kind, choice, "left", duration_ms, undoes, created'
        return self._db.execute(f"SELECT {names} FROM events WHERE id > ? ORDER BY id", (after,))

    def last_event(self) -> int:
        """The id of the newest event, 0 if there is none."""
        return self._one("SELECT coalesce(max(id), 0) AS id FROM events")["id"]

    def last_comparison(self) -> int:
        """The id of the newest comparison, 0 if there is none."""
        return self._one("SELECT coalesce(max(id), 0) AS id FROM comparisons")["id"]

    def votes(self, upto_event: int | None = None) -> list[Vote]:
        """The votes that stand after event `upto_event` (default: the newest), by event id; controls included."""
        return store_queries.votes(self._db, self._upto(upto_event))

    def preferences(self, upto_event: int | None = None, aggregate: Aggregate = "each") -> list[Preference]:
        """The pairs to train on; control comparisons are left out. Each has split None unless its prompt has one.

        "each": one record for each standing vote for a or b, with its annotator; ties, both_bad and skips give none.
        "majority", "skill": one record for each comparison with a winner, with label_prob and, where votes gave their
        strength, margin (votes.py).
        """
        return [_record(Preference, row) for row in self.rows(upto_event, aggregate)]

    def comparisons(self, kind: Literal["normal", "control"] = "normal") -> list[dict[str, Any]]:
        """Every comparison of a kind by id: {id, prompt, metadata, text_a, text_b, ended_a, ended_b}.

        metadata holds the prompt's group and, where known, voice; a response of unknown end counts as ended.
        """
        return store_queries.comparisons(self._db, kind)

    def comparisons_after(self, id: int) -> list[dict[str, Any]]:
        """Comparisons newer than this one: {id, a, b, kind}."""
        return [dict(r) for r in self._db.execute("SELECT id, a, b, kind FROM comparisons WHERE id > ?", (id,))]

    def controls(self) -> dict[int, str]:
        """Control comparison -> the side that is known to be right, "a" or "b"."""
        return dict(map(tuple, self._db.execute("SELECT id, expected FROM comparisons WHERE kind = 'control'")))

    def pairs(self) -> dict[int, dict[str, Any]]:
        """Every comparison by id with what the owner may see: {kind, expected, prompt, messages} and, of each side,
        {text, ended, model} as text_a, text_b, ..."""
        return store_queries.pairs(self._db)

    def pair(self, comparison: int) -> dict[str, Any]:
        """One comparison, as in `pairs`."""
        return store_queries.pairs(self._db, comparison)[comparison]

    def prompts(self, upto_event: int | None = None) -> list[Prompt]:
        """Every prompt of the store, with the same groups as in `preferences`."""
        return [_record(Prompt, row) for row in self.prompt_rows(upto_event)]

    def rows(self, upto_event: int | None = None, aggregate: Aggregate = "each") -> list[dict]:
        """`preferences` as rows for a JSONL file that `load` reads."""
        return store_queries.rows(self._db, self._upto(upto_event), aggregate, self.path.name)

    def prompt_rows(self, upto_event: int | None = None) -> list[dict]:
        """`prompts` as rows."""
        found = store_queries.prompt_rows(self._db, self._upto(upto_event), self.path.name)
        return [{k: v for k, v in row.items() if k != "id"} for row in found]

    def fingerprint(self, upto_event: int | None = None) -> str:
        """16 hex digits of the events up to `upto_event` and all they refer to."""
        return store_queries.fingerprint(self._db, self._upto(upto_event))

    def stats(self, upto_event: int | None = None) -> dict[str, Any]:
        """Counts: what is in the store, the standing votes by choice and annotator, and what became of the pairs."""
        return store_queries.stats(self._db, self._upto(upto_event))

    def _add(self, table: str, key: str, row: dict[str, Any], key_column: str = "key") -> int:
        """The id of the row with this key, inserted if new."""
        row = row if key_column in row else {key_column: key} | row
        row = row | {"created": self._now()}
        with self.transaction():
            found = self._one(f"SELECT id FROM {table} WHERE {key_column} = ?", key)
            if found:
                return found["id"]
            return self._insert(table, row)

    def _event(self, **row: Any) -> int:
        return self._insert("events", {"tags": "[]"} | row | {"created": self._now()})

    def _now(self) -> str:
        return datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds")

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        columns, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        try:
            return self._db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values())).lastrowid
        except sqlite3.IntegrityError as error:
            raise UserError(f"{self.path}: cannot be added to {table}: {error} ({_short(row)})") from None

    def _one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        return self._db.execute(sql, values).fetchone()

    def _upto(self, upto_event: int | None) -> int:
        last = self.last_event()
        if upto_event is not None and not 0 <= upto_event <= last:
            raise UserError(f"{self.path}: there is no event {upto_event}; the newest is {last}")
        return last if upto_event is None else upto_event


def _connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection; one for reading leaves the file as it is, and nothing beside it."""
    if not readonly:
        return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    # While others have the file open it is read beside them. Else SQLite's own read-only mode would leave its helper
    # files there, and on a disk that cannot be written it needs to be told that nobody changes the file.
    in_use = Path(f"{path}-wal").exists()
    for mode in ("mode=ro",) if in_use else ("mode=rw", "mode=ro&immutable=1"):
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?{mode}", timeout=BUSY_SECONDS, isolation_level=None, uri=True
        )
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("SELECT count(*) FROM sqlite_master")
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            failed = error
    raise failed


def _copy(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """The store in memory, brought to this version."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    copy.row_factory = sqlite3.Row
    with contextlib.closing(connection):
        connection.backup(copy)
    store_schema.prepare(copy, path)
    return copy


def freeze(
    store: str | Path,
    out: str | Path,
    upto_event: int | None = None,
    aggregate: Aggregate = "each",
) -> int:
    """Write the store's preferences after event `upto_event` (default: the newest) as JSONL; returns that event's id.

    The first line is a header {"frozen": {"store", "event", "fingerprint", "aggregate", "votes", "rows"}}, which `load`
    checks and skips; `frozen` reads it. The file appears whole or not at all.
    """
    from rlhf.data.export import write_text

    with Store.open(store, readonly=True) as opened:
        upto = opened.last_event() if upto_event is None else upto_event
        rows = opened.rows(upto, aggregate)
        header = {"store": opened.path.name, "event": upto, "fingerprint": opened.fingerprint(upto)}
        header |= {"aggregate": aggregate, "votes": opened.stats(upto)["choices"], "rows": len(rows)}
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ({"frozen": header}, *rows)))
    return upto


def frozen(path: str | Path) -> dict[str, Any] | None:
    """The header of a file that `freeze` wrote, None for any other."""
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    with contextlib.suppress(json.JSONDecodeError):
        row = json.loads(line)
        if isinstance(row, dict) and len(row) == 1:
            return row.get("frozen")
    return None


def token_hash(token: str) -> str:
    """What is kept of a sign-in token; tokens are random and long, so that a plain hash cannot be turned back."""
    return hashlib.sha256(token.encode()).hexdigest()


def _record(kind: type[Record], row: dict[str, Any]) -> Any:
    default = row.pop("default_group", None)
    return kind(**row | {"group": row.get("group") or default})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"cannot be kept in a preference store as JSON: {error} ({_short(value)})") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
