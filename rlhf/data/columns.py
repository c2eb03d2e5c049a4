"""Columns under their usual names, and those that describe a row (group, split, weight, annotator,
...) as fields of a record.
"""

import json
from typing import Any

from rlhf.data.conversation import as_list
from rlhf.data.records import Preference, Record, RecordError, is_number, one_name

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
TRUTH = {"true": True, "1": True, "false": False, "0": False}
CONVERSATIONS = ("messages", "conversations", "conversation")
# Columns of other media, and the tag that marks one in a text
MEDIA = {
    "image": "<image>",
    "images": "<image>",
    "audio": "<audio>",
    "audios": "<audio>",
    "video": "<video>",
    "videos": "<video>",
}
OPENAI_SIDES = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


def other_fields(row: dict[str, Any], source: str | None, kind: type[Record]) -> dict[str, Any]:
    """Return the fields that describe a row; empty text (as CSV has it) counts as not given."""
    fields: dict[str, Any] = {"source": source}
    for name, read in FIELDS.items():
        value = row.get(name)
        # a pair that is read as prompts or instructions has no margin
        applies = kind is Preference or name not in PREFERENCE_FIELDS
        if applies and value is not None and value != "":
            fields[name.removeprefix("default_")] = read(name, value)
    if kind is Preference and "label_prob" not in fields and "tie_prob" not in fields:
        fields |= _vote_shares(row.get("votes"))
    return fields


def _vote_shares(votes: Any) -> dict[str, float]:
    """Return label_prob and tie_prob of a column {"chosen": 2, "rejected": 1, "tie": 0}; any other
    `votes` is no part of the record.
    """
    sides = ("chosen", "rejected", "tie")
    if not isinstance(votes, dict) or not votes or not votes.keys() <= set(sides):
        return {}
    counts = [votes.get(side) or 0 for side in sides]
    if not all(is_number(count) and count >= 0 for count in counts) or not sum(counts):
        raise RecordError(
            "votes", f"found {votes!r}, expected numbers of votes from 0 up, not all 0"
        )
    chosen, _, ties = counts
    return {"label_prob": (chosen + ties / 2) / sum(counts), "tie_prob": ties / sum(counts)}


def _name(name: str, value: Any) -> str:
    return one_name(str(value))


def _split(name: str, value: Any) -> str:
    split = SPLIT_NAMES.get(str(value).lower())
    if split is None:
        raise RecordError(name, f"found {value!r}, expected one of train, validation, test")
    return split


def _number(name: str, value: Any) -> float:
    try:
        # CSV has text alone
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_number(number):
        raise RecordError(name, f"found {value!r}, expected a number")
    return number


def boolean(name: str, value: Any) -> bool:
    truth = TRUTH.get(lowered(value))
    if truth is None:
        raise RecordError(name, f"found {value!r}, expected true or false")
    return truth


def lowered(value: Any) -> str:
    return str(value).strip().lower()


# How each column that describes a row becomes a field; a group that the data names wins over a
# default
FIELDS = {
    "source": _name,
    "annotator": _name,
    "voice": _name,
    "default_group": _name,
    "group": _name,
    "split": _split,
    "weight": _number,
    "margin": _number,
    "label_prob": _number,
    "tie_prob": _number,
    "chosen_ended": boolean,
    "rejected_ended": boolean,
}
PREFERENCE_FIELDS = {"margin", "label_prob", "tie_prob", "chosen_ended", "rejected_ended"}


def with_usual_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without empty columns, with messages, tools and OpenAI's pairs under their
    usual names.

    Raises RecordError for columns that nothing here can read.
    """
    row = _from_openai({name: value for name, value in row.items() if value is not None})
    present = [name for name in CONVERSATIONS if name in row]
    turns = as_list(present[0], row[present[0]]) if len(present) == 1 else None
    if turns is not None and (
        present == ["messages"] or not {"prompt", "instruction"} & row.keys()
    ):
        del row[present[0]]
        is_prompt = present != ["messages"] and "chosen" in row
        row["prompt" if is_prompt else "messages"] = turns

    for name, tag in MEDIA.items():
        value = row.get(name)
        # a column of that name with plain text may be anything, such as a file name
        if value and (
            isinstance(value, (list, dict, bytes)) or any(tag in str(text) for text in row.values())
        ):
            raise RecordError(name, "cannot be read here: prompts and answers are text")
    if isinstance(row.get("functions"), list) and row["functions"]:
        raise RecordError("functions", "is not read; give them as 'tools'")
    if "tools" in row:
        row["tools"] = _tools(row["tools"])
        if row["tools"] in ([], ""):
            del row["tools"]
    return row


def _from_openai(row: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's preference schema as {prompt, chosen, rejected}; other rows as they are.

    {"input": {"messages", "tools", "parallel_tool_calls"}, "preferred_output",
    "non_preferred_output"}.
    """
    given = row.get("input")
    if not isinstance(given, dict) or "messages" not in given:
        return row
    found = {"prompt": given["messages"]}
    if given.get("tools"):
        found["tools"] = given["tools"]
    for name, value in row.items():
        if name != "input":
            found[OPENAI_SIDES.get(name, name)] = value
    return found


def _tools(given: Any) -> Any:
    """Return tools as OpenAI has them, also from JSON text; a column that only has the name stays
    as it is.
    """
    # "tools" may also be what a row calls something else: a text, a number
    tools = given
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            tools = json.loads(given)
        except (ValueError, RecursionError):
            raise RecordError("tools", "is a list that is not whole JSON") from None
    # not what a template reads: it stays in the metadata
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return given

    found = []
    for tool in tools:
        # a function alone, as some data sets have it
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        if not isinstance(tool["function"], dict) or not isinstance(
            tool["function"].get("name"), str
        ):
            raise RecordError("tools", "has an entry without a function's name")
        found.append(tool)
    return found
