"""How a collection stands: for the owner's page and `rlhf collect status`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rlhf.collect.queue import Queue, Rules
from rlhf.config import UserError, option
from rlhf.data.store import Store
from rlhf.data.votes import Vote

KAPPAS = 15  # two annotators each


@dataclass
class StatusConfig:
    """Progress, agreement and annotators of a preference store."""

    store: str = option(help="the preference store (SQLite)")


def rules_of(store: Store) -> Rules:
    """The rules that the collection was set up with."""
    default = Rules()
    return Rules(
        int(store.setting("overlap", str(default.overlap))),
        float(store.setting("lapse", str(default.lapse))),
        float(store.setting("control_share", str(default.control_share))),
    )


def summary(store: Store) -> dict[str, Any]:
    """{"pairs": {complete, begun, untouched, all}, "controls", "overlap", "places": {given, needed}, "undone",
    "event", "choices"} and all of `agreement_summary`: votes, alpha, kappa (here of the two annotators each with most
    pairs in common, with "low" and "high"), annotators."""
    from rlhf.data.agreement import agreement_summary

    rules, pairs = rules_of(store), store.pairs()
    queue = Queue(store, rules)
    open_pairs, progress = queue.open_pairs(), queue.progress(0)
    words = {id: len(p["text_a"].split()) + len(p["text_b"].split()) for id, p in pairs.items()}
    stats, votes = store.stats(), store.votes()
    found = agreement_summary(votes, store.controls(), words)
    return found | {
        "kappa": kappas(votes, store.controls(), found["kappa"]),
        "kappa_of": len(found["kappa"]),
        "pairs": open_pairs | {"all": stats["comparisons"]},
        "controls": stats["controls"],
        "overlap": rules.overlap,
        "places": {"given": progress.given, "needed": progress.needed},
        "undone": stats["undone"],
        "event": stats["last_event"],
        "choices": stats["choices"],
        "normal": sum(pairs[vote.comparison]["kind"] == "normal" for vote in votes),
        "disputed": len(disputed(votes, pairs)),
    }


def kappas(votes: list[Vote], controls: dict[int, str], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kappas of those who share most pairs, with 95 % intervals: {one, other, kappa, pairs, low, high}."""
    from rlhf.data.agreement import kappa_interval, ratings_of

    by_name: dict[str, dict] = {}
    for item, values in ratings_of([vote for vote in votes if vote.comparison not in controls]).items():
        for name, value in values.items():
            by_name.setdefault(name, {})[item] = value
    most = sorted(found, key=lambda row: -row["pairs"])[:KAPPAS]
    rows = []
    for row in most:
        _, low, high = kappa_interval(by_name[row["one"]], by_name[row["other"]])
        rows.append(row | {"low": None if math.isnan(low) else low, "high": None if math.isnan(high) else high})
    return rows


def disputed(votes: list[Vote], pairs: dict[int, dict[str, Any]]) -> list[tuple[int, list[Vote]]]:
    """Pairs (no controls) of which some prefer a and some b, with their votes: the most evenly split first."""
    by_pair: dict[int, list[Vote]] = {}
    for vote in votes:
        if pairs[vote.comparison]["kind"] == "normal" and vote.choice != "skip":
            by_pair.setdefault(vote.comparison, []).append(vote)
    split = []
    for id, own in by_pair.items():
        count = Counter(vote.choice for vote in own)
        if count["a"] and count["b"]:
            split.append((-min(count["a"], count["b"]) / (count["a"] + count["b"]), -len(own), id, own))
    return [(id, own) for *_, id, own in sorted(split, key=lambda row: row[:3])]


def status(config: StatusConfig) -> dict[str, Any]:
    """Print the summary as text; returns it."""
    with Store.open(config.store, readonly=True) as store:
        if not store.pairs():
            raise UserError(f"{config.store}: has no pairs to judge; make some with: rlhf collect sample")
        found = summary(store)
    pairs, places = found["pairs"], found["places"]
    share = places["given"] / places["needed"] if places["needed"] else 1.0
    print(
        f"{config.store}: {pairs['all']} pairs, {found['overlap']} people for each, and {found['controls']} control "
        f"pairs\n{places['given']} of {places['needed']} places filled ({share:.0%}): {pairs['complete']} pairs "
        f"complete, {pairs['begun']} begun, {pairs['untouched']} untouched; {found['undone']} votes were undone\n"
        f"newest event {found['event']}: train on exactly this with {config.store}@{found['event']}"
    )
    alpha, ordinal = found["alpha"]["nominal"], found["alpha"]["ordinal"]
    if alpha["estimate"] is not None:
        print(
            f"Krippendorff's alpha {_between(alpha, 'estimate')} on {found['pairs_judged_twice']} pairs that "
            f"several judged; {found['disputed']} of them are disputed"
        )
    if ordinal["estimate"] is not None:
        print(f"ordinal alpha, with strength: {_between(ordinal, 'estimate')}")
    for row in found["kappa"]:
        print(f"Cohen's kappa of {row['one']} and {row['other']}: {_between(row, 'kappa')} on {row['pairs']} pairs")
    if found["kappa_of"] > len(found["kappa"]):
        print(f"these are the {KAPPAS} of {found['kappa_of']} with most pairs in common")
    if found["annotators"]:
        names = f"{'annotator':20s} {'votes':>6s} {'rest':>6s} {'controls':>9s} {'skill':>6s} {'left':>6s}"
        print(f"\n{names} {'seconds':>8s}")
    for person in found["annotators"]:
        print(
            f"{person['annotator'][:20]:20s} {person['votes']:6d} {percent(person['rest']):>6s} "
            f"{of(person['controls']):>9s} {two_places(person['skill']):>6s} {percent(person['left']):>6s} "
            f"{number(person['seconds']):>8s}" + ("  " + "; ".join(person["flags"]) if person["flags"] else "")
        )
    if found["annotators"]:
        print(
            "rest: agreement with the others; controls: right of those judged; skill: share of the votes for a side "
            "that are for the better one; left: share of the left side"
        )
    return found


def _between(row: dict[str, Any], name: str) -> str:
    low, high = row["low"], row["high"]
    return two_places(row[name]) + ("" if low is None else f" (95 % interval {low:.2f} to {high:.2f})")


def percent(share: dict[str, Any]) -> str:
    return "–" if share["estimate"] is None else f"{share['estimate']:.0%}"


def of(share: dict[str, Any]) -> str:
    return f"{share['count']:g}/{share['n']}" if share["n"] else "–"


def two_places(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
