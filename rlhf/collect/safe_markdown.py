"""Render the text of models and users as inert HTML: Markdown without HTML, images or scripts.

Annotators see whatever a model wrote. Raw HTML is shown as text, links lead to http, https and
mailto only and show their address, pictures are not loaded, characters that are invisible or change
the direction of writing are written out, and very long texts are folded and not parsed.
"""

import functools
import html
import re
import unicodedata

from markdown_it import MarkdownIt
from markupsafe import Markup

# characters that are parsed as Markdown; a longer text is shown as it is, folded
LONGEST_PARSED = 20_000
# characters above which a text is folded
FOLDED = 6_000
PREVIEW = 600
_SCHEME = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
_HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SHOWN_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@functools.lru_cache(maxsize=2048)
def render(text: str) -> Markup:
    """Return Markdown as HTML, isolated in its direction of writing.

    Above FOLDED characters all of it is inside <details>, under a preview; above LONGEST_PARSED it is
    plain text.
    """
    text = visible(text)
    if len(text) > LONGEST_PARSED:
        body = f'<pre class="plain">{html.escape(text)}</pre>'
    else:
        # once more, since the parser has made characters of entities such as &#8203; and &rlm;
        body = visible(_parser().render(text))
    body = f'<div class="text" dir="auto">{body}</div>'
    # the buttons must stay near, and the other answer in view
    if len(text) > FOLDED:
        preview = f'<div class="text" dir="auto"><p>{html.escape(text[:PREVIEW])}…</p></div>'
        words = len(text.split())
        body = f'{preview}<details class="long"><summary>Show all of it ({words:,} words)</summary>{body}</details>'
    return Markup(body)


def visible(text: str) -> str:
    """Return the text with line ends as \\n and control, direction and zero-width characters
    written as ⟦U+202E⟧.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _SHOWN_CONTROLS.sub(_named, _HIDDEN.sub(_named, text))


def source_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where in the text a part of `visible(text)` comes from; what is written out is whole.

    start < end: places in the visible text.
    """
    # true of nearly all texts, and much faster
    if visible(text) == text:
        return start, end
    # for each visible character, where what it stands for begins and ends
    places: list[tuple[int, int]] = []
    at = 0
    while at < len(text):
        size = 2 if text.startswith("\r\n", at) else 1
        places += [(at, at + size)] * len(visible(text[at : at + size]))
        at += size
    return places[start][0], places[end - 1][1]


def _named(found: re.Match) -> str:
    return f"⟦U+{ord(found.group()):04X}⟧"


@functools.cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 100}).enable(
        ["table", "strikethrough"]
    )
    # a picture would tell its server who reads it and when
    parser.disable(["image", "html_block", "html_inline"])
    # the parser's own check forbids a few schemes; here all but three are
    parser.validateLink = lambda url: bool(
        _SCHEME.match(unicodedata.normalize("NFKC", url).strip())
    )
    parser.add_render_rule("link_open", _link)
    for name in ("heading_open", "heading_close"):
        parser.add_render_rule(name, _heading)
    for name in ("th_open", "td_open"):
        parser.add_render_rule(name, _cell)
    return parser


def _link(renderer, tokens, index, options, env) -> str:
    token = tokens[index]
    token.attrs = {
        "href": token.attrs["href"],
        "rel": "noopener noreferrer nofollow",
        "target": "_blank",
        "title": str(token.attrs["href"]),
    }
    return renderer.renderToken(tokens, index, options, env)


def _cell(renderer, tokens, index, options, env) -> str:
    """Give the alignment as a class: the pages allow no inline style."""
    style = str(tokens[index].attrs.pop("style", ""))
    if style:
        tokens[index].attrs["class"] = style.removeprefix("text-align:")
    return renderer.renderToken(tokens, index, options, env)


def _heading(renderer, tokens, index, options, env) -> str:
    """Put the headings of a text below those of the page, so that the page's outline stays right."""
    tokens[index].tag = f"h{min(6, int(tokens[index].tag[1:]) + 2)}"
    return renderer.renderToken(tokens, index, options, env)
