"""Check what a scorer returns: one finite number a sample, and parts that are numbers or NaN."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

from rlhf.data.records import BadScore, Samples, Scores
from rlhf.errors import UserError
from rlhf.text import clip


def checked_scores(name: str, scorer: Callable[[Samples], Any], samples: Samples) -> Scores:
    """Return the scorer's result as Scores of floats.

    NaN in a part of the breakdown says that the part does not apply to that sample. Raises
    BadScore, with the sample, for any other number that is not finite, and UserError, with a
    prompt, for a wrong count or something that is not a number.
    """
    try:
        result = scorer(samples)
    except Exception as error:
        # the traceback shows the user's code, but not which of several scorers it was
        error.add_note(f"(raised inside scorer '{name}', on {len(samples)} samples)")
        raise

    # a plain function may return its list alone
    scores = result if isinstance(result, Scores) else Scores(result)
    if not isinstance(scores.breakdown, dict):
        found = type(scores.breakdown).__name__
        raise UserError(
            f"scorer '{name}': the breakdown is {found}, expected a dict.\n{first_prompt(samples)}"
        )

    breakdown = {}
    for part, values in scores.breakdown.items():
        breakdown[str(part)] = _numbers(name, values, samples, str(part))
    return Scores(_numbers(name, scores.total, samples), breakdown)


def first_prompt(samples: Samples) -> str:
    """Return a line for messages that shows which batch is meant."""
    return (
        f"  first prompt of the batch: {_prompt(samples, 0) if len(samples) else '(it is empty)'}"
    )


def _numbers(name: str, values: Any, samples: Samples, part: str | None = None) -> list[float]:
    label = f"scorer '{name}'" if part is None else f"scorer '{name}', part '{part}'"

    # arrays of numpy and torch
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        found = f"{label} returned {type(values).__name__}, expected a list of {len(samples)} numbers or Scores"
        raise UserError(f"{found}.\n{first_prompt(samples)}")
    if len(values) != len(samples):
        found = f"{label} returned {len(values)} scores for {len(samples)} samples"
        raise UserError(f"{found}.\n{first_prompt(samples)}")

    numbers = list(map(_as_float, values))
    for i, number in enumerate(numbers):
        if number is not None and (
            math.isfinite(number) or (part is not None and math.isnan(number))
        ):
            continue
        message = (
            f"{label} returned {clip(repr(values[i]), 120)} for sample {i}, expected a finite number.\n"
            f"  prompt: {_prompt(samples, i)}\n  response: {clip(samples.responses[i], 120)!r}"
        )
        raise UserError(message) if number is None else BadScore(message, name, i, number)
    return numbers


def _as_float(value: Any) -> float | None:
    number = None
    if hasattr(value, "__float__"):
        # an integer of 400 digits overflows
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    return number


def _prompt(samples: Samples, i: int) -> str:
    return repr(clip(samples.prompts[i][-1]["content"], 120))
