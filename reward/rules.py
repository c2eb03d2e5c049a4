"""Rule rewards: scores by a pattern or a count. Each is a function (text, metadata, **options) ->
float.

Scores lie in [0, 1], 1 is right. RULES gives the names that a scorer specification uses:

    - {rule: length, low: 5, high: 60, weight: 0.5}
    - {rule: must_not_match, pattern: "(?i)as an ai"}
"""

import re
from collections.abc import Callable
from typing import Any

from rlhf.errors import UserError

# quotes and brackets that may follow the end of a sentence
CLOSING = "\"')]}»”’*_"


def length(text: str, metadata: dict[str, Any], *, low: int = 1, high: int = 200) -> float:
    """Return 1 for low to high words, words / low below that, and high / words above."""
    words = len(text.split())
    if words < low:
        return words / low
    return 1.0 if words <= high else high / words


def must_match(text: str, metadata: dict[str, Any], *, pattern: str) -> float:
    """Return 1 where the regular expression matches anywhere in the text, else 0."""
    return float(re.search(pattern, text) is not None)


def must_not_match(text: str, metadata: dict[str, Any], *, pattern: str) -> float:
    """Return 0 where the regular expression matches anywhere in the text, else 1."""
    return 1.0 - must_match(text, metadata, pattern=pattern)


def no_repetition(text: str, metadata: dict[str, Any], *, n: int = 3) -> float:
    """Return the share of distinct n-grams among those of the text's case-folded words; 1 when
    nothing repeats.
    """
    # "No no" repeats a word
    words = text.casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def ends_properly(text: str, metadata: dict[str, Any], *, endings: str = ".!?") -> float:
    """Return 1 where the text ends with one of `endings`, apart from closing quotes and brackets,
    else 0.
    """
    return float(text.rstrip().rstrip(CLOSING).endswith(tuple(endings)))


RULES: dict[str, Callable[..., float]] = {
    "length": length,
    "must_match": must_match,
    "must_not_match": must_not_match,
    "no_repetition": no_repetition,
    "ends_properly": ends_properly,
}


def check_rule_options(name: str, options: dict[str, Any], where: str = "scorers") -> None:
    """Raise UserError, naming `where`, for values that cannot work, such as a lower bound above the
    upper one.
    """
    place = f"{where}: rule '{name}'"
    if "pattern" in options:
        pattern = options["pattern"]
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"{place}: pattern {pattern!r} is not a regular expression: {error}"
            ) from None
    for key in ("low", "high", "n"):
        if key in options and (type(options[key]) is not int or options[key] < 1):
            raise UserError(
                f"{place}: '{key}' is {options[key]!r}, expected a whole number from 1 up"
            )
    # one bound may contradict the default of the other
    low, high = options.get("low", 1), options.get("high", 200)
    if name == "length" and low > high:
        raise UserError(f"{place}: low {low} is above high {high}")
    endings = options.get("endings", ".")
    # `ends_properly` strips closing quotes before it looks for an ending
    if name == "ends_properly" and not (
        isinstance(endings, str) and endings.strip().strip(CLOSING)
    ):
        raise UserError(f"{place}: 'endings' is {endings!r}, expected characters such as '.!?'")
