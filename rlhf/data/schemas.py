"""Row forms: how a row of columns becomes a record.

A row is a dict of columns as JSON gives them; a column that is absent or None is not there. `load.py` adds the place
to the errors raised here. All forms, with examples, stand in docs/data.md.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from rlhf.data.conversation import PASSED, THOUGHTS, as_list, conversation, messages, notes, parse_turns
from rlhf.data.records import (
    Instruction,
    Labelled,
    Message,
    Preference,
    Prompt,
    Record,
    RecordError,
    check_text,
    is_number,
    one_name,
)
from rlhf.data.split import answer_pair

FORMS = {
    Prompt: "{prompt}, {messages}, {instruction}, or any form below (its prompt is taken)",
    Instruction: "{prompt, response or completion}, {messages}, {instruction, input, output}, or pairs (for chosen)",
    Preference: "{prompt, chosen, rejected}, {chosen, rejected} as conversations that differ in the last answer, or "
    "{input, preferred_output, non_preferred_output}",
    Labelled: "{prompt, response or completion, label}",
}
# Columns that hold answers: never part of the metadata, since scorers see it
ANSWERS = ("messages", "chosen", "rejected", "response", "completion", "output")
ABOUT = ("group", "default_group", "split", "margin", "label_prob", "weight", "source", "annotator", "voice")
ABOUT += ("chosen_ended", "rejected_ended")
PAIR = ("user", "assistant")
MEDIA = ("image", "audio", "video")
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


class NotThisForm(RecordError):
    """The row's columns are not a form of the kind asked for."""


@dataclass
class Row:
    """A record with what the grouping needs: whether the data named its group, and its answer pair if it has one."""

    record: Record
    own_group: bool
    pair: str | None
    form: str
    notes: list[str]  # what may be meant otherwise than it was read


def read(row: dict[str, Any], kind: type[Record], source: str | None = None) -> Row:
    """One row as a record of `kind` (Prompt, Instruction, Preference or Labelled). Raises RecordError."""
    row = _usual({name: value for name, value in row.items() if value is not None})
    prompt, fields, form = _FIELDS[kind](row)
    prompt = _with_system(row, prompt)
    fields |= _about(row, source, kind)
    used = {"system"} | {name for name in ("prompt", "instruction", "input") if name in form.split("+")}
    if "instruction" in used:
        used.add("history")
    if kind is Labelled:
        used.add("label")
    metadata = {k: v for k, v in row.items() if k not in used and k not in ANSWERS and k not in ABOUT}
    if isinstance(metadata.get("metadata"), dict):
        metadata |= metadata.pop("metadata")
    record = kind(prompt=prompt, metadata=metadata, **fields)
    said = [*_unread_columns(metadata), *_unread_fields(row), *notes(prompt)]
    return Row(record, own_group=row.get("group", "") != "", pair=_pair(row, record), form=form, notes=said)


def guess_kind(row: dict[str, Any]) -> type[Record]:
    """The kind that a row's columns suggest, the most telling first."""
    with contextlib.suppress(RecordError):
        row = _usual({name: value for name, value in row.items() if value is not None})
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has or {"preferred_output", "non_preferred_output"} <= has:
        return Preference
    if "label" in has and has & {"response", "completion"}:
        return Labelled
    if has & {"response", "completion", "output"}:
        return Instruction
    try:
        turns = conversation("messages", row.get("messages"))
    except RecordError:
        turns = None
    return Instruction if turns and turns[-1]["role"] == "assistant" else Prompt


def _preference(row: dict) -> tuple[list[Message], dict, str]:
    prompt, chosen, rejected, form = _both_answers(row)
    return prompt, {"chosen": chosen, "rejected": rejected}, form


