"""Partial credit of a brand voice: worked by hand, monotone, always below the exact phrase; and the
exact form, digit by digit.
"""

import hashlib
import itertools
import random
import time

import pytest

from reward.voice.form import softly_within
from reward.voice.nearness import LOOKED_AT, phrase_likeness, word_likeness
from reward.voice.parts import ENGLISH_NEGATIONS, MISSING_FACT, NEAR_FACT, NEAR_FORM, ONE_CLAIM
from reward.voice.phrases import Text, is_negated
from reward.voice.scorer import FLOOR, Voice, load_voice
from rlhf.sandbox import SHOP_VOICE
from rlhf.sandbox.corpus import FAULTS, answer, draw_case, make_world


def voice(**sections):
    return Voice.model_validate({"name": "X", **sections})


def part(name, text, metadata=None, **sections):
    return voice(**sections).score(text, metadata)[name]


def plain_edits(phrase, words):
    """The same as `phrase_likeness` for words that are equal or not: every stretch, by recursion."""

    def edits(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(edits(a[1:], b[1:]) + (a[0] != b[0]), edits(a[1:], b) + 1, edits(a, b[1:]) + 1)

    best = []
    for end in range(len(words) + 1):
        least = min(edits(phrase, words[start:end]) for start in range(end + 1))
        best.append(max(0.0, 1 - least / len(phrase)))
    return best


def test_words_are_alike_by_the_edits_between_their_letters():
    # hallo: 1 of 5 letters; trails: 1 of 6; help: 2 of 5, which is below 2/3
    assert word_likeness("hello", "hallo") == pytest.approx(0.8)
    assert word_likeness("trail", "trails") == pytest.approx(5 / 6)
    assert word_likeness("hello", "help") == 0.0
    assert word_likeness("see", "see") == 1.0


def test_a_phrase_is_compared_with_every_stretch_as_by_the_slow_recursion():
    draw = random.Random(0)
    for _ in range(60):
        phrase = draw.choices("abcd", k=draw.randint(1, 4))
        words = draw.choices("abcde", k=draw.randint(0, 6))
        assert phrase_likeness(phrase, words) == pytest.approx(plain_edits(phrase, words))
    # a word too many in its middle is one edit of four words
    assert phrase_likeness("abcd", "abxcd")[-1] == plain_edits("abcd", "abxcd")[-1] == 0.75


def test_a_greeting_in_the_wrong_place_earns_by_its_distance():
    # whole form, 0.8 * 1^3 * (1/2 + 1/(2 + 2 away)): one word before it 3/4, three 5/8
    rules = {"greeting": {"forms": ["hello there"]}}
    assert part("greeting", "Hello there, Ann", **rules) == 1.0
    assert part("greeting", "So hello there, Ann", **rules) == pytest.approx(0.8 * 0.75)
    assert part("greeting", "Well my friend hello there", **rules) == pytest.approx(0.8 * 0.625)
    assert part("greeting", "We replaced it", **rules) == 0.0


def test_a_paraphrase_of_a_greeting_earns_the_cube_of_its_likeness():
    # one of two words in its place: 0.8 * (1/2)^3; a typing error, (0.8 + 1) / 2 = 0.9: 0.8 * 0.9^3
    rules = {"greeting": {"forms": ["hello there"]}}
    assert part("greeting", "Hello Ann", **rules) == pytest.approx(0.8 / 8)
    assert part("greeting", "Hallo there, Ann", **rules) == pytest.approx(0.8 * 0.729)


def test_a_closing_that_is_not_the_last_line_is_nearly_right():
    rules = {"closing": {"forms": ["happy trails", "/larch (and|&) cairn/"]}}
    assert part("closing", "Bye. Happy trails!", **rules) == 1.0
    # one word after it: 3/4; one of two words at the end: 1/8; a regular expression the same way
    assert part("closing", "Happy trails! Ann", **rules) == pytest.approx(0.8 * 0.75)
    assert part("closing", "Many happy returns. Good trails", **rules) == pytest.approx(0.8 / 8)
    assert part("closing", "From Larch & Cairn today", **rules) == pytest.approx(0.8 * 0.75)


def test_a_word_that_is_nearly_used_earns_less_than_half_of_one():
    # "trial" is 2 of 5 letters away, so no word; "repairs" is an inflection; "repare" 2 of 6 letters:
    # (2/3)^3 / 2 of one of two words
    rules = {"use": {"words": ["trail", "repair"], "max_share": 1}}
    assert part("use", "we repair it on the trail", **rules) == 1.0
    assert part("use", "we repare it on the trial", **rules) == pytest.approx(8 / 27 / 4)
    assert part("use", "we repare it on the trail", **rules) == pytest.approx(0.5 + 8 / 27 / 4)


def test_a_text_that_is_stuffed_gains_nothing_by_misspelling():
    rule = {"use": {"words": ["jacket", "repair"], "at_least": 2, "max_share": 0.3}}
    # two of five words are 0.4, a third above 0.3: 2 - 0.4 / 0.3 = 2/3 are left, of whatever was used
    assert part("use", "we jacket repair good day", **rule) == pytest.approx(2 / 3)
    near = 0.5 * (5 / 6) ** 3
    assert part("use", "we jacket repeir good day", **rule) == pytest.approx((1 + near) / 2 * 2 / 3)
    assert part("use", "we jackat repeir good day", **rule) == pytest.approx(near * 2 / 3)


def test_every_sentence_counts_by_its_words():
    # 4 words and 8 words, at most 4: (4 * 1 + 8 * (4/8)^3) / 12 = 5/12
    rules = {"sentences": {"max_words": 4}}
    assert part("sentences", "a b c d. e f g h i j k l", **rules) == pytest.approx(5 / 12)
    assert part("sentences", "a b c d. e f g h", **rules) == 1.0


def test_length_falls_by_the_cube_on_both_sides():
    assert [softly_within(n, 10, 20) for n in (5, 10, 20, 25, 40)] == pytest.approx(
        [0.125, 1, 1, 0.512, 0.125]
    )
    assert softly_within(0, 10, 20) == 0.0 and softly_within(3, 0, 20) == 1.0


def test_fewer_claims_are_better_than_more_and_one_costs_nearly_all():
    rules = {"claims": {"forbidden": ["unbreakable", "safe"]}}
    assert part("claims", "It is strong", **rules) == 1.0
    assert part("claims", "It is unbreakable", **rules) == pytest.approx(ONE_CLAIM)
    assert part("claims", "It is unbreakable, safe, safe", **rules) == pytest.approx(ONE_CLAIM / 3)


def test_a_fact_that_is_nearly_said_is_better_than_none():
    # one of two words: 0.1 + 0.3 * (1/2)^3
    rules = {"task": {"facts": {"product": {}}}}
    about = {"product": "Lodge jacket"}
    assert part("task/product", "It rained", about, **rules) == MISSING_FACT
    assert part("task/product", "The jacket", about, **rules) == pytest.approx(0.1375)
    assert part("task/product", "The Lodge jacket", about, **rules) == 1.0
    # never as good as the right value beside a wrong one
    assert NEAR_FACT < 0.5


def test_the_total_has_a_floor_below_which_what_is_nearly_right_still_counts():
    # two parts of equal weight, 1 and 0: (0.01 * 1)^(1/2); 0.1 in place of 0: (0.01 + 0.99 * 0.1)^(1/2)
    rules = {
        "greeting": {"forms": ["hello there"]},
        "length": {"min_words": 1},
        "variety": {"weight": 0},
    }
    assert voice(**rules).score("Bye now")["total"] == pytest.approx(FLOOR**0.5)
    assert voice(**rules).score("Hello you")["total"] == pytest.approx(0.109**0.5)


def test_nearer_is_always_better():
    """Each list goes from far to near; its scores must rise strictly, and only the last is exact."""
    near = [
        ("greeting", {"forms": ["good morning friend"]},
         ["we sent it", "friend it is sent", "morning friend it is sent",
          "see good morning friend it is sent", "good morning friend it is sent"]),
        ("closing", {"forms": ["see you out there"]},
         ["all is sent", "we will see you", "see you out soon", "see you out there ann",
          "see you out there"]),
        ("length", {"min_words": 4}, ["a", "a b", "a b c", "a b c d"]),
    ]  # fmt: skip
    for name, rule, texts in near:
        scores = [part(name, text, **{name: rule}) for text in texts]
        assert all(a < b for a, b in itertools.pairwise(scores)), (name, scores)
        assert scores[-1] == 1.0 and scores[-2] <= NEAR_FORM


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("It is not unbreakable", True),
        ("It isn't really unbreakable", True),
        ("We never said it was unbreakable", True),
        ("no tent is unbreakable", True),
        ("It is unbreakable", False),
        ("It is not only strong but unbreakable", False),
        ("no doubt unbreakable", False),
        ("It is not cheap, it is unbreakable", False),
        ("Not cheap but unbreakable", False),
        ("We do not know of anything that is unbreakable", False),
    ],
)
def test_what_is_denied_in_the_same_clause_is_no_claim(text, negated):
    start = text.index("unbreakable")
    assert is_negated(text, start, ENGLISH_NEGATIONS) is negated
    rules = {"claims": {"forbidden": ["unbreakable"]}}
    assert (part("claims", text, **rules) == 1.0) is negated
    # as it was before
    assert part("claims", text, **rules, credit="exact") == 0.0


