"""Which annotator judges which pair next.

The queue is computed from the store's events: each call reads, inside one write transaction, the
events that others have committed since, and only then decides. Two servers on one file therefore
never give away the same slot, and a server that was killed knows everything after reading the file
again.

Adjudicators get disputed pairs alone, once all slots are filled: those of which some prefer one
answer and some the other, and on which no adjudicator has spoken. An excluded annotator gets
nothing, and takes no slot.

A pair has `overlap` slots. A slot is taken by a person's standing vote other than a skip, or by an
assignment until its lease times out. Nobody gets a pair again that they have answered. Control
pairs are for everybody and have no slots.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rlhf.data.store import Store

SIDES = ("left", "right")
ANSWERS = (*SIDES, "tie", "both_bad", "skip")
# votes that make up an annotator's own speed
RECENT = 20


@dataclass(frozen=True)
class Rules:
    """How pairs are shared out: people for each pair, lease of an assignment, share of control
    pairs shown.
    """

    overlap: int = 3
    lease_seconds: float = 1800.0
    control_share: float = 0.1


@dataclass(frozen=True)
class Assignment:
    """A pair handed to an annotator by `event`, with response `left` ("a" or "b") on the left, at
    `since` (epoch s).
    """

    event: int
    comparison: int
    annotator: int
    left: str
    since: float


@dataclass(frozen=True)
class Answer:
    """An annotator's answer: left, right, tie, both_bad or skip; strength 1 to 3 for a side; a
    reason if given, and a better answer. ratings: (criterion, side, 1 to 5).
    """

    choice: str
    strength: int | None = None
    reason: str | None = None
    tags: tuple[str, ...] = ()
    corrected: str | None = None
    ratings: tuple[tuple[str, str, int], ...] = ()

    def criteria(self, left: str) -> dict[str, dict[str, int]]:
        """Return the ratings in the store's words, {criterion: {"a": 4}}, whichever side a was on."""
        names = {"left": left, "right": "b" if left == "a" else "a"}
        found: dict[str, dict[str, int]] = {}
        for criterion, side, rating in self.ratings:
            found.setdefault(criterion, {})[names[side]] = rating
        return found

    def store_choice(self, left: str) -> str:
        """Return the choice in the store's words: a or b, whichever side it was shown on, or the
        choice itself.
        """
        if self.choice not in SIDES:
            return self.choice
        right = "b" if left == "a" else "a"
        return left if self.choice == "left" else right

    @property
    def given_strength(self) -> int | None:
        return self.strength if self.choice in SIDES else None


@dataclass(frozen=True)
class Progress:
    """One annotator's standing votes and median seconds of the last ones; slots filled and slots in
    all.

    `given` counts the annotator's own answers to control pairs too, or standing still would reveal
    which those are.
    """

    mine: int
    seconds: float | None
    given: int
    needed: int


@dataclass
class _Pair:
    """The state of one comparison."""

    responses: tuple[int, int]
    is_control: bool
    # annotator -> choice that stands
    votes: dict[int, str] = field(default_factory=dict)
    # annotator -> assignment without an answer
    held: dict[int, Assignment] = field(default_factory=dict)
    # slots taken by people's votes
    filled: int = 0


@dataclass
class _Annotator:
    """The state of one annotator."""

    is_person: bool
    is_adjudicator: bool = False
    is_excluded: bool = False
    # comparison -> assignment without an answer
    held: dict[int, Assignment] = field(default_factory=dict)
    # event -> (comparison, duration_ms)
    votes: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    # the pairs of responses they have compared
    answered: set[tuple[int, int]] = field(default_factory=set)
    # its time
    last_event: float = 0.0


