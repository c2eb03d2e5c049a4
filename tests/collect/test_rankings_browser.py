"""Ordering answers and marking passages as people do it, in a real browser without a window."""

import pytest

from rlhf.data.store import Store
from tests.collect.conftest import ANSWERS, fill, fill_rankings
from tests.collect.test_browser import browse, follow, has_text, judging, question, saved

__all__ = ["browse"]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def server(tmp_path, serve):
    path = fill_rankings(tmp_path / "votes.db", rankings=3)
    return serve(path, "--annotators", "ann,bob", "--overlap", "2")


def ranked(server):
    """The orders that stand, as numbers of the answers on their page, and all else of them."""
    with Store.open(server.store) as store:
        cast = store.at().ranked()
    orders = []
    for each in cast:
        orders.append([sorted(1 + each.shown.index(id) for id in equal) for equal in each.order])
    return orders, cast


def tiers(page):
    return [tier.inner_text().split() for tier in page.locator("#order .tier").all()]


def test_answers_are_ordered_by_keyboard(server, browse):
    page = browse(server, "ann")
    page.keyboard.press("Enter")  # Start
    judging(page)
    first = question(page)
    page.keyboard.press("Enter")  # answers without a place are asked for
    assert page.evaluate("document.activeElement.id") == "place-1" and ranked(server)[0] == []
    page.keyboard.press("Escape")
    for key in ("3", "1", "t", "4", "2"):
        page.keyboard.press(key)
    assert tiers(page) == [["1", "3"], ["4"], ["2"]]
    has_text(page, "#spoken", "Answer 2: place 3 of 3")
    # the last out and in again; 4 one step better: as good as 1 and 3, then before them
    page.keyboard.press("Backspace")
    assert tiers(page) == [["1", "3"], ["4"]] and page.inner_text("#unplaced") == "2"
    page.keyboard.press("2")
    page.keyboard.press("4")
    page.keyboard.press("ArrowLeft")
    assert tiers(page) == [["1", "3", "4"], ["2"]]
    has_text(page, "#spoken", "Answer 4: place 1 of 2, as good as 1 and 3")
    page.keyboard.press("ArrowLeft")
    assert tiers(page) == [["4"], ["1", "3"], ["2"]]
    assert [page.input_value(f"#place-{i}") for i in (1, 2, 3, 4)] == ["2", "3", "2", "1"]
    page.keyboard.press("w")
    page.keyboard.type("1234st")  # in a text, keys are letters
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    saved(page, 1)
    orders, cast = ranked(server)
    assert orders == [[[4], [1, 3], [2]]] and cast[0].reason == "1234st"
    page.keyboard.press("u")
    saved(page, 0)
    assert question(page) == first and ranked(server)[0] == []
    page.keyboard.press("s")  # Skip
    saved(page, 1)
    assert ranked(server)[0] == [[]]


def test_answers_are_ordered_by_buttons_and_lists(server, browse):
    page = browse(server, "ann")
    page.uncheck("#keys-on")
    page.goto(server.url)
    page.keyboard.press("1")
    assert tiers(page) == []
    page.select_option("#place-2", "3")  # as it was chosen, whatever is chosen next
    assert page.input_value("#place-2") == "3" and tiers(page) == [["2"]]
    page.select_option("#place-1", "1")
    page.select_option("#place-3", "1")
    page.select_option("#place-4", "4")
    assert tiers(page) == [["1", "3"], ["2"], ["4"]]
    page.click("#answer-4 ~ .steps [data-step='-1']")
    assert tiers(page) == [["1", "3"], ["2", "4"]]
    page.click("#answer-3 ~ .steps [data-step='1']")
    assert tiers(page) == [["1"], ["3"], ["2", "4"]]
    page.click("#save")
    saved(page, 1)
    assert ranked(server)[0] == [[[1], [3], [2, 4]]]


