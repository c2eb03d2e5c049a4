"""Gates and verdicts on numbers worked by hand."""

import itertools
import math

import pytest

from rlhf.brand.answers import (
    Scored,
    expected_largest,
    measure_answers,
    memorised,
    refusal_pattern,
    scored_answers,
)
from rlhf.brand.gates import (
    KINDS,
    Gates,
    Measured,
    difference_of_shares,
    gate,
    groups_needed,
    judge,
    least_increase_shown,
    mean_of_groups,
    ratio_of_groups,
    read_gates,
    status_of,
)
from rlhf.brand.measure import CHOICES, choices_of, chosen_rightly, forgotten
from rlhf.brand.verdict import check_line, decide, is_stopped_early, preference
from rlhf.compare.text_metrics import TextLoss
from rlhf.data.records import Scores
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.voting.ballots import Ballots, Item

# an interval of each gate that keeps its default bound, one that breaks it, one that holds it
PASS = {
    "score_gain": (0.06, 0.2),
    "preference": (0.51, 0.7),
    "facts": (-0.05, 0.1),
    "perplexity": (0.9, 1.1),
    "task": (-0.02, 0.0),
    "memorised": (-0.1, 0.05),
    "refusals": (0.0, 0.05),
    "length": (0.7, 1.5),
}
BREAK = {
    "score_gain": (-0.1, 0.05),
    "preference": (0.3, 0.5),
    "facts": (-0.2, -0.06),
    "perplexity": (1.11, 1.2),
    "task": (-0.3, -0.06),
    "memorised": (0.06, 0.2),
    "refusals": (0.06, 0.1),
    "length": (0.2, 0.6),
}
HOLD = {
    "score_gain": (0.04, 0.2),
    "preference": (0.49, 0.7),
    "facts": (-0.06, 0.1),
    "perplexity": (0.9, 1.11),
    "task": (-0.06, 0.0),
    "memorised": (-0.1, 0.06),
    "refusals": (0.0, 0.06),
    "length": (0.7, 1.6),
}


def measured(ends, groups=20):
    return Measured(sum(ends) / 2, *ends, groups)


def verdict_of(changed=(), **bounds):
    found = {name: measured(ends) for name, ends in PASS.items()} | dict(changed)
    return decide(judge(found, read_gates(bounds)), "human")


def test_it_ships_where_every_gate_passes():
    found = verdict_of()
    assert found["ship"] and found["verdict"] == "SHIP, by votes of people."
    assert [row["status"] for row in found["gates"]] == ["passed"] * len(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_each_gate_alone_keeps_it_from_shipping(name):
    for ends, status in ((BREAK, "failed"), (HOLD, "not shown")):
        found = verdict_of({name: measured(ends[name])})
        assert not found["ship"] and found["verdict"] == "DO NOT SHIP, by votes of people."
        statuses = {row["name"]: row["status"] for row in found["gates"]}
        assert statuses.pop(name) == status and set(statuses.values()) == {"passed"}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_not_measured_is_not_shown_unless_it_is_turned_off(name):
    missing = {name: None}
    assert not verdict_of(missing)["ship"]
    found = verdict_of(missing, **{name: None})
    assert found["ship"]
    assert next(row for row in found["gates"] if row["name"] == name)["status"] == "off"


def test_what_does_not_apply_does_not_block_and_says_why():
    found = verdict_of({"facts": Measured(why="the voice names no facts")})
    row = next(row for row in found["gates"] if row["name"] == "facts")
    assert found["ship"] and row["status"] == "not applicable"
    assert row["sentence"].endswith("does not apply, since the voice names no facts.")
    assert row["estimate"] is None


def test_nothing_ships_without_a_gate_that_passed():
    assert not verdict_of(**dict.fromkeys(KINDS, None))["ship"]


def test_a_length_that_is_too_long_or_too_short_fails():
    # 1 / 1.5 = 0.667
    assert status_of(measured((1.6, 2.0)), "within", 1.5) == "failed"
    assert status_of(measured((0.66, 1.0)), "within", 1.5) == "not shown"
    assert status_of(measured((0.667, 1.0)), "within", 1.5) == "passed"


def test_few_groups_and_intervals_that_are_missing_show_nothing():
    assert status_of(measured((0.9, 1.0), groups=4), "above", 0.5) == "not shown"
    assert status_of(measured((0.9, 1.0), groups=5), "above", 0.5) == "passed"
    assert status_of(Measured(0.9, groups=20), "above", 0.5) == "not shown"


@pytest.mark.parametrize(
    "source, line",
    [
        ("simulated", "SHIP, by simulated votes: no person has judged these answers."),
        ("judge", "SHIP, by votes of a judge: no person has judged these answers."),
        ("mixed", "SHIP, by votes of people and of programs, mixed."),
        (None, "SHIP, without votes."),
    ],
)
def test_the_first_line_says_whose_votes_it_rests_on(source, line):
    gates = judge({name: measured(ends) for name, ends in PASS.items()}, Gates())
    assert decide(gates, source)["verdict"] == line


def test_a_gate_is_one_sentence_with_interval_and_bound():
    found = gate("score_gain", measured((0.06, 0.2)), 0.05)
    assert found.sentence == (
        "Gain in the voice's score over the base: 0.13 [0.06, 0.2]; above 0.05 is shown."
    )


def test_bounds_are_checked_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"gates: unknown key 'perplexty'\. Did you mean 'perplexity'"
    ):
        read_gates({"perplexty": 1.2})
    with pytest.raises(UserError, match=r"gates.length: .*1"):
        read_gates({"length": 0.5})


