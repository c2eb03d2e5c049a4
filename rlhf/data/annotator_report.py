"""What agreement and reliability say about the annotators behind the rows, for data cards, reports
and the terminal.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data import sources
from rlhf.data.agreement import FEWEST, agreement_summary
from rlhf.data.conversation import dialogue_text
from rlhf.data.records import Preference, Record, normalise
from rlhf.data.split import answer_pair
from rlhf.data.store_queries import StoreView
from rlhf.data.votes import Vote
from rlhf.text import UNKNOWN, escape_cell, markdown_table, with_interval

HEADER = (
    "annotator",
    "votes",
    "agrees with the rest",
    "skill",
    "left",
    "control pairs",
    "seconds",
    "too fast",
    "",
)
LEGEND = (
    "Agrees with the rest: of the others' choices on the same pairs, the share that was the same. Skill: of the votes "
    "for a side where one is better, the share for that side (Dawid and Skene 1979). Left: of the votes for a side, "
    "the share for the answer shown left. Intervals are 95 % (Wilson); a remark stands where p < 0.01, "
    f"from {FEWEST} votes on."
)
TWO_DIGITS = "{:.2f}".format


def annotator_summaries(
    names: Sequence[str], records: Sequence[Record]
) -> dict[str, dict[str, Any]]:
    """Return `agreement_summary` by source: all votes of a store, and of other rows those that name
    an annotator.

    A source whose rows name no annotator has no entry.
    """
    summaries, stores = {}, set()
    # a store has what its pairs have lost: ties, skips, times, sides
    for name in filter(sources.is_store, names):
        summaries[name] = store_summary(name)
        stores.add(Path(sources.split_event(name)[0]).name)

    rows = [
        r
        for r in records
        if isinstance(r, Preference) and r.annotator is not None and r.source not in stores
    ]
    if rows:
        summaries["rows that name an annotator"] = agreement_summary(_as_votes(rows))
    return summaries


def store_summary(name: str) -> dict[str, Any]:
    """Return `agreement_summary` of a store ("votes.db", "votes.db@118"), votes on control pairs
    included.
    """
    from rlhf.data.store import Store

    path, event = sources.split_event(name)
    with Store.open(path, readonly=True) as store:
        return view_summary(store.at(event))


def view_summary(view: StoreView) -> dict[str, Any]:
    """Return `agreement_summary` of a store after an event, votes on control pairs included."""
    words = {}
    for id, pair in view.pairs().items():
        words[id] = len(f"{pair['text_a']} {pair['text_b']}".split())
    return agreement_summary(view.votes(), view.controls(), words)


def _as_votes(records: Sequence[Preference]) -> list[Vote]:
    """Return rows as votes on (prompt, answer pair), where a is the answer that sorts first.

    Which side an answer was shown on and how long a vote took are not known. The last vote of an
    annotator counts.
    """
    numbers: dict[Any, int] = {}
    last: dict[tuple[int, str], Vote] = {}
    for event, record in enumerate(records):
        pair = (dialogue_text(record), answer_pair(record.chosen, record.rejected))
        comparison = numbers.setdefault(pair, len(numbers))
        # which of two texts is called a must not depend on who won
        choice = "a" if normalise(record.chosen) <= normalise(record.rejected) else "b"
        annotator = str(record.annotator)
        last[comparison, annotator] = Vote(event, comparison, annotator, choice)
    return list(last.values())


def annotators_markdown(summary: dict[str, Any]) -> list[str]:
    """Return the lines of a Markdown section on an `agreement_summary`: alpha, a table of
    annotators, kappas.
    """
    rows = []
    for person in summary["annotators"]:
        rows.append(
            [
                person["annotator"],
                person["votes"],
                with_interval(person["rest"], TWO_DIGITS),
                _number(person["skill"], ".2f"),
                with_interval(person["left"], TWO_DIGITS),
                with_interval(person["controls"], TWO_DIGITS),
                _number(person["seconds"], ".1f"),
                with_interval(person["fast"], TWO_DIGITS),
                remarks(person),
            ]
        )
    lines = [
        f"{describe_alpha(summary)}.",
        "",
        *markdown_table(HEADER, rows, right=range(1, 8)),
        "",
        LEGEND,
    ]

    tau = describe_tau(summary)
    lines += ["", f"{tau}."] if tau else []
    kappas = list(map(escape_cell, describe_kappas(summary)))
    if kappas:
        lines += ["", f"Cohen's kappa (95 % interval) of every two: {'; '.join(kappas)}."]
    return lines


def remarks(person: dict[str, Any]) -> str:
    """Return what stands out about an annotator, or that there are too few votes to say."""
    if person["votes"] < FEWEST:
        return f"too few votes to say ({person['votes']} of {FEWEST})"
    return "; ".join(person["flags"])


def describe_alpha(summary: dict[str, Any]) -> str:
    """Return Krippendorff's alpha of an `agreement_summary`, its interval and what it rests on, in
    words.
    """
    alpha = summary["alpha"]["nominal"]
    basis = f"{summary['pairs_judged_twice']} of {summary['pairs']} pairs were judged by more than one annotator"
    if alpha["estimate"] is None:
        return f"Krippendorff's alpha cannot be computed: {basis}"
    return f"Krippendorff's alpha {with_interval(alpha, TWO_DIGITS)}; {basis}"


def describe_tau(summary: dict[str, Any]) -> str | None:
    """Return how far annotators order answers alike, in words; None without two orders of the same."""
    # summaries that were saved before there were rankings have none
    tau = summary.get("tau")
    if not tau or not tau["rankings"]:
        return None
    return (
        f"Kendall's tau-b {with_interval(tau, TWO_DIGITS)} over {tau['rankings']} rankings by two annotators or "
        "more: 1 is the same order, -1 the opposite"
    )


def describe_kappas(summary: dict[str, Any]) -> list[str]:
    """Return "ann and bob 0.62 [0.41, 0.79] on 80 pairs" for every two, the lowest first, undefined
    ones last.
    """
    lines = []
    for row in sorted(
        summary["kappa"], key=lambda row: math.inf if row["kappa"] is None else row["kappa"]
    ):
        value = "cannot be computed"
        if row["kappa"] is not None:
            value = with_interval(row | {"estimate": row["kappa"]}, TWO_DIGITS)
        lines.append(f"{row['one']} and {row['other']} {value} on {row['pairs']} pairs")
    return lines


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
