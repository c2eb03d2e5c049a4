"""Brand voice from a specification: a YAML file in, a bounded score with its parts out.

Each part of the specification scores a text between 0 and 1, and the total is their weighted
geometric mean,

    total = prod_k f(s_k) ^ (w_k / sum_j w_j),     f(s) = FLOOR + (1 - FLOOR) s

so that a part that fails cannot be compensated by the others, log total is additive in the parts,
and a part that is nearly right is better than one that is not. With `credit: exact`, the form of
before, f(s) = max(s, FLOOR). docs/brand-voice.md describes the file; nothing in here knows any brand.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from reward.voice.contradictions import contradictions
from reward.voice.form import (
    Contractions,
    Emoji,
    Length,
    Person,
    Punctuation,
    Reading,
    Sentences,
    Tone,
    Variety,
)
from reward.voice.language import check_language, without_english
from reward.voice.parts import Avoid, Claims, Closing, Fact, Greeting, Mark, Section, Task, Use
from reward.voice.phrases import Text
from reward.voice.tone import check_tone, measure_tone
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.errors import UserError, did_you_mean
from rlhf.text import say_once
from rlhf.validation import Number, Spec, validate
from rlhf.values import read_yaml

# the least a part counts: a part with weight share p that fails leaves 0.01^p of the score
FLOOR = 0.01


class Example(Spec):
    """A text as the brand writes it (`do`), one as it does not (`dont`), or both for one prompt."""

    do: str | None = None
    dont: str | None = None
    why: str | None = None
    # facts of the prompt that the texts answer
    metadata: dict[str, Any] = Field({})
    channel: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Example:
        if not (self.do or self.dont):
            raise ValueError("has no text; give 'do', 'dont' or both")
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """The metadata that its texts are scored with."""
        return self.metadata | ({"channel": self.channel} if self.channel else {})


def _merge_channel(base: dict[str, Any], changes: Any) -> Any:
    """Return the specification of a channel: sections of `changes` change keys of the base's."""
    if not isinstance(changes, dict):
        return changes
    # `credit` is one for all, so that the channels of one file are on one scale
    for key in ("channels", "examples", "credit"):
        if key in changes:
            raise ValueError(f"'{key}' belongs to the whole file, not to a channel")
    merged = dict(base)
    for key in ("channels", "examples"):
        merged.pop(key, None)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merged[key] | value
        elif value is None:
            # nothing after the key: the channel has no such part
            merged.pop(key, None)
        else:
            merged[key] = value
    if changes.get("variety", merged) is None:
        # the one part that is on where the file does not name it
        merged["variety"] = {"weight": 0}
    return merged


