"""Progress, agreement and reliability of a collection, for the owner's page and `rlhf collect status`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rlhf.collect.queue import Queue, Rules
from rlhf.config import UserError, option
from rlhf.data.agreement import agreement_summary
from rlhf.data.store import Store
from rlhf.data.votes import Vote, by_comparison

KAPPAS = 15  # pairs of annotators shown

LEGEND = (
    "rest: agreement with the others; controls: right of those judged; skill: share of the votes for a side that are "
    "for the better one; left: share of the left side"
)


@dataclass
class StatusConfig:
    """Progress, agreement and annotators of a preference store."""

    store: str = option(help="the preference store (SQLite)")


def rules_of(store: Store) -> Rules:
    """Return the rules that the collection was set up with."""
    default = Rules()
    return Rules(
        overlap=int(store.setting("overlap", str(default.overlap))),
        lease_seconds=float(store.setting("lapse", str(default.lease_seconds))),
        control_share=float(store.setting("control_share", str(default.control_share))),
    )


def summary(store: Store) -> dict[str, Any]:
    """Return how far the collection is and how far its annotators agree.

    {"pairs": {complete, begun, untouched, all}, "controls", "overlap", "slots": {given, needed}, "undone", "event",
    "choices", "normal" (votes on pairs that are no controls), "disputed"} and all of `agreement_summary`; kappa is that
    of the two annotators each with most pairs in common, and "kappa_of" how many there are.
    """
    rules, view = rules_of(store), store.at()
    pairs, votes, stats = view.pairs(), view.votes(), view.stats()
    queue = Queue(store, rules)
    progress = queue.progress(0)

    words = {}
    for id, pair in pairs.items():
        words[id] = len(pair["text_a"].split()) + len(pair["text_b"].split())
    found = agreement_summary(votes, view.controls(), words)
    kappas = sorted(found["kappa"], key=lambda row: -row["pairs"])
    return found | {
        "kappa": kappas[:KAPPAS],
        "kappa_of": len(kappas),
        "pairs": queue.open_pairs() | {"all": stats["comparisons"]},
        "controls": stats["controls"],
        "overlap": rules.overlap,
        "slots": {"given": progress.given, "needed": progress.needed},
        "undone": stats["undone"],
        "event": stats["last_event"],
        "choices": stats["choices"],
        "normal": sum(pairs[vote.comparison]["kind"] == "normal" for vote in votes),
        "disputed": len(disputed(votes, pairs)),
    }


def disputed(votes: list[Vote], pairs: dict[int, dict[str, Any]]) -> list[tuple[int, list[Vote]]]:
    """Return the normal pairs of which some prefer a and some b, with their votes: the most evenly split first."""
    relevant = [vote for vote in votes if pairs[vote.comparison]["kind"] == "normal" and vote.choice != "skip"]
    split = []
    for id, own in by_comparison(relevant).items():
        count = Counter(vote.choice for vote in own)
        if count["a"] and count["b"]:
            minority = min(count["a"], count["b"]) / (count["a"] + count["b"])
            split.append((-minority, -len(own), id, own))
    split.sort(key=lambda row: row[:3])
    return [(id, own) for *_, id, own in split]


def status(config: StatusConfig) -> dict[str, Any]:
    """Print the summary as text, and return it."""
    with Store.open(config.store, readonly=True) as store:
        if not store.at().pairs():
            raise UserError(f"{config.store}: has no pairs to judge; make some with: rlhf collect sample")
        found = summary(store)
    _print_progress(config.store, found)
    _print_agreement(found)
    if found["annotators"]:
        _print_annotators(found["annotators"])
    return found


def _print_progress(name: str, found: dict[str, Any]) -> None:
    pairs, slots = found["pairs"], found["slots"]
    filled = slots["given"] / slots["needed"] if slots["needed"] else 1.0
    print(
        f"{name}: {pairs['all']} pairs, {found['overlap']} people for each, and {found['controls']} control pairs\n"
        f"{slots['given']} of {slots['needed']} slots filled ({filled:.0%}): {pairs['complete']} pairs complete, "
        f"{pairs['begun']} begun, {pairs['untouched']} untouched; {found['undone']} votes were undone\n"
        f"newest event {found['event']}: train on exactly this with {name}@{found['event']}"
    )


def _print_agreement(found: dict[str, Any]) -> None:
    alpha, ordinal = found["alpha"]["nominal"], found["alpha"]["ordinal"]
    if alpha["estimate"] is not None:
        print(
            f"Krippendorff's alpha {_with_interval(alpha, 'estimate')} on {found['pairs_judged_twice']} pairs that "
            f"several judged; {found['disputed']} of them are disputed"
        )
    if ordinal["estimate"] is not None:
        print(f"ordinal alpha, with strength: {_with_interval(ordinal, 'estimate')}")
    for row in found["kappa"]:
        kappa = _with_interval(row, "kappa")
        print(f"Cohen's kappa of {row['one']} and {row['other']}: {kappa} on {row['pairs']} pairs")
    if found["kappa_of"] > len(found["kappa"]):
        print(f"these are the {KAPPAS} of {found['kappa_of']} with most pairs in common")


def _print_annotators(annotators: list[dict[str, Any]]) -> None:
    widths = {"annotator": -20, "votes": 6, "rest": 6, "controls": 9, "skill": 6, "left": 6, "seconds": 8}
    print("\n" + _columns(list(widths), widths.values()))
    for person in annotators:
        cells = [
            person["annotator"][:20],
            person["votes"],
            percent(person["rest"]),
            fraction(person["controls"]),
            _two_places(person["skill"]),
            percent(person["left"]),
            number(person["seconds"]),
        ]
        line = _columns(cells, widths.values())
        flags = "; ".join(person["flags"])
        print(f"{line}  {flags}".rstrip())
    print(LEGEND)


def _columns(cells: list[Any], widths: Any) -> str:
    """Return the cells in columns of these widths; a negative width is aligned to the left."""
    aligned = []
    for cell, width in zip(cells, widths, strict=True):
        aligned.append(str(cell).ljust(-width) if width < 0 else str(cell).rjust(width))
    return " ".join(aligned)


def _with_interval(row: dict[str, Any], name: str) -> str:
    if row["low"] is None:
        return _two_places(row[name])
    return f"{_two_places(row[name])} (95 % interval {row['low']:.2f} to {row['high']:.2f})"


def percent(share: dict[str, Any]) -> str:
    return "–" if share["estimate"] is None else f"{share['estimate']:.0%}"


def fraction(share: dict[str, Any]) -> str:
    return f"{share['count']:g}/{share['n']}" if share["n"] else "–"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _two_places(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
