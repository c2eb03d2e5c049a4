"""Votes that do not count (an excluded annotator) and votes that end a dispute (an adjudicator)."""

import random

import pytest

from rlhf.data import store_schema
from rlhf.data.agreement import FEWEST, agreement_summary, annotator_reliability
from rlhf.data.annotator_report import remarks, view_summary
from rlhf.data.store import Store
from rlhf.data.votes import Vote, skills, verdicts
from rlhf.errors import UserError
from rlhf.voting.ballots import read_ballots
from rlhf.voting.rates import summarise_votes
from tests.data.test_store import pair, user


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        yield opened


def votes_of(*rows, final=()):
    """(comparison, annotator, choice) -> votes; those of `final` are an adjudicator's."""
    return [Vote(i, c, n, choice, is_final=n in final) for i, (c, n, choice) in enumerate(rows)]


def test_an_exclusion_is_an_event_and_the_past_stays(store):
    pairs = [pair(store, f"q{i}") for i in range(3)]
    ann, bob = store.add_annotator("Ann"), store.add_annotator("bob")
    for number in pairs:
        store.vote(number, ann, "a")
        last = store.vote(number, bob, "b")
    gone = store.exclude(" Ann")
    assert gone == last + 1
    assert {vote.annotator for vote in store.at().votes()} == {"bob"}
    assert store.at().excluded() == {"Ann": gone}
    assert {r.annotator for r in store.at().preferences()} == {"bob"}
    assert len(store.at().preferences("majority")) == 3
    # before it, a and b cancelled out
    assert len(store.at(last).votes()) == 6 and not store.at(last).preferences("majority")
    # nothing was undone, and what was cast is in the file
    assert store.at().stats()["undone"] == 0
    with pytest.raises(UserError, match="'Ann' is excluded already"):
        store.exclude("Ann")
    with pytest.raises(UserError, match="has no annotator 'eve'; found Ann, bob"):
        store.exclude("eve")
    back = store.exclude("Ann", back=True)
    assert len(store.at().votes()) == 6 and len(store.at(gone).votes()) == 3
    with pytest.raises(UserError, match="'Ann' is not excluded already"):
        store.exclude("Ann", back=True)
    store.exclude("Ann")
    assert len(store.at().votes()) == 3 and len(store.at(back).votes()) == 6


def test_a_state_keeps_its_fingerprint_over_versions(store):
    # computed by the third version of the schema
    store.clock = lambda: 1.7e9
    prompt = store.add_prompt(user("Hi"))
    number = store.add_comparison(
        store.add_response(prompt, "One."), store.add_response(prompt, "Two.")
    )
    ann = store.add_annotator("ann")
    store.assign(number, ann, left="b")
    about = {"left": "b", "strength": 2, "reason": "r", "tags": ["t"], "duration_ms": 5}
    store.undo(store.vote(number, ann, "a", request="k", **about))
    last = store.vote(number, ann, "b")
    assert store.at().fingerprint() == "09216451bd4a6b6d"
    store.exclude("ann")
    assert store.at().fingerprint() != store.at(last).fingerprint() == "09216451bd4a6b6d"


# an assignment, a vote and its undo, as every version has written them
OLD_EVENTS = [
    ("assign", None, "a", None, "[]", None, None),
    ("vote", "a", None, 3, '["x"]', None, "r"),
    ("undo", None, None, None, "[]", 2, None),
]


@pytest.mark.parametrize("version", [3, 4])
def test_events_of_an_older_file_come_over_with_their_numbers(tmp_path, monkeypatch, version):
    path = tmp_path / "old.db"
    with monkeypatch.context() as older:
        older.setattr(store_schema, "MIGRATIONS", store_schema.MIGRATIONS[:version])
        older.setattr(store_schema, "VERSION", version)
        Store.open(path, create=True).close()
        with Store.open(path) as store, store.transaction():
            db = store._db
            db.execute("INSERT INTO annotators (name, kind, created) VALUES ('ann', 'person', '')")
            number = pair(store)
            for event in OLD_EVENTS:
                db.execute(
                    """INSERT INTO events (comparison, annotator, kind, choice, "left", strength, tags, undoes,
                        request, created) VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, '2026-11-29')""",
                    (number, *event),
                )
            kept = [tuple(row) for row in db.execute("SELECT * FROM events ORDER BY id")]
    _, vote, undo = 1, 2, 3
    with Store.open(path, readonly=True) as store:
        assert not store.at().votes() and len(store.at(vote).votes()) == 1
        before = store.at(vote).fingerprint()
    with Store.open(path) as store:
        rows = [tuple(row) for row in store._db.execute("SELECT * FROM events ORDER BY id")]
        # the columns that came later are empty
        later = (None,) * (len(rows[0]) - len(kept[0]))
        assert rows == [(*row, *later) for row in kept] and len(later) == {3: 6, 4: 4}[version]
        assert store.at(vote).fingerprint() == before
        assert not list(store._db.execute("PRAGMA foreign_key_check"))
        assert store.vote(number, 1, "b") == undo + 1
        assert [row["role"] for row in store.annotators()] == ["annotator"]
        for sql in ("UPDATE events SET choice = 'b'", "DELETE FROM events"):
            with pytest.raises(Exception, match="events are never changed"):
                store._db.execute(sql)
        with pytest.raises(Exception, match="only added at the end"):
            store._db.execute(
                "INSERT INTO events (id, annotator, kind, created) VALUES (1, 1, 'exclude', '')"
            )
        # and what is new works in the file that was old
        prompt = store.add_prompt(user("Rank"))
        ids = [store.add_response(prompt, text) for text in "xyz"]
        ranked = store.rank(store.add_ranking(ids), 1, [[ids[2]], [ids[0], ids[1]]])
        assert len(store.at(ranked).votes()) == 4


