import random
import time
from collections import Counter

import pytest

from rlhf.collect.pairs import check_pairs
from rlhf.collect.queue import Answer, Queue
from rlhf.collect.queue_state import Rules
from rlhf.data.store import Store
from rlhf.errors import UserError
from tests.collect.conftest import fill

LEFT, TIE, SKIP = Answer("left"), Answer("tie"), Answer("skip")


@pytest.fixture
def store(tmp_path):
    with Store.open(fill(tmp_path / "votes.db", pairs=4)) as opened:
        yield opened


def test_control_pairs_alone_are_nothing_to_judge(tmp_path):
    alone = fill(tmp_path / "controls.db", pairs=0, controls=1)
    told = "has no pairs to judge; make some with: rlhf collect sample"
    with Store.open(alone) as store, pytest.raises(UserError, match=told):
        check_pairs(store)
    with Store.open(fill(tmp_path / "both.db", pairs=1, controls=1)) as store:
        check_pairs(store)


def people(store, count):
    return [store.add_annotator(f"p{i}") for i in range(count)]


def vote(queue, person, answer=LEFT, request=None):
    """Judge what comes next; the pair."""
    held = queue.next(person)
    assert queue.vote(person, held.event, answer, request or str(held.event)) == "saved"
    return held.comparison


def test_a_pair_stays_with_its_annotator_until_answered(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=1))
    held = queue.next(ann)
    assert queue.next(ann).event == held.event  # a page that is loaded again
    assert queue.next(bob).comparison != held.comparison
    assert queue.vote(ann, held.event, LEFT, "c") == "saved"
    assert queue.next(ann).comparison != held.comparison


def test_each_pair_gets_its_overlap_and_nobody_meets_one_twice(store):
    queue, judged = Queue(store, Rules(overlap=2)), Counter()
    for person in people(store, 3):
        mine = []
        while (held := queue.next(person)) is not None:
            mine.append(vote(queue, person))
            assert held.comparison == mine[-1]
        assert len(set(mine)) == len(mine)
        judged.update(mine)
    assert sorted(judged.values()) == [2, 2, 2, 2]
    assert queue.progress(1).given == queue.progress(1).needed == 8
    assert queue.open_pairs() == {"complete": 4, "begun": 0, "untouched": 0}


def test_a_control_pair_of_the_answers_that_come_next_is_not_shown(tmp_path):
    with Store.open(fill(tmp_path / "one.db", pairs=1)) as store:
        normal = store.at().pair(1)
        store.add_comparison(normal["a"], normal["b"], kind="control", expected=normal["a"])
        (ann,) = people(store, 1)
        queue = Queue(store, Rules(overlap=1, control_share=1.0))
        assert vote(queue, ann) == 1 and queue.next(ann) is None


def test_pairs_nearest_to_complete_come_first(store):
    ann, bob, cem, dee = people(store, 4)
    queue = Queue(store, Rules(overlap=3))
    for comparison, voters in {1: (ann,), 2: (ann, bob), 3: (cem,)}.items():
        for voter in voters:
            store.vote(comparison, voter, "a")
    assert vote(queue, dee) == 2
    for _ in range(3):
        vote(queue, dee)
    assert vote(queue, cem) == 1  # ann and dee have judged it; 4 has dee alone
    assert queue.open_pairs() == {"complete": 2, "begun": 2, "untouched": 0}


def test_left_and_right_become_a_and_b_and_sides_are_drawn(tmp_path):
    with Store.open(fill(tmp_path / "many.db", pairs=60)) as store:
        (ann,) = people(store, 1)
        queue = Queue(store, Rules(overlap=1), draw=random.Random(0))
        for i in range(60):
            vote(queue, ann, Answer("left" if i % 2 else "right", strength=2))
        sides = Counter((v.left, v.choice) for v in store.at().votes())
        # on the left and chosen, or on the right and the other one was chosen
        by_event = [(v.left, v.choice) for v in store.at().votes()]
        assert all((choice == left) == bool(i % 2) for i, (left, choice) in enumerate(by_event))
        # fair coin: 30 +- 4
        assert 15 < sum(n for (left, _), n in sides.items() if left == "a") < 45
        assert {v.strength for v in store.at().votes()} == {2}
        assert store.at().votes()[0].tags == []


def test_strength_is_kept_for_a_side_alone(store):
    (ann,) = people(store, 1)
    queue = Queue(store, Rules(overlap=1))
    vote(queue, ann, Answer("tie", strength=3, reason="why", tags=("off tone",)))
    [kept] = store.at().votes()
    assert (kept.choice, kept.strength, kept.reason, kept.tags) == (
        "tie",
        None,
        "why",
        ["off tone"],
    )


