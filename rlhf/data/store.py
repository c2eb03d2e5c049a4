"""The preference store: one SQLite file with prompts, responses, comparisons, and what annotators
said about them.

    with Store.open("votes.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        a = store.add_response(prompt, "Hello!", model="runs/sft")
        b = store.add_response(prompt, "What?", model="runs/sft")
        pair = store.add_comparison(a, b)
        event = store.vote(pair, store.add_annotator("ann"), "a")
        store.at(event).preferences()

Three to eight responses are ordered at once by `store.rank(store.add_ranking(ids), annotator, order)`.
Votes, orders and undos are events, numbered in the order in which they were committed. The state after
event n never changes, so a run records the event it read up to. The tables are in store_schema.py.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rlhf.data.rankings import check_order
from rlhf.data.records import one_name
from rlhf.data.spans import checked
from rlhf.data.store_contents import StoreContents, as_json
from rlhf.data.store_queries import StoreView
from rlhf.data.votes import CHOICES
from rlhf.errors import UserError

# on a comparison, or by the ranking that it is a pair of
STANDING_VOTE = """
    SELECT id FROM events e WHERE annotator = :annotator AND kind = 'vote'
        AND (comparison = :comparison
            OR choice = 'rank' AND ranking = (SELECT ranking FROM comparisons WHERE id = :comparison))
        AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)"""
# of a ranking itself, or on one of its pairs
STANDING_RANK = """
    SELECT id FROM events e WHERE annotator = :annotator AND kind = 'vote'
        AND (ranking = :ranking OR comparison IN (SELECT id FROM comparisons WHERE ranking = :ranking))
        AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)"""
# what is told of an event; placed and shown are JSON
EVENT_COLUMNS = """id, comparison, ranking, annotator, kind, choice, "left", placed, shown, duration_ms,
    undoes, created"""


class Store(StoreContents):
    """An open store. Every method that writes commits before it returns, unless inside
    `transaction()`.
    """

    def assign(
        self,
        comparison: int | None,
        annotator: int,
        *,
        left: Literal["a", "b"] | None = None,
        ranking: int | None = None,
        shown: Sequence[int] = (),
    ) -> int:
        """Record that the comparison, or the ranking, was handed to the annotator, and what was on
        the left, or the order of the responses on the page; returns the event's id.
        """
        row = {"comparison": comparison, "annotator": annotator, "left": left, "ranking": ranking}
        with self.transaction():
            return self._add_event(kind="assign", shown=as_json(shown) if shown else None, **row)

    def release(self, comparison: int | None, annotator: int, *, ranking: int | None = None) -> int:
        """Record that the annotator gave the comparison, or the ranking, back unanswered; returns
        the event's id.
        """
        row = {"comparison": comparison, "annotator": annotator, "ranking": ranking}
        with self.transaction():
            return self._add_event(kind="release", **row)

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
        spans: Sequence[dict[str, Any]] = (),
        request: str | None = None,
        created: str | None = None,
    ) -> int:
        """Record a vote and return its event's id.

        choice: "a", "b", "tie", "both_bad", "skip", or the id of the better response.
        left: which response was shown on the left (first). strength: 1 slightly, 2 clearly, 3 by
        far. corrected: a better answer that the annotator wrote. criteria: ratings from 1 to 5 of
        the responses, {name: {"a": 4, "b": 2}}. spans: passages of answers a and b
        (rlhf/data/spans.py).
        request: a name the caller gives to this one click; sent twice, it is recorded once.
        created: when it was cast elsewhere (ISO 8601). Raises UserError if this annotator has voted
        on this comparison already (undo that first), or a span is not in its answer.
        """
        with self.transaction():
            done = self.event_of_request(request)
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
            texts = self._texts({"a": pair["a"], "b": pair["b"]}) if spans else {}
            written = None
            if corrected is not None and corrected.strip():
                written = self.add_response(pair["prompt"], corrected)
            return self._add_event(
                comparison=comparison,
                annotator=annotator,
                kind="vote",
                choice=choice,
                left=left,
                strength=strength,
                reason=reason,
                tags=as_json(tags or []),
                duration_ms=duration_ms,
                corrected=written,
                criteria=as_json(criteria) if criteria else None,
                spans=as_json(checked(spans, texts)) if spans else None,
                request=request,
                created=created or self._now(),
            )

    def rank(
        self,
        ranking: int,
        annotator: int,
        order: Sequence[Sequence[int]],
        *,
        shown: Sequence[int] = (),
        reason: str | None = None,
        tags: list[str] | None = None,
        duration_ms: int | None = None,
        spans: Sequence[dict[str, Any]] = (),
        request: str | None = None,
        created: str | None = None,
    ) -> int:
        """Record in which order an annotator puts the responses of a ranking; returns the event's
        id.

        order: ids of responses, equally good ones together, the best first; empty: a skip. shown:
        the ids as they stood on the page. spans: their "answer" is a response's id. All else is as
        in `vote`, with the same errors.
        """
        with self.transaction():
            done = self.event_of_request(request)
            if done:
                return done["id"]
            found = self._one("SELECT responses FROM rankings WHERE id = ?", ranking)
            if found is None:
                raise UserError(f"{self.path}: there is no ranking {ranking}")
            responses = json.loads(found["responses"])
            if order:
                check_order(order, responses)
            standing = self.standing_rank(ranking, annotator)
            if standing:
                raise UserError(
                    f"{self.path}: annotator {annotator} has judged ranking {ranking}, or a pair of it, already (event "
                    f"{standing}); undo that first"
                )
            texts = self._texts({id: id for id in responses}) if spans else {}
            return self._add_event(
                ranking=ranking,
                annotator=annotator,
                kind="vote",
                choice="rank" if order else "skip",
                placed=as_json([sorted(equal) for equal in order]) if order else None,
                shown=as_json(shown) if shown else None,
                reason=reason,
                tags=as_json(tags or []),
                duration_ms=duration_ms,
                spans=as_json(checked(spans, texts)) if spans else None,
                request=request,
                created=created or self._now(),
            )

    def _texts(self, responses: dict[Any, int]) -> dict[Any, str]:
        """Return the text of each named response."""
        found = {}
        for name, id in responses.items():
            found[name] = self._one("SELECT text FROM responses WHERE id = ?", id)["text"]
        return found

    def standing_vote(self, comparison: int, annotator: int) -> int | None:
        """Return the event of the annotator's standing vote on a comparison, if there is one; that
        of a ranking which has ordered its responses too.
        """
        return self._standing(STANDING_VOTE, annotator=annotator, comparison=comparison)

    def standing_rank(self, ranking: int, annotator: int) -> int | None:
        """Return the event by which the annotator has judged a ranking, or a pair of it."""
        return self._standing(STANDING_RANK, annotator=annotator, ranking=ranking)

    def _standing(self, sql: str, **values: int) -> int | None:
        found = self._db.execute(sql, values).fetchone()
        return found and found["id"]

    def undo(self, event: int, *, request: str | None = None) -> int:
        """Undo a vote by a new event, whose id is returned. Raises UserError unless it is a vote
        that stands.
        """
        with self.transaction():
            done = self.event_of_request(request)
            if done:
                return done["id"]
            vote = self.event(event)
            if vote is None or vote["kind"] != "vote":
                raise UserError(
                    f"{self.path}: event {event} is {vote['kind'] if vote else 'missing'}, not a vote"
                )
            if self._one("SELECT id FROM events WHERE undoes = ?", event):
                raise UserError(f"{self.path}: the vote of event {event} is undone already")
            return self._add_event(
                comparison=vote["comparison"],
                ranking=vote["ranking"],
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
            annotator = self.annotator_id(name)
            is_excluded = one_name(name) in map(one_name, self.at().excluded())
            if is_excluded != back:
                state = "excluded" if is_excluded else "not excluded"
                raise UserError(f"{self.path}: '{name}' is {state} already")
            kind = "include" if back else "exclude"
            return self._add_event(annotator=annotator, kind=kind)

    def event_of_request(self, name: str | None) -> dict[str, Any] | None:
        """Return the event that the click of this name made, if it made one."""
        if name is None:
            return None
        found = self._one("SELECT * FROM events WHERE request = ?", name)
        return found and dict(found)

    def event(self, id: int) -> sqlite3.Row | None:
        """Return one event, with the columns of `events`; None where there is none."""
        return self._one(f"SELECT {EVENT_COLUMNS} FROM events WHERE id = ?", id)

    def events(self, after: int = 0) -> Iterator[sqlite3.Row]:
        """Return the events newer than `after`, in order, with `EVENT_COLUMNS`."""
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE id > ? ORDER BY id"
        return self._db.execute(sql, (after,))

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

    def _add_event(self, **row: Any) -> int:
        given = {name: value for name, value in row.items() if value is not None}
        return self._insert("events", {"tags": "[]", "created": self._now()} | given)


def _check_criteria(criteria: dict[str, dict[str, int]]) -> None:
    for name, ratings in criteria.items():
        for side, rating in ratings.items():
            if side not in ("a", "b") or rating not in (1, 2, 3, 4, 5):
                raise UserError(
                    f"criterion {name!r}: found {side!r}: {rating!r}, expected a or b from 1 to 5"
                )
