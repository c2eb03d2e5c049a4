"""Where a brand voice contradicts itself: what no text can satisfy, and what one part asks for and
another punishes. A policy would be trained towards what cannot be reached.
"""

from collections.abc import Mapping
from typing import Any

from reward.voice.form import Emoji
from reward.voice.parts import Avoid, Fact, Greeting, Section
from reward.voice.phrases import Text, clean, distinct, is_regex, phrase_pattern

# parts that can punish a phrase by itself, besides `avoid` and `claims`
FORMAL = ("person", "contractions", "emoji", "punctuation")


def contradictions(
    sections: Mapping[str, Section], facts: Mapping[str, Fact], *, exact: bool
) -> list[str]:
    """Return every contradiction between the parts of a voice, each as one line that names them."""
    return [*_impossible_bounds(sections), *_punished_phrases(sections, facts, exact=exact)]


def _impossible_bounds(sections: Mapping[str, Any]) -> list[str]:
    """Return the bounds of one section, or of two together, that no text can keep."""
    use, length, sentences = (sections.get(name) for name in ("use", "length", "sentences"))
    found = []
    if length and length.min_words > length.max_words:
        found.append(
            f"'length': min_words {length.min_words} is above max_words {length.max_words}"
        )
    if use:
        found += _bounds_of_use(use, length)
    emoji = sections.get("emoji")
    if isinstance(emoji, Emoji) and emoji.min > emoji.max:
        found.append(f"'emoji': min {emoji.min} is above max {emoji.max}")

    # words of the shortest form of greeting and closing
    least_words = {}
    for name, part in sections.items():
        if isinstance(part, Greeting):
            least_words[name] = part.least_words()
    if length and sum(least_words.values()) > length.max_words:
        found.append(
            f"'length': max_words {length.max_words} is too few for {' and '.join(least_words)}"
        )
    for name, words in least_words.items():
        if sentences and words > sentences.max_words:
            found.append(
                f"'sentences': max_words {sentences.max_words} is too few for every form of '{name}'"
            )
    return found


def _bounds_of_use(use: Any, length: Any) -> list[str]:
    found = []
    count = len(distinct(use.phrases))
    if use.enough > count:
        found.append(f"'use': at_least {use.enough} is above its {count} different words")
    if use.max_share > 1:
        found.append(f"'use': max_share {use.max_share:g} is above 1, all words of a text")
    if length and use.enough > use.max_share * length.max_words:
        found.append(
            f"'use': at_least {use.enough} is above max_share {use.max_share:g} of 'length' max_words "
            f"{length.max_words}, so a text with enough of them has too many"
        )
    return found


def _punished_phrases(
    sections: Mapping[str, Any], facts: Mapping[str, Fact], *, exact: bool
) -> list[str]:
    asked = {name: part.asked for name, part in sections.items()}
    asked |= {f"task/{key}": fact.asked for key, fact in facts.items()}
    wanted = []
    for name, own in asked.items():
        # what a regular expression matches cannot be listed
        wanted += [(name, text) for text in own if not is_regex(text)]
    found = []
    for name, text in wanted:
        for punished in ("avoid", "claims"):
            part = sections.get(punished)
            phrase = _matching(part, text)
            # "no promises" may be asked for where a promise is a claim
            if phrase is not None and part.mark(Text(text), {}, exact=exact).bad:
                found.append(
                    f"'{name}' asks for {text!r}, which '{punished}' punishes as {phrase!r}"
                )
        for punished in FORMAL:
            part = sections.get(punished)
            if part and part.mark(Text(text), {}, exact=exact).bad:
                found.append(
                    f"'{name}' asks for {text!r}, which '{punished}' punishes: {part.explain()}"
                )
    return found


def _matching(part: Avoid | None, text: str) -> str | None:
    """Return the first phrase of a part that a text contains."""
    for phrase in part.words if part else []:
        if phrase_pattern(phrase, part.inflect).search(clean(text)):
            return phrase
    return None
