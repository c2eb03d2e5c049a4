"""Text as training should see it: one form of each character, one kind of line end, nothing invisible."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rlhf.data.conversation import answers_of
from rlhf.data.records import Message, Record

# Never seen, never meant: zero-width space, word joiner, byte order mark, soft hyphen, direction overrides, controls
# but for tab and newline. The joiners U+200C and U+200D make words in Persian and Hindi and emoji: they go only between
# ASCII letters and digits.
_INVISIBLE = re.compile(
    "[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069\u0000-\u0008\u000b-\u001f\u007f-\u0084\u0086-\u009f]"
    "|(?<=[0-9A-Za-z])[\u200c\u200d]+(?=[0-9A-Za-z])"
)
_LINE_END = re.compile("\r\n?|\u2028|\u2029|\u0085")
_TRAILING = re.compile(r"[ \t]+(?=\n)")


def clean(text: str) -> str:
    """NFC; line ends as \\n; invisible characters, blanks at line ends and around the whole removed."""
    text = _LINE_END.sub("\n", unicodedata.normalize("NFC", text))
    return _TRAILING.sub("", _INVISIBLE.sub("", text)).strip()


def mapped(record: Record, change: Callable[[str], str]) -> Record:
    """A copy of the record with `change` applied to every message and answer; its checks run again (RecordError)."""
    prompt: list[Message] = [each_string(m, change) | {"role": m["role"]} for m in record.prompt]
    return replace(record, prompt=prompt, **{name: change(text) for name, text in answers_of(record).items()})


def strings(value: Any) -> Iterator[str]:
    """Every string in a value, at any depth; the names of its fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def each_string(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with `change` applied to every string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: each_string(part, change) for name, part in value.items()}
    return [each_string(part, change) for part in value] if isinstance(value, (list, tuple)) else value
