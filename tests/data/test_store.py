import json
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from rlhf.cli import main
from rlhf.data import store_schema
from rlhf.data.freeze import freeze, frozen
from rlhf.data.load import fingerprint, load
from rlhf.data.records import Preference, RecordError, prompt_group
from rlhf.data.store import Store
from rlhf.errors import UserError


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        yield opened


def pair(store, prompt="Hi", a="Hello!", b="What?", **more):
    id = store.add_prompt(user(prompt), **more)
    return store.add_comparison(store.add_response(id, a), store.add_response(id, b))


def test_durable_and_checked_settings(store):
    pragma = {
        name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "foreign_keys")
    }
    assert pragma == {"synchronous": 2, "foreign_keys": 1}  # 2 is FULL
    assert store._db.execute("PRAGMA user_version").fetchone()[0] == store_schema.VERSION
    with pytest.raises(UserError, match="FOREIGN KEY"):
        store.add_response(99, "x")
    with pytest.raises(UserError, match="FOREIGN KEY"):
        store.vote(pair(store), 99, "a")


def test_adding_the_same_again_gives_the_same_id(store):
    prompt = store.add_prompt(user("Hi"), metadata={"x": 1, "y": 2})
    assert store.add_prompt(user("Hi"), metadata={"y": 2, "x": 1}) == prompt
    assert store.add_prompt(user("Hi"), voice="v") != prompt
    one, other = (
        store.add_response(prompt, "A", model="m", sampling={"seed": 1}),
        store.add_response(prompt, "B"),
    )
    assert store.add_response(prompt, "A", model="m", sampling={"seed": 1}) == one
    assert store.add_response(prompt, "A", model="m", sampling={"seed": 2}) not in (one, other)
    comparison = store.add_comparison(other, one)
    assert store.add_comparison(one, other) == comparison
    assert store.add_annotator("ann") == store.add_annotator("ann") == 1
    with pytest.raises(UserError, match="annotator 'ann' is a person, not a model"):
        store.add_annotator("ann", kind="model")


def test_a_is_the_response_added_first_and_ids_name_the_better_one(store):
    prompt = store.add_prompt(user("Hi"))
    one, other = store.add_response(prompt, "one"), store.add_response(prompt, "other")
    comparison = store.add_comparison(other, one)
    store.vote(comparison, store.add_annotator("ann"), other)
    assert store.at().votes()[0].choice == "b"
    [record] = store.at().preferences()
    assert (record.chosen, record.rejected) == ("other", "one")


def test_what_cannot_be_compared_is_refused(store):
    prompt = store.add_prompt(user("Hi"))
    a, same, empty = (
        store.add_response(prompt, t, sampling={"seed": i}) for i, t in enumerate(("A", "A ", " "))
    )
    elsewhere = store.add_response(store.add_prompt(user("Ho")), "B")
    b = store.add_response(prompt, "B")
    for one, other, reason in (
        (a, same, "the same text"),
        (a, empty, "is empty"),
        (a, elsewhere, "different prompts"),
        (a, 99, "expected two that are in the store"),
    ):
        with pytest.raises(UserError, match=reason):
            store.add_comparison(one, other)
    with pytest.raises(UserError, match="a control comparison"):
        store.add_comparison(a, b, kind="control")
    store.add_comparison(a, b, kind="control", expected=b)
    with pytest.raises(UserError, match="expects b, not a"):
        store.add_comparison(a, b, kind="control", expected=a)
    with pytest.raises(RecordError, match="assistant"):
        store.add_prompt([*user("Hi"), {"role": "assistant", "content": "x"}])


