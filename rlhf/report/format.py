"""Format the numbers and names of a report: intervals, win rates, counts, methods with their swept
values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.text import UNKNOWN, with_interval

# The dict of report.json (summary.py) and that of one of its estimates (`Estimate.to_dict`)
Report = dict[str, Any]
Number = Mapping[str, Any]

NAMES = {"ppo": "PPO", "dpo": "DPO", "sft": "SFT", "best_of_n": "best of n"}
SUFFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def method_name(method: str) -> str:
    """Return the name of a method as it is written in text."""
    return NAMES.get(method, method)


def initial_name(report: Report) -> str:
    """Return the name of the initial policy."""
    return method_name(report["initial_policy"]["method"])


def policy_name(method: str, swept: float | None, report: Report) -> str:
    """Return "PPO (kl_coef 0.05)", or the method alone where nothing is swept."""
    if swept is None:
        return method_name(method)
    return f"{method_name(method)} ({report['methods'][method]['swept']} {swept:g})"


def score_name(report: Report, score: str) -> str:
    """Return a score with its kind: "tone", "gold score", "reward_model (proxy)"."""
    kind = report["score_kinds"][score]
    if kind == "other":
        return score
    return f"{kind} score" if kind == score else f"{score} ({kind})"


def main_score(report: Report) -> str | None:
    """Return the score that decides; without one a proxy, else the first score, None if there is no
    score.
    """
    if report["judge"]:
        return report["judge"]
    # a proxy shows at least what was optimised
    kinds = report["score_kinds"]
    return next(iter([*proxies_of(kinds), *kinds]), None)


def proxies_of(score_kinds: Mapping[str, str]) -> list[str]:
    """Return the scores that a method was trained on."""
    return [score for score, kind in score_kinds.items() if kind == "proxy"]


def usual_values(report: Report) -> dict[str, float | None]:
    """Return method -> the swept value that was chosen most often, of the tuned methods."""
    return {method: entry["usual"] for method, entry in report["tuned"]["methods"].items()}


def win_rate_of(report: Report, policy: tuple, other: tuple) -> Number | None:
    """Return the raw win rate of a policy (method, swept value) over another, None where there is
    none.
    """
    wins = report["wins"] or {"policies": []}
    names = [(known["method"], known["swept"]) for known in wins["policies"]]
    if policy not in names or policy == other:
        return None
    return wins["raw"][names.index(policy)][names.index(other)]


def number(value: float | None) -> str:
    """Return about three significant digits, at most three decimals."""
    if value is None:
        return UNKNOWN
    # a longer whole part leaves fewer digits for the decimals
    decimals = 1
    if abs(value) < 10:
        decimals = 3
    elif abs(value) < 100:
        decimals = 2
    return f"{value:.{decimals}f}"


def digits(value: float, estimate: Number) -> str:
    """Return `value` with the decimals that the width of the interval calls for; a bound near 0 is
    not shown as 0.
    """
    low, high = estimate["low"], estimate["high"]
    half = abs(value) / 4 if low is None else (high - low) / 2
    places = _decimals(half)

    # More decimals where a bound would be rounded to 0, which would hide its sign
    bounds = [abs(bound) for bound in (low, high) if bound]
    nearest = min(bounds, default=math.inf)
    while places < 4 and round(nearest, places) == 0:
        places += 1

    # Never "-0.00"
    text = f"{value + 0.0:.{places}f}"
    zero = f"{0:.{places}f}"
    return zero if text == f"-{zero}" else text


def _decimals(half: float) -> int:
    """Return how many decimals mean something where the interval is `half` wide to either side."""
    if half >= 2:
        return 1
    if half >= 0.02:
        return 2
    return 3 if half >= 0.002 else 4


def interval(estimate: Number | None, *, signed: bool = False) -> str:
    """Return "0.12 [0.03, 0.21]"; `signed` puts a plus before differences that are not negative."""
    text = with_interval(estimate, lambda value: digits(value, estimate))
    # an unknown one has no sign
    has_plus = signed and text != UNKNOWN and estimate["estimate"] >= 0
    return f"+{text}" if has_plus else text


def mirrored(estimate: Number) -> dict[str, Any]:
    """Return the difference b - a of an estimate of a - b."""
    low, high = estimate["low"], estimate["high"]
    bounds = {"low": None, "high": None} if low is None else {"low": -high, "high": -low}
    return {**estimate, "estimate": -estimate["estimate"], **bounds}


def largest_difference(estimate: Number) -> str:
    """Return the largest difference, to either side, that the interval holds."""
    if estimate["low"] is None:
        return "any difference"
    return digits(max(abs(estimate["low"]), abs(estimate["high"])), estimate)


def share(estimate: Number | None) -> str:
    """Return a share, such as a win rate, in percent: "60.0 % [50.0, 70.0]"."""
    return with_interval(estimate, lambda value: f"{100 * value:.1f}", " %")


def p_value(p: float | None) -> str:
    """Return an adjusted p; very small ones as "< 0.001"."""
    if p is None:
        return UNKNOWN
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def nats(kl: float) -> str:
    """Return a KL in nats: two digits below 10, none after the point above."""
    return f"{kl:.2g}" if kl < 10 else f"{kl:.0f}"


def amount(value: float | None) -> str:
    """Return a count in short: 1234567 is 1.23M."""
    if value is None:
        return UNKNOWN
    for limit, suffix in SUFFIXES:
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def counted(n: int | float, word: str) -> str:
    """Return "1 seed", "5 seeds"."""
    return f"{n:g} {word}" + ("" if n == 1 else "s")


def listed(parts: Sequence[str]) -> str:
    """Return "a, b and c", and "none" for nothing."""
    *first, last = parts or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def basis(estimate: Number, report: Report) -> str:
    """Return what an estimate rests on: "5 seeds x 256 prompts"."""
    unit = report["unit"]
    word = "prompt" if unit["groups"] == unit["prompts"] else "prompt group"
    groups = counted(estimate["groups"], word)
    # single runs have one nominal seed
    if report["kind"] == "runs":
        return groups
    return f"{counted(estimate['seeds'], 'seed')} x {groups}"
