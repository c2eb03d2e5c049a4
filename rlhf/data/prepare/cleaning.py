"""Text as training should see it: one form of each character, one kind of line end, nothing
invisible.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rlhf.data.conversation import answers_of
from rlhf.data.records import Record, normalise

# Zero-width space, word joiner, byte order mark, soft hyphen, direction overrides, and controls
# other than tab and newline. The joiners U+200C and U+200D make words in Persian and Hindi and
# emoji, so they are removed only between ASCII letters and digits.
_INVISIBLE = re.compile(
    "[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069\u0000-\u0008\u000b-\u001f\u007f-\u0084\u0086-\u009f]"
    "|(?<=[0-9A-Za-z])[\u200c\u200d]+(?=[0-9A-Za-z])"
)
_LINE_END = re.compile("\r\n?|\u2028|\u2029|\u0085")
_TRAILING = re.compile(r"[ \t]+(?=\n)")
_WORD = re.compile(r"\w+")


def clean(text: str) -> str:
    """Return `text` in NFC, with \\n as line end, without invisible characters and blanks at line
    ends and edges.
    """
    text = _LINE_END.sub("\n", unicodedata.normalize("NFC", text))
    return _TRAILING.sub("", _INVISIBLE.sub("", text)).strip()


def collapse_spaces(text: str) -> str:
    return " ".join(text.split())


def words_of(text: str) -> list[str]:
    """Return the words of `text` after Unicode NFKC and case folding."""
    return _WORD.findall(normalise(text))


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """Return a copy of `record` with `change` applied to every message and answer. Raises
    RecordError if it is bad.
    """
    prompt = []
    for message in record.prompt:
        prompt.append(map_strings(message, change) | {"role": message["role"]})
    answers = {name: change(text) for name, text in answers_of(record).items()}
    return replace(record, prompt=prompt, **answers)


def texts_of(record: Record) -> list[str]:
    """Return every text of a record: the strings of its messages but for roles, then its answers."""
    texts: list[str] = []
    for message in record.prompt:
        # tool calls and reasoning hold text too
        texts.extend(strings_in(message | {"role": None}))
    return texts + list(answers_of(record).values())


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string inside lists and dicts, at any depth, but not the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings_in(part)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the same value with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: map_strings(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(part, change) for part in value]
    return value
