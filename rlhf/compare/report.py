"""Write the report of a comparison, of single runs or of an experiment, from the dict that
`summarise` makes.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.compare import tables
from rlhf.compare.format import Report
from rlhf.compare.sentences import all_sentences
from rlhf.data.annotator_report import describe_alpha
from rlhf.files import dumps, write_atomic
from rlhf.voting.page import sentences as vote_sentences

# Characters in a line of the terminal's table where the output is a log
LOG_WIDTH = 170


def write_files(report: Report, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures; returns name -> PNG of the
    figures.
    """
    from rlhf.compare.figures import draw
    from rlhf.compare.markdown import markdown
    from rlhf.compare.page import html_page

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", dumps(report, indent=2) + "\n")
    figures = draw(report, folder)

    # The page is made from the Markdown and holds a copy of each figure
    text = markdown(report, figures)
    write_atomic(folder / "report.md", text)
    pictures = {f"{name}.svg": path.with_suffix(".svg") for name, path in figures.items()}
    write_atomic(folder / "report.html", html_page(text, pictures))
    return figures


def read_report(file: Path) -> Report:
    """Return the content of a report.json, under today's names."""
    report = json.loads(file.read_text(encoding="utf-8"))
    if "foundation" in report:
        report["initial_policy"] = report.pop("foundation")
    return report


def print_report(report: Report, folder: Path) -> None:
    """Print the first table, all verdicts and limits, and where the report is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A log wraps nothing
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    opening = tables.opening(report)
    policy, *numbers = opening.header
    table = Table(policy)
    for name in numbers:
        table.add_column(Text(name), justify="right")
    # Text, not str: a name in square brackets is not a style
    for row in opening.rows:
        table.add_row(*map(Text, row))
    console.print(table)

    sentences = all_sentences(report)
    if report.get("votes"):
        sentences += vote_sentences(report["votes"])
    if report["annotators"]:
        sentences.append(f"Annotators: {describe_alpha(report['annotators'])}.")
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print(
        f"\nReport: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True
    )
