import random
from collections import Counter

import pytest

from rlhf.data.freeze import freeze
from rlhf.data.store import Store
from rlhf.data.votes import (
    UNKNOWN_ANNOTATOR,
    Vote,
    by_skill,
    majority,
    margin_of,
    minority,
    verdicts,
)
from rlhf.errors import UserError


def votes_of(*rows):
    """(comparison, annotator, choice, strength) -> votes."""
    return [
        Vote(i, c, n, choice, strength=more[0] if more else None)
        for i, (c, n, choice, *more) in enumerate(rows)
    ]


def test_margin_by_hand():
    # slightly 1/3, clearly 2/3, by far 1; a tie 0; against the winner below 0
    assert margin_of(votes_of((1, "x", "a", 3)), "a") == 1.0
    assert margin_of(
        votes_of((1, "x", "a", 3), (1, "y", "a", 1), (1, "z", "tie")), "a"
    ) == pytest.approx(4 / 9)
    assert margin_of(
        votes_of((1, "x", "b", 2), (1, "y", "b", 2), (1, "z", "a", 3)), "b"
    ) == pytest.approx(1 / 9)
    # never below
    assert margin_of(votes_of((1, "x", "a", 1), (1, "y", "a"), (1, "z", "b", 3)), "a") == 0.0
    assert margin_of(votes_of((1, "x", "a"), (1, "y", "tie"), (1, "z", "both_bad")), "a") is None


def test_majority_carries_the_margin():
    (verdict,) = majority(votes_of((7, "x", "a", 2), (7, "y", "tie"), (7, "z", "skip")))
    assert (verdict.winner, verdict.label_prob, verdict.margin) == ("a", 0.75, pytest.approx(1 / 3))
    assert verdict.metadata == {"votes": {"a": 1, "tie": 1, "skip": 1}}


def test_one_vote_for_each_pair_stays_at_the_unknown_annotators_word():
    # nothing to learn skill from: 2.5 of 3 votes for a side were for the better one, ties said by
    # nobody
    right, wrong = UNKNOWN_ANNOTATOR[0][:2]
    found = by_skill(votes_of(*((i, "xy"[i % 2], "ab"[i % 3 > 0]) for i in range(60))))
    assert len(found) == 60
    assert [v.label_prob for v in found] == pytest.approx([right / (right + wrong)] * 60, abs=1e-6)


def test_ties_pull_the_label_to_one_half_and_alone_give_none():
    # equal annotators, all said a of pair 1; one said tie of pair 2; all said tie of pair 3; 4:
    # only both bad and skip
    people, rows = ("x", "y", "z"), []
    for i in range(100, 160):  # what they are worth: they agree
        rows += [(i, name, "ab"[i % 2]) for name in people]
    rows += [(1, n, "a") for n in people] + [(2, "x", "a"), (2, "y", "a"), (2, "z", "tie")]
    rows += [(3, n, "tie") for n in people] + [(4, "x", "both_bad"), (4, "y", "skip")]
    found = {v.comparison: v for v in by_skill(votes_of(*rows))}
    assert 3 not in found and 4 not in found
    assert 0.5 < found[2].label_prob < found[1].label_prob <= 1.0 and found[2].winner == "a"


def test_skill_outvotes_the_careless():
    rng, rows = random.Random(0), []
    for i in range(400):
        good = "ab"[i % 2]
        rows += [(i, "good", good), (i, "fair", good if rng.random() < 0.8 else "ba"[i % 2])]
        rows += [(i, f"careless {j}", rng.choice("ab")) for j in range(3)]
    votes = votes_of(*rows)
    right = {
        kind: sum(v.winner == "ab"[v.comparison % 2] for v in verdicts(votes, kind))
        for kind in ("majority", "skill")
    }
    assert right["skill"] > 390 and right["majority"] < 330


def test_controls_teach_and_are_no_pairs():
    votes = votes_of(
        *((i, name, side) for i in range(30) for name, side in (("x", "a"), ("y", "b")))
    )
    controls = dict.fromkeys(range(20), "a")
    found = verdicts(votes, "skill", controls)
    assert [v.comparison for v in found] == list(range(20, 30)) and all(
        v.winner == "a" for v in found
    )
    assert (
        verdicts(votes, "majority", controls) == [] and len(verdicts(votes, "each", controls)) == 20
    )
    assert by_skill(votes) == []  # without them nobody knows whom to believe