class Queue:
    """Assignments, votes and undos of people; every public method is one transaction of the store."""

    def __init__(self, store: Store, rules: Rules, draw: random.Random | None = None):
        self.store = store
        self.rules = rules
        self.draw = draw or random.SystemRandom()
        # read up to here
        self._last_event = 0
        self._last_comparison = 0
        self._pairs: dict[int, _Pair] = {}
        self._annotators: dict[int, _Annotator] = {}
        # normal pairs without an event, in random order, and those with events whose votes leave a
        # slot free
        self._untouched: dict[int, None] = {}
        self._begun: set[int] = set()
        self._filled_slots = 0

    def next(self, annotator: int) -> Assignment | None:
        """Return what the annotator is to judge now: what they hold, else something new; None if
        nothing is left.
        """
        with self.store.transaction():
            self._read()
            if self._annotator(annotator).is_excluded:
                return None
            active = [
                held for held in self._annotator(annotator).held.values() if self._is_active(held)
            ]
            if active:
                return max(active, key=lambda held: held.event)
            is_adjudicator = self._annotator(annotator).is_adjudicator
            pick = self._pick_disputed if is_adjudicator else self._pick
            chosen = pick(annotator)
            if chosen is None:
                return None
            return self._assign(chosen, annotator, self.draw.choice("ab"))

    def vote(self, annotator: int, assignment: int, answer: Answer, request: str) -> str:
        """Record the answer to an assignment (its event), and return what became of it.

        saved; again: this very click is saved already; withdrawn: it was, and was undone since;
        differs: the form was sent before with another answer, which stands; answered: the
        annotator's vote on this pair stands already; full: the lease timed out and others took the
        slots; gone: there is no such assignment.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._read()
            person = self._annotator(annotator)
            # the same click may arrive twice: a double click, or a repeat after a lost connection
            done = self.store.request(key)
            if done:
                if done["kind"] == "vote" and done["id"] not in person.votes:
                    return "withdrawn"
                return "again" if _is_same(done, answer) else "differs"

            held = next((a for a in person.held.values() if a.event == assignment), None)
            if person.is_excluded:
                return "gone"
            if held is None:
                return "answered" if self._was_answered(annotator, assignment) else "gone"
            # late answers are welcome as long as a slot is free
            if not self._is_active(held) and self._is_full(held.comparison, annotator):
                return "full"

            # a pair may lie open in a second tab while the first is judged
            since = max(held.since, person.last_event)
            self.store.vote(
                held.comparison,
                annotator,
                answer.store_choice(held.left),
                left=held.left,
                strength=answer.given_strength,
                reason=answer.reason,
                tags=list(answer.tags),
                duration_ms=max(0, round(1000 * (self.store.clock() - since))),
                corrected=answer.corrected,
                criteria=answer.criteria(held.left),
                request=key,
            )
            return "saved"

    def undo(self, annotator: int, request: str) -> str:
        """Undo the annotator's last vote and hand them the pair again, sides as they were.

        Returns undone; again: this very click is done already; nothing: no vote of theirs stands;
        full: they had skipped the pair, and others have taken its slots since.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._read()
            if self.store.request(key):
                return "again"
            votes = self._annotator(annotator).votes
            if not votes:
                return "nothing"
            # the last vote is that of the newest event
            event = max(votes)
            comparison, _ = votes[event]
            # a skip took no slot, so others may have filled them
            if self._is_full(comparison, annotator):
                return "full"
            left = next(self.store.events(event - 1))["left"]
            self.store.undo(event, request=key)
            self._assign(comparison, annotator, left or "a")
            return "undone"

    def release(self, annotator: int) -> None:
        """Give back what the annotator holds, so that others need not wait for the lease to time
        out.
        """
        with self.store.transaction():
            self._read()
            for held in list(self._annotator(annotator).held.values()):
                self.store.release(held.comparison, annotator)

    def progress(self, annotator: int) -> Progress:
        """Return how far the annotator and all together have come."""
        with self.store.transaction():
            self._read()
        person = self._annotator(annotator)
        votes = person.votes
        durations = [duration for _, (_, duration) in sorted(votes.items())[-RECENT:]]
        recent = [duration for duration in durations if duration is not None]
        seconds = statistics.median(recent) / 1000 if recent else None

        if person.is_adjudicator:
            open_, ended = self._disputes()
            return Progress(len(votes), seconds, len(ended), len(open_) + len(ended))
        answered_controls = 0
        for comparison, _ in votes.values():
            pair = self._pairs[comparison]
            answered_controls += pair.is_control and pair.votes[annotator] != "skip"
        needed = self.rules.overlap * len(self._normal_pairs())
        return Progress(
            len(votes), seconds, min(self._filled_slots + answered_controls, needed), needed
        )

    def open_pairs(self) -> dict[str, int]:
        """Return how many normal pairs are complete, begun (with a vote or an assignment) and
        untouched.
        """
        with self.store.transaction():
            self._read()
        normal = self._normal_pairs()
        complete = sum(pair.filled >= self.rules.overlap for pair in normal)
        begun = 0
        for comparison in self._begun:
            pair = self._pairs[comparison]
            begun += pair.filled > 0 or any(map(self._is_active, pair.held.values()))
        return {"complete": complete, "begun": begun, "untouched": len(normal) - complete - begun}

    def _pick(self, annotator: int) -> int | None:
        """Return an unanswered pair with a free slot, the nearest to complete first, else a random
        one.
        """
        answered = self._annotator(annotator).answered
        best, most = None, -1
        for comparison in self._begun:
            # two comparisons, one of them a control, may show the same two responses
            if self._pairs[comparison].responses in answered:
                continue
            taken = self._taken(comparison, annotator)
            if most < taken < self.rules.overlap:
                best, most = comparison, taken
        if best is None:
            # in random order, as they were read
            for comparison in self._untouched:
                if self._pairs[comparison].responses not in answered:
                    best = comparison
                    break
        if best is None or self.draw.random() >= self.rules.control_share:
            return best
        controls = self._controls_for(answered | {self._pairs[best].responses})
        return self.draw.choice(controls) if controls else best

    def _pick_disputed(self, annotator: int) -> int | None:
        """Return the disputed pair on which people are most evenly split, for an adjudicator."""
        answered = self._annotator(annotator).answered
        best = None
        for comparison, minority in self._disputes()[0].items():
            pair = self._pairs[comparison]
            is_held = any(
                self._annotators[holder].is_adjudicator and self._is_active(held)
                for holder, held in pair.held.items()
                if holder != annotator
            )
            if pair.responses in answered or is_held:
                continue
            if best is None or minority > best[0]:
                best = minority, comparison
        return best and best[1]

    def _disputes(self) -> tuple[dict[int, float], list[int]]:
        """Return the complete pairs in dispute, with the smaller side's share, and those decided."""
        open_, ended = {}, []
        for comparison, pair in self._pairs.items():
            if pair.is_control:
                continue
            sides, is_ended = Counter(), False
            for voter, choice in pair.votes.items():
                person = self._annotators[voter]
                if person.is_excluded:
                    continue
                if person.is_adjudicator:
                    is_ended = is_ended or choice != "skip"
                else:
                    sides[choice] += 1
            if is_ended:
                ended.append(comparison)
            elif sides["a"] and sides["b"] and pair.filled >= self.rules.overlap:
                open_[comparison] = min(sides["a"], sides["b"]) / (sides["a"] + sides["b"])
        return open_, ended

    def _controls_for(self, excluded: set[tuple[int, int]]) -> list[int]:
        """Return the control pairs of other responses than these."""
        return [
            id
            for id, pair in self._pairs.items()
            if pair.is_control and pair.responses not in excluded
        ]

    def _normal_pairs(self) -> list[_Pair]:
        return [pair for pair in self._pairs.values() if not pair.is_control]

    def _is_full(self, comparison: int, annotator: int) -> bool:
        return self._taken(comparison, annotator) >= self.rules.overlap

    def _taken(self, comparison: int, annotator: int) -> int:
        """Return the slots of a pair that people other than the annotator have taken; of a control,
        and for an adjudicator, none.
        """
        pair = self._pairs[comparison]
        if pair.is_control or self._annotator(annotator).is_adjudicator:
            return 0
        others = set()
        for voter, choice in pair.votes.items():
            if choice != "skip":
                others.add(voter)
        for holder, held in pair.held.items():
            if self._is_active(held):
                others.add(holder)
        others.discard(annotator)
        return sum(map(self._takes_slots, others))

    def _takes_slots(self, annotator: int) -> bool:
        person = self._annotators[annotator]
        return person.is_person and not person.is_adjudicator and not person.is_excluded

    def _is_active(self, assignment: Assignment) -> bool:
        return self.store.clock() - assignment.since < self.rules.lease_seconds

    def _assign(self, comparison: int, annotator: int, left: str) -> Assignment:
        event = self.store.assign(comparison, annotator, left=left)
        return Assignment(event, comparison, annotator, left, self.store.clock())

    def _was_answered(self, annotator: int, assignment: int) -> bool:
        event = next(self.store.events(assignment - 1), None)
        if event is None or event["id"] != assignment or event["annotator"] != annotator:
            return False
        return annotator in self._pairs[event["comparison"]].votes

    def _annotator(self, id: int) -> _Annotator:
        """Return the state of this annotator; of one the store does not know, that of nobody."""
        if id not in self._annotators:
            for row in self.store.annotators():
                person = _Annotator(row["kind"] == "person", row["role"] == "adjudicator")
                self._annotators.setdefault(row["id"], person)
        return self._annotators.setdefault(id, _Annotator(is_person=False))

    def _read(self) -> None:
        """Bring the state up to the newest event. Inside a transaction only: what was read must be
        committed.
        """
        # in random order: in the file's, early prompts would get all the votes
        new = self.store.comparisons_after(self._last_comparison)
        self.draw.shuffle(new)
        for row in new:
            id = row["id"]
            self._last_comparison = max(self._last_comparison, id)
            self._pairs[id] = _Pair((row["a"], row["b"]), is_control=row["kind"] == "control")
            if row["kind"] != "control":
                self._untouched[id] = None
        for event in self.store.events(self._last_event):
            self._last_event = event["id"]
            self._apply(event)

    def _apply(self, event: Any) -> None:
        id, comparison = event["annotator"], event["comparison"]
        annotator = self._annotator(id)
        if event["kind"] in ("exclude", "include"):
            annotator.is_excluded = event["kind"] == "exclude"
            for voted in {comparison for comparison, _ in annotator.votes.values()}:
                if not self._pairs[voted].is_control:
                    self._count_slots(voted, self._pairs[voted])
            return
        pair = self._pairs[comparison]
        # read back from the file, so that a restarted server measures the same times
        annotator.last_event = datetime.fromisoformat(event["created"]).timestamp()
        # of one pair to one person the newest assignment holds
        if event["kind"] == "assign":
            assignment = Assignment(
                event["id"], comparison, id, event["left"] or "a", annotator.last_event
            )
            pair.held[id] = annotator.held[comparison] = assignment
        else:
            pair.held.pop(id, None)
            annotator.held.pop(comparison, None)
        if event["kind"] == "vote":
            pair.votes[id] = event["choice"]
            annotator.votes[event["id"]] = (comparison, event["duration_ms"])
            annotator.answered.add(pair.responses)
        elif event["kind"] == "undo":
            pair.votes.pop(id, None)
            annotator.votes.pop(event["undoes"], None)
            annotator.answered.discard(pair.responses)
        if not pair.is_control:
            self._count_slots(comparison, pair)

    def _count_slots(self, comparison: int, pair: _Pair) -> None:
        before = min(pair.filled, self.rules.overlap)
        votes = [id for id, choice in pair.votes.items() if choice != "skip"]
        pair.filled = sum(map(self._takes_slots, votes))
        self._filled_slots += min(pair.filled, self.rules.overlap) - before
        self._untouched.pop(comparison, None)
        if pair.filled < self.rules.overlap:
            self._begun.add(comparison)
        else:
            self._begun.discard(comparison)


def _is_same(done: dict[str, Any], answer: Answer) -> bool:
    """Return whether the recorded event is this very answer."""
    if done["kind"] != "vote":
        return False
    given = answer.store_choice(done["left"]), answer.given_strength
    return (done["choice"], done["strength"]) == given
