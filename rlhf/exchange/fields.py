"""What other programs call things: names of fields and words for a choice, which they leave to
whoever sets a project up, and names of people.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.records import Message, RecordError, check_messages
from rlhf.data.spans import Span, checked
from rlhf.errors import UserError
from rlhf.exchange.pairs import About

# of what is known of a prompt, what other programs show beside it
SHOWN = ("group", "split", "voice")
# names of the field with the prompt
PROMPTS = ("prompt", "conversation", "messages", "chat", "instruction", "question", "input")
# words for a choice, without blanks and punctuation
WORDS = {
    "a": ("a", "1", "left", "first", "answera", "answer1", "responsea", "response1"),
    "b": ("b", "2", "right", "second", "answerb", "answer2", "responseb", "response2"),
    "tie": ("tie", "equal", "same", "draw", "equallygood", "bothgood"),
    "both_bad": ("bothbad", "equallybad"),
    "skip": ("skip", "unsure", "cannottell", "idontknow"),
}
CHOICE_OF: dict[str, str] = {}
for _choice, _words in WORDS.items():
    CHOICE_OF |= dict.fromkeys(_words, _choice)


def tags_of(judged: Iterable[Any]) -> list[str]:
    """Return the tags of all votes, or orders, of some pairs or rankings, each once."""
    found: dict[str, None] = {}
    for one in judged:
        for cast in one.casts:
            found |= dict.fromkeys(cast.tags)
    return list(found)


def shown_of(judged: About) -> dict[str, Any]:
    """Return what other programs show beside a pair or ranking, as far as it is known."""
    shown = {name: getattr(judged, name) for name in SHOWN}
    return {name: value for name, value in shown.items() if value is not None}


def take_shown(judged: About, data: dict[str, Any]) -> None:
    """Move what is shown beside a pair or ranking out of `data`; what is no text is data like any."""
    for name in SHOWN:
        if isinstance(data.get(name), str):
            setattr(judged, name, data.pop(name))


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
    names = answers or _answer_fields(fields)
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


def _answer_fields(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the fields with text beside the prompt, those of two answers if they are
    among them.
    """
    texts, usual = [], []
    for name, value in fields.items():
        if name in PROMPTS or not isinstance(value, str):
            continue
        texts.append(name)
        # as exported here, with others beside them
        if CHOICE_OF.get(word_of(name)) in ("a", "b"):
            usual.append(name)
    return tuple(usual if len(usual) == 2 else texts)


def choice_of(value: Any, answers: tuple[str, str]) -> str | None:
    """Return the choice that a value stands for: a word, or the name of an answer's field; None if
    it is neither."""
    if isinstance(value, str) and value in answers:
        return "ab"[answers.index(value)]
    return CHOICE_OF.get(word_of(value))


def word_of(value: Any) -> str:
    return re.sub(r"[\W_]+", "", str(value)).casefold()


def checked_at(spans: Sequence[Span], texts: Mapping[Any, str], place: str) -> list[Span]:
    """Return `checked` spans; its UserError tells the place."""
    try:
        return checked(spans, texts)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


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
    # their votes would come back as one person's
    if len(set(found.values())) < len(found):
        raise UserError(f"{path}: two names have one id")
    return found