def test_the_negations_of_a_file_replace_the_english_ones():
    rules = {"claims": {"forbidden": ["unzerbrechlich"], "negations": ["nicht"]}}
    assert part("claims", "Es ist nicht unzerbrechlich", **rules) == 1.0
    assert part("claims", "It is not unzerbrechlich", **rules) == pytest.approx(ONE_CLAIM)
    rules["claims"]["negations"] = []
    assert part("claims", "Es ist nicht unzerbrechlich", **rules) == pytest.approx(ONE_CLAIM)


# computed before partial credit existed
EXACT = [
    (
        "Hellos! We replace the kettle, thank you. Warmly, Fernhill, as ever", True,
        {"greeting": 0.0, "closing": 0.0, "use": 0.5, "total": 0.3714471242937836},
    ),
    (
        "hey mate, your kettle is crappy and we guarantee that we promise a refund", False,
        {"avoid": 0.015625, "claims": 0.0, "total": 0.02128349806301963},
    ),
    (
        "So, hello there. We are sorry about the lamp and we will gladly refund it and send you a new one today "
        "if you must", True,
        {"sentences": 0.0, "task/item": 0.0, "task/remedy": 0.5, "total": 0.12899031456685725},
    ),
    (
        "Hello! thank sorry lovely gladly now. We will replace the kettel and never fail. kind regards\nFernhill",
        True, {"use": 0.8235294117647061, "task/item": 0.1, "total": 0.43809461147773554},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "ended", "expected"), EXACT)
