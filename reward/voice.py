"""Brand voice from a specification: a YAML file in, a bounded score with its parts out.

Each part of the specification scores a text between 0 and 1, and the total is their weighted geometric mean,

    total = prod_k max(s_k, FLOOR) ^ (w_k / sum_j w_j),

so that a part that fails cannot be bought off by the others, and log total is additive in the parts. docs/voice.md
describes the file; nothing in here knows any brand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import typing
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import UserError, coerce, did_you_mean, read_yaml
from rlhf.data.records import Samples, Scorer, Scores

FLOOR = 0.01  # the least a part counts: a part of weight share p that fails leaves 0.01^p of the score
MISSING_FACT = 0.1  # a fact that is not mentioned is less bad than a wrong one (0)
AVOID_FACTOR = 0.25  # what each use of a word never to use leaves of its part
_SENTENCE_END = re.compile(r"[.!?:;]+(?=\s|$)|\n+")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


@dataclass(frozen=True)
class Use:
    """Words to use: the full mark for `at_least` different ones (all, where there are fewer and it is not given); more
    earn nothing, a stuffed text loses."""

    words: list[str]
    at_least: int = 2
    max_share: float = 0.2  # of all words; above it the mark falls, to 0 at twice that
    inflect: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Avoid:
    """Words never to use: each use leaves a quarter of the part."""

    words: list[str]
    inflect: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Claims:
    """Claims the brand must not make: one of them and the part is 0."""

    forbidden: list[str]
    inflect: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Forms:
    """Accepted forms of the greeting (at the start of the text) or the closing (at its end)."""

    forms: list[str]
    weight: float = 1.0


@dataclass(frozen=True)
class Sentences:
    """Longest sentence allowed, in words; the part reaches 0 at one and a half times that."""

    max_words: int
    weight: float = 1.0


@dataclass(frozen=True)
class Length:
    """Words of the whole text; the part falls to 0 at half of `min_words` and at one and a half times `max_words`."""

    min_words: int = 1
    max_words: int = 1000
    weight: float = 1.0


@dataclass(frozen=True)
class Variety:
    """No repetition: full mark up to a tenth of repeated word pairs, 0 at half of them."""

    weight: float = 1.0


@dataclass(frozen=True)
class Fact:
    """A value of the prompt's metadata that the text must contain.

    said_as: for each possible value, the phrases that express it; phrases of another value are wrong.
    among: all possible values, each expressed by itself. With neither, the value itself must stand in the text.
    """

    among: list[str] = field(default_factory=list)
    said_as: dict[str, list[str]] = field(default_factory=dict)
    inflect: bool = True
    weight: float = 1.0


_SECTIONS: dict[str, type] = {
    "greeting": Forms,
    "closing": Forms,
    "use": Use,
    "avoid": Avoid,
    "claims": Claims,
    "sentences": Sentences,
    "length": Length,
    "variety": Variety,
}
WANTED = {"use": "words", "greeting": "forms", "closing": "forms"}  # what a text is to hold
_KEYS = ("name", "guide", *_SECTIONS, "task", "unended")


class _Text:
    """A cleaned text, its words in lower case, and the runs of letters in it, for finding phrases fast."""

    def __init__(self, text: str):
        self.text = clean(text)
        self.words = _WORD.findall(self.text.lower())
        self.pieces = set(re.findall(r"\w+", self.text.lower()))


@dataclass
class Voice:
    """A loaded specification. `sections` holds the parts that the file names; `facts` those of its `task`."""

    name: str
    guide: str
    sections: dict[str, Any]
    facts: dict[str, Fact]
    unended: float = 1.0
    _patterns: dict[Any, re.Pattern] = field(default_factory=dict, repr=False)
    _starts: dict[Any, set[str]] = field(default_factory=dict, repr=False)

    def score(self, text: str, metadata: dict[str, Any] | None = None, ended: bool = True) -> dict[str, float]:
        """The parts of the score and their "total", all in [0, 1].

        A fact whose key the metadata lacks is left out, and the other weights count for more. A text without a
        word scores 0 in every part. A response that did not end keeps `unended` of its total.
        """
        metadata = metadata or {}
        read = _Text(text)
        facts = {k: f for k, f in self.facts.items() if metadata.get(k) not in (None, "")}
        parts: dict[str, float] = {}
        weights: dict[str, float] = {}
        for name, section in self.sections.items():
            parts[name] = self._part(name, section, read, metadata) if read.words else 0.0
            weights[name] = section.weight
        for key, fact in facts.items():
            parts[f"task/{key}"] = self._fact(fact, read, str(metadata[key])) if read.words else 0.0
            weights[f"task/{key}"] = fact.weight
        total = geometric_mean(parts, weights) if read.words else 0.0
        return {**parts, "total": total * (1.0 if ended else self.unended)}

    def _part(self, name: str, section: Any, text: _Text, metadata: dict) -> float:
        words = text.words
        if name == "use":
            found = [len(self._find(w, text, section.inflect)) for w in section.words]
            share = sum(found) / len(words)
            enough = min(1.0, sum(n > 0 for n in found) / section.at_least)
            return enough * max(0.0, min(1.0, 2 - share / section.max_share))
        if name == "avoid":
            return AVOID_FACTOR ** sum(len(self._find(w, text, section.inflect)) for w in section.words)
        if name == "claims":
            return float(not any(self._find(c, text, section.inflect) for c in section.forbidden))
        if name in ("greeting", "closing"):
            return float(any(self._at_edge(name, form, text.text, metadata) for form in section.forms))
        if name == "sentences":
            longest = max(len(_WORD.findall(s)) for s in _SENTENCE_END.split(text.text))
            return within(longest, 0, section.max_words)
        if name == "length":
            return within(len(words), section.min_words, section.max_words)
        pairs = list(itertools.pairwise(words))
        repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
        return min(1.0, max(0.0, 1 - (repeated - 0.1) / 0.4))

    def _fact(self, fact: Fact, text: _Text, value: str) -> float:
        """1 for the right value alone, 1 / (1 + wrong ones) beside others, MISSING_FACT for none, 0 for wrong ones."""
        ways = fact.said_as or {v: [v] for v in fact.among}
        wanted = ways.get(value, [value])
        spans = [s for phrase in wanted for s in self._find(phrase, text, fact.inflect)]
        wrong = set()
        for other, phrases in ways.items():
            if other != value:
                hits = [s for phrase in phrases for s in self._find(phrase, text, fact.inflect)]
                # "gift card" is not also the wrong answer "card"
                if any(not any(s[0] >= t[0] and s[1] <= t[1] for t in spans) for s in hits):
                    wrong.add(other)
        if spans:
            return 1 / (1 + len(wrong))
        return 0.0 if wrong else MISSING_FACT

    def _find(self, phrase: str, text: _Text, inflect: bool) -> list[tuple[int, int]]:
        """Where the phrase stands in the text, as (start, end)."""
        key = (phrase, inflect)
        if key not in self._patterns:
            self._patterns[key] = phrase_pattern(phrase, inflect)
            self._starts[key] = first_pieces(phrase, inflect)
        starts = self._starts[key]
        if starts and text.pieces.isdisjoint(starts):  # 30 times faster than asking the pattern
            return []
        return [m.span() for m in self._patterns[key].finditer(text.text)]

    def _at_edge(self, edge: str, form: str, text: str, metadata: dict) -> bool:
        """Whether the text starts (greeting) or ends (closing) with the form; {key} is the metadata's value."""
        names = re.findall(r"\{(\w+)\}", form) if not _is_regex(form) else []
        key = (edge, form, *(str(metadata.get(n)) for n in names))
        if key not in self._patterns:
            body = form[1:-1] if _is_regex(form) else r"\W+".join(_form_word(w, metadata) for w in form.split())
            body = rf"^\W*(?:{body})\b" if edge == "greeting" else rf"\b(?:{body})\W*$"
            if len(self._patterns) > 10_000:  # one a customer's name
                self._patterns.clear()
            self._patterns[key] = re.compile(body, re.IGNORECASE)
        return bool(self._patterns[key].search(text))


