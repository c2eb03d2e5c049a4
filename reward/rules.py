"""Rule rewards: what a pattern or a count can judge. Each is a function (text, metadata, options) -> float.

Scores lie in [0, 1], 1 is right. RULES gives the names that a scorer specification uses:

    - {rule: length, low: 5, high: 60, weight: 0.5}
    - {rule: must_not_match, pattern: "(?i)as an ai"}
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rlhf.config import UserError

CLOSING = "\"')]}»”’*_"  # quotes and brackets that may follow a sentence's end


def length(text: str, metadata: dict[str, Any], *, low: int = 1, high: int = 200) -> float:
    """1 with low to high words; below, words / low; above, high / words."""
    words = len(text.split())
    if words < low:
        return words / low
    return 1.0 if words <= high else high / words


def must_match(text: str, metadata: dict[str, Any], *, pattern: str) -> float:
    """1 where the regular expression is found anywhere in the text, else 0."""
    return float(re.search(pattern, text) is not None)


def must_not_match(text: str, metadata: dict[str, Any], *, pattern: str) -> float:
    """0 where the regular expression is found anywhere in the text, else 1."""
    return 1.0 - must_match(text, metadata, pattern=pattern)


def no_repetition(text: str, metadata: dict[str, Any], *, n: int = 3) -> float:
    """The share of different n-grams among the n-grams of the text's words, case folded; 1 when nothing repeats."""
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def ends_properly(text: str, metadata: dict[str, Any], *, endings: str = ".!?") -> float:
    """1 where the text ends with one of `endings`, closing quotes and brackets aside, else 0."""
    return float(text.rstrip().rstrip(CLOSING).endswith(tuple(endings)))


RULES: dict[str, Callable[..., float]] = {
    "length": length,
    "must_match": must_match,
    "must_not_match": must_not_match,
    "no_repetition": no_repetition,
    "ends_properly": ends_properly,
}


def check_rule_options(name: str, options: dict[str, Any]) -> None:
    """Raises UserError on values that cannot work: bounds the wrong way round, a pattern that is no pattern."""
    if "pattern" in options:
        try:
            re.compile(options["pattern"])
        except (re.error, TypeError) as error:
            raise UserError(
                f"rule '{name}': pattern {options['pattern']!r} is no regular expression: {error}"
            ) from None
    for key in ("low", "high", "n"):
        if key in options and (type(options[key]) is not int or options[key] < 1):
            raise UserError(f"rule '{name}': '{key}' is {options[key]!r}, expected a whole number from 1 up")
    if name == "length" and options.get("low", 1) > options.get("high", 200):
        raise UserError(f"rule 'length': low {options.get('low', 1)} is above high {options.get('high', 200)}")
    endings = options.get("endings", ".")
    if name == "ends_properly" and not (isinstance(endings, str) and endings.strip().strip(CLOSING)):
        raise UserError(f"rule 'ends_properly': 'endings' is {options['endings']!r}, expected characters such as '.!?'")