class Voice(Spec):
    """A brand voice. Its parts are the sections that the file names, `variety`, the facts of its
    `task`, and the sliders of its `tone` where a judge measures them.
    """

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    # for the people who write and judge; not scored
    guide: str | None = None
    language: Annotated[str, AfterValidator(check_language)] = "en"
    # exact: the scores of before partial credit
    credit: Literal["partial", "exact"] = "partial"

    # None: not in the file, and so no part of the score
    greeting: Greeting = None
    closing: Closing = None
    use: Use = None
    avoid: Avoid = None
    claims: Claims = None
    sentences: Sentences = None
    length: Length = None
    reading: Reading = None
    person: Person = None
    contractions: Contractions = None
    emoji: Emoji = None
    punctuation: Punctuation = None
    variety: Variety = Variety()
    tone: Tone = None
    task: Task | None = None

    # the share of the total that a response keeps which was cut off
    truncated: Number = Field(
        1.0, ge=0, le=1, validation_alias=AliasChoices("truncated", "unended")
    )
    examples: list[Example] = Field([])
    channels: dict[str, Voice] = Field({})

    @functools.cached_property
    def sections(self) -> dict[str, Section]:
        """The sections of the file by name, in the order in which they are declared here."""
        return {name: part for name, part in self if isinstance(part, Section)}

    @property
    def facts(self) -> dict[str, Fact]:
        """The facts of the task by their key in the metadata."""
        return self.task.facts if self.task else {}

    @property
    def wanted_tone(self) -> dict[str, float]:
        """The sliders of the tone with their targets."""
        return self.tone.sliders if self.tone else {}

    @property
    def sliders(self) -> list[str]:
        """Every slider of the tone, also of a channel's."""
        names = dict(self.wanted_tone)
        for voice in self.channels.values():
            names |= voice.wanted_tone
        return list(names)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        """Give each channel the whole specification, and take English out of other languages."""
        if not isinstance(value, dict):
            return value
        value = without_english(value)
        channels = value.get("channels")
        if isinstance(channels, dict):
            whole = {str(name): _merge_channel(value, own) for name, own in channels.items()}
            value = value | {"channels": whole}
        return value

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Voice:
        if set(self.sections) == {"variety"} and not self.facts and not self.tone:
            raise ValueError(
                "no part to score; add a section such as greeting, use, claims, length or task"
            )
        # a mean needs a weight
        parts = [*self.sections.values(), *self.facts.values(), *([self.tone] if self.tone else [])]
        if sum(part.weight for part in parts) <= 0:
            raise ValueError("all weights are 0; give at least one part a 'weight' above 0")
        for number, example in enumerate(self.examples, 1):
            if example.channel and example.channel not in self.channels:
                hint = did_you_mean(example.channel, self.channels)
                raise ValueError(f"examples, item {number}: no channel '{example.channel}'.{hint}")
        # `rlhf voice check` lists them all
        keep = info.context and info.context.get("keep_contradictions")
        found = contradictions(self.sections, self.facts, exact=self.credit == "exact")
        if found and not keep:
            raise ValueError(found[0])
        return self

    def on_channel(self, metadata: dict[str, Any]) -> Voice:
        """Return the voice of the channel that the metadata names, or this one."""
        return self.channels.get(str(metadata.get("channel")), self)

    def marks(
        self,
        text: str | Text,
        metadata: dict[str, Any] | None = None,
        tone: dict[str, float] | None = None,
    ) -> dict[str, Mark]:
        """Return the mark of every part by its name.

        A fact whose key the metadata lacks is left out, and so is a slider that `tone`, what a
        judge measured (0 to 1), lacks. A text without a word scores 0 in every part.
        """
        metadata, tone = metadata or {}, tone or {}
        # words and pieces are found once for all parts
        read = text if isinstance(text, Text) else Text(text)
        exact = self.credit == "exact"
        marks = dict.fromkeys(self.sections, Mark(0.0))
        # every part about words would divide by none of them
        if read.words:
            for name, section in self.sections.items():
                marks[name] = section.mark(read, metadata, exact=exact)
        for key, fact in self.facts.items():
            if metadata.get(key) not in (None, ""):
                marks[f"task/{key}"] = fact.mark_value(read, str(metadata[key]), exact=exact)
        for name in self.wanted_tone:
            if name in tone:
                marks[f"tone/{name}"] = self.tone.mark(name, tone[name])
        return marks if read.words else dict.fromkeys(marks, Mark(0.0))

    def weights(self) -> dict[str, float]:
        """Return the weight of every part that a text may have."""
        weights = {}
        for name, section in self.sections.items():
            weights[name] = section.weight
        for key, fact in self.facts.items():
            weights[f"task/{key}"] = fact.weight
        for name in self.wanted_tone:
            weights[f"tone/{name}"] = self.tone.weight / len(self.tone.sliders)
        return weights

    def total(self, scores: dict[str, float]) -> float:
        """Return the score of parts by name, in [0, 1]."""
        if self.credit == "partial":
            scores = {name: FLOOR + (1 - FLOOR) * score for name, score in scores.items()}
        return geometric_mean(scores, self.weights())

    def score(
        self,
        text: str,
        metadata: dict[str, Any] | None = None,
        ended: bool = True,
        tone: dict[str, float] | None = None,
    ) -> dict[str, float]:
        """Return the parts of the score and their "total", all in [0, 1].

        What is left out is as in `marks`, and the other weights count for more. A response that did
        not end keeps `truncated` of its total. The metadata's "channel" chooses the variant.
        """
        voice = self.on_channel(metadata or {})
        read = Text(text)
        parts = {name: mark.score for name, mark in voice.marks(read, metadata, tone).items()}
        if not read.words:
            return {**parts, "total": 0.0}
        total = voice.total(parts)
        return {**parts, "total": total if ended else total * voice.truncated}


def geometric_mean(parts: dict[str, float], weights: dict[str, float]) -> float:
    """Return prod_k max(s_k, FLOOR)^(w_k / sum w) over the parts, in [FLOOR, 1].

    Raises ValueError without weight.
    """
    total = sum(weights[name] for name in parts)
    if total <= 0:
        raise ValueError("no part of the voice has a weight")
    return math.exp(sum(weights[k] * math.log(max(parts[k], FLOOR)) for k in parts) / total)


def load_voice(path: str | Path, *, keep_contradictions: bool = False) -> Voice:
    """Read and check a specification. Raises UserError with the file, the key and the nearest right
    one; for contradictions too, unless they are kept.
    """
    context = {"keep_contradictions": keep_contradictions}
    return validate(Voice, read_yaml(path), f"{path}, voice", context)


def choose_channel(voice: Voice, channel: str | None, where: str) -> None:
    """Raise UserError, naming `where`, unless the voice has this channel."""
    if channel and channel not in voice.channels:
        known = ", ".join(voice.channels) or "it has none"
        raise UserError(
            f"{where}: no channel '{channel}'.{did_you_mean(channel, voice.channels)} Channels: {known}"
        )


def voice_scorer(
    path: str | Path,
    name: str = "voice",
    channel: str | None = None,
    judge: Scorer | None = None,
) -> Scorer:
    """Return a scorer of the voice at `path`.

    channel: of prompts whose metadata names none. judge: measures the sliders of `tone`, each in
    [0, 1], under its name in the breakdown; it finds them in the metadata under "tone".
    Breakdown keys are "<name>/<part>", with NaN where a part was left out for a sample.
    """
    voice = load_voice(path)
    choose_channel(voice, channel, str(path))
    if judge is not None:
        check_tone(voice.sliders, str(path))
    elif voice.sliders:
        say_once(f"{path}: 'tone' is left out of the score, because no judge is given")

    def score(samples: Samples) -> Scores:
        metadata = samples.metadata
        if channel:
            metadata = [{"channel": channel} | own for own in metadata]
        tones = measure_tone(voice.sliders, judge, samples) if judge else None
        tones = tones or itertools.repeat(None)
        rows = list(map(voice.score, samples.responses, metadata, samples.ended, tones))
        # prompts differ in the facts that their metadata gives
        parts = dict.fromkeys(itertools.chain.from_iterable(rows))
        breakdown = {}
        for part in parts:
            if part != "total":
                breakdown[f"{name}/{part}"] = [row.get(part, math.nan) for row in rows]
        return Scores([row["total"] for row in rows], breakdown)

    return score
