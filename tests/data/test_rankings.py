"""Orders of more than two answers, and marked passages, in the store."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from rlhf.data.agreement import FEWEST as FEWEST_VOTES
from rlhf.data.agreement import agreement_summary
from rlhf.data.alpha import alpha_interval, clusters_of, ratings_of
from rlhf.data.annotator_report import annotators_markdown, view_summary
from rlhf.data.load import load
from rlhf.data.rankings import kendall_tau, order_of_places, pair_weight, tau_summary
from rlhf.data.records import Preference
from rlhf.data.spans import checked
from rlhf.data.store import Store
from rlhf.data.votes import Vote, by_skill, skills
from rlhf.errors import UserError
from rlhf.offline.pair_columns import add_columns
from rlhf.voting.ballots import read_ballots
from rlhf.voting.rates import summarise_votes
from tests.data.test_store import pair, user


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        yield opened


def four(store, prompt="Hi", texts="wxyz", models=None):
    """A prompt with four answers; their ids and the ranking's."""
    id = store.add_prompt(user(prompt))
    models = models or [None] * len(texts)
    ids = [
        store.add_response(id, text, model=model) for text, model in zip(texts, models, strict=True)
    ]
    return ids, store.add_ranking(ids)


def test_an_order_is_one_event_and_says_something_of_every_pair(store):
    (w, x, y, z), ranking = four(store)
    ann = store.add_annotator("ann")
    event = store.rank(ranking, ann, [[y], [z, w], [x]], shown=[z, y, x, w], reason="r", tags=["t"])
    view = store.at()
    assert view.event == event == 1
    (ranked,) = view.ranked()
    assert ranked.order == [[y], [w, z], [x]] and ranked.shown == [z, y, x, w]
    votes = {}
    for vote in view.votes():
        found = view.pair(vote.comparison)
        votes[found["text_a"] + found["text_b"]] = vote.choice
    assert votes == {"wx": "a", "wy": "b", "wz": "tie", "xy": "b", "xz": "b", "yz": "a"}
    # k (k - 1) / 2 pairs, less the one that is a tie
    rows = view.rows()
    assert sorted(r["chosen"] + r["rejected"] for r in rows) == ["wx", "yw", "yx", "yz", "zx"]
    assert {r["metadata"]["vote"]["ranking"] for r in rows} == {ranking}
    assert {r["annotator"] for r in rows} == {"ann"} and len(view.rows(keep_ties=True)) == 6
    assert store.at(0).rows() == [] and store.at(0).ranked() == []
    stats = view.stats()
    assert (stats["votes"], stats["ranked"], stats["rankings"], stats["comparisons"]) == (
        1,
        1,
        1,
        0,
    )
    assert stats["by_annotator"] == {"ann": 1} and stats["normal_choices"]["a"] == 2


def test_an_order_is_undone_as_a_whole_and_stands_once(store):
    (w, x, y, z), ranking = four(store)
    ann, bob = store.add_annotator("ann"), store.add_annotator("bob")
    order = [[w], [x], [y], [z]]
    event = store.rank(ranking, ann, order, request="k")
    assert store.rank(ranking, ann, [[z], [y], [x], [w]], request="k") == event
    with pytest.raises(UserError, match="has judged ranking 1, or a pair of it, already"):
        store.rank(ranking, ann, order)
    # nor on a pair of it, and the other way round
    comparison = store.at().votes()[0].comparison
    with pytest.raises(UserError, match="has voted on comparison"):
        store.vote(comparison, ann, "b")
    store.vote(comparison, bob, "b")
    with pytest.raises(UserError, match="has judged ranking"):
        store.rank(ranking, bob, order)
    assert len(store.at().votes()) == 7
    store.undo(event)
    assert {vote.annotator for vote in store.at().votes()} == {"bob"}
    assert store.at().stats()["undone"] == 1 and len(store.at(event).votes()) == 6
    store.exclude("bob")
    assert store.at().votes() == []
    skipped = store.rank(ranking, ann, [])
    assert store.at().ranked()[0].order == []
    # of every pair, as who skips them one by one
    assert [vote.choice for vote in store.at().votes()] == ["skip"] * 6
    assert store.at().rows(keep_ties=True) == store.at().rows("majority", keep_ties=True) == []
    stats = store.at(skipped).stats()
    assert (stats["votes"], stats["ranked"], stats["choices"]["skip"]) == (1, 0, 1)