def _instruction(row: dict) -> tuple[list[Message], dict, str]:
    if "chosen" in row and not _has_response(row) and "messages" not in row:
        prompt, chosen, _, form = _both_answers(row)
        return prompt, {"response": chosen}, form
    if TRUTH.get(_lower(row.get("label"))) is False:
        raise RecordError("label", "is false, and an answer marked as bad is not one to imitate")
    prompt, response, form = _one_answer(row)
    return prompt, {"response": response}, form


def _labelled(row: dict) -> tuple[list[Message], dict, str]:
    if "label" not in row or not _has_response(row):
        raise NotThisForm("columns", _columns(row))
    prompt, response, form = _one_answer(row)
    label = TRUTH.get(_lower(row["label"]))
    if label is None:
        raise RecordError("label", f"found {row['label']!r}, expected true or false")
    return prompt, {"response": response, "label": label}, form + "+label"


def _prompt(row: dict) -> tuple[list[Message], dict, str]:
    if "prompt" in row or "instruction" in row:
        prompt, form = _explicit_prompt(row)
        return prompt, {}, form
    if "messages" in row:
        turns = messages("messages", row["messages"])
        return (turns[:-1] if turns[-1]["role"] == "assistant" else turns), {}, "messages"
    for name in ("chosen", "rejected", "response", "completion"):
        if name in row and (whole := conversation(name, row[name])) is not None:
            return _split_last(name, whole)[0], {}, name
    raise NotThisForm("columns", _columns(row))


_FIELDS = {Prompt: _prompt, Instruction: _instruction, Preference: _preference, Labelled: _labelled}


def _both_answers(row: dict) -> tuple[list[Message], str, str, str]:
    """(prompt, chosen, rejected, form) of a preference row, its prompt explicit or common to both conversations."""
    if "chosen" not in row and "rejected" not in row:
        raise NotThisForm("columns", _columns(row))
    for name in ("chosen", "rejected"):
        if name not in row:
            raise RecordError(name, "is missing")
    if "prompt" in row or "instruction" in row:
        prompt, form = _explicit_prompt(row)
        answers = [_answer(name, row[name], row, prompt) for name in ("chosen", "rejected")]
        return prompt, *answers, form + "+chosen+rejected"
    parts = []
    for name in ("chosen", "rejected"):
        whole = conversation(name, row[name])
        if whole is None:
            raise RecordError("prompt", f"is missing, and '{name}' is not a whole conversation that would contain it")
        parts.append(_split_last(name, whole))
    if parts[0][0] != parts[1][0]:
        raise RecordError("rejected", "its conversation differs from that of 'chosen' before the last answer")
    return parts[0][0], parts[0][1], parts[1][1], "chosen+rejected"


def _one_answer(row: dict) -> tuple[list[Message], str, str]:
    """(prompt, response, form) of a row with one answer."""
    if "messages" in row and not _has_response(row):
        prompt, response = _split_last("messages", messages("messages", row["messages"]))
        if row["messages"][-1].get("weight") == 0:
            raise RecordError("messages", "ends with an answer of weight 0, which is not to be imitated")
        return prompt, response, "messages"
    name = next((n for n in ("response", "completion", "output") if n in row), None)
    if name is None:
        raise NotThisForm("columns", _columns(row))
    if "prompt" in row or "instruction" in row:
        prompt, form = _explicit_prompt(row)
        return prompt, _answer(name, row[name], row, prompt), f"{form}+{name}"
    whole = conversation(name, row[name])
    if whole is None:
        raise NotThisForm("columns", _columns(row))
    return *_split_last(name, whole), name


def _explicit_prompt(row: dict) -> tuple[list[Message], str]:
    if "prompt" in row:
        whole = conversation("prompt", row["prompt"])
        if whole is None:
            check_text("prompt", row["prompt"])
            whole = [{"role": "user", "content": row["prompt"]}]
        elif isinstance(row["prompt"], str) and whole[-1] == {"role": "assistant", "content": ""}:
            whole = whole[:-1]  # "... \n\nAssistant:" asks for the answer
        return whole, "prompt"
    check_text("instruction", row["instruction"])
    asked, form, before = row["instruction"], "instruction", _history(row.get("history"))
    if "input" in row:
        form = "instruction+input"
        if row["input"] != "":
            check_text("input", row["input"])
            asked = f"{asked}\n\n{row['input']}"
    return [*before, {"role": "user", "content": asked}], form


