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
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rlhf.config import UserError, near_file
from rlhf.data import schema
from rlhf.data.records import Message, Preference, Prompt, Record, check_text, check_unicode, digest, prompt_group
from rlhf.data.split import answer_pair, join_groups
from rlhf.data.votes import CHOICES, Vote, each, majority

BUSY_SECONDS = 60.0  # how long a writer waits for the others


class Store:
    """An open store. Every method that writes commits before it returns, unless inside `transaction()`."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path, self._db, self._depth = path, connection, 0

    @classmethod
    def open(cls, path: str | Path, create: bool = False) -> Store:
        """Open a store, bringing an older file to this version; with `create`, make it if it is missing.

        Raises UserError: no such file, not a preference store, or made by a newer version.
        """
        path = Path(path).expanduser()
        if not path.exists() and not create:
            raise UserError(f"{path}: no such preference store{near_file(path)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder {path.parent} does not exist")
        connection = None
        try:
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            schema.prepare(connection, path)
        except (sqlite3.Error, UserError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be opened as a preference store ({error})") from None
        return cls(path, connection)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are committed together at the end, or none if an exception leaves it. May be nested."""
        if self._depth == 0:
            try:
                self._db.execute("BEGIN IMMEDIATE")
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
        voice: str | None = None,
        split: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> int:
        """Its id; the same prompt again (all arguments alike) gives the same id. Raises RecordError."""
        Prompt(prompt=messages, split=split)
        content = {"messages": messages, "own_group": group, "voice": voice, "split": split, "metadata": metadata or {}}
        key = digest(_json({k: v for k, v in content.items() if v is not None}))
        default = prompt_group(messages)
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
        """The id of the annotator of this name, who is added if new. Of a sign-in token only the hash is kept."""
        row = {"name": name, "kind": kind, "token_hash": token and hashlib.sha256(token.encode()).hexdigest()}
        found = self._db.execute("SELECT id, kind FROM annotators WHERE name = ?", (name,)).fetchone()
        if found and found["kind"] != kind:
            raise UserError(f"{self.path}: annotator '{name}' is a {found['kind']}, not a {kind}; choose another name")
        return self._add("annotators", name, row, key_column="name")

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

    def last_event(self) -> int:
        """The id of the newest event, 0 if there is none."""
        return self._one("SELECT coalesce(max(id), 0) AS id FROM events")["id"]

    def votes(self, upto_event: int | None = None) -> list[Vote]:
        """The votes that stand after event `upto_event` (default: the newest), by event id; controls included."""
        found = self._db.execute(
            "SELECT e.*, n.name FROM events e JOIN annotators n ON n.id = e.annotator WHERE e.kind = 'vote' "
            "AND e.id <= :n AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id AND u.id <= :n) ORDER BY e.id",
            {"n": self._upto(upto_event)},
        )
        names = ("comparison", "choice", "left", "strength", "reason", "duration_ms", "created")
        return [
            Vote(event=r["id"], annotator=r["name"], tags=json.loads(r["tags"]), **{n: r[n] for n in names})
            for r in found
        ]

    def preferences(
        self, upto_event: int | None = None, aggregate: Literal["each", "majority"] = "each"
    ) -> list[Preference]:
        """The pairs to train on; control comparisons are left out. Each has split None unless its prompt has one.

        "each": one record for each standing vote for a or b, with its annotator; ties, both_bad and skips give none.
        "majority": one record for each comparison with a winner; label_prob is the winner's share of the votes, where
        a tie counts half for each side, and both_bad and skips do not count (votes.py).
        """
        return [_record(Preference, row) for row in self.rows(upto_event, aggregate)]

    def comparisons(self, kind: Literal["normal", "control"] = "normal") -> list[dict[str, Any]]:
        """Every comparison of a kind by id: {id, prompt, metadata, text_a, text_b, ended_a, ended_b}.

        metadata holds the prompt's group and, where known, voice; a response of unknown end counts as ended.
        """
        found = self._db.execute(
            "SELECT c.id, p.messages, p.metadata, p.own_group, p.default_group, p.voice, a.text AS text_a, "
            "b.text AS text_b, a.ended AS ended_a, b.ended AS ended_b FROM comparisons c "
            "JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b "
            "WHERE c.kind = ? ORDER BY c.id",
            (kind,),
        )
        pairs = []
        for row in found:
            metadata = json.loads(row["metadata"]) | {"group": row["own_group"] or row["default_group"]}
            if row["voice"] is not None:
                metadata["voice"] = row["voice"]
            pair = {"id": row["id"], "prompt": json.loads(row["messages"]), "metadata": metadata}
            for side in "ab":
                pair[f"text_{side}"] = row[f"text_{side}"]
                pair[f"ended_{side}"] = row[f"ended_{side}"] is None or bool(row[f"ended_{side}"])
            pairs.append(pair)
        return pairs

    def prompts(self, upto_event: int | None = None) -> list[Prompt]:
        """Every prompt of the store, with the same groups as in `preferences`."""
        return [_record(Prompt, row) for row in self.prompt_rows(upto_event)]

    def rows(self, upto_event: int | None = None, aggregate: Literal["each", "majority"] = "each") -> list[dict]:
        """`preferences` as rows for a JSONL file that `load` reads."""
        if aggregate not in ("each", "majority"):
            raise UserError(f"aggregate: found {aggregate!r}, expected each or majority")
        upto = self._upto(upto_event)
        pairs = self._pairs()
        votes = [v for v in self.votes(upto) if pairs[v.comparison]["kind"] == "normal"]
        prompts = {row.pop("id"): row for row in self._prompt_rows(upto)}
        rows = []
        for verdict in each(votes) if aggregate == "each" else majority(votes):
            pair = pairs[verdict.comparison]
            row = dict(prompts[pair["prompt"]])
            row["chosen"] = pair["text_a" if verdict.winner == "a" else "text_b"]
            row["rejected"] = pair["text_b" if verdict.winner == "a" else "text_a"]
            for name, side in (("chosen_ended", verdict.winner), ("rejected_ended", "ab".replace(verdict.winner, ""))):
                if pair[f"ended_{side}"] == 0:  # cut off; NULL is not known to be
                    row[name] = False
            row["annotator"], row["label_prob"] = verdict.annotator, verdict.label_prob
            row["metadata"] = row["metadata"] | {"vote": {"comparison": verdict.comparison} | verdict.about}
            rows.append({name: value for name, value in row.items() if value is not None})
        return rows

    def prompt_rows(self, upto_event: int | None = None) -> list[dict]:
        """`prompts` as rows."""
        return [{k: v for k, v in row.items() if k != "id"} for row in self._prompt_rows(self._upto(upto_event))]

    def fingerprint(self, upto_event: int | None = None) -> str:
        """16 hex digits of the events up to `upto_event` and all they refer to."""
        upto = self._upto(upto_event)
        events = self._db.execute(
            "SELECT e.*, n.name, c.kind, c.expected, p.key AS prompt_key, a.key AS key_a, b.key AS key_b FROM events e "
            "JOIN annotators n ON n.id = e.annotator JOIN comparisons c ON c.id = e.comparison "
            "JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b "
            "WHERE e.id <= ? ORDER BY e.id",
            (upto,),
        )
        whole = hashlib.sha256()
        for event in events:
            whole.update(_json(list(event)).encode() + b"\n")
        return whole.hexdigest()[:16]

    def stats(self, upto_event: int | None = None) -> dict[str, Any]:
        """Counts: what is in the store, the standing votes by choice and annotator, and what became of the pairs."""
        upto = self._upto(upto_event)
        count = {t: self._one(f"SELECT count(*) AS n FROM {t}")["n"] for t in ("prompts", "responses", "annotators")}
        kinds = dict.fromkeys(("normal", "control"), 0)
        kinds |= dict(map(tuple, self._db.execute("SELECT kind, count(*) FROM comparisons GROUP BY kind")))
        votes = self.votes(upto)
        pairs = self._pairs()
        normal = [v for v in votes if pairs[v.comparison]["kind"] == "normal"]
        cast = self._one("SELECT count(*) AS n FROM events WHERE kind = 'vote' AND id <= ?", upto)["n"]
        return count | {
            "comparisons": kinds["normal"],
            "controls": kinds["control"],
            "last_event": upto,
            "votes": len(votes),
            "undone": cast - len(votes),
            "choices": dict.fromkeys(CHOICES, 0) | Counter(v.choice for v in votes),
            "by_annotator": dict(Counter(v.annotator for v in votes)),
            "comparisons_with_votes": len({v.comparison for v in normal}),
            "comparisons_with_winner": len(majority(normal)),
        }

    def _add(self, table: str, key: str, row: dict[str, Any], key_column: str = "key") -> int:
        """The id of the row with this key, inserted if new."""
        row = row if key_column in row else {key_column: key} | row
        row = row | {"created": _now()}
        with self.transaction():
            found = self._one(f"SELECT id FROM {table} WHERE {key_column} = ?", key)
            if found:
                return found["id"]
            return self._insert(table, row)

    def _event(self, **row: Any) -> int:
        return self._insert("events", {"tags": "[]"} | row | {"created": _now()})

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

    def _pairs(self) -> dict[int, sqlite3.Row]:
        found = self._db.execute(
            "SELECT c.*, a.text AS text_a, b.text AS text_b, a.ended AS ended_a, b.ended AS ended_b FROM comparisons c "
            "JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b"
        )
        return {row["id"]: row for row in found}

    def _prompt_rows(self, upto: int) -> list[dict]:
        """All prompts; default groups are joined over the answer pairs that were voted on up to event `upto`.

        Votes count here even if undone or a tie, so that groups do not depend on `aggregate` and only ever grow.
        """
        found = self._db.execute("SELECT * FROM prompts ORDER BY id").fetchall()
        voted = {
            r[0] for r in self._db.execute("SELECT comparison FROM events WHERE kind = 'vote' AND id <= ?", (upto,))
        }
        links: dict[int, list] = {row["id"]: [] for row in found}
        for id, pair in self._pairs().items():
            if id in voted:
                links[pair["prompt"]].append(answer_pair(pair["text_a"], pair["text_b"]))
        free = [row for row in found if row["own_group"] is None]
        joint = join_groups([row["default_group"] for row in free], [links[row["id"]] for row in free])
        groups = dict(zip((row["id"] for row in free), joint, strict=True))
        rows = []
        for row in found:
            own = row["own_group"]
            new = {"id": row["id"], "prompt": json.loads(row["messages"]), "source": self.path.name}
            new |= {"group": own} if own is not None else {"default_group": groups[row["id"]]}
            new |= {name: row[name] for name in ("voice", "split") if row[name] is not None}
            rows.append(new | {"metadata": json.loads(row["metadata"])})
        return rows


def freeze(
    store: str | Path,
    out: str | Path,
    upto_event: int | None = None,
    aggregate: Literal["each", "majority"] = "each",
) -> int:
    """Write the store's preferences after event `upto_event` (default: the newest) as JSONL; returns that event's id.

    The first line is a header {"frozen": {"store", "event", "fingerprint", "aggregate", "rows"}}, which `load` checks
    and skips; `frozen` reads it. The file appears whole or not at all.
    """
    with Store.open(store) as opened:
        upto = opened.last_event() if upto_event is None else upto_event
        rows = opened.rows(upto, aggregate)
        header = {"store": opened.path.name, "event": upto, "fingerprint": opened.fingerprint(upto)}
    header |= {"aggregate": aggregate, "rows": len(rows)}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        for row in ({"frozen": header}, *rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(out)
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


def _record(kind: type[Record], row: dict[str, Any]) -> Any:
    default = row.pop("default_group", None)
    return kind(**row | {"group": row.get("group") or default})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"cannot be kept in a preference store as JSON: {error} ({_short(value)})") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
