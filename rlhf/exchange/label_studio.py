"""Tasks of Label Studio (its JSON export and import), compared with its Pairwise tag.

{"data": {"prompt": messages, "answer1", "answer2", ...}, "annotations": [{"completed_by",
"lead_time" (s), "was_cancelled", "created_at", "result": [{"from_name", "to_name", "type",
"value"}]}], "predictions": [{"model_version", "result"}]}. A skip is `was_cancelled`; tie and both
bad are choices beside the Pairwise tag, strength a rating of 1 to 3, marked passages labels.
Label Studio shows answer1 left to everybody: sides drawn here, and all that is known of the prompt,
are in `data.rlhf`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from rlhf.data.records import digest
from rlhf.data.spans import LABELS, Span
from rlhf.errors import UserError
from rlhf.exchange.fields import (
    checked_at,
    choice_of,
    read_fields,
    shown_of,
    tags_of,
    take_shown,
)
from rlhf.exchange.pairs import (
    CHANGEABLE,
    Answer,
    CastVote,
    JudgedPair,
    extras_of,
    with_extras,
)

CONVERSATION = '  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>'
MARKS = {"marks1": "a", "marks2": "b"}
REMARKS = ("remark1", "remark2")
SELECTED = {"a": "left", "b": "right"}


def to_task(pair: JudgedPair, users: Mapping[str, str]) -> dict[str, Any]:
    """Return the task of a pair; users: {name here: e-mail address there}, the name if missing."""
    data = {"answer1": pair.a.text, "answer2": pair.b.text}
    for number, answer in enumerate(pair.answers, 1):
        if answer.model is not None:
            data[f"model{number}"] = answer.model
    given = [(vote, _result(vote), vote.choice == "skip") for vote in pair.votes]
    return task_of(pair, extras_of(pair), data, given, users)


def task_of(
    judged: Any,
    extras: dict[str, Any],
    data: dict[str, Any],
    given: Iterable[tuple[Any, list[dict[str, Any]], bool]],
    users: Mapping[str, str],
) -> dict[str, Any]:
    """Return the task of a pair or ranking.

    extras: what Label Studio has no place for. data: the answers, and what is shown of them. given:
    each vote or order, its result, and whether it is a skip.
    """
    extras["users"] = {}
    annotations, predictions = [], []
    for cast, result, is_skip in given:
        # of programs it takes predictions, which have no time and cannot be cancelled
        if cast.kind != "person":
            predictions.append({"model_version": cast.annotator, "result": result})
            continue
        # people go by their address there, and come back under their name
        user = users.get(cast.annotator, cast.annotator)
        extras["users"][user] = cast.annotator
        annotations.append(_annotation(cast, user, result, is_skip=is_skip))
    return {
        "data": {"prompt": judged.prompt} | data | shown_of(judged) | {"rlhf": extras},
        "annotations": annotations,
        "predictions": predictions,
    }


def _result(vote: CastVote) -> list[dict[str, Any]]:
    found = []
    if vote.choice in SELECTED:
        found.append(("comparison", "comparison", "pairwise", {"selected": SELECTED[vote.choice]}))
    elif vote.choice != "skip":
        found.append(("equal", "answer1", "choices", {"choices": [vote.choice]}))
    if vote.strength is not None:
        found.append(("strength", "answer1", "rating", {"rating": vote.strength}))
    if vote.tags:
        found.append(("tags", "answer1", "choices", {"choices": vote.tags}))
    for name in ("reason", "corrected"):
        text = getattr(vote, name)
        if text is not None:
            found.append((name, "answer1", "textarea", {"text": [text]}))
    return regions(vote.annotator, found) + _marked(vote)


def _marked(vote: CastVote) -> list[dict[str, Any]]:
    """Return the regions of marked passages; a remark has the id of its passage."""
    result = []
    for span in vote.spans:
        number = "ab".index(span["answer"]) + 1
        place = {"start": span["start"], "end": span["end"]}
        labels = place | {"text": span["text"], "labels": [span["label"]]}
        found = [(f"marks{number}", f"answer{number}", "labels", labels)]
        if "remark" in span:
            value = place | {"text": [span["remark"]]}
            found.append((f"remark{number}", f"answer{number}", "textarea", value))
        both = regions(vote.annotator, found)
        result += [region | {"id": both[0]["id"]} for region in both]
    return result


def regions(annotator: str, found: Sequence[tuple[str, str, str, Any]]) -> list[dict[str, Any]]:
    """Return the result of an annotation; found: (from_name, to_name, type, value)."""
    result = []
    for name, to_name, kind, value in found:
        # the same again is the same region
        id = digest(f"{annotator} {name} {value}")[:10]
        region = {"id": id, "from_name": name, "to_name": to_name, "type": kind, "value": value}
        result.append(region)
    return result


def _annotation(
    cast: Any, user: str, result: list[dict[str, Any]], *, is_skip: bool
) -> dict[str, Any]:
    """Return an annotation of a vote or an order, with time and seconds where they are known."""
    given = {
        "completed_by": {"email": user, "first_name": cast.annotator},
        "result": result,
        "was_cancelled": is_skip,
        "ground_truth": False,
    }
    # Label Studio counts seconds
    if cast.duration_ms is not None:
        given["lead_time"] = cast.duration_ms / 1000
    if cast.created:
        given["created_at"] = cast.created
    return given


def labelling(pairs: Sequence[JudgedPair]) -> str:
    """Return the labelling configuration (XML) of a project for these tasks."""
    lines = [
        "<View>",
        CONVERSATION,
        '  <Header value="Which answer is better?"/>',
        '  <Pairwise name="comparison" toName="answer1,answer2"/>',
        '  <View style="display: flex; gap: 1em">',
        '    <View style="flex: 1"><Text name="answer1" value="$answer1"/></View>',
        '    <View style="flex: 1"><Text name="answer2" value="$answer2"/></View>',
        "  </View>",
        *_passages(),
        '  <Choices name="equal" toName="answer1" choice="single">',
        '    <Choice value="tie" alias="tie"/>',
        '    <Choice value="both_bad" alias="both_bad"/>',
        "  </Choices>",
        '  <Header value="How much better? 1 slightly, 2 clearly, 3 by far"/>',
        '  <Rating name="strength" toName="answer1" maxRating="3"/>',
    ]
    lines += tag_choices(tags_of(pairs), "answer1")
    for name, asked in (("reason", "Why?"), ("corrected", "A better answer")):
        lines.append(text_area(name, asked, "answer1"))
    return "\n".join([*lines, "</View>", ""])


def _passages() -> list[str]:
    lines = []
    for number in (1, 2):
        lines.append(f'  <Labels name="marks{number}" toName="answer{number}">')
        lines += [f'    <Label value="{label}"/>' for label in LABELS]
        lines += ["  </Labels>"]
        area = text_area(f"remark{number}", "Remark", f"answer{number}")
        lines.append(area.replace("/>", ' perRegion="true"/>'))
    return lines


def tag_choices(tags: Iterable[str], to_name: str) -> list[str]:
    """Return the lines of a choice of tags; none without tags."""
    options = [f"    <Choice value={quoteattr(tag)}/>" for tag in tags]
    if not options:
        return []
    return [
        f'  <Choices name="tags" toName="{to_name}" choice="multiple">',
        *options,
        "  </Choices>",
    ]


def text_area(name: str, asked: str, to_name: str) -> str:
    return (
        f'  <TextArea name="{name}" toName="{to_name}" placeholder="{asked}" maxSubmissions="1"/>'
    )


def from_task(
    row: Mapping[str, Any],
    place: str,
    names: Mapping[str, str],
    answers: tuple[str, ...] | None = None,
) -> list[JudgedPair]:
    """Return the pair of a task; also of a project that was set up in Label Studio.

    names: {e-mail address or id there: name here}. answers: names of the two fields with the
    answers. Drafts are not read. Raises UserError, with the place.
    """
    if answers is not None and len(answers) != 2:
        raise UserError(
            f"{place}: a task of Label Studio has two answers, {len(answers)} are named"
        )
    if not isinstance(row.get("data"), dict):
        raise UserError(f"{place}: is no task of Label Studio, which has data and annotations")
    data = dict(row["data"])
    extras = data.pop("rlhf", None) or {}
    prompt, prompt_name, sides = read_fields(data, place, answers)
    names = extras.get("users", {}) | dict(names)
    a, b = (Answer(data[name]) for name in sides)
    votes = []
    for kind, found in (("person", row.get("annotations")), ("model", row.get("predictions"))):
        for given in found or ():
            name = given.get("model_version") or "predictions"
            if kind == "person":
                name = who(given.get("completed_by"), names)
            vote = _vote(given, name, sides, place)
            vote.kind = kind
            vote.spans = _spans(given, {"a": a.text, "b": b.text}, place)
            votes.append(vote)
    pair = JudgedPair(prompt, a, b, votes)
    if extras:
        # times it measures itself; sides it knows nothing of
        kept = (*CHANGEABLE, "duration_ms", "created")
        return [with_extras(pair, extras, kept)]
    # it shows answer1 on the left to everybody
    for vote in votes:
        if vote.kind == "person" and vote.choice != "skip":
            vote.left = "a"
    take_shown(pair, data)
    a.model, b.model = data.pop("model1", None), data.pop("model2", None)
    for name in (prompt_name, *sides):
        del data[name]
    pair.metadata = data
    return [pair]


def _spans(annotation: Mapping[str, Any], texts: Mapping[str, str], place: str) -> list[Span]:
    """Return marked passages with their remarks, which share an id. Raises UserError."""
    regions = annotation.get("result") or ()
    # they may stand before their passages
    remarks = {}
    for region in regions:
        if region.get("from_name") in REMARKS:
            remarks[region.get("id")] = text_in(region)
    spans = []
    for region in regions:
        side = MARKS.get(region.get("from_name"))
        if side is None:
            continue
        value = region.get("value", {})
        span = {name: value.get(name) for name in ("start", "end", "text")}
        span |= {"answer": side, "remark": remarks.get(region.get("id"))}
        # one passage may be ticked as both
        for label in value.get("labels", ()):
            spans.append(span | {"label": label})
    return checked_at(spans, texts, place)


def text_in(region: Mapping[str, Any]) -> str | None:
    """Return what was written into a text area; None for nothing."""
    return "\n".join(region.get("value", {}).get("text", ())) or None


def who(user: Any, names: Mapping[str, str]) -> str:
    """Return the name of who completed an annotation: a number, or {id, email, first_name, ...}."""
    ids = []
    if isinstance(user, dict):
        full = " ".join(filter(None, (user.get("first_name"), user.get("last_name"))))
        known = (user.get("email"), user.get("id"), user.get("username"), full)
        ids = list(map(str, filter(None, known)))
    # a given name comes first, whichever of the ids it was given for
    for id in ids or [str(user)]:
        if id in names:
            return names[id]
    return ids[0] if ids else f"user {user}"


def _vote(annotation: dict[str, Any], name: str, sides: tuple[str, str], place: str) -> CastVote:
    vote = CastVote(name, "skip")
    choices = []
    for region in annotation.get("result") or ():
        value, kind = region.get("value", {}), region.get("type")
        if kind == "pairwise":
            choices.append(value.get("selected"))
        elif kind == "choices" and region.get("from_name") == "tags":
            vote.tags = list(value.get("choices", ()))
        elif kind == "choices":
            choices += value.get("choices", ())
        elif kind == "rating" and value.get("rating") in (1, 2, 3):
            vote.strength = value["rating"]
        elif kind == "textarea" and region.get("from_name") not in REMARKS:
            field = "corrected" if region.get("from_name") == "corrected" else "reason"
            setattr(vote, field, text_in(region))
    # a prediction cannot be cancelled: one without a choice is a skip
    is_skip = annotation.get("was_cancelled") or ("model_version" in annotation and not choices)
    if not is_skip:
        read = [choice_of(choice, sides) for choice in choices]
        # a comparison and a tie ticked beside it contradict each other
        if not read or None in read or len(set(read)) > 1:
            raise UserError(
                f"{place}: the annotation of {name} chooses {choices}, expected left, right, tie, both_bad or skip"
            )
        vote.choice = read[0]
    read_times(vote, annotation)
    return vote


def read_times(cast: Any, annotation: Mapping[str, Any]) -> None:
    """Give a vote or an order the times of its annotation."""
    seconds = annotation.get("lead_time")
    cast.duration_ms = None if seconds is None else round(1000 * seconds)
    cast.created = annotation.get("created_at")
