"""The report's page: it holds every number, runs nothing, asks no other host, and reads well in a real browser."""

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest

from rlhf.compare.page import page
from tests.compare.report_example import HOSTILE, example, interval, judged_pairs
from tests.compare.results_example import in_words, make

SIZES = (1280, 400)
FREE = (  # named by the experiment
    *("scores", "methods", "curves", "meta", "numbers", "score_kinds", "responses", "budget", "own", "reward", "pairs"),
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
    """Small PNGs under the figures' names: the page does not care what is on them."""
    from matplotlib.figure import Figure

    folder = tmp_path_factory.mktemp("figures")
    for name in NAMES:
        Figure(figsize=(4, 2)).savefig(folder / f"{name}.png", dpi=50)
    return {name: folder / f"{name}.png" for name in NAMES}


@pytest.fixture(scope="module")
def html(figures):
    return page(example(), figures)


def test_what_models_wrote_stays_text(html):
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    found = Tags(html)
    assert found.text.count(HOSTILE) == 3  # as it was written, once for each policy
    assert not {"script", "iframe", "object", "embed", "form", "link", "base"} & {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert len(found.all("img")) == len(NAMES)  # the one in an answer is none


def test_names_and_settings_stay_text_too(figures):
    report = example()
    report["name"] = report["judge"] = report["meta"]["command"] = "<img src=x>"
    report["score_kinds"] = {"<img src=x>": "gold", "reward_model": "proxy"}
    report["sentences"] = ["<img src=x> is ahead"]
    report["methods"]["ppo"]["swept"] = "<img src=x>"
    report["samples"][0]["responses"] = {"<img src=x>": report["samples"][0]["responses"]["sft"]}
    assert len(Tags(page(report, figures)).all("img")) == len(NAMES)


def test_nothing_is_asked_of_another_host(html):
    found = Tags(html)
    for _, attributes in found.tags:
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert "srcset" not in attributes
    links = [a["href"] for a in found.all("a")]
    assert all(re.fullmatch(r"#[a-z]+|https://arxiv\.org/abs/\d{4}\.\d{5}", link) for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_verdict_comes_first_and_whole(html):
    report = example()
    places = [html.index(sentence) for sentence in report["sentences"]]
    parts = [html.index(f'<h2 id="h-{name}">') for name in ("verdict", "how", "frontier", "repeat")]
    assert parts[0] < min(places) and max(places) < parts[1] < parts[2] < parts[3]


def test_the_answer_at_equal_kl_leads(figures):
    report = example()
    from rlhf.compare.words import sentences

    report["sentences"] = sentences(report)
    html = page(report, figures)
    lead = re.findall(r'<p class="lead">(.*?)</p>', html)
    assert len(lead) == 1 and lead[0].startswith("At KL 4, 9 and 16 nats PPO is ahead of DPO by ")
    assert html.count(lead[0]) == 1
    assert all(sentence in Tags(html).text for sentence in report["sentences"])


def test_tables_hold_the_numbers(figures):
    report = example()
    report["frontier"][0]["rows"][1]["difference"] = interval(0.12) | {"low": 0.03, "high": 0.21}
    report["points"][0]["kl"] = interval(1.5) | {"low": 1.25, "high": 1.75}
    report["judge_of_pairs"] = judged_pairs()
    html = page(report, figures)
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    row = next(row for row in rows if row[:2] == ["PPO over DPO", "4"])
    assert row[2] == "+0.12 [0.03, 0.21]"
    row = next(row for row in rows if row[:2] == ["PPO (kl_coef 0.02)", "25"])
    assert row[2:4] == ["5", "1.50 [1.25, 1.75]"]
    assert ["PPO (kl_coef 0.02)", "12.8k / 14.8k"] in [row[:2] for row in rows]
    row = next(row for row in rows if row[-1] == "87.5 %")
    assert row[:-1] == ["PPO over DPO", "60.0 % [50.0, 70.0]", "–", "25.0 %"]
    assert len([row for row in rows if " over " in row[0] and "%" in row[1]]) == 13 * 12 // 2 + 1


def test_screen_readers_find_their_way(html):
    found = Tags(html)
    assert found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == len(found.all("main")) == 1
    assert {"header", "nav", "main"} <= {tag for tag, _ in found.tags}
    assert all(th["scope"] in ("col", "row") for th in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) > 5
    for image in found.all("img"):
        assert len(image["alt"]) > 60 and int(image["width"]) == 200 and int(image["height"]) == 100
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


def test_all_that_repeats_it_is_there(html):
    report = example()
    text = Tags(html).text
    for name in report["meta"]:
        assert name in text
    assert "learning_rate: 0.0001" in text and "f00dfeed" in text and "0123abc" in text
    assert report["meta"]["command"] in text


@pytest.mark.parametrize(
    "without",
    [
        {"wins": None}, {"frontier": [], "curves": {}}, {"budget": None}, {"points": []}, {"samples": []},
        {"sentences": []}, {"meta": {}}, {"overoptimisation": [], "tuned": None, "power": None},
        {"judge": None, "wins": None, "frontier": None, "curves": None, "power": None, "tuned": None},
    ],
)  # fmt: skip
def test_a_report_may_lack_any_part(figures, without):
    for shown in (figures, {}):
        found = Tags(page(example() | without, shown))
        ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
        assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= ids
        assert len(found.all("img")) == len(shown)
    gone = example()
    for name in without:
        if name not in ("points", "judge"):
            del gone[name]
    assert "<h1>PPO against DPO</h1>" in page(gone, {}) or "points" in without


def test_what_summarise_makes_is_shown(figures):
    curves = {"ppo": lambda d: 0.5 * d, "dpo": lambda d: 0.5 * d - 0.05 * d * d}
    for results in (make(curves, groups=6), make(curves, groups=6, seeds=1, judge=None)):
        report = in_words(results)
        text = re.sub(r"\s+", " ", Tags(page(report, figures)).text)
        assert all(sentence in text for sentence in report["sentences"])


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
    compare(in_words(make(curves)), example())


def visit(path, folder):
    """What a browser sees of the page at each width and scheme."""
    from playwright.sync_api import sync_playwright

    seen = []
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (400, "light"), (1280, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
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
            found["axe"] = axe_of(view)
            seen.append(found)
        browser.close()
    return seen


def axe_of(view):
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError:
        return []
    view.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    found = Axe().run(view).response["violations"]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"][:3]]) for rule in found]


@pytest.fixture(scope="module")
def seen(html, tmp_path_factory):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(html, encoding="utf-8")
    with ThreadPoolExecutor(1) as thread:  # another test's browser may run in this one: playwright allows one a thread
        return thread.submit(visit, folder / "report.html", folder).result()


def test_in_a_browser_nothing_is_fetched_or_run(seen):
    for found in seen:
        assert {url for url in found["requests"] if not url.startswith("file:")} <= {"data:image/png;base64"}
        assert found["console"] == [] and found["images"] == [200] * len(NAMES)


def test_the_page_fits_and_wide_tables_scroll_in_their_own_box(seen):
    assert [found["scroll"] for found in seen] == [1280, 400, 1280]
    assert all(found["wide"] for found in seen if found["width"] == 400)


def test_no_barrier_is_found(seen):
    assert [found["axe"] for found in seen] == [[], [], []]
