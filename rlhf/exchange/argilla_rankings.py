"""Rankings as records of Argilla 2, with a RankingQuestion.

As pairs are (argilla.py), with fields answer_1, answer_2, ... and questions ranking (names of fields,
the best first), reason, tags, and marks_1, marks_2, ... (spans in an answer). Its package gives back
an order without ties, so ties, skips, remarks and times are in the metadata under `rlhf`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.rankings import Order
from rlhf.errors import UserError
from rlhf.exchange import argilla
from rlhf.exchange.pairs import Answer, read_fields
from rlhf.exchange.rankings import CastOrder, JudgedRanking, extras_of, with_extras


def to_records(rankings: Sequence[JudgedRanking], users: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one record for each ranking; users: {name here: user_id there}, made up where missing."""
    return [_record(ranking, users) for ranking in rankings]


def _record(ranking: JudgedRanking, users: Mapping[str, str]) -> dict[str, Any]:
    answers = {f"answer_{i}": answer for i, answer in enumerate(ranking.answers, 1)}
    texts = {name: answer.text for name, answer in answers.items()}
    given = [(cast, _given(cast)) for cast in ranking.orders]
    identity = [ranking.prompt, texts]
    return argilla.record(ranking, extras_of(ranking), answers, given, identity, users)


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
    most = max(len(ranking.answers) for ranking in rankings)
    fewest = min(len(ranking.answers) for ranking in rankings)
    names = {f"answer_{i}": f"Answer {i}" for i in range(1, most + 1)}
    options = [{"value": name, "text": text} for name, text in names.items()]
    kind = {"type": "ranking", "options": options}
    first = argilla.question("ranking", "Which order, the best first?", kind, required=True)
    tags = dict.fromkeys(tag for one in rankings for cast in one.orders for tag in cast.tags)
    fields = [argilla.field("prompt", "Conversation", "chat")]
    for number, (name, text) in enumerate(names.items(), 1):
        fields.append(argilla.field(name, text, "text") | {"required": number <= fewest})
    questions = [first, *argilla.common_questions(tags), *argilla.mark_questions(names)]
    shown = (*argilla.SHOWN, *(f"model_{i}" for i in range(1, most + 1)))
    return argilla.dataset(fields, questions, shown)


def from_records(
    rows: Sequence[Any],
    source: str,
    users: Mapping[str, str],
    answers: tuple[str, ...] | None = None,
) -> tuple[list[JudgedRanking], list[Any]]:
    """Return the rankings of records, and the rows with what is left to be read as pairs, None where
    nothing is.

    users: {name here: user_id there}. answers: names of more than two fields; without, only records
    that were exported here are rankings. Raises UserError, with the place.
    """
    names = {id: name for name, id in users.items()}
    rankings, rest = [], []
    for number, row in enumerate(rows, 1):
        is_record = isinstance(row, dict) and isinstance(row.get("fields"), dict)
        found = _from_record(row, f"{source} row {number}", names, answers) if is_record else None
        left = row
        if found is not None:
            rankings.append(found)
            left = _without_orders(row, answers) if answers else None
        rest.append(left)
    return rankings, rest


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
    return {**row, "responses": left, "suggestions": {}}


def _from_record(
    row: Any, place: str, users: Mapping[str, str], answers: tuple[str, ...] | None = None
) -> JudgedRanking | None:
    """Return the ranking of a record, with the orders that place every answer; None where it has
    none and was not exported here.

    users: {id there: name here}. answers: names of the fields with the answers; by default those of
    a record that was exported here. Raises UserError, with the place.
    """
    metadata = dict(row.get("metadata") or {})
    extras = argilla.extras_in(metadata, place)
    fields = row["fields"]
    if "orders" in extras:
        answers = tuple(name for name in fields if name.startswith("answer_"))
    elif answers is None or len(answers) < 3:
        return None
    if not all(isinstance(fields.get(name), str) for name in answers):
        raise UserError(f"{place}: found fields {', '.join(fields)}, expected {', '.join(answers)}")
    prompt = read_fields(fields, place, answers[:2])[0]
    prompt = argilla.whole_prompt(prompt, extras)
    texts = [fields[name] for name in answers]
    names = extras.get("users", {}) | dict(users)
    orders = []
    for user, given in argilla.by_user(row.get("responses") or {}).items():
        orders += _orders(given, names.get(user, user), "person", answers, texts, place)
    if extras:
        return with_extras(prompt, texts, orders, extras, keeps_marks=True)
    for agent, given in argilla.by_agent(row.get("suggestions") or {}).items():
        orders += _orders(given, agent, "model", answers, texts, place)
    if not orders:
        return None
    about = {name: metadata.pop(name, None) for name in argilla.SHOWN}
    return JudgedRanking(prompt, list(map(Answer, texts)), orders, metadata=metadata, **about)


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
            cast = CastOrder(annotator, order, kind, reason=given.get("reason"))
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
    for number, item in enumerate(value):
        name, rank = item, number
        if isinstance(item, dict):
            name, rank = item.get("value"), item.get("rank", number)
        if name in answers:
            groups.setdefault(rank, []).append(answers.index(name))
    placed = sorted(itertools.chain.from_iterable(groups.values()))
    if placed != list(range(len(answers))):
        return None
    return [sorted(groups[rank]) for rank in sorted(groups)]
