"""The app as people use it, in a real browser without a window."""

import json
import re

import pytest

from rlhf.data.store import Store
from tests.collect.conftest import ROOT, fill
from tests.collect.test_safe_markdown import HOSTILE

VOICE = ("--voice", str(ROOT / "configs" / "voices" / "shop.yaml"))


@pytest.fixture
def browse(chromium, serve):
    """browse(server, name, **context) -> a page signed in; errors and requests elsewhere fail the
    test at its end. Pages close before the servers, which they still ask.
    """
    contexts, wrong = [], []

    def start(server, name, script=True, **options):
        context = chromium.new_context(java_script_enabled=script, **options)
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(server.url) else wrong.append(r.url))
        page.goto(server.links[name])
        return page

    yield start
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture
def server(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=4)
    criteria = ("--criteria", "clear,sounds like the brand")
    return serve(path, "--annotators", "ann,bob", "--overlap", "2", *criteria, *VOICE)


def votes(server, name="ann"):
    with Store.open(server.store) as store:
        return [vote for vote in store.at().votes() if vote.annotator == name]


def question(page):
    return page.inner_text(".talk .user .text")


def saved(page, count):
    has_text(page, ".progress strong >> nth=0", str(count))
    page.wait_for_load_state()  # the script is there


def judging(page):
    """Wait for the first page of work: keys pressed before its script is there go nowhere."""
    page.wait_for_selector("#judge")
    page.wait_for_load_state()


def follow(page, where):
    """Click on what leads to another page, and wait until all of it is there, its script too."""
    with page.expect_navigation():
        page.click(where)


def has_text(page, where, text):
    """Wait for it (the page's own policy forbids `wait_for_function`)."""
    from playwright.sync_api import expect

    expect(page.locator(where)).to_have_text(text, timeout=120_000)


def test_by_mouse_from_the_link_to_the_end(browse, server):
    page = browse(server, "ann")
    token = server.links["ann"].rsplit("/", 1)[1]
    assert page.url == f"{server.url}/welcome" and "Hello, ann" in page.inner_text("h1")
    assert token not in page.evaluate("document.cookie + document.documentElement.outerHTML")
    follow(page, "#start")
    assert "The voice of Fernhill" in page.inner_text("aside") and "guarantee" in page.inner_text(
        "aside"
    )
    first = question(page)
    assert not page.is_visible("text=By far") and page.is_disabled("#undo")
    page.click("#answer-2")  # anywhere on the answer
    assert page.is_checked("#pick-2")
    page.click("label[for=strength-2]")
    page.click("text=Say why")
    page.click("text=off tone")
    page.fill("#reason", "Too loud for us.\nSecond line")
    page.click("#save")
    saved(page, 1)
    has_text(page, "#note", "Saved.")
    assert page.url == f"{server.url}/"
    [vote] = votes(server)
    assert vote.choice != vote.left and (vote.strength, vote.tags) == (2, ["off tone"])
    assert vote.reason.split() == ["Too", "loud", "for", "us.", "Second", "line"]
    page.click("#undo")
    saved(page, 0)
    assert question(page) == first and votes(server) == []
    for label in (
        "label[for=pick-1]",
        "label[for=pick-tie]",
        "label[for=pick-bad]",
        "label[for=pick-skip]",
    ):
        before = len(votes(server))
        page.click(label)
        assert page.is_visible("text=By far") == (label == "label[for=pick-1]")
        follow(page, "#save")
        assert len(votes(server)) == before + 1
    assert "Thank you, ann" in page.inner_text("h1") and "judged 4 pairs" in page.inner_text(
        ".lead"
    )
    assert [vote.choice for vote in votes(server)][1:] == ["tie", "both_bad", "skip"]


def test_by_keyboard_alone(browse, server):
    page = browse(server, "ann")
    page.keyboard.press("Enter")  # Start
    judging(page)
    page.keyboard.press("1")
    page.keyboard.press("5")
    page.keyboard.press("Enter")
    saved(page, 1)
    second = question(page)
    page.keyboard.press("t")
    page.keyboard.press("2")  # another mind
    page.keyboard.press("2")  # the same key again saves
    saved(page, 2)
    page.keyboard.press("u")
    saved(page, 1)
    assert question(page) == second
    page.keyboard.press("w")
    page.keyboard.type("12tbsu!")  # in a text, keys are letters
    assert page.input_value("#reason") == "12tbsu!" and not page.is_checked("#pick-1")
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    saved(page, 2)
    first, last = votes(server)
    assert (first.choice, first.strength) == (first.left, 3)
    assert (last.choice, last.reason) == ("both_bad", "12tbsu!")
    page.keyboard.press("3")  # a strength of nothing
    assert not page.is_checked("#strength-1")


def test_by_tab_and_space_without_single_keys(browse, server):
    page = browse(server, "ann")
    page.uncheck("#keys-on")
    page.goto(server.url)
    page.keyboard.press("1")
    assert not page.is_checked("#pick-1")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    seen = []
    while page.evaluate("document.activeElement.id") != "pick-1":
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        assert len(seen) < 30, seen
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("#pick-2")
    while page.evaluate("document.activeElement.id") != "save":
        page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen
    page.keyboard.press("Space")
    saved(page, 1)


def test_without_scripts(browse, server):
    page = browse(server, "ann", script=False)
    page.click("#start")
    page.check("#pick-2")
    page.check("#strength-3")
    follow(page, "#save")
    assert "Saved." in page.inner_text("#note")
    assert [(v.strength, v.choice != v.left) for v in votes(server)] == [(3, True)]
    follow(page, "#undo")
    assert "Undone" in page.inner_text("#note") and votes(server) == []


