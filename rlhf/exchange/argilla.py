"""Records of Argilla 2 (`dataset.records.to_json`, `rg.Record.from_dict`).

{"id", "fields": {"prompt": messages, "answer_a", "answer_b"}, "metadata", "suggestions",
"responses": {question: [{"value", "user_id"}]}, "vectors"}. Questions: preference (label: a, b,
tie, both_bad, skip), strength (rating, 1 to 3), tags (labels), reason and corrected (text: why, and
a better answer), marks_a and marks_b (spans: good, bad). Argilla keeps no names, times, sides,
criteria of each answer, remarks on spans or several models' votes: these are in the metadata under
`rlhf`, as JSON.
"""

import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.data.records import digest
from rlhf.data.spans import LABELS, Span
from rlhf.data.votes import CHOICES
from rlhf.errors import UserError
from rlhf.exchange.fields import (
    SHOWN,
    checked_at,
    choice_of,
    read_fields,
    shown_of,
    tags_of,
    take_shown,
)
from rlhf.exchange.pairs import Answer, CastVote, JudgedPair, extras_of, with_extras

FIELDS = {"a": "answer_a", "b": "answer_b"}
CHOICE_TEXTS = {
    "a": "Answer A",
    "b": "Answer B",
    "tie": "Equally good",
    "both_bad": "Both bad",
    "skip": "Skip",
}
# fields of a vote, and the question of each
QUESTIONS = {
    "choice": "preference",
    "strength": "strength",
    "tags": "tags",
    "reason": "reason",
    "corrected": "corrected",
}


