"""What the queue knows of a collection: who has answered what, who holds what, and which slots are free.

All of it is computed from the store's events. A question is a pair, or a ranking of more answers; the
pairs of a ranking are asked about one by one only where an adjudicator is to end a dispute.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any

from rlhf.data.rankings import pair_choices
from rlhf.data.store import Store
from rlhf.data.votes import minority


@dataclass(frozen=True)
class Rules:
    """How questions are shared out: people for each, lease of an assignment, share of control pairs
    shown.
    """

    overlap: int = 3
    lease_seconds: float = 1800.0
    control_share: float = 0.1


@dataclass(frozen=True)
class Question:
    """What an annotator is asked about: a comparison of two answers, or a ranking of more."""

    comparison: int | None = None
    ranking: int | None = None


@dataclass(frozen=True)
class Assignment:
    """A question handed to an annotator by `event`, at `since` (epoch s).

    left: which of a pair's responses ("a" or "b") is on the left; shown: ids of a ranking's
    responses, as they stand on the page.
    """

    event: int
    question: Question
    annotator: int
    since: float
    left: str | None = None
    shown: tuple[int, ...] = ()

    @property
    def comparison(self) -> int | None:
        return self.question.comparison

    @property
    def ranking(self) -> int | None:
        return self.question.ranking


def assignment_of(event: Any) -> Assignment:
    """Return the assignment that an event of this kind has recorded."""
    question = Question(event["comparison"], event["ranking"])
    since = datetime.fromisoformat(event["created"]).timestamp()
    shown = tuple(json.loads(event["shown"] or "[]"))
    left = None if shown else event["left"] or "a"
    return Assignment(event["id"], question, event["annotator"], since, left=left, shown=shown)


@dataclass
class Item:
    """The state of one question."""

    responses: tuple[int, ...]
    is_control: bool = False
    # a pair of a ranking, which annotators are not asked about by itself
    is_part: bool = False
    # annotator -> choice that stands
    votes: dict[int, str] = field(default_factory=dict)
    # annotator -> assignment without an answer
    held: dict[int, Assignment] = field(default_factory=dict)
    # slots taken by people's votes
    filled: int = 0

    @property
    def is_asked(self) -> bool:
        """Return whether it has slots for annotators."""
        return not (self.is_control or self.is_part)


@dataclass
class Person:
    """The state of one annotator."""

    is_person: bool
    is_adjudicator: bool = False
    is_excluded: bool = False
    # question -> assignment without an answer
    held: dict[Question, Assignment] = field(default_factory=dict)
    # event -> (question, duration_ms)
    votes: dict[int, tuple[Question, int | None]] = field(default_factory=dict)
    # the responses they have compared, of each question
    answered: set[tuple[int, ...]] = field(default_factory=set)
    # its time
    last_event: float = 0.0


class State:
    """The state of all questions and annotators after the newest event that was read."""

    def __init__(self, store: Store, rules: Rules, draw: random.Random):
        self.store = store
        self.rules = rules
        self.draw = draw
        # read up to here
        self.last_event = 0
        self.last_comparison = 0
        self.last_ranking = 0
        self.items: dict[Question, Item] = {}
        self.people: dict[int, Person] = {}
        # the pair of two responses in a ranking
        self.parts: dict[tuple[int, int], Question] = {}
        # questions without an event, in random order, and those with events whose votes leave a
        # slot free
        self.untouched: dict[Question, None] = {}
        self.begun: set[Question] = set()
        self.filled_slots = 0

    def read(self) -> None:
        """Bring the state up to the newest event. Inside a transaction only: what was read must be
        committed.
        """
        new = []
        for row in self.store.comparisons_after(self.last_comparison):
            self.last_comparison = max(self.last_comparison, row["id"])
            pair, question = (row["a"], row["b"]), Question(comparison=row["id"])
            item = Item(pair, row["kind"] == "control", row["ranking"] is not None)
            if item.is_part:
                self.parts[pair] = question
            new.append((question, item))
        for row in self.store.rankings_after(self.last_ranking):
            self.last_ranking = max(self.last_ranking, row["id"])
            new.append((Question(ranking=row["id"]), Item(tuple(row["responses"]))))
        # in random order: in the file's, early prompts would get all the votes
        self.draw.shuffle(new)
        for question, item in new:
            self.items[question] = item
            if item.is_asked:
                self.untouched[question] = None
        for event in self.store.events(self.last_event):
            self.last_event = event["id"]
            self._apply(event)

    def person(self, id: int) -> Person:
        """Return the state of this annotator; of one the store does not know, that of nobody."""
        if id not in self.people:
            for row in self.store.annotators():
                person = Person(row["kind"] == "person", row["role"] == "adjudicator")
                self.people.setdefault(row["id"], person)
        return self.people.setdefault(id, Person(is_person=False))

    def asked(self) -> list[Item]:
        """Return the questions with slots."""
        return [item for item in self.items.values() if item.is_asked]

    def is_active(self, assignment: Assignment) -> bool:
        return self.store.clock() - assignment.since < self.rules.lease_seconds

    def is_full(self, question: Question, annotator: int) -> bool:
        return self.taken(question, annotator) >= self.rules.overlap

    def taken(self, question: Question, annotator: int) -> int:
        """Return the slots of a question that people other than the annotator have taken; of a
        control, and for an adjudicator, none.
        """
        item = self.items[question]
        if item.is_control or self.person(annotator).is_adjudicator:
            return 0
        others = {voter for voter, choice in item.votes.items() if choice != "skip"}
        others |= {holder for holder, held in item.held.items() if self.is_active(held)}
        return sum(map(self._takes_slots, others - {annotator}))

    def has_judged(self, annotator: int, question: Question) -> bool:
        """Return whether the annotator has judged these responses, or a pair of a ranking by itself."""
        if self.items[question].responses in self.person(annotator).answered:
            return True
        return any(annotator in part.votes for part in self._parts(question))

    def disputes(self) -> tuple[dict[Question, float], list[Question]]:
        """Return the complete pairs in dispute, with the smaller side's share, and those decided;
        pairs of rankings too.
        """
        open_, ended = {}, []
        for question, item in self.items.items():
            if item.is_control or question.comparison is None:
                continue
            sides, is_ended = Counter(), False
            for voter, choice in item.votes.items():
                person = self.people[voter]
                if person.is_excluded:
                    continue
                if person.is_adjudicator:
                    is_ended = is_ended or choice != "skip"
                else:
                    sides[choice] += 1
            if is_ended:
                ended.append(question)
            elif minority(sides) and item.filled >= self.rules.overlap:
                open_[question] = minority(sides)
        return open_, ended

    def _takes_slots(self, annotator: int) -> bool:
        person = self.people[annotator]
        return person.is_person and not person.is_adjudicator and not person.is_excluded

    def _apply(self, event: Any) -> None:
        id = event["annotator"]
        annotator = self.person(id)
        if event["kind"] in ("exclude", "include"):
            annotator.is_excluded = event["kind"] == "exclude"
            for question in {question for question, _ in annotator.votes.values()}:
                self._count_slots(question)
            return
        question = Question(event["comparison"], event["ranking"])
        item = self.items[question]
        # read back from the file, so that a restarted server measures the same times
        annotator.last_event = datetime.fromisoformat(event["created"]).timestamp()
        # of one question to one person the newest assignment holds
        if event["kind"] == "assign":
            item.held[id] = annotator.held[question] = assignment_of(event)
        else:
            item.held.pop(id, None)
            annotator.held.pop(question, None)
        if event["kind"] == "vote":
            item.votes[id] = event["choice"]
            annotator.votes[event["id"]] = (question, event["duration_ms"])
            annotator.answered.add(item.responses)
            # what an order says of its pairs, on which people may differ
            for pair, choice in pair_choices(json.loads(event["placed"] or "[]")).items():
                self.items[self.parts[pair]].votes[id] = choice
        elif event["kind"] == "undo":
            annotator.votes.pop(event["undoes"], None)
            annotator.answered.discard(item.responses)
            for whole in (item, *self._parts(question)):
                whole.votes.pop(id, None)
        self._count_slots(question)

    def _parts(self, question: Question) -> list[Item]:
        """Return the pairs of a ranking; of a pair none."""
        if question.ranking is None:
            return []
        pairs = combinations(self.items[question].responses, 2)
        return [self.items[self.parts[pair]] for pair in pairs]

    def _count_slots(self, question: Question) -> None:
        item = self.items[question]
        if item.is_control:
            return
        before = min(item.filled, self.rules.overlap)
        for whole in (item, *self._parts(question)):
            votes = [id for id, choice in whole.votes.items() if choice != "skip"]
            whole.filled = sum(map(self._takes_slots, votes))
        if item.is_part:
            return
        self.filled_slots += min(item.filled, self.rules.overlap) - before
        self.untouched.pop(question, None)
        if item.filled < self.rules.overlap:
            self.begun.add(question)
        else:
            self.begun.discard(question)
