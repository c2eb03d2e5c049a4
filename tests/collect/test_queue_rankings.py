"""Which ranking goes to whom, and what becomes of it."""

import random
import time
from collections import Counter

import pytest

from rlhf.collect.queue import Answer, Queue
from rlhf.collect.queue_state import Rules
from rlhf.data.store import Store

SKIP = Answer("skip")


def fill(path, rankings=2, pairs=0, k=4):
    with Store.open(path, create=True) as store, store.transaction():
        for i in range(rankings + pairs):
            prompt = store.add_prompt([{"role": "user", "content": f"Question {i}"}])
            size = k if i < rankings else 2
            ids = [store.add_response(prompt, f"Answer {i} {j}") for j in range(size)]
            if i < rankings:
                store.add_ranking(ids)
            else:
                store.add_comparison(*ids)
    return path


@pytest.fixture
def store(tmp_path):
    with Store.open(fill(tmp_path / "votes.db")) as opened:
        yield opened


def people(store, count, role=None):
    return [store.add_annotator(f"{role or 'p'}{i}", role=role) for i in range(count)]


def rank(queue, person, order=None, request=None):
    """Order what comes next by the responses' ids (`order`: places by id); the assignment."""
    held = queue.next(person)
    places = tuple((order or (lambda id: id))(id) for id in held.shown)
    answer = Answer("rank", places=places)
    assert queue.vote(person, held.event, answer, request or str(held.event)) == "saved"
    return held


def test_answers_are_shuffled_and_their_places_become_an_order(tmp_path):
    with Store.open(fill(tmp_path / "many.db", rankings=60)) as store:
        (ann,) = people(store, 1)
        queue, first_place = Queue(store, Rules(overlap=1), draw=random.Random(0)), Counter()
        for _ in range(60):
            shown = queue.next(ann).shown
            assert queue.next(ann).shown == shown  # a page that is loaded again
            first_place[shown.index(min(shown))] += 1
            # the two oldest are the best and equally good
            held = rank(
                queue, ann, {id: max(2, place) for place, id in enumerate(sorted(shown), 1)}.get
            )
            assert held.shown == shown
        # each answer comes to each place as often: 15 +- 3.4
        assert sorted(first_place) == [0, 1, 2, 3] and min(first_place.values()) > 5
        for ranked in store.at().ranked():
            least = min(ranked.shown)
            assert ranked.order == [[least, least + 1], [least + 2], [least + 3]]


def test_each_ranking_gets_its_overlap_and_nobody_meets_one_twice(store):
    queue, judged = Queue(store, Rules(overlap=2)), Counter()
    for person in people(store, 3):
        while queue.next(person) is not None:
            judged[rank(queue, person).ranking] += 1
    assert judged == {1: 2, 2: 2}
    # its pairs are asked about by nobody, and have no slots
    assert queue.progress(1).given == queue.progress(1).needed == 4
    assert queue.open_pairs() == {"complete": 2, "begun": 0, "untouched": 0}


def test_pairs_and_rankings_are_shared_out_together(tmp_path):
    with Store.open(fill(tmp_path / "both.db", rankings=2, pairs=3)) as store:
        (ann,) = people(store, 1)
        queue, kinds = Queue(store, Rules(overlap=1)), Counter()
        while (held := queue.next(ann)) is not None:
            kinds["ranking" if held.ranking else "pair"] += 1
            wrong = Answer("left") if held.ranking else Answer("rank", places=(1, 2))
            assert queue.vote(ann, held.event, wrong, f"w{held.event}") == "gone"
            if held.ranking:
                short = Answer("rank", places=(1, 2, 3))
                assert queue.vote(ann, held.event, short, f"s{held.event}") == "gone"
                rank(queue, ann)
            else:
                assert queue.vote(ann, held.event, Answer("left"), str(held.event)) == "saved"
        assert kinds == {"ranking": 2, "pair": 3} and queue.progress(ann).mine == 5