def test_answers_are_ordered_without_scripts(server, browse):
    page = browse(server, "ann", script=False)
    follow(page, "#start")
    assert not page.is_visible("#ordering") and not page.is_visible(".marks >> nth=0")
    for number, place in ((1, "2"), (2, "1"), (3, "2"), (4, "4")):
        page.select_option(f"#place-{number}", place)
    follow(page, "#save")
    assert ranked(server)[0] == [[[2], [1, 3], [4]]]
    follow(page, "#skip")
    assert ranked(server)[0][1] == []


def middle(page, where):
    box = page.locator(where).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page, chip, where):
    """Drag with the mouse, in steps as a hand does it."""
    page.mouse.move(*middle(page, f"[data-chip='{chip}']"))
    page.mouse.down()
    page.mouse.move(*middle(page, where), steps=5)
    page.mouse.move(*middle(page, where))
    page.mouse.up()


def has_order(page, *expected):
    """Wait for it, since what is dragged is drawn a moment later."""
    from playwright.sync_api import expect

    expect(page.locator("#order .tier")).to_have_text(list(expected))


def test_answers_are_ordered_by_dragging(server, browse):
    page = browse(server, "ann")
    page.goto(server.url)
    for chip in "123":
        page.click(f"[data-chip='{chip}']")
    has_order(page, "1", "2", "3")
    drag(page, 3, ".gap[data-gap='0']")
    has_order(page, "3", "1", "2")
    drag(page, 2, ".tier[data-tier='0']")
    has_order(page, "23", "1")
    drag(page, 4, ".gap[data-gap='1']")
    has_order(page, "23", "4", "1")
    drag(page, 1, ".tier[data-tier='1']")
    has_order(page, "23", "14")
    drag(page, 2, ".gap[data-gap='2']")
    has_order(page, "3", "14", "2")
    drag(page, 3, "#answer-1")  # let go elsewhere: as it was
    has_order(page, "3", "14", "2")
    page.click("#save")
    saved(page, 1)
    assert ranked(server)[0] == [[[3], [1, 4], [2]]]


def test_answers_are_ordered_by_touch_on_a_phone(server, browse):
    page = browse(server, "ann", **PHONE)
    page.goto(server.url)
    for chip in "2413":
        page.tap(f"[data-chip='{chip}']")
    has_order(page, "2", "4", "1", "3")
    # a finger: touch events of the device, of which the browser makes pointer events
    device = page.context.new_cdp_session(page)
    (x, y), (to_x, to_y) = middle(page, "[data-chip='3']"), middle(page, ".tier[data-tier='0']")

    def touch(kind, *points):
        at = [{"x": px, "y": py} for px, py in points]
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    touch("touchStart", (x, y))
    for part in (0.3, 0.6, 1.0):
        touch("touchMove", (x + part * (to_x - x), y + part * (to_y - y)))
    touch("touchEnd")
    has_text(page, "#spoken", "Answer 3: place 1 of 3, as good as 2")
    has_order(page, "23", "4", "1")
    page.click("#save")
    saved(page, 1)
    assert ranked(server)[0] == [[[2, 3], [4], [1]]]


