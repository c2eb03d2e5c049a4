"""Orders of more answers and marked passages, as plain forms."""

import html
import json
import re

import pytest

from benchmarks.votes.collect_load import Client, fields_of
from rlhf.cli import main
from rlhf.collect.safe_markdown import source_span, visible
from rlhf.data.store import Store
from tests.collect.conftest import fill, fill_rankings
from tests.collect.test_app import client
from tests.collect.test_safe_markdown import HOSTILE


def page_of(person):
    """The ranking's page, its fields and the texts of its answers as they can be marked."""
    page = person.get("/")[1]
    texts = re.findall(r'<textarea id="passage-\d"[^>]*>\n(.*?)</textarea>', page, re.DOTALL)
    return page, fields_of(page, "/vote"), [html.unescape(text) for text in texts]


def ranked(server):
    with Store.open(server.store) as store:
        return store.at().ranked(), store.at().rankings()


def note(person, form):
    return person.post("/vote", form)[0].headers["Location"].removeprefix("/?note=")


def test_an_order_by_plain_form(tmp_path, serve):
    running = serve(fill_rankings(tmp_path / "votes.db", 1), "--annotators", "ann,bob")
    ann = client(running, "ann")
    assert "put them in order" in ann.get("/welcome")[1]
    page, form, texts = page_of(ann)
    # blind: neither a model nor an order that the store has
    assert "policy" not in page and len(texts) == 4 and 'name="place-3"' in page
    places = {f"place-{number}": place for number, place in enumerate("2133")}
    for wrong in ("", "5", "0", "x", "1" + "0" * 5000, "001" + "0" * 5000):
        assert note(ann, form | places | {"place-1": wrong}) == "order"
    assert "Give every answer a place" in ann.get("/?note=order")[1]
    assert note(ann, form | places | {"choice": "left"}) == "gone"
    assert ranked(running)[0] == []
    about = {"reason": "Says <b>what</b> happens", "tag": "wrong"}
    assert note(ann, form | places | about) == "saved"
    assert note(ann, form | places | about) == "again"
    assert note(ann, form | {"skip": "yes"}) == "differs"
    (cast,), rankings = ranked(running)
    names = {response["id"]: response["text"] for response in rankings[1]["responses"]}
    order = [sorted(names[id] for id in equal) for equal in cast.order]
    assert order == [[texts[1]], [texts[0]], sorted(texts[2:])]
    assert [names[id] for id in cast.shown] == texts and cast.duration_ms is not None
    assert (cast.reason, cast.tags) == ("Says <b>what</b> happens", ["wrong"])
    # the same page again after an undo, and a skip takes no slot
    undo = fields_of(ann.get("/")[1], "/undo")
    ann.post("/undo", undo)
    again = page_of(ann)
    assert again[2] == texts and ranked(running)[0] == []
    assert note(ann, again[1] | {"skip": "yes"}) == "saved"
    assert ranked(running)[0][0].order == []
    bob = client(running, "bob")
    assert note(bob, page_of(bob)[1] | places) == "saved"


def mark(text, answer, words, label="good", **more):
    start = text.index(words)
    about = {"answer": answer, "start": start, "end": start + len(words), "text": words}
    return about | {"label": label, **more}


