"""What a brand voice can score in languages other than English."""

import re
from typing import Any

# written without blanks between words, which every part counts or looks for
WITHOUT_BLANKS = ("zh", "ja", "th", "lo", "km", "my")

# parts that count syllables, pronouns or contractions of English, and what else can be used
ENGLISH_ONLY = {
    "person": "list the pronouns under 'avoid' or 'use'",
    "contractions": "list the forms under 'avoid' or 'use'",
}

# sections whose words are inflected as in English
INFLECTED = ("use", "avoid", "claims")


def check_language(language: str) -> str:
    """Return the code of a language. Raises ValueError for one that is none, or has no blanks."""
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", language):
        raise ValueError(f"found {language!r}, expected a code such as en, de or pt-BR")
    if language.partition("-")[0] in WITHOUT_BLANKS:
        raise ValueError(
            f"{language!r} is written without blanks between words, which no part can count; "
            "score it with a judge (docs/rewards.md) instead"
        )
    return language


def without_english(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a specification, not yet checked, as its language needs it: in another one than English
    nothing is inflected and claims have no negations unless the file lists them.

    Raises ValueError for a part that needs English.
    """
    language = spec.get("language", "en")
    if not isinstance(language, str) or language.partition("-")[0] == "en":
        return spec
    for name, instead in ENGLISH_ONLY.items():
        if spec.get(name) is not None:
            raise ValueError(f"'{name}' needs English, and the language is {language!r}; {instead}")
    reading = spec.get("reading")
    if isinstance(reading, dict) and reading.get("formula", "flesch_kincaid") != "lix":
        raise ValueError(
            f"'reading' by flesch_kincaid needs English, and the language is {language!r}; "
            "use formula: lix"
        )

    changed = dict(spec)
    for name in INFLECTED:
        if isinstance(spec.get(name), dict):
            changed[name] = _literal(spec[name], name, language)
    if isinstance(changed.get("claims"), dict):
        changed["claims"] = {"negations": []} | changed["claims"]
    task = spec.get("task")
    if isinstance(task, dict) and isinstance(task.get("facts"), dict):
        facts = {}
        for key, fact in task["facts"].items():
            # a fact without settings of its own
            own = {} if fact is None else fact
            facts[key] = _literal(own, f"task.facts.{key}", language)
        changed["task"] = task | {"facts": facts}
    return changed


def _literal(section: Any, name: str, language: str) -> Any:
    """Return a section whose phrases are found as they are written. Raises ValueError where it asks
    for their inflections.
    """
    if not isinstance(section, dict):
        return section
    if section.get("inflect"):
        raise ValueError(
            f"'{name}': inflect: true knows the inflections of English, and the language is "
            f"{language!r}; list the forms, or use a regular expression"
        )
    return section | {"inflect": False}
