"""Who said what: agreement and reliability of the annotators behind the rows."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from rlhf.data import sources
from rlhf.data.agreement import agreement_summary, kappa_interval, ratings_of
from rlhf.data.prepare.cleaning import spoken
from rlhf.data.records import Preference, Record, normalise
from rlhf.data.split import answer_pair
from rlhf.data.votes import Vote


def summary(names: Sequence[str], records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By source, what `agreement_summary` says: of a store all its votes, of other rows those that name an annotator.

    A source with nobody named has no entry.
    """
    found = {}
    for name in names:
        if sources.is_store(name):
            found[name] = of_store(name)
    stores = {Path(re.sub(r"@\d+$", "", name)).name for name in names if sources.is_store(name)}
    named = [r for r in records if r.annotator is not None and isinstance(r, Preference) and r.source not in stores]
    if named:
        found["rows that name an annotator"] = with_kappas(_as_votes(named))
    return found


def of_store(name: str) -> dict[str, Any]:
    """`agreement_summary` of a store ("votes.db", "votes.db@118"), votes on control pairs included."""
    from rlhf.data.store import Store

    path, _, event = name.rpartition("@") if re.search(r"@\d+$", name) else (name, "", "")
    with Store.open(path, readonly=True) as store:
        pairs = store.comparisons() + store.comparisons("control")
        words = {pair["id"]: len(f"{pair['text_a']} {pair['text_b']}".split()) for pair in pairs}
        votes = store.votes(int(event) if event else None)
        return with_kappas(votes, store.controls(), words)


def with_kappas(
    votes: list[Vote], controls: dict[int, str] | None = None, words: dict[int, int] | None = None
) -> dict[str, Any]:
    """`agreement_summary`, and at each kappa its 95 % interval: "low" and "high" (None where there is none)."""
    found = agreement_summary(votes, controls, words)
    by_name: dict[str, dict[Hashable, Hashable]] = {}
    for pair, values in ratings_of([vote for vote in votes if vote.comparison not in (controls or {})]).items():
        for name, value in values.items():
            by_name.setdefault(name, {})[pair] = value
    for entry in found["kappa"]:
        _, low, high = kappa_interval(by_name[entry["one"]], by_name[entry["other"]])
        entry |= {"low": low, "high": high} if math.isfinite(low) else {"low": None, "high": None}
    return found


def _as_votes(records: Sequence[Record]) -> list[Vote]:
    """Rows as votes on (prompt, answer pair): a is the answer that sorts first. Sides and times are not known."""
    numbers: dict[Any, int] = {}
    last: dict[tuple[int, str], Vote] = {}
    for i, r in enumerate(records):
        comparison = numbers.setdefault((spoken(r), answer_pair(r.chosen, r.rejected)), len(numbers))
        choice = "a" if normalise(r.chosen) <= normalise(r.rejected) else "b"
        last[comparison, str(r.annotator)] = Vote(i, comparison, str(r.annotator), choice)
    return list(last.values())


def annotators_in_words(summary: dict[str, Any]) -> list[str]:
    """Markdown of what `agreement_summary` returns: alpha in a sentence, a table of the annotators."""
    header = ["annotator", "votes", "agrees with the rest", "skill", "left", "control pairs", "seconds", "too fast", ""]
    rows = [header, ["---", *["---:"] * 7, "---"]]
    for p in summary["annotators"]:
        skill = "–" if p["skill"] is None else f"{p['skill']:.2f}"
        seconds = "–" if p["seconds"] is None else f"{p['seconds']:.1f}"
        rest, controls, left, fast = (_share(p[name]) for name in ("rest", "controls", "left", "fast"))
        flags = "; ".join(p["flags"])
        rows.append([str(p["annotator"]), str(p["votes"]), rest, skill, left, controls, seconds, fast, flags])
    cells = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return [
        f"{alpha_in_words(summary)}.",
        "",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        *LEGEND,
        *_kappas(summary),
    ]


def _kappas(summary: dict[str, Any]) -> list[str]:
    said = kappas_in_words(summary)
    return ["", f"Cohen's kappa (95 % interval) of every two: {'; '.join(said)}."] if said else []


def kappas_in_words(summary: dict[str, Any]) -> list[str]:
    """ "ann and bob 0.62 [0.41, 0.79] on 80 pairs" for every two, the lowest first, what cannot be computed last."""
    found = sorted(summary["kappa"], key=lambda k: math.inf if k["kappa"] is None else k["kappa"])
    said = []
    for k in found:
        value = "not to be computed" if k["kappa"] is None else f"{k['kappa']:.2f}"
        value += "" if k.get("low") is None else f" [{k['low']:.2f}, {k['high']:.2f}]"
        said.append(
            f"{k['one']} and {k['other']} {value} on {k['pairs']} pairs".replace("|", "\\|").replace("<", "&lt;")
        )
    return said


LEGEND = [
    "Agrees with the rest: of the others' choices on the same pairs, the share that was the same. Skill: of the votes "
    "for a side where one is better, the share for that side (Dawid and Skene 1979). Left: of the votes for a side, "
    "the share for the answer shown left. Intervals are 95 % (Wilson); a remark stands where p < 0.01."
]


def alpha_in_words(summary: dict[str, Any]) -> str:
    alpha, twice = summary["alpha"]["nominal"], summary["pairs_judged_twice"]
    over = f"{twice} of {summary['pairs']} pairs were judged by more than one annotator"
    if alpha["estimate"] is None:
        return f"Krippendorff's alpha cannot be computed: {over}"
    between = "" if alpha["low"] is None else f" [{alpha['low']:.2f}, {alpha['high']:.2f}]"
    return f"Krippendorff's alpha {alpha['estimate']:.2f}{between}; {over}"


def _share(share: dict[str, Any]) -> str:
    if share["estimate"] is None:
        return "–"
    return f"{share['estimate']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
