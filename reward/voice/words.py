"""A brand voice in plain words: for those who judge by it, and for the one who wrote its file."""

from typing import Any

from reward.voice.phrases import plain_phrase, quoted
from reward.voice.scorer import FLOOR, Voice
from rlhf.collect.guide import Guide

# examples that the guide shows
EXAMPLES = 3


def voice_guide(voice: Voice) -> Guide:
    """Return the guide of a voice for those who judge by it: its prose, its phrases, its rules in
    sentences, and texts as it writes them and as it does not.
    """
    written = [example.do for example in voice.examples if example.do]
    unlike = [example.dont for example in voice.examples if example.dont]
    lists = {
        "Begins with": voice.greeting and voice.greeting.phrases,
        "Ends with": voice.closing and voice.closing.phrases,
        "Words we like": voice.use and voice.use.phrases,
        "Words we never use": voice.avoid and voice.avoid.words,
        "Claims we never make": voice.claims and voice.claims.words,
        "We write": written[:EXAMPLES],
        "We do not write": unlike[:EXAMPLES],
    }
    rules = []
    if voice.sentences:
        rules.append(f"Sentences have at most {voice.sentences.max_words} words.")
    if voice.length and voice.length.model_fields_set & {"min_words", "max_words"}:
        rules.append(_sentence(voice.length.explain()))
    for name in ("reading", "person", "contractions", "emoji", "punctuation"):
        if name in voice.sections:
            rules.append(_sentence(voice.sections[name].explain()))
    shown = []
    for title, phrases in lists.items():
        if phrases:
            shown.append((title, list(map(plain_phrase, phrases))))
    text = " ".join((voice.guide or "").split())
    return Guide(name=voice.name, text=text, lists=shown, rules=rules)


def explain(voice: Voice) -> list[dict[str, Any]]:
    """Return {"part", "rule", "fails"} of each part: its rule as half a sentence, and what is left of
    the score where it fails and all other parts hold (1 for a weight of 0).
    """
    weights = voice.weights()
    whole = sum(weights.values())
    rules = {name: section.explain() for name, section in voice.sections.items()}
    for key, fact in voice.facts.items():
        values = [*fact.choices, *fact.phrasings]
        which = f", and none of its other {len(values) - 1} values" if len(values) > 1 else ""
        rules[f"task/{key}"] = f"the text says the {key} of the prompt's metadata{which}"
    for name, wanted in voice.wanted_tone.items():
        rules[f"tone/{name}"] = f"a judge measures {wanted:g}, between 0 and 1"

    parts = []
    for name, rule in rules.items():
        parts.append({"part": name, "rule": rule, "fails": FLOOR ** (weights[name] / whole)})
    return parts


def remarks(voice: Voice) -> list[str]:
    """Return what a writer may not expect of the file: what is left out, and when."""
    found = []
    denials = voice.claims.denials(exact=voice.credit == "exact") if voice.claims else ()
    if denials:
        words = quoted(list(denials), "or", most=3)
        found.append(f'a claim is none up to four words after {words}, as in "not unbreakable"')
    if voice.facts:
        keys = ", ".join(voice.facts)
        found.append(f"facts ({keys}) count only for prompts whose metadata has them")
    if voice.sliders:
        found.append(
            f"the tone ({', '.join(voice.sliders)}) counts only where a judge is given: "
            "{voice: FILE, judge: {http: URL}}"
        )
    if voice.truncated < 1:
        found.append(f"a response that was cut off keeps {voice.truncated:g} of its score")
    if voice.credit == "exact":
        found.append(
            "credit: exact: what is nearly right earns nothing, so that answers may all score alike"
        )
    if not voice.examples:
        found.append("no examples; with do and dont pairs this command tries the file on them")
    if not voice.guide:
        found.append("no guide; the people who judge by this voice are shown its lists alone")
    return found


def _sentence(rule: str) -> str:
    return rule[0].upper() + rule[1:] + "."