def test_a_lease_times_out_and_late_answers_count_while_there_is_room(store):
    ann, bob = people(store, 2)
    shift = [0.0]
    store.clock = lambda: time.time() + shift[0]
    queue = Queue(store, Rules(overlap=1, lease_seconds=60))
    held = {queue.next(ann).comparison: queue.next(ann)}
    for _ in range(3):
        held |= {vote(queue, bob): None}
    assert len(held) == 4 and queue.next(bob) is None  # ann holds the last place
    shift[0] = 59.0
    assert queue.next(bob) is None
    shift[0] = 61.0
    late, taken = next(a for a in held.values() if a), queue.next(bob)
    assert taken.comparison == late.comparison
    assert queue.vote(ann, late.event, LEFT, "late") == "full"  # bob is at it
    shift[0] = 125.0  # both leases have timed out: who comes first has the slot
    assert queue.vote(ann, late.event, LEFT, "late again") == "saved"
    assert queue.vote(bob, taken.event, LEFT, "too late") == "full"
    assert len(store.at().votes()) == 4


def test_leaving_gives_the_place_back(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=1))
    for _ in range(3):
        vote(queue, bob)
    held = queue.next(ann)
    assert queue.next(bob) is None
    queue.release(ann)
    assert queue.next(bob).comparison == held.comparison
    assert queue.vote(ann, held.event, LEFT, "c") == "gone"


def test_skips_and_votes_of_models_take_no_place(store):
    ann, bob = people(store, 2)
    model = store.add_annotator("judge", kind="model")
    for comparison in range(1, 5):
        store.vote(comparison, model, "a")
    queue = Queue(store, Rules(overlap=1))
    skipped = vote(queue, ann, SKIP)
    assert skipped in {vote(queue, bob) for _ in range(4)}
    assert queue.next(ann) is None and queue.progress(ann).mine == 1


def test_one_click_sent_twice_is_one_vote(store):
    (ann,) = people(store, 1)
    queue = Queue(store, Rules(overlap=1))
    held = queue.next(ann)
    answers = [queue.vote(ann, held.event, a, "click") for a in (LEFT, LEFT, Answer("right"))]
    assert answers == ["saved", "again", "differs"]
    assert queue.vote(ann, held.event, LEFT, "another page") == "answered"
    assert queue.vote(ann, 9999, LEFT, "nothing") == "gone" and len(store.at().votes()) == 1


def test_nobody_answers_for_another(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=2))
    held = queue.next(ann)
    assert queue.vote(bob, held.event, LEFT, "c") == "gone"
    # the same name of a click is another person's
    assert queue.vote(ann, held.event, LEFT, "c") == "saved"
    assert queue.vote(bob, held.event, LEFT, "d") == "gone" and len(store.at().votes()) == 1


def test_undo_brings_the_pair_back_as_it_was_step_by_step(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=1))
    assert queue.undo(ann, "u0") == "nothing"
    held = [queue.next(ann)]
    vote(queue, ann)
    held.append(queue.next(ann))
    vote(queue, ann)
    for step in (1, 0):
        assert queue.undo(ann, f"u{step}") == "undone" and queue.undo(ann, f"u{step}") == "again"
        now = queue.next(ann)
        assert (now.comparison, now.left) == (held[step].comparison, held[step].left)
        # the place stays ann's
        assert queue.next(bob).comparison not in {h.comparison for h in held}
    assert store.at().votes() == [] and queue.progress(ann).mine == 0
    assert {vote(queue, ann), vote(queue, ann)} == {h.comparison for h in held}


def test_a_skip_cannot_be_undone_once_others_have_the_place(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=1))
    skipped = vote(queue, ann, SKIP)
    while vote(queue, bob) != skipped:
        pass
    assert (
        queue.undo(ann, "u") == "full" and [v.choice for v in store.at().votes()].count("skip") == 1
    )


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.25, 60, 140), (1.0, 150, 150)])
def test_control_pairs_are_mixed_in_at_their_share(tmp_path, share, low, high):
    # 300 normal pairs; at 0.25 of what is shown 300 / 0.75 * 0.25 = 100 +- 10 controls; at 1 all
    # 150 come first
    with Store.open(fill(tmp_path / "votes.db", pairs=300, controls=150)) as store:
        (ann,) = people(store, 1)
        queue = Queue(store, Rules(overlap=1, control_share=share), draw=random.Random(0))
        shown = []
        while (held := queue.next(ann)) is not None:
            shown.append(held.comparison)
            queue.vote(ann, held.event, TIE, str(held.event))
        found = [i for i, comparison in enumerate(shown) if comparison in store.at().controls()]
        assert low <= len(found) <= high and len(shown) == 300 + len(found) == len(set(shown))
        if share == 0.25:
            # among the rest, not at one end
            assert sum(i < len(shown) / 2 for i in found) > low / 2


def test_controls_are_for_everybody_and_no_progress(tmp_path):
    with Store.open(fill(tmp_path / "votes.db", pairs=3, controls=2)) as store:
        queue = Queue(store, Rules(overlap=3, control_share=1.0))
        for person in people(store, 3):
            assert sum(vote(queue, person) in store.at().controls() for _ in range(5)) == 2
        assert queue.progress(1).given == queue.progress(1).needed == 9


