"""Numbers as words: intervals with the decimals they deserve, what is shown and what is not, lists, counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]
Number = dict[str, Any]  # Estimate.to_dict()
NAMES = {"ppo": "PPO", "dpo": "DPO", "sft": "SFT", "best_of_n": "best of n"}
ENOUGH = 3  # seeds, to speak of a method (MIN_SEEDS of crossed.py)


def verdict(row: dict[str, Any], report: Report) -> int:
    """1 or -1 where the difference is shown to lie on that side of 0, after Holm; else 0. Of what is no claim it is 0:
    a row without an adjusted p, such as one of fewer than ENOUGH seeds."""
    p = row.get("p_adjusted")
    return side(row["difference"]) if p is not None and p < alpha(report) else 0


def decides(n: Number) -> bool:
    """Whether an estimate rests on enough seeds for a verdict on methods."""
    return n["seeds"] >= ENOUGH


def name(method: str) -> str:
    """A method as it is written in text."""
    return NAMES.get(method, method)


def interval(n: Number, *, sign: bool = False, flip: bool = False) -> str:
    """0.12 [0.03, 0.21], with as many decimals as the interval deserves; flip: of the other side over this one."""
    est, low, high = n["estimate"], n["low"], n["high"]
    if flip:
        est, low, high = -est, None if high is None else -high, None if low is None else -low
    plus = "+" if sign and est >= 0 else ""
    text = plus + digits(est, n)
    return text if low is None else f"{text} [{digits(low, n)}, {digits(high, n)}]"


def digits(x: float, n: Number) -> str:
    """x with the decimals that the width of the estimate n calls for; a bound next to 0 is not rounded to it."""
    half = abs(x) / 4 if n["low"] is None else (n["high"] - n["low"]) / 2
    places = 1 if half >= 2 else 2 if half >= 0.02 else 3 if half >= 0.002 else 4
    bounds = [abs(v) for v in (n["low"], n["high"]) if v]
    while places < 4 and any(round(v, places) == 0 for v in bounds):
        places += 1
    return f"{x + 0.0:.{places}f}".replace("-" + f"{0:.{places}f}", f"{0:.{places}f}")


def bound(rows: Sequence[dict[str, Any]]) -> str:
    """The largest difference that the intervals of the rows hold."""
    found = [(max(abs(r["difference"]["low"]), abs(r["difference"]["high"])), r) for r in rows if known(r)]
    if not found:
        return "any difference"
    size, row = max(found, key=lambda f: f[0])
    return digits(size, row["difference"])


def share(n: Number) -> str:
    """A win rate in percent."""
    text = f"{100 * n['estimate']:.1f} %"
    return text if n["low"] is None else f"{text} [{100 * n['low']:.1f}, {100 * n['high']:.1f}]"


def listed(parts: Sequence[str]) -> str:
    """a, b and c; "none" of nothing."""
    *first, last = parts or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def trial(method: str, swept: float | None, report: Report) -> str:
    option = report["methods"].get(method, {}).get("swept")
    return name(method) if swept is None else f"{name(method)} ({option} {swept:g})"


def of(n: Number, report: Report) -> str:
    """5 seeds x 256 prompts; of fewer than three seeds only the models are spoken of."""
    text = f"{counted(n['seeds'], 'seed')} x {prompts(n['groups'], report['unit'])}"
    return text if decides(n) else f"these trained models: {text}"


def prompts(groups: int, unit: dict[str, Any]) -> str:
    return counted(groups, "prompt") if unit["groups"] == unit["prompts"] else counted(groups, "group") + " of prompts"


def counted(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def kl(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


def kls(rows: Sequence[dict[str, Any]]) -> str:
    return listed([kl(r["kl"]) for r in rows]) + (" nat" if [r["kl"] for r in rows] == [1.0] else " nats")


def side(n: Number, null: float = 0.0) -> int:
    if n["low"] is None:
        return 0
    return 1 if n["low"] > null else -1 if n["high"] < null else 0


def known(row: dict[str, Any]) -> bool:
    return row["difference"]["low"] is not None


def alpha(report: Report) -> float:
    return 1 - report["unit"]["level"]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
