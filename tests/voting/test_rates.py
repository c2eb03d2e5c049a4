import itertools

import numpy as np
import pytest

from rlhf.data.store import Store
from rlhf.voting.ballots import Ballots, Item, read_ballots, table_of
from rlhf.voting.rates import _complete, _equal_share, bradley_terry, summarise_votes


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        yield opened


def answers(store, question, texts):
    """Answers of models to a question, stored in this order; every two that differ are compared."""
    prompt = store.add_prompt(user(question))
    ids = {model: store.add_response(prompt, text, model=model) for model, text in texts.items()}
    pairs = {}
    for one, other in itertools.combinations(texts, 2):
        if texts[one] != texts[other]:
            pairs[one, other] = store.add_comparison(ids[one], ids[other])
    return pairs


def test_votes_are_read_for_the_policy_whichever_answer_was_stored_first(store):
    ann, bob, cem = (store.add_annotator(name) for name in ("ann", "bob", "cem"))
    judge = store.add_annotator("judge", role="adjudicator")
    first = answers(store, "one", {"runs/dpo": "x", "runs/ppo": "y"})["runs/dpo", "runs/ppo"]
    second = answers(store, "two", {"runs/ppo": "x", "runs/dpo": "y"})["runs/ppo", "runs/dpo"]
    answers(store, "three", {"runs/dpo": "same", "runs/ppo": "same"})
    # pairs of one policy are there to be trained on
    prompt = store.add_prompt(user("four"))
    own = [store.add_response(prompt, text, model="runs/dpo") for text in "xy"]
    trained_on = store.add_comparison(*own)

    store.vote(first, ann, "a")  # dpo
    store.vote(second, ann, "a")  # ppo
    store.vote(first, bob, "both_bad")
    store.vote(second, bob, "skip")
    store.vote(trained_on, ann, "a")
    # who only skips, or only decides, is nobody whose taste is measured
    store.vote(first, cem, "skip")
    store.vote(second, judge, "a")
    ballots = read_ballots(store.at())

    assert ballots.policies == ["dpo", "ppo"] and ballots.annotators == ["ann", "bob"]
    one, two, equal = ballots.items["dpo", "ppo"]
    assert one.shares == {"ann": 1.0, "bob": 0.5} and two.shares == {"ann": 0.0}
    assert equal.equal and not equal.shares
    assert ballots.source == "human"


def test_equal_answers_are_of_the_policies_in_their_order(store):
    for question, text in (("one", "x"), ("two", "same")):
        answers(store, question, {"z": text, "a": "same"})
    items = read_ballots(store.at()).items
    assert {pair: [item.equal for item in own] for pair, own in items.items()} == {
        ("z", "a"): [False, True]
    }


def test_groups_are_complete_in_the_order_of_their_last_votes():
    items = [
        Item("late", {"ann": 1.0}, order=9),
        Item("late", {"ann": 0.0, "bob": 1.0}, order=2),
        Item("early", {"ann": 0.0}, order=5),
        # one of its pairs waits for votes
        Item("open", {"ann": 1.0}, order=1),
        Item("open"),
    ]
    # the later one: (1 + 1/2) / 2
    assert _complete(items, 1) == [0.0, 0.75]


def test_simulated_votes_are_called_so(store):
    pair = answers(store, "one", {"a": "x", "b": "y"})["a", "b"]
    store.vote(pair, store.add_annotator("sim-ann"), "a")
    assert read_ballots(store.at()).source == "simulated"
    store.vote(pair, store.add_annotator("ann"), "a")
    assert read_ballots(store.at()).source == "mixed"


def ballots_of(items, annotators=("ann", "bob", "cem")):
    policies = list(dict.fromkeys(itertools.chain.from_iterable(items)))
    return Ballots(policies, list(annotators), items, dict.fromkeys(annotators, "human"), event=9)