def test_answers_are_rated_and_written_by_keyboard(browse, server):
    page = browse(server, "ann")
    follow(page, "#start")
    page.focus("#rate-0-left")
    page.keyboard.press("4")  # of the list, not "clearly"
    assert page.input_value("#rate-0-left") == "4" and not page.is_checked("#strength-2")
    page.select_option("#rate-1-right", "2")
    assert not page.is_checked("#pick-1")  # a rating is no choice
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.keyboard.press("w")
    page.keyboard.press("Tab")
    page.keyboard.type("Better: 1 2 t.")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    saved(page, 1)
    [vote] = votes(server)
    right = "b" if vote.left == "a" else "a"
    assert vote.choice == vote.left and vote.corrected == "Better: 1 2 t."
    assert vote.criteria == {"clear": {vote.left: 4}, "sounds like the brand": {right: 2}}


def zoe_is_excluded_after_her_vote(server):
    with Store.open(server.store) as store:
        zoe, yan = store.add_annotator("zoe"), store.add_annotator("yan")
        ratings = {"sounds like the brand": {"a": 1, "b": 5}}
        store.vote(1, yan, "a", criteria=ratings, corrected="Mine. " * 30)
        store.vote(1, zoe, "b", criteria=ratings)
        store.vote(2, zoe, "b")
        store.vote(1, store.add_annotator("xia"), "b")
        store.exclude("zoe")


def test_an_impatient_finger_is_one_vote(browse, server):
    page = browse(server, "ann")
    page.goto(server.url)
    page.keyboard.press("1")
    page.dblclick("#save", no_wait_after=True)
    saved(page, 1)
    page.go_back()  # to a page that was answered
    page.wait_for_load_state()
    saved(page, 1)
    assert len(votes(server)) == 1


def test_hostile_answers_do_nothing(browse, tmp_path, serve):
    bidi = "\u202ereversed\u202c \u2067isolated"
    path = fill(tmp_path / "votes.db", pairs=0, hostile=[*HOSTILE, bidi, "huge " * 200_000])
    server = serve(path, "--annotators", "ann", "--overlap", "1")
    page = browse(server, "ann")
    page.goto(server.url)
    for done in range(len(HOSTILE) + 2):
        saved(page, done)
        foreign = page.evaluate(
            "[...document.querySelectorAll('.answer script, .answer img, .answer iframe, .answer style, .answer form, "
            ".answer svg, .answer input')].length + [...document.querySelectorAll('.answer *')].filter(e => "
            "e.getAttributeNames().some(n => n.startsWith('on'))).length"
        )
        assert foreign == 0 and page.locator(".answer").count() == 2
        for link in page.locator(".answer a").all():
            assert re.match(r"https?:|mailto:", link.get_attribute("href"))
        page.keyboard.press("s")
        page.keyboard.press("s")
        saved(page, done + 1)
    assert page.is_visible(".tick")
    assert len(votes(server)) == len(HOSTILE) + 2


def test_the_owner_looks_and_exports(browse, server):
    for name in ("ann", "bob"):
        page = browse(server, name)
        page.goto(server.url)
        for done in range(4):
            better = "1" if "Fernhill" in page.inner_text(".answer >> nth=0") else "2"
            page.keyboard.press(better if name == "ann" else {"1": "2", "2": "1"}[better])
            page.keyboard.press("4")
            page.keyboard.press("Enter")
            saved(page, done + 1)
        assert page.is_visible(".tick")
    owner = browse(server, "owner")
    assert owner.url == f"{server.url}/owner" and "100%" in owner.inner_text("main")
    assert owner.locator("#people tbody tr").count() == 2
    follow(owner, "nav >> text=Disputed")
    assert owner.locator(".dispute").count() >= 3 and owner.locator(".dispute .answer").count() >= 6
    owner.go_back()
    with owner.expect_download() as download:
        owner.click("text=Each vote")
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == 8 and {"prompt", "chosen", "rejected"} <= set(json.loads(lines[0]))
    owner.fill("#name", "cem")
    follow(owner, "text=Make a link")
    server.links["cem"] = owner.inner_text("#link")
    assert "Hello, cem" in browse(server, "cem").inner_text("h1")


@pytest.mark.parametrize("width", [320, 390, 820, 1360])
def test_nothing_sticks_out(browse, server, width):
    zoe_is_excluded_after_her_vote(server)
    page = browse(server, "ann", viewport={"width": width, "height": 780})
    owner = browse(server, "owner", viewport={"width": width, "height": 780})
    for there, path in (
        (page, "/welcome"),
        (page, "/"),
        (owner, "/owner"),
        (owner, "/owner/disputed"),
    ):
        there.goto(server.url + path)
        assert there.evaluate("document.documentElement.scrollWidth") <= width, path
    page.goto(server.url)
    assert page.is_visible("#save")
    page.click("label[for=pick-1]")  # the bar does not cover its own buttons
    page.click("label[for=strength-3]")
    box = page.locator(".verdict").bounding_box()
    assert box["height"] < 0.5 * 780 and page.locator("#save").bounding_box()["height"] >= 44


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_pass_the_accessibility_rules(browse, server, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    zoe_is_excluded_after_her_vote(server)
    page = browse(server, "ann", color_scheme=scheme)
    owner = browse(server, "owner", color_scheme=scheme)

    def check(there):
        found = axe.Axe().run(there).response["violations"]
        assert not found, [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]

    check(page)
    page.goto(server.url)
    check(page)
    page.keyboard.press("1")
    page.click("text=Say why")
    check(page)
    for path in ("/owner", "/owner/disputed"):
        owner.goto(server.url + path)
        check(owner)
