"""Rankings as tasks of Label Studio, with its Ranker tag.

{"data": {"prompt", "answers": [{"id", "title", "body"}]}, ...}; the result of type ranker has a bucket
for each place, {"place1": ["answer2"], "place2": ["answer1", "answer3"]}: equally good answers are in
one. A list has no place for marked passages, which are in `data.rlhf` with all else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.rankings import Order
from rlhf.errors import UserError
from rlhf.exchange import label_studio
from rlhf.exchange.fields import tags_of
from rlhf.exchange.rankings import CastOrder, JudgedRanking, extras_of, places_all, with_extras


def to_task(ranking: JudgedRanking, users: Mapping[str, str]) -> dict[str, Any]:
    """Return the task of a ranking; users: {name here: e-mail address there}, the name if missing."""
    answers = []
    for number, answer in enumerate(ranking.answers, 1):
        answers.append({"id": f"answer{number}", "title": f"Answer {number}", "body": answer.text})
    given = [(cast, _result(cast), not cast.order) for cast in ranking.orders]
    return label_studio.task_of(ranking, extras_of(ranking), {"answers": answers}, given, users)


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
    places = []
    for place in range(1, most + 1):
        places.append(f'    <Bucket name="place{place}" title="Place {place}"/>')
    lines = [
        "<View>",
        label_studio.CONVERSATION,
        '  <Header value="Which order? Place 1 is the best; equally good answers share a place"/>',
        '  <List name="answers" value="$answers" title="Answers"/>',
        '  <Ranker name="order" toName="answers">',
        *places,
        "  </Ranker>",
        *label_studio.tag_choices(tags_of(rankings), "answers"),
        label_studio.text_area("reason", "Why?", "answers"),
    ]
    return "\n".join([*lines, "</View>", ""])


def from_task(
    row: Mapping[str, Any], place: str, names: Mapping[str, str], answers: Any = None
) -> tuple[JudgedRanking | None, Mapping[str, Any] | None]:
    """Return the ranking of a task that was exported here, or None and the task.

    names: {e-mail address or id there: name here}. answers: not used. Raises UserError, with the
    place.
    """
    data = row.get("data")
    extras = (isinstance(data, dict) and data.get("rlhf")) or {}
    if "orders" not in extras:
        return None, row
    # by id, as the buckets name them
    texts = {answer["id"]: answer["body"] for answer in data["answers"]}
    names = extras.get("users", {}) | dict(names)
    orders = []
    for annotation in row.get("annotations") or ():
        who = label_studio.who(annotation.get("completed_by"), names)
        orders.append(_order(annotation, who, list(texts), place))
    bodies = list(texts.values())
    return with_extras(data["prompt"], bodies, orders, extras, keeps="ties"), None


def _order(annotation: Mapping[str, Any], name: str, ids: Sequence[str], place: str) -> CastOrder:
    cast = CastOrder(name, [])
    for region in annotation.get("result") or ():
        value, kind = region.get("value", {}), region.get("type")
        if kind == "ranker":
            cast.order = _order_in(value.get("ranker") or {}, ids)
        elif kind == "choices" and region.get("from_name") == "tags":
            cast.tags = list(value.get("choices", ()))
        elif kind == "textarea":
            cast.reason = label_studio.text_in(region)
    # a skip is cancelled
    if not cast.order and not annotation.get("was_cancelled"):
        raise UserError(f"{place}: the annotation of {name} does not place every answer")
    label_studio.read_times(cast, annotation)
    return cast


def _order_in(buckets: Mapping[str, Any], ids: Sequence[str]) -> Order:
    """Return the order of buckets place1, place2, ...; empty unless they hold every answer once."""
    by_place = {}
    for name, equal in buckets.items():
        place = name.removeprefix("place")
        # what has no place yet is in a bucket of another name
        known = sorted(ids.index(id) for id in equal if id in ids)
        if place.isdecimal() and known:
            by_place[int(place)] = known
    order = [by_place[place] for place in sorted(by_place)]
    return order if places_all(order, ids) else []
