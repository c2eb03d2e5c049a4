"""Row schemas: how a row of columns becomes a record.

A row is a dict of columns as JSON gives them; a column that is absent or None is not there.
`load.py` adds the place to the errors raised here. docs/data.md shows all schemas with examples.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from rlhf.data.columns import (
    FIELDS,
    OPENAI_SIDES,
    TRUTH,
    boolean,
    lowered,
    other_fields,
    with_usual_names,
)
from rlhf.data.conversation import (
    PASSED,
    THOUGHTS,
    as_list,
    conversation,
    messages,
    notes,
    parse_turns,
)
from rlhf.data.records import (
    Instruction,
    Labelled,
    Message,
    Preference,
    Prompt,
    Record,
    RecordError,
    check_text,
)
from rlhf.data.split import answer_pair

SCHEMAS = {
    Prompt: "{prompt}, {messages}, {instruction}, or any schema below (its prompt is taken)",
    Instruction: "{prompt, response or completion}, {messages}, {instruction, input, output}, or pairs (for chosen)",
    Preference: "{prompt, chosen, rejected}, {chosen, rejected} as conversations that differ in the last answer, or "
    "{input, preferred_output, non_preferred_output}",
    Labelled: "{prompt, response or completion, label}",
}
SIDES = ("chosen", "rejected")
# Columns with one answer, in the order in which they are looked for
RESPONSES = ("response", "completion", "output")
# Columns that hold answers: never part of the metadata, since scorers see it
ANSWERS = ("messages", *SIDES, *RESPONSES)
# Fields of messages that are read, or say something that needs no reading
READ_FIELDS = {"role", "content", "from", "value", "weight", *PASSED}


class UnknownSchema(RecordError):
    """The row's columns are not a schema of the kind asked for."""

    def __init__(self, row: dict[str, Any]):
        super().__init__("columns", f"found {', '.join(row) or 'no columns'}, expected others")


@dataclass
class Row:
    """A record with what grouping needs: whether the data named its group, and its answer pair if
    it has one.
    """

    record: Record
    own_group: bool
    pair: str | None
    schema: str
    # what may be meant otherwise than it was read
    notes: list[str]


@dataclass
class Content:
    """The prompt of a row, its answers as fields of the record, and the columns they stood in,
    joined by "+".
    """

    prompt: list[Message]
    fields: dict[str, Any]
    schema: str


def read_row(row: dict[str, Any], kind: type[Record], source: str | None = None) -> Row:
    """Return one row as a record of `kind` (Prompt, Instruction, Preference or Labelled). Raises
    RecordError.
    """
    row = with_usual_names(row)
    content = _READERS[kind](row)
    prompt = _with_system(row, content.prompt)
    fields = content.fields | other_fields(row, source, kind)

    # what was read is no metadata: a scorer that sees the answer would score by it
    used = {"system", *ANSWERS, *FIELDS, *content.schema.split("+")}
    if "instruction" in used:
        used.add("history")
    metadata = {name: value for name, value in row.items() if name not in used}
    if isinstance(metadata.get("metadata"), dict):
        metadata |= metadata.pop("metadata")

    record = kind(prompt=prompt, metadata=metadata, **fields)
    remarks = [*_unread_columns(metadata), *_unread_fields(row), *notes(prompt)]
    return Row(
        record, row.get("group", "") != "", _answer_pair(row, record), content.schema, remarks
    )


def guess_kind(row: dict[str, Any]) -> type[Record]:
    """Return the kind that a row's columns suggest, the most telling first."""
    with contextlib.suppress(RecordError):
        row = with_usual_names(row)
    has = {name for name, value in row.items() if value is not None}
    if has.issuperset(SIDES) or has.issuperset(OPENAI_SIDES):
        return Preference
    if "label" in has and has & {"response", "completion"}:
        return Labelled
    if has.intersection(RESPONSES):
        return Instruction
    try:
        turns = conversation("messages", row.get("messages"))
    except RecordError:
        turns = None
    return Instruction if turns and turns[-1]["role"] == "assistant" else Prompt


def _read_prompt(row: dict[str, Any]) -> Content:
    if "prompt" in row or "instruction" in row:
        prompt, schema = _explicit_prompt(row)
        return Content(prompt, {}, schema)
    if "messages" in row:
        turns = messages("messages", row["messages"])
        return Content(turns[:-1] if turns[-1]["role"] == "assistant" else turns, {}, "messages")
    for name in (*SIDES, "response", "completion"):
        whole = conversation(name, row[name]) if name in row else None
        if whole is not None:
            return Content(_split_last(name, whole)[0], {}, name)
    raise UnknownSchema(row)


