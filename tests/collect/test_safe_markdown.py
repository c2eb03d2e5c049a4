import html.parser

import pytest

from rlhf.collect.safe_markdown import FOLDED, LONGEST_PARSED, render, visible

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    "<style>body{display:none}</style>",
    "<iframe src=https://example.org></iframe>",
    "<form action=/undo method=post><button>x</button></form>",
    "<!-- --><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&#58;alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:x)",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](file:///etc/passwd)",
    "[x](//example.org)",
    "[x](/leave)",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "![x](https://example.org/track.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '[x](https://a.example "\' onmouseover=alert(1) x=")',
    '[x](https://a.example"onmouseover="alert(1))',
    "```x onload=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "</div></article></form><script>alert(1)</script>",
    "| <script> |\n|---|\n| <b onclick=x> |",
    "| a | b |\n|:-:|--:|\n| c | d |",
    "x" * (FOLDED + 1) + "<script>alert(1)</script>",
    "<script>alert(1)</script>" + "x" * FOLDED,
    "y" * (LONGEST_PARSED + 1) + "</pre></details><script>alert(1)</script>",
]
INERT = {
    "div",
    "p",
    "a",
    "pre",
    "code",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "em",
    "br",
}


class Reader(html.parser.HTMLParser):
    """Tags with attributes as a browser would build them; `text` is what is read."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] if tag not in ("br", "hr") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:30] + t[-12:])
def test_a_hostile_answer_is_inert(text):
    page = Reader(str(render(text)))
    assert not page.open  # whatever it closes is its own
    for tag, attributes in page.tags:
        assert tag in INERT
        allowed = {"a": {"href", "rel", "target", "title"}, "div": {"class", "dir"}}.get(
            tag, {"class"}
        )
        assert set(attributes) <= allowed, (tag, attributes)
        if tag == "a":
            assert attributes["href"].startswith(("https://", "http://", "mailto:"))
            assert attributes["rel"] == "noopener noreferrer nofollow"


def test_markdown_and_honest_links_work():
    page = Reader(
        str(
            render(
                "# Title\n\n**bold** [shop](https://shop.example/a?b=1&c=2) <mailto:x@y.example>\n\n- one"
            )
        )
    )
    tags = [tag for tag, _ in page.tags]
    # a title stands below the page's own headings
    assert tags == ["div", "h3", "p", "strong", "a", "a", "ul", "li"]
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [
        "https://shop.example/a?b=1&c=2",
        "mailto:x@y.example",
    ]


def test_what_turns_or_hides_text_is_written_out():
    assert visible("a\u202egnp.exe\u202c \u2066x\u2069 \u200b\x1b[31m\r\nb\rc") == (
        "a⟦U+202E⟧gnp.exe⟦U+202C⟧ ⟦U+2066⟧x⟦U+2069⟧ ⟦U+200B⟧⟦U+001B⟧[31m\nb\nc"
    )
    joined = "👩‍👩‍👧 नमस्ते שלום مرحبا"  # joiners and right-to-left letters are how people write
    assert visible(joined) == joined and joined in Reader(str(render(joined))).text
    assert '<div class="text" dir="auto">' in render(joined)


def test_long_texts_are_folded_and_lose_nothing():
    for size in (FOLDED + 1, LONGEST_PARSED + 1):
        words = "word " * (size // 5 + 1)
        page = str(render(words))
        assert (
            page.count("<details") == 1
            and page.split("</summary>")[1].count("word") == size // 5 + 1
        )
    assert "<details" not in render("x" * FOLDED)


def test_hidden_characters_are_written_out_as_entities_too():
    page = render(
        'abc &#x202E;gpj.exe &#8203;&rlm;&shy;&#847;&#x3164; [&lrm;x](https://a.example "&#x202d;")'
    )
    for code in ("202E", "200B", "200F", "00AD", "034F", "3164", "200E"):
        assert f"⟦U+{code}⟧" in page and chr(int(code, 16)) not in page
    assert chr(0x202D) not in page
    assert "⟦U+00AD⟧⟦U+034F⟧⟦U+3164⟧" in visible("\u00ad\u034f\u3164")
    assert "a &amp; b" in render("a &amp; b") and "⟦U+202E⟧" in render("`\u202e`")


def test_no_text_takes_for_ever():
    """One that takes quadratic time or worse would meet the suite's timeout."""
    sizes = [
        ("[" * 19_000),
        ("*a " * 6_000),
        ("> " * 9_000),
        ("`a" * 9_000),
        ("[a](" * 4_500),
        "x" * 2_000_000,
    ]
    for text in sizes:
        assert text[:10] in render(text).unescape()
