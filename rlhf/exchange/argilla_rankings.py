"""Rankings as records of Argilla 2, with a RankingQuestion.

As pairs are (argilla.py), with fields answer_1, answer_2, ... and questions ranking (names of fields,
the best first), reason, tags, and marks_1, marks_2, ... (spans in an answer). Its package gives back
an order without ties, so ties, skips, remarks and times are in the metadata under `rlhf`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.rankings import Order
from rlhf.errors import UserError
from rlhf.exchange import argilla
from rlhf.exchange.fields import SHOWN, read_fields, tags_of, take_shown
from rlhf.exchange.pairs import Answer
from rlhf.exchange.rankings import CastOrder, JudgedRanking, extras_of, places_all, with_extras


def to_record(ranking: JudgedRanking, users: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a ranking; users: {name here: user_id there}, made up where missing."""
    answers = {f"answer_{i}": answer for i, answer in enumerate(ranking.answers, 1)}
    texts = {name: answer.text for name, answer in answers.items()}
    given = [(cast, _given(cast)) for cast in ranking.orders]
    identity = [ranking.prompt, texts]
    return argilla.record_of(ranking, extras_of(ranking), answers, given, identity, users)


def _given(cast: CastOrder) -> dict[str, Any]:
    """Return the answers to the questions."""
    flat = itertools.chain.from_iterable(cast.order)
    given: dict[str, Any] = {"ranking": [f"answer_{number + 1}" for number in flat]}
    given |= {"reason": cast.reason, "tags": cast.tags}
    for span in cast.spans:
        given.setdefault(f"marks_{span['answer'] + 1}", []).append(argilla.mark(span))
    return given


def settings(rankings: Sequence[JudgedRanking]) -> dict[str, Any]:
    """Return the settings of a dataset for these records (`rg.Settings.from_json`)."""
    sizes = [len(ranking.answers) for ranking in rankings]
    fields = [argilla.field("prompt", "Conversation", "chat")]
    names, shown = {}, list(SHOWN)
    for number in range(1, max(sizes) + 1):
        name, text = f"answer_{number}", f"Answer {number}"
        # a record of fewer answers lacks the last ones
        is_always_there = number <= min(sizes)
        fields.append(argilla.field(name, text, "text") | {"required": is_always_there})
        names[name] = text
        shown.append(f"model_{number}")
    kind = {"type": "ranking", "options": argilla.options(names)}
    first = argilla.question("ranking", "Which order, the best first?", kind, required=True)
    common = argilla.common_questions(tags_of(rankings))
    return argilla.dataset(fields, [first, *common, *argilla.mark_questions(names)], shown)


def from_record(
    row: Mapping[str, Any],
    place: str,
    names: Mapping[str, str],
    answers: tuple[str, ...] | None = None,
) -> tuple[JudgedRanking | None, Mapping[str, Any] | None]:
    """Return the ranking of a record, None where it is none, and what is left to be read as pairs,
    None where nothing is.

    names: {user_id there: name here}. answers: names of more than two fields; without, only a record
    that was exported here is a ranking. Raises UserError, with the place.
    """
    found = None
    if isinstance(row.get("fields"), dict):
        found = _ranking(row, place, names, answers)
    if found is None:
        return None, row
    return found, _without_orders(row, answers) if answers else None


def _without_orders(row: dict[str, Any], answers: Sequence[str]) -> dict[str, Any] | None:
    """Return the record without the people who have put all answers in order; None if nobody is left."""
    given = argilla.by_user(row.get("responses") or {})
    ordered = set()
    for user, values in given.items():
        if any(order_in(value, answers) is not None for value in values.values()):
            ordered.add(user)
    if ordered == set(given):
        return None
    left = {}
    for question, responses in row["responses"].items():
        left[question] = [one for one in responses if str(one["user_id"]) not in ordered]
    # what models suggest was read with the ranking
    return {**row, "responses": left, "suggestions": {}}


def _ranking(
    row: Mapping[str, Any], place: str, names: Mapping[str, str], answers: tuple[str, ...] | None
) -> JudgedRanking | None:
    """Return the ranking of a record, with the orders that place every answer; None where it has
    none and was not exported here.
    """
    metadata = dict(row.get("metadata") or {})
    extras = argilla.extras_in(metadata, place)
    fields = row["fields"]
    # one that was exported here tells its answers by their names
    if "orders" in extras:
        answers = tuple(name for name in fields if name.startswith("answer_"))
    # of two answers an order is a choice
    elif answers is None or len(answers) < 3:
        return None
    if not all(isinstance(fields.get(name), str) for name in answers):
        raise UserError(f"{place}: found fields {', '.join(fields)}, expected {', '.join(answers)}")
    prompt = read_fields(fields, place, answers[:2])[0]
    prompt = argilla.whole_prompt(prompt, extras)
    texts = [fields[name] for name in answers]
    names = extras.get("users", {}) | dict(names)
    orders = []
    for user, given in argilla.by_user(row.get("responses") or {}).items():
        orders += _orders(given, names.get(user, user), "person", answers, texts, place)
    # what models said stands there too, with what Argilla cannot hold
    if extras:
        return with_extras(prompt, texts, orders, extras, keeps="marks")
    for agent, given in argilla.by_agent(row.get("suggestions") or {}).items():
        orders += _orders(given, agent, "model", answers, texts, place)
    if not orders:
        return None
    ranking = JudgedRanking(prompt, list(map(Answer, texts)), orders, metadata=metadata)
    take_shown(ranking, metadata)
    return ranking


def _orders(
    given: Mapping[str, Any],
    annotator: str,
    kind: Any,
    answers: Sequence[str],
    texts: Sequence[str],
    place: str,
) -> list[CastOrder]:
    """Return one annotator's order, or nothing where no answer to a question is one."""
    for value in given.values():
        order = order_in(value, answers)
        if order is not None:
            cast = CastOrder(annotator, order, kind=kind, reason=given.get("reason"))
            cast.tags = list(given.get("tags") or [])
            cast.spans = argilla.marks_in(given, dict(enumerate(texts)), place)
            return [cast]
    return []


def order_in(value: Any, answers: Sequence[str]) -> Order | None:
    """Return the order of a ranking: names of fields, the best first, or {value, rank}; None unless
    it places every answer once.
    """
    if not isinstance(value, list):
        return None
    groups: dict[Any, list[int]] = {}
    for name, rank in argilla.ranks_in(value):
        if name in answers:
            groups.setdefault(rank, []).append(answers.index(name))
    order = [sorted(groups[rank]) for rank in sorted(groups)]
    return order if places_all(order, answers) else None