def test_undo_is_a_new_event_and_the_past_stays(store):
    comparison, ann = pair(store), store.add_annotator("ann")
    first = store.vote(
        comparison, ann, "a", left="b", strength=2, reason="kind", tags=["t"], duration_ms=900
    )
    with pytest.raises(
        UserError, match=f"has voted on comparison {comparison} already \\(event {first}\\)"
    ):
        store.vote(comparison, ann, "b")
    undone = store.undo(first)
    second = store.vote(comparison, ann, "b")
    assert [(v.event, v.choice) for v in store.at().votes()] == [(second, "b")]
    assert store.at(undone).votes() == [] and store.at(0).votes() == []
    [vote] = store.at(first).votes()
    assert (vote.annotator, vote.left, vote.strength, vote.reason, vote.tags) == (
        "ann",
        "b",
        2,
        "kind",
        ["t"],
    )
    for event, reason in (
        (first, "undone already"),
        (undone, "is undo, not a vote"),
        (99, "is missing"),
    ):
        with pytest.raises(UserError, match=reason):
            store.undo(event)
    assert store.last_event() == 3
    with pytest.raises(UserError, match="there is no event 4; the newest is 3"):
        store.at(4).votes()


def test_one_click_sent_twice_is_one_vote(store):
    comparison, ann = pair(store), store.add_annotator("ann")
    event = store.vote(comparison, ann, "a", request="click-1")
    assert store.vote(comparison, ann, "a", request="click-1") == event
    undo = store.undo(event, request="click-2")
    assert store.undo(event, request="click-2") == undo == store.last_event()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE events SET choice = 'b'",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events (id, comparison, annotator, kind, choice, created) "
        "VALUES (1, 1, 1, 'vote', 'b', '')",
        "INSERT OR REPLACE INTO events (comparison, annotator, kind, choice, request, created) "
        "VALUES (1, 1, 'vote', 'b', 'click', '')",
        "UPDATE responses SET text = 'x'",
        "DELETE FROM comparisons",
        # no choice
        "INSERT INTO events (comparison, annotator, kind, created) VALUES (1, 1, 'vote', '')",
        "INSERT INTO events (comparison, annotator, kind, choice, created) VALUES (1, 1, 'vote', 'c', '')",
    ],
)
def test_the_file_itself_refuses_to_rewrite_the_past(store, sql):
    store.vote(pair(store), store.add_annotator("ann"), "a", request="click")
    before = store._db.execute("SELECT * FROM events").fetchall()
    with sqlite3.connect(store.path) as other, pytest.raises(sqlite3.IntegrityError):
        other.execute(sql)  # another program, without our settings
    assert store._db.execute("SELECT * FROM events").fetchall() == before


def test_each_vote_is_a_pair_and_ties_are_none(store):
    comparison = pair(store, voice="v", split="test", metadata={"item": "lamp"})
    for name, choice in zip("abcde", ("a", "b", "tie", "both_bad", "skip"), strict=True):
        store.vote(
            comparison, store.add_annotator(name), choice, strength=3 if name == "a" else None
        )
    first, second = store.at().preferences()
    assert (first.chosen, first.rejected, first.annotator, first.voice) == (
        "Hello!",
        "What?",
        "a",
        "v",
    )
    assert (second.chosen, second.rejected, second.annotator, second.split) == (
        "What?",
        "Hello!",
        "b",
        "test",
    )
    assert first.metadata == {"item": "lamp", "vote": {"comparison": 1, "event": 1, "strength": 3}}
    assert first.source == "votes.db" and first.group == prompt_group(user("Hi"))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("aab", ("Hello!", 2 / 3)),
        ("bb", ("What?", 1.0)),
        ("aat", ("Hello!", 2.5 / 3)),  # a tie is half a vote for each side
        ("bttt", ("What?", 2.5 / 4)),
        ("bxs", ("What?", 1.0)),  # both bad, skip: no word on which is better
        ("ab", None),
        ("tt", None),
        ("xs", None),
    ],
)
def test_majority(store, choices, expected):
    comparison = pair(store)
    names = {"t": "tie", "x": "both_bad", "s": "skip"}
    for i, choice in enumerate(choices):
        store.vote(comparison, store.add_annotator(str(i)), names.get(choice, choice))
    found = store.at().preferences(aggregate="majority")
    if expected is None:
        assert found == []
    else:
        assert (found[0].chosen, found[0].annotator) == (expected[0], None)
        assert found[0].label_prob == pytest.approx(expected[1], abs=1e-6)