def test_the_mean_is_of_groups_with_students_interval():
    # groups 0, 1, 2, 3, 4 (the last by 3 and 5): se = sqrt(2.5 / 5), t(4) = 2.776445
    found = mean_of_groups([("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 3), ("e", 5)])
    half = 2.776445 * math.sqrt(0.5)
    assert (found.estimate, found.groups) == (2.0, 5)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_a_ratio_is_of_sums():
    # 6 / 4; without one of the two equal groups it stays 1.5, so the interval has no width
    found = ratio_of_groups([3, 3], [2, 2])
    assert (found.estimate, found.low, found.high) == (1.5, 1.5, 1.5)
    assert ratio_of_groups([1, 3], [1, 1]).estimate == 2.0
    assert math.isnan(ratio_of_groups([], []).estimate)


def scored(group, text, score=0.5, facts=True, prompt=0):
    return Scored(group, prompt, text, score, facts, [{"role": "user", "content": "?"}])


def test_answers_are_compared_by_group():
    base = [scored("a", "one two", 0.2, False), scored("b", "one two", 0.4, True)]
    run = [
        scored("a", "one two three", 0.5, True),
        scored("b", "I can't help with that", 0.4, True),
    ]
    found = measure_answers(base, run)
    # (0.3 + 0) / 2, (1 + 0) / 2, (3 + 5) / (2 + 2), one of two where the base has none
    assert found["score_gain"].estimate == pytest.approx(0.15)
    assert found["facts"].estimate == 0.5
    assert found["length"].estimate == 2.0
    assert found["refusals"].estimate == 0.5


def test_answers_of_a_store_are_scored_with_their_facts(tmp_path):
    with Store.open(tmp_path / "ab.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "?"}], metadata={"item": "mug"})
        for model in ("base", "dpo"):
            # both give the same answer: no pair, and yet an answer of each
            store.add_response(prompt, "a mug", model=model, ended=False)
        store.add_response(prompt, "a jug", model="dpo", ended=True)
        view = store.at()

        def scorer(samples):
            assert samples.ended == [False, False, True]
            assert [own["item"] for own in samples.metadata] == ["mug"] * 3
            parts = {"voice/use": [0.0] * 3, "voice/task/item": [1.0, 1.0, 1.0]}
            parts["voice/task/remedy"] = [1.0, math.nan, 0.5]
            return Scores([0.1, 0.2, 0.3], parts)

        found = scored_answers(view.answers(), scorer)
    assert list(found) == ["base", "dpo"]
    assert [(own.text, own.score, own.facts) for own in found["base"]] == [("a mug", 0.1, True)]
    # a fact that the prompt does not have is left out; one of two that is wrong is not all right
    assert [own.facts for own in found["dpo"]] == [True, False]
    assert len({own.group for own in itertools.chain(*found.values())}) == 1


def test_facts_do_not_apply_to_a_voice_without_them():
    answers = [scored("a", "x", facts=None)]
    assert measure_answers(answers, answers)["facts"].why


def test_no_refusal_among_some_answers_leaves_room_for_one():
    # neither refuses: d = 0, and the ends are Wilson's upper ones of 0 of 20, t^2 / (20 + t^2), t(19) = 2.093
    answers = [scored(str(number), "we send it") for number in range(20)]
    found = measure_answers(answers, answers)["refusals"]
    end = 2.093024**2 / (20 + 2.093024**2)
    assert (found.low, found.estimate, found.high) == pytest.approx((-end, 0, end), abs=1e-5)


def test_an_adapter_refuses_more_or_less_than_its_base():
    # base 2 of 20, adapter 1 of 20. The jackknife's se^2 is p (1 - p) / 19, so N = 19 and s = t^2 / 19 = 0.230564.
    # Wilson: (p + s/2 -+ sqrt(s p (1 - p) + s^2/4)) / (1 + s):
    # 0.1:  (0.215282 -+ 0.184503) / 1.230564 = 0.025012, 0.324880
    # 0.05: (0.165282 -+ 0.155697) / 1.230564 = 0.007789, 0.260838
    # the one group is among the two: covariance 1/20 - 0.1 x 0.05 - 1/40 = 0.02,
    # c = 0.02 / sqrt(0.1 x 0.9 x 0.05 x 0.95) = 0.305888
    means = {str(number): (float(number < 2), float(number == 0)) for number in range(20)}
    found = difference_of_shares(means)
    x, y, c = 0.05 - 0.007789, 0.324880 - 0.1, 0.305888
    low = -0.05 - math.sqrt(x**2 - 2 * c * x * y + y**2)
    x, y = 0.260838 - 0.05, 0.1 - 0.025012
    high = -0.05 + math.sqrt(x**2 - 2 * c * x * y + y**2)
    assert (found.low, found.estimate, found.high) == pytest.approx((low, -0.05, high), abs=1e-5)
    assert found.groups == 20


def test_who_refuses_on_other_prompts_than_the_base_has_the_wider_interval():
    # 10 of 20 each. The same ten: covariance 1/4 - 1/40, c = 0.9; the other ten: c = -1, no correction.
    # Wilson of 0.5 with s = 0.230564: 0.5 -+ 0.216429, so x = y and the width is x sqrt(2 - 2 c)
    same = {str(number): (float(number < 10), float(number < 10)) for number in range(20)}
    other = {str(number): (float(number < 10), float(number >= 10)) for number in range(20)}
    assert difference_of_shares(same).high == pytest.approx(0.216429 * math.sqrt(0.2), abs=1e-5)
    assert difference_of_shares(other).high == pytest.approx(0.216429 * 2, abs=1e-5)


def test_the_refusals_gate_needs_76_groups():
    # t^2 / (n + t^2) <= 0.05, so n >= 19 t^2: t(75) = 1.992102 gives 75.40, and 76 is enough;
    # t(74) = 1.992543 gives 75.44, and 75 is not
    assert groups_needed(0.05) == 76
    assert least_increase_shown(76) == pytest.approx(1.992102**2 / (76 + 1.992102**2), abs=1e-6)
    assert least_increase_shown(75) > 0.05
    # with 22 test prompts 0.164 is the least: no adapter could pass
    assert least_increase_shown(22) == pytest.approx(0.164, abs=5e-4)
    assert math.isinf(least_increase_shown(4)) and groups_needed(0) is None


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no parcel.", True),
        ("I don't have access to your order.", True),
        ("I am unable to say.", True),
        ("We are sorry about the mug. We will send a new one.", False),
        ("You cannot wash it, but soapy water helps.", False),
        ("Nein, das geht nicht.", True),
    ],
)
def test_refusals(text, refuses):
    assert bool(refusal_pattern(["das geht nicht"]).search(text)) is refuses


def test_the_expected_largest_is_the_mean_over_all_subsets():
    values, count = [0.9, 0.5, 0.5, 0.1], 6
    everything = [*values, 0.0, 0.0]
    for size in range(1, count + 1):
        largest = [max(own) for own in itertools.combinations(everything, size)]
        assert expected_largest(values, count, size) == pytest.approx(sum(largest) / len(largest))
    assert expected_largest([], 4, 2) == 0


def test_copies_of_training_answers_count_beyond_those_of_held_out_ones():
    # nine words: two runs of eight
    trained = "the red mug is on its way to you"
    held_out = "we are so sorry about the mug my friend"
    style = "the blue jug is on its way to you"
    run = [scored(str(number), trained) for number in range(6)]
    assert memorised(run, [trained], [held_out]).estimate == 1.0
    assert memorised(run, [trained], [trained]).estimate == 0.0
    assert memorised(run, [held_out], [trained]).estimate == -1.0
    # of two trained answers one is drawn: half of the time the copied one
    assert memorised(run, [trained, style], [held_out]).estimate == 0.5
    assert memorised(run, [trained], []).why and memorised(run, [], [trained]).why


def test_perplexity_and_task():
    texts = [
        {"group": "a", "tokens": 10, "base": 5.0, "run": 6.0},
        {"group": "b", "tokens": 10, "base": 5.0, "run": 6.0},
    ]
    task = [
        {"group": "a", "base": True, "run": False},
        {"group": "b", "base": False, "run": False},
    ]
    found = forgotten({"texts": texts, "task": task})
    # exp(2 / 20)
    assert found["perplexity"].estimate == pytest.approx(math.exp(0.1))
    assert found["perplexity"].low == pytest.approx(math.exp(0.1))
    assert found["task"].estimate == -0.5
    assert forgotten({"texts": [], "task": []}) == {}


def test_a_question_is_right_where_its_answer_is_the_likeliest_per_token():
    rows = [{"prompt_ids": [1], "response_ids": [n], "group": str(n)} for n in range(5)]
    questions = choices_of(rows, seed=0)
    assert len(questions) == CHOICES * 5
    for place, row in enumerate(rows):
        own = questions[CHOICES * place : CHOICES * (place + 1)]
        assert own[0] == row
        answers = [tuple(one["response_ids"]) for one in own]
        assert len(set(answers)) == CHOICES

    def losses(*pairs):
        return [TextLoss("g", nll, tokens) for nll, tokens in pairs]

    # 3 / 3 = 1 is below 2 / 1; a tie is wrong
    assert chosen_rightly(losses((3, 3), (2, 1), (2, 1), (9, 1))) == [True]
    assert chosen_rightly(losses((2, 1), (2, 1), (3, 1), (9, 1))) == [False]
    with pytest.raises(UserError, match="2 different answers, expected at least 4"):
        choices_of(rows[:2], seed=0)


def votes(one, other, estimate=0.3, low=0.2, high=0.4):
    rate = {"estimate": estimate, "low": low, "high": high, "groups": 9}
    stop = {"low": 0.1, "high": 0.6, "groups": 4}
    return {"source": "human", "pairs": [{"one": one, "other": other, "rate": rate, "stop": stop}]}


def test_the_preference_is_the_adapters_whichever_the_store_met_first():
    names = "runs/base", "runs/dpo"
    assert preference(votes("dpo", "base"), *names) == Measured(0.3, 0.2, 0.4, 9)
    found = preference(votes("base", "dpo"), *names)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.7, 0.6, 0.8))
    assert math.isnan(preference(None, *names).estimate)
    assert math.isnan(preference(votes("base", "dpo", low=None, high=None), *names).low)


