"""Progress, agreement and reliability of a collection, for the owner's page and `rlhf collect
status`.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rlhf.collect.pairs import check_pairs
from rlhf.collect.queue import Queue
from rlhf.collect.queue_state import Rules
from rlhf.config import option
from rlhf.data.annotator_report import annotators_markdown, view_summary
from rlhf.data.sources import ALL_TIES_HELP
from rlhf.data.spans import renamed
from rlhf.data.store import Store
from rlhf.data.store_queries import StoreView
from rlhf.data.votes import Vote, by_comparison, final_votes, minority, no_preference
from rlhf.stats import clustered_se
from rlhf.text import UNKNOWN, markdown_table, short_names
from rlhf.voting.ballots import read_ballots
from rlhf.voting.page import votes_markdown
from rlhf.voting.rates import MARGIN, summarise_votes

# pairs of annotators shown
KAPPAS = 15


@dataclass
class StatusConfig:
    """Progress, agreement and annotators of a preference store."""

    store: str = option(help="the preference store (SQLite)")
    margin: float = option(
        MARGIN,
        "of two policies: votes are enough once their win rate is known to be within one half +- this",
        above=0,
        high=0.5,
    )


def rules_of(store: Store) -> Rules:
    """Return the rules that the collection was set up with."""
    default = Rules()
    return Rules(
        overlap=int(store.setting("overlap", str(default.overlap))),
        lease_seconds=float(store.setting("lapse", str(default.lease_seconds))),
        control_share=float(store.setting("control_share", str(default.control_share))),
    )


def summary(store: Store, margin: float = MARGIN) -> dict[str, Any]:
    """Return how far the collection is and how far its annotators agree.

    {"progress": {complete, begun, untouched, all} of pairs and rankings, "rankings", "ranked" (orders
    given), "passages" (marked), "controls", "overlap", "slots": {given, needed},
    "undone", "event", "excluded" ({name: event}), "adjudicated" (pairs that an adjudicator has
    decided), "choices", "no_preference" (in words, where no vote prefers an answer),
    "criteria": `criteria_means`, "answers" (all that stand; a ranking is one), "on_controls", "disputed",
    "votes": `summarise_votes`, None where no two policies were compared} and all of
    `agreement_summary`; kappa is that of the two annotators each with most pairs in common, and
    "kappa_of" how many there are.
    """
    rules, view = rules_of(store), store.at()
    pairs, votes, stats = view.pairs(), view.votes(), view.stats()
    queue = Queue(store, rules)
    progress = queue.progress(0)
    found = view_summary(view)
    # of many annotators most share a handful of pairs, whose kappa says nothing
    kappas = sorted(found["kappa"], key=lambda row: -row["pairs"])
    return found | {
        "kappa": kappas[:KAPPAS],
        "kappa_of": len(kappas),
        "progress": queue.open_pairs() | {"all": stats["comparisons"] + stats["rankings"]},
        "rankings": stats["rankings"],
        "ranked": stats["ranked"],
        "passages": len(marked_passages(view)),
        "controls": stats["controls"],
        "overlap": rules.overlap,
        "slots": {"given": progress.given, "needed": progress.needed},
        "excluded": view.excluded(),
        "adjudicated": len(final_votes(votes)),
        "undone": stats["undone"],
        "event": stats["last_event"],
        "choices": stats["choices"],
        "no_preference": no_preference(stats["normal_choices"]),
        "answers": stats["votes"],
        "on_controls": sum(pairs[vote.comparison]["kind"] == "control" for vote in votes),
        "disputed": len(disputed(votes, pairs)),
        "criteria": criteria_means(votes, pairs),
        "votes": summarise_votes(read_ballots(view), overlap=rules.overlap, margin=margin),
    }


def disputed(votes: list[Vote], pairs: dict[int, dict[str, Any]]) -> list[tuple[int, list[Vote]]]:
    """Return the normal pairs of which some prefer a and some b, with their votes: the most evenly
    split first. What an adjudicator has decided is no longer disputed.
    """
    decided = final_votes(votes)
    relevant = []
    for vote in votes:
        is_open = pairs[vote.comparison]["kind"] == "normal" and vote.comparison not in decided
        if is_open and vote.choice != "skip":
            relevant.append(vote)
    split = []
    for id, own in by_comparison(relevant).items():
        share = minority(Counter(vote.choice for vote in own))
        if share:
            split.append((-share, -len(own), id, own))
    split.sort(key=lambda row: row[:3])
    return [(id, own) for *_, id, own in split]


def marked_passages(view: StoreView) -> list[tuple[Any, dict[str, Any]]]:
    """Return every marked passage as (vote or ranking, span), the newest first; the "answer" of a span
    is the id of its response.
    """
    pairs, found = view.pairs(), []
    for vote in view.votes():
        # what was marked in a ranking stands at each of its pairs
        if vote.ranking is None:
            ids = {side: pairs[vote.comparison][side] for side in "ab"}
            found += [(vote, span) for span in renamed(vote.spans, ids)]
    for ranked in view.ranked():
        found += [(ranked, span) for span in ranked.spans]
    return sorted(found, key=lambda each: -each[0].event)


def criteria_means(votes: list[Vote], pairs: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean rating of each policy by each criterion, control pairs left out.

    [{criterion, policy ("" if unknown), mean, se (None with one group), ratings}], with the standard
    error over groups of prompts.
    """
    ratings: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for vote in votes:
        pair = pairs[vote.comparison]
        if pair["kind"] != "normal":
            continue
        for criterion, given in vote.criteria.items():
            for side, rating in given.items():
                key = criterion, pair[f"model_{side}"] or ""
                ratings.setdefault(key, []).append((rating, pair["metadata"]["group"]))
    models = sorted({model for _, model in ratings if model})
    names = {"": ""} | dict(zip(models, short_names(models), strict=True))
    rows = []
    for (criterion, model), given in sorted(ratings.items()):
        values, groups = zip(*given, strict=True)
        row = {"criterion": criterion, "policy": names[model], "ratings": len(values)}
        mean = sum(values) / len(values)
        rows.append(row | {"mean": mean, "se": clustered_se(values, groups)})
    return rows