def test_duration_is_from_the_page_or_the_answer_before(store):
    ann, bob = people(store, 2)
    shift = [0.0]
    store.clock = lambda: time.time() + shift[0]
    queue = Queue(store, Rules(overlap=2))
    held = queue.next(ann)
    shift[0] = 7.0
    queue.vote(ann, held.event, LEFT, "c")
    assert store.at().votes()[0].duration_ms == pytest.approx(7000, abs=200)
    assert (
        queue.progress(ann).seconds == pytest.approx(7, abs=0.2)
        and queue.progress(bob).seconds is None
    )


def test_two_servers_and_restarts_agree_and_overlap_holds_whatever_happens(tmp_path):
    """600 random steps of five annotators on two queues over one file; after each, the rules hold."""
    path, draw, shift = fill(tmp_path / "votes.db", pairs=12, controls=2), random.Random(5), [0.0]
    rules = Rules(overlap=2, lease_seconds=30, control_share=0.2)
    with Store.open(path) as one, Store.open(path) as other:
        one.clock = other.clock = lambda: time.time() + shift[0]
        queues = [Queue(one, rules), Queue(other, rules)]
        annotators, pages, outcomes = people(one, 5), [], Counter()
        for step in range(600):
            queue, person = draw.choice(queues), draw.choice(annotators)
            action = draw.choices(("page", "vote", "undo", "leave", "wait"), (8, 12, 2, 1, 1))[0]
            if action == "page" and (held := queue.next(person)):
                pages.append((person, held.event))
            elif action == "vote" and pages:
                who, event = draw.choice(pages[-8:])
                answer = Answer(draw.choice(("left", "right", "tie", "skip")))
                outcomes[queue.vote(who, event, answer, f"{step}")] += 1
            elif action == "undo":
                outcomes[queue.undo(person, f"{step}")] += 1
            elif action == "leave":
                queue.release(person)
            elif action == "wait":
                shift[0] += 20
            votes = [v for v in one.at().votes() if v.comparison not in one.at().controls()]
            counted = Counter(v.comparison for v in votes if v.choice != "skip")
            assert max(counted.values(), default=0) <= 2
            assert len({(v.comparison, v.annotator) for v in votes}) == len(votes)
        fresh = Queue(one, rules)
        for queue in queues:
            assert queue.open_pairs() == fresh.open_pairs()
            for person in annotators:
                assert queue.progress(person) == fresh.progress(person)
        assert {"saved", "undone", "answered", "full", "gone"} <= set(outcomes), outcomes
        assert fresh.progress(0).given == sum(counted.values())


def test_an_adjudicator_gets_disputed_pairs_alone_and_ends_them(store):
    ann, bob = people(store, 2)
    dora, eve = (store.add_annotator(name, role="adjudicator") for name in ("dora", "eve"))
    queue = Queue(store, Rules(overlap=2))
    # 1 and 2 are disputed, 3 is not, and 4 is not complete
    for comparison, choices in {1: "ab", 2: "ba", 3: "aa", 4: "a"}.items():
        for person, choice in zip((ann, bob), choices, strict=False):
            store.vote(comparison, person, choice)
    assert queue.progress(dora).needed == 2
    # with three people wanted for each pair, none is complete and none is looked at twice
    assert Queue(store, Rules(overlap=3)).next(eve) is None
    first = queue.next(dora)
    assert first.comparison in (1, 2) and queue.next(dora).event == first.event
    # what one looks at, another need not
    second = queue.next(eve)
    assert {first.comparison, second.comparison} == {1, 2}
    # and neither of them takes a slot of pair 4
    assert queue.next(bob).comparison == 4
    assert queue.vote(dora, first.event, SKIP, "s") == "saved"
    assert queue.next(dora) is None and queue.progress(dora).given == 0
    assert queue.vote(eve, second.event, LEFT, "v") == "saved"
    assert queue.next(eve).comparison == first.comparison
    progress = queue.progress(eve)
    assert (progress.mine, progress.given, progress.needed) == (1, 1, 2)
    # another process that reads the file sees the same
    assert Queue(store, Rules(overlap=2)).next(eve).comparison == first.comparison
    # without bob four slots are filled, by ann: eve's vote fills none
    store.exclude("p1")
    assert queue.progress(ann).given == 4
    store.exclude("p1", back=True)
    assert queue.progress(ann).given == 7
    assert queue.undo(eve, "u") == "undone" and queue.progress(eve).given == 0


def test_an_excluded_annotator_frees_slots_and_gets_nothing(store):
    ann, bob = people(store, 2)
    queue = Queue(store, Rules(overlap=1))
    judged = vote(queue, ann)
    held = queue.next(ann)
    assert queue.progress(bob).given == 1
    store.exclude("p0")
    assert queue.progress(bob).given == 0 and queue.open_pairs()["complete"] == 0
    assert queue.next(ann) is None and queue.vote(ann, held.event, LEFT, "late") == "gone"
    mine = {vote(queue, bob) for _ in range(4)}
    assert mine == {1, 2, 3, 4} and judged in mine
    store.exclude("p0", back=True)
    # the slot is taken twice, which counts once
    assert queue.progress(bob).given == 4 and queue.open_pairs()["complete"] == 4