def test_a_role_stays_what_it_was(store):
    store.add_annotator("dora", role="adjudicator")
    assert store.add_annotator("dora") == store.add_annotator("dora", role="adjudicator")
    with pytest.raises(UserError, match="'dora' is an adjudicator already"):
        store.add_annotator("dora", role="annotator")


def test_the_adjudicators_word_is_the_label():
    rows = [(1, "x", "a"), (1, "y", "a"), (1, "z", "b"), (1, "judge", "b")]
    rows += [(2, "x", "a"), (2, "y", "b"), (2, "judge", "tie")]
    rows += [(3, "x", "a"), (3, "y", "b"), (3, "z", "b"), (3, "judge", "skip")]
    rows += [(4, "x", "a"), (4, "y", "b"), (4, "z", "a"), (4, "judge", "both_bad")]
    votes = votes_of(*rows, final=["judge"])
    each = [(v.comparison, v.winner, v.annotator) for v in verdicts(votes, "each")]
    # a skip ends nothing; a tie and both bad have no better answer
    assert each == [(1, "b", "judge"), (3, "a", "x"), (3, "b", "y"), (3, "b", "z")]
    for aggregate in ("majority", "skill"):
        found = {v.comparison: (v.winner, v.label_prob) for v in verdicts(votes, aggregate)}
        assert set(found) == {1, 3} and found[1] == ("b", 1.0)
        assert found[3][0] == "b" and found[3][1] < 1
    (tie,) = [v for v in verdicts(votes, "majority", keep_ties=True) if v.comparison == 2]
    assert (tie.label_prob, tie.tie_prob) == (0.5, 1.0)
    # a control's answer is known from the start, whoever says otherwise
    assert {v.comparison for v in verdicts(votes, "skill", {1: "a"})} == {3}
    assert skills(votes, {1: "a"}).posterior[1].tolist() == [1, 0, 0]


def test_skill_is_measured_by_what_was_decided():
    # x and y split on every pair; the adjudicator says x each time
    rows = []
    for i in range(40):
        rows += [(i, "x", "ab"[i % 2]), (i, "y", "ba"[i % 2]), (i, "judge", "ab"[i % 2])]
    found = skills(votes_of(*rows, final=["judge"])).confusion
    # 40 votes and, mirrored, six earlier ones of which five were right
    assert set(found) == {"x", "y"}
    assert (found["x"][0, 0], found["y"][0, 0]) == pytest.approx((45 / 46, 5 / 46))
    summary = agreement_summary(votes_of(*rows, final=["judge"]))
    assert [person["annotator"] for person in summary["annotators"]] == ["x", "y"]
    assert summary["votes"] == 80 and len(summary["kappa"]) == 1


