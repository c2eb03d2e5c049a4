import random

import pytest

from rlhf.data.prepare.duplicates import (
    bands,
    contained_texts,
    contradictions,
    exact_duplicates,
    has_identical_answers,
    jaccard,
    near_duplicates,
    shingles,
    similar_prompts,
    similar_texts,
)
from rlhf.data.records import Labelled, Preference

LONG = "The parcel left our warehouse on Monday morning and should reach you within three working days, "
LAMP = "The lamp has a cable of two metres, a switch at the plug and a bulb that lasts for many years, "


def pair(prompt="Where is my parcel?", chosen=LONG, rejected=LAMP, **more):
    return Preference(
        prompt=[{"role": "user", "content": prompt}], chosen=chosen, rejected=rejected, **more
    )


def test_shingles_and_jaccard_by_hand():
    # "abcdef" has abcd, bcde, cdef; "abcdeg" has abcd, bcde, cdeg: two of four
    assert shingles("ABCDEF") == {"abcd", "bcde", "cdef"}
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == pytest.approx(1 / 2)
    assert shingles("ab") == {"ab"} and jaccard(shingles("Ab "), shingles("ab")) == 1.0


def test_identical_answers():
    assert not has_identical_answers(pair())
    assert has_identical_answers(pair(chosen="a  b", rejected="a b\n"))


def test_exact_duplicates_keep_the_first_and_what_differs_in_more_than_space():
    rows = [
        pair(),
        pair(chosen=f"{LONG} \n"),
        pair(voice="v"),
        pair(chosen=LONG.upper()),
        pair(annotator="ann"),
    ]
    found = exact_duplicates(rows)
    assert found.drop == [1] and found.examples == [(1, 0)]


def test_contradictions_go_both_but_not_those_of_different_annotators():
    turned = {"chosen": LAMP, "rejected": LONG}
    assert contradictions([pair(), pair("other", **turned), pair(**turned)]).drop == [0, 2]
    assert contradictions([pair(annotator="ann"), pair(annotator="bob", **turned)]).drop == []
    assert contradictions([pair(annotator="ann"), pair(annotator="ann", **turned)]).drop == [0, 1]
    assert contradictions([pair(annotator="ann"), pair(**turned)]).drop == [0, 1]


def test_who_contradicts_nobody_keeps_their_rows():
    turned = {"chosen": LAMP, "rejected": LONG}
    rows = [
        pair(annotator="ann"),
        pair(annotator="bob"),
        pair(annotator="ann", **turned),
        pair(annotator="cem", **turned),
    ]
    found = contradictions(rows)
    assert found.drop == [0, 2] and found.examples == [(0, 2)]


def test_labelled_rows_contradict_where_one_answer_is_good_and_bad():
    hi = [{"role": "user", "content": "Hi"}]
    rows = [Labelled(prompt=hi, response="Hello", label=label) for label in (True, False, True)]
    assert (
        contradictions([*rows[:2]]).drop == [0, 1] and contradictions([rows[0], rows[2]]).drop == []
    )
    assert exact_duplicates(rows).drop == [2]


def near(text):
    """One word of about sixteen exchanged: similarity above 0.8."""
    return text.replace("many", "some").replace("three", "these")


def test_near_duplicates_and_near_contradictions():
    rows = [
        pair(),
        pair(chosen=near(LONG), rejected=near(LAMP)),  # as row 0
        pair("Where is my order, please?"),  # the same answers, another question
        pair(
            "Which lamp?",
            "Completely different words stand in this answer",
            "and in this one too, no doubt",
        ),
        pair(
            "Which lamp?",
            "and in this one too, no doubt!",
            "Completely different words stand in this answers",
        ),
        pair(chosen=near(LONG), rejected=near(LAMP), voice="v"),
    ]
    repeats, opposites = near_duplicates(rows, 0.8)
    assert repeats.drop == [1] and repeats.examples == [(1, 0)]
    assert opposites.drop == [3, 4] and opposites.examples == [(4, 3)]


def test_opposite_answers_to_questions_in_other_words_contradict_nothing():
    asked = "Does the shop that we talked about yesterday sell {} of good quality, and can I bring it back?"
    turned = {"chosen": LAMP, "rejected": LONG}
    rows = [pair(asked.format("cats")), pair(asked.format("dogs"), **turned)]
    assert jaccard(shingles(asked.format("cats")), shingles(asked.format("dogs"))) > 0.7
    assert near_duplicates(rows, 0.7)[1].drop == []
    rows = [pair(asked.format("cats")), pair(asked.format("cats") + "!", **turned)]
    assert near_duplicates(rows, 0.7)[1].drop == [0, 1]
    hi = [[{"role": "user", "content": asked.format(what)}] for what in ("cats", "dogs")]
    rows = [
        Labelled(prompt=prompt, response="Yes", label=label)
        for prompt, label in zip(hi, (True, False), strict=True)
    ]
    assert near_duplicates(rows, 0.7)[1].drop == [] == near_duplicates(rows, 0.7)[0].drop