def test_controls_are_never_trained_on(store):
    prompt = store.add_prompt(user("Hi"))
    good, bad = store.add_response(prompt, "good"), store.add_response(prompt, "bad")
    control = store.add_comparison(good, bad, kind="control", expected=good)
    store.vote(control, store.add_annotator("ann"), "a")
    assert store.at().preferences() == [] and store.at().preferences(aggregate="majority") == []
    assert [v.choice for v in store.at().votes()] == ["a"] and store.at().stats()["controls"] == 1


def test_groups_join_over_voted_answer_pairs_alike_for_pairs_and_prompts(store):
    pairs = [pair(store, p) for p in ("p1", "p2", "p3")] + [pair(store, "p4", group="mine")]
    ann = store.add_annotator("ann")
    store.vote(pairs[0], ann, "a")
    before = store.vote(pairs[3], ann, "a")
    store.vote(pairs[1], ann, "tie")
    h1, h2, h3 = (prompt_group(user(p)) for p in ("p1", "p2", "p3"))
    # p3 is not voted on
    assert [p.group for p in store.at().prompts()] == [min(h1, h2), min(h1, h2), h3, "mine"]
    assert [p.group for p in store.at().preferences()] == [min(h1, h2), "mine"]
    assert [p.group for p in store.at(before).prompts()] == [h1, h2, h3, "mine"]


def test_stats(store):
    one, two = pair(store, "p1"), pair(store, "p2")
    ann, bob = store.add_annotator("ann"), store.add_annotator("bob", kind="rule")
    store.assign(one, ann)
    store.undo(store.vote(one, ann, "a"))
    store.vote(one, ann, "b")
    store.vote(one, bob, "b")
    store.vote(two, ann, "skip")
    stats = store.at().stats()
    assert stats == {
        "prompts": 2,
        "responses": 4,
        "annotators": 2,
        "comparisons": 2,
        "rankings": 0,
        "controls": 0,
        "last_event": 6,
        "votes": 3,
        "ranked": 0,
        "undone": 1,
        "choices": {"a": 0, "b": 2, "tie": 0, "both_bad": 0, "skip": 1},
        "normal_choices": {"a": 0, "b": 2, "tie": 0, "both_bad": 0, "skip": 1},
        "by_annotator": {"ann": 2, "bob": 1},
        "comparisons_with_votes": 2,
        "comparisons_with_winner": 1,
    }


@pytest.mark.parametrize("aggregate", ["each", "majority"])
def test_a_frozen_file_reads_back_as_the_store_did(store, tmp_path, aggregate):
    draw = random.Random(0)
    annotators = [store.add_annotator(name) for name in ("ann", "bob", "cem")]
    with store.transaction():
        for i in range(40):
            own = {"group": f"g{i}"} if i % 4 == 0 else {}
            comparison = pair(
                store, f"p{i} é\u2028", f"a{i % 9}", "b\n", metadata={"id": i, "chosen": "x"}, **own
            )
            for annotator in annotators:
                reason = "warum ☂" if i % 3 else None
                store.vote(
                    comparison,
                    annotator,
                    draw.choice(("a", "b", "tie", "skip")),
                    reason=reason,
                    tags=["t"],
                )
    event = store.last_event() - 7
    expected = load(f"{store.path}@{event}", Preference, aggregate=aggregate)
    out = tmp_path / "run" / "pairs.jsonl"
    assert freeze(store.path, out, upto_event=event, aggregate=aggregate) == event
    direct = store.at(event).preferences(aggregate)
    known = out.read_bytes()
    # joins groups in the store, not in the file
    store.vote(pair(store, "later", "a1", "b\n"), annotators[0], "a")
    found = load(str(out), Preference)
    assert found == expected and len(found) > 20
    # where a row stands is for messages, and the rows of a store stand in no file
    assert [replace(r, split=None) for r in found] == direct
    header = frozen(out)
    assert (
        header["event"] == event and header["rows"] == len(found) and header["store"] == "votes.db"
    )
    freeze(store.path, out, upto_event=event, aggregate=aggregate)
    assert out.read_bytes() == known
    assert (
        freeze(store.path, out) == store.last_event()
        and frozen(out)["fingerprint"] != header["fingerprint"]
    )
    assert fingerprint(load(str(out), Preference)) != fingerprint(found)