def test_flags_wait_for_a_fair_number_of_votes():
    def hasty(count):
        votes = [Vote(i, i, "x", "a", left="a", duration_ms=10) for i in range(count)]
        (person,) = annotator_reliability(votes)
        return person

    assert not hasty(FEWEST - 1).flags and len(hasty(FEWEST).flags) == 2
    few = {"votes": FEWEST - 1, "flags": []}
    assert remarks(few) == f"too few votes to say ({FEWEST - 1} of {FEWEST})"
    # the tests are exact: 2 of 2 wrong has probability 1/25 with 4 of 5 right, 3 of 3 has 1/125
    for wrong, flagged in ((2, False), (3, True)):
        votes = [Vote(i, i, "x", "ab"[i % 2], left="ab"[i // 2 % 2]) for i in range(40)]
        controls = {i: "ba"[i % 2] for i in range(wrong)}
        (person,) = annotator_reliability(votes, controls)
        assert bool(person.flags) == flagged


def test_win_rates_follow_the_adjudicator_and_leave_the_excluded_out(store):
    for i in range(4):
        prompt = store.add_prompt(user(f"q{i}"))
        one = store.add_response(prompt, "One.", model="runs/one")
        number = store.add_comparison(one, store.add_response(prompt, "Two.", model="runs/two"))
        # ann prefers one each time, bob twice
        store.vote(number, store.add_annotator("ann"), "a")
        store.vote(number, store.add_annotator("bob"), "a" if i < 2 else "b")
    assert summarise_votes(read_ballots(store.at()), overlap=2)["pairs"][0]["rate"][
        "estimate"
    ] == pytest.approx(6 / 8)
    dora = store.add_annotator("dora", role="adjudicator")
    store.vote(3, dora, "b")
    found = summarise_votes(read_ballots(store.at()), overlap=2)
    # of four prompts 1, 1, 1/2 and, by dora's word, 0
    assert found["pairs"][0]["rate"]["estimate"] == pytest.approx(2.5 / 4)
    assert found["annotators"] == 2 and found["pairs"][0]["stop"]["groups"] == 4
    store.exclude("bob")
    found = summarise_votes(read_ballots(store.at()), overlap=1)
    # ann alone, and dora's word on the third
    assert found["pairs"][0]["rate"]["estimate"] == pytest.approx(3 / 4)
    assert [p["annotator"] for p in view_summary(store.at())["annotators"]] == ["ann"]


def test_random_stores_agree_with_a_plain_count(store):
    """Majority with exclusions and final votes, against counting by hand over all events."""
    rng = random.Random(5)
    pairs = [pair(store, f"q{i}") for i in range(30)]
    people = {name: store.add_annotator(name) for name in "xyz"}
    dora = store.add_annotator("dora", role="adjudicator")
    cast: dict = {}
    for number in pairs:
        for name, id in people.items():
            choice = rng.choice("ab")
            store.vote(number, id, choice)
            cast.setdefault(number, {})[name] = choice
        if rng.random() < 0.3:
            choice = rng.choice("ab")
            store.vote(number, dora, choice)
            cast[number]["dora"] = choice
    store.exclude("y")
    expected = {}
    for number, given in cast.items():
        counted = [choice for name, choice in given.items() if name in "xz"]
        if "dora" in given:
            counted = [given["dora"]]
        if counted.count("a") != counted.count("b"):
            expected[number] = max("ab", key=counted.count)
    view = store.at()
    found = {v.comparison: v.winner for v in verdicts(view.votes(), "majority")}
    assert found == expected
    assert view.stats()["comparisons_with_winner"] == len(expected)


def test_a_corrected_answer_becomes_the_chosen_one_and_is_marked(store):
    first, second, third, fourth = (pair(store, f"q{i}", "Good.", "Bad.") for i in range(4))
    ann, bob = store.add_annotator("ann"), store.add_annotator("bob")
    store.vote(first, ann, "b", corrected="Better.", reason="longer")
    store.vote(second, bob, "both_bad", corrected="Better.")
    # sent as it was shown, or empty, it says nothing
    store.vote(third, ann, "a", corrected=" Good.\n")
    store.vote(fourth, ann, "a", corrected="  ")

    def rows(aggregate):
        return [(r.chosen, r.rejected, r.annotator) for r in store.at().preferences(aggregate)]

    added = [("Better.", "Bad.", "ann"), ("Better.", "Good.", "bob"), ("Better.", "Bad.", "bob")]
    usual = [("Bad.", "Good.", "ann"), ("Good.", "Bad.", "ann"), ("Good.", "Bad.", "ann")]
    assert rows("each") == usual + added
    assert rows("majority") == [(*row[:2], None) for row in usual] + added
    marked = [r for r in store.at().preferences() if r.metadata["vote"].get("corrected")]
    assert [r.chosen for r in marked] == 3 * ["Better."]
    assert marked[0].metadata["vote"] == {
        "comparison": first,
        "event": 1,
        "corrected": True,
        "reason": "longer",
    }
    # the vote itself is about what was shown
    assert {v.corrected for v in store.at().votes()} == {"Better.", " Good.\n", None}
    store.exclude("bob")
    assert rows("each") == usual + added[:1]


def test_criteria_are_of_the_answers_and_come_with_the_row(store):
    number, ann = pair(store), store.add_annotator("ann")
    with pytest.raises(UserError, match="criterion 'clear': found 'a': 6, expected a or b"):
        store.vote(number, ann, "b", criteria={"clear": {"a": 6}})
    store.vote(number, ann, "b", criteria={"clear": {"a": 2, "b": 5}, "on brand": {"a": 1}})
    (row,) = store.at().rows()
    assert row["metadata"]["vote"]["criteria"] == {
        "clear": {"rejected": 2, "chosen": 5},
        "on brand": {"rejected": 1},
    }
    assert store.at().votes()[0].criteria["clear"] == {"a": 2, "b": 5}