def test_a_win_rate_is_a_mean_of_groups_of_prompts_of_votes():
    items = [
        Item("g", {"ann": 1.0, "bob": 0.0, "cem": 0.5}),  # 0.5
        Item("g", {"ann": 1.0}),  # 1
        Item("h", {"ann": 0.0}),  # 0
        Item("h", equal=True),  # 0.5
    ]
    found = summarise_votes(ballots_of({("dpo", "ppo"): items}))
    # (0.75 + 0.25) / 2
    assert found["pairs"][0]["rate"]["estimate"] == pytest.approx(0.5)
    assert found["votes"] == 5 and found["prompts"] == 3 and found["pairs"][0]["equal"] == 1
    assert found["pairs"][0]["ties"] == pytest.approx(1 / 5)
    # without cem the first prompt is at 0.5 still; without ann the second has no vote: 0.25, 0.5
    table = table_of(items, ("ann", "bob", "cem"), ["g", "h"])
    means, seen = table.by_group(np.array([0.0, 1.0, 1.0]))
    assert means.tolist() == [0.25, 0.5] and seen.all()


def test_of_two_policies_one_wins_what_the_other_loses():
    rng = np.random.default_rng(0)
    items = []
    for i in range(60):
        items.append(
            Item(f"g{i}", {n: float(rng.random() < 0.7) for n in ("ann", "bob", "cem")}, order=i)
        )
    found = summarise_votes(ballots_of({("dpo", "ppo"): items}), overlap=3)
    first, second = found["policies"]
    assert (first["policy"], second["policy"]) == ("dpo", "ppo")
    assert first["rate"]["estimate"] + second["rate"]["estimate"] == pytest.approx(1)
    assert first["rate"]["low"] + second["rate"]["high"] == pytest.approx(1)
    assert found["scope"] == "annotators" and found["pairs"][0]["stop"]["state"] == "one"


def test_two_annotators_are_these_annotators():
    items = [Item(f"g{i}", {"ann": float(i % 3 > 0), "bob": 1.0}) for i in range(9)]
    found = summarise_votes(ballots_of({("dpo", "ppo"): items}, annotators=("ann", "bob")))
    assert found["scope"] == "these annotators"
    # Student's t over the nine group means, as the annotators are fixed: 2/3 and 1 are 6 and 3
    means = np.array([0.5 + 0.5 * (i % 3 > 0) for i in range(9)])
    assert found["pairs"][0]["rate"]["se"] == pytest.approx(means.std(ddof=1) / 3)


def test_an_interval_is_over_what_was_voted_on_alone():
    """Prompts without a vote and annotators of other pairs say nothing of a win rate."""
    won = [Item(f"g{i}", {"ann": 1.0}) for i in range(3)]
    waiting = [Item(f"w{i}") for i in range(300)]
    found = summarise_votes(ballots_of({("dpo", "ppo"): won + waiting}, annotators=["ann"]))
    rate = found["pairs"][0]["rate"]
    # Wilson's interval of 3 of 3 with t(2) = 4.3027: 1 / (1 + 4.3027^2 / 3)
    assert rate["groups"] == 3 and rate["high"] == 1
    assert rate["low"] == pytest.approx(1 / (1 + 4.302653**2 / 3), abs=1e-6)

    mixed = [Item(f"g{i}", {"ann": float(i > 0)}) for i in range(4)]
    others = [Item(f"h{i}", {"bob": 1.0, "cem": float(i % 2)}) for i in range(6)]
    alone = ballots_of({("dpo", "ppo"): mixed}, annotators=["ann"])
    among = ballots_of({("dpo", "ppo"): mixed, ("dpo", "sft"): others})
    first, second = (summarise_votes(b)["pairs"][0]["rate"] for b in (alone, among))
    assert second == first and first["seeds"] == 1


