"""Votes of a preference store as rows to train on."""

from __future__ import annotations

from typing import Any

from rlhf.data.rankings import pair_weight
from rlhf.data.votes import Aggregate, Vote, after_adjudication, verdicts


def training_rows(
    votes: list[Vote],
    pairs: dict[int, dict[str, Any]],
    prompts: dict[int, dict[str, Any]],
    controls: dict[int, str],
    aggregate: Aggregate,
    *,
    keep_ties: bool,
) -> list[dict[str, Any]]:
    """Return the rows of `StoreView.rows`; the arguments are what the view returns under these names."""
    rows = []
    for verdict in verdicts(votes, aggregate, controls, keep_ties=keep_ties):
        pair = pairs[verdict.comparison]
        winner, loser = ("a", "b") if verdict.winner == "a" else ("b", "a")
        row = _row(prompts[pair["prompt"]], pair, pair[f"text_{winner}"], loser)
        # 0: the response was cut off; NULL: not known, which counts as ended
        if pair[f"ended_{winner}"] == 0:
            row["chosen_ended"] = False
        row["annotator"] = verdict.annotator
        row["label_prob"] = verdict.label_prob
        row["tie_prob"] = verdict.tie_prob
        row["margin"] = verdict.margin
        row["metadata"]["vote"] |= verdict.metadata
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows + _corrections(after_adjudication(votes), pairs, prompts, controls)


def _row(prompt: dict[str, Any], pair: dict[str, Any], chosen: str, loser: str) -> dict[str, Any]:
    """Return the row of a pair in which `chosen` is better than the response "a" or "b"."""
    row = prompt | {"chosen": chosen, "rejected": pair[f"text_{loser}"]}
    if pair[f"ended_{loser}"] == 0:
        row["rejected_ended"] = False
    about = {"comparison": pair["id"]}
    if pair["ranking"] is not None:
        about["ranking"] = pair["ranking"]
        row["weight"] = pair_weight(pair["ranked"])
    row["metadata"] = prompt["metadata"] | {"vote": about}
    return row


def _corrections(
    votes: list[Vote],
    pairs: dict[int, dict[str, Any]],
    prompts: dict[int, dict[str, Any]],
    controls: dict[int, str],
) -> list[dict[str, Any]]:
    """Return a row for each answer that an annotator wrote over one that they were shown."""
    rows = []
    for vote in votes:
        if vote.corrected is None or vote.comparison in controls:
            continue
        pair = pairs[vote.comparison]
        # better than the preferred answer says more than better than the other
        for loser in vote.choice if vote.choice in ("a", "b") else "ab":
            # written without a change
            if pair[f"text_{loser}"].strip() == vote.corrected.strip():
                continue
            row = _row(prompts[pair["prompt"]], pair, vote.corrected, loser)
            row["annotator"] = vote.annotator
            about = {"event": vote.event, "corrected": True}
            about |= {"reason": vote.reason} if vote.reason else {}
            row["metadata"]["vote"] |= about
            rows.append(row)
    return rows
