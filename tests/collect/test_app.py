import asyncio
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading

import pytest
from markupsafe import Markup

from benchmarks.votes.collect_load import Client, Server, fields_of
from rlhf.cli import main
from rlhf.collect import app
from rlhf.collect.app import create_app
from rlhf.collect.serve import LinksConfig, ServeConfig, links
from rlhf.collect.session import TEMPLATES, Site
from rlhf.data.store import Store
from rlhf.data.store_contents import token_hash
from rlhf.errors import UserError
from tests.collect.conftest import ROOT, fill

PAGES = ROOT / "rlhf" / "collect"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for the tests that leave no trace that matters to another."""
    folder = tmp_path_factory.mktemp("collect")
    path = fill(folder / "votes.db", pairs=40, hostile=["<script>alert(1)</script>"])
    running = Server(
        path, "--annotators", "ann,bob,cem", "--overlap", "3", log=folder / "log"
    ).start()
    yield running
    if running.process.poll() is None:
        running.stop()


def client(server, name):
    found = Client(server.port)
    answer, _ = found.enter(server.links[name])
    assert answer.status == 303
    return found


def votes(server):
    with Store.open(server.store) as store:
        return store.at().votes()


def test_a_link_becomes_a_cookie_and_leaves_the_address(server):
    ann = Client(server.port)
    answer, _ = ann.enter(server.links["ann"])
    token = server.links["ann"].rsplit("/", 1)[1]
    cookie = answer.headers["Set-Cookie"]
    assert answer.status == 303 and answer.headers["Location"] in ("/", "/welcome")
    assert (
        token in cookie
        and "HttpOnly" in cookie
        and "SameSite=lax" in cookie
        and "Secure" not in cookie
    )
    for path in ("/", "/welcome"):
        answer, page = ann.get(path)
        assert answer.status == 200 and token not in page
    other_end = "y" if token.endswith("x") else "x"  # one token in 64 ends in x
    assert ann.enter(server.links["ann"][:-1] + other_end)[0].status == 403


def test_tokens_stand_neither_in_the_store_nor_in_a_log(server):
    client(server, "ann").get("/nowhere")
    Client(server.port).get("/enter/not-a-token")
    secrets = [link.rsplit("/", 1)[1] for link in server.links.values()]
    assert len(set(secrets)) == 4 and min(map(len, secrets)) >= 32  # 24 random bytes
    kept = b"".join(p.read_bytes() for p in server.store.parent.iterdir())
    for secret in secrets:
        assert secret.encode() not in kept and token_hash(secret).encode() in kept
    assert server.log.read_text() == ""


def test_every_answer_forbids_what_is_foreign(server):
    ann = client(server, "ann")
    for path in ("/", "/welcome", "/nowhere", "/static/app.css", "/owner"):
        answer, _ = ann.get(path)
        policy = answer.headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'none'")
            and "unsafe" not in policy
            and "http" not in policy
        )
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer" and "Server" not in answer.headers
        assert answer.headers["Cache-Control"] == ("no-cache" if "static" in path else "no-store")


def test_nothing_comes_from_another_host():
    files = [p for p in PAGES.rglob("*") if p.suffix in (".html", ".css", ".js", ".svg")]
    assert len(files) >= 10
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|url\(|src=\"//|style=", text), path.name


def test_who_has_no_link_sees_nothing(server):
    stranger = Client(server.port)
    for path in ("/", "/welcome", "/owner", "/owner/disputed", "/owner/export?aggregate=each"):
        answer, page = stranger.get(path)
        assert answer.status == 401 and "kettle" not in page
    for path in ("/vote", "/undo", "/leave", "/owner/links", "/owner/exclude"):
        assert stranger.post(path, {"choice": "left"})[0].status == 401
    assert client(server, "ann").get("/owner")[0].status == 401  # an annotator is not the owner
    assert client(server, "owner").get("/")[0].status == 401


def test_a_form_of_another_site_or_session_is_refused(server):
    ann, bob = client(server, "ann"), client(server, "bob")
    fields, before = fields_of(ann.get("/")[1]), len(votes(server))
    good = fields | {"choice": "left"}
    for wrong in ({}, {"form": ""}, {"form": "é"}, {"form": fields_of(bob.get("/")[1])["form"]}):
        sent = {k: v for k, v in good.items() if k != "form"} | wrong
        assert ann.post("/vote", sent)[0].status == 403
        assert ann.post("/undo", sent)[0].status == 403
        assert ann.post("/leave", sent)[0].status == 403
    owner = client(server, "owner")
    assert owner.post("/owner/links", {"name": "eve", "form": good["form"]})[0].status == 403
    assert len(votes(server)) == before
    with Store.open(server.store) as store:
        assert "eve" not in {row["name"] for row in store.annotators()}


def test_a_vote_by_plain_form_and_its_repetition(server):
    bob = client(server, "bob")
    fields = fields_of(bob.get("/")[1])
    form = fields | {
        "choice": "right",
        "strength": "3",
        "reason": " It sounds\nlike us. ",
        "tag": ["off tone", "forged"],
    }
    before = len(votes(server))
    assert bob.post("/vote", form)[0].headers["Location"] == "/?note=saved"
    assert bob.post("/vote", form)[0].headers["Location"] == "/?note=again"
    assert bob.post("/vote", form | {"choice": "left"})[0].headers["Location"] == "/?note=differs"
    kept = votes(server)
    assert len(kept) == before + 1
    vote = kept[-1]
    assert (
        vote.annotator == "bob"
        and vote.choice == {"a": "b", "b": "a"}[vote.left]
        and vote.strength == 3
    )
    assert (
        vote.reason == "It sounds\nlike us." and vote.tags == ["off tone"] and vote.duration_ms >= 0
    )
    assert "Saved." in bob.get("/?note=saved")[1]
    undone = fields_of(bob.get("/")[1], "/undo")
    assert bob.post("/undo", undone)[0].headers["Location"] == "/?note=undone"
    assert bob.post("/undo", undone)[0].headers["Location"] == "/?note=again"
    # the first form, sent once more
    assert bob.post("/vote", form)[0].headers["Location"] == "/?note=withdrawn"
    assert "does not count" in bob.get("/?note=withdrawn")[1]
    assert len(votes(server)) == before
    with Store.open(server.store) as store:
        # the undone vote is still an event
        assert [e["kind"] for e in store.events(vote.event - 1)][:1] == ["vote"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"choice": "a"}, "choose"),
        ({"choice": ""}, "choose"),
        ({"assignment": "x"}, "gone"),
        ({"assignment": "9" * 30}, "gone"),
        ({"assignment": "١"}, "gone"),
        ({"click": ""}, "gone"),
        ({"click": "c" * 65}, "gone"),
    ],
)
def test_a_form_that_makes_no_sense_changes_nothing(server, change, note):
    cem = client(server, "cem")
    form = fields_of(cem.get("/")[1]) | {"choice": "left"} | change
    before = len(votes(server))
    answer, _ = cem.post("/vote", form)
    assert answer.status == 303 and answer.headers["Location"] == f"/?note={note}"
    assert len(votes(server)) == before
    # the pair that is drawn may itself hold a hostile answer, so the note has a word of its own
    assert "unheard" not in cem.get("/?note=<script>unheard")[1]


def test_forms_that_are_too_long_or_odd_are_refused(server):
    cem = client(server, "cem")
    form = fields_of(cem.get("/")[1]) | {"choice": "left", "reason": "x" * 70_000}
    assert cem.post("/vote", form)[0].status == 413
    cem = client(server, "cem")
    assert cem.post("/vote", {f"f{i}": "x" for i in range(200)})[0].status == 403
    assert cem.get("/vote")[0].status in (404, 405)


def test_models_and_controls_cannot_be_told(server, tmp_path, serve):
    running = serve(
        fill(tmp_path / "votes.db", pairs=2, controls=2),
        "--annotators",
        "dee",
        "--control_share",
        "0.5",
    )
    dee, shapes = client(running, "dee"), set()
    while 'id="judge"' in (page := dee.get("/")[1]):
        assert "sft" not in page and "control" not in page.replace("Control question", "").lower()
        shapes.add(tuple(sorted(fields_of(page))))
        dee.post("/vote", fields_of(page) | {"choice": "tie"})
    assert shapes == {("assignment", "click", "form")}
    assert "Thank you, dee" in page and "Others are still at work" not in page


def test_progress_does_not_tell_control_pairs(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=6, controls=3)
    dee, seen = client(serve(path, "--annotators", "dee", "--control_share", "1"), "dee"), []
    while 'id="judge"' in (page := dee.get("/")[1]):
        seen.append(int(re.search(r'<progress id="all" max="18" value="(\d+)"', page).group(1)))
        dee.post("/vote", fields_of(page) | {"choice": "tie"})
    # one more after each answer, control pairs among them
    assert seen == list(range(6 + 3))


def test_a_link_of_somebody_else_asks_before_it_takes_over(server):
    ann, bob = client(server, "ann"), server.links["bob"]
    answer, page = ann.enter(bob)
    assert (
        answer.status == 200
        and "Set-Cookie" not in answer.headers
        and "You are signed in as ann" in page
    )
    assert "Hello, ann" in ann.get("/welcome")[1]
    path = bob.removeprefix(server.url)
    assert ann.post(path, {"form": "x"})[0].status == 403 and "Hello, ann" in ann.get("/welcome")[1]
    form = re.search(r'name="form" value="(\w+)"', page).group(1)
    assert (
        ann.post(path, {"form": form})[0].status == 303 and "Hello, bob" in ann.get("/welcome")[1]
    )
    assert ann.enter(bob)[0].status == 303  # one's own link, again


def test_the_page_of_a_failure_has_the_headers_too(tmp_path):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/enter/x",
        "raw_path": b"/enter/x",
        "query_string": b"",
    }
    scope |= {
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "root_path": "",
    }
    with pytest.raises(AttributeError):  # a site whose store was never opened
        asyncio.run(create_app(Site(tmp_path / "votes.db"))(scope, receive, send))
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 500 and headers[b"cache-control"] == b"no-store"
    assert (
        headers[b"x-content-type-options"] == b"nosniff" and b"content-security-policy" in headers
    )


def test_new_pairs_appear_on_the_overview_without_an_event(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=3)
    owner = client(serve(path, "--annotators", "ann"), "owner")
    assert "for each of 3 pairs" in owner.get("/owner")[1]
    fill(path, pairs=5)
    assert "for each of 5 pairs" in owner.get("/owner")[1]


def test_kappa_skill_and_ordinal_alpha_are_shown(tmp_path, serve, capsys):
    # ann: a a b b, bob: a b b b -> p_o = 3/4, p_e = 1/2 * 1/4 + 1/2 * 3/4 = 1/2, kappa = 1/2
    path = fill(tmp_path / "votes.db", pairs=4)
    with Store.open(path) as store:
        for name, choices in (("ann", "aabb"), ("bob", "abbb")):
            for pair, choice in enumerate(choices, 1):
                store.vote(pair, store.add_annotator(name), choice)
    main(["collect", "status", str(path)])
    text = capsys.readouterr().out
    # without each pair 0, 1, .4, .4: se^2 = 3/4 * .51; on (1 + kappa) / 2: N = .1875 / (.3825 / 4)
    # = 1.9608 t(.975, 3)^2 = 10.128, over N 5.1653: (.75 + 2.5827 +- sqrt(.9685 + 6.6701)) / 6.1653
    # = .0923, .9888
    assert "ann and bob 0.50 [-0.82, 0.98] on 4 pairs" in text
    # of 8 values 3 are a and 5 are b, and one pair of 4 differs: alpha = 1 - 7 * 2 / (2 * 3 * 5) =
    # 0.53 at both levels
    assert "Krippendorff's alpha 0.53" in text and "Ordinal alpha, with strength: 0.53" in text
    assert re.search(r"^\| annotator .* skill ", text, re.M) and "Skill: of the votes" in text
    page = client(serve(path), "owner").get("/owner")[1]
    table = page[page.index('id="kappa"') :]
    assert re.search(
        r'ann, bob</th>\s*<td class="n"[^>]*>0\.50</td>\s*<td class="n"[^>]*>.?[\d.]+ to 0\.98</td>',
        table,
    )


def test_the_owner_sees_which_policy_simulated_votes_prefer(tmp_path, serve, capsys):
    path = fill(tmp_path / "votes.db", pairs=12)
    with Store.open(path) as store:
        for name in ("sim-ann", "sim-bob", "sim-cem"):
            annotator = store.add_annotator(name)
            for id, pair in store.at().pairs().items():
                store.vote(id, annotator, "a" if pair["model_a"] == "runs/sft-two" else "b")
    page = client(serve(path), "owner").get("/owner")[1]
    assert "Simulated votes: sft-two is preferred to sft-one: it wins 100.0 % [" in page
    assert re.search(
        r'id="policies".*sft-one over sft-two</th>\s*<td class="n"[^>]*>0\.0 %', page, re.S
    )
    main(["collect", "status", str(path)])
    text = capsys.readouterr().out
    assert "Simulated votes: sft-two is preferred" in text and "enough votes?" in text


def test_the_owner_sees_adds_and_exports(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=3, controls=1)
    running = serve(path, "--annotators", "ann,bob", "--overlap", "2", "--control_share", "1")
    for name in ("ann", "bob"):
        person = client(running, name)
        while 'id="judge"' in (page := person.get("/")[1]):
            a = max(
                page.find(words)
                for words in ("We send a new kettle", "You will hear from us", "Tell us the new")
            )
            # ann: a, bob: b
            choice = "left" if (a < page.index('id="answer-2"')) == (name == "ann") else "right"
            person.post(
                "/vote",
                fields_of(page) | {"choice": choice, "strength": "1", "reason": f"said {name}<b>"},
            )
    owner = client(running, "owner")
    page = owner.get("/owner")[1]
    assert "100%" in page and "6 of 6 answers" in page and "ann" in page and "bob" in page
    disputed = owner.get("/owner/disputed")[1]
    assert "runs/sft-one" in disputed and "said ann&lt;b&gt;" in disputed
    assert owner.get("/owner/disputed?page=99x")[0].status == 200
    answer, text = owner.get("/owner/export?aggregate=each")
    rows = [json.loads(line) for line in text.splitlines()]
    assert 'filename="votes-' in answer.headers["Content-Disposition"] and len(rows) == 6
    with Store.open(path) as store:
        assert rows == store.at().rows()
    assert owner.get("/owner/export?aggregate=best")[0].status == 404
    form = fields_of(page, "/owner/links")
    link = re.search(
        r'id="link"[^>]*>([^<]+)<', owner.post("/owner/links", form | {"name": " New  Person "})[1]
    ).group(1)
    newcomer = Client(running.port)
    assert newcomer.enter(link)[0].headers["Location"] == "/welcome"
    assert "Hello, New Person" in newcomer.get("/welcome")[1]
    assert owner.post("/owner/links", form | {"name": "\x1b"})[0].status == 400


def test_disputed_pairs_come_ten_to_a_page(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=11)
    with Store.open(path) as store:
        for name, choice in (("ann", "a"), ("bob", "b")):
            annotator = store.add_annotator(name)
            for pair in range(1, 12):
                store.vote(pair, annotator, choice)
    owner = client(serve(path, "--annotators", "ann,bob"), "owner")
    first, second = (owner.get(f"/owner/disputed?page={number}")[1] for number in (1, 2))
    # equally split: in the order of the store
    assert re.findall(r'<h2 id="pair-(\d+)"', first) == list(map(str, range(1, 11)))
    assert re.findall(r'<h2 id="pair-(\d+)"', second) == ["11"]
    assert "Page 1 of 2" in first and "page=2" in first and "page=1" in second


def test_the_owner_excludes_and_a_second_look_decides(tmp_path, serve, capsys):
    path = fill(tmp_path / "votes.db", pairs=2)
    running = serve(path, "--annotators", "ann,bob", "--adjudicators", "dora", "--overlap", "2")
    with Store.open(path) as store:
        ids = {row["name"]: row["id"] for row in store.annotators()}
        for name, choices in (("ann", "aa"), ("bob", "ab")):
            for pair, choice in enumerate(choices, 1):
                store.vote(pair, ids[name], choice)
    owner, dora = client(running, "owner"), client(running, "dora")
    assert "Your answer decides" in dora.get("/welcome")[1]
    assert "disagree" not in client(running, "ann").get("/welcome")[1]
    page = dora.get("/")[1]
    dora.post("/vote", fields_of(page) | {"choice": "both_bad"})
    assert 'id="judge"' not in dora.get("/")[1]
    assert "No pair is disputed" in owner.get("/owner/disputed")[1]
    page = owner.get("/owner")[1]
    assert "second look" in page and "too few votes to say (2 of 20)" in page
    form = fields_of(page, "/owner/exclude")
    assert owner.post("/owner/exclude", form | {"name": "nobody"})[0].status == 400
    assert owner.post("/owner/exclude", {"name": "ann"})[0].status == 403
    assert owner.post("/owner/exclude", form | {"name": "ann"})[0].status == 303
    assert "ann (excluded)" in owner.get("/owner")[1]
    assert {vote.annotator for vote in votes(running)} == {"bob", "dora"}
    assert 'id="judge"' not in client(running, "ann").get("/")[1]
    main(["collect", "status", str(path)])
    text = capsys.readouterr().out
    assert "0 pairs are disputed, 1 decided by an adjudicator" in text
    assert "ann is excluded from event" in text
    owner.post("/owner/exclude", form | {"name": "ann", "back": "yes"})
    assert {vote.annotator for vote in votes(running)} == {"ann", "bob", "dora"}
    main(["collect", "exclude", str(path), "--annotators", "ann,bob"])
    assert {vote.annotator for vote in votes(running)} == {"dora"}
    with pytest.raises(SystemExit):
        # all of them or none
        main(["collect", "exclude", str(path), "--annotators", "dora,ann"])
    assert {vote.annotator for vote in votes(running)} == {"dora"}


def test_a_better_answer_and_ratings_are_kept_and_shown(tmp_path, serve, capsys):
    path = fill(tmp_path / "votes.db", pairs=1, controls=1)
    running = serve(
        path, "--annotators", "ann,bob", "--criteria", "clear,on <brand>", "--control_share", "0"
    )
    written = "A better one <b>\r\n\r\nand more. "
    rated = {"rate-0-left": "5", "rate-0-right": "2", "rate-1-right": "1", "rate-1-left": "6"}
    ann = client(running, "ann")
    page = ann.get("/")[1]
    assert page.count("on &lt;brand&gt;") == 2 and "A better answer" in page
    # a criterion that is not asked about is not read
    form = fields_of(page) | rated | {"rate-2-left": "3", "choice": "left", "corrected": written}
    assert ann.post("/vote", form)[0].headers["Location"] == "/?note=saved"
    (vote,) = votes(running)
    assert vote.corrected == "A better one <b>\n\nand more."
    right = "b" if vote.left == "a" else "a"
    assert vote.criteria == {"clear": {vote.left: 5, right: 2}, "on <brand>": {right: 1}}
    owner = client(running, "owner")
    shown = {f"{p}-{s}" for p in ("clear", "on &lt;brand&gt;") for s in ("sft-one", "sft-two")}
    found = re.findall(
        r'<th scope="row">([^<]*)</th>\s*<td data-label="Policy">([^<]*)</td>',
        owner.get("/owner")[1],
    )
    assert {"-".join(row) for row in found} < shown and len(found) == 3
    with Store.open(path) as store:
        bob = store.add_annotator("bob")
        store.vote(1, bob, right, corrected="Mine <i>")
    assert 'wrote: <q dir="auto">Mine &lt;i&gt;</q>' in owner.get("/owner/disputed")[1]
    text = owner.get("/owner/export?aggregate=majority")[1]
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["chosen"] for row in rows} == {"A better one <b>\n\nand more.", "Mine <i>"}
    capsys.readouterr()
    main(["collect", "status", str(path)])
    assert "| clear " in capsys.readouterr().out
    with pytest.raises(UserError, match="has 9 names, expected 8 at most"):
        ServeConfig(store=str(path), criteria=list("abcdefghi")).validate()


def test_the_judge_is_heard_after_the_own_answer_alone(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=5)
    with Store.open(path) as store:
        judge, rule = store.add_annotator("judge", "model"), store.add_annotator("rule", "rule")
        for pair, choice in {1: "a", 2: "a", 3: "tie", 4: "skip"}.items():
            store.vote(pair, judge, choice)
            store.vote(pair, rule, "both_bad")
    running = serve(path, "--annotators", "ann,bob", "--overlap", "2", "--show_judge", "true")
    ann, heard = client(running, "ann"), {}
    while 'id="judge"' in (page := ann.get("/")[1]):
        assert "judge says" not in page and "judge differs" not in page
        form = fields_of(page) | {"choice": "left"}
        note = ann.post("/vote", form)[0].headers["Location"].removeprefix("/?note=")
        vote = votes(running)[-1]
        heard[vote.comparison] = note
        if note != "saved":
            assert "judge" in ann.get(f"/?note={note}")[1]
        # a form that is sent twice says no more
        again = ann.post("/vote", form)[0].headers["Location"]
        assert again == "/?note=again"
        if vote.comparison < 3:
            assert note == ("judge-same" if vote.left == "a" else "judge-right")
    assert heard[3] == "judge-tie" and heard[4] == heard[5] == "saved"
    with Store.open(path) as store:
        store.exclude("judge")
        assert store.at().model_choice(1) is None
    # without the option nobody hears of it
    quiet = serve(fill(tmp_path / "other.db", pairs=1), "--annotators", "ann")
    with Store.open(quiet.store) as store:
        store.vote(1, store.add_annotator("judge", "model"), "a")
    person = client(quiet, "ann")
    form = fields_of(person.get("/")[1]) | {"choice": "left"}
    assert person.post("/vote", form)[0].headers["Location"] == "/?note=saved"


def test_links_can_be_replaced_and_revoked_while_serving(tmp_path, serve, capsys):
    running = serve(fill(tmp_path / "votes.db"), "--annotators", "ann,bob")
    ann, bob = client(running, "ann"), client(running, "bob")
    asked = ["ann", " ann", "ann "]  # one link: a second would close the first
    made = links(
        LinksConfig(store=str(running.store), annotators=asked, owner=True, revoke=["bob "])
    )
    assert set(made) == {"ann", ""}
    assert (
        made["ann"].startswith(f"{running.url}/enter/") and made["ann"] in capsys.readouterr().out
    )
    assert ann.get("/")[0].status == 401 and bob.get("/")[0].status == 401
    assert ann.enter(made["ann"])[0].status == 303 and ann.get("/")[0].status == 200
    assert Client(running.port).enter(running.links["owner"])[0].status == 403
    with pytest.raises(UserError, match="no annotator 'eve'; found ann, bob"):
        links(LinksConfig(store=str(running.store), revoke=["eve"]))
    with pytest.raises(UserError, match="nothing to do"):
        links(LinksConfig(store=str(running.store)))


def test_what_was_set_up_is_kept_for_the_next_time(tmp_path, serve):
    path = fill(tmp_path / "votes.db", pairs=1)
    first = serve(path, "--annotators", "ann", "--overlap", "1", "--lease_minutes", "5")
    first.stop()
    again = serve(path, "--annotators", "ann")
    assert "ann" not in again.links and "owner" not in again.links  # links are printed once
    ann = Client(again.port)
    ann.enter(first.links["ann"])
    assert (
        ann.post("/vote", fields_of(ann.get("/")[1]) | {"choice": "tie"})[0].headers["Location"]
        == "/?note=saved"
    )
    assert "Thank you, ann" in ann.get("/")[1]
    with Store.open(path) as store:
        assert (store.setting("overlap"), store.setting("lapse")) == ("1", "300.0")


def test_https_and_the_warning_without_it(tmp_path, serve):
    path = fill(tmp_path / "votes.db")
    running = serve(path, "--annotators", "ann", "--url", "https://judge.example.org/")
    assert running.links["ann"].startswith("https://judge.example.org/enter/")
    assert "Secure" in Client(running.port).enter(running.links["ann"])[0].headers["Set-Cookie"]
    assert (
        f"on https://judge.example.org, listening on http://127.0.0.1:{running.port} ("
        in running.printed
    )
    assert running.log.read_text() == ""
    # a proxy with https before it, but the port itself is open to all without
    open_to_all = serve(path, "--host", "0.0.0.0", "--url", "https://judge.example.org")
    said = open_to_all.log.read_text()
    assert (
        said.count("WARNING") == 1
        and f"others can reach 0.0.0.0 port {open_to_all.port} and there is no" in said
    )
    # the port is this machine's own, but the proxy before it has no https
    said = serve(path, "--url", "http://judge.example.org").log.read_text()
    assert (
        said.count("WARNING") == 1 and "people reach http://judge.example.org without https" in said
    )
    assert serve(path, "--url", "http://localhost:8000").log.read_text() == ""


def test_a_certificate_serves_https(tmp_path, serve):
    import ssl
    import urllib.request

    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    made += [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(tmp_path / "key.pem"),
        "-out",
        str(tmp_path / "c.pem"),
    ]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl on this machine to make a certificate")
    path = fill(tmp_path / "votes.db")
    tls = ("--certificate", str(tmp_path / "c.pem"), "--certificate_key", str(tmp_path / "key.pem"))
    running = serve(path, "--annotators", "ann", *tls, https=True)
    context = ssl.create_default_context(cafile=str(tmp_path / "c.pem"))
    assert running.links["ann"].startswith("https://127.0.0.1:")
    with urllib.request.urlopen(
        f"https://127.0.0.1:{running.port}/static/icon.svg", context=context
    ) as answer:
        assert answer.status == 200


def test_status_in_the_terminal(server, capsys):
    main(["collect", "status", str(server.store)])
    text = capsys.readouterr().out
    assert "41 pairs, 3 people for each" in text and "slots filled" in text


def test_an_idle_connection_that_the_server_ended_is_opened_again(server):
    ann = client(server, "ann")
    assert ann.get("/")[0].status == 200
    # as uvicorn does after five seconds
    ann.connection.sock.shutdown(socket.SHUT_RDWR)
    assert ann.get("/")[0].status == 200


def test_what_cannot_be_served_is_said(tmp_path):
    empty = tmp_path / "empty.db"
    Store.open(empty, create=True).close()
    for argv, message in (
        ([str(empty)], "has no pairs to judge; make some with: rlhf collect sample"),
        ([str(tmp_path / "none.db")], "no such preference store"),
        ([str(empty), "--certificate", "c.pem"], "belong together"),
        ([str(empty), "--url", "judge.example.org"], "expected http://HOST or https://HOST"),
        ([str(empty), "--host", "0.0.0.0"], "'host' is 0.0.0.0, which means every address"),
        ([str(empty), "--host", "::"], "say where people reach it with --url"),
        ([str(empty), "--overlap", "0"], "'overlap' is 0, expected at least 1"),
        ([str(empty), "--annotators", "a\tb"], "expected 1 to 60 printable characters"),
        ([str(empty), "--voice", str(tmp_path / "v.yaml")], "no such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", "collect", "serve", *argv],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_files_that_are_no_certificate_are_said_before_anything_is_served(tmp_path):
    for name in ("c.pem", "key.pem"):
        (tmp_path / name).write_text("garbage")
    with pytest.raises(UserError, match=r"key\.pem: no TLS certificate with its key"):
        ServeConfig(
            store="x.db",
            certificate=str(tmp_path / "c.pem"),
            certificate_key=str(tmp_path / "key.pem"),
        ).validate()


def test_a_port_in_use_is_said(server, tmp_path):
    path = fill(tmp_path / "votes.db")
    command = [
        sys.executable,
        "-m",
        "rlhf.cli",
        "collect",
        "serve",
        str(path),
        "--port",
        str(server.port),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot listen there" in done.stderr and "--port" in done.stderr


def test_a_vote_is_on_disk_before_its_page_is_answered(tmp_path, serve):
    running = serve(fill(tmp_path / "votes.db"), "--annotators", "ann")
    ann = client(running, "ann")
    fields = fields_of(ann.get("/")[1])
    assert ann.post("/vote", fields | {"choice": "left"})[0].status == 303
    running.stop(kill=True)
    with sqlite3.connect(running.store) as raw:
        assert raw.execute("SELECT count(*) FROM events WHERE kind = 'vote'").fetchone()[0] == 1
    running.start()
    ann.close()
    assert ann.post("/vote", fields | {"choice": "left"})[0].headers["Location"] == "/?note=again"


def test_half_sent_requests_are_closed_and_whole_ones_answered(tmp_path, monkeypatch):
    import uvicorn

    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.5)
    site = Site(fill(tmp_path / "store.db"))
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    config = uvicorn.Config(
        app.create_app(site), http=app.TimedProtocol, ws="none", log_level="error"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n"
    whole = b"GET /nowhere HTTP/1.1\r\nHost: h\r\n\r\n"
    try:
        half = [socket.create_connection(address, timeout=300) for _ in range(40)]
        # nothing, a part of the head, a part of the body, and a part of a second request on the
        # same connection
        sent = [b"", head, head + b"\r\nform", whole + head]
        for number, connection in enumerate(half):
            connection.sendall(sent[number % 4])
        with socket.create_connection(address, timeout=300) as other:
            other.sendall(whole)
            assert other.recv(100).startswith(b"HTTP/1.1 404")
        for connection in half:
            # until the server closes it, or a timeout fails the test
            while connection.recv(10_000):
                pass
            connection.close()
    finally:
        running.should_exit = True
        thread.join()


def test_hidden_characters_are_written_out_wherever_a_page_shows_text():
    page = TEMPLATES.from_string("{{ a }}|{{ b }}|{{ c | render }}|{{ n }}")
    shown = page.render(a="x\u202ey\x00", b=Markup("<b>ours</b>"), c="p\u202eq", n=3)
    assert (
        shown.startswith("x⟦U+202E⟧y⟦U+0000⟧|<b>ours</b>|")
        and "p⟦U+202E⟧q" in shown
        and shown.endswith("|3")
    )
