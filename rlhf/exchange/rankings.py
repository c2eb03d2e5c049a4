"""Rankings with everybody's orders, as they pass between a preference store and other programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf.data.rankings import Order
from rlhf.data.records import Message, RecordError
from rlhf.data.spans import Span, renamed
from rlhf.data.store import Store
from rlhf.data.store_queries import StoreView
from rlhf.errors import UserError
from rlhf.exchange.pairs import ABOUT, Added, Answer, Kind, add_answers, without_remarks


@dataclass
class CastOrder:
    """One annotator's order of answers, by their numbers from 0; the fields are those of `Store.rank`."""

    annotator: str
    order: Order
    kind: Kind = "person"
    shown: list[int] | None = None
    reason: str | None = None
    tags: list[str] = field(default_factory=list)
    duration_ms: int | None = None
    created: str | None = None
    spans: list[Span] = field(default_factory=list)


@dataclass
class JudgedRanking:
    """Answers to a prompt and the orders that people have put them in."""

    prompt: list[Message]
    answers: list[Answer]
    orders: list[CastOrder] = field(default_factory=list)
    # as the data names it; default_group may still be joined with others
    group: str | None = None
    default_group: str | None = None
    split: str | None = None
    voice: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def rankings_of_view(view: StoreView) -> list[JudgedRanking]:
    """Return every ranking of a store after an event, with the orders that stand and the skips."""
    prompts, kinds = view.prompts_by_id(), view.annotator_kinds()
    found, numbers = {}, {}
    for id, row in view.rankings().items():
        about = {name: prompts[row["prompt"]].get(name) for name in ABOUT}
        answers = []
        for response in row["responses"]:
            ended = None if response["ended"] is None else bool(response["ended"])
            answers.append(Answer(response["text"], response["model"], ended))
        found[id] = JudgedRanking(row["messages"], answers, **about)
        numbers[id] = {response["id"]: i for i, response in enumerate(row["responses"])}
    for ranked in view.ranked():
        names = numbers[ranked.ranking]
        cast = CastOrder(
            ranked.annotator,
            named(ranked.order, names),
            kinds[ranked.annotator],
            ranked.shown and [names[id] for id in ranked.shown],
            ranked.reason,
            ranked.tags,
            ranked.duration_ms,
            ranked.created,
            renamed(ranked.spans, names),
        )
        found[ranked.ranking].orders.append(cast)
    return list(found.values())


def named(order: Order, names: Mapping[int, Any] | Sequence[Any]) -> list[list[Any]]:
    """Return an order with other names of the answers."""
    found = []
    for equal in order:
        found.append([names[answer] for answer in equal])
    return found


def add_rankings(store: Store, rankings: Iterable[JudgedRanking], added: Added) -> None:
    """Add rankings and orders to a store in one transaction; the same again adds nothing.

    An annotator's order that stands stays, and theirs from `rankings` is left out. Counts in
    `added`. Raises UserError, naming the ranking, where the store refuses it.
    """
    with store.transaction():
        before = len(store.rankings_after(0))
        for number, ranking in enumerate(rankings, 1):
            try:
                _add_ranking(store, ranking, added)
            except (UserError, RecordError) as error:
                raise UserError(f"ranking {number}: {error}") from None
        added.rankings = len(store.rankings_after(0)) - before


def _add_ranking(store: Store, ranking: JudgedRanking, added: Added) -> None:
    ids = add_answers(store, ranking, ranking.answers)
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
    keeps_marks: bool,
) -> JudgedRanking:
    """Return a ranking that another program gave back, with what only `extras` (from `extras_of`) has.

    An order that is as it was gets back its ties and remarks, and all else of it; one that was
    changed gets nothing of the earlier one. Orders that the other program has no place for, skips
    and those of models, are there again. keeps_marks: whether the program has a place for marks.
    """
    known = {cast["annotator"]: CastOrder(**cast) for cast in extras.get("orders", ())}
    kept = []
    for cast in orders:
        earlier = known.pop(cast.annotator, None)
        is_same = earlier is not None and _is_same(cast, earlier, keeps_marks)
        kept.append(earlier if is_same else cast)
    kept += [cast for cast in known.values() if not cast.order or cast.kind != "person"]
    answers = []
    for text, about in itertools.zip_longest(texts, extras.get("answers", ()), fillvalue={}):
        answers.append(Answer(text, **about))
    about = {name: extras[name] for name in ABOUT if name in extras}
    return JudgedRanking(prompt, answers, kept, **about)


def _is_same(cast: CastOrder, earlier: CastOrder, keeps_marks: bool) -> bool:
    order = earlier.order
    # a program that knows no ties lists equally good ones one after the other
    if all(len(equal) == 1 for equal in cast.order):
        order = [[number] for number in itertools.chain.from_iterable(order)]
    same_marks = not keeps_marks or cast.spans == without_remarks(earlier.spans)
    given = cast.order, cast.reason, cast.tags
    return given == (order, earlier.reason, earlier.tags) and same_marks


def fault_of(ranking: JudgedRanking) -> str | None:
    """Return why nobody can order the answers of a ranking, None if they can be."""
    texts = [answer.text.strip() for answer in ranking.answers]
    if not all(texts):
        return "an answer is empty"
    return "two answers are the same text" if len(set(texts)) < len(texts) else None
