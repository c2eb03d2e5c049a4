import pytest

from reward.rules import (
    RULES,
    check_rule_options,
    ends_properly,
    length,
    must_match,
    must_not_match,
    no_repetition,
)
from rlhf.errors import UserError


def test_length_is_one_inside_and_falls_outside():
    assert length("a b c", {}, low=3, high=3) == 1.0
    assert length("a b c", {}, low=4, high=9) == pytest.approx(3 / 4)
    assert length("a b c", {}, low=1, high=2) == pytest.approx(2 / 3)
    assert length("", {}, low=2, high=3) == 0.0


def test_patterns_are_searched_anywhere():
    assert must_match("Order #12 is on its way", {}, pattern=r"#\d+") == 1.0
    assert must_match("Your order", {}, pattern=r"#\d+") == 0.0
    assert must_not_match("As an AI, I", {}, pattern=r"(?i)as an ai") == 0.0
    assert must_not_match("As a shop, we", {}, pattern=r"(?i)as an ai") == 1.0


def test_no_repetition_is_the_share_of_different_ngrams():
    # a b a b a b: bigrams ab ba ab ba ab -> 2 of 5 differ
    assert no_repetition("a b A b a b", {}, n=2) == pytest.approx(2 / 5)
    assert no_repetition("one two three four", {}, n=3) == 1.0
    assert no_repetition("hi", {}, n=3) == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Done.", 1.0),
        ("Done?\n", 1.0),
        ('She said "yes!"', 1.0),
        ("(all of it.)", 1.0),
        ("cut off in", 0.0),
        ("", 0.0),
    ],
)
def test_ends_properly(text, score):
    assert ends_properly(text, {}) == score


def test_every_rule_takes_text_and_metadata_and_stays_in_bounds():
    options = {"must_match": {"pattern": "a"}, "must_not_match": {"pattern": "a"}}
    for name, rule in RULES.items():
        for text in ("", "a", "word " * 500):
            assert 0.0 <= rule(text, {"item": "kettle"}, **options.get(name, {})) <= 1.0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("must_match", {"pattern": "("}, "not a regular expression"),
        ("length", {"low": 9, "high": 3}, "is above high"),
        ("length", {"low": 500}, "is above high"),
        ("no_repetition", {"n": 0}, "whole number from 1"),
        ("ends_properly", {"endings": ""}, "expected characters"),
        # quotes are put aside before one looks
        ("ends_properly", {"endings": '"'}, "expected characters"),
        ("length", {"low": True}, "whole number from 1"),
    ],
)
def test_options_that_cannot_work_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        check_rule_options(name, options)
