"""Answers rewritten by a brand voice."""

import pytest

from reward.voice.rewrite import rewrite
from reward.voice.scorer import Voice

VOICE = Voice.model_validate(
    {
        "name": "Fernhill",
        "greeting": {"forms": ["hello {name}", "/hi+/"]},
        "closing": {"forms": ["warmly, fernhill"]},
        "avoid": {"words": ["dude", "epic"]},
        "claims": {"forbidden": ["unbreakable"]},
        "task": {"facts": {"item": {}}},
    }
)
FACTS = {"name": "Ann", "item": "mug"}


@pytest.mark.parametrize(
    "text, expected",
    [
        # what is missing is added, in the brand's own spelling
        ("Your mug is here.", "Hello Ann, Your mug is here. Warmly, Fernhill."),
        ("Hi, your mug is here", "Hi, your mug is here. Warmly, Fernhill."),
        # a word to avoid goes, and a claim goes with its sentence
        (
            "Hello Ann, dude, your mug is here. Warmly, Fernhill",
            "Hello Ann, your mug is here. Warmly, Fernhill",
        ),
        (
            "Hello Ann, your mug is here. It is unbreakable. Warmly, Fernhill.",
            "Hello Ann, your mug is here. Warmly, Fernhill.",
        ),
        # what is nearly right is replaced
        (
            "Helo Ann, your mug is here. Warmy, Fernhil.",
            "Hello Ann, your mug is here. Warmly, Fernhill.",
        ),
        # what is right stays to the letter
        ("Hello Ann, your mug is here. Warmly, Fernhill.", None),
    ],
)
def test_rules_put_right_what_they_can(text, expected):
    assert rewrite(VOICE, text, FACTS) == (expected or text)


def test_a_form_that_cannot_be_filled_in_is_not_written():
    assert rewrite(VOICE, "Your mug is here.", {}) == "Your mug is here. Warmly, Fernhill."


def test_no_fact_is_given_up():
    # the fact stands in the sentence of the claim, which alone would be worth losing it
    text = "Hello Ann, your unbreakable mug is here. We sent it. Warmly, Fernhill."
    without = "We sent it. Warmly, Fernhill."
    voice = Voice.model_validate(
        {
            "name": "Fernhill",
            "claims": {"forbidden": ["unbreakable"], "weight": 5},
            "task": {"facts": {"item": {"weight": 0.1}}},
        }
    )
    scores = [voice.score(own, FACTS)["total"] for own in (text, without)]
    assert scores[1] > scores[0]
    assert rewrite(voice, text, FACTS) == text
    assert rewrite(voice, text, {}) == without


def test_forms_take_turns():
    voice = Voice.model_validate({"name": "X", "greeting": {"forms": ["hello", "good day"]}})
    starts = {rewrite(voice, f"Your mug {n} is here.", {}).split(",")[0] for n in range(20)}
    assert starts == {"Hello", "Good day"}
