"""The table of two brands on scores worked by hand."""

import pytest

from benchmarks.two_brands import REAL, SANDBOX, advantages, answers_of, page, rows_of
from reward.voice.scorer import load_voice
from rlhf.brand.answers import Scored
from rlhf.data.store import Store


def answers(*scores):
    return [
        Scored(f"g{place}", place, "text", score, None, []) for place, score in enumerate(scores)
    ]


SCORES = {
    "fernhill": {
        "base": answers(0.5, 0.5),
        "fernhill": answers(0.9, 0.7),
        "street": answers(0.2, 0.4),
    },
    "street": {
        "base": answers(0.2, 0.2),
        "street": answers(0.4, 0.4),
        "fernhill": answers(0.5, 0.5),
    },
}


def test_each_adapter_is_compared_with_the_other_by_its_own_voice():
    found = advantages(SCORES)
    # (0.7 + 0.3) / 2, and 0.4 - 0.5 on both prompts
    assert found["fernhill"].estimate == pytest.approx(0.5)
    assert found["street"].estimate == pytest.approx(-0.1)
    assert found["street"].low == pytest.approx(-0.1)
    verdict = {"ship": False, "verdict": "DO NOT SHIP.", "gates": []}
    rows = rows_of(SANDBOX, found, dict.fromkeys(SANDBOX.voices, verdict))
    assert [row["value"] for row in rows[1:]] == [pytest.approx(-0.1), False, False]
    text = "\n".join(page(SANDBOX, SCORES, dict.fromkeys(SANDBOX.voices, verdict)))
    assert "| street | 0.3 " in text and "- street: DO NOT SHIP." in text


def test_each_voice_scores_the_answers_of_all_policies(tmp_path):
    stores = [tmp_path / f"{name}.db" for name in SANDBOX.voices]
    said = {"fernhill": "Hello there, thank you. Warmly, Fernhill.", "street": "yo mate, no bother"}
    for path, (name, text) in zip(stores, said.items(), strict=True):
        with Store.open(path, create=True) as store:
            prompt = store.add_prompt([{"role": "user", "content": "?"}])
            store.add_response(prompt, "an answer", model="runs/base", ended=True)
            store.add_response(prompt, text, model=str(tmp_path / name / "dpo"), ended=True)
    every = dict.fromkeys(SANDBOX.voices, stores)
    found = answers_of(SANDBOX, tmp_path, "runs/base", every)
    for voice, own in found.items():
        assert set(own) == {"base", *SANDBOX.voices}
        assert [answer.text for answer in own["street"]] == [said["street"]]
        # each adapter speaks as its own voice asks
        (other,) = set(SANDBOX.voices) - {voice}
        assert own[voice][0].score > own[other][0].score


def test_both_voices_load_and_differ_in_what_they_ask_for():
    fernhill, street = map(load_voice, SANDBOX.voices.values())
    assert set(fernhill.avoid.words) & set(street.use.phrases)
    assert set(street.avoid.words) & set(fernhill.use.phrases)


def test_the_brands_of_the_real_model_keep_each_other_out():
    outdoor, bakery = map(load_voice, REAL.voices.values())
    assert not set(outdoor.use.phrases) & set(bakery.use.phrases)