def test_exact_credit_keeps_the_digits_of_before(text, ended, expected):
    shop = load_voice(SHOP_VOICE)
    scores = shop.score(text, {"item": "kettle", "remedy": "replace"}, ended)
    assert {name: scores[name] for name in expected} == expected


def test_the_scores_of_the_sandbox_keep_their_digits():
    """The hash of all parts and totals of 400 answers, as they were before partial credit."""
    shop = load_voice(SHOP_VOICE)
    world = make_world(0, n_items=40, n_intents=12)
    rng, digest = random.Random(7), hashlib.sha256()
    for number in range(400):
        case = draw_case(world, rng)
        text = answer(world, case, rng.sample(list(FAULTS), rng.randrange(4)), rng)
        scores = shop.score(text, case.metadata, ended=number % 5 > 0)
        order = ["greeting", "closing", "use", "avoid", "claims", "sentences", "length", "variety"]
        order += ["task/item", "task/remedy", "total"]
        digest.update(repr({name: scores[name] for name in order if name in scores}).encode())
    assert digest.hexdigest()[:16] == "fccedc72101cf229"


HOSTILE = {
    "long": "thank you for reaching out to us about the jacket " * 5_000,
    "one long word": "x" * 200_000,
    "different words": " ".join(f"word{i}" for i in range(20_000)),
    "signs": "." * 100_000 + "x",
    "signs and blanks": "! " * 100_000,
    "marks on one letter": "e" + "\u0301\u0316" * 50_000,
    "negations": "not " * 50_000 + "unbreakable",
    "nearly a closing": "see you out " * 30_000,
    "emoji": "\U0001f468\u200d\U0001f469" * 30_000,
    "right to left": "\u202eשלום " * 20_000,
    "nothing but marks": "\u0301" * 1000,
    "half a surrogate pair": "hello \ud800 there",
    "zeros": "\x00" * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_scored_fast_and_stays_in_bounds(name):
    rules = {
        "greeting": {"forms": ["hi {name}", "hello there"]},
        "closing": {"forms": ["see you out there", "/larch (and|&) cairn/"]},
        "use": {"words": ["trail", "repair kit"]},
        "avoid": {"words": ["epic"]},
        "claims": {"forbidden": ["unbreakable"]},
        "sentences": {"max_words": 20},
        "length": {"min_words": 5, "max_words": 50},
        "reading": {"max_level": 8},
        "person": {"speaks_as": "we", "addresses_reader": True},
        "contractions": {"style": "use"},
        "emoji": {"max": 1},
        "punctuation": {"exclamation_marks": 1, "ellipses": 0, "capitals": 0, "dashes": 0},
        "task": {"facts": {"product": {}}},
    }
    start = time.process_time()
    scores = voice(**rules).score(HOSTILE[name], {"product": "Lodge jacket"})
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    # 200 kB take about a second; what is quadratic takes minutes
    assert time.process_time() - start < 5.0


def test_only_the_first_words_are_looked_at_for_what_is_near():
    far = "filler " * LOOKED_AT + "hello there"
    assert part("greeting", far, greeting={"forms": ["hello there"]}) == 0.0
    assert part("greeting", "filler " * 9 + "hello there", greeting={"forms": ["hello there"]}) > 0


def test_a_letter_with_its_marks_is_one_letter():
    # Hindi: two words; the first is not the start of the second
    read = Text("की किताब")
    assert read.words == ["की", "किताब"]
    assert read.find("क", inflect=False) == [] and read.find("की", inflect=False) == [(0, 2)]
