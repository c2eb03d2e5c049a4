"""What annotators are asked about: the prompts, responses, comparisons, annotators and settings of an
open preference store.
"""

import contextlib
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

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
from rlhf.errors import UserError
from rlhf.text import clip

# how the names of simulated annotators begin
SIMULATED = "sim-"
# responses that are ordered at once
FEWEST, MOST = 3, 8


class StoreContents:
    """An open store without its events. Every method that writes commits before it returns, unless
    inside `transaction()`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, readonly: bool = False):
        self.path = path
        self.readonly = readonly
        # seconds since 1970, for the columns `created` and `changed`
        self.clock: Callable[[], float] = time.time
        self._db = connection
        self._depth = 0

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False, readonly: bool = False) -> Self:
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

    def __enter__(self) -> Self:
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
        key = digest(as_json({name: value for name, value in given.items() if value is not None}))
        row = given | {
            "messages": as_json(messages),
            "metadata": as_json(metadata or {}),
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
            "sampling": as_json(sampling or {}),
            "ended": ended,
        }
        return self._add("responses", digest(as_json(row)), row)

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
        """Return the comparisons newer than this one: {id, a, b, kind, ranking (whose pair it is)}."""
        sql = "SELECT id, a, b, kind, ranking FROM comparisons WHERE id > ?"
        return list(map(dict, self._db.execute(sql, (id,))))

    def add_ranking(self, responses: Sequence[int]) -> int:
        """Return the id of the question to annotators: in which order are these responses to one
        prompt, from `FEWEST` to `MOST`? The same ones again give the same id.

        Every two of them become a comparison of this ranking. Raises UserError where two cannot be
        compared, or are compared already: a pair is asked about once.
        """
        ids = sorted(set(responses))
        if not FEWEST <= len(ids) <= MOST:
            raise UserError(
                f"{self.path}: a ranking of {len(ids)} responses; expected {FEWEST} to {MOST}"
            )
        pairs = list(itertools.combinations(ids, 2))
        (prompt,) = {self._comparable_prompt(*pair) for pair in pairs}
        keys = [self._one("SELECT key FROM responses WHERE id = ?", id)["key"] for id in ids]
        key = digest(as_json(keys))
        with self.transaction():
            found = self._one("SELECT id FROM rankings WHERE key = ?", key)
            if found:
                return found["id"]
            ranking = self._add("rankings", key, {"prompt": prompt, "responses": as_json(ids)})
            for a, b in pairs:
                if self._one("SELECT id FROM comparisons WHERE key = ?", f"{a}-{b}-normal"):
                    raise UserError(
                        f"{self.path}: responses {a} and {b} are compared already, as a pair or in another ranking; "
                        "rank new answers in a store of their own"
                    )
                row = {"prompt": prompt, "a": a, "b": b, "kind": "normal", "ranking": ranking}
                self._add("comparisons", f"{a}-{b}-normal", row)
        return ranking

    def rankings_after(self, id: int) -> list[dict[str, Any]]:
        """Return the rankings newer than this one: {id, responses (their ids)}."""
        sql = "SELECT id, responses FROM rankings WHERE id > ?"
        rows = map(dict, self._db.execute(sql, (id,)))
        return [row | {"responses": json.loads(row["responses"])} for row in rows]

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

    def annotator_id(self, name: str) -> int:
        """Return the id of the annotator of this name. Raises UserError, with those there are."""
        ids = {one_name(row["name"]): row["id"] for row in self.annotators()}
        if one_name(name) not in ids:
            known = ", ".join(ids) or "none"
            raise UserError(f"{self.path}: has no annotator {name!r}; found {known}")
        return ids[one_name(name)]

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

    def _add(self, table: str, key: str, row: dict[str, Any], key_column: str = "key") -> int:
        """Return the id of the row with this key, inserted if new."""
        with self.transaction():
            found = self._one(f"SELECT id FROM {table} WHERE {key_column} = ?", key)
            if found:
                return found["id"]
            return self._insert(table, {key_column: key} | row | {"created": self._now()})

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


def as_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise UserError(
            f"cannot be kept in a preference store as JSON: {error} ({clip(value, 120)})"
        ) from None