def test_marked_passages_of_pairs_and_rankings_are_kept_and_shown(tmp_path, serve, capsys):
    path = fill_rankings(tmp_path / "votes.db", 1, pairs=1)
    running = serve(path, "--annotators", "ann", "--overlap", "1")
    ann = client(running, "ann")
    for _ in range(2):
        _, form, texts = page_of(ann)
        number = next(i for i, text in enumerate(texts) if "kettle" in text)
        other = (number + 1) % len(texts)
        marks = [
            mark(texts[number], number, "new kettle **today**.\n-", remark="<i>when</i>"),
            mark(texts[other], other, texts[other][:5], "bad"),
        ]
        places = {f"place-{i}": str(i + 1) for i in range(len(texts))}
        choice = {"choice": "left"} if len(texts) == 2 else places
        sent = form | choice | {"marks": json.dumps(marks)}
        assert note(ann, sent) == "saved"
    with Store.open(path) as store:
        view = store.at()
        (vote,) = [vote for vote in view.votes() if vote.ranking is None]
        pair = view.pair(vote.comparison)
        assert {span["label"] for span in vote.spans} == {"good", "bad"}
        for span in vote.spans:
            assert pair[f"text_{span['answer']}"][span["start"] : span["end"]] == span["text"]
        texts = {response["id"]: response["text"] for response in view.rankings()[1]["responses"]}
        (cast,) = view.ranked()
        good = next(span for span in cast.spans if span["label"] == "good")
        assert texts[good["answer"]][good["start"] : good["end"]] == "new kettle **today**.\n-"
        assert good["remark"] == "<i>when</i>"
    owner = client(running, "owner")
    overview = owner.get("/owner")[1]
    assert "Passages" in overview and re.search(r'Passages <span class="count">4</span>', overview)
    shown = owner.get("/owner/passages")[1]
    assert shown.count("&lt;i&gt;when&lt;/i&gt;") == 2 and shown.count("<mark>") == 4
    assert "<mark>new kettle **today**.\n-</mark>" in shown and "policy-0" in shown
    assert owner.get("/owner/passages?page=99x")[0].status == 200
    text = owner.get("/owner/export?aggregate=each")[1]
    rows = [json.loads(line) for line in text.splitlines()]
    assert any("spans" in row["metadata"]["vote"] for row in rows)
    assert ann.get("/owner/passages")[0].status == 401
    capsys.readouterr()
    main(["collect", "status", str(path)])
    assert "1 pairs and 1 rankings, 1 people for each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "marks",
    [
        "no json",
        "[1]",
        "{}x",
        "[" * 5000,
        [{"answer": 9, "start": 0, "end": 1, "text": "D", "label": "good"}],
        [{"answer": -1, "start": 0, "end": 5, "text": "Dents", "label": "good"}],
        [{"answer": 0, "start": 0, "end": 10**9, "text": "x", "label": "good"}],
        [{"answer": 0, "start": 1, "end": 1, "text": "", "label": "good"}],
        [{"answer": 0, "start": 0, "end": 2, "text": "??", "label": "good"}],
        [{"answer": 0, "start": 0.0, "end": 2, "text": "??", "label": "good"}],
        [{"answer": 0, "end": 2, "text": "??", "label": "good"}],
        "first two letters with another label",
    ],
)
def test_a_mark_that_no_page_sends_saves_nothing(serve_marks, marks):
    ann, running = serve_marks
    _, form, texts = page_of(ann)
    if marks == "first two letters with another label":
        marks = [mark(texts[0], 0, texts[0][:2], "fine")]
    sent = marks if isinstance(marks, str) else json.dumps(marks)
    assert note(ann, form | {"choice": "left", "marks": sent}) == "marks"
    assert "Nothing was saved" in ann.get("/?note=marks")[1]
    with Store.open(running.store) as store:
        assert store.at().votes() == []


@pytest.fixture(scope="module")
def serve_marks(tmp_path_factory):
    """A signed-in person and the server, for tests that leave nothing behind."""
    from tests.collect.conftest import Server

    folder = tmp_path_factory.mktemp("marks")
    path = fill(folder / "votes.db", pairs=1)
    running = Server(path, "--annotators", "ann", log=folder / "log").start()
    person = Client(running.port)
    person.enter(running.links["ann"])
    yield person, running
    running.stop()


def test_places_in_what_is_shown_are_places_in_what_is_stored():
    text = "\na\r\nb \u202eevil\u202c é👍 end\r"
    seen = visible(text)
    for words, expected in (
        ("a\nb", "a\r\nb"),
        ("a\n", "a\r\n"),
        # written out, a character is whole or not there
        ("evil", "evil"),
        ("202E⟧ev", "\u202eev"),
        ("⟦U", "\u202e"),
        ("é👍 end\n", "é👍 end\r"),
    ):
        start = seen.index(words)
        found = source_span(text, start, start + len(words))
        assert text[slice(*found)] == expected, words
    assert source_span("plain", 1, 3) == (1, 3)


def test_hostile_answers_can_be_marked_and_stay_inert(tmp_path, serve):
    hostile = ["\n</textarea><script>alert(1)</script>", *HOSTILE[:2], "\u202eturned"]
    path = fill_rankings(tmp_path / "votes.db", 1, answers=hostile)
    running = serve(path, "--annotators", "ann")
    ann = client(running, "ann")
    page, form, texts = page_of(ann)
    assert "<script>alert" not in page and len(texts) == 4
    marks = [mark(text, number, text, "bad", remark=text) for number, text in enumerate(texts)]
    sent = {f"place-{i}": "1" for i in range(4)} | {"marks": json.dumps(marks)}
    assert note(ann, form | sent) == "saved"
    (cast,), rankings = ranked(running)
    stored = {response["text"] for response in rankings[1]["responses"]}
    # whole answers, as they are stored
    assert {span["text"] for span in cast.spans} == stored
    shown = client(running, "owner").get("/owner/passages")[1]
    assert "<script>alert" not in shown and "\u202e" not in shown and "⟦U+202E⟧" in shown
    assert re.sub(r"<mark>|</mark>", "", shown).count("&lt;/textarea&gt;") >= 2
