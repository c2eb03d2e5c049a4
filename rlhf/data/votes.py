"""Votes, and what they become: pairs with a winner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf.data.spans import renamed
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.data.dawid_skene import Skills

CHOICES = ("a", "b", "tie", "both_bad", "skip")
# of a choice, the share that answer a wins; a skip says nothing
SHARES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
Aggregate = Literal["each", "majority", "skill"]
# of a strength, in score units (Touvron et al. 2023, A.3.3, "margin small")
MARGINS = {1: 1 / 3, 2: 2 / 3, 3: 1.0}
# What an annotator of whom nothing is known says (columns a, b, tie) of a pair whose truth is a, b
# or a tie, as votes cast before: of votes for a side, five in six are for the better one
UNKNOWN_ANNOTATOR = ((2.5, 0.5, 1.0), (0.5, 2.5, 1.0), (1.0, 1.0, 2.0))


@dataclass
class Vote:
    """A vote that stands. `choice` is about the responses a and b, whichever side they were shown
    on.
    """

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
    # "human", "simulated" or "judge"
    source: str = "human"
    # of an adjudicator: it ends the dispute
    is_final: bool = False
    # a better answer that the annotator wrote
    corrected: str | None = None
    # ratings from 1 to 5 by criterion and response: {"clear": {"a": 4, "b": 2}}
    criteria: dict[str, dict[str, int]] = field(default_factory=dict)
    # marked passages (rlhf/data/spans.py); their "answer" is a or b
    spans: list[dict[str, Any]] = field(default_factory=list)
    # the ranking whose order says it; all its votes have one event
    ranking: int | None = None
    # of a ranking's votes, which are not independent: less than 1 (rankings.py, `pair_weight`)
    weight: float = 1.0


@dataclass
class Verdict:
    """The winner of a comparison by one vote or by all; `metadata` goes into the record's metadata."""

    comparison: int
    # "a" or "b"
    winner: str
    annotator: str | None = None
    label_prob: float | None = None
    # the share of ties; None where the votes for a side say all
    tie_prob: float | None = None
    margin: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def final_votes(votes: list[Vote]) -> dict[int, Vote]:
    """Return the vote that ends the dispute, of each comparison that has one; the newest counts.

    A skip ends nothing.
    """
    return {vote.comparison: vote for vote in votes if vote.is_final and vote.choice != "skip"}


def after_adjudication(votes: list[Vote]) -> list[Vote]:
    """Return the votes that still count: where an adjudicator has decided, that vote alone."""
    final = final_votes(votes)
    return [vote for vote in votes if final.get(vote.comparison, vote) is vote]


def each(votes: list[Vote], *, keep_ties: bool = False) -> list[Verdict]:
    """Return one verdict for each vote for a or b; both_bad and skips give none.

    A tie gives one with `keep_ties`: a is named as the winner, with label_prob 1/2 and tie_prob 1.
    """
    verdicts = []
    for vote in votes:
        if vote.choice == "tie" and keep_ties:
            verdicts.append(
                Verdict(vote.comparison, "a", vote.annotator, label_prob=0.5, tie_prob=1.0)
            )
        if vote.choice not in ("a", "b"):
            continue
        given = details_of(vote)
        verdicts.append(
            Verdict(vote.comparison, vote.choice, annotator=vote.annotator, metadata=given)
        )
    return verdicts


def details_of(vote: Vote) -> dict[str, Any]:
    """Return what a vote for a or b says beside its choice, as far as it says it."""
    sides = {vote.choice: "chosen", "b" if vote.choice == "a" else "a": "rejected"}
    details = {
        "event": vote.event,
        "strength": vote.strength,
        "reason": vote.reason,
        "tags": vote.tags,
        # a reader of the row knows no a and b
        "criteria": renamed_criteria(vote.criteria, sides),
        "spans": renamed(vote.spans, sides),
    }
    if vote.left and vote.choice in ("a", "b"):
        # whether people prefer a side is judged by it
        details["shown"] = "left" if vote.left == vote.choice else "right"
    return {name: value for name, value in details.items() if value}


