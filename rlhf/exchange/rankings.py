"""Rankings with everybody's orders, as they pass between a preference store and other programs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlhf.data.rankings import Order
from rlhf.data.records import Message
from rlhf.data.spans import renamed
from rlhf.data.store import Store
from rlhf.data.store_queries import StoreView
from rlhf.exchange.pairs import (
    About,
    Added,
    Answer,
    Cast,
    about_of,
    add_answers,
    add_each,
    fields_of,
    without_remarks,
)


@dataclass
class CastOrder(Cast):
    """One annotator's order of answers, by their numbers from 0; the fields are those of `Store.rank`."""

    annotator: str
    order: Order
    shown: list[int] | None = None


@dataclass
class JudgedRanking(About):
    """Answers to a prompt and the orders that people have put them in."""

    prompt: list[Message]
    answers: list[Answer]
    orders: list[CastOrder] = field(default_factory=list)

    @property
    def casts(self) -> list[CastOrder]:
        return self.orders


def rankings_of_view(view: StoreView) -> list[JudgedRanking]:
    """Return every ranking of a store after an event, with the orders that stand and the skips."""
    prompts, kinds = view.prompts_by_id(), view.annotator_kinds()
    found, numbers = {}, {}
    for id, row in view.rankings().items():
        answers = list(map(Answer.of_row, row["responses"]))
        found[id] = JudgedRanking(row["messages"], answers, **about_of(prompts[row["prompt"]]))
        numbers[id] = {response["id"]: i for i, response in enumerate(row["responses"])}
    for ranked in view.ranked():
        names = numbers[ranked.ranking]
        # the store's ids mean nothing elsewhere
        given = fields_of(ranked, CastOrder) | {
            "order": named(ranked.order, names),
            "shown": ranked.shown and [names[id] for id in ranked.shown],
            "spans": renamed(ranked.spans, names),
        }
        cast = CastOrder(kind=kinds[ranked.annotator], **given)
        found[ranked.ranking].orders.append(cast)
    return list(found.values())


def named(order: Order, names: Mapping[int, Any] | Sequence[Any]) -> list[list[Any]]:
    """Return an order with other names of the answers."""
    found = []
    for equal in order:
        found.append([names[answer] for answer in equal])
    return found


def places_all(order: Order, answers: Sequence[Any]) -> bool:
    """Return whether an order, of numbers from 0, has each of these answers once."""
    placed = sorted(itertools.chain.from_iterable(order))
    return placed == list(range(len(answers)))


def add_rankings(store: Store, rankings: Iterable[JudgedRanking], added: Added) -> None:
    """Add rankings and orders to a store in one transaction; the same again adds nothing.

    An annotator who has ordered these answers already keeps that order, and theirs from `rankings`
    is left out. Counts in `added`. Raises UserError, naming the ranking, where the store refuses it.
    """
    before = len(store.rankings_after(0))
    add_each(store, rankings, added, _add_ranking, "ranking")
    added.rankings = len(store.rankings_after(0)) - before


def _add_ranking(store: Store, ranking: JudgedRanking, added: Added) -> None:
    ids = add_answers(store, ranking)
    id = store.add_ranking(ids)
    for cast in ranking.orders:
        annotator = store.add_annotator(cast.annotator, cast.kind)
        if store.standing_rank(id, annotator):
            added.known_votes += 1
            continue
        store.rank(
            id,
            annotator,
            named(cast.order, ids),
            shown=[ids[number] for number in cast.shown or ()],
            reason=cast.reason,
            tags=cast.tags,
            duration_ms=cast.duration_ms,
            spans=renamed(cast.spans, dict(enumerate(ids))),
            created=cast.created,
        )
        added.votes += 1
        added.annotators.add(cast.annotator)


def extras_of(ranking: JudgedRanking) -> dict[str, Any]:
    """Return all of a ranking but its texts, for a place that another program keeps and does not show."""
    extras = asdict(ranking)
    del extras["prompt"]
    for answer in extras["answers"]:
        del answer["text"]
    return extras


def with_extras(
    prompt: list[Message],
    texts: Sequence[str],
    orders: list[CastOrder],
    extras: dict[str, Any],
    *,
    keeps: Literal["ties", "marks"],
) -> JudgedRanking:
    """Return a ranking that another program gave back, with what only `extras` (from `extras_of`) has.

    An order that is as it was gets back its ties and remarks, and all else of it; one that was
    changed gets nothing of the earlier one. Orders that the other program has no place for, skips
    and those of models, are there again. keeps: what of an order the program has a place for.
    Raises ValueError where a text is missing, or is none.
    """
    exported = extras["answers"]
    if len(texts) != len(exported) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected the texts of {len(exported)} answers, as exported")
    known = {cast["annotator"]: CastOrder(**cast) for cast in extras.get("orders", ())}
    kept = []
    for cast in orders:
        earlier = known.pop(cast.annotator, None)
        is_same = earlier is not None and _is_same(cast, earlier, keeps)
        kept.append(earlier if is_same else cast)
    for cast in known.values():
        # what the other program shows no order for
        if not cast.order or cast.kind != "person":
            kept.append(cast)
    answers = []
    for text, about in zip(texts, exported, strict=True):
        answers.append(Answer(text, **about))
    return JudgedRanking(prompt, answers, kept, **about_of(extras))


def _is_same(cast: CastOrder, earlier: CastOrder, keeps: Literal["ties", "marks"]) -> bool:
    order = earlier.order
    # a program that knows no ties lists equally good ones one after the other
    if keeps != "ties" and all(len(equal) == 1 for equal in cast.order):
        order = [[number] for number in itertools.chain.from_iterable(order)]
    same_marks = keeps != "marks" or cast.spans == without_remarks(earlier.spans)
    given = cast.order, cast.reason, cast.tags
    return given == (order, earlier.reason, earlier.tags) and same_marks
