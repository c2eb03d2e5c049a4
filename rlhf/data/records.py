"""The record types that every stage shares, and what passes between a policy and whatever scores
it.

Everything is conversational: a prompt is a list of {"role", "content"} messages that ends before
the assistant speaks, a response is the text of the one assistant message that follows. `load.py`
turns files into these.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import UserError
from rlhf.text import clip

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, and fields that only the chat
# template reads; an answer of "weight" 0 is not learnt
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "validation", "test")
# Levels of lists and dicts in metadata
DEEPEST = 100


class RecordError(ValueError):
    """A row that cannot be a record: the field and what is wrong with it; `load.py` adds file and
    row.
    """

    def __init__(self, field: str, message: str):
        super().__init__(
            message if message.startswith(f"'{field}'") else f"field '{field}': {message}"
        )
        self.field = field


@dataclass(kw_only=True)
class Record:
    """What all records share. Rows of one `group` always get the same split."""

    prompt: list[Message]
    # default: a hash of the normalised first user turn
    group: str = ""
    # given in the data; else by hash of the group
    split: str | None = None
    # the file, store or data set it came from
    source: str | None = None
    annotator: str | None = None
    voice: str | None = None
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    # "data/prefs.jsonl row 118", for messages; without annotation, so that it is no field of the
    # dataclass
    place = ""

    def __post_init__(self):
        check_messages("prompt", self.prompt)
        if self.prompt[-1]["role"] == "assistant":
            raise RecordError(
                "prompt",
                "ends with an assistant message; the response belongs in a field of its own",
            )
        _expect(self.split in (None, *SPLITS), "split", self.split, f"one of {', '.join(SPLITS)}")
        _expect(
            is_number(self.weight) and self.weight >= 0, "weight", self.weight, "a number from 0 up"
        )
        # messages are checked with their roles, the rest here
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
    tie_prob: the share of votes, or the probability, that both are equally good; half of it is in
    label_prob, whose default is then 1 - tie_prob / 2.
    chosen_ended, rejected_ended: false for a response that was cut off at its length limit, which
    gets no EOS.
    """

    chosen: str
    rejected: str
    margin: float | None = None
    label_prob: float | None = None
    tie_prob: float | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_text("chosen", self.chosen)
        check_text("rejected", self.rejected)
        if self.chosen == self.rejected:
            raise RecordError("chosen", "'chosen' and 'rejected' are the same text")
        _expect(
            self.margin is None or is_number(self.margin), "margin", self.margin, "a finite number"
        )
        for name in ("label_prob", "tie_prob"):
            value = getattr(self, name)
            is_probability = is_number(value) and 0.0 <= value <= 1.0
            _expect(value is None or is_probability, name, value, "a probability")
        if self.tie_prob is not None:
            self._share_ties()

    def _share_ties(self) -> None:
        """Fill in label_prob. Raise RecordError where it leaves no room for half of the ties on
        either side.
        """
        half = self.tie_prob / 2
        if self.label_prob is None:
            self.label_prob = 1.0 - half
        # shares of votes are rounded
        if not half - 1e-6 <= self.label_prob <= 1.0 - half + 1e-6:
            raise RecordError(
                "tie_prob",
                f"found {self.tie_prob} with label_prob {self.label_prob}, expected label_prob from "
                "tie_prob / 2 to 1 - tie_prob / 2, since it counts half of the ties",
            )

    @property
    def has_winner(self) -> bool:
        """Return False for a pair on which as many votes went one way as the other."""
        return self.tie_prob is None or self.label_prob != 0.5


@dataclass(kw_only=True)
class Labelled(Record):
    """One answer with a verdict of its own (unpaired feedback, as KTO reads it)."""

    response: str
    label: bool

    def __post_init__(self):
        super().__post_init__()
        check_text("response", self.response)
        _expect(isinstance(self.label, bool), "label", self.label, "true or false")


