"""Write report.md: a picture, one sentence and one table, then the details. report.html is made
from the same text.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.annotator_report import annotators_markdown
from rlhf.report import tables
from rlhf.report.figure_style import difference, methods_of, paths_of, trained_methods
from rlhf.report.format import (
    Report,
    initial_name,
    main_score,
    method_name,
    nats,
    number,
    score_name,
)
from rlhf.report.sentences import headline, report_sentences, verdict_sentence
from rlhf.report.tables import Table, as_table, escape
from rlhf.voting.page import votes_markdown

TERMS = Path(__file__).parent / "templates" / "terms.md"
# What each figure shows, as its alternative text
FIGURES = {
    "scores": "Dot plot: each score's difference to {initial}.",
    "frontier": "Scatter plot: {score} over {initial} against KL. {best}",
    "proxy_gold": "Line plots, a column a method: proxy against KL, judge against KL, judge against proxy.",
    "wins": "Heat map: how often the row's policy beats the column's, in percent.",
    "time": "Line plots: every score over {initial} by training step, a column a method.",
    "lengths": "Scatter plots against KL: tokens in a response, and the share of responses that end.",
    "cost": "Stacked bars: what each method cost: its own runs, the reward model, the pairs.",
}
# What opens a report, the first that there is; "scores" is drawn of single runs alone
OPENINGS = ("scores", "frontier")


@dataclass(frozen=True)
class Section:
    """A part of the details; it is left out where the report has neither its figure nor rows for
    its tables.
    """

    heading: str
    explanation: str
    figure: str | None = None
    tables: tuple[Callable[[Report], Table], ...] = ()


SECTIONS = (
    Section(
        "Score against KL",
        "A policy that moved further had more room to gain, so methods are compared where both have moved equally far; "
        "a positive difference puts the first method ahead.",
        "frontier",
        (tables.equal_kl, tables.equal_kl_on_the_way),
    ),
    Section(
        "At the end of training",
        "The ends of the runs, where an option was swept those of the value that did best on other prompts; each has "
        "a KL of its own, so this is not a comparison at equal KL.",
        None,
        (tables.tuned,),
    ),
    Section(
        "Proxy and judge",
        "Where the proxy goes on rising and the judge falls, a method serves the reward model and no longer what was "
        "wanted.",
        "proxy_gold",
        (tables.over_optimisation,),
    ),
    Section(
        "Win rates",
        "The share of comparisons that the first policy wins by the judge, ties half, raw and as if both answers were "
        "equally long; nothing is claimed of them.",
        "wins",
        (tables.win_rates, tables.judge_of_pairs, tables.judge_itself),
    ),
    Section(
        "Scores during training", "Every score over {initial}; only the judge decides.", "time"
    ),
    Section(
        "Length",
        "Many judges like length, and a policy that finds this out grows; a response that does not end by itself was "
        "cut off at the limit.",
        "lengths",
    ),
    Section(
        "Cost",
        "What a trial cost from {initial} on: alone, and with the reward model and pairs that it shares with others "
        "counted in full where their costs are known; those of single runs are not.",
        "cost",
        (tables.cost,),
    ),
    Section(
        "All policies",
        "The ends of all trials and the checkpoints before them; scores are differences to {initial}, whose own stand "
        "without a sign.",
        None,
        (tables.policies,),
    ),
)
# Long, or shown elsewhere: these are in report.json alone
HIDDEN = (
    "configs",
    "missing",
    "stopped",
    "annotators",
    "votes",
    "budgets",
    "seconds",
    "left_out",
)


def markdown(report: Report, figures: Iterable[str] = ()) -> str:
    """Return report.md; figures: names of the SVG files beside it (without .svg)."""
    # What answers the question comes first: a picture, a sentence, a table
    figures = list(figures)
    opening = next((name for name in OPENINGS if name in figures), None)
    lines = [
        f"# {escape(title(report))}",
        "",
        *_picture(report, opening),
        f"**{escape(headline(report))}**",
        "",
    ]
    lines += tables.opening(report).markdown()
    lines += _verdicts(report)
    lines += _basis(report)

    # The details; a figure that has opened the report is not shown again
    if opening in figures:
        figures.remove(opening)
    for section in SECTIONS:
        lines += _section(section, report, figures)

    if report.get("votes"):
        lines += ["## Votes", "", *votes_markdown(report["votes"], escape), ""]
    if report["annotators"]:
        lines += ["## Annotators", "", *annotators_markdown(report["annotators"]), ""]
    lines += [*_samples(report), *_terms(report), *_metadata(report["meta"])]
    return "\n".join(lines).rstrip() + "\n"


def title(report: Report) -> str:
    """Return "PPO against DPO"."""
    methods = trained_methods(report) or methods_of(report)
    return " against ".join(map(method_name, methods))


def fence(text: str) -> list[str]:
    """Return `text` as a code block, behind a fence that no line of it can close."""
    # a fence is ended by as many backticks alone
    longest = max(map(len, re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return [f"{marks}text", *text.splitlines(), marks, ""]


def _section(section: Section, report: Report, figures: list[str]) -> list[str]:
    """Return the lines of one section; none where neither its figure is among `figures` nor its
    tables have rows.
    """
    body: list[str] = []
    if section.figure in figures:
        body += _picture(report, section.figure)
    for table in section.tables:
        body += table(report).markdown()
    if not body:
        return []
    explanation = section.explanation.format(initial=escape(initial_name(report)))
    return [f"## {section.heading}", "", explanation, "", *body]


def _picture(report: Report, figure: str | None) -> list[str]:
    """Return the line that shows a figure, with what it shows in words."""
    if figure is None:
        return []
    score = main_score(report)
    label = "score" if score is None else score_name(report, score)
    text = FIGURES[figure].format(
        initial=initial_name(report), score=label, best=_best_of_each(report)
    )
    return [f"![{escape(text)}]({figure}.svg)", ""]


def _best_of_each(report: Report) -> str:
    """Return the highest main score of each method and its KL, for readers who do not see the
    picture.
    """
    score = main_score(report)
    parts = []
    for method in methods_of(report):
        every = itertools.chain.from_iterable(path for _, path in paths_of(report, method))
        points = [point for point in every if difference(point, score)]
        if points:
            best = max(points, key=lambda point: difference(point, score)["estimate"])
            value = number(difference(best, score)["estimate"])
            kl = nats(best["kl"]["estimate"])
            parts.append(f"{method_name(method)} reaches at most {value}, at KL {kl} nats")
    return "; ".join(parts) + "."


def _verdicts(report: Report) -> list[str]:
    level = f"{100 * report['claims']['alpha']:g} %"
    explanation = (
        f"What is claimed, at {level} for all claims together (p adjusted after Holm 1979); every other number of this "
        "report is shown with its interval and without a verdict."
    )
    if not report["verdicts"]:
        return []
    lines = ["## Verdicts", "", explanation, ""]
    for verdict in report["verdicts"]:
        lines.append(f"- {escape(verdict_sentence(verdict, report))}")
    return [*lines, ""]


def _basis(report: Report) -> list[str]:
    lines = [
        "## What this rests on",
        "",
        "What decides, what is missing, and how far the conclusions go.",
        "",
    ]
    for sentence in report_sentences(report):
        lines.append(f"- {escape(sentence)}")
    return [*lines, ""]


def _samples(report: Report) -> list[str]:
    if not report["samples"]:
        return []
    lines = [
        "## Samples",
        "",
        "The prompts whose hash comes first, and the first sample of each policy.",
        "",
    ]
    for i, sample in enumerate(report["samples"], start=1):
        lines += [f"### Prompt {i}", ""]
        # a prompt is one text or a conversation
        prompt = sample["prompt"]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        for message in messages:
            lines += [f"**{escape(message['role'])}**", "", *fence(message["content"])]
        for policy, response in sample["responses"].items():
            lines += [
                f"**{escape(policy)}** ({escape(_measured(response))})",
                "",
                *fence(response["response"]),
            ]
    return lines


def _measured(response: Mapping[str, Any]) -> str:
    """Return a response's scores, KL and tokens, those that are known, and whether it was cut off."""
    values = {**response["scores"], "KL": response["kl"], "tokens": response["length"]}
    known = [f"{name} {number(value)}" for name, value in values.items() if value is not None]
    cut = "" if response["ended"] else "; cut off at the limit"
    return ", ".join(known) + cut


def _terms(report: Report) -> list[str]:
    text = TERMS.read_text(encoding="utf-8").format(initial=escape(initial_name(report)))
    return ["## Terms", "", "What the words of this report mean.", "", text]


def _metadata(meta: Mapping[str, Any]) -> list[str]:
    """Return what repeats the comparison; the long parts are in report.json alone."""
    return [
        "## How to repeat it",
        "",
        "All digits and the resolved options of every run are in `report.json`.",
        "",
        *_shown(meta).markdown(),
    ]


@as_table
def _shown(meta: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["what", "value"]
    for name, value in meta.items():
        if name not in HIDDEN and value not in (None, [], {}, ""):
            yield [name.replace("_", " "), _flat(value)]


def _flat(value: Any) -> str:
    """Return metadata in one cell: mappings as "name value; name value", lists with commas."""
    if isinstance(value, Mapping):
        parts = []
        for key, item in value.items():
            if item not in (None, [], {}):
                parts.append(f"{key} {_flat(item)}")
        return "; ".join(parts)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_flat, value))
    return str(value)