def renamed_criteria(
    criteria: Mapping[str, Mapping[str, int]], names: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Return ratings by criterion and answer with other names of the answers."""
    found = {}
    for name, ratings in criteria.items():
        found[name] = {names[side]: rating for side, rating in ratings.items()}
    return found


def majority(votes: list[Vote], *, keep_ties: bool = False) -> list[Verdict]:
    """Return one verdict for each comparison with a winner, by comparison id.

        label_prob = (votes for the winner + ties / 2) / (votes for a + votes for b + ties)
        tie_prob = ties / (votes for a + votes for b + ties)             with `keep_ties`

    both_bad and skip do not say who is better and do not count. As many for a as for b: no winner,
    and no verdict unless `keep_ties`, which names a as the winner with label_prob 1/2.
    """
    verdicts = []
    for comparison, own in by_comparison(votes).items():
        count = Counter(vote.choice for vote in own)
        total = count["a"] + count["b"] + count["tie"]
        # no winner: as a certain label a random one would say what nobody has said
        if not total or (count["a"] == count["b"] and not keep_ties):
            continue
        winner = "a" if count["a"] >= count["b"] else "b"
        share = (count[winner] + count["tie"] / 2) / total
        tie_share = count["tie"] / total if keep_ties else None
        verdicts.append(_joint_verdict(comparison, winner, share, own, tie_share))
    return verdicts


def by_skill(
    votes: list[Vote], controls: dict[int, str] | None = None, *, keep_ties: bool = False
) -> list[Verdict]:
    """Return one verdict for each comparison that is more likely one way than the other, votes
    weighted by skill.

        label_prob = p(winner is better | all votes) + p(tie | all votes) / 2
        tie_prob = p(tie | all votes)                                        with `keep_ties`

    by Dawid and Skene's model (`skills`). controls: comparison -> right answer; they tell the
    annotators' skill and give no verdict. Votes for a pair that cancel out exactly give none
    either, unless `keep_ties`, which names a as the winner with label_prob 1/2. An adjudicator's
    vote is certain.
    """
    controls = controls or {}
    posterior = skills(votes, controls).posterior
    final = final_votes(votes)
    verdicts = []
    for comparison, own in by_comparison(votes).items():
        if comparison in final and comparison not in controls:
            verdicts += majority([final[comparison]], keep_ties=keep_ties)
            continue
        if comparison in controls or comparison not in posterior:
            continue
        chances = posterior[comparison].tolist()
        tie = chances[2] if len(chances) > 2 else 0.0
        p_a = chances[0] + tie / 2
        # votes that cancel out leave rounding
        cancel_out = abs(p_a - 0.5) <= 1e-9
        if cancel_out and not keep_ties:
            continue
        p_a = 0.5 if cancel_out else p_a
        winner = "a" if p_a >= 0.5 else "b"
        tie_prob = tie if keep_ties else None
        verdicts.append(_joint_verdict(comparison, winner, max(p_a, 1 - p_a), own, tie_prob))
    return verdicts


def skills(votes: list[Vote], controls: dict[int, str] | None = None) -> Skills:
    """Fit Dawid and Skene's model to votes for a, b or tie; tie is a class only where somebody
    voted for it.

    Which response is called a means nothing, so a and b are mirrored. Six earlier votes of an
    unknown annotator come before everybody's own: with one vote for each pair there is nothing to
    learn skill from, and label_prob stays at that annotator's. What an adjudicator has decided is
    known, like a control pair. Each pair of a ranking of k answers counts 2 / k in what is learnt of
    annotators, since k - 1 choices made them all.
    """
    from rlhf.data.dawid_skene import dawid_skene

    ratings: dict = {}
    weights: dict = {}
    for vote in votes:
        if not vote.is_final:
            ratings.setdefault(vote.comparison, {})[vote.annotator] = vote.choice
            weights[vote.comparison] = min(vote.weight, weights.get(vote.comparison, 1.0))
    # a class that nobody uses would take probability from the others
    has_ties = any(vote.choice == "tie" for vote in votes)
    K = 3 if has_ties else 2
    classes = ("a", "b", "tie")[:K]
    final = {id: vote.choice for id, vote in final_votes(votes).items() if vote.choice in classes}
    pseudo = [row[:K] for row in UNKNOWN_ANNOTATOR[:K]]
    known = final | (controls or {})
    mirror = (1, 0, 2)[:K]
    return dawid_skene(ratings, classes, known=known, pseudo=pseudo, mirror=mirror, weights=weights)


def verdicts(
    votes: list[Vote],
    aggregate: Aggregate,
    controls: dict[int, str] | None = None,
    *,
    keep_ties: bool = False,
) -> list[Verdict]:
    """Return what the votes become: "each" (one verdict a vote), "majority" or "skill" (one a
    pair).

    `keep_ties`: also for votes and pairs without a winner, with tie_prob. Controls give none. Where
    an adjudicator has decided, no other vote counts. Raises UserError for any other name.
    """
    if aggregate == "skill":
        return by_skill(votes, controls, keep_ties=keep_ties)
    controls = controls or {}
    counting = after_adjudication(votes)
    normal = [vote for vote in counting if vote.comparison not in controls]
    if aggregate == "each":
        return each(normal, keep_ties=keep_ties)
    if aggregate == "majority":
        return majority(normal, keep_ties=keep_ties)
    raise UserError(f"aggregate: found {aggregate!r}, expected each, majority or skill")


def no_preference(choices: Mapping[str, int]) -> str | None:
    """Return in words that no vote of a store prefers an answer, from its votes by choice; None where
    one does, or nobody has voted.
    """
    cast = {choice: count for choice, count in choices.items() if count}
    if not cast or cast.get("a") or cast.get("b"):
        return None
    total = sum(cast.values())
    if set(cast) == {"tie"}:
        return f"all its votes ({total}) are ties, so no pair has a better answer"
    votes = ", ".join(f"{choice} {count}" for choice, count in cast.items())
    return f"none of its {total} votes prefers an answer ({votes}), so no pair has a better one"


def margin_of(votes: list[Vote], winner: str) -> float | None:
    """Return by how much the winner of one comparison is better, in score units: the mean over
    votes for a, b and tie.

    A vote for the winner counts MARGINS[strength] (1/3 slightly, 2/3 clearly, 1 by far), a vote
    against it as much below 0, a tie 0. Votes for a side that give no strength are left out; None
    if none gives one; never below 0.
    """
    margins = []
    ties = 0
    for vote in votes:
        if vote.choice == "tie":
            ties += 1
        elif vote.choice in ("a", "b") and vote.strength:
            sign = 1 if vote.choice == winner else -1
            margins.append(sign * MARGINS[vote.strength])
    # a margin of 0 would say that both are equally good
    if not margins:
        return None
    return max(0.0, sum(margins) / (len(margins) + ties))


def by_comparison(votes: list[Vote]) -> dict[int, list[Vote]]:
    """Return the votes on each comparison, by its id."""
    found: dict[int, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.comparison, []).append(vote)
    return dict(sorted(found.items()))


def minority(count: Mapping[str, int]) -> float:
    """Return the smaller side's share of the votes for a or b; 0 where nobody differs."""
    sides = count["a"], count["b"]
    return min(sides) / sum(sides) if all(sides) else 0.0


def _joint_verdict(
    comparison: int,
    winner: str,
    label_prob: float,
    votes: list[Vote],
    tie_prob: float | None = None,
) -> Verdict:
    count = Counter(vote.choice for vote in votes)
    cast = {choice: count[choice] for choice in CHOICES if count[choice]}
    return Verdict(
        comparison,
        winner,
        label_prob=label_prob,
        tie_prob=tie_prob,
        margin=margin_of(votes, winner),
        metadata={"votes": cast},
    )
