"""Write the report of a comparison, of single runs or of an experiment, from the dict that
`summarise` makes.

report.html is made from report.md: one self-contained page without scripts, for a phone and for
dark mode too. What models wrote stays text: report.md escapes it, Markdown's HTML is off, and the
page's own policy forbids scripts and requests.
"""

import base64
import html
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from rlhf.data.annotator_report import describe_alpha
from rlhf.files import dumps, write_atomic
from rlhf.report import tables
from rlhf.report.format import Report
from rlhf.report.sentences import all_sentences
from rlhf.voting.page import sentences as vote_sentences

# Characters in a line of the terminal's table where the output is a log
LOG_WIDTH = 170
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
SCROLL = '<div class="scroll" role="region" tabindex="0" aria-label="Table {number}: {heading}">\n<table>\n'
PICTURE = (
    '<span class="figure" role="region" tabindex="0" aria-label="Figure: {name}">'
    '<img src="{source}" alt="{alt}"></span>'
)


def write_files(report: Report, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures; returns name -> PNG of the
    figures.
    """
    from rlhf.report.figures import draw
    from rlhf.report.markdown import markdown

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


def html_page(markdown: str, figures: Mapping[str, Path]) -> str:
    """Return the page; figures: name in the Markdown ("frontier.svg") -> file, of which the page
    holds a copy.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)

    # Links to the sections, labels for screen readers, figures inside the page
    headings = _name_headings(tokens)
    _label_tables(tokens)

    def image(tokens: Any, index: int, *_: Any) -> str:
        source = figures.get(tokens[index].attrs["src"])
        alt = html.escape(tokens[index].content.replace("\\", ""))
        # Only the report's own figures are pictures; of any other one its text is shown
        if source is None:
            return alt
        name = source.stem.replace("_", " ")
        return PICTURE.format(name=name, source=_data_uri(source), alt=alt)

    def table(tokens: Any, index: int, *_: Any) -> str:
        return SCROLL.format(**tokens[index].meta)

    # A table scrolls in a box of its own: on a phone the page would be as wide as the table
    rules = parser.renderer.rules
    rules["image"] = image
    rules["table_open"] = table
    rules["table_close"] = lambda *_: "</table>\n</div>\n"

    # The navigation comes below what the report opens with
    opening, mark, details = parser.renderer.render(tokens, parser.options, {}).partition("<h2")
    links = [f'<a href="#{name}">{html.escape(text)}</a>' for name, text in headings.items()]
    # escaped for Markdown, which the title of a page is not
    title = tokens[1].content.replace("\\", "")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        navigation="\n".join(links),
        opening=opening,
        details=mark + details,
    )


def _name_headings(tokens: list) -> dict[str, str]:
    """Give the second-level headings ids to link to; returns id -> text."""
    names = {}
    for heading, text in itertools.pairwise(tokens):
        if heading.type == "heading_open" and heading.tag == "h2":
            name = re.sub(r"\W+", "-", text.content.lower())
            heading.attrSet("id", name)
            names[name] = text.content
    return names


def _label_tables(tokens: list) -> None:
    """Number the tables and say which section each is in, for screen readers; columns get their
    scope.
    """
    number, heading = 0, ""
    for token, following in itertools.pairwise(tokens):
        if token.type == "heading_open":
            heading = html.escape(following.content.replace("\\", ""))
        elif token.type == "table_open":
            number += 1
            token.meta = {"number": number, "heading": heading}
        elif token.type == "th_open":
            token.attrSet("scope", "col")


def _data_uri(path: Path) -> str:
    """Return an SVG file as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