@pytest.mark.parametrize("width", [320, 390, 820, 1360])
def test_a_ranking_does_not_stick_out(server, browse, width):
    page = browse(server, "ann", viewport={"width": width, "height": 780})
    for path in ("/welcome", "/"):
        page.goto(server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    for key in "1234":
        page.keyboard.press(key)
    page.click(".marks >> nth=0 >> summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".verdict").bounding_box()["height"] < 0.4 * 780
    for button in ("#save", "#skip", "[data-chip='1']", "[data-step='1'] >> nth=0"):
        box = page.locator(button).bounding_box()
        assert box["height"] >= 44 and box["width"] >= 44, button


def test_passages_are_marked_by_keyboard_and_seen_by_the_owner(tmp_path, serve, browse):
    path = fill(tmp_path / "votes.db", pairs=0)
    with Store.open(path) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        texts = ("\n👍🏽 Hello **there** \r\nfriend", "What \u202edo you want?")
        store.add_comparison(*(store.add_response(prompt, text) for text in texts))
    server = serve(path, "--annotators", "ann", "--overlap", "1")
    page = browse(server, "ann")
    page.goto(server.url)
    number = 1 if "Hello" in page.inner_text(".answer >> nth=0") else 2
    for _ in range(number):
        page.keyboard.press("m")
    assert page.evaluate("document.activeElement.id") == f"passage-{number}"
    page.keyboard.press("g")
    has_text(page, "#spoken", "Select a passage first.")
    # the line end, two characters of an emoji and a blank; then "Hello"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Control+ArrowRight")
    page.keyboard.press("g")
    page.keyboard.type("Friendly, says m and x")
    page.keyboard.press("Enter")  # back to the passage, nothing is sent
    page.keyboard.press("Control+End")
    page.keyboard.press("Shift+Home")
    page.keyboard.press("x")
    page.keyboard.press("Escape")
    assert page.locator(".marked li").count() == 2
    page.keyboard.press(str(number))
    page.keyboard.press("Enter")
    saved(page, 1)
    with Store.open(server.store) as store:
        (vote,) = store.at().votes()
    assert [(span["text"], span["label"], span.get("remark")) for span in vote.spans] == [
        ("Hello", "good", "Friendly, says m and x"),
        ("friend", "bad", None),
    ]
    assert {span["answer"] for span in vote.spans} == {vote.choice}
    owner = browse(server, "owner")
    follow(owner, "nav >> text=Passages")
    assert [each.inner_text() for each in owner.locator("mark").all()] == ["Hello", "friend"]
    assert "Friendly, says m and x" in owner.inner_text("main")


def test_passages_are_marked_by_mouse_in_a_ranking(server, browse):
    from playwright.sync_api import expect

    page = browse(server, "ann")
    page.goto(server.url)
    texts = [page.input_value(f"#passage-{i}") for i in (1, 2, 3, 4)]
    number = 1 + texts.index(ANSWERS[0])
    card = page.locator(f"[data-number='{number}']")
    # what is selected in the answer as it is shown is selected in its plain text
    card.locator("strong").dblclick()
    card.locator(".marks summary").click()
    # the panel takes the selection after the click
    expect(page.locator(f"#passage-{number}")).to_be_focused()
    selected = f"document.getElementById('passage-{number}')"
    found = page.evaluate(
        f"{selected}.value.slice({selected}.selectionStart, {selected}.selectionEnd)"
    )
    assert found == "today"
    card.locator("[data-mark='bad']").click()
    card.locator(".marked input").fill("<b>when?</b>")
    card.locator("[data-mark='good']").click()
    card.locator(".marked li >> nth=1 >> button").click()
    assert card.locator(".marked li").count() == 1
    page.keyboard.press("Escape")
    for key in "1234":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    saved(page, 1)
    (cast,) = ranked(server)[1]
    start = ANSWERS[0].index("today")
    assert [(s["start"], s["end"], s["label"], s["remark"]) for s in cast.spans] == [
        (start, start + 5, "bad", "<b>when?</b>")
    ]
    assert cast.spans[0]["answer"] == cast.shown[number - 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_new_pages_pass_the_accessibility_rules(server, browse, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )

    def check(there):
        found = axe.Axe().run(there).response["violations"]
        assert not found, [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]

    for name in ("ann", "bob"):
        page = browse(server, name, color_scheme=scheme)
        page.goto(server.url)
        check(page)
        for key in "213":
            page.keyboard.press(key)
        page.keyboard.press("t")
        page.keyboard.press("m")
        page.keyboard.press("Control+a")
        page.keyboard.press("g")
        page.keyboard.type("because")
        check(page)
        page.keyboard.press("Escape")
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        saved(page, 1)
    owner = browse(server, "owner", color_scheme=scheme)
    for path in ("/owner", "/owner/passages", "/owner/disputed"):
        owner.goto(server.url + path)
        check(owner)
        assert "Kendall" in owner.inner_text("main") or path != "/owner"
