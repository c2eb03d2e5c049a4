"""The preference store: one SQLite file with prompts, responses, comparisons, and what annotators
said about them.

    with Store.open("votes.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        a = store.add_response(prompt, "Hello!", model="runs/sft")
        b = store.add_response(prompt, "What?", model="runs/sft")
        pair = store.add_comparison(a, b)
        event = store.vote(pair, store.add_annotator("ann"), "a")
        store.at(event).preferences()

Votes and undos are events, numbered in the order in which they were committed. The state after
event n never changes, so a run records the event it read up to. The tables are explained in
docs/collect.md.
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

from rlhf.data import store_schema
from rlhf.data.records import (
    Message,
    Prompt,
    check_text,
    check_unicode,
    digest,
    one_name,
    prompt_group,
)
from rlhf.data.store_queries import StoreView
from rlhf.data.votes import CHOICES
from rlhf.errors import UserError
from rlhf.text import clip

# how the names of simulated annotators begin
SIMULATED = "sim-"
STANDING_VOTE = """
    SELECT id FROM events e WHERE comparison = ? AND annotator = ? AND kind = 'vote'
        AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)"""


class Store:
    """An open store. Every method that writes commits before it returns, unless inside
    `transaction()`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, readonly: bool = False):
        self.path = path
        self.readonly = readonly
        # seconds since 1970, for the columns `created` and `changed`
        self.clock: Callable[[], float] = time.time
        self._db = connection
        self._depth = 0

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False, readonly: bool = False) -> Store:
        """Open a store, bringing an older file to this version; with `create`, make it if it is
        missing.

        readonly: the file is not written; one of an older version is brought to this one in memory.
        Raises UserError: no such file, not a preference store, or made by a newer version. A
        damaged file ends a `with` block with a UserError too.
        """
        path = Path(path).expanduser()
        return cls(
            path, store_schema.connect(path, create=create, readonly=readonly), readonly=readonly
        )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        # exactly these types: IntegrityError and its like are subclasses, and have messages of
        # their own
        if type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError, json.JSONDecodeError):
            raise UserError(
                f"{self.path}: cannot be read or written ({str(error)[:100]}). If it is damaged, use an earlier copy, "
                f"or save what can be read: sqlite3 {self.path.name} .recover | sqlite3 new.db"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes inside together at the end, or none if an exception leaves it. May be
        nested.
        """
        if self._depth == 0:
            try:
                # writers wait here, not at their first write, where waiting could end in a deadlock
                self._db.execute("BEGIN" if self.readonly else "BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise UserError(f"{self.path}: cannot be written ({error})") from None
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._db.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors
            if self._depth == 1 and self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1

    # Prompts, responses and comparisons

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
        """Return the prompt's id; the same prompt again (all arguments equal but default_group)
        gives the same id.

        group: as the data names it, to stay. default_group: one that may be joined with others over
        shared answers;
        default: by the prompt's hash. split: only where the data gives it; otherwise the group
        decides at reading. Raises RecordError.
        """
        # checks them
        Prompt(prompt=messages, split=split)
        given = {
            "messages": messages,
            "own_group": group,
            "voice": voice,
            "split": split,
            "metadata": metadata or {},
        }
        # without what is not given, so that a column added later changes no key
        key = digest(_json({name: value for name, value in given.items() if value is not None}))
        row = given | {
            "messages": _json(messages),
            "metadata": _json(metadata or {}),
            "default_group": default_group or prompt_group(messages),
        }
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
        """Return the response's id; the same text from the same model and sampling settings gives
        the same id.

        `sampling` holds temperature, top_p, seed, ...; `ended` is False for a response cut off at
        its length limit.
        """
        # models do give empty responses: they are kept, and just cannot be compared
        if not isinstance(text, str):
            check_text("text", text)
        check_unicode("text", text)
        row = {
            "prompt": prompt,
            "text": text,
            "model": model,
            "model_fingerprint": model_fingerprint,
            "adapter_fingerprint": adapter_fingerprint,
            "sampling": _json(sampling or {}),
            "ended": ended,
        }
        return self._add("responses", digest(_json(row)), row)

    def find_response(self, prompt: int, text: str, model: str | None) -> int | None:
        """Return the id of the first answer of this text to a prompt, however it was sampled; None
        where there is none. A model that is None matches every one.
        """
        sql = """SELECT id FROM responses WHERE prompt = ? AND text = ? AND (? IS NULL OR model IS ?)
            ORDER BY id LIMIT 1"""
        found = self._one(sql, prompt, text, model, model)
        return found["id"] if found else None

    def add_comparison(
        self,
        one: int,
        other: int,
        *,
        kind: Literal["normal", "control"] = "normal",
        expected: int | None = None,
    ) -> int:
        """Return the id of the question to annotators: which of two responses to one prompt is
        better?

        The response that was added to the store first is "a", in whatever order they are given; the
        same two again give the same id. A control comparison has a known answer: the id of the
        `expected` response. Raises UserError if the responses answer different prompts, are the
        same text, or one is empty.
        """
        # a pair is one comparison in whichever order it is given
        a, b = sorted((one, other))
        prompt = self._comparable_prompt(a, b)
        if (kind == "control") != (expected is not None) or expected not in (None, a, b):
            raise UserError(
                f"expected={expected}: give one of the two responses for a control comparison, and none otherwise"
            )
        side = {a: "a", b: "b"}.get(expected)
        row = {"prompt": prompt, "a": a, "b": b, "kind": kind, "expected": side}
        id = self._add("comparisons", f"{a}-{b}-{kind}", row)
        # it may have been there already, with the other answer as the right one
        found = self._one("SELECT expected FROM comparisons WHERE id = ?", id)["expected"]
        if found != side:
            raise UserError(
                f"{self.path}: control comparison {id} of these responses expects {found}, not {side}"
            )
        return id

    def _comparable_prompt(self, a: int, b: int) -> int:
        """Return the prompt that both responses answer; raises UserError if they cannot be
        compared.
        """
        first = self._one("SELECT prompt, text FROM responses WHERE id = ?", a)
        second = self._one("SELECT prompt, text FROM responses WHERE id = ?", b)
        pair = f"responses {a} and {b}"
        if a == b or first is None or second is None:
            raise UserError(
                f"{self.path}: comparison of {pair}: expected two that are in the store"
            )
        if first["prompt"] != second["prompt"]:
            raise UserError(f"{self.path}: {pair} answer different prompts and cannot be compared")
        if first["text"].strip() == second["text"].strip():
            raise UserError(f"{self.path}: {pair} are the same text; there is nothing to compare")
        for id, response in ((a, first), (b, second)):
            if not response["text"].strip():
                raise UserError(f"{self.path}: response {id} is empty; there is nothing to compare")
        return first["prompt"]

    def comparisons_after(self, id: int) -> list[dict[str, Any]]:
        """Return the comparisons newer than this one: {id, a, b, kind}."""
        sql = "SELECT id, a, b, kind FROM comparisons WHERE id > ?"
        return list(map(dict, self._db.execute(sql, (id,))))

    # Annotators and settings

    def add_annotator(
        self,
        name: str,
        kind: Literal["person", "model", "rule"] = "person",
        token: str | None = None,
        role: Literal["annotator", "adjudicator"] | None = None,
    ) -> int:
        """Return the id of the annotator of this name (see `one_name`), who is added if new.

        Of a sign-in token only the hash is kept. A name that begins with "sim-" is that of a
        program which stands for a person: no table can then show its votes as a person's. role: an
        adjudicator's vote ends a dispute; it stays what it was at first (default: annotator).
        Raises UserError if the name has another kind or role.
        """
        name = one_name(name)
        source = "human" if kind == "person" else "judge"
        if name.startswith(SIMULATED):
            source = "simulated"
        for known in self.annotators():
            if one_name(known["name"]) != name:
                continue
            if known["kind"] != kind:
                raise UserError(
                    f"{self.path}: annotator '{known['name']}' is a {known['kind']}, not a {kind}; choose another name"
                )
            if role not in (None, known["role"]):
                raise UserError(
                    f"{self.path}: '{known['name']}' is an {known['role']} already; choose another name"
                )
            return known["id"]
        row = {
            "name": name,
            "kind": kind,
            "token_hash": token and token_hash(token),
            "source": source,
            "role": role or "annotator",
        }
        return self._add("annotators", name, row, key_column="name")

    def annotators(self) -> list[dict[str, Any]]:
        """Return every annotator by id: {id, name, kind, source, role, token_hash (None: cannot sign
        in)}.
        """
        sql = "SELECT id, name, kind, source, role, token_hash FROM annotators ORDER BY id"
        return list(map(dict, self._db.execute(sql)))

    def set_token(self, annotator: int, token: str | None) -> None:
        """Let the annotator sign in with this token and no other; None: with none. Only its hash is
        kept.
        """
        hashed = token and token_hash(token)
        with self.transaction():
            self._db.execute(
                "UPDATE annotators SET token_hash = ? WHERE id = ?", (hashed, annotator)
            )

    def setting(self, name: str, default: str | None = None) -> str | None:
        """Return what the collection was set up with under this name."""
        found = self._one("SELECT value FROM settings WHERE name = ?", name)
        return found["value"] if found else default

    def set_setting(self, name: str, value: str) -> None:
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", (name, value, self._now())
            )

    # Events

    def assign(
        self, comparison: int, annotator: int, *, left: Literal["a", "b"] | None = None
    ) -> int:
        """Record that the comparison was handed to the annotator, and what was on the left; returns
        the event's id.
        """
        with self.transaction():
            return self._event(comparison=comparison, annotator=annotator, kind="assign", left=left)

    def release(self, comparison: int, annotator: int) -> int:
        """Record that the annotator gave the comparison back unanswered; returns the event's id."""
        with self.transaction():
            return self._event(comparison=comparison, annotator=annotator, kind="release")

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
        corrected: str | None = None,
        criteria: dict[str, dict[str, int]] | None = None,
        request: str | None = None,
        created: str | None = None,
    ) -> int:
        """Record a vote and return its event's id.

        choice: "a", "b", "tie", "both_bad", "skip", or the id of the better response.
        left: which response was shown on the left (first). strength: 1 slightly, 2 clearly, 3 by
        far. corrected: a better answer that the annotator wrote. criteria: ratings from 1 to 5 of
        the responses, {name: {"a": 4, "b": 2}}.
        request: a name the caller gives to this one click; sent twice, it is recorded once.
        created: when it was cast elsewhere (ISO 8601). Raises UserError if this annotator has voted
        on this comparison already (undo that first).
        """
        with self.transaction():
            done = self.request(request)
            if done:
                return done["id"]
            pair = self._one("SELECT prompt, a, b FROM comparisons WHERE id = ?", comparison)
            if pair is None:
                raise UserError(f"{self.path}: there is no comparison {comparison}")
            # callers may name the response instead of its letter
            choice = {pair["a"]: "a", pair["b"]: "b"}.get(choice, choice)
            if choice not in CHOICES:
                raise UserError(
                    f"choice: found {choice!r}, expected {', '.join(CHOICES)} or one of the pair's responses"
                )
            standing = self.standing_vote(comparison, annotator)
            if standing:
                raise UserError(
                    f"{self.path}: annotator {annotator} has voted on comparison {comparison} already (event "
                    f"{standing}); undo that vote first"
                )
            _check_criteria(criteria or {})
            written = None
            if corrected is not None and corrected.strip():
                written = self.add_response(pair["prompt"], corrected)
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
                corrected=written,
                criteria=_json(criteria) if criteria else None,
                request=request,
                created=created or self._now(),
            )

    def standing_vote(self, comparison: int, annotator: int) -> int | None:
        """Return the event of the annotator's vote that stands on a comparison, if there is one."""
        found = self._one(STANDING_VOTE, comparison, annotator)
        return found and found["id"]

    def undo(self, event: int, *, request: str | None = None) -> int:
        """Undo a vote by a new event, whose id is returned. Raises UserError unless it is a vote
        that stands.
        """
        with self.transaction():
            done = self.request(request)
            if done:
                return done["id"]
            vote = self._one("SELECT * FROM events WHERE id = ?", event)
            if vote is None or vote["kind"] != "vote":
                raise UserError(
                    f"{self.path}: event {event} is {vote['kind'] if vote else 'missing'}, not a vote"
                )
            if self._one("SELECT id FROM events WHERE undoes = ?", event):
                raise UserError(f"{self.path}: the vote of event {event} is undone already")
            return self._event(
                comparison=vote["comparison"],
                annotator=vote["annotator"],
                kind="undo",
                undoes=event,
                request=request,
            )

    def exclude(self, name: str, *, back: bool = False) -> int:
        """Let an annotator's votes count no more, or again, from a new event on; return its id.

        The votes stay in the store, and every state before that event stays what it was. Raises
        UserError if there is no such annotator, or nothing would change.
        """
        with self.transaction():
            ids = {one_name(row["name"]): row["id"] for row in self.annotators()}
            if one_name(name) not in ids:
                known = ", ".join(ids) or "none"
                raise UserError(f"{self.path}: has no annotator {name!r}; found {known}")
            is_excluded = one_name(name) in map(one_name, self.at().excluded())
            if is_excluded != back:
                state = "excluded" if is_excluded else "not excluded"
                raise UserError(f"{self.path}: '{name}' is {state} already")
            kind = "include" if back else "exclude"
            return self._event(annotator=ids[one_name(name)], kind=kind)

    def request(self, name: str | None) -> dict[str, Any] | None:
        """Return the event that this request made, if it made one."""
        if name is None:
            return None
        found = self._one("SELECT * FROM events WHERE request = ?", name)
        return found and dict(found)

    def events(self, after: int = 0) -> Iterator[sqlite3.Row]:
        """Return the events newer than `after`, in order.

        Columns: id, comparison, annotator, kind, choice, left, duration_ms, undoes, created.
        """
        names = 'id, comparison, annotator, kind, choice, "left", duration_ms, undoes, created'
        return self._db.execute(f"SELECT {names} FROM events WHERE id > ? ORDER BY id", (after,))

    def last_event(self) -> int:
        """Return the id of the newest event, 0 if there is none."""
        return self._one("SELECT coalesce(max(id), 0) AS id FROM events")["id"]

    def last_comparison(self) -> int:
        """Return the id of the newest comparison, 0 if there is none."""
        return self._one("SELECT coalesce(max(id), 0) AS id FROM comparisons")["id"]

    def at(self, event: int | None = None) -> StoreView:
        """Return what the store holds after `event` (default: the newest). Raises UserError if
        there is no such event.
        """
        last = self.last_event()
        if event is not None and not 0 <= event <= last:
            raise UserError(f"{self.path}: there is no event {event}; the newest is {last}")
        return StoreView(self._db, last if event is None else event, self.path.name)

    def _add(self, table: str, key: str, row: dict[str, Any], key_column: str = "key") -> int:
        """Return the id of the row with this key, inserted if new."""
        with self.transaction():
            found = self._one(f"SELECT id FROM {table} WHERE {key_column} = ?", key)
            if found:
                return found["id"]
            return self._insert(table, {key_column: key} | row | {"created": self._now()})

    def _event(self, **row: Any) -> int:
        given = {name: value for name, value in row.items() if value is not None}
        return self._insert("events", {"tags": "[]", "created": self._now()} | given)

    def _now(self) -> str:
        return datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="milliseconds")

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        columns = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        try:
            return self._db.execute(
                f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values())
            ).lastrowid
        except sqlite3.IntegrityError as error:
            raise UserError(
                f"{self.path}: cannot be added to {table}: {error} ({clip(row, 120)})"
            ) from None

    def _one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        return self._db.execute(sql, values).fetchone()


def token_hash(token: str) -> str:
    """Return what is kept of a sign-in token; tokens are random and long, so a plain hash cannot be
    reversed.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def _check_criteria(criteria: dict[str, dict[str, int]]) -> None:
    for name, ratings in criteria.items():
        for side, rating in ratings.items():
            if side not in ("a", "b") or rating not in (1, 2, 3, 4, 5):
                raise UserError(
                    f"criterion {name!r}: found {side!r}: {rating!r}, expected a or b from 1 to 5"
                )


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise UserError(
            f"cannot be kept in a preference store as JSON: {error} ({clip(value, 120)})"
        ) from None