def test_a_frozen_file_that_lost_rows_is_noticed(store, tmp_path):
    store.vote(pair(store), store.add_annotator("ann"), "a")
    store.vote(pair(store, "Ho"), store.add_annotator("ann"), "a")
    out = tmp_path / "pairs.jsonl"
    freeze(store.path, out)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"promises 2 rows frozen from votes\.db, found 1"):
        load(str(out), Preference)


def test_an_older_file_is_brought_up_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "old.db"
    with monkeypatch.context() as older:
        older.setattr(store_schema, "MIGRATIONS", store_schema.MIGRATIONS[:1])
        older.setattr(store_schema, "VERSION", 1)
        with Store.open(path, create=True) as store:
            # as the first version wrote it: no split
            key = ("k", json.dumps(user("Hi")), prompt_group(user("Hi")), "{}", "")
            store._db.execute(
                "INSERT INTO prompts (key, messages, default_group, metadata, created) VALUES (?, ?, ?, ?, ?)",
                key,
            )
            comparison = store.add_comparison(
                store.add_response(1, "A"), store.add_response(1, "B")
            )
            for name, kind in (("ann", "person"), ("rule", "rule"), ("sim-bob", "model")):
                store._db.execute(
                    "INSERT INTO annotators (name, kind, created) VALUES (?, ?, '')", (name, kind)
                )
            store._db.execute(
                "INSERT INTO events (comparison, annotator, kind, choice, created) VALUES (?, 1, 'vote', 'b', '')",
                (comparison,),
            )
    with monkeypatch.context() as broken:
        broken.setattr(
            store_schema,
            "MIGRATIONS",
            [store_schema.MIGRATIONS[0], [*store_schema.MIGRATIONS[1], "CREATE nonsense"]],
        )
        with pytest.raises(UserError, match="cannot be opened as a preference store"):
            Store.open(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone()[0] == 1
        assert "split" not in [row[1] for row in raw.execute("PRAGMA table_info(prompts)")]
    with Store.open(path) as store:
        assert store._db.execute("PRAGMA user_version").fetchone()[0] == store_schema.VERSION == 5
        assert [(r.chosen, r.split) for r in store.at().preferences()] == [("B", None)]
        store.add_prompt(user("new"), split="test")
        sources = [row["source"] for row in store.annotators()]
        assert sources == ["human", "judge", "simulated"]


def test_a_name_says_that_votes_are_simulated(store):
    store.add_annotator("ann")
    store.add_annotator("judge", kind="model")
    simulated = store.add_annotator("sim-ann")
    assert [row["source"] for row in store.annotators()] == ["human", "judge", "simulated"]
    store.vote(pair(store), simulated, "a")
    assert [vote.source for vote in store.at().votes()] == ["simulated"]


def made_store(path):
    with Store.open(path, create=True) as store:
        prompt = store.add_prompt(user("Hi"))
        pair = store.add_comparison(
            store.add_response(prompt, "A" * 9000), store.add_response(prompt, "B" * 9000)
        )
        store.vote(pair, store.add_annotator("ann"), "a")
    return path.read_bytes()


def test_reading_leaves_a_store_and_its_folder_as_they_are(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(store_schema, "MIGRATIONS", store_schema.MIGRATIONS[:1])
        older.setattr(store_schema, "VERSION", 1)
        Store.open(tmp_path / "old.db", create=True).close()
    (tmp_path / "empty.db").touch()
    before = {name: (tmp_path / name).read_bytes() for name in ("old.db", "empty.db")}
    before["votes.db"] = made_store(tmp_path / "votes.db")
    assert len(load(str(tmp_path / "votes.db"), Preference)) == 1
    with pytest.raises(UserError, match="nobody has voted"):
        load(str(tmp_path / "old.db"), Preference)  # brought to this version in memory
    with pytest.raises(UserError, match="is an empty file, not a preference store"):
        load(str(tmp_path / "empty.db"), Preference)
    with (
        pytest.raises(UserError, match="readonly database"),
        Store.open(tmp_path / "votes.db", readonly=True) as store,
    ):
        store.add_prompt(user("new"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with (
        Store.open(tmp_path / "votes.db") as writer,
        Store.open(tmp_path / "votes.db", readonly=True) as reader,
    ):
        writer.add_prompt(user("new"))
        assert len(reader.at().prompts()) == 2  # what another has written is seen


def test_damaged_pages_are_said_in_one_line(tmp_path, capsys):
    path = tmp_path / "votes.db"
    content = made_store(path)
    said, size = [], 4096
    # each page but the first overwritten, one at a time
    for first in range(size, len(content), size):
        path.write_bytes(content[:first] + size * b"\xa5" + content[first + size :])
        for read in (
            lambda: load(str(path), Preference),
            lambda: main(["collect", "status", str(path)]),
            lambda: freeze(path, tmp_path / "out" / "frozen.jsonl"),
        ):
            try:
                read()  # not every page is read by each
            except UserError as error:
                said.append(str(error))
            except SystemExit as end:
                assert end.code == 2
    assert sum("malformed). If it is damaged, use an earlier" in message for message in said) > 5
    assert "Traceback" not in capsys.readouterr().err


def test_other_files_and_newer_versions_are_refused(tmp_path):
    path = tmp_path / "votes.db"
    Store.open(path, create=True).close()
    with pytest.raises(UserError, match=r"no such preference store\. Did you mean .*votes\.db"):
        Store.open(tmp_path / "vote.db")
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="of version 9, and this program knows versions up to 5"):
        Store.open(path)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as raw:
        raw.execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="an SQLite file, but not a preference store"):
        Store.open(other)
    (tmp_path / "text.db").write_text("not a database at all")
    with pytest.raises(UserError, match="cannot be opened as a preference store"):
        Store.open(tmp_path / "text.db")


def test_a_transaction_is_all_or_nothing(store):
    with pytest.raises(KeyError), store.transaction():
        pair(store)
        raise KeyError
    assert store.at().stats()["prompts"] == 0
    pair(store)  # and the store goes on
    assert store.at().stats()["comparisons"] == 1


WRITER = """
import sys
from rlhf.data.store import Store
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store.open(path, create=True) as store:
    annotator = store.add_annotator(name)
    for i in range(count):
        prompt = store.add_prompt([{"role": "user", "content": f"p{i}"}])
        pair = store.add_comparison(store.add_response(prompt, "A"), store.add_response(prompt, "B"))
        print(store.vote(pair, annotator, "a"), flush=True)
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, path, name, str(count)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_lose_nothing(tmp_path):
    # both create the file, and both add the same prompts, responses and comparisons
    path = tmp_path / "shared.db"
    both = [writer(path, name, 60) for name in ("ann", "bob")]
    events = [[int(line) for line in process.communicate()[0].split()] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(events[0] + events[1]) == list(range(1, 121))
    with Store.open(path) as store:
        stats = store.at().stats()
        assert (stats["prompts"], stats["responses"], stats["comparisons"]) == (60, 120, 60)
        assert stats["by_annotator"] == {"ann": 60, "bob": 60}


def test_a_killed_writer_loses_no_answered_vote(tmp_path):
    path = tmp_path / "killed.db"
    process = writer(path, "ann", 100_000)
    answered = [int(process.stdout.readline()) for _ in range(25)]
    process.send_signal(signal.SIGKILL)
    answered += [int(line) for line in process.communicate()[0].splitlines() if line]
    with Store.open(path) as store:
        kept = [vote.event for vote in store.at().votes()]
        assert set(answered) <= set(kept) and len(kept) <= len(answered) + 1
        assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