def criteria_markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of mean ratings."""
    cells = []
    for row in rows:
        shown = f"{row['mean']:.2f}"
        shown += "" if row["se"] is None else f" ± {row['se']:.2f}"
        cells.append([row["criterion"], row["policy"] or UNKNOWN, shown, str(row["ratings"])])
    header = ["criterion", "policy", "mean rating ± standard error", "ratings"]
    return markdown_table(header, cells, right=[2, 3])


def status(config: StatusConfig) -> dict[str, Any]:
    """Print the summary as text, and return it."""
    with Store.open(config.store, readonly=True) as store:
        check_pairs(store)
        found = summary(store, config.margin)
    pairs, slots = found["progress"], found["slots"]
    filled = slots["given"] / slots["needed"] if slots["needed"] else 1.0
    rankings = f" and {found['rankings']} rankings" if found["rankings"] else ""
    print(
        f"{config.store}: {pairs['all'] - found['rankings']} pairs{rankings}, {found['overlap']} people for each, and "
        f"{found['controls']} control pairs\n{slots['given']} of {slots['needed']} slots filled ({filled:.0%}): "
        f"{pairs['complete']} complete, {pairs['begun']} begun, {pairs['untouched']} untouched; "
        f"{found['undone']} votes were undone\n"
        f"newest event {found['event']}: train on exactly this with {config.store}@{found['event']}"
    )
    if found["no_preference"]:
        print(f"WARNING: {found['no_preference']}. {ALL_TIES_HELP}")
    if not found["annotators"] and not found["excluded"]:
        return found

    print(
        f"{found['disputed']} pairs are disputed, {found['adjudicated']} decided by an adjudicator"
    )
    for name, event in found["excluded"].items():
        print(f"{name} is excluded from event {event} on: their votes count nowhere here")
    if found["kappa_of"] > len(found["kappa"]):
        print(
            f"of {found['kappa_of']} kappas, those of the {KAPPAS} with most pairs in common are shown"
        )
    print("\n".join(annotators_markdown(found)))
    if found["votes"]:
        print("\n".join(["", "Which policy is preferred:", *votes_markdown(found["votes"])]))
    if found["criteria"]:
        print("\n".join(["", *criteria_markdown(found["criteria"])]))
    ordinal = found["alpha"]["ordinal"]
    # a single pair has no interval
    if ordinal["estimate"] is not None and ordinal["low"] is not None:
        print(
            f"Ordinal alpha, with strength: {ordinal['estimate']:.2f} [{ordinal['low']:.2f}, {ordinal['high']:.2f}]"
        )
    return found


def percent(share: dict[str, Any]) -> str:
    return "–" if share["estimate"] is None else f"{share['estimate']:.0%}"


def fraction(share: dict[str, Any]) -> str:
    return f"{share['count']:g}/{share['n']}" if share["n"] else "–"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