def test_votes_that_were_read_early_have_the_interval_that_may_be_read_at_any_time():
    found = preference(votes("dpo", "base"), "runs/base", "runs/dpo", stopped_early=True)
    assert found == Measured(0.3, 0.1, 0.6, 4)
    found = preference(votes("base", "dpo"), "runs/base", "runs/dpo", stopped_early=True)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.7, 0.4, 0.9))


@pytest.mark.parametrize(
    "source, shares, equal, early",
    [
        ("human", {"ann": 1.0}, False, True),
        ("human", {"ann": 1.0, "bob": 0.0}, False, False),
        ("human", {}, True, False),
        ("simulated", {"ann": 1.0}, False, False),
    ],
)
def test_votes_are_read_early_where_people_have_not_judged_all(source, shares, equal, early):
    names = ["ann", "bob"]
    item = Item("g", shares, equal=equal)
    ballots = Ballots(["a", "b"], names, {("a", "b"): [item]}, dict.fromkeys(names, source), 1)
    assert is_stopped_early(ballots, overlap=2) is early


def test_a_check_says_who_checked():
    check = {"source": "simulated", "pairs": 40, "agreed": 5, "turned": 2, "not judged": 33}
    assert check_line(check) == (
        "Training pairs were checked by simulated votes: of 7 judged pairs 5 were kept as the voice has them, "
        "2 turned, 0 left out; 33 were not judged."
    )
