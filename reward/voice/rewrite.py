"""Rewriting an answer by a brand voice where a rule can: words to avoid, claims, greeting, closing.

A change is kept only where it raises the score and costs no fact.
"""

import re
from collections.abc import Iterator
from typing import Any

from reward.voice.phrases import Span, Text, is_regex
from reward.voice.scorer import Voice
from rlhf.data.records import digest

# between a greeting and what follows it
SIGNS = " ,.!;:"
PLACEHOLDER = re.compile(r"\{(\w+)\}")


def rewrite(voice: Voice, text: str, metadata: dict[str, Any]) -> str:
    """Return the text with what rules can put right, or as it is where they raise no score."""
    own = voice.on_channel(metadata)
    best, scores = text, own.score(text, metadata)
    for changes in (_without_bad, _with_greeting, _with_closing):
        # each step starts from what the one before has made
        for candidate in list(changes(own, best, metadata)):
            found = own.score(candidate, metadata)
            if found["total"] > scores["total"] and _keeps_facts(scores, found):
                best, scores = candidate, found
    return best


def _keeps_facts(before: dict[str, float], after: dict[str, float]) -> bool:
    """Return whether no fact has a lower score."""
    facts = [name for name in before if name.startswith("task/")]
    return all(after[name] >= before[name] for name in facts)


def _without_bad(voice: Voice, text: str, metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the text without the words to avoid, and without the sentences that hold them or a
    claim; a claim without its sentence would be half a sentence.
    """
    read = Text(text)
    marks = voice.marks(read, metadata)
    avoided = marks["avoid"].bad if "avoid" in marks else []
    claimed = marks["claims"].bad if "claims" in marks else []
    yield _tidy(_cut(read.text, avoided))
    for spans in (claimed, [*avoided, *claimed]):
        yield _tidy(_cut(read.text, _sentences_with(read, spans)))


def _with_greeting(voice: Voice, text: str, metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the text with each greeting before it, and in the place of what is nearly one."""
    for form, read, end in _at_edge(voice, voice.greeting, text, metadata, at_start=True):
        if end:
            yield f"{form}, {read[end:].lstrip(SIGNS)}"
        yield f"{form}, {read.lstrip(SIGNS)}"


def _with_closing(voice: Voice, text: str, metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the text with each closing after it, and in the place of what is nearly one."""
    for form, read, start in _at_edge(voice, voice.closing, text, metadata, at_start=False):
        if start:
            yield f"{read[:start].rstrip(' ,;:')} {form}."
        yield f"{_ended(read)} {form}."


def _at_edge(
    voice: Voice, part: Any, text: str, metadata: dict[str, Any], *, at_start: bool
) -> Iterator[tuple[str, str, int]]:
    """Yield each form of a greeting or closing, the text as it is read, and where what is nearly a
    form ends or starts; nothing where the voice has none, or the text has one.
    """
    read = Text(text)
    mark = part.mark(read, metadata, exact=False) if part else None
    if mark is None or mark.good:
        return
    edge = _near_edge(read, mark.near, at_start=at_start)
    for form in _forms(voice, part.phrases, text, metadata):
        yield form, read.text, edge


def _near_edge(read: Text, near: list[Span], *, at_start: bool) -> int:
    """Return the end (at the start) or the start (at the end) of words that are nearly a form in its
    place; 0 where none stands there.
    """
    if not near or not read.word_spans:
        return 0
    first, last = min(near)[0], max(near)[1]
    if at_start:
        return last if first == read.word_spans[0][0] else 0
    return first if last == read.word_spans[-1][1] else 0


def _forms(voice: Voice, phrases: list[str], text: str, metadata: dict[str, Any]) -> list[str]:
    """Return the forms that can be written, filled in and with a capital; which comes first depends
    on the text, so that all of them are taught.
    """
    found = []
    for form in phrases:
        names = PLACEHOLDER.findall(form)
        if is_regex(form) or any(metadata.get(name) in (None, "") for name in names):
            continue
        filled = PLACEHOLDER.sub(lambda match: str(metadata[match[1]]), form).strip(" ,.!;:")
        # a brand writes its own name as the file does
        filled = re.sub(re.escape(voice.name), voice.name, filled, flags=re.IGNORECASE)
        found.append(filled[0].upper() + filled[1:])
    turn = int(digest(text), 16) % len(found) if found else 0
    return found[turn:] + found[:turn]


def _sentences_with(read: Text, spans: list[Span]) -> list[Span]:
    """Return the sentences, with their end, that hold one of the spans."""
    starts = [start for start, _, _ in read.sentences]
    found = []
    for place, (start, _, _) in enumerate(read.sentences):
        end = starts[place + 1] if place + 1 < len(starts) else len(read.text)
        if any(start <= span[0] < end for span in spans):
            found.append((start, end))
    return found


def _cut(text: str, spans: list[Span]) -> str:
    """Return the text without the spans, which may overlap."""
    pieces, place = [], 0
    for start, end in sorted(spans):
        if start >= place:
            pieces.append(text[place:start])
        place = max(place, end)
    return "".join([*pieces, text[place:]])


def _tidy(text: str) -> str:
    """Return the text without the blanks and signs that a cut leaves, with a capital."""
    text = re.sub(r"\s+([,.!?;:])", r"\1", text)
    text = re.sub(r"([,;:])\s*([,.!?;:])", r"\2", text)
    text = re.sub(r"[^\S\n]+", " ", text).strip(" ,;:")
    return text[:1].upper() + text[1:]


def _ended(text: str) -> str:
    """Return the text with a sign that ends its last sentence."""
    return text if text.endswith((".", "!", "?")) else f"{text.rstrip(' ,;:')}."
