"""The report's page: it holds every number, runs nothing, asks no other host, and reads well in a
real browser.
"""

import itertools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest

from rlhf.compare.summary import summarise
from rlhf.report.figures import draw
from rlhf.report.files import html_page
from rlhf.report.markdown import fence, markdown
from rlhf.report.sentences import headline, report_sentences, verdict_sentence
from tests.compare.report_example import HOSTILE, example, interval, judged_pairs
from tests.compare.results_example import make

FREE = (  # named by the experiment
    *(
        "scores",
        "methods",
        "curves",
        "meta",
        "numbers",
        "score_kinds",
        "responses",
        "budget",
        "own",
        "reward",
        "pairs",
    ),
    *("total", "match", "ranges", "shares", "residual"),
)
NAMES = ("frontier", "proxy_gold", "wins", "time", "lengths", "cost")


class Tags(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The figures of the example, by the name that report.md gives them."""
    found = draw(example(), tmp_path_factory.mktemp("figures"))
    return {f"{name}.svg": path.with_suffix(".svg") for name, path in found.items()}


def page(report, figures):
    return html_page(markdown(report, [name.removesuffix(".svg") for name in figures]), figures)


@pytest.fixture(scope="module")
def html(figures):
    return page(example(), figures)


def test_what_models_wrote_stays_text(html):
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    found = Tags(html)
    assert found.text.count(HOSTILE) == 3  # as it was written, once for each policy
    assert not {"script", "iframe", "object", "embed", "form", "link", "base"} & {
        tag for tag, _ in found.tags
    }
    assert not [
        name for _, attributes in found.tags for name in attributes if name.startswith("on")
    ]
    assert len(found.all("img")) == len(NAMES)  # the one in an answer is none


@pytest.mark.parametrize(
    "text", ["```\n<img src=x>\n```", "````\n# no heading", "> no quote", "\u202eright to left", ""]
)
def test_an_answer_cannot_leave_its_block(text):
    found = Tags(html_page("\n".join(["# title", "", *fence(text), "end"]), {}))
    assert not found.all("img") and not found.all("blockquote") and len(found.all("h1")) == 1
    assert len(found.all("pre")) == 1 and text in found.text and found.text.rstrip().endswith("end")


HOSTILE_NAMES = (
    "<img src=x>", "![x](http://evil.example/x.png)", "[x](https://evil.example)", "<https://evil.example>",
    "a|b*c*`d`", "$x_1$ & {b} ~~c~~",
)  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE_NAMES)
def test_names_and_settings_stay_text_too(figures, hostile):
    """Whatever a method, a score, an option, a role and a command are called."""
    text = json.dumps(example())
    for name in (
        "dpo",
        "gold",
        "kl_coef",
        "user",
        "rlhf experiment run configs/experiments/shop.yaml",
    ):
        text = text.replace(json.dumps(name), json.dumps(hostile))
    report = json.loads(text)
    report["score_kinds"][hostile] = "gold"
    found, same = Tags(page(report, figures)), Tags(page(example(), figures))
    assert len(found.all("img")) == len(NAMES) and found.text.count(hostile) > 20
    assert all(a["href"].startswith("#") for a in found.all("a"))
    for tag in ("tr", "em", "s", "del", "h1", "h2", "pre", "code"):
        assert len(found.all(tag)) == len(same.all(tag)), tag  # no cell or row was cut by a name


def test_nothing_is_asked_of_another_host(html):
    found = Tags(html)
    for image in found.all("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,") and "srcset" not in image
    assert all(re.fullmatch(r"#[a-z0-9-]+", link["href"]) for link in found.all("a"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(
        m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_it_opens_with_the_picture_one_sentence_and_one_table(html):
    report = example()
    assert headline(report) == (
        "By the gold score PPO is ahead of DPO at KL 4, 9 and 16; not shown to differ from DPO at KL 1."
    )
    places = [
        html.index(part) for part in ("<h1>", "<img", headline(report), "<table>", "<nav", "<h2")
    ]
    assert places == sorted(places)


def test_each_section_starts_with_one_sentence(html):
    for section in html.split("<h2")[1:]:
        assert re.match(r"[^>]*>[^<]+</h2>\n<p>[A-Z][^\n]+</p>\n", section), section[:200]


def test_all_verdicts_and_limits_are_on_the_page(html):
    report, text = example(), Tags(html).text
    sentences = [
        *(verdict_sentence(v, report) for v in report["verdicts"]),
        *report_sentences(report),
    ]
    assert len(sentences) > 10 and all(sentence in text for sentence in sentences)


def test_tables_hold_the_numbers(figures):
    report = example()
    report["frontier"][0]["rows"][1]["difference"] = interval(0.12) | {"low": 0.03, "high": 0.21}
    report["points"][0]["kl"] = interval(1.5) | {"low": 1.25, "high": 1.75}
    report["judge_of_pairs"] = judged_pairs()
    html = page(report, figures)
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
        for row in re.findall(r"(?s)<tr>(.*?)</tr>", html)
    ]
    row = next(row for row in rows if row[:2] == ["PPO over DPO", "4"])
    assert row[3] == "+0.12 [0.03, 0.21]"
    row = next(row for row in rows if row[:2] == ["PPO (kl_coef 0.02)", "25"])
    assert row[2:4] == ["5", "1.50 [1.25, 1.75]"]
    assert ["PPO (kl_coef 0.02)", "12.8k / 14.8k"] in [row[:2] for row in rows]
    row = next(row for row in rows if "87.5 %" in row)
    assert row == ["PPO over DPO", "60.0 % [50.0, 70.0]", "–", "25.0 %", "87.5 %", "0"]
    assert len([row for row in rows if " over " in row[0] and "%" in row[1]]) == 13 * 12 // 2 + 1


def test_screen_readers_find_their_way(html):
    found = Tags(html)
    assert (
        found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == len(found.all("main")) == 1
    )
    assert {"nav", "main"} <= {tag for tag, _ in found.tags}
    assert all(th["scope"] == "col" for th in found.all("th"))
    boxes = [box for box in found.all("div") if box.get("class") == "scroll"]
    assert len(boxes) == len(found.all("table")) > 5 and len(
        {box["aria-label"] for box in boxes}
    ) == len(boxes)
    assert all(len(image["alt"]) > 40 for image in found.all("img")) and found.all("title") == [{}]
    best = max(
        (p["scores"]["gold"]["difference"]["estimate"], p["kl"]["estimate"])
        for p in example()["points"] if p["method"] == "dpo"
    )  # fmt: skip
    assert f"DPO reaches at most {best[0]:.3f}, at KL" in found.all("img")[0]["alt"]
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= set(ids)


def test_what_repeats_it_is_there(html):
    report = example()
    text = Tags(html).text
    assert (
        "f00dfeed" in text and "0123abc" in text and "2 CPU cores" in text and "report.json" in text
    )
    assert report["meta"]["command"] in text


@pytest.mark.parametrize(
    "without",
    [
        {"wins": None}, {"frontier": [], "curves": {}}, {"points": []}, {"samples": []}, {"meta": {}},
        {"budget": {"match": None, "matched": None, "rows": []}}, {"verdicts": []},
        {"overoptimisation": [], "tuned": {"methods": {}, "rows": []}, "power": None},
    ],
)  # fmt: skip
def test_a_report_may_lack_any_part(figures, without):
    for shown in (figures, {}):
        found = Tags(page(example() | without, shown))
        ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
        assert {a["href"][1:] for a in found.all("a")} <= ids
        assert len(found.all("img")) == len(shown)
    assert "<title>PPO against DPO" in page(example() | without, {}) or "points" in without


def test_without_a_judge_it_says_that_nothing_can_be_decided():
    text = Tags(page(example(judge=None), {})).text
    assert "cannot judge which policy is better" in text and "decides nothing" in text


def test_the_example_has_what_summarise_makes():
    """The made-up report of these tests has no names that a real one lacks, all the way down."""

    def compare(real, made, where="report"):
        if isinstance(real, dict) and isinstance(made, dict):
            free = where.rpartition(".")[2] in FREE
            assert free or set(made) <= set(real), (where, set(made) - set(real))
            for name in set(real) & set(made):
                compare(real[name], made[name], f"{where}.{name}")
        elif isinstance(real, list) and isinstance(made, list) and real and made:
            compare(real[0], made[0], where)

    curves = {"ppo": lambda d: 0.5 * d, "dpo": lambda d: 0.5 * d - 0.05 * d * d}
    compare(summarise(make(curves)), example())


def visit(path, folder):
    """What a browser sees of the page at each width and scheme."""
    from playwright.sync_api import sync_playwright

    seen = []
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (400, "light"), (1280, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            view.set_default_timeout(120_000)
            found = {"width": width, "scheme": scheme, "requests": [], "console": []}
            view.on("request", lambda r, f=found: f["requests"].append(r.url.split(",")[0]))
            view.on("console", lambda m, f=found: f["console"].append(m.text))
            view.on("dialog", lambda d, f=found: (f["console"].append(d.message), d.dismiss()))
            view.goto(path.as_uri())
            found["scroll"] = view.evaluate("document.documentElement.scrollWidth")
            found["images"] = view.evaluate("[...document.images].map(i => i.naturalWidth)")
            found["wide"] = view.evaluate(
                "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
            )
            found["ink"] = view.evaluate("getComputedStyle(document.body).color")
            found["axe"] = axe_of(view)
            seen.append(found)
        browser.close()
    return seen


def axe_of(view):
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        return []
    found = Axe().run(view).response["violations"]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"][:3]]) for rule in found]


@pytest.fixture(scope="module")
def seen(html, tmp_path_factory):
    pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]"
    )
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(html, encoding="utf-8")
    # another test's browser may run in this one: playwright allows one a thread
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(visit, folder / "report.html", folder).result()


def test_in_a_browser_nothing_is_fetched_or_run(seen):
    for found in seen:
        assert {url for url in found["requests"] if not url.startswith("file:")} <= {
            "data:image/svg+xml;base64"
        }
        assert (
            found["console"] == [] and all(found["images"]) and len(found["images"]) == len(NAMES)
        )


def test_the_page_fits_and_wide_tables_scroll_in_their_own_box(seen):
    assert [found["scroll"] for found in seen] == [1280, 400, 1280]
    assert all(found["wide"] for found in seen if found["width"] == 400)


def test_dark_mode_is_light_on_dark(seen):
    light, _, dark = (sum(map(int, re.findall(r"\d+", found["ink"])[:3])) for found in seen)
    assert light < 150 and dark > 600


def test_no_barrier_is_found(seen):
    assert [found["axe"] for found in seen] == [[], [], []]