@pytest.mark.parametrize(
    "order", [[[1], [2], [3]], [[1, 2], [3, 4], [4]], [[1], [2], [3], [5]], [[1], [], [2, 3, 4]]]
)
def test_an_order_that_is_none_is_refused(store, order):
    _, ranking = four(store)
    with pytest.raises(UserError, match="expected each of"):
        store.rank(ranking, store.add_annotator("ann"), order)


def test_what_cannot_be_ranked_is_refused_whole(store):
    (w, x, y, z), ranking = four(store)
    assert store.add_ranking([z, w, y, x]) == ranking
    with pytest.raises(UserError, match="a ranking of 2 responses; expected 3 to 8"):
        store.add_ranking([w, x])
    with pytest.raises(UserError, match="compared already, as a pair or in another ranking"):
        store.add_ranking([w, x, y])
    ids, _ = four(store, "other")
    with pytest.raises(UserError, match="answer different prompts"):
        store.add_ranking([w, x, ids[0]])
    prompt = store.add_prompt(user("third"))
    same = [store.add_response(prompt, text, model=text) for text in ("a", "b", "a ")]
    with pytest.raises(UserError, match="are the same text"):
        store.add_ranking(same)
    assert store.last_comparison() == 12 and len(store.rankings_after(0)) == 2
    with pytest.raises(Exception, match="rankings are never changed"):
        store._db.execute("DELETE FROM rankings")
    with pytest.raises(UserError, match="there is no ranking 9"):
        store.rank(9, store.add_annotator("ann"), [[w]])


def test_places_become_an_order():
    assert order_of_places([7, 8, 9], [2, 1, 2]) == [[8], [7, 9]]
    # 1, 1, 3 as in sports
    assert order_of_places([9, 8, 7], [1, 3, 1]) == [[7, 9], [8]]


def test_tau_is_kendalls_and_counts_a_ranking_once():
    # 1 2 3 against 2 1 3: two of three pairs agree, (2 - 1) / 3
    one, other = {1: "a", 2: "a", 3: "a"}, {1: "b", 2: "a", 3: "a"}
    assert kendall_tau(one, other) == pytest.approx(1 / 3)
    # a tie of one: (2 - 0) / sqrt(2 * 3)
    assert kendall_tau({1: "tie", 2: "a", 3: "a"}, one) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(kendall_tau(dict.fromkeys(one, "tie"), one))
    votes = []
    for ranking, choices in ((1, one), (2, other)):
        for pair_id, choice in choices.items():
            for name, said in (("x", one[pair_id]), ("y", choice)):
                event = 2 * ranking + (name == "y")
                number = 10 * ranking + pair_id
                votes.append(Vote(event, number, name, said, ranking=ranking))
    found = tau_summary(votes)
    assert found["rankings"] == 2 and found["estimate"] == pytest.approx((1 + 1 / 3) / 2)
    # of two values the interval is wide, and inside of what tau can be
    assert -1 <= found["low"] < found["estimate"] < found["high"] <= 1
    assert math.isnan(tau_summary(votes[:6])["low"]) and tau_summary([])["rankings"] == 0


def test_tau_equals_scipys():
    from scipy.stats import kendalltau

    rng = random.Random(0)
    for _ in range(20):
        places = [[rng.randint(1, 3) for _ in range(5)] for _ in range(2)]
        choices = []
        for own in places:
            signs = {}
            for i, j in itertools.combinations(range(5), 2):
                signs[i * 5 + j] = "tie" if own[i] == own[j] else "ab"[own[i] > own[j]]
            choices.append(signs)
        expected = kendalltau(*places).statistic
        assert kendall_tau(*choices) == pytest.approx(expected, nan_ok=True)


