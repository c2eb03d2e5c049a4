"""Brand voice from a specification: a YAML file in, a bounded score with its parts out.

Each part of the specification scores a text between 0 and 1, and the total is their weighted
geometric mean,

    total = prod_k max(s_k, FLOOR) ^ (w_k / sum_j w_j),

so that a part that fails cannot be compensated by the others, and log total is additive in the
parts. docs/rewards.md describes the file; nothing in here knows any brand.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    Field,
    StringConstraints,
    model_validator,
)

from reward.phrases import (
    Text,
    clean,
    distinct,
    is_regex,
    phrase_pattern,
    plain_phrase,
)
from reward.voice_parts import (
    Avoid,
    Claims,
    Closing,
    Fact,
    Greeting,
    Length,
    Section,
    Sentences,
    Task,
    Use,
    Variety,
)
from rlhf.collect.guide import Guide
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.validation import Number, Spec, validate
from rlhf.values import read_yaml

# the least a part counts: a part with weight share p that fails leaves 0.01^p of the score
FLOOR = 0.01


class Voice(Spec):
    """A brand voice. Its parts are the sections that the file names, `variety`, and the facts of
    its `task`.
    """

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    # for the people who write and judge; not scored
    guide: str | None = None

    # None: not in the file, and so no part of the score
    greeting: Greeting = None
    closing: Closing = None
    use: Use = None
    avoid: Avoid = None
    claims: Claims = None
    sentences: Sentences = None
    length: Length = None
    variety: Variety = Variety()
    task: Task | None = None

    # the share of the total that a response keeps which was cut off
    truncated: Number = Field(
        1.0, ge=0, le=1, validation_alias=AliasChoices("truncated", "unended")
    )

    @functools.cached_property
    def sections(self) -> dict[str, Section]:
        """The sections of the file by name, in the order in which they are declared here."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in found.items() if isinstance(section, Section)}

    @property
    def facts(self) -> dict[str, Fact]:
        """The facts of the task by their key in the metadata."""
        return self.task.facts if self.task else {}

    @model_validator(mode="after")
    def _check(self) -> Voice:
        if set(self.sections) == {"variety"} and not self.facts:
            raise ValueError(
                "no part to score; add a section such as greeting, use, claims, length or task"
            )
        # a mean needs a weight
        if sum(part.weight for part in (*self.sections.values(), *self.facts.values())) <= 0:
            raise ValueError("all weights are 0; give at least one part a 'weight' above 0")
        _check_bounds(self)
        _check_contradictions(self)
        return self

    def score(
        self, text: str, metadata: dict[str, Any] | None = None, ended: bool = True
    ) -> dict[str, float]:
        """Return the parts of the score and their "total", all in [0, 1].

        A fact whose key the metadata lacks is left out, and the other weights count for more. A
        text without a word scores 0 in every part. A response that did not end keeps `truncated` of
        its total.
        """
        metadata = metadata or {}
        # words and pieces are found once for all parts
        read = Text(text)
        facts = {
            key: fact for key, fact in self.facts.items() if metadata.get(key) not in (None, "")
        }
        rules = self.sections | {f"task/{key}": fact for key, fact in facts.items()}
        # every part about words would divide by none of them
        if not read.words:
            return {**dict.fromkeys(rules, 0.0), "total": 0.0}

        parts = {name: section.score(read, metadata) for name, section in self.sections.items()}
        for key, fact in facts.items():
            parts[f"task/{key}"] = fact.score_value(read, str(metadata[key]))
        total = geometric_mean(parts, {name: rule.weight for name, rule in rules.items()})
        return {**parts, "total": total if ended else total * self.truncated}


def geometric_mean(parts: dict[str, float], weights: dict[str, float]) -> float:
    """Return prod_k max(s_k, FLOOR)^(w_k / sum w), in [FLOOR, 1]. Raises ValueError without weight."""
    total = sum(weights.values())
    if total <= 0:
        raise ValueError("no part of the voice has a weight")
    return math.exp(sum(weights[k] * math.log(max(parts[k], FLOOR)) for k in parts) / total)


def load_voice(path: str | Path) -> Voice:
    """Read and check a specification. Raises UserError with the file, the key and the nearest right
    one.
    """
    return validate(Voice, read_yaml(path), f"{path}, voice")


