"""Conversations as lists of messages, however they are written: lists, lists as text, ShareGPT's,
transcripts.

A transcript is text in which two speakers of known names take turns, each turn on a line of its
own: "User: Hi\\nAssistant: Hello!", or HH-RLHF's "\\n\\nHuman: Hi\\n\\nAssistant: Hello!".
"""

import ast
import itertools
import json
import re
from typing import Any

from rlhf.data.records import Message, Record, RecordError, check_messages

# Speakers as transcripts and ShareGPT name them
USER, ASSISTANT = ("Human", "User"), ("Assistant", "AI", "Bot", "GPT")
ROLE_OF = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
ANSWER_FIELDS = ("response", "chosen", "rejected")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Fields of a message, other than role and content, that the chat template gets, and those that
# nothing here can read
PASSED = ("tool_calls", "tool_call_id", *THOUGHTS)
UNREADABLE = ("function_call", "refusal", "image", "images", "audio", "audios", "video", "videos")
# Fields of a message that is text alone; a weight says whether it is imitated
PLAIN = {"role", "content", "weight"}
# Labels before colons that are parts of worked examples, not speakers
EXAMPLES = {"input", "output", "q", "a", "question", "answer"}

# Text that may be a message or a list of them: perhaps "[" or "array([", then "{", and somewhere a
# role or from with a known name
_LIST = re.compile(
    rf"""\s*(?P<list>(?:array\()?\[)?\s*\{{.*(?P<q>['"])(?:role|from)(?P=q)\s*:\s*['"](?:{"|".join(ROLE_OF)})['"]""",
    re.IGNORECASE | re.DOTALL,
)
# In Python's text of a list: a string, or what NumPy adds to it, or the gap between two dicts,
# where it leaves out the comma
_NUMPY = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|array\(|,?\s*dtype=object\)|(?P<gap>\}\s+(?=\{))""",
    re.DOTALL,
)
# A known speaker, as written above or in capitals, at the beginning of a line: "User:", "###
# ASSISTANT:"
_SPEAKERS = (*USER, *ASSISTANT)
_NAMES = "|".join((*_SPEAKERS, *map(str.upper, _SPEAKERS)))
_TURN = re.compile(rf"(?:\A|\n)[ \t]*(?:#+ ?)?({_NAMES}):")
# Any label before a colon at the beginning of a line, also in bold: "Customer:", "**Agent**:"
_ANY_TURN = re.compile(
    r"(?:\A|\n)[ \t]*(?:\*\*|#+ ?)?([A-Z][\w .-]{0,24}?)(?:\*\*)?:(?:\*\*)?(?=\s|\Z)"
)
# What chat templates of ChatML, Llama 3, Gemma, Llama 2 and Zephyr write between turns
_CONTROL = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<\|assistant\|>"
)


def conversation(name: str, value: Any) -> list[Message] | None:
    """Return the messages of a column however it is written, None for plain text. Raises
    RecordError on broken ones.
    """
    listed = as_list(name, value)
    if listed is not None:
        return messages(name, listed)
    if isinstance(value, list):
        # raises, with what is wrong
        check_messages(name, value)
    return parse_turns(value) if isinstance(value, str) else None


def as_list(name: str, value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages as dicts, also given as text, as one dict, or as a dict of lists;
    else None.
    """
    if isinstance(value, str):
        value = _parsed(name, value)
    # as the datasets library gives a list of dicts: a dict of lists
    if isinstance(value, dict) and isinstance(value.get("role", value.get("from")), list):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        value = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)
        ]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    return value if all(map(_is_message, value)) else None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return ("role" in value and ("content" in value or "tool_calls" in value)) or {
        "from",
        "value",
    } <= value.keys()