def test_a_vote_on_one_pair_of_a_ranking_answers_the_ranking(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=2))
    held = queue.next(ann)
    # as it comes from elsewhere, of an order that places two answers
    pairs = store.at().pairs().items()
    part = next(id for id, pair in pairs if pair["ranking"] == held.ranking)
    event = store.vote(part, ann, "a")
    places = Answer("rank", places=(1, 2, 3, 4))
    assert queue.vote(ann, held.event, places, "k") == "answered"
    other = rank(queue, ann)
    assert other.ranking != held.ranking and queue.next(ann) is None
    # nobody is asked about the pair by itself, and it takes no slot
    for _ in range(2):
        rank(queue, bob)
    assert queue.next(bob) is None and queue.progress(bob).given == 3
    store.undo(event)
    assert rank(queue, ann).ranking == held.ranking


def test_a_click_counts_once_and_undo_brings_the_same_page_back(store):
    (ann,) = people(store, 1)
    queue = Queue(store, Rules(overlap=1))
    held = queue.next(ann)
    answer = Answer("rank", places=(1, 1, 2, 3))
    assert queue.vote(ann, held.event, answer, "k") == "saved"
    assert queue.vote(ann, held.event, Answer("rank", places=(1, 1, 4, 9)), "k") == "again"
    assert queue.vote(ann, held.event, Answer("rank", places=(2, 1, 3, 4)), "k") == "differs"
    assert queue.vote(ann, held.event, Answer("rank", places=(1, 1)), "k") == "differs"
    assert queue.vote(ann, held.event, SKIP, "k") == "differs"
    assert queue.vote(ann, held.event, answer, "other") == "answered"
    assert queue.undo(ann, "u") == "undone" and queue.undo(ann, "u") == "again"
    again = queue.next(ann)
    assert (again.ranking, again.shown) == (held.ranking, held.shown)
    assert store.at().votes() == [] and queue.progress(ann).given == 0
    assert queue.vote(ann, held.event, answer, "k") == "withdrawn"
    assert queue.vote(ann, again.event, SKIP, "s") == "saved"
    assert queue.next(ann).ranking != held.ranking and queue.progress(ann).given == 0
    assert store.at().ranked()[0].shown == list(held.shown)


def test_a_lease_and_leaving(store):
    ann, bob = people(store, 2)
    shift = [0.0]
    store.clock = lambda: time.time() + shift[0]
    queue = Queue(store, Rules(overlap=1, lease_seconds=60))
    held = queue.next(ann)
    other = rank(queue, bob)
    assert other.ranking != held.ranking and queue.next(bob) is None
    shift[0] = 61.0
    assert queue.next(bob).ranking == held.ranking
    late = Answer("rank", places=(1, 2, 3, 4))
    assert queue.vote(ann, held.event, late, "late") == "full"
    queue.release(bob)
    assert queue.vote(ann, held.event, late, "late again") == "saved"
    # another server, or this one after it was killed, knows the same
    fresh = Queue(store, Rules(overlap=1))
    assert fresh.next(bob) is None and fresh.progress(ann).given == 2


def test_an_adjudicator_ends_disputes_over_pairs_of_rankings(tmp_path):
    with Store.open(fill(tmp_path / "votes.db", rankings=1, k=3)) as store:
        ann, bob = people(store, 2)
        (dora,) = people(store, 1, role="adjudicator")
        queue = Queue(store, Rules(overlap=2))
        rank(queue, ann)
        assert queue.next(dora) is None
        # 1 2 3 and 2 1 3: one pair of the three is in dispute
        rank(queue, bob, order={1: 2, 2: 1, 3: 3}.get)
        assert queue.next(dora) is not None
        queue.release(dora)
        # an undone order says nothing of the pairs
        assert queue.undo(bob, "u") == "undone" and queue.next(dora) is None
        rank(queue, bob, order={1: 2, 2: 1, 3: 3}.get, request="again")
        held = queue.next(dora)
        pair = store.at().pair(held.comparison)
        assert (pair["text_a"], pair["text_b"]) == ("Answer 0 0", "Answer 0 1")
        assert queue.progress(dora).needed == 1
        assert queue.vote(dora, held.event, Answer("left"), "d") == "saved"
        assert queue.next(dora) is None and queue.progress(dora).given == 1
        final = [vote for vote in store.at().votes() if vote.is_final]
        assert [vote.choice for vote in final] == [held.left]
        # an excluded annotator's order counts no more, and frees its slot
        store.exclude("p1")
        assert queue.open_pairs() == {"complete": 0, "begun": 1, "untouched": 0}
        assert queue.next(bob) is None