@dataclass
class Samples:
    """B responses of a policy, as every scorer receives them.

    `response_ids` hold EOS where there is one (`ended`); `responses` are text without
    special tokens. `metadata` is each prompt record's own, with its group under "group" and, where
    known, its voice under "voice". Scorers that are roles on the base read the ids; text is never
    tokenized again.
    """

    prompts: list[list[Message]] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)
    response_ids: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        prompt: list[Message],
        response: str,
        metadata: dict[str, Any],
        *,
        ended: bool = True,
        prompt_ids: list[int] | None = None,
        response_ids: list[int] | None = None,
    ) -> None:
        """Add one response; one that is known by its text alone has no ids."""
        self.prompts.append(prompt)
        self.responses.append(response)
        self.prompt_ids.append(prompt_ids or [])
        self.response_ids.append(response_ids or [])
        self.ended.append(ended)
        self.metadata.append(metadata)

    def __len__(self) -> int:
        return len(self.responses)


@dataclass
class Scores:
    """B scores and, by name, the parts they are made of (each a list of B floats)."""

    total: list[float]
    breakdown: dict[str, list[float]] = field(default_factory=dict)


Scorer = Callable[[Samples], Scores]


class BadScore(UserError):
    """A scorer returned NaN or infinity: which scorer, for which of its samples, and what it
    returned.
    """

    def __init__(self, message: str, scorer: str = "", index: int = 0, value: float = math.nan):
        super().__init__(message)
        self.scorer, self.index, self.value = scorer, index, value


def tools_of(record: Record) -> list[dict[str, Any]] | None:
    """Return the tools that the record's answer may call, as a chat template takes them, from its
    metadata.
    """
    tools = record.metadata.get("tools")
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
        return tools
    return None


def check_messages(name: str, messages: Any) -> None:
    """Raise RecordError unless `messages` is a non-empty list of {"role", "content"} with known
    roles and text.
    """
    _expect(isinstance(messages, list) and bool(messages), name, messages, "a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RecordError(
                name, f"message {i} is {_short(message)}, expected {{'role': ..., 'content': ...}}"
            )
        if message["role"] not in ROLES:
            raise RecordError(
                name,
                f"message {i} has role {message['role']!r}, expected one of {', '.join(ROLES)}",
            )
        if not isinstance(message["content"], str):
            raise RecordError(
                name, f"message {i} has content {_short(message['content'])}, expected text"
            )
        check_unicode(name, message)


def check_text(name: str, text: Any) -> None:
    """Raise RecordError unless `text` is text that is not blank and that a file can hold."""
    _expect(isinstance(text, str), name, text, "text")
    if not text.strip():
        raise RecordError(name, "is empty")
    check_unicode(name, text)


def check_unicode(name: str, value: Any) -> None:
    """Raise RecordError on half a surrogate pair in any text of `value`, and on more than `DEEPEST`
    nested levels.

    Names of fields count too. JSON may carry both, but no tokenizer or UTF-8 file can hold the
    former, and few programs the latter.
    """
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, str):
                _check_encodable(name, part)
            elif isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, (list, tuple)):
                inner += part
        if not inner:
            return
        level = inner
    raise RecordError(name, f"is nested more than {DEEPEST} levels deep")


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"at character {error.start}"
        raise RecordError(name, f"found broken Unicode (half a surrogate pair) {where}") from None


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise RecordError(name, f"found {_short(value)}, expected {expected}")


def _short(value: Any) -> str:
    return clip(repr(value), 60)


def is_number(value: Any) -> bool:
    """Return whether this is a finite int or float; True and False are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_name(name: str) -> str:
    """Return a name as it is compared: one form of each character (Unicode NFC), single blanks,
    none around it.
    """
    return " ".join(unicodedata.normalize("NFC", name).split())


def normalise(text: str) -> str:
    """Return text as groups compare it: Unicode NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_group(prompt: list[Message]) -> str:
    """Return the default group: a hash of the normalised first user turn (of the whole prompt if no
    user speaks).
    """
    for message in prompt:
        if message["role"] == "user":
            return digest(normalise(message["content"]))
    return digest(normalise(json.dumps(prompt, sort_keys=True)))


def digest(text: str) -> str:
    """Return 16 hex digits that identify a text; the same on every machine and in every process."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
