"""Who judges which pair next.

The queue is a fold over the store's events: each call reads, inside one write transaction, the events that others have
committed since, and only then decides. Two servers on one file therefore hand out no place twice, and a server that
was killed knows all after reading the file again.

A pair has `overlap` places. A place is taken by a person's standing vote other than a skip, or by an assignment until
it lapses. Nobody gets a pair again that they have answered; control pairs are for everybody and have no places.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf.data.store import Store

SIDES = ("left", "right")
ANSWERS = (*SIDES, "tie", "both_bad", "skip")
RECENT = 20  # votes that make up an annotator's own speed


@dataclass(frozen=True)
class Rules:
    """overlap: people for each pair; lapse: seconds until an assignment lapses; control_share: of what is shown."""

    overlap: int = 3
    lapse: float = 1800.0
    control_share: float = 0.1


@dataclass(frozen=True)
class Assignment:
    """A pair handed to an annotator by `event`, with response `left` ("a" or "b") on the left, at `since` (epoch s)."""

    event: int
    comparison: int
    annotator: int
    left: str
    since: float


@dataclass(frozen=True)
class Answer:
    """What came back: left, right, tie, both_bad or skip; strength 1 to 3 for a side; why, if the annotator said so."""

    choice: str
    strength: int | None = None
    reason: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Of one annotator: votes that stand and median seconds of the last ones; of all: places filled and in all.

    `given` counts the annotator's own answers to control pairs too, or standing still would tell which those are.
    """

    mine: int
    seconds: float | None
    given: int
    needed: int