def test_all_of_a_contradiction_goes_in_whatever_order_it_stands():
    rows = [pair(), pair(chosen=near(LAMP), rejected=near(LONG)), pair(chosen=near(LONG))]
    repeats, opposites = near_duplicates(rows, 0.8)
    assert (repeats.drop, opposites.drop) == ([], [0, 1, 2])
    repeats, opposites = near_duplicates([rows[0], rows[2], rows[1]], 0.8)
    assert (repeats.drop, opposites.drop) == ([1], [0, 2])


def test_a_ranking_of_similar_answers_is_neither_a_contradiction_nor_a_repeat():
    first, second, third = LONG, near(LONG), LONG.replace("Monday", "Sunday")
    ranked = [
        pair(chosen=a, rejected=b) for a, b in ((first, second), (second, third), (first, third))
    ]
    assert [found.drop for found in near_duplicates(ranked, 0.7)] == [[], []]
    # first > second > third, where the first and the third begin alike
    begin = "We are sorry to hear it, and thank you for the photographs that you have sent to us today. We have looked "
    begin += "at them closely, and the box was damaged on the way to you. "
    ends = ("A new one is coming soon.", "You get your money back.")
    assert 0.7 < jaccard(*(shingles(begin + end) for end in ends)) < 0.8
    ranked = [
        pair(chosen=begin + ends[0], rejected=LAMP),
        pair(chosen=LAMP, rejected=begin + ends[1]),
    ]
    assert [found.drop for found in near_duplicates(ranked, 0.7)] == [[], []]
    turned = [
        pair(chosen=begin + ends[0], rejected=LAMP),
        pair(chosen=LAMP, rejected=begin + ends[0] + " "),
    ]
    assert near_duplicates([turned[0], pair(chosen=LAMP, rejected=f"{begin}{ends[0]}!")], 0.7)[
        1
    ].drop == [0, 1]


def test_case_may_be_the_task():
    assert near_duplicates([pair(), pair(chosen=LONG.upper())], 0.7)[0].drop == []
    asked = ("Write this in capitals: {}", "Write this in Capitals: {}")
    rows = [
        pair(a.format(LAMP), c, r)
        for a, c, r in zip(asked, (LONG.upper(), LAMP), (LAMP, LONG), strict=True)
    ]
    assert [found.drop for found in near_duplicates(rows, 0.7)] == [[], []]


def test_texts_inside_anothers_prompt():
    question = "How do I return the blue chair to the shop that I bought it in?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": LONG}]
    rows = [
        pair(question, "x", "y"),
        pair("Which one?", LONG, "y"),
        Preference(
            prompt=[*turns, {"role": "user", "content": "Thanks"}], chosen="x", rejected="y"
        ),
        pair(
            "A customer writes: HOW do I return the blue chair to the shop that I bought it in? Answer.",
            "x",
            "y",
        ),
        pair("Thanks", "x", "y"),  # too short to mean the same
    ]
    # row 2 holds the question (0) and the answer (1), row 3 the question of 0 and of 2, row 0 that
    # of 2
    assert contained_texts(rows) == [(0, 2), (0, 3), (1, 2), (2, 0), (2, 3)]


def test_bands_follow_the_threshold():
    # rows of a band r: missed (1 - s^r)^(120 / r); at 0.7 with 5 once in 84, at 0.5 with 4 (0.14)
    # too often, 3 is 0.005
    assert [bands(s) for s in (0.9, 0.7, 0.6, 0.5, 0.4, 0.3)] == [24, 24, 40, 40, 60, 60]
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(200)]
    # 39 of 75 shingles: 0.52
    twins = [text[:42] + "".join(rng.choices("0123456789", k=18)) for text in texts]
    assert len(similar_texts(twins, texts, 0.5)) >= 197


def test_other_numbers_are_another_question():
    rows = [
        pair(f"Convert the number {n} from decimal to binary, please.", LONG, LAMP)
        for n in (10, 11)
    ]
    assert near_duplicates(rows, 0.7)[0].drop == [] and len(similar_prompts(rows, 0.7)) == 1


def test_the_threshold_is_the_jaccard_index_of_every_part():
    one, other = pair(), pair(chosen=near(LONG))
    exact = jaccard(shingles(LONG), shingles(near(LONG)))
    assert near_duplicates([one, other], exact - 1e-6)[0].drop == [1]
    assert near_duplicates([one, other], exact + 1e-6)[0].drop == []


def test_minhash_misses_no_near_duplicate():
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(400)
    ]

    def text():
        return " ".join(rng.choices(words, k=40)) + " many three"

    rows = [pair(text(), text(), text()) for _ in range(300)]
    twins = [pair(near(r.prompt[0]["content"]), near(r.chosen), near(r.rejected)) for r in rows]
    repeats, opposites = near_duplicates(rows + twins, 0.8)
    assert repeats.drop == list(range(300, 600)) and opposites.drop == []


def test_similar_prompts_by_hand():
    rows = [
        pair(f"How do I return the blue {c} to the shop that I bought it in?")
        for c in ("chair", "chairs")
    ]
    rows += [
        pair("how do I return the  blue chair to the shop that I bought it in?"),
        pair("What is the capital of France?"),
    ]
    assert similar_prompts(rows, 0.8) == [(1, 0)]  # the third is the first, normalised