def ranked_store(store, rankings=12):
    """Two annotators who order three answers each, the second one at random."""
    rng = random.Random(1)
    ann, bob = store.add_annotator("ann"), store.add_annotator("bob")
    for i in range(rankings):
        ids, ranking = four(store, f"q{i}", texts=["a", "b", "c"])
        store.rank(ranking, ann, [[id] for id in ids], duration_ms=500)
        store.rank(ranking, bob, [[id] for id in rng.sample(ids, 3)], duration_ms=90_000)


def test_statistics_take_a_ranking_for_one_answer(store):
    ranked_store(store)
    votes = store.at().votes()
    summary = view_summary(store.at())
    assert summary["votes"] == 24 and summary["pairs"] == 36
    ann, bob = summary["annotators"]
    assert ann["votes"] == bob["votes"] == 12
    assert ann["rest"]["n"] == 12 and ann["fast"]["n"] == 12 and ann["fast"]["count"] == 12
    assert bob["fast"]["count"] == 0 and bob["seconds"] == 90
    # the interval is that of twelve rankings, by hand: alpha without each of them in turn
    ratings = ratings_of(votes)
    clusters = clusters_of(votes)
    estimate, low, high = alpha_interval(ratings, "nominal", clusters)
    without = []
    for ranking in sorted(set(clusters.values())):
        kept = {item: values for item, values in ratings.items() if clusters[item] != ranking}
        without.append(alpha_interval(kept)[0])
    se = math.sqrt(11 / 12 * sum((value - np.mean(without)) ** 2 for value in without))
    assert summary["alpha"]["nominal"]["estimate"] == pytest.approx(estimate)
    naive = alpha_interval(ratings)
    assert naive[0] == pytest.approx(estimate) and (low, high) != pytest.approx(naive[1:])
    # t(11) = 2.201; the interval keeps within -1 and 1, so it is only near to this
    assert high - low == pytest.approx(2 * 2.201 * se, rel=0.2)
    text = "\n".join(annotators_markdown(summary))
    assert "Kendall's tau-b" in text and "over 12 rankings" in text
    assert "Kendall" not in "\n".join(annotators_markdown(agreement_summary([])))


def test_annotators_are_told_by_answers_and_skips_change_no_agreement(store):
    ranked_store(store)
    before = view_summary(store.at())
    ids, ranking = four(store, "more", texts=["a", "b", "c"])
    single = pair(store, "other", "one", "two")
    ann, bob = store.add_annotator("ann"), store.add_annotator("bob")
    store.rank(ranking, ann, [])
    store.rank(ranking, bob, [[id] for id in ids])
    store.vote(single, ann, "b")
    after = view_summary(store.at())
    # which of two answers is called a, as most pairs of an order would have it, tells nothing
    choices = {person["annotator"]: person["choices"] for person in after["annotators"]}
    assert choices == {"ann": {"rank": 12, "skip": 1, "b": 1}, "bob": {"rank": 13}}
    assert [person["votes"] for person in after["annotators"]] == [14, 13]
    assert after["alpha"] == before["alpha"] and after["tau"] == before["tau"]


def test_flags_wait_for_so_many_rankings(store):
    ranked_store(store, FEWEST_VOTES - 1)
    assert not any(person["flags"] for person in view_summary(store.at())["annotators"])


def test_pairs_of_a_ranking_have_the_weight_of_its_choices(store, tmp_path):
    (w, x, y, z), ranking = four(store)
    single = pair(store, "other", "one", "two")
    ann = store.add_annotator("ann")
    store.rank(ranking, ann, [[w], [x], [y], [z]])
    store.vote(single, ann, "a")
    rows = store.at().rows()
    weights = {row["metadata"]["vote"].get("ranking"): row.get("weight") for row in rows}
    # four answers: 2 / 4
    assert weights == {ranking: 0.5, None: None}
    # 3, 6 and 28 pairs count 2, 3 and 7
    for answers, pairs in ((3, 3), (4, 6), (8, 28)):
        assert pairs * pair_weight(answers) == pytest.approx(answers - 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in store.at().rows("majority")))
    found = load([str(path)], Preference)
    assert sorted({record.weight for record in found}) == [0.5, 1.0]
    # one group, so that no pair of the ranking is held out where another is learnt
    assert len({record.group for record in found}) == 2


