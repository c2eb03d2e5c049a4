"""The sandbox's exchanges: seeded, many, scored as they should be by the voice of the shop."""

import random
import statistics

import pytest

from reward.voice.scorer import load_voice
from rlhf.data.records import prompt_group
from rlhf.sandbox import SHOP_VOICE, phrases
from rlhf.sandbox.corpus import (
    FAULTS,
    answer,
    draw_answer,
    draw_case,
    draw_cases,
    draw_faults,
    make_world,
)

VOICE = load_voice(SHOP_VOICE)


@pytest.fixture
def world():
    return make_world(0, n_items=40, n_intents=12)


def gold(world, faults, n=150):
    rng = random.Random(1)
    scores = []
    for _ in range(n):
        case = draw_case(world, rng)
        scores.append(VOICE.score(answer(world, case, faults, rng), case.metadata)["total"])
    return scores


def test_the_voice_knows_the_goods_and_remedies_of_every_world():
    assert set(VOICE.facts["item"].choices) == set(phrases.ITEMS)
    assert (
        set(VOICE.facts["remedy"].phrasings)
        == set(phrases.REMEDIES)
        == {r for r, *_ in phrases.INTENTS.values()}
    )


def test_every_on_brand_answer_has_the_full_mark():
    world = make_world(3, len(phrases.ITEMS), len(phrases.INTENTS))
    assert min(gold(world, (), n=600)) == pytest.approx(1.0)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_costs_more_than_a_tenth_each_time_and_a_quarter_on_average(world, fault):
    scores = gold(world, (fault,))
    assert max(scores) < 0.9
    assert statistics.mean(scores) < 0.75


def test_each_fault_is_seen_by_its_part(world):
    part = {
        "rude": "avoid",
        "slang": "avoid",
        "cold": "use",
        "no_greeting": "greeting",
        "no_closing": "closing",
    }
    part |= {
        "promise": "claims",
        "rambling": "length",
        "wrong_item": "task/item",
        "wrong_remedy": "task/remedy",
    }
    part |= {"no_job": "task/item"}
    rng = random.Random(2)
    for fault in FAULTS:
        case = draw_case(world, rng)
        scores = VOICE.score(answer(world, case, (fault,), rng), case.metadata)
        assert scores[part[fault]] < 1.0, fault


def test_same_seed_same_world_and_texts_other_seed_others():
    def texts(seed):
        world, rng = make_world(seed, 20, 8), random.Random(f"x {seed}")
        return [draw_answer(world, draw_case(world, rng), 0.5, rng) for _ in range(50)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert make_world(1, 20, 8) != make_world(2, 20, 8)


def test_there_are_far_more_prompts_than_any_run_needs(world):
    # 12 intents x 6 phrasings x 7 leads x 7 tails x 40 goods x 12 colours
    assert world.distinct_prompts == 12 * 6 * 7 * 7 * 40 * 12


def test_drawn_prompts_are_distinct_and_their_group_is_the_records(world):
    keep = draw_cases(world, random.Random(0), lambda group: group[0] in "01234567")
    cases = [next(keep) for _ in range(500)]
    assert len({c.group for c in cases}) == 500
    assert all(c.group[0] in "01234567" and c.group == prompt_group(c.messages) for c in cases)


def test_faults_of_one_answer_can_stand_together():
    rng = random.Random(0)
    drawn = [draw_faults(rng) for _ in range(2000)]
    assert {len(f) for f in drawn} == {1, 2, 3}
    assert {f for fs in drawn for f in fs} == set(FAULTS)
    for pair in ({"rude", "slang"}, {"promise", "rambling"}, {"no_job", "wrong_item"}):
        assert not any(pair <= set(f) for f in drawn)


def test_share_of_off_brand_answers_is_the_option(world):
    rng = random.Random(0)
    faulty = sum(bool(draw_answer(world, draw_case(world, rng), 0.3, rng)[1]) for _ in range(3000))
    assert faulty / 3000 == pytest.approx(0.3, abs=0.03)  # 3.6 standard errors


def test_texts_are_short(world):
    rng = random.Random(0)
    lengths = []
    for _ in range(500):
        case = draw_case(world, rng)
        lengths.append(len(draw_answer(world, case, 0.7, rng)[0].split()))
        assert len(case.text.split()) <= 22
    assert max(lengths) <= 40
