"""Which annotator judges which pair or ranking next.

The queue is computed from the store's events (queue_state.py): each call reads, inside one write
transaction, the events that others have committed since, and only then decides. Two servers on one
file therefore never give away the same slot, and a server that was killed knows everything after
reading the file again.

Adjudicators get disputed pairs alone, once all slots are filled: those of which some prefer one
answer and some the other, and on which no adjudicator has spoken. An excluded annotator gets
nothing, and takes no slot.

A question has `overlap` slots. A slot is taken by a person's standing vote other than a skip, or by
an assignment until its lease times out. Nobody gets a question again that they have answered.
Control pairs are for everybody and have no slots.
"""

import json
import random
import statistics
from dataclasses import dataclass
from typing import Any

from rlhf.collect.queue_state import Assignment, Question, Rules, State
from rlhf.data.rankings import order_of_places
from rlhf.data.spans import Span, renamed
from rlhf.data.store import Store

SIDES = ("left", "right")
# of a pair
ANSWERS = (*SIDES, "tie", "both_bad", "skip")
# votes that make up an annotator's own speed
RECENT = 20


@dataclass(frozen=True)
class Answer:
    """An annotator's answer to a pair: left, right, tie, both_bad or skip; strength 1 to 3 for a
    side; a reason if given, and a better answer. ratings: (criterion, side, 1 to 5). To a ranking:
    rank, with the place of each response as they stand on the page, or skip.

    spans: marked passages; their "answer" is a position on the page, from 0.
    """

    choice: str
    strength: int | None = None
    reason: str | None = None
    tags: tuple[str, ...] = ()
    corrected: str | None = None
    ratings: tuple[tuple[str, str, int], ...] = ()
    places: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()

    def fits(self, held: Assignment) -> bool:
        """Return whether this answers a question of its kind."""
        if held.ranking is None:
            return self.choice in ANSWERS
        is_order = self.choice == "rank" and len(self.places) == len(held.shown)
        return is_order or self.choice == "skip"

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

    def order(self, shown: tuple[int, ...]) -> list[list[int]]:
        """Return the responses in the order of their places; nothing for a skip."""
        return order_of_places(shown, self.places) if self.choice == "rank" else []

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


