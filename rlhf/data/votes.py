"""Votes, and what they become: pairs with a winner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

CHOICES = ("a", "b", "tie", "both_bad", "skip")


@dataclass
class Vote:
    """A vote that stands. `choice` is about the responses a and b, whichever side they were shown on."""

    event: int
    comparison: int
    annotator: str
    choice: str
    left: str | None = None
    strength: int | None = None
    reason: str | None = None
    tags: list[str] = field(default_factory=list)
    duration_ms: int | None = None
    created: str = ""


@dataclass
class Verdict:
    """What one vote, or all votes together, say about a comparison; `about` goes into the record's metadata."""

    comparison: int
    winner: str  # "a" or "b"
    annotator: str | None = None
    label_prob: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


def each(votes: list[Vote]) -> list[Verdict]:
    """One verdict for each vote for a or b; ties, both_bad and skips give none."""
    verdicts = []
    for vote in votes:
        if vote.choice in ("a", "b"):
            about = {"event": vote.event, "strength": vote.strength, "reason": vote.reason, "tags": vote.tags}
            about = {name: value for name, value in about.items() if value}
            verdicts.append(Verdict(vote.comparison, vote.choice, annotator=vote.annotator, about=about))
    return verdicts


def majority(votes: list[Vote]) -> list[Verdict]:
    """One verdict for each comparison with a winner, by comparison id.

        label_prob = (votes for the winner + ties / 2) / (votes for a + votes for b + ties)

    both_bad and skip do not say who is better and do not count. As many for a as for b: no winner, no verdict.
    """
    counts: dict[int, Counter] = {}
    for vote in votes:
        counts.setdefault(vote.comparison, Counter())[vote.choice] += 1
    verdicts = []
    for comparison, count in sorted(counts.items()):
        if count["a"] == count["b"]:
            continue
        winner = "a" if count["a"] > count["b"] else "b"
        share = (count[winner] + count["tie"] / 2) / (count["a"] + count["b"] + count["tie"])
        about = {"votes": {choice: count[choice] for choice in CHOICES if count[choice]}}
        verdicts.append(Verdict(comparison, winner, label_prob=share, about=about))
    return verdicts