def test_the_minority_is_of_those_who_take_a_side():
    # ties and skips take none: 1 of 3
    assert minority(Counter(a=2, b=1, tie=3, skip=1)) == pytest.approx(1 / 3)
    assert minority(Counter(a=2, tie=3)) == 0


def test_an_unknown_name_is_refused():
    with pytest.raises(
        UserError, match=r"aggregate: found 'median', expected each, majority or skill"
    ):
        verdicts([], "median")


def test_a_store_gives_skill_weighted_pairs_at_an_event(tmp_path):
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        ids = {name: store.add_annotator(name) for name in ("x", "y", "z")}
        for i in range(12):
            prompt = store.add_prompt([{"role": "user", "content": f"q{i}"}])
            pair = store.add_comparison(
                store.add_response(prompt, "yes"), store.add_response(prompt, "no")
            )
            for name, id in ids.items():
                store.vote(pair, id, "b" if name == "z" and i % 3 == 0 else "a", strength=2)
        event = store.last_event()
        found = store.at(event).preferences("skill")
    assert len(found) == 12 and all(p.chosen == "yes" and 0.5 < p.label_prob < 1 for p in found)
    assert found[1].margin == pytest.approx(2 / 3) and found[0].margin == pytest.approx(2 / 9)
    freeze(path, tmp_path / "pairs.jsonl", event, "skill")
    assert '"aggregate": "skill"' in (tmp_path / "pairs.jsonl").read_text().splitlines()[0]


def test_ties_are_kept_on_request_with_half_a_vote_for_either_side():
    votes = votes_of(
        *((1, "x", "a"), (1, "y", "tie"), (1, "z", "tie"), (1, "w", "b")),
        *((2, "x", "tie"), (2, "y", "skip")),
        *((3, "x", "b"), (3, "y", "b"), (3, "z", "tie")),
        *((4, "x", "both_bad"), (4, "y", "skip")),
    )
    found = [(v.comparison, v.winner, v.label_prob, v.tie_prob) for v in majority(votes)]
    assert found == [(3, "b", pytest.approx(5 / 6), None)]
    found = [
        (v.comparison, v.winner, v.label_prob, v.tie_prob) for v in majority(votes, keep_ties=True)
    ]
    assert found == [
        (1, "a", 0.5, 0.5),
        (2, "a", 0.5, 1.0),
        (3, "b", pytest.approx(5 / 6), pytest.approx(1 / 3)),
    ]
    # one verdict a vote
    single = verdicts(votes, "each", keep_ties=True)
    assert [(v.winner, v.label_prob, v.tie_prob) for v in single if v.comparison == 1] == [
        ("a", None, None),
        ("a", 0.5, 1.0),
        ("a", 0.5, 1.0),
        ("b", None, None),
    ]
    assert len(single) == 8 and len(verdicts(votes, "each")) == 4
    assert single[1].annotator == "y"


def test_skill_keeps_what_cancels_out_and_says_the_chance_of_a_tie():
    votes = votes_of((1, "x", "tie"), (2, "x", "a"))
    assert [v.comparison for v in by_skill(votes)] == [2]
    kept = by_skill(votes, keep_ties=True)
    assert [v.label_prob for v in kept] == [0.5, by_skill(votes)[0].label_prob]
    assert kept[0].tie_prob > kept[1].tie_prob > 0
    # label_prob holds half of it, and some chance is left for the other side
    assert 1 - kept[1].label_prob > kept[1].tie_prob / 2


def test_a_store_freezes_ties_on_request(tmp_path):
    from rlhf.data.load import load
    from rlhf.data.records import Preference

    with Store.open(tmp_path / "v.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        pair = store.add_comparison(
            store.add_response(prompt, "Hello!"), store.add_response(prompt, "What?")
        )
        store.vote(pair, store.add_annotator("ann"), "tie")
    freeze(tmp_path / "v.db", tmp_path / "without.jsonl")
    freeze(tmp_path / "v.db", tmp_path / "with.jsonl", keep_ties=True)
    assert len((tmp_path / "without.jsonl").read_text().splitlines()) == 1
    (record,) = load(str(tmp_path / "with.jsonl"), Preference)
    assert (record.label_prob, record.tie_prob, record.has_winner) == (0.5, 1.0, False)
    assert record.annotator == "ann"
