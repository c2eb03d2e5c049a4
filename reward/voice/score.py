"""`rlhf voice score`: the score of a text by a brand voice, rule by rule, with the words it touched."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward.compose import build_tone_judge
from reward.voice.answers import Answer, read_answers, to_samples
from reward.voice.parts import Mark
from reward.voice.phrases import Span, Text
from reward.voice.scorer import FLOOR, Voice, choose_channel, load_voice
from reward.voice.tone import check_tone, measure_tone
from rlhf.config import option
from rlhf.data.records import Scorer
from rlhf.data.sources import READABLE
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.text import clip

# of the terminal (ECMA-48)
COLOURS = {"good": "\033[32m", "near": "\033[33m", "bad": "\033[31m"}
PLAIN = "\033[0m"
SIGNS = {"good": "+", "near": "~", "bad": "-"}


@dataclass
class ScoreConfig:
    """Score a text by a brand voice and show what each rule saw: + earns, - costs, ~ is nearly right."""

    text: str = option(
        help="a text, a file with one, - for standard input, or a file with answers (JSONL, a preference store)"
    )
    voice: str = option(help="the brand voice (YAML)")
    channel: str | None = option(None, "the variant of the voice, such as email")
    metadata: dict = option({}, "of the prompt: the facts, e.g. {item: kettle}")
    judge: dict | None = option(
        None,
        "measures the tone, e.g. {openai: URL, model: NAME} or {http: URL}; without it tone is left out",
    )
    colour: Literal["auto", "always", "never"] = option(
        "auto", "auto: where the output is a terminal and NO_COLOR is not set"
    )
    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class Part:
    """One rule: its score, its share of the weight, what it leaves of the total, what it saw."""

    name: str
    score: float
    share: float
    leaves: float
    mark: Mark


def score_text(
    voice: Voice, answer: Answer, tone: dict[str, float] | None = None
) -> tuple[float, list[Part], Text]:
    """Return the total, the parts and the text as it was read.

    The product of what the parts leave, and of `truncated` for a text that was cut off, is the
    total.
    """
    own, text = voice.on_channel(answer.metadata), Text(answer.text)
    marks = own.marks(text, answer.metadata, tone)
    weights = own.weights()
    whole = sum(weights[name] for name in marks)
    parts = []
    for name, mark in marks.items():
        share = weights[name] / whole
        counted = max(mark.score, FLOOR)
        if own.credit == "partial":
            counted = FLOOR + (1 - FLOOR) * mark.score
        parts.append(Part(name, mark.score, share, counted**share, mark))
    scores = voice.score(answer.text, answer.metadata, answer.ended, tone)
    return scores["total"], parts, text


def tone_judge(spec: dict[str, Any] | None, voice: Voice, where: str) -> Scorer | None:
    """Return the judge of the voice's tone; None where none is named. Raises UserError where it would
    have nothing to measure.
    """
    if not spec:
        return None
    judge = build_tone_judge(spec)
    check_tone(voice.sliders, where)
    return judge


def tones_of(
    voice: Voice, judge: Scorer | None, answers: list[Answer]
) -> Sequence[dict[str, float] | None]:
    """Return what the judge measured of each answer, by slider; None for each without a judge."""
    measured = measure_tone(voice.sliders, judge, to_samples(answers)) if judge else None
    return measured or [None] * len(answers)


def weakest(parts: list[Part]) -> list[Part]:
    """Return up to four parts that cost most, the worst first."""
    weak = [part for part in parts if part.leaves < 0.995]
    return sorted(weak, key=lambda part: part.leaves)[:4]


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Print and return the score of each text."""
    voice = load_voice(config.voice)
    choose_channel(voice, config.channel, config.voice)
    judge = tone_judge(config.judge, voice, config.voice)
    given = dict(config.metadata)
    if config.channel:
        given["channel"] = config.channel
    answers = [
        Answer(own.text, own.prompt, own.metadata | given, own.ended) for own in _texts(config.text)
    ]
    tones = tones_of(voice, judge, answers)
    coloured = config.colour == "always" or (
        config.colour == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    found = []
    for place, answer in enumerate(answers):
        total, parts, text = score_text(voice, answer, tones[place])
        found.append(as_json(total, parts, text))
        if config.json:
            continue
        if len(answers) > 1:
            said = ", ".join(f"{part.name} {part.score:.2f}" for part in weakest(parts))
            print(f"{total:.3f}  {clip(answer.text, 60):<60}  {said}")
        else:
            print("\n".join(as_lines(voice, total, parts, text, coloured)))
    if config.json:
        print(dumps(found if len(answers) > 1 else found[0], indent=1))
    return found


def _texts(source: str) -> list[Answer]:
    """Return the texts that the option names."""
    if source == "-":
        return [Answer(sys.stdin.read())]
    is_file = len(source) < 1000 and "\n" not in source and Path(source).is_file()
    # a text rarely ends like a file
    if not is_file and source.lower().endswith((*READABLE, ".txt", ".md")) and " " not in source:
        raise UserError(f"{source}: no such file")
    if not is_file:
        return [Answer(source)]
    if source.lower().endswith(READABLE):
        return read_answers(source)
    try:
        return [Answer(Path(source).read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from None


def as_json(total: float, parts: list[Part], text: Text) -> dict[str, Any]:
    """Return the score as JSON holds it; spans are [start, end, words] of "text"."""
    rows = []
    for part in parts:
        row: dict[str, Any] = {
            "part": part.name,
            "score": part.score,
            "share": part.share,
            "leaves": part.leaves,
        }
        for kind in SIGNS:
            spans = getattr(part.mark, kind)
            row[kind] = [[*span, text.at(span)] for span in spans]
        rows.append(row | {"note": part.mark.note})
    return {"total": total, "text": text.text, "parts": rows}


def as_lines(
    voice: Voice, total: float, parts: list[Part], text: Text, coloured: bool
) -> list[str]:
    """Return the score as lines for a terminal."""
    lines = [f"{voice.name}: {total:.3f}", "", "part            share  score  leaves  what it saw"]
    for part in parts:
        saw = [] if not part.mark.note else [part.mark.note]
        for kind, sign in SIGNS.items():
            for span in getattr(part.mark, kind)[:6]:
                words = f"{sign}{clip(text.at(span), 40)!r}"
                saw.append(f"{COLOURS[kind]}{words}{PLAIN}" if coloured else words)
        numbers = f"{part.share:5.0%}  {part.score:5.2f}   x{part.leaves:.2f}"
        lines.append(f"{part.name:<15} {numbers}  {'  '.join(saw)}".rstrip())
    return [*lines, "", _coloured(text.text, parts) if coloured else text.text]


def _coloured(text: str, parts: list[Part]) -> str:
    """Return the text with the words that rules touched in colour; what costs wins over what earns."""
    kind_at: dict[int, str] = {}
    for kind in ("good", "near", "bad"):
        for part in parts:
            # a whole sentence in colour would hide the words
            spans: list[Span] = [] if part.name == "sentences" else getattr(part.mark, kind)
            for start, end in spans:
                kind_at.update(dict.fromkeys(range(start, end), kind))
    pieces, last = [], None
    for place, letter in enumerate(text):
        kind = kind_at.get(place)
        if kind != last:
            pieces.append(COLOURS[kind] if kind else PLAIN)
        pieces.append(letter)
        last = kind
    return "".join([*pieces, PLAIN] if last else pieces)
