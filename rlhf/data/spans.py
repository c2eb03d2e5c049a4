"""Marked passages of answers: good or bad, with a remark.

A span is {"answer": which one, "start", "end", "text", "label": "good" or "bad", "remark"}, the last
only where there is one. Offsets count characters (code points) of the text as it is stored, so that
`text == answer[start:end]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import UserError
from rlhf.text import clip

LABELS = ("good", "bad")
# of one answer to a question
MOST = 50
Span = dict[str, Any]


def checked(spans: Sequence[Mapping[str, Any]], texts: Mapping[Any, str]) -> list[Span]:
    """Return the spans with their texts, by answer and place. texts: of each answer that was shown.

    Raises UserError for an unknown answer or label, a place outside of the answer, or a text that
    is not there.
    """
    if len(spans) > MOST:
        raise UserError(f"spans: found {len(spans)}, expected {MOST} at most")
    # the answers as they are given: ids differ from store to store
    number = {answer: i for i, answer in enumerate(texts)}
    found = [_checked(span, texts) for span in spans]
    return sorted(found, key=lambda span: (number[span["answer"]], *_place(span)))


def _checked(span: Mapping[str, Any], texts: Mapping[Any, str]) -> Span:
    answer, start, end = (span.get(name) for name in ("answer", "start", "end"))
    if answer not in texts:
        raise UserError(f"span of answer {answer!r}: expected one of {', '.join(map(str, texts))}")
    text = texts[answer]
    are_numbers = type(start) is int and type(end) is int
    if not are_numbers or not 0 <= start < end <= len(text):
        raise UserError(
            f"span from {start!r} to {end!r}: expected places in an answer of {len(text)} characters"
        )
    found = text[start:end]
    if span.get("text", found) != found:
        raise UserError(
            f"span from {start} to {end}: the answer says {clip(found, 40)!r} there, not {clip(span['text'], 40)!r}"
        )
    if span.get("label") not in LABELS:
        raise UserError(f"span: label is {span.get('label')!r}, expected {' or '.join(LABELS)}")
    kept = {"answer": answer, "start": start, "end": end, "text": found, "label": span["label"]}
    remark = (span.get("remark") or "").strip()
    return kept | {"remark": remark} if remark else kept


def _place(span: Span) -> tuple:
    return span["start"], span["end"], span["label"], span.get("remark", "")


def renamed(spans: Sequence[Span], names: Mapping[Any, Any]) -> list[Span]:
    """Return the spans with other names of the answers, those of answers without a name left out."""
    return [span | {"answer": names[span["answer"]]} for span in spans if span["answer"] in names]