def test_an_order_of_four_tells_skill_as_three_votes_do(store):
    _, ranking = four(store)
    ann, judge = store.add_annotator("ann"), store.add_annotator("judge", role="adjudicator")
    store.rank(ranking, ann, [[1], [2], [3], [4]])
    # the first of two is the better one each time
    for comparison in store.at().pairs():
        store.vote(comparison, judge, "a")
    # six pairs of weight 1/2, all right, and six earlier votes of which five were: 8 of 9
    confusion = skills(store.at().votes()).confusion["ann"]
    assert confusion[0].tolist() == pytest.approx([8 / 9, 1 / 9], abs=1e-12)
    # what one order says of a pair by itself is as likely as a vote on it, five in six
    other, _ = four(store, "more", "rst")
    bob = store.add_annotator("bob")
    store.rank(2, bob, [[id] for id in other])
    found = [v.label_prob for v in by_skill(store.at().votes()) if v.label_prob < 1]
    assert found == pytest.approx([5 / 6] * 3, abs=1e-6)


def test_a_vote_on_one_pair_of_a_ranking_leaves_its_weight(store):
    _, ranking = four(store)
    store.rank(ranking, store.add_annotator("ann"), [[1], [2], [3], [4]])
    store.vote(1, store.add_annotator("bob"), "a")
    votes = store.at().votes()
    found = [skills(given).confusion["bob"][0].tolist() for given in (votes, votes[::-1])]
    # whoever has voted first
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_weights_of_rankings_hold_beside_other_data(store, tmp_path):
    _, ranking = four(store)
    store.rank(ranking, store.add_annotator("ann"), [[1], [2], [3], [4]])
    alone = load([str(store.path)], Preference)
    rows = [{} for _ in alone]
    add_columns(rows, alone, ["weight"])
    # equal weights say nothing
    assert rows == [{}] * 6
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "chosen": "yes", "rejected": "no"}))
    mixed = load([str(store.path), str(path)], Preference)
    rows = [{} for _ in mixed]
    add_columns(rows, mixed, ["weight"])
    # six pairs that count three, and one: on average 4/7
    assert [row["weight"] for row in rows] == pytest.approx([7 / 8] * 6 + [7 / 4])


def test_prompts_whose_rankings_share_answers_are_one_group(store):
    rankings = [four(store, prompt)[1] for prompt in ("one", "two")]
    ann = store.add_annotator("ann")
    for number, ranking in enumerate(rankings):
        assert len({prompt.group for prompt in store.at().prompts()}) == 2
        first = 4 * number + 1
        store.rank(ranking, ann, [[id] for id in range(first, first + 4)])
    assert len({prompt.group for prompt in store.at().prompts()}) == 1


def test_rankings_of_policies_become_win_rates(store):
    models = ["runs/sft", "runs/dpo", "runs/ppo"]
    for i in range(6):
        ids, ranking = four(store, f"q{i}", "abc", models)
        for name in ("ann", "bob", "cem"):
            # ppo first, dpo and sft equally good
            store.rank(ranking, store.add_annotator(name), [[ids[2]], ids[:2]])
    found = summarise_votes(read_ballots(store.at()), overlap=3)
    rates = {(row["one"], row["other"]): row["rate"]["estimate"] for row in found["pairs"]}
    assert rates == {("sft", "dpo"): 0.5, ("sft", "ppo"): 0.0, ("dpo", "ppo"): 0.0}
    assert found["policies"][0]["policy"] == "ppo" and found["votes"] == 54