class Queue:
    """Assignments, votes and undos of people; every method is one transaction of the store."""

    def __init__(
        self,
        store: Store,
        rules: Rules,
        draw: random.Random | None = None,
    ):
        self.store, self.rules, self.draw = store, rules, draw or random.SystemRandom()
        self._event = self._comparison = 0  # read up to here
        self._people: dict[int, bool] = {}  # annotator -> is a person
        self._ends: dict[int, tuple[int, int]] = {}  # comparison -> its responses
        self._controls: list[int] = []
        self._untouched: dict[int, None] = {}  # normal pairs without an event, in random order
        self._begun: set[int] = set()  # normal pairs with events and with a place that no vote has taken
        self._filled: dict[int, int] = {}  # normal pair -> places taken by votes
        self._votes: dict[int, dict[int, tuple[int, str]]] = {}  # comparison -> annotator -> (event, choice)
        self._held: dict[int, dict[int, Assignment]] = {}  # comparison -> annotator -> assignment without an answer
        self._hands: dict[int, dict[int, Assignment]] = {}  # the same by annotator
        self._own: dict[int, dict[int, tuple[int, int | None]]] = {}  # annotator -> event -> (comparison, duration_ms)
        self._met: dict[int, set[tuple[int, int]]] = {}  # annotator -> responses they have compared
        self._last: dict[int, float] = {}  # annotator -> time of their newest event
        self._given = 0

    def next(self, annotator: int) -> Assignment | None:
        """What the annotator is to judge now: what they hold, else something new; None if nothing is left for them."""
        with self.store.transaction():
            self._read()
            mine = [a for a in self._hands.get(annotator, {}).values() if self._active(a)]
            if mine:
                return max(mine, key=lambda a: a.event)
            chosen = self._pick(annotator)
            return None if chosen is None else self._assign(chosen, annotator, self.draw.choice("ab"))

    def vote(self, annotator: int, assignment: int, answer: Answer, request: str) -> str:
        """Record the answer to an assignment (its event); says what became of it.

        saved; again: this very click is saved already; withdrawn: it was, and was undone since; differs: the form was
        sent before with another answer, which stands; answered: the annotator's vote on this pair stands already; full:
        the assignment lapsed and others took the places; gone: there is no such assignment.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._read()
            if done := self.store.request(key):
                if done["kind"] == "vote" and done["id"] not in self._own.get(annotator, {}):
                    return "withdrawn"
                return "again" if self._same(done, answer) else "differs"
            held = next((a for a in self._hands.get(annotator, {}).values() if a.event == assignment), None)
            if held is None:
                return "answered" if self._was_answered(annotator, assignment) else "gone"
            if not self._active(held) and self._taken(held.comparison, annotator) >= self.rules.overlap:
                return "full"
            since = max(held.since, self._last.get(annotator, 0.0))
            self.store.vote(
                held.comparison,
                annotator,
                self._side(answer.choice, held.left),
                left=held.left,
                strength=answer.strength if answer.choice in SIDES else None,
                reason=answer.reason,
                tags=list(answer.tags),
                duration_ms=max(0, round(1000 * (self.store.clock() - since))),
                request=key,
            )
            return "saved"

    def undo(self, annotator: int, request: str) -> str:
        """Take the annotator's last vote back and hand them the pair again, sides as they were.

        undone; again: this very click is done already; nothing: no vote of theirs stands; full: they had skipped the
        pair, and others have taken its places since.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._read()
            if self.store.request(key):
                return "again"
            if not self._own.get(annotator):
                return "nothing"
            event = max(self._own[annotator])
            comparison = self._own[annotator][event][0]
            if self._taken(comparison, annotator) >= self.rules.overlap:
                return "full"
            left = next(v["left"] for v in self.store.events(event - 1))
            self.store.undo(event, request=key)
            self._assign(comparison, annotator, left or "a")
            return "undone"

    def release(self, annotator: int) -> None:
        """Give back what the annotator holds, so that others need not wait until it lapses."""
        with self.store.transaction():
            self._read()
            for held in list(self._hands.get(annotator, {}).values()):
                self.store.release(held.comparison, annotator)

    def progress(self, annotator: int) -> Progress:
        """How far the annotator and all together have come."""
        with self.store.transaction():
            self._read()
        own = self._own.get(annotator, {})
        times = [ms for _, (_, ms) in sorted(own.items())[-RECENT:] if ms is not None]
        seconds = statistics.median(times) / 1000 if times else None
        needed = self.rules.overlap * len(self._filled)
        checks = sum(c not in self._filled and self._votes[c][annotator][1] != "skip" for c, _ in own.values())
        return Progress(len(own), seconds, min(self._given + checks, needed), needed)

    def open_pairs(self) -> dict[str, int]:
        """Normal pairs by how far they are: {"complete", "begun", "untouched"}; begun have a vote or an assignment."""
        with self.store.transaction():
            self._read()
        taken = sum(1 for c in self._begun if self._filled[c] or any(map(self._active, self._held.get(c, {}).values())))
        complete = sum(filled >= self.rules.overlap for filled in self._filled.values())
        return {"complete": complete, "begun": taken, "untouched": len(self._filled) - complete - taken}

    def _pick(self, annotator: int) -> int | None:
        """A pair with a free place that the annotator has not met: those nearest to complete first, else at random."""
        met = self._met.get(annotator, set())
        best, most = None, -1
        for c in self._begun:
            if self._ends[c] not in met and (taken := self._taken(c, annotator)) < self.rules.overlap and taken > most:
                best, most = c, taken
        if best is None:
            best = next((c for c in self._untouched if self._ends[c] not in met), None)
        if best is not None and self.draw.random() < self.rules.control_share:
            controls = [c for c in self._controls if self._ends[c] not in met and self._ends[c] != self._ends[best]]
            return self.draw.choice(controls) if controls else best
        return best

    def _taken(self, comparison: int, annotator: int) -> int:
        """Places of a pair that people other than the annotator have taken; a control has places without end."""
        if comparison not in self._filled:
            return 0
        votes, held = self._votes.get(comparison, {}), self._held.get(comparison, {})
        count = sum(n != annotator and self._people[n] and choice != "skip" for n, (_, choice) in votes.items())
        return count + sum(n != annotator and self._people[n] and self._active(a) for n, a in held.items())

    def _active(self, assignment: Assignment) -> bool:
        return self.store.clock() - assignment.since < self.rules.lapse

    def _assign(self, comparison: int, annotator: int, left: str) -> Assignment:
        event = self.store.assign(comparison, annotator, left=left)
        return Assignment(event, comparison, annotator, left, self.store.clock())

    def _was_answered(self, annotator: int, assignment: int) -> bool:
        event = next(self.store.events(assignment - 1), None)
        if event is None or event["id"] != assignment or event["annotator"] != annotator:
            return False
        return annotator in self._votes.get(event["comparison"], {})

    def _same(self, done: dict[str, Any], answer: Answer) -> bool:
        wanted = self._side(answer.choice, done["left"]) if done["kind"] == "vote" else None
        strength = answer.strength if answer.choice in SIDES else None
        return (done["choice"], done["strength"]) == (wanted, strength)

    @staticmethod
    def _side(choice: str, left: str) -> str:
        """The store's word: which response it is, on whichever side it was shown."""
        return {"left": left, "right": "ab".replace(left, "")}.get(choice, choice)

    def _read(self) -> None:
        """Bring the fold up to the newest event. Inside a transaction only: what was read must be committed."""
        new = self.store.comparisons_after(self._comparison)
        self.draw.shuffle(new)
        for row in new:
            self._comparison = max(self._comparison, row["id"])
            self._ends[row["id"]] = (row["a"], row["b"])
            if row["kind"] == "control":
                self._controls.append(row["id"])
            else:
                self._untouched[row["id"]], self._filled[row["id"]] = None, 0
        for event in self.store.events(self._event):
            self._event = event["id"]
            self._apply(event)

    def _apply(self, event: Any) -> None:
        c, n = event["comparison"], event["annotator"]
        if n not in self._people:
            self._people = {row["id"]: row["kind"] == "person" for row in self.store.annotators()}
        at = self._last[n] = datetime.fromisoformat(event["created"]).timestamp()
        votes, held = self._votes.setdefault(c, {}), self._held.setdefault(c, {})
        hand = self._hands.setdefault(n, {})
        if event["kind"] == "assign":
            held[n] = hand[c] = Assignment(event["id"], c, n, event["left"] or "a", at)
        else:
            held.pop(n, None)
            hand.pop(c, None)
        if event["kind"] == "vote":
            votes[n] = (event["id"], event["choice"])
            self._own.setdefault(n, {})[event["id"]] = (c, event["duration_ms"])
            self._met.setdefault(n, set()).add(self._ends[c])
        elif event["kind"] == "undo":
            votes.pop(n, None)
            self._own[n].pop(event["undoes"], None)
            self._met[n].discard(self._ends[c])
        if c in self._filled:
            self._count(c)

    def _count(self, c: int) -> None:
        before = min(self._filled[c], self.rules.overlap)
        now = sum(self._people[n] and choice != "skip" for n, (_, choice) in self._votes[c].items())
        self._given += min(now, self.rules.overlap) - before
        self._filled[c] = now
        self._untouched.pop(c, None)
        if now < self.rules.overlap:
            self._begun.add(c)
        else:
            self._begun.discard(c)