def geometric_mean(parts: dict[str, float], weights: dict[str, float]) -> float:
    """prod_k max(s_k, FLOOR)^(w_k / sum w), in [FLOOR, 1]; raises ValueError without weight."""
    total = sum(weights.values())
    if total <= 0:
        raise ValueError("no part of the voice has a weight")
    return math.exp(sum(weights[k] * math.log(max(parts[k], FLOOR)) for k in parts) / total)


def within(n: float, low: float, high: float) -> float:
    """1 for low <= n <= high; falls linearly to 0 at low / 2 and at 1.5 high."""
    if n < low:
        return max(0.0, 2 * n / low - 1)
    return max(0.0, min(1.0, 3 - 2 * n / high))


def clean(text: str) -> str:
    """NFKC with straight apostrophes, white space collapsed to one blank (line ends stay)."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
    return re.sub(r"[^\S\n]+", " ", text).strip()


def inflections(word: str) -> set[str]:
    """The regular English forms of a word in lower case: plural, third person, past, -ing, comparative, possessive.

    inflections("try") = {try, tries, tried, trying, tryer, tryest, trier, triest, try's}; words of one or two
    letters have only themselves. Forms that are no words do no harm: they occur in no text.
    """
    word = word.lower()
    forms = {word, word + "'s"}
    if len(word) < 3 or not word.isalpha():
        return {word}
    if word.endswith("e"):
        stems, forms = {word[:-1]}, forms | {word + "s"}
    elif word.endswith("y") and word[-2] not in "aeiou":
        stems, forms = {word, word[:-1] + "i"}, forms | {word[:-1] + "ies"}
        forms |= {word + "ing"}
    elif word.endswith(("s", "x", "z", "ch", "sh", "o")):
        stems, forms = {word}, forms | {word + "es", word + "s"}
    else:
        stems, forms = {word}, forms | {word + "s"}
    if re.search(r"[^aeiou][aeiou][^aeiouwxy]$", word):  # stop -> stopped
        stems.add(word + word[-1])
    forms |= {stem + ending for stem in stems for ending in ("ed", "ing", "er", "est")}
    return forms


def phrase_pattern(phrase: str, inflect: bool = True) -> re.Pattern:
    """A pattern for a word or phrase between word boundaries, any case, each word inflected; /regex/ as it is."""
    if _is_regex(phrase):
        return re.compile(phrase[1:-1], re.IGNORECASE)
    words = []
    for word in clean(phrase).split():
        forms = inflections(word) if inflect else {word.lower()}
        words.append("(?:" + "|".join(re.escape(f) for f in sorted(forms, key=lambda f: (-len(f), f))) + ")")
    return re.compile(r"(?<!\w)" + r"\W+".join(words) + r"(?!\w)", re.IGNORECASE)


def first_pieces(phrase: str, inflect: bool) -> set[str]:
    """The runs of letters that a text holding the phrase must have one of; empty if that cannot be said."""
    words = clean(phrase).lower().split()
    if _is_regex(phrase) or not re.match(r"\w", words[0]):
        return set()
    return {re.match(r"\w+", form)[0] for form in (inflections(words[0]) if inflect else {words[0]})}


def load_voice(path: str | Path) -> Voice:
    """Read and check a specification; raises UserError with the file, the key and the nearest right one."""
    content = read_yaml(path)
    _check_keys(content, _KEYS, str(path))
    if not isinstance(content.get("name"), str) or not content["name"].strip():
        raise UserError(f"{path}: 'name' is missing; a voice needs the name of its brand")
    sections = {}
    for name, cls in _SECTIONS.items():
        if name in content or name == "variety":
            sections[name] = _section(cls, content.get(name, {}), f"{path}: '{name}'")
    if "use" in sections and "at_least" not in content["use"]:  # of one word there are no two
        least = min(Use.at_least, len(_different(sections["use"].words)))
        sections["use"] = dataclasses.replace(sections["use"], at_least=least)
    facts = _facts(content.get("task"), f"{path}: 'task'")
    if set(sections) == {"variety"} and not facts:
        raise UserError(f"{path}: no part to score; give at least one of {', '.join([*_SECTIONS, 'task'])}")
    unended = coerce(content.get("unended", 1.0), float, f"{path}: 'unended'")
    if not 0 <= unended <= 1:
        raise UserError(f"{path}: 'unended': found {unended}, expected the share of the score kept, 0 to 1")
    guide = content.get("guide") or ""
    voice = Voice(content["name"].strip(), coerce(guide, str, f"{path}: 'guide'"), sections, facts, unended)
    if sum(part.weight for part in (*sections.values(), *facts.values())) <= 0:
        raise UserError(f"{path}: all weights are 0; give at least one part a 'weight' above 0")
    for check in (_check_bounds, _check_wanted, _check_facts):
        try:
            check(voice)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return voice


def voice_scorer(path: str | Path, name: str = "voice") -> Scorer:
    """A Scorer of the voice at `path`; breakdown keys are "<name>/<part>", nan where a row's part was left out."""
    voice = load_voice(path)

    def score(samples: Samples) -> Scores:
        rows = [
            voice.score(text, metadata, ended)
            for text, metadata, ended in zip(samples.responses, samples.metadata, samples.ended, strict=True)
        ]
        parts = list(dict.fromkeys(part for row in rows for part in row if part != "total"))
        breakdown = {f"{name}/{part}": [row.get(part, math.nan) for row in rows] for part in parts}
        return Scores([row["total"] for row in rows], breakdown)

    return score


def _check_bounds(voice: Voice) -> None:
    """Raise UserError where no text can earn the full mark, because two numbers contradict each other."""
    use, length, sentences = (voice.sections.get(name) for name in ("use", "length", "sentences"))
    if length and length.min_words > length.max_words:
        raise UserError(f"'length': min_words {length.min_words} is above max_words {length.max_words}")
    if use:
        different = _different(use.words)
        if use.at_least > len(different):
            raise UserError(f"'use': at_least {use.at_least} is above its {len(different)} different words")
        if use.max_share > 1:
            raise UserError(f"'use': max_share {use.max_share:g} is above 1, all words of a text")
        if length and use.at_least > use.max_share * length.max_words:
            raise UserError(
                f"'use': at_least {use.at_least} is above max_share {use.max_share:g} of 'length' max_words "
                f"{length.max_words}, so a text with enough of them has too many"
            )
    edges = {name: voice.sections[name].forms for name in ("greeting", "closing") if name in voice.sections}
    least = {name: min(map(_form_length, forms)) for name, forms in edges.items()}
    if length and sum(least.values()) > length.max_words:
        raise UserError(f"'length': max_words {length.max_words} is too few for {' and '.join(least)}")
    for name, words in least.items():
        if sentences and words > sentences.max_words:
            raise UserError(f"'sentences': max_words {sentences.max_words} is too few for every form of '{name}'")


def _different(phrases: typing.Iterable[str]) -> set[str]:
    return {clean(phrase).lower() for phrase in phrases}


def _form_length(form: str) -> int:
    """Words of the form's longest sentence; of a regular expression nothing is known."""
    return 0 if _is_regex(form) else max(len(_WORD.findall(part)) for part in _SENTENCE_END.split(clean(form)))


def _check_wanted(voice: Voice) -> None:
    """Raise UserError where what one part asks for is what another punishes."""
    wanted = {name: getattr(voice.sections[name], key) for name, key in WANTED.items() if name in voice.sections}
    for name, fact in voice.facts.items():
        wanted[f"task/{name}"] = [*fact.among, *itertools.chain(*fact.said_as.values())]
    for part, key in (("avoid", "words"), ("claims", "forbidden")):
        section = voice.sections.get(part)
        for phrase in getattr(section, key, []):
            pattern = phrase_pattern(phrase, section.inflect)
            for name, texts in wanted.items():
                found = next((text for text in texts if not _is_regex(text) and pattern.search(clean(text))), None)
                if found is not None:
                    raise UserError(f"'{name}' asks for {found!r}, which '{part}' punishes as {phrase!r}")


def _check_facts(voice: Voice) -> None:
    """Raise UserError where two values of a fact are said alike, or one cannot be said at all."""
    for name, fact in voice.facts.items():
        ways = fact.said_as or {f"{value} (entry {i})": [value] for i, value in enumerate(fact.among, 1)}
        owner: dict[str, str] = {}
        for value, phrases in ways.items():
            if not phrases:
                raise UserError(f"'task': fact '{name}': {value!r} has no phrase that says it")
            for phrase in _different(phrases):
                if owner.setdefault(phrase, value) != value:
                    raise UserError(f"'task': fact '{name}': {phrase!r} says both {owner[phrase]!r} and {value!r}")


def _facts(task: Any, where: str) -> dict[str, Fact]:
    if task is None:
        return {}
    if not isinstance(task, dict):
        raise UserError(f"{where}: expected 'facts:' with one entry a metadata key, found {task!r}")
    _check_keys(task, ("facts",), where)
    if not isinstance(task.get("facts"), dict) or not task["facts"]:
        raise UserError(
            f"{where}: 'facts' must map metadata keys to what is asked of them, found {task.get('facts')!r}"
        )
    facts = {str(k): _section(Fact, v or {}, f"{where}: fact '{k}'") for k, v in task["facts"].items()}
    for key, fact in facts.items():
        if fact.among and fact.said_as:
            raise UserError(f"{where}: fact '{key}' has both 'among' and 'said_as'; keep one")
    return facts


def _section(cls: type, content: Any, where: str) -> Any:
    """Build a section's dataclass from YAML, checking names, types, ranges and regular expressions."""
    if not isinstance(content, dict):
        raise UserError(
            f"{where}: expected keys {', '.join(f.name for f in dataclasses.fields(cls))}, found {content!r}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _check_keys(content, fields, where)
    hints = typing.get_type_hints(cls)
    for name, f in fields.items():
        if name not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: '{name}' is missing")
    values = {k: coerce(v, hints[k], f"{where}: '{k}'") for k, v in content.items()}
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and (not math.isfinite(value) or value < 0):
            raise UserError(f"{where}: '{name}': found {value}, expected a number from 0 up")
        if name in ("at_least", "max_words", "max_share") and value == 0:
            raise UserError(f"{where}: '{name}': found 0, expected a number above 0")
        texts = (
            value
            if isinstance(value, list)
            else [t for ts in value.values() for t in ts]
            if isinstance(value, dict)
            else []
        )
        if name in ("words", "forms", "forbidden") and not texts:
            raise UserError(f"{where}: '{name}' is empty; leave the section out instead")
        _check_phrases(texts, f"{where}: '{name}'")
    return cls(**values)


def _check_phrases(phrases: list[str], where: str) -> None:
    for phrase in phrases:
        if not phrase.strip():
            raise UserError(f"{where}: has an empty phrase, which would match everywhere")
        if _is_regex(phrase):
            try:
                matches_nothing = re.compile(phrase[1:-1]).match("")
            except re.error as error:
                raise UserError(f"{where}: {phrase} is not a regular expression: {error}") from None
            if matches_nothing:
                raise UserError(f"{where}: {phrase} matches the empty text, so it would match everywhere")


def _check_keys(content: dict, known: typing.Iterable[str], where: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            raise UserError(
                f"{where}: unknown key '{key}'.{did_you_mean(str(key), known)} Known keys: {', '.join(known)}"
            )


def _is_regex(phrase: str) -> bool:
    return len(phrase) > 2 and phrase.startswith("/") and phrase.endswith("/")


def _form_word(word: str, metadata: dict) -> str:
    """One word of a form as a pattern: punctuation at its edges is free, {key} is the metadata's value or any word."""
    placeholder = re.fullmatch(r"\W*\{(\w+)\}\W*", word)
    if placeholder:
        value = metadata.get(placeholder[1])
        return re.escape(clean(str(value))) if value not in (None, "") else r"[\w'-]+"
    return re.escape(clean(word).strip(",.!;:"))
