"""Win rates by votes as text: one sentence for every two policies, and tables."""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.report.format import p_value, share
from rlhf.text import escape_cell, markdown_table

# how each source of votes is named, in tables and sentences alike
SOURCES = {
    "human": "votes of people",
    "simulated": "simulated votes",
    "judge": "votes of a judge, not of people",
    "mixed": "votes of people and of programs, mixed",
}
# of a sentence that says that a policy is preferred, over all pairs of policies together
ALPHA = 0.05
LEGEND = (
    "A tie or both bad counts one half for each; skips do not count. The interval is over prompts and annotators. "
    "Enough votes: a rule that may be looked at after every vote and errs in 5 % of collections at most, for these "
    "annotators."
)


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return what `rates.summarise_votes` found, one sentence for every two policies."""
    source = SOURCES[summary["source"]]
    source = source[0].upper() + source[1:]
    return [f"{source}: {_verdict(pair)}" for pair in summary["pairs"]]


def votes_markdown(
    summary: Mapping[str, Any], escape: Callable[[Any], str] = escape_cell
) -> list[str]:
    """Return the lines of a Markdown section: sentences, the table of policies, that of pairs.

    escape: turns text with names of policies into text that Markdown shows as it is.
    """
    people = f"{summary['annotators']} annotators"
    if summary["scope"] == "these annotators":
        people = f"these {people}"
    lines = [f"- {escape(sentence)}" for sentence in sentences(summary)]
    lines += [
        "",
        f"{summary['votes']} votes of {people} on {summary['prompts']} pairs, up to event {summary['event']}.",
        "",
    ]
    if len(summary["policies"]) > 2:
        rows = [[row["policy"], share(row["rate"])] for row in summary["policies"]]
        header = ["policy", "mean chance over the others [95 %]"]
        lines += [*markdown_table(header, rows, right=[1], escape=escape), ""]
    rows = []
    for pair in summary["pairs"]:
        rows.append(
            [
                f"{pair['one']} over {pair['other']}",
                share(pair["rate"]),
                p_value(pair["p_adjusted"]),
                str(pair["votes"]),
                str(pair["prompts"]),
                f"{pair['ties']:.0%}",
                str(pair["equal"]),
                stop_text(pair),
            ]
        )
    header = ["pair", "wins [95 %]", "p adjusted", "votes", "prompts", "ties", "equal answers"]
    lines += markdown_table([*header, "enough votes?"], rows, right=range(1, 7), escape=escape)
    return [*lines, "", LEGEND]


def stop_text(pair: Mapping[str, Any]) -> str:
    """Return whether enough votes are in to decide between two policies."""
    stop = pair["stop"]
    if stop["state"] == "one":
        return f"yes: {pair['one']} is ahead"
    if stop["state"] == "other":
        return f"yes: {pair['other']} is ahead"
    if stop["state"] == "equal":
        return f"yes: no difference beyond {100 * stop['margin']:g} points"
    if stop["more"] is None:
        return "no, and not in sight"
    return f"no: about {stop['more']} more prompts if it stays so"


def _verdict(pair: Mapping[str, Any]) -> str:
    rate = pair["rate"]
    shown = share(rate)
    if rate["low"] is None:
        return f"{pair['one']} wins {shown} over {pair['other']}; too few prompts for an interval."
    p = pair["p_adjusted"]
    is_beyond = rate["low"] > 0.5 or rate["high"] < 0.5
    # an interval is that of one pair of policies; of several one is beyond 0.5 by chance more often
    if is_beyond and p is not None and p >= ALPHA:
        return (
            f"no difference between {pair['one']} and {pair['other']} is shown among all pairs of policies "
            f"(p adjusted {p_value(p)}): {pair['one']} wins {shown}."
        )
    if rate["low"] > 0.5:
        return f"{pair['one']} is preferred to {pair['other']}: it wins {shown} of comparisons."
    if rate["high"] < 0.5:
        mirrored = {
            "estimate": 1 - rate["estimate"],
            "low": 1 - rate["high"],
            "high": 1 - rate["low"],
        }
        return f"{pair['other']} is preferred to {pair['one']}: it wins {share(mirrored)} of comparisons."
    return f"no difference between {pair['one']} and {pair['other']} is shown: {pair['one']} wins {shown}."
