"""Tasks of Label Studio (its JSON export and import), compared with its Pairwise tag.

{"data": {"prompt": messages, "answer1", "answer2", ...}, "annotations": [{"completed_by",
"lead_time" (s), "was_cancelled", "created_at", "result": [{"from_name", "to_name", "type",
"value"}]}], "predictions": [{"model_version", "result"}]}. A skip is `was_cancelled`; tie and both
bad are choices beside the Pairwise tag, strength a rating of 1 to 3. Label Studio shows answer1
left to everybody: sides drawn here, and all that is known of the prompt, are in `data.rlhf`.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from rlhf.data.records import digest
from rlhf.errors import UserError
from rlhf.exchange.pairs import (
    CHANGEABLE,
    Answer,
    CastVote,
    JudgedPair,
    choice_of,
    extras_of,
    read_fields,
    with_extras,
)

SELECTED = {"a": "left", "b": "right"}
# data of a task that is shown beside the answers, and not part of the prompt's metadata
SHOWN = ("group", "split", "voice")


def to_tasks(pairs: Sequence[JudgedPair], users: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one task for each pair; users: {name here: e-mail address there}, the name if missing."""
    return [_task(pair, users) for pair in pairs]


def _task(pair: JudgedPair, users: Mapping[str, str]) -> dict[str, Any]:
    extras = extras_of(pair)
    extras["users"] = {}
    annotations, predictions = [], []
    for vote in pair.votes:
        result = _result(vote)
        if vote.kind != "person":
            predictions.append({"model_version": vote.annotator, "result": result})
            continue
        # people go by their address there, and come back under their name
        user = users.get(vote.annotator, vote.annotator)
        extras["users"][user] = vote.annotator
        annotation = {
            "completed_by": {"email": user, "first_name": vote.annotator},
            "result": result,
            "was_cancelled": vote.choice == "skip",
            "ground_truth": False,
        }
        # Label Studio counts seconds
        if vote.duration_ms is not None:
            annotation["lead_time"] = vote.duration_ms / 1000
        if vote.created:
            annotation["created_at"] = vote.created
        annotations.append(annotation)
    data = {"prompt": pair.prompt, "answer1": pair.a.text, "answer2": pair.b.text}
    shown = {name: getattr(pair, name) for name in SHOWN}
    shown |= {"model1": pair.a.model, "model2": pair.b.model}
    data |= {name: value for name, value in shown.items() if value is not None}
    return {
        "data": data | {"rlhf": extras},
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
    result = []
    for name, to_name, kind, value in found:
        id = digest(f"{vote.annotator} {name} {value}")[:10]
        result.append(
            {"id": id, "from_name": name, "to_name": to_name, "type": kind, "value": value}
        )
    return result


def labelling(pairs: Sequence[JudgedPair]) -> str:
    """Return the labelling configuration (XML) of a project for these tasks."""
    tags = dict.fromkeys(tag for pair in pairs for vote in pair.votes for tag in vote.tags)
    lines = [
        "<View>",
        '  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>',
        '  <Header value="Which answer is better?"/>',
        '  <Pairwise name="comparison" toName="answer1,answer2"/>',
        '  <View style="display: flex; gap: 1em">',
        '    <View style="flex: 1"><Text name="answer1" value="$answer1"/></View>',
        '    <View style="flex: 1"><Text name="answer2" value="$answer2"/></View>',
        "  </View>",
        '  <Choices name="equal" toName="answer1" choice="single">',
        '    <Choice value="tie" alias="tie"/>',
        '    <Choice value="both_bad" alias="both_bad"/>',
        "  </Choices>",
        '  <Header value="How much better? 1 slightly, 2 clearly, 3 by far"/>',
        '  <Rating name="strength" toName="answer1" maxRating="3"/>',
    ]
    if tags:
        lines.append('  <Choices name="tags" toName="answer1" choice="multiple">')
        lines += [f"    <Choice value={quoteattr(tag)}/>" for tag in tags]
        lines.append("  </Choices>")
    for name, asked in (("reason", "Why?"), ("corrected", "A better answer")):
        lines.append(
            f'  <TextArea name="{name}" toName="answer1" placeholder="{asked}" maxSubmissions="1"/>'
        )
    return "\n".join([*lines, "</View>", ""])


def from_tasks(
    rows: Sequence[Any],
    source: str,
    users: Mapping[str, str],
    answers: tuple[str, str] | None = None,
) -> list[JudgedPair]:
    """Return the pairs of tasks; also of projects that were set up in Label Studio.

    users: {name here: e-mail address or id there}. Drafts are not read. Raises UserError, with the
    place.
    """
    if answers is not None and len(answers) != 2:
        raise UserError(
            f"{source}: a task of Label Studio has two answers, {len(answers)} are named"
        )
    names = {id: name for name, id in users.items()}
    return [
        _pair(row, f"{source} row {number}", names, answers) for number, row in enumerate(rows, 1)
    ]


def _pair(
    row: Any, place: str, names: Mapping[str, str], answers: tuple[str, str] | None
) -> JudgedPair:
    if not isinstance(row, dict) or not isinstance(row.get("data"), dict):
        raise UserError(f"{place}: is no task of Label Studio, which has data and annotations")
    data = dict(row["data"])
    extras = data.pop("rlhf", None) or {}
    prompt, prompt_name, sides = read_fields(data, place, answers)
    names = extras.get("users", {}) | dict(names)
    votes = []
    for annotation in row.get("annotations") or ():
        votes.append(_vote(annotation, _who(annotation.get("completed_by"), names), sides, place))
    for prediction in row.get("predictions") or ():
        name = prediction.get("model_version") or "predictions"
        vote = _vote(prediction, name, sides, place)
        vote.kind = "model"
        votes.append(vote)
    a, b = (Answer(data[name]) for name in sides)
    if extras:
        # times it measures itself; sides it knows nothing of
        kept = (*CHANGEABLE, "duration_ms", "created")
        return with_extras(JudgedPair(prompt, a, b, votes), extras, kept)
    # it shows answer1 on the left to everybody
    for vote in votes:
        if vote.kind == "person" and vote.choice != "skip":
            vote.left = "a"
    about = {name: data.pop(name, None) for name in SHOWN}
    read = (prompt_name, *sides)
    rest = {name: value for name, value in data.items() if name not in read}
    a.model, b.model = rest.pop("model1", None), rest.pop("model2", None)
    return JudgedPair(prompt, a, b, votes, metadata=rest, **about)


def _who(user: Any, names: Mapping[str, str]) -> str:
    """Return the name of who completed an annotation: a number, or {id, email, first_name, ...}."""
    ids = [str(user)]
    if isinstance(user, dict):
        full = " ".join(filter(None, (user.get("first_name"), user.get("last_name"))))
        ids = [str(user[key]) for key in ("email", "id", "username") if user.get(key)]
        ids = [*ids, full] if full else ids
    # a given name comes first, whichever of the ids it was given for
    known = next((names[id] for id in ids if id in names), None)
    if known is not None:
        return known
    return ids[0] if isinstance(user, dict) and ids else f"user {user}"


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
        elif kind == "textarea":
            name = "corrected" if region.get("from_name") == "corrected" else "reason"
            setattr(vote, name, "\n".join(value.get("text", ())) or None)
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
    seconds = annotation.get("lead_time")
    vote.duration_ms = None if seconds is None else round(1000 * seconds)
    vote.created = annotation.get("created_at")
    return vote