def _read_preference(row: dict[str, Any]) -> Content:
    """Read a pair whose prompt is explicit or common to both conversations."""
    if "chosen" not in row and "rejected" not in row:
        raise UnknownSchema(row)
    for name in SIDES:
        if name not in row:
            raise RecordError(name, "is missing")
    if "prompt" in row or "instruction" in row:
        prompt, schema = _explicit_prompt(row)
        answers = {name: _answer(name, row, prompt) for name in SIDES}
        return Content(prompt, answers, f"{schema}+chosen+rejected")

    prompts, answers = [], {}
    for name in SIDES:
        whole = conversation(name, row[name])
        if whole is None:
            raise RecordError(
                "prompt",
                f"is missing, and '{name}' is not a whole conversation that would contain it",
            )
        before, answers[name] = _split_last(name, whole)
        prompts.append(before)
    # two answers to different questions are no comparison
    if prompts[0] != prompts[1]:
        raise RecordError(
            "rejected", "its conversation differs from that of 'chosen' before the last answer"
        )
    return Content(prompts[0], answers, "chosen+rejected")


def _read_instruction(row: dict[str, Any]) -> Content:
    response = next((name for name in RESPONSES if name in row), None)
    if "chosen" in row and response is None and "messages" not in row:
        _refuse_unweighted("chosen", row["chosen"])
        pair = _read_preference(row)
        return Content(pair.prompt, {"response": pair.fields["chosen"]}, pair.schema)
    answered = response or "messages"
    if answered in row:
        _refuse_unweighted(answered, row[answered])
    # rows of unpaired feedback may be given to SFT by mistake
    if TRUTH.get(lowered(row.get("label"))) is False:
        raise RecordError("label", "is false, and an answer marked as bad is not one to imitate")

    if "messages" in row and response is None:
        prompt, answer = _split_last("messages", messages("messages", row["messages"]))
        return Content(prompt, {"response": answer}, "messages")
    if response is None:
        raise UnknownSchema(row)
    return _one_answer(row, response)


def _refuse_unweighted(name: str, given: Any) -> None:
    """Raise RecordError if a conversation ends with an answer that is not to be imitated."""
    last = given[-1] if isinstance(given, list) and given else None
    if isinstance(last, dict) and last.get("weight") == 0:
        raise RecordError(name, "ends with an answer of weight 0, which is not to be imitated")


def _read_labelled(row: dict[str, Any]) -> Content:
    response = next((name for name in RESPONSES if name in row), None)
    if "label" not in row or response is None:
        raise UnknownSchema(row)
    content = _one_answer(row, response)
    label = boolean("label", row["label"])
    return Content(content.prompt, content.fields | {"label": label}, f"{content.schema}+label")


_READERS = {
    Prompt: _read_prompt,
    Instruction: _read_instruction,
    Preference: _read_preference,
    Labelled: _read_labelled,
}


def _one_answer(row: dict[str, Any], name: str) -> Content:
    """Read a row whose column `name` holds the answer, or the whole conversation."""
    if "prompt" in row or "instruction" in row:
        prompt, schema = _explicit_prompt(row)
        return Content(prompt, {"response": _answer(name, row, prompt)}, f"{schema}+{name}")
    whole = conversation(name, row[name])
    if whole is None:
        raise UnknownSchema(row)
    prompt, answer = _split_last(name, whole)
    return Content(prompt, {"response": answer}, name)


def _explicit_prompt(row: dict[str, Any]) -> tuple[list[Message], str]:
    """Return the messages of the columns prompt, or instruction with input and history, and the
    columns' names.
    """
    if "prompt" in row:
        whole = conversation("prompt", row["prompt"])
        if whole is None:
            check_text("prompt", row["prompt"])
            whole = [{"role": "user", "content": row["prompt"]}]
        elif isinstance(row["prompt"], str) and whole[-1] == {"role": "assistant", "content": ""}:
            # "... \n\nAssistant:" asks for the answer
            whole = whole[:-1]
        return whole, "prompt"

    check_text("instruction", row["instruction"])
    # earlier turns come first, as they were said
    before = _history(row.get("history"))
    question, schema = row["instruction"], "instruction"
    if "input" in row:
        schema = "instruction+input"
        if row["input"] != "":
            check_text("input", row["input"])
            question = f"{question}\n\n{row['input']}"
    return [*before, {"role": "user", "content": question}], schema