def to_record(pair: JudgedPair, users: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a pair; users: {name here: user_id there}, made up where missing."""
    given = []
    for vote in pair.votes:
        answered = {question: getattr(vote, name) for name, question in QUESTIONS.items()}
        for side in FIELDS:
            answered[f"marks_{side}"] = [mark(one) for one in vote.spans if one["answer"] == side]
        given.append((vote, answered))
    answers = {"answer_a": pair.a, "answer_b": pair.b}
    identity = [pair.prompt, pair.a.text, pair.b.text, pair.expected]
    return record_of(pair, extras_of(pair), answers, given, identity, users)


def record_of(
    judged: Any,
    extras: dict[str, Any],
    answers: Mapping[str, Answer],
    given: Iterable[tuple[Any, dict[str, Any]]],
    identity: list[Any],
    users: Mapping[str, str],
) -> dict[str, Any]:
    """Return the record of a pair or ranking.

    extras: what Argilla has no place for, to which more is added. answers: by their fields. given: each
    vote or order, with its answers to the questions. identity: what the id is made of, beside what
    is shown of the prompt and the models.
    """
    # a chat field keeps role and content alone
    shown_prompt = chat(judged.prompt)
    if shown_prompt != judged.prompt:
        extras["messages"] = judged.prompt
    # people answer questions; what models say stands beside them as a suggestion
    responses: dict[str, list[dict[str, Any]]] = {}
    suggestions: dict[str, dict[str, Any]] = {}
    extras["users"] = {}
    for cast, answered in given:
        user = users.get(cast.annotator) or str(uuid.uuid5(uuid.NAMESPACE_URL, cast.annotator))
        if cast.kind == "person":
            extras["users"][user] = cast.annotator
        for question, value in answered.items():
            # a question that was not answered
            if value in (None, []):
                continue
            if cast.kind == "person":
                responses.setdefault(question, []).append({"value": value, "user_id": user})
            else:
                # Argilla shows one suggestion a question
                suggestion = {"value": value, "score": None, "agent": cast.annotator}
                suggestions.setdefault(question, suggestion)

    fields: dict[str, Any] = {"prompt": shown_prompt}
    shown = shown_of(judged)
    for name, answer in answers.items():
        fields[name] = answer.text
        if answer.model is not None:
            shown[name.replace("answer", "model")] = answer.model
    return {
        # the same gets the same id, so that a second upload replaces it
        "id": digest(json.dumps([*identity, shown])),
        "fields": fields,
        "metadata": shown | {"rlhf": json.dumps(extras, ensure_ascii=False, sort_keys=True)},
        "suggestions": suggestions,
        "responses": responses,
        "vectors": {},
    }


def settings(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return the settings of a dataset for these records (`rg.Settings.from_json`)."""
    choices = options(CHOICE_TEXTS)
    kind = {"type": "label_selection", "options": choices, "visible_options": len(choices)}
    strengths = {"type": "rating", "options": [{"value": value} for value in (1, 2, 3)]}
    questions = [
        question("preference", "Which answer is better?", kind, required=True),
        question("strength", "How much better? 1 slightly, 2 clearly, 3 by far", strengths),
        question("corrected", "A better answer", {"type": "text", "use_markdown": True}),
        *common_questions(tags_of(pairs)),
        *mark_questions(FIELDS.values()),
    ]
    fields = [field("prompt", "Conversation", "chat")]
    for side, name in FIELDS.items():
        fields.append(field(name, CHOICE_TEXTS[side], "text"))
    return dataset(fields, questions, (*SHOWN, "model_a", "model_b"))


def common_questions(tags: Sequence[str]) -> list[dict[str, Any]]:
    """Return the questions of pairs and rankings alike: why?"""
    questions = [question("reason", "Why?", {"type": "text", "use_markdown": False})]
    if tags:
        # a choice of one label is refused
        labels = [*tags, "other"] if len(tags) == 1 else tags
        offered = options(dict(zip(labels, labels, strict=True)))
        kind = {"type": "multi_label_selection", "options": offered, "options_order": "natural"}
        kind["visible_options"] = len(offered)
        questions.append(question("tags", "What decided it?", kind))
    return questions


def mark_questions(fields: Iterable[str]) -> list[dict[str, Any]]:
    """Return a question for passages of each field with an answer: marks_a for answer_a."""
    labels = options(dict(zip(LABELS, LABELS, strict=True)))
    questions = []
    for name in fields:
        kind = {"type": "span", "field": name, "options": labels, "allow_overlapping": True}
        end = name.removeprefix("answer_")
        questions.append(question(f"marks_{end}", f"Passages of answer {end.upper()}", kind))
    return questions


def options(texts: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what a question offers; texts: of each value."""
    return [{"value": value, "text": text} for value, text in texts.items()]


def dataset(
    fields: list[dict[str, Any]], questions: list[dict[str, Any]], metadata: Iterable[str]
) -> dict[str, Any]:
    """Return the settings of a dataset; metadata: names of terms."""
    terms = []
    for name in metadata:
        term = {"name": name, "title": name, "settings": {"type": "terms"}}
        terms.append(term | {"visible_for_annotators": False})
    return {
        "guidelines": None,
        "fields": fields,
        "questions": questions,
        "metadata": terms,
        "vectors": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }


def question(
    name: str, title: str, kind: dict[str, Any], *, required: bool = False
) -> dict[str, Any]:
    return {"name": name, "title": title, "required": required, "settings": kind}


def field(name: str, title: str, kind: str) -> dict[str, Any]:
    # offsets of marks are places in a text as it is, not as Markdown shows it
    settings = {"type": kind, "use_markdown": kind == "chat"}
    return {"name": name, "title": title, "required": True, "settings": settings}


def from_record(
    row: Mapping[str, Any],
    place: str,
    names: Mapping[str, str],
    answers: tuple[str, ...] | None = None,
) -> list[JudgedPair]:
    """Return the pair of a record; also of a dataset that was set up in Argilla.

    names: {user_id there: name here}; other ids become names. answers: names of the fields with the
    answers; of more than two, every two become a pair, with what rankings say of them. Raises
    UserError, with the place.
    """
    every_two = [None] if answers is None else itertools.combinations(answers, 2)
    return [_pair(row, place, names, two) for two in every_two]


def _pair(
    row: Mapping[str, Any],
    place: str,
    names: Mapping[str, str],
    answers: tuple[str, str] | None,
) -> JudgedPair:
    if not isinstance(row.get("fields"), dict):
        raise UserError(f"{place}: is no record of Argilla, which has fields and responses")
    fields, metadata = row["fields"], dict(row.get("metadata") or {})
    prompt, _, sides = read_fields(fields, place, answers)
    # what Argilla cannot hold came along as JSON
    extras = extras_in(metadata, place)
    prompt = whole_prompt(prompt, extras)
    a, b = (Answer(fields[name]) for name in sides)
    names = extras.get("users", {}) | dict(names)
    votes = []
    for user, answered in by_user(row.get("responses") or {}).items():
        given = {}
        for question, value in answered.items():
            # the name of a third answer says nothing about these two
            if value in sides or not _is_field(value, fields):
                given[question] = value
        vote = _vote(given, names.get(user, user), "person", sides, place)
        if vote is not None:
            vote.spans = marks_in(given, {"a": a.text, "b": b.text}, place)
            votes.append(vote)
    pair = JudgedPair(prompt, a, b, votes)
    if extras:
        pair = with_extras(pair, extras, tuple(QUESTIONS))
        # models' votes went as suggestions, of which Argilla keeps one a question
        for cast in extras.get("votes", ()):
            if cast["kind"] != "person":
                pair.votes.append(CastVote(**cast))
        return pair
    take_shown(pair, metadata)
    a.model, b.model = metadata.pop("model_a", None), metadata.pop("model_b", None)
    pair.metadata = metadata
    for agent, given in by_agent(row.get("suggestions") or {}).items():
        vote = _vote(given, agent, "model", sides, place)
        if vote is not None:
            pair.votes.append(vote)
    return pair


def _is_field(value: Any, fields: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and value in fields


def extras_in(metadata: dict[str, Any], place: str) -> dict[str, Any]:
    text = metadata.pop("rlhf", None)
    if text is None:
        return {}
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise UserError(f"{place}: metadata 'rlhf' is not the JSON that was exported") from None


def whole_prompt(prompt: list[dict[str, Any]], extras: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages as they were exported, with what a chat field has no place for."""
    full = extras.get("messages")
    return full if full is not None and chat(full) == prompt else prompt


def by_user(responses: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {user: {question: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for question, given in responses.items():
        for response in given:
            found.setdefault(str(response["user_id"]), {})[question] = response["value"]
    return found


def by_agent(suggestions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {model: {question: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for question, suggestion in suggestions.items():
        agent = suggestion.get("agent") or "suggestions"
        found.setdefault(agent, {})[question] = suggestion["value"]
    return found


def _vote(
    given: Mapping[str, Any], annotator: str, kind: Any, sides: tuple[str, str], place: str
) -> CastVote | None:
    """Return one annotator's answers to the questions as a vote; None where none is a choice."""
    # a dataset that was set up there may ask for the choice under any name
    choice = None
    for question, value in given.items():
        is_choice = question not in ("reason", "tags", "strength", "corrected")
        if choice is not None or not is_choice or question.startswith("marks_"):
            continue
        choice = _ranked(value, sides) if isinstance(value, list) else choice_of(value, sides)
        if choice is None and question == "preference":
            raise UserError(
                f"{place}: 'preference' is {value!r}, expected one of {', '.join(CHOICES)} or the name of a field"
            )
    if choice is None:
        return None
    strength = given.get("strength")
    return CastVote(
        annotator,
        choice,
        kind=kind,
        strength=strength if strength in (1, 2, 3) else None,
        reason=given.get("reason"),
        tags=list(given.get("tags") or []),
        corrected=given.get("corrected"),
    )


def _ranked(value: list[Any], sides: tuple[str, str]) -> str | None:
    """Return the choice of a ranking of both answers; one that leaves one of them out says nothing."""
    ranks: dict[str, int] = {}
    for name, rank in ranks_in(value):
        side = choice_of(name, sides)
        if side in ("a", "b"):
            ranks[side] = rank
    if len(ranks) != 2:
        return None
    if ranks["a"] == ranks["b"]:
        return "tie"
    return "a" if ranks["a"] < ranks["b"] else "b"


def ranks_in(value: list[Any]) -> list[tuple[Any, int]]:
    """Return (name, rank) of each item of a ranking: names, the best first, or {value, rank}."""
    found = []
    for place, item in enumerate(value):
        name, rank = item, place
        if isinstance(item, dict):
            name, rank = item.get("value"), item.get("rank", place)
        found.append((name, rank))
    return found


def mark(span: Span) -> dict[str, Any]:
    """Return a marked passage as Argilla keeps it."""
    return {name: span[name] for name in ("start", "end", "label")}


def marks_in(given: Mapping[str, Any], texts: Mapping[Any, str], place: str) -> list[Span]:
    """Return the spans of questions marks_a, marks_b, or marks_1, marks_2, ... texts: of each answer,
    by a and b, or by its number from 0. Raises UserError, with the place.
    """
    spans = []
    for answer in texts:
        name = answer + 1 if isinstance(answer, int) else answer
        for found in given.get(f"marks_{name}") or ():
            if found.get("label") in LABELS:
                spans.append(mark(found) | {"answer": answer})
    return checked_at(spans, texts, place)


def chat(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]
