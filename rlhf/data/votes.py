"""Votes, and what they become: pairs with a winner."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config import UserError

if TYPE_CHECKING:
    from rlhf.data.dawid_skene import Skills

CHOICES = ("a", "b", "tie", "both_bad", "skip")
Aggregate = Literal["each", "majority", "skill"]
MARGINS = {1: 1 / 3, 2: 2 / 3, 3: 1.0}  # of a strength, in score units (Touvron et al. 2023, A.3.3, "margin small")
# What an annotator of whom nothing is known says (columns a, b, tie) of a pair whose truth is a, b or a tie, as votes
# cast before: of votes for a side, five in six are for the better one
UNKNOWN_ANNOTATOR = ((2.5, 0.5, 1.0), (0.5, 2.5, 1.0), (1.0, 1.0, 2.0))


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
    margin: float | None = None
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
    verdicts = []
    for comparison, own in _by_comparison(votes).items():
        count = Counter(vote.choice for vote in own)
        if count["a"] == count["b"]:
            continue
        winner = "a" if count["a"] > count["b"] else "b"
        share = (count[winner] + count["tie"] / 2) / (count["a"] + count["b"] + count["tie"])
        verdicts.append(_together(comparison, winner, share, own))
    return verdicts


def by_skill(votes: list[Vote], controls: dict[int, str] | None = None) -> list[Verdict]:
    """One verdict for each comparison that is more likely one way than the other, votes weighted by who cast them.

        label_prob = p(winner is better | all votes) + p(tie | all votes) / 2

    by Dawid and Skene's model (`skills`). controls: comparison -> right answer; they tell the annotators' skill and
    give no verdict. Votes for a pair that cancel out exactly give none either.
    """
    controls = controls or {}
    posterior = skills(votes, controls).posterior
    verdicts = []
    for comparison, own in _by_comparison(votes).items():
        if comparison in controls or comparison not in posterior:
            continue
        chance = [float(p) for p in posterior[comparison]]
        p_a = chance[0] + (chance[2] / 2 if len(chance) > 2 else 0.0)
        if abs(p_a - 0.5) > 1e-9:
            verdicts.append(_together(comparison, "a" if p_a > 0.5 else "b", max(p_a, 1 - p_a), own))
    return verdicts


def skills(votes: list[Vote], controls: dict[int, str] | None = None) -> Skills:
    """Dawid and Skene's model of votes for a, b or tie (skill.py); tie is a class only where somebody said it.

    Which response is called a means nothing, so a and b are mirrored. Six earlier votes of an unknown annotator stand
    before everybody's own: with one vote for each pair there is nothing to learn skill from, and label_prob stays at
    that annotator's.
    """
    from rlhf.data.dawid_skene import dawid_skene

    ratings: dict = {}
    for vote in votes:
        ratings.setdefault(vote.comparison, {})[vote.annotator] = vote.choice
    K = 3 if any(vote.choice == "tie" for vote in votes) else 2
    pseudo = [row[:K] for row in UNKNOWN_ANNOTATOR[:K]]
    return dawid_skene(ratings, ("a", "b", "tie")[:K], known=controls, pseudo=pseudo, mirror=(1, 0, 2)[:K])


def verdicts(votes: list[Vote], aggregate: Aggregate, controls: dict[int, str] | None = None) -> list[Verdict]:
    """What the votes become: "each" (one verdict a vote), "majority" or "skill" (one a pair). Controls give none.

    Raises UserError for any other name.
    """
    if aggregate not in ("each", "majority", "skill"):
        raise UserError(f"aggregate: found {aggregate!r}, expected each, majority or skill")
    if aggregate == "skill":
        return by_skill(votes, controls)
    normal = [vote for vote in votes if vote.comparison not in (controls or {})]
    return each(normal) if aggregate == "each" else majority(normal)


def margin_of(votes: list[Vote], winner: str) -> float | None:
    """By how much the winner of one comparison is better, in score units: the mean over its votes for a, b and tie.

    A vote for the winner counts MARGINS[strength] (1/3 slightly, 2/3 clearly, 1 by far), a vote against it as much
    below 0, a tie 0. Votes for a side that give no strength are left out; None if none gives one; never below 0.
    """
    given = [
        MARGINS[vote.strength] * (1 if vote.choice == winner else -1)
        for vote in votes
        if vote.choice in ("a", "b") and vote.strength
    ]
    ties = sum(vote.choice == "tie" for vote in votes)
    return max(0.0, sum(given) / (len(given) + ties)) if given else None


def _by_comparison(votes: list[Vote]) -> dict[int, list[Vote]]:
    found: dict[int, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.comparison, []).append(vote)
    return dict(sorted(found.items()))


def _together(comparison: int, winner: str, label_prob: float, votes: list[Vote]) -> Verdict:
    count = Counter(vote.choice for vote in votes)
    about: dict[str, Any] = {"votes": {choice: count[choice] for choice in CHOICES if count[choice]}}
    return Verdict(comparison, winner, label_prob=label_prob, margin=margin_of(votes, winner), about=about)
