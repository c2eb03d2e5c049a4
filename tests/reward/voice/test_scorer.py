"""The brand voice: parts worked by hand, and texts that try to win without saying anything."""

import math
import re
from pathlib import Path

import pytest

from reward.voice.form import within
from reward.voice.parts import AVOID_FACTOR, MISSING_FACT
from reward.voice.phrases import inflections, phrase_pattern
from reward.voice.scorer import FLOOR, geometric_mean, load_voice, voice_scorer
from reward.voice.words import voice_guide
from rlhf.data.records import Samples
from rlhf.errors import UserError
from rlhf.sandbox import SHOP_VOICE

VOICES = Path(__file__).parents[3] / "configs" / "voices"
GOOD = "Hello there, we are sorry about your kettle. We will gladly send a new one today. Warmly, Fernhill."
FACTS = {"item": "kettle", "remedy": "replace"}


@pytest.fixture
def shop():
    return load_voice(SHOP_VOICE)


def write(tmp_path, text):
    path = tmp_path / "brand.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_right_answer_has_the_full_mark(shop):
    scores = shop.score(GOOD, FACTS)
    assert scores == dict.fromkeys(scores, pytest.approx(1.0, abs=1e-12))
    assert set(scores) == {*shop.sections, "task/item", "task/remedy", "total"}


def test_total_is_the_weighted_geometric_mean():
    # (1/4)^(1/4) * 1^(3/4) = 0.707106781; a part at 0 counts as FLOOR: 0.01^(1/2) * 1^(1/2) = 0.1
    assert geometric_mean({"a": 0.25, "b": 1.0}, {"a": 1.0, "b": 3.0}) == pytest.approx(
        0.7071067812, abs=1e-9
    )
    assert FLOOR == 0.01
    assert geometric_mean({"a": 0.0, "b": 1.0}, {"a": 2.0, "b": 2.0}) == pytest.approx(
        0.1, abs=1e-12
    )


def test_one_missing_part_costs_its_weight_share(shop):
    # shop.yaml's weights sum to 1+1+1+1.5+1.2+0.7+0.7+0.5+1.1+1.3 = 10; without greeting:
    # 0.01^(1/10) = 0.630957344
    scores = shop.score(GOOD.replace("Hello there, we", "We"), FACTS)
    assert scores["greeting"] == 0.0
    assert scores["total"] == pytest.approx(0.6309573445, abs=1e-9)


def test_facts_that_the_metadata_lacks_are_left_out_and_the_rest_renormalised(shop):
    # 7.6 of weight remain; without greeting 0.01^(1/7.6) = 0.545559478
    scores = shop.score(GOOD.replace("Hello there, we", "We"), {"item": None})
    assert not any(name.startswith("task/") for name in scores)
    assert scores["total"] == pytest.approx(0.01 ** (1 / 7.6), abs=1e-9)


def test_facts_right_wrong_both_and_none(shop):
    def parts(text):
        return shop.score(text, FACTS)["task/item"], shop.score(text, FACTS)["task/remedy"]

    assert parts("A kettle: we replaced it.") == (1.0, 1.0)
    assert parts("A lamp: we refunded it.") == (0.0, 0.0)
    assert parts("The kettle, the lamp and the rug.") == (pytest.approx(1 / 3), MISSING_FACT)
    assert parts("Replacement or refund?") == (MISSING_FACT, 0.5)


def test_a_wrong_phrase_inside_the_right_one_is_not_wrong(tmp_path):
    # "size" is asked for; "size chart" contains "chart", which is another value
    voice = load_voice(
        write(tmp_path, "name: X\ntask: {facts: {r: {said_as: {a: [size chart], b: [chart]}}}}")
    )
    assert voice.score("See the size chart now", {"r": "a"})["task/r"] == 1.0
    assert voice.score("See the size chart, then a chart", {"r": "a"})["task/r"] == 0.5


def test_inflections():
    assert {"refund", "refunds", "refunded", "refunding", "refund's"} <= inflections("refund")
    assert {"whine", "whines", "whined", "whining", "whiner"} <= inflections("whine")
    assert {"try", "tries", "tried", "trying"} <= inflections("Try")
    assert {"stop", "stopped", "stopping"} <= inflections("stop")
    assert {"box", "boxes", "cheaper"} <= inflections("box") | inflections("cheap")
    assert inflections("yo") == {"yo"}