class Queue:
    """Assignments, votes and undos of people; every public method is one transaction of the store."""

    def __init__(self, store: Store, rules: Rules, draw: random.Random | None = None):
        self.store = store
        self.rules = rules
        self.draw = draw or random.SystemRandom()
        self._state = State(store, rules, self.draw)

    def next(self, annotator: int) -> Assignment | None:
        """Return what the annotator is to judge now: what they hold, else something new; None if
        nothing is left.
        """
        with self.store.transaction():
            self._state.read()
            person = self._state.person(annotator)
            if person.is_excluded:
                return None
            active = []
            for held in person.held.values():
                # a vote on a pair of it may have come from elsewhere since
                is_open = not self._state.has_judged(annotator, held.question)
                if is_open and self._state.is_active(held):
                    active.append(held)
            if active:
                return max(active, key=lambda held: held.event)
            pick = self._pick_disputed if person.is_adjudicator else self._pick
            chosen = pick(annotator)
            if chosen is None:
                return None
            if chosen.ranking is None:
                return self._assign(chosen, annotator, left=self.draw.choice("ab"))
            responses = self._state.items[chosen].responses
            shown = tuple(self.draw.sample(responses, len(responses)))
            return self._assign(chosen, annotator, shown=shown)

    def vote(self, annotator: int, assignment: int, answer: Answer, request: str) -> str:
        """Record the answer to an assignment (its event), and return what became of it.

        saved; again: this very click is saved already; withdrawn: it was, and was undone since;
        differs: the form was sent before with another answer, which stands; answered: the
        annotator's vote on this question stands already; full: the lease timed out and others took
        the slots; gone: there is no such assignment, or it is of another kind.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._state.read()
            person = self._state.person(annotator)
            # the same click may arrive twice: a double click, or a repeat after a lost connection
            done = self.store.event_of_request(key)
            if done:
                if done["kind"] == "vote" and done["id"] not in person.votes:
                    return "withdrawn"
                return "again" if _is_same(done, answer) else "differs"

            held = next((a for a in person.held.values() if a.event == assignment), None)
            if person.is_excluded:
                return "gone"
            if held is None:
                return "answered" if self._was_answered(annotator, assignment) else "gone"
            if self._state.has_judged(annotator, held.question):
                return "answered"
            if not answer.fits(held):
                return "gone"
            # late answers are welcome as long as a slot is free
            if not self._state.is_active(held) and self._state.is_full(held.question, annotator):
                return "full"

            # a question may lie open in a second tab while the first is judged
            since = max(held.since, person.last_event)
            duration = max(0, round(1000 * (self.store.clock() - since)))
            record = self._record_choice if held.ranking is None else self._record_order
            record(held, answer, duration_ms=duration, request=key)
            return "saved"

    def _record_choice(self, held: Assignment, answer: Answer, **about: Any) -> None:
        right = "b" if held.left == "a" else "a"
        self.store.vote(
            held.comparison,
            held.annotator,
            answer.store_choice(held.left),
            left=held.left,
            strength=answer.given_strength,
            reason=answer.reason,
            tags=list(answer.tags),
            corrected=answer.corrected,
            criteria=answer.criteria(held.left),
            spans=renamed(answer.spans, {0: held.left, 1: right}),
            **about,
        )

    def _record_order(self, held: Assignment, answer: Answer, **about: Any) -> None:
        self.store.rank(
            held.ranking,
            held.annotator,
            answer.order(held.shown),
            shown=held.shown,
            reason=answer.reason,
            tags=list(answer.tags),
            spans=renamed(answer.spans, dict(enumerate(held.shown))),
            **about,
        )

    def undo(self, annotator: int, request: str) -> str:
        """Undo the annotator's last vote and hand them the question again, answers as they stood.

        Returns undone; again: this very click is done already; nothing: no vote of theirs stands;
        full: they had skipped the question, and others have taken its slots since.
        """
        key = f"{annotator}:{request}"
        with self.store.transaction():
            self._state.read()
            if self.store.event_of_request(key):
                return "again"
            votes = self._state.person(annotator).votes
            if not votes:
                return "nothing"
            # the last vote is that of the newest event
            event = max(votes)
            question, _ = votes[event]
            # a skip took no slot, so others may have filled them
            if self._state.is_full(question, annotator):
                return "full"
            undone = self.store.event(event)
            self.store.undo(event, request=key)
            if question.ranking is None:
                self._assign(question, annotator, left=undone["left"] or "a")
            else:
                # who was shown them elsewhere gets them in the order of the store
                shown = json.loads(undone["shown"] or "[]")
                responses = self._state.items[question].responses
                self._assign(question, annotator, shown=tuple(shown or responses))
            return "undone"

    def release(self, annotator: int) -> None:
        """Give back what the annotator holds, so that others need not wait for the lease to time
        out.
        """
        with self.store.transaction():
            self._state.read()
            for held in list(self._state.person(annotator).held.values()):
                self.store.release(held.comparison, annotator, ranking=held.ranking)

    def progress(self, annotator: int) -> Progress:
        """Return how far the annotator and all together have come."""
        with self.store.transaction():
            self._state.read()
        person = self._state.person(annotator)
        votes = person.votes
        durations = [duration for _, (_, duration) in sorted(votes.items())[-RECENT:]]
        recent = [duration for duration in durations if duration is not None]
        seconds = statistics.median(recent) / 1000 if recent else None

        if person.is_adjudicator:
            open_, ended = self._state.disputes()
            return Progress(len(votes), seconds, len(ended), len(open_) + len(ended))
        answered_controls = 0
        for question, _ in votes.values():
            item = self._state.items[question]
            answered_controls += item.is_control and item.votes[annotator] != "skip"
        needed = self.rules.overlap * len(self._state.asked())
        given = min(self._state.filled_slots + answered_controls, needed)
        return Progress(len(votes), seconds, given, needed)

    def open_pairs(self) -> dict[str, int]:
        """Return how many questions are complete, begun (with a vote or an assignment) and
        untouched; a ranking is one, control pairs are none.
        """
        with self.store.transaction():
            self._state.read()
        asked = self._state.asked()
        complete = sum(item.filled >= self.rules.overlap for item in asked)
        begun = 0
        for question in self._state.begun:
            item = self._state.items[question]
            begun += item.filled > 0 or any(map(self._state.is_active, item.held.values()))
        return {"complete": complete, "begun": begun, "untouched": len(asked) - complete - begun}

    def _pick(self, annotator: int) -> Question | None:
        """Return an unanswered question with a free slot, the nearest to complete first, else a
        random one.
        """
        state = self._state
        best, most = None, -1
        for question in state.begun:
            if state.has_judged(annotator, question):
                continue
            taken = state.taken(question, annotator)
            if most < taken < self.rules.overlap:
                best, most = question, taken
        if best is None:
            # in random order, as they were read
            new = (one for one in state.untouched if not state.has_judged(annotator, one))
            best = next(new, None)
        if best is None or self.draw.random() >= self.rules.control_share:
            return best
        # two comparisons, one of them a control, may show the same two responses
        answered = state.person(annotator).answered
        controls = self._controls_for(answered | {state.items[best].responses})
        return self.draw.choice(controls) if controls else best

    def _pick_disputed(self, annotator: int) -> Question | None:
        """Return the disputed pair on which people are most evenly split, for an adjudicator."""
        state, best = self._state, None
        for question, minority in state.disputes()[0].items():
            item = state.items[question]
            is_held = any(
                state.people[holder].is_adjudicator and state.is_active(held)
                for holder, held in item.held.items()
                if holder != annotator
            )
            if is_held or state.has_judged(annotator, question):
                continue
            if best is None or minority > best[0]:
                best = minority, question
        return best and best[1]

    def _controls_for(self, excluded: set[tuple[int, ...]]) -> list[Question]:
        """Return the control pairs of other responses than these."""
        return [
            question
            for question, item in self._state.items.items()
            if item.is_control and item.responses not in excluded
        ]

    def _assign(
        self,
        question: Question,
        annotator: int,
        *,
        left: str | None = None,
        shown: tuple[int, ...] = (),
    ) -> Assignment:
        event = self.store.assign(
            question.comparison, annotator, left=left, ranking=question.ranking, shown=shown
        )
        since = self.store.clock()
        return Assignment(event, question, annotator, since, left=left, shown=shown)

    def _was_answered(self, annotator: int, assignment: int) -> bool:
        event = self.store.event(assignment)
        if event is None or event["annotator"] != annotator:
            return False
        item = self._state.items.get(Question(event["comparison"], event["ranking"]))
        return item is not None and annotator in item.votes


def _is_same(done: dict[str, Any], answer: Answer) -> bool:
    """Return whether the recorded event is this very answer."""
    if done["kind"] != "vote":
        return False
    if done["ranking"] is not None:
        shown, placed = (json.loads(done[name] or "[]") for name in ("shown", "placed"))
        is_whole = len(answer.places) in (0, len(shown))
        return is_whole and answer.order(tuple(shown)) == placed
    given = answer.store_choice(done["left"]), answer.given_strength
    return (done["choice"], done["strength"]) == given