def test_passages_are_kept_with_their_text(store):
    number = pair(store, "Hi", "Hello ☂️ there!", "What?")
    ann = store.add_annotator("ann")
    spans = [
        {"answer": "b", "start": 0, "end": 4, "label": "bad", "remark": " rude\n"},
        {"answer": "a", "start": 6, "end": 8, "text": "☂️", "label": "good"},
    ]
    store.vote(number, ann, "a", spans=spans)
    (vote,) = store.at().votes()
    assert vote.spans == [
        {"answer": "a", "start": 6, "end": 8, "text": "☂️", "label": "good"},
        {"answer": "b", "start": 0, "end": 4, "text": "What", "label": "bad", "remark": "rude"},
    ]
    (row,) = store.at().rows()
    assert [span["answer"] for span in row["metadata"]["vote"]["spans"]] == ["chosen", "rejected"]
    assert row["chosen"][6:8] == "☂️"


def test_passages_stand_in_the_order_of_their_answers_whatever_ids_those_have():
    texts = {9: "nine", 10: "ten", 11: "eleven"}
    spans = [{"answer": id, "start": 0, "end": 1, "label": "good"} for id in (10, 11, 9)]
    assert [span["answer"] for span in checked(spans, texts)] == [9, 10, 11]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "c"}, "expected one of a, b"),
        ({"start": -1}, "expected places in an answer of 6 characters"),
        ({"end": 7}, "from 0 to 7"),
        ({"start": 5}, "from 5 to 5"),
        ({"end": True}, "expected places"),
        ({"text": "Hallo"}, "the answer says 'Hello' there, not 'Hallo'"),
        ({"label": "fine"}, "expected good or bad"),
    ],
)
def test_a_passage_that_is_not_there_is_refused(store, change, told):
    number = pair(store)
    span = {"answer": "a", "start": 0, "end": 5, "label": "good"} | change
    with pytest.raises(UserError, match=told):
        store.vote(number, store.add_annotator("ann"), "a", spans=[span])
    assert store.last_event() == 0


def test_passages_of_a_ranking_come_with_the_pairs_of_their_answer(store):
    (w, x, y, z), ranking = four(store)
    span = {"answer": x, "start": 0, "end": 1, "label": "bad", "remark": "no"}
    store.rank(ranking, store.add_annotator("ann"), [[w], [x], [y], [z]], spans=[span])
    rows = store.at().rows()
    marked = [row for row in rows if "spans" in row["metadata"]["vote"]]
    assert len(marked) == 3 and {"x"} == set.intersection(
        *({r["chosen"], r["rejected"]} for r in marked)
    )
    for row in marked:
        (found,) = row["metadata"]["vote"]["spans"]
        assert row[found["answer"]] == found["text"] == "x"
    with pytest.raises(UserError, match="span of answer 99"):
        store.rank(ranking, store.add_annotator("bob"), [], spans=[span | {"answer": 99}])


def test_the_fingerprint_tells_orders_and_passages_apart(tmp_path):
    found = set()
    order = [[1], [2], [3], [4]]
    span = [{"answer": 1, "start": 0, "end": 1, "label": "good"}]
    cases = [(order, ()), (order[::-1], ()), (order, span), (order, [span[0] | {"label": "bad"}])]
    for number, (placed, spans) in enumerate(cases):
        with Store.open(tmp_path / f"{number}.db", create=True) as store:
            store.clock = lambda: 1.7e9
            _, ranking = four(store)
            store.rank(ranking, store.add_annotator("ann"), placed, spans=spans)
            found.add(store.at().fingerprint())
    assert len(found) == 4
    # as the fourth version of the schema computed it, of a vote with its newest columns
    with Store.open(tmp_path / "fourth.db", create=True) as store:
        store.clock = lambda: 1.7e9
        prompt = store.add_prompt(user("Hi"))
        ids = [store.add_response(prompt, text) for text in ("One.", "Two.")]
        ann = store.add_annotator("ann")
        about = {"corrected": "Better.", "criteria": {"clear": {"a": 4}}}
        store.vote(store.add_comparison(*ids), ann, "a", **about)
        assert store.at().fingerprint() == "1bb4d5d89f3a07fe"