@pytest.mark.parametrize("text", ["Whining", "they WHINED.", "whine's", "whine-free"])
def test_pattern_finds_inflected_words_in_any_case(text):
    assert phrase_pattern("whine").search(text)


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("mate", "material"),
        ("mate", "checkmate"),
        ("free for life", "free for a life"),
        ("rug", "drugs"),
    ],
)
def test_pattern_keeps_word_boundaries(phrase, text):
    assert not phrase_pattern(phrase).search(text)


def test_pattern_of_a_phrase_crosses_punctuation_and_curly_apostrophes(shop):
    assert phrase_pattern("size chart").search("the size-charts")
    assert shop.score("It’s your own faults", {})["avoid"] == AVOID_FACTOR


def test_each_avoided_word_leaves_a_quarter(shop):
    assert shop.score("Hey mate, dudes!", {})["avoid"] == pytest.approx(0.25**3)


def test_use_saturates_and_stuffing_loses(shop):
    # 1 of 2 asked: 0.5; 2 of 10 words: full; 3 of 10: 2 - 0.3 / 0.2 = 0.5; 4 of 5: 0
    assert shop.score("We will gladly do it for you today", {})["use"] == 0.5
    assert shop.score("We are happy and gladly do it for you today", {})["use"] == 1.0
    assert shop.score("We are happy and gladly thank you for it today", {})["use"] == pytest.approx(
        0.5
    )
    assert shop.score("thank sorry lovely gladly now", {})["use"] == 0.0


def test_within_falls_linearly_on_both_sides():
    # low 10: 5 -> 0, 7.5 -> 0.5, 10 -> 1; high 20: 20 -> 1, 25 -> 0.5, 30 -> 0
    assert [within(n, 10, 20) for n in (5, 7.5, 10, 20, 25, 30, 40)] == pytest.approx(
        [0, 0.5, 1, 1, 0.5, 0, 0]
    )


def test_variety_counts_repeated_word_pairs(shop):
    # "a b a b a b": pairs ab ba ab ba ab, 3 of 5 repeated -> 0; "a b a b c": ab ba ab bc, 1/4 -> 1
    # - 0.15/0.4 = 0.625
    assert shop.score("a b a b a b", {})["variety"] == 0.0
    assert shop.score("a b a b c", {})["variety"] == pytest.approx(0.625)


def test_greeting_stands_at_the_start_and_closing_at_the_end(shop):
    scores = shop.score("So, hello there. Kind regards, Fernhill, as ever", {})
    assert (scores["greeting"], scores["closing"]) == (0.0, 0.0)
    scores = shop.score("  HELLO! All is fine.\nKind regards\nFernhill ", {})
    assert (scores["greeting"], scores["closing"]) == (1.0, 1.0)
    assert shop.score("Hellos to you", {})["greeting"] == 0.0


def test_claims_are_all_or_nothing(shop):
    assert shop.score("This is guaranteed.", {})["claims"] == 0.0
    assert shop.score("We promised it.", {})["claims"] == 0.0
    assert shop.score("A promising day.", {})["claims"] == 1.0


