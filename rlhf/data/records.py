"""The record types that every stage shares, and what passes between a policy and whatever scores it.

Everything is conversational: a prompt is a list of {"role", "content"} messages that ends before the assistant
speaks, a response is the text of the one assistant message that follows. `load.py` turns files into these.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import UserError

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, and perhaps what only the chat template reads
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "validation", "test")
DEEPEST = 100  # levels of lists and dicts in metadata


class RecordError(ValueError):
    """A row that cannot be a record: names the field and what is wrong; `load.py` adds file and row."""

    def __init__(self, field: str, message: str):
        super().__init__(message if message.startswith(f"'{field}'") else f"field '{field}': {message}")
        self.field = field


@dataclass(kw_only=True)
class Record:
    """What all records share. `group` keeps rows that must not be torn apart by a split together."""

    prompt: list[Message]
    group: str = ""  # default: a hash of the normalised first user turn
    split: str | None = None  # given in the data; else by hash of the group
    source: str | None = None  # the file, store or data set it came from
    annotator: str | None = None
    voice: str | None = None
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    place = ""  # "data/prefs.jsonl row 118", for messages; no field, for it is not of the record

    def __post_init__(self):
        check_messages("prompt", self.prompt)
        if self.prompt[-1]["role"] == "assistant":
            raise RecordError("prompt", "ends with an assistant message; the response belongs in a field of its own")
        if self.split is not None and self.split not in SPLITS:
            raise RecordError("split", f"found {self.split!r}, expected one of {', '.join(SPLITS)}")
        if not (is_number(self.weight) and self.weight >= 0):
            raise RecordError("weight", f"found {self.weight!r}, expected a number from 0 up")
        for name in ("group", "source", "annotator", "voice", "metadata"):
            check_unicode(name, getattr(self, name))
        if not self.group:
            self.group = prompt_group(self.prompt)


@dataclass(kw_only=True)
class Prompt(Record):
    """Something to answer. PPO, sampling and comparison start here."""


@dataclass(kw_only=True)
class Instruction(Record):
    """A prompt with the answer to imitate."""

    response: str

    def __post_init__(self):
        super().__post_init__()
        check_text("response", self.response)


@dataclass(kw_only=True)
class Preference(Record):
    """Two answers to one prompt, the better first.

    margin: by how much, in score units (the reward loss asks for at least that distance).
    label_prob: the probability that `chosen` really is the better one, 0.5 to 1 (soft labels).
    chosen_ended, rejected_ended: false for a response that was cut off at its length limit, which gets no EOS.
    """

    chosen: str
    rejected: str
    margin: float | None = None
    label_prob: float | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_text("chosen", self.chosen)
        check_text("rejected", self.rejected)
        if self.chosen == self.rejected:
            raise RecordError("chosen", "'chosen' and 'rejected' are the same text")
        if self.margin is not None and not is_number(self.margin):
            raise RecordError("margin", f"found {self.margin!r}, expected a finite number")
        if self.label_prob is not None and not (is_number(self.label_prob) and 0.0 <= self.label_prob <= 1.0):
            raise RecordError("label_prob", f"found {self.label_prob!r}, expected a probability")


@dataclass(kw_only=True)
class Labelled(Record):
    """One answer with a verdict of its own (unpaired feedback, as KTO reads it)."""

    response: str
    label: bool

    def __post_init__(self):
        super().__post_init__()
        check_text("response", self.response)
        if not isinstance(self.label, bool):
            raise RecordError("label", f"found {self.label!r}, expected true or false")


@dataclass
class Samples:
    """B responses of a policy, as every scorer receives them.

    `response_ids` hold the end token where there is one (`ended`); `responses` are text without special tokens.
    `metadata` is each prompt record's own, with its group under "group" and, where known, its voice under "voice".
    Scorers that are roles on the base read the ids; text is never tokenized again.
    """

    prompts: list[list[Message]]
    responses: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    ended: list[bool]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.responses)


@dataclass
class Scores:
    """B scores and, by name, the parts they are made of (each a list of B floats)."""

    total: list[float]
    breakdown: dict[str, list[float]] = field(default_factory=dict)


Scorer = Callable[[Samples], Scores]


class BadScore(UserError):
    """A scorer returned NaN or infinity: which scorer, for which of its samples, and what it returned."""

    def __init__(self, message: str, scorer: str = "", index: int = 0, value: float = math.nan):
        super().__init__(message)
        self.scorer, self.index, self.value = scorer, index, value


def tools_of(record: Record) -> list[dict[str, Any]] | None:
    """The tools that the record's answer may call, as its chat template takes them: those in its metadata."""
    tools = record.metadata.get("tools")
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
        return tools
    return None


def check_messages(name: str, messages: Any) -> None:
    """Raises RecordError unless `messages` is a non-empty list of {"role", "content"} with known roles and text."""
    if not isinstance(messages, list) or not messages:
        raise RecordError(name, f"found {_short(messages)}, expected a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RecordError(name, f"message {i} is {_short(message)}, expected {{'role': ..., 'content': ...}}")
        if message["role"] not in ROLES:
            raise RecordError(name, f"message {i} has role {message['role']!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise RecordError(name, f"message {i} has content {_short(message['content'])}, expected text")
        check_unicode(name, message)


def check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise RecordError(name, f"found {_short(text)}, expected text")
    if not text.strip():
        raise RecordError(name, "is empty")
    check_unicode(name, text)


def check_unicode(name: str, value: Any) -> None:
    """Raises RecordError on half a surrogate pair in a text, or anywhere in lists and dicts (names too), and on more
    than a hundred of these in each other: JSON may carry both, but no tokenizer or UTF-8 file can the former, and few
    programs the latter."""
    parts = [value]
    for _ in range(DEEPEST):
        deeper = []
        for part in parts:
            if isinstance(part, str):
                try:
                    part.encode("utf-8")
                except UnicodeEncodeError as error:
                    where = f"at character {error.start}"
                    raise RecordError(name, f"found broken Unicode (half a surrogate pair) {where}") from None
            elif isinstance(part, dict):
                deeper += [*part, *part.values()]
            elif isinstance(part, (list, tuple)):
                deeper += part
        parts = deeper
        if not parts:
            return
    raise RecordError(name, f"is nested more than {DEEPEST} levels deep")


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_name(name: str) -> str:
    """A name as it is compared: one form of each character (Unicode NFC), single blanks, none around it."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, white space collapsed: what counts as the same text for groups."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_group(prompt: list[Message]) -> str:
    """The default group: a hash of the normalised first user turn (of the whole prompt if no user speaks)."""
    first = next((m["content"] for m in prompt if m["role"] == "user"), None)
    return digest(normalise(first if first is not None else json.dumps(prompt, sort_keys=True)))


def digest(text: str) -> str:
    """16 hex digits that name a text; the same on every machine and in every process."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