def _parsed(name: str, text: str) -> Any:
    """Return what the text holds as JSON, or as Python or NumPy prints it; None if it is no list of
    messages.
    """
    found = _LIST.match(text)
    if not found:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(_NUMPY.sub(_as_python, text).strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # one message alone may as well be a text about dicts
        if not found["list"]:
            return None
        raise RecordError(
            name, "is a list of messages as text, but neither whole JSON nor whole Python"
        ) from None


def _as_python(match: re.Match) -> str:
    """Return what Python would print where NumPy printed `match`."""
    return match["string"] or ("}, " if match["gap"] else "")


def messages(name: str, value: list[Any]) -> list[Message]:
    """Return checked messages {"role", "content"} with what the chat template also reads, and no
    other fields.
    """
    if isinstance(value, list):
        value = [_plain(name, i, message) for i, message in enumerate(value)]
    check_messages(name, value)
    return value


def _plain(name: str, number: int, message: Any) -> Any:
    """Return one message with the usual names of role and content; text parts are joined."""
    if not isinstance(message, dict):
        return message
    given = {key: value for key, value in message.items() if value not in (None, "", [])}
    for key in UNREADABLE:
        if key in given:
            raise RecordError(name, f"message {number} has '{key}', which cannot be read here")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    # OpenAI leaves the content out where the model only calls tools
    if content is None and "tool_calls" in given:
        content = ""
    plain = {
        "role": ROLE_OF.get(role.lower(), role) if isinstance(role, str) else role,
        "content": content,
    }
    plain |= {key: given[key] for key in PASSED if key in given}
    if "tool_calls" in plain:
        plain["tool_calls"] = [_tool_call(name, number, call) for call in plain["tool_calls"]]
    # as OpenAI has it: an answer that is not to be imitated
    if plain["role"] == "assistant" and given.get("weight") == 0:
        plain["weight"] = 0
    # templates show which tool a result is of
    if plain["role"] == "tool" and "name" in given:
        plain["name"] = given["name"]
    return plain


def _tool_call(name: str, number: int, call: Any) -> dict[str, Any]:
    """Return a call whose arguments are a dict, as chat templates expect them; OpenAI has them as
    JSON text.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(name, f"message {number} has a tool call without a function's name")
    # a template that prints JSON would quote the text a second time
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RecordError(
                name, f"message {number} calls a tool with arguments that are not JSON"
            ) from None
    return call | {"function": function | {"arguments": arguments}}


def message_text(message: Message) -> str:
    """Return a message's text and, as JSON, its other fields: tool calls, reasoning."""
    more = {name: value for name, value in message.items() if name not in PLAIN}
    # a message of text alone, as nearly all are, is that text
    if not more:
        return message["content"]
    return message["content"] + json.dumps(more, sort_keys=True, ensure_ascii=False)


def answers_of(record: Record) -> dict[str, str]:
    """Return the answers of a record by field, in order; none for a Prompt."""
    return {name: getattr(record, name) for name in ANSWER_FIELDS if hasattr(record, name)}


def user_text(record: Record) -> str:
    """Return all turns of the user, one a line; the whole prompt if no user speaks."""
    turns = turns_of(record, "user") or [message["content"] for message in record.prompt]
    return "\n".join(turns)


def turns_of(record: Record, role: str) -> list[str]:
    """Return the contents of the prompt's messages of one role, in order."""
    return [message["content"] for message in record.prompt if message["role"] == role]


def assistant_turns(prompt: list[Message]) -> list[int]:
    """Return which messages are turns of the assistant that can be learnt: not empty, and not of
    weight 0.
    """
    found = []
    for number, message in enumerate(prompt):
        says_something = message["content"].strip() or "tool_calls" in message
        if message["role"] == "assistant" and says_something and message.get("weight") != 0:
            found.append(number)
    return found


def is_text(message: Message) -> bool:
    """Return whether the content is all that a message says: no tool calls, no separate reasoning."""
    return message.keys() <= PLAIN


def dialogue_text(record: Record) -> str:
    """Return the prompt without system messages, with roles: two rows with equal text ask the same
    question.
    """
    turns = [message for message in record.prompt if message["role"] != "system"]
    return "\n".join(f"{turn['role']}: {message_text(turn)}" for turn in turns)


def parse_turns(text: str) -> list[Message] | None:
    """Return the messages of a transcript, None for other text; turns of one speaker in a row are
    joined.

    Where the assistant's turns begin after an empty line, all do. Text before the first turn is the
    system message, if it says "System:" or if the transcript ends where the assistant is to speak.
    """
    # role -> its name in this text
    speakers: dict[str, str] = {}
    for found in _TURN.finditer(text):
        # a text has one name for each speaker: "User:" in a text of "Human:" is quoted
        speakers.setdefault(ROLE_OF[found[1].lower()], found[1])
    if len(speakers) < 2:
        return None

    # the same break before every turn, so that "Human:" inside an answer is not a turn
    gap = r"\n\n" if re.search(rf"\n\n(?:#+ ?)?{speakers['assistant']}:", text) else r"\n"
    turn = rf"(?:\A\s*|{gap}[ \t]*)(?:#+ ?)?({'|'.join(speakers.values())}):"
    before, *pieces = re.split(turn, text)
    contents = [content.strip() for content in pieces[1::2]]
    roles = [ROLE_OF[name.lower()] for name in pieces[::2]]

    system = re.fullmatch(r"\s*(System:|SYSTEM:)?\s*(.*?)\s*", before, re.DOTALL)
    if len(set(roles)) < 2 or (system[2] and not system[1] and contents[-1]):
        return None

    turns: list[Message] = []
    if system[2]:
        turns.append({"role": "system", "content": system[2]})
    for role, content in zip(roles, contents, strict=True):
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    return turns


def _looks_like_transcript(text: str) -> bool:
    """Return whether two labels take turns at the beginnings of lines that are not those of worked
    examples.
    """
    speakers = [label[1] for label in _ANY_TURN.finditer(text)]
    names = {name.lower() for name in speakers}
    if len(names) != 2 or names & EXAMPLES or any(a == b for a, b in itertools.pairwise(speakers)):
        return False
    # two labels of unknown names once each are a form or a list
    return len(speakers) > 3 or names <= ROLE_OF.keys()


def notes(prompt: list[Message]) -> list[str]:
    """Return what in a prompt may be meant otherwise than it is read."""
    found: dict[str, None] = {}
    for message in prompt:
        if message["role"] == "user" and _looks_like_transcript(message["content"]):
            found["a prompt looks like a transcript, and is read as one turn"] = None
        if _CONTROL.search(message["content"]):
            found[
                "a text holds control tokens of a chat template, which are read as plain text"
            ] = None
        if any(name in message for name in THOUGHTS):
            found[
                "reasoning of an earlier turn goes to the chat template, which may leave it out"
            ] = None
    return list(found)