def _history(given: Any) -> list[Message]:
    """Return earlier turns as Alpaca's `history` has them: [[question, answer], ...]."""
    if not given:
        return []
    if not isinstance(given, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in given
    ):
        raise RecordError("history", "expected a list of [question, answer]")
    turns = []
    for question, answer in given:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages("history", turns)


def _answer(name: str, row: dict[str, Any], prompt: list[Message]) -> str:
    """Return the answer's text, given alone or at the end of a conversation that repeats the
    prompt.
    """
    value, asked = row[name], row.get("prompt")
    whole = conversation(name, value)
    in_transcript = isinstance(asked, str) and parse_turns(asked) is not None
    repeats_prompt = False
    if whole is not None:
        without_system = [message for message in prompt if message["role"] != "system"]
        repeats_prompt = whole[:-1] in (prompt, without_system, _with_system(row, prompt))
        # an answer that is itself a dialogue
        is_text = isinstance(value, str) and parse_turns(value) == whole
        if is_text and not in_transcript and not repeats_prompt:
            whole = None

    if whole is None:
        check_text(name, value)
        return value.strip() if in_transcript else value
    before, answer = _split_last(name, whole)
    if before and not repeats_prompt:
        raise RecordError(
            name, "its conversation before the last answer is not the one in 'prompt'"
        )
    return answer


def _unread_columns(metadata: dict[str, Any]) -> list[str]:
    """Return notes on columns that went into the metadata and look like conversations."""
    found = []
    for name, value in metadata.items():
        try:
            is_conversation = as_list(name, value) is not None
        except RecordError:
            is_conversation = True
        if (
            isinstance(value, list)
            and value
            and all(isinstance(turn, list) and len(turn) == 2 for turn in value)
        ):
            is_conversation = True
        if is_conversation:
            found.append(
                f"column '{name}' looks like a conversation and is not read; it stays in the metadata"
            )
    return found


def _unread_fields(row: dict[str, Any]) -> list[str]:
    """Return notes on fields of messages that nothing reads."""
    unread: dict[str, None] = {}
    for name in ("prompt", *ANSWERS):
        given = row.get(name)
        for message in given if isinstance(given, list) else ():
            if not isinstance(message, dict):
                continue
            for key, value in message.items():
                is_tool_name = key == "name" and message.get("role") == "tool"
                if key not in READ_FIELDS and not is_tool_name and value not in (None, "", []):
                    unread[f"'{key}' of messages is not read"] = None
    return list(unread)


def _split_last(name: str, turns: list[Message]) -> tuple[list[Message], str]:
    """Return the messages before the last, and the text of the last, which must be an answer in
    plain text.
    """
    last = turns[-1]
    if last["role"] != "assistant":
        raise RecordError(
            name, f"ends with a {last['role']} message, expected the assistant's answer last"
        )
    if "tool_calls" in last:
        raise RecordError(name, "ends with an answer that calls a tool, and an answer is text here")
    for key in THOUGHTS:
        if key in last:
            remedy = "write it into the content, as the model does, or drop it"
            raise RecordError(name, f"ends with an answer that has '{key}'; {remedy}")
    check_text(name, last["content"])
    return turns[:-1], last["content"]


def _with_system(row: dict[str, Any], prompt: list[Message]) -> list[Message]:
    """Return the prompt with the row's system column as first message."""
    system = row.get("system")
    if system is None or system == "":
        return prompt
    check_text("system", system)
    # given twice, it has to be the same
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise RecordError(
                "system", "differs from the system message that the conversation begins with"
            )
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _answer_pair(row: dict[str, Any], record: Record) -> str | None:
    """Return the answer pair of a row, whatever it is read as: the same rows must share groups in
    every kind.
    """
    if isinstance(record, Preference):
        return answer_pair(record.chosen, record.rejected)
    if not row.keys() >= set(SIDES):
        return None
    try:
        answers = _read_preference(row).fields
    except RecordError:
        return None
    chosen, rejected = answers["chosen"], answers["rejected"]
    if not chosen.strip() or not rejected.strip() or chosen == rejected:
        return None
    return answer_pair(chosen, rejected)
