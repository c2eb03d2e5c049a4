"""Rankings as tasks of Label Studio, with its Ranker tag.

{"data": {"prompt", "answers": [{"id", "title", "body"}]}, ...}; the result of type ranker has a bucket
for each place, {"place1": ["answer2"], "place2": ["answer1", "answer3"]}: equally good answers are in
one. A list has no place for marked passages, which are in `data.rlhf` with all else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.rankings import Order
from rlhf.errors import UserError
from rlhf.exchange import label_studio
from rlhf.exchange.rankings import CastOrder, JudgedRanking, extras_of, with_extras


def to_tasks(rankings: Sequence[JudgedRanking], users: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one task for each ranking; users: {name here: e-mail address there}, the name if missing."""
    return [_task(ranking, users) for ranking in rankings]


def _task(ranking: JudgedRanking, users: Mapping[str, str]) -> dict[str, Any]:
    answers = []
    for number, answer in enumerate(ranking.answers, 1):
        answers.append({"id": f"answer{number}", "title": f"Answer {number}", "body": answer.text})
    given = [(cast, _result(cast), not cast.order) for cast in ranking.orders]
    return label_studio.task(ranking, extras_of(ranking), {"answers": answers}, given, users)


def _result(cast: CastOrder) -> list[dict[str, Any]]:
    found = []
    if cast.order:
        buckets = {}
        for place, equal in enumerate(cast.order, 1):
            buckets[f"place{place}"] = [f"answer{number + 1}" for number in equal]
        found.append(("order", "answers", "ranker", {"ranker": buckets}))
    if cast.tags:
        found.append(("tags", "answers", "choices", {"choices": cast.tags}))
    if cast.reason is not None:
        found.append(("reason", "answers", "textarea", {"text": [cast.reason]}))
    return label_studio.regions(cast.annotator, found)


def labelling(rankings: Sequence[JudgedRanking]) -> str:
    """Return the labelling configuration (XML) of a project for these tasks."""
    most = max(len(ranking.answers) for ranking in rankings)
    tags = dict.fromkeys(tag for one in rankings for cast in one.orders for tag in cast.tags)
    places = [
        f'    <Bucket name="place{place}" title="Place {place}"/>' for place in range(1, most + 1)
    ]
    lines = [
        "<View>",
        label_studio.CONVERSATION,
        '  <Header value="Which order? Place 1 is the best; equally good answers share a place"/>',
        '  <List name="answers" value="$answers" title="Answers"/>',
        '  <Ranker name="order" toName="answers">',
        *places,
        "  </Ranker>",
        *label_studio.tag_choices(tags, "answers"),
        label_studio.text_area("reason", "Why?", "answers"),
    ]
    return "\n".join([*lines, "</View>", ""])


def from_tasks(
    rows: Sequence[Any], source: str, users: Mapping[str, str], answers: Any = None
) -> tuple[list[JudgedRanking], list[Any]]:
    """Return the rankings of tasks that were exported here, and the other rows, None for a ranking.

    users: {name here: e-mail address there}. answers: not used. Raises UserError, with the place.
    """
    names = {id: name for name, id in users.items()}
    rankings, rest = [], []
    for number, row in enumerate(rows, 1):
        is_task = isinstance(row, dict) and isinstance(row.get("data"), dict)
        found = _from_task(row, f"{source} row {number}", names) if is_task else None
        if found is not None:
            rankings.append(found)
        rest.append(row if found is None else None)
    return rankings, rest


def _from_task(row: Any, place: str, users: Mapping[str, str]) -> JudgedRanking | None:
    """Return the ranking of a task that was exported here; None for any other.

    users: {e-mail address or id there: name here}. Raises UserError, with the place.
    """
    data = row["data"]
    extras = data.get("rlhf") or {}
    if "orders" not in extras:
        return None
    ids = [answer["id"] for answer in data["answers"]]
    texts = [answer["body"] for answer in data["answers"]]
    names = extras.get("users", {}) | dict(users)
    orders = []
    for annotation in row.get("annotations") or ():
        who = label_studio.who(annotation.get("completed_by"), names)
        orders.append(_order(annotation, who, ids, place))
    return with_extras(data["prompt"], texts, orders, extras, keeps_marks=False)


def _order(annotation: Mapping[str, Any], name: str, ids: Sequence[str], place: str) -> CastOrder:
    cast = CastOrder(name, [])
    for region in annotation.get("result") or ():
        value, kind = region.get("value", {}), region.get("type")
        if kind == "ranker":
            cast.order = _order_in(value.get("ranker") or {}, ids)
        elif kind == "choices" and region.get("from_name") == "tags":
            cast.tags = list(value.get("choices", ()))
        elif kind == "textarea":
            cast.reason = "\n".join(value.get("text", ())) or None
    if not cast.order and not annotation.get("was_cancelled"):
        raise UserError(f"{place}: the annotation of {name} does not place every answer")
    label_studio.read_times(cast, annotation)
    return cast


def _order_in(buckets: Mapping[str, Any], ids: Sequence[str]) -> Order:
    """Return the order of buckets place1, place2, ...; empty unless they hold every answer once."""
    places = [name for name in buckets if name.removeprefix("place").isdecimal()]
    order = []
    for name in sorted(places, key=lambda name: int(name.removeprefix("place"))):
        equal = sorted(ids.index(id) for id in buckets[name] if id in ids)
        order += [equal] if equal else []
    placed = sorted(itertools.chain.from_iterable(order))
    return order if placed == list(range(len(ids))) else []