def voice_scorer(path: str | Path, name: str = "voice") -> Scorer:
    """Return a scorer of the voice at `path`.

    Breakdown keys are "<name>/<part>", with NaN where a part was left out for a sample.
    """
    voice = load_voice(path)

    def score(samples: Samples) -> Scores:
        rows = list(map(voice.score, samples.responses, samples.metadata, samples.ended))
        # prompts differ in the facts that their metadata gives
        parts = dict.fromkeys(itertools.chain.from_iterable(rows))
        breakdown = {}
        for part in parts:
            if part != "total":
                breakdown[f"{name}/{part}"] = [row.get(part, math.nan) for row in rows]
        return Scores([row["total"] for row in rows], breakdown)

    return score


def voice_guide(voice: Voice) -> Guide:
    """Return the guide of a voice for those who judge by it: its prose, its phrases and its rules
    in sentences.
    """
    lists = {
        "Begins with": voice.greeting and voice.greeting.phrases,
        "Ends with": voice.closing and voice.closing.phrases,
        "Words we like": voice.use and voice.use.phrases,
        "Words we never use": voice.avoid and voice.avoid.words,
        "Claims we never make": voice.claims and voice.claims.words,
    }
    rules = []
    if voice.sentences:
        rules.append(f"Sentences have at most {voice.sentences.max_words} words.")
    if voice.length:
        given = voice.length.model_dump(include={"min_words", "max_words"}, exclude_unset=True)
        bounds = {"min_words": "at least {}", "max_words": "at most {}"}
        ranges = " and ".join(bounds[name].format(words) for name, words in given.items())
        rules += [f"The text has {ranges} words."] if ranges else []
    return Guide(
        name=voice.name,
        text=" ".join((voice.guide or "").split()),
        lists=[
            (title, list(map(plain_phrase, phrases))) for title, phrases in lists.items() if phrases
        ],
        rules=rules,
    )


def _check_bounds(voice: Voice) -> None:
    """Raise ValueError where no text can earn the full score, because two numbers contradict each
    other.
    """
    # a policy would be trained towards what no text can reach
    use, length, sentences = voice.use, voice.length, voice.sentences
    if length and length.min_words > length.max_words:
        raise ValueError(
            f"'length': min_words {length.min_words} is above max_words {length.max_words}"
        )
    if use:
        count = len(distinct(use.phrases))
        if use.enough > count:
            raise ValueError(f"'use': at_least {use.enough} is above its {count} different words")
        if use.max_share > 1:
            raise ValueError(f"'use': max_share {use.max_share:g} is above 1, all words of a text")
        if length and use.enough > use.max_share * length.max_words:
            raise ValueError(
                f"'use': at_least {use.enough} is above max_share {use.max_share:g} of 'length' max_words "
                f"{length.max_words}, so a text with enough of them has too many"
            )

    edges = {
        name: part.least_words()
        for name, part in voice.sections.items()
        if isinstance(part, Greeting)
    }
    if length and sum(edges.values()) > length.max_words:
        raise ValueError(
            f"'length': max_words {length.max_words} is too few for {' and '.join(edges)}"
        )
    for name, words in edges.items():
        if sentences and words > sentences.max_words:
            raise ValueError(
                f"'sentences': max_words {sentences.max_words} is too few for every form of '{name}'"
            )


def _check_contradictions(voice: Voice) -> None:
    """Raise ValueError where what one part asks for is what another punishes."""
    asked = {
        name: part.phrases
        for name, part in voice.sections.items()
        if isinstance(part, Greeting | Use)
    }
    for key, fact in voice.facts.items():
        asked[f"task/{key}"] = [*fact.choices, *itertools.chain(*fact.phrasings.values())]

    for punished, part in (("avoid", voice.avoid), ("claims", voice.claims)):
        for phrase in part.words if part else []:
            pattern = phrase_pattern(phrase, part.inflect)
            for name, phrases in asked.items():
                for text in phrases:
                    # what a regular expression matches cannot be listed
                    if not is_regex(text) and pattern.search(clean(text)):
                        raise ValueError(
                            f"'{name}' asks for {text!r}, which '{punished}' punishes as {phrase!r}"
                        )