def test_equal_answers_do_not_draw_a_rate_to_one_half_while_votes_are_coming():
    equal = [Item(f"e{i}", equal=True) for i in range(10)]
    won = [Item(f"g{i}", {"ann": 1.0}) for i in range(2)]
    waiting = [Item(f"w{i}") for i in range(18)]
    found = summarise_votes(ballots_of({("dpo", "ppo"): equal + won + waiting}, ["ann"]))
    # a third of the 30 prompts is equal: 1/3 * 1/2 + 2/3 * 1
    assert found["pairs"][0]["rate"]["estimate"] == pytest.approx(5 / 6)
    # the same with the waiting prompts in groups that have a vote, and an equal prompt beside each
    items = [*won, *[Item(f"g{i % 2}") for i in range(18)], Item("g0", equal=True)]
    items += [Item("g1", equal=True), Item("w", equal=True), Item("w")]
    found = summarise_votes(ballots_of({("dpo", "ppo"): items}, ["ann"]))
    # (10 * 1 + 1/2) / 11 in each of the two groups, which stand for the third too
    assert found["pairs"][0]["rate"]["estimate"] == pytest.approx(10.5 / 11)


def test_equal_answers_count_in_the_sequence_as_in_the_rate():
    items = [
        Item("g", {"ann": 1.0}, order=1),
        Item("g", equal=True),  # (1 + 1/2) / 2
        Item("h", {"ann": 1.0}, order=2),
        Item("e", equal=True),
        Item("e", equal=True),
        Item("f", equal=True),
    ]
    # two of four groups are all equal; by items it would be four of six
    assert _complete(items, 1) == [0.75, 1.0] and _equal_share(items) == 0.5
    # so that their mean is the win rate: 0.5 + 0.5 (0.875 - 0.5)
    rate = summarise_votes(ballots_of({("dpo", "ppo"): items}, annotators=["ann"]))["pairs"][0]
    assert rate["rate"]["estimate"] == pytest.approx(0.5 + 0.5 * 0.375)


def test_the_error_is_shared_with_pairs_of_policies_that_wait_for_votes():
    voted = [Item(f"g{i}", {"ann": 1.0}, order=i) for i in range(5)]
    items = {("x", "y"): voted, ("x", "z"): [Item("g0")], ("y", "z"): [Item("g0")]}
    stop = summarise_votes(ballots_of(items, annotators=["ann"]))["pairs"][0]["stop"]
    assert stop["alpha"] == pytest.approx(0.05 / 3)


def test_strengths_are_those_that_make_the_wins():
    # with strengths 4, 2, 1 the chances are 4/6, 4/5 and 2/3
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0] = 400, 200
    wins[0, 2], wins[2, 0] = 480, 120
    wins[1, 2], wins[2, 1] = 400, 200
    found = bradley_terry(wins, prior_tie=0.0)
    assert found == pytest.approx([2, 1, 0.5])
    # who wins all stays finite
    assert np.isfinite(bradley_terry(np.triu(np.full((3, 3), 5.0), 1))).all()


def test_three_policies_are_ranked_by_their_mean_chance():
    rng = np.random.default_rng(1)
    strengths, items = {"x": 4.0, "y": 2.0, "z": 1.0}, {}
    for one, other in itertools.combinations(strengths, 2):
        chance = strengths[one] / (strengths[one] + strengths[other])
        items[one, other] = []
        for i in range(300):
            shares = {name: float(rng.random() < chance) for name in ("ann", "bob", "cem")}
            items[one, other].append(Item(f"g{i}", shares, order=i))
    found = summarise_votes(ballots_of(items), overlap=3)
    assert [row["policy"] for row in found["policies"]] == ["x", "y", "z"]
    truth = {"x": (4 / 6 + 4 / 5) / 2, "y": (2 / 6 + 2 / 3) / 2, "z": (1 / 5 + 1 / 3) / 2}
    for row in found["policies"]:
        assert row["rate"]["low"] < truth[row["policy"]] < row["rate"]["high"]
        assert row["rate"]["high"] - row["rate"]["low"] < 0.12
    # three pairs of policies share the error
    assert found["pairs"][0]["stop"]["alpha"] == pytest.approx(0.05 / 3)


def test_without_votes_nothing_is_said(store):
    answers(store, "one", {"a": "x", "b": "y"})
    assert summarise_votes(read_ballots(store.at())) is None
