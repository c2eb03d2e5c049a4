"""What both programs leave to whoever sets a project up: names of fields, and words for a choice."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.data.records import Message, RecordError, check_messages
from rlhf.errors import UserError

PROMPTS = ("prompt", "conversation", "messages", "chat", "instruction", "question", "input")
# words for a choice, without blanks and punctuation
WORDS = {
    "a": ("a", "1", "left", "first", "answera", "answer1", "responsea", "response1"),
    "b": ("b", "2", "right", "second", "answerb", "answer2", "responseb", "response2"),
    "tie": ("tie", "equal", "same", "draw", "equallygood", "bothgood"),
    "both_bad": ("bothbad", "equallybad"),
    "skip": ("skip", "unsure", "cannottell", "idontknow"),
}
CHOICE_OF = {word: choice for choice, words in WORDS.items() for word in words}


def read_fields(
    fields: Mapping[str, Any], place: str, answers: tuple[str, str] | None
) -> tuple[list[Message], str, tuple[str, str]]:
    """Return the prompt's messages, and the names of its field and of the two with the answers.

    The prompt is the first field named as in PROMPTS; answers: the names where they cannot be told,
    by default the two other fields with text. Raises UserError, with the place.
    """
    prompt = next((name for name in PROMPTS if name in fields), None)
    if prompt is None:
        raise UserError(
            f"{place}: found fields {', '.join(fields)}, expected one with the prompt ({', '.join(PROMPTS)})"
        )
    names = answers
    if names is None:
        texts = [n for n, value in fields.items() if n not in PROMPTS and isinstance(value, str)]
        # as exported here, with others beside them
        usual = [n for n in texts if word_of(n) in (*WORDS["a"], *WORDS["b"])]
        names = tuple(usual if len(usual) == 2 else texts)
    if len(names) != 2 or not all(isinstance(fields.get(name), str) for name in names):
        raise UserError(
            f"{place}: which fields hold the two answers? Found {', '.join(fields)}; name them: --answers ONE,TWO"
        )
    value = fields[prompt]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        check_messages(prompt, messages)
    except RecordError as error:
        raise UserError(f"{place}: {error}") from None
    return messages, prompt, names


def choice_of(value: Any, answers: tuple[str, str]) -> str | None:
    """Return the choice that a value stands for: a word, or the name of an answer's field; None if
    it is neither."""
    if isinstance(value, str) and value in answers:
        return "ab"[answers.index(value)]
    return CHOICE_OF.get(word_of(value))


def word_of(value: Any) -> str:
    return re.sub(r"[\W_]+", "", str(value)).casefold()


def read_users(path: str | None) -> dict[str, str]:
    """Return {name here: id there} of a JSON file; nothing without a file. Raises UserError."""
    if path is None:
        return {}
    try:
        users = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(users, dict):
        raise UserError(f'{path}: expected {{"name here": "id there", ...}}')
    found = {str(name): str(id) for name, id in users.items()}
    if len(set(found.values())) < len(found):
        raise UserError(f"{path}: two names have one id")
    return found