CHEATS = {
    "empty": "",
    "blank": " \n ",
    "punctuation": "... !!! ,,,",
    "one word": "sorry",
    "one phrase repeated": "Hello there, sorry about your kettle. " * 6,
    "word list": "thank sorry lovely gladly happy pleasure kindly welcome",
    "list with frame": "Hello, thank sorry lovely gladly happy pleasure kindly replacement kettle. Warmly, Fernhill.",
    "every item and remedy": "Hello, sorry. We gladly refund exchange cancel repair invoice trace replace the kettle "
    "lamp rug mug tent jug pan. Warmly, Fernhill.",
    "right but for repetition": GOOD.replace(
        "Warmly", "We will gladly send a new one today. " * 3 + "Warmly"
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_saying_nothing_does_not_win(shop, name):
    limit = 0.0 if name in ("empty", "blank", "punctuation") else 0.8
    assert shop.score(CHEATS[name], FACTS)["total"] <= limit


def test_stuffing_a_right_answer_never_raises_it(shop):
    for extra in (
        " Thank you, happy, lovely, kindly, gladly, welcome.",
        " Sorry, sorry, sorry.",
        " " + GOOD,
    ):
        assert shop.score(GOOD.replace(" Warmly", extra + " Warmly"), FACTS)["total"] < 0.99


def test_a_response_that_did_not_end_keeps_the_share_that_the_file_says(shop):
    assert shop.score(GOOD, FACTS, ended=False)["total"] == pytest.approx(0.5)


def test_scores_are_bounded_on_any_text(shop):
    for text in (
        "x" * 3000,
        "🙂🙂",
        "a.b.c",
        "kettle " * 200,
        "-",
        "\x00",
        "Hello\n\nWarmly, Fernhill",
    ):
        scores = shop.score(text, FACTS)
        assert all(0.0 <= s <= 1.0 and math.isfinite(s) for s in scores.values()), text


def test_placeholder_is_the_metadata_value_or_any_word():
    voice = load_voice(VOICES / "outdoor.yaml")
    assert voice.score("Hi Ada, it rained.", {"name": "Ada"})["greeting"] == 1.0
    # one of two words in its place: 0.8 * 0.5^3
    assert voice.score("Hi Bob, it rained.", {"name": "Ada"})["greeting"] == pytest.approx(0.1)
    assert voice.score("Hi Bob, it rained.", {})["greeting"] == 1.0


def test_the_second_brand_prefers_its_own_voice():
    voice = load_voice(VOICES / "outdoor.yaml")
    facts = {"product": "Lodge jacket", "answer": "replace the zip"}
    good = (
        "Hi there, the Lodge jacket kept me dry on a wet ridge once, though heavy rain got in at the hood. "
        "Before you buy a new one, let us repair it: we can replace the zip in a week. See you out there!"
    )
    bad = "WOW! This epic jacket is completely waterproof and lasts forever. Hurry and buy it now!"
    assert voice.score(good, facts)["total"] == pytest.approx(1.0)
    assert voice.score(bad, facts)["total"] < 0.1


def test_one_word_to_use_is_enough_where_there_is_one(tmp_path):
    assert load_voice(write(tmp_path, "name: X\nuse: {words: [mend]}")).use.enough == 1
    assert load_voice(write(tmp_path, "name: X\nuse: {words: [mend, walk, hut]}")).use.enough == 2


def test_old_keys_are_still_read(tmp_path):
    old = write(
        tmp_path,
        "name: X\nunended: 0.5\ntask: {facts: {a: {among: [x, y]}, b: {said_as: {c: [z]}}}}",
    )
    was = load_voice(old)
    now = write(
        tmp_path,
        "name: X\ntruncated: 0.5\ntask: {facts: {a: {choices: [x, y]}, b: {phrasings: {c: [z]}}}}",
    )
    assert was == load_voice(now)
    assert (was.truncated, was.facts["a"].choices, was.facts["b"].phrasings) == (
        0.5,
        ["x", "y"],
        {"c": ["z"]},
    )


def test_numbers_and_single_phrases_are_read_as_text(tmp_path):
    text = (
        "name: X\nuse: {words: 24}\ntask: {facts: {item: , year: {phrasings: {2: [2020], yes: x}}}}"
    )
    voice = load_voice(write(tmp_path, text))
    assert voice.use.phrases == ["24"] and voice.facts["year"].phrasings == {
        "2": ["2020"],
        "True": ["x"],
    }
    assert voice.score("Open 24 hours since 2020", {"year": 2, "item": "hours"})["total"] == 1.0


def test_the_guide_reads_like_a_page():
    guide = voice_guide(load_voice(VOICES / "outdoor.yaml"))
    lists = dict(guide.lists)
    assert guide.name == "Larch & Cairn" and guide.text.startswith(
        "Larch & Cairn speaks like a friend"
    )
    assert lists["Begins with"] == ["hi {name}", "hi there", "good morning / evening"]
    assert "lasts forever / a lifetime" in [
        p.replace("last ", "lasts ") for p in lists["Claims we never make"]
    ]
    assert guide.rules == [
        "Sentences have at most 22 words.",
        "The text has at least 20 and at most 120 words.",
    ]


def test_scorer_names_its_parts_and_marks_what_was_left_out():
    scorer = voice_scorer(VOICES / "shop.yaml", name="gold")
    prompt = [{"role": "user", "content": "?"}]
    samples = Samples([prompt] * 2, [GOOD] * 2, [[1]] * 2, [[1]] * 2, [True, False], [FACTS, {}])
    scores = scorer(samples)
    assert scores.total == pytest.approx([1.0, 0.5])
    assert scores.breakdown["gold/greeting"] == [1.0, 1.0]
    assert scores.breakdown["gold/task/item"][0] == 1.0 and math.isnan(
        scores.breakdown["gold/task/item"][1]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: X\ngreating: {forms: [a]}", "unknown key 'greating'. Did you mean 'greeting'?"),
        ("name: X\ngreeting: {form: [a]}", "greeting: unknown key 'form'. Did you mean 'forms'?"),
        ("name: X\ngreeting: {}", "greeting: 'forms' is missing"),
        ("greeting: {forms: [a]}", "'name' is missing"),
        ("name: X", "no part to score"),
        ("name: X\nuse: {words: []}", "use.words: is empty"),
        (
            "name: X\nuse: {words: [a], at_least: two}",
            "use.at_least: found 'two', expected a whole number",
        ),
        ("name: X\nuse: {words: [a], weight: -1}", "use.weight: found -1"),
        ("name: X\nclaims: {forbidden: ['/(/']}", "is not a regular expression"),
        ("name: X\nclaims: {forbidden: ['/a*/']}", "matches the empty text"),
        ("name: X\ngreeting: {forms: [a]}\nunended: 2", "unended: found 2"),
        ("name: X\ntask: {fact: {}}", "unknown key 'fact'. Did you mean 'facts'?"),
        (
            "name: X\ntask: {facts: {item: {choises: [a]}}}",
            "item: unknown key 'choises'. Did you mean 'choices'?",
        ),
        (
            "name: X\ngreeting: [hello]",
            "greeting: found ['hello'], expected a mapping with the keys",
        ),
        ("name: X\nvariety: {weight: 0}\nuse: {words: [a], weight: 0}", "all weights are 0"),
        # what no text can satisfy
        ("name: X\nlength: {min_words: 40, max_words: 20}", "min_words 40 is above max_words 20"),
        (
            "name: X\nuse: {words: [a, b, A], at_least: 3}",
            "at_least 3 is above its 2 different words",
        ),
        ("name: X\nuse: {words: [a], max_share: 1.5}", "max_share 1.5 is above 1"),
        (
            "name: X\nuse: {words: [a, b, c]}\nlength: {max_words: 9}",
            "at_least 2 is above max_share 0.2 of 'length'",
        ),
        (
            "name: X\ngreeting: {forms: [a b c]}\nclosing: {forms: [d e, f]}\nlength: {max_words: 3}",
            "too few for",
        ),
        (
            "name: X\ngreeting: {forms: ['hello {name} there']}\nsentences: {max_words: 2}",
            "every form of 'greeting'",
        ),
        (
            "name: X\nuse: {words: [happy trails, b]}\navoid: {words: [trail]}",
            "'use' asks for 'happy trails'",
        ),
        (
            "name: X\nclosing: {forms: [ever yours]}\nclaims: {forbidden: ['/ever/']}",
            "'claims' punishes as '/ever/'",
        ),
        (
            "name: X\ntask: {facts: {it: {among: [epic lamp]}}}\navoid: {words: [epic]}",
            "asks for 'epic lamp'",
        ),
        (
            "name: X\ntask: {facts: {it: {among: [Lamp, lamp]}}}",
            "says both 'Lamp (entry 1)' and 'lamp (entry 2)'",
        ),
        (
            "name: X\ntask: {facts: {it: {said_as: {a: [x], b: [y, X]}}}}",
            "'x' says both 'a' and 'b'",
        ),
        (
            "name: X\ntask: {facts: {it: {said_as: {a: [x], b: []}}}}",
            "'b' has no phrase that says it",
        ),
    ],
)
def test_a_bad_file_is_refused_with_file_key_and_nearest_name(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load_voice(path)
    assert str(path) in str(caught.value)