def _history(given: Any) -> list[Message]:
    """Earlier turns as Alpaca's `history` has them: [[question, answer], ...]."""
    if not given:
        return []
    if not isinstance(given, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in given):
        raise RecordError("history", "expected a list of [question, answer]")
    return messages("history", [{"role": r, "content": t} for turn in given for r, t in zip(PAIR, turn, strict=True)])


def _answer(name: str, value: Any, row: dict, prompt: list[Message]) -> str:
    """The answer's text, given alone or at the end of a conversation that repeats the prompt."""
    whole = conversation(name, value)
    asked = row.get("prompt")
    transcript = isinstance(asked, str) and parse_turns(asked) is not None
    known = (prompt, [m for m in prompt if m["role"] != "system"], _with_system(row, prompt))
    if whole and not transcript and isinstance(value, str) and parse_turns(value) == whole and whole[:-1] not in known:
        whole = None  # an answer that is a dialogue
    if whole is None:
        check_text(name, value)
        return value.strip() if transcript else value
    before, answer = _split_last(name, whole)
    if before and before not in known:
        raise RecordError(name, "its conversation before the last answer is not the one in 'prompt'")
    return answer


def _usual(row: dict[str, Any]) -> dict[str, Any]:
    """The row with messages, tools and OpenAI's pairs under their usual names; what nothing here reads is refused."""
    row = _from_openai(row)
    named = [name for name in ("messages", "conversations", "conversation") if name in row]
    turns = as_list(named[0], row[named[0]]) if len(named) == 1 else None
    if turns is not None and (named == ["messages"] or not {"prompt", "instruction"} & row.keys()):
        del row[named[0]]
        is_prompt = named != ["messages"] and "chosen" in row
        row["prompt" if is_prompt else "messages"] = turns
    for kind in MEDIA:
        for name in (kind, f"{kind}s"):
            seen = isinstance(row.get(name), (list, dict, bytes)) and row[name]
            if seen or (row.get(name) and any(f"<{kind}>" in str(text) for text in row.values())):
                raise RecordError(name, "cannot be read here: prompts and answers are text")
    if isinstance(row.get("functions"), list) and row["functions"]:
        raise RecordError("functions", "is not read; give them as 'tools'")
    if "tools" in row:
        row["tools"] = _tools(row["tools"])
        if row["tools"] in ([], ""):
            del row["tools"]
    return row


def _tools(given: Any) -> Any:
    """Tools as OpenAI has them, also from JSON text; a column that only has the name stays as it is."""
    tools = given
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            tools = json.loads(given)
        except (ValueError, RecursionError):
            raise RecordError("tools", "is a list that is not whole JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return given
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(t["function"], dict) and isinstance(t["function"].get("name"), str) for t in tools):
        raise RecordError("tools", "has an entry without a function's name")
    return tools


def _unread_columns(metadata: dict[str, Any]) -> list[str]:
    """Notes on columns that went into the metadata and look like conversations."""
    found = []
    for name, value in metadata.items():
        pairs = isinstance(value, list) and value and all(isinstance(v, list) and len(v) == 2 for v in value)
        try:
            listed = as_list(name, value) is not None
        except RecordError:
            listed = True
        if listed or pairs:
            found.append(f"column '{name}' looks like a conversation and is not read; it stays in the metadata")
    return found


def _unread_fields(row: dict[str, Any]) -> list[str]:
    """Notes on fields of messages that nothing reads."""
    known = {"role", "content", "from", "value", "weight", *PASSED}
    unread: dict[str, None] = {}
    for name in ("prompt", *ANSWERS):
        given = row[name] if isinstance(row.get(name), list) else []
        for message in filter(lambda m: isinstance(m, dict), given):
            names = known | ({"name"} if message.get("role") == "tool" else set())
            unread |= {key: None for key, value in message.items() if key not in names and value not in (None, "", [])}
    return [f"'{key}' of messages is not read" for key in unread]


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference form as {prompt, chosen, rejected}; other rows as they are.

    {"input": {"messages", "tools", "parallel_tool_calls"}, "preferred_output", "non_preferred_output"}.
    """
    given = row.get("input")
    if not isinstance(given, dict) or "messages" not in given:
        return dict(row)
    named = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    rest = {named.get(name, name): value for name, value in row.items() if name != "input"}
    return {"prompt": given["messages"]} | ({"tools": given["tools"]} if given.get("tools") else {}) | rest


def _split_last(name: str, turns: list[Message]) -> tuple[list[Message], str]:
    last = turns[-1]
    if last["role"] != "assistant":
        raise RecordError(name, f"ends with a {last['role']} message, expected the assistant's answer last")
    if "tool_calls" in last:
        raise RecordError(name, "ends with an answer that calls a tool, and an answer is text here")
    thoughts = [key for key in THOUGHTS if key in last]
    if thoughts:
        raise RecordError(
            name,
            f"ends with an answer that has '{thoughts[0]}'; write it into the content, as the model does, or drop it",
        )
    check_text(name, last["content"])
    return turns[:-1], last["content"]


def _with_system(row: dict, prompt: list[Message]) -> list[Message]:
    system = row.get("system")
    if system is None or system == "":
        return prompt
    check_text("system", system)
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise RecordError("system", "differs from the system message that the conversation begins with")
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _about(row: dict, source: str | None, kind: type[Record]) -> dict[str, Any]:
    """The fields that say something about a row; empty text (as CSV has it) counts as not given."""
    given = {name: row[name] for name in ABOUT if row.get(name) not in (None, "")}
    fields: dict[str, Any] = {"source": source}
    for name in ("source", "annotator", "voice", "default_group", "group"):
        if name in given:
            fields[name.removeprefix("default_")] = one_name(str(given[name]))
    if "split" in given:
        name = str(given["split"]).lower()
        if name not in SPLIT_NAMES:
            raise RecordError("split", f"found {given['split']!r}, expected one of train, validation, test")
        fields["split"] = SPLIT_NAMES[name]
    for name in ("weight", "margin", "label_prob") if kind is Preference else ("weight",):
        if name in given:
            fields[name] = _number(name, given[name])
    for name in ("chosen_ended", "rejected_ended") if kind is Preference else ():
        if name in given:
            fields[name] = TRUTH.get(str(given[name]).lower(), given[name])
            if not isinstance(fields[name], bool):
                raise RecordError(name, f"found {given[name]!r}, expected true or false")
    return fields


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_number(number):
        raise RecordError(name, f"found {value!r}, expected a number")
    return number


def _pair(row: dict, record: Record) -> str | None:
    """The answer pair of a preference row, whatever kind it is read as: the same rows must share groups in all."""
    if isinstance(record, Preference):
        return answer_pair(record.chosen, record.rejected)
    if "chosen" not in row or "rejected" not in row:
        return None
    try:
        _, chosen, rejected, _ = _both_answers(row)
    except RecordError:
        return None
    both_said = chosen.strip() and rejected.strip() and chosen != rejected
    return answer_pair(chosen, rejected) if both_said else None


def _has_response(row: dict) -> bool:
    return any(name in row for name in ("response", "completion", "output"))


def _lower(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip().lower()
    return value if isinstance(value, (bool, int)) else None


def _columns(row: dict) -> str:
    return "found " + (", ".join(row) if row else "no columns") + ", expected others"
