"""The table of two brands on scores worked by hand."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks.brands import served
from benchmarks.brands.two_brands import (
    REAL,
    SANDBOX,
    advantages,
    answers_of,
    page,
    rows_of,
    served_of,
)
from reward.voice.scorer import load_voice
from rlhf.brand.answers import Scored
from rlhf.data.store import Store


def answers(*scores):
    asked = [{"role": "user", "content": "?"}]
    return [
        Scored(f"g{place}", place, "text", score, None, asked) for place, score in enumerate(scores)
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

    # what was given by name has rows and a table of its own
    rows = rows_of(SANDBOX, found, {}, served=found)
    assert [row["id"] for row in rows[2:]] == [
        "two-brands-served-fernhill",
        "two-brands-served-street",
    ]
    verdicts = dict.fromkeys(SANDBOX.voices, verdict)
    text = "\n".join(page(SANDBOX, SCORES, verdicts, served=SCORES))
    assert text.count("| street | 0.3 ") == 2 and "## Switched by name" in text
    # the first answers of base and own adapter, with their scores
    assert "| fernhill | ? | 0.50: text | 0.90: text |" in text


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


SAID = {
    "fernhill/dpo": "Hello there, thank you. Warmly, Fernhill.",
    "street/dpo": "yo mate",
    "base": "I",
}


class Client:
    """Answers as OpenAI's client does, each name in its own words."""

    def __init__(self):
        self.asked = []
        cards = [SimpleNamespace(id=name) for name in SAID]
        self.models = SimpleNamespace(list=lambda: cards)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, model, messages, max_tokens, temperature, seed):
        self.asked.append((model, seed, max_tokens, temperature))
        message = SimpleNamespace(content=SAID[model])
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="length")])


def test_each_name_answers_every_prompt_and_is_asked_once(tmp_path, monkeypatch):
    stores = {}
    for voice in SANDBOX.voices:
        stores[voice] = tmp_path / f"{voice}.db"
        with Store.open(stores[voice], create=True) as store:
            for number in range(2):
                prompt = store.add_prompt([{"role": "user", "content": f"{number}?"}])
                store.add_response(prompt, "an answer", model="runs/base", ended=True)
    client = Client()
    monkeypatch.setattr(served, "serving", lambda runs: nullcontext((client, 0)))
    file = tmp_path / "served.jsonl"
    sampling = {"max_response_length": 9, "temperature": 0.5}
    found = served.served_answers(["a", "b"], stores, file, sampling)
    # two voices, two prompts, three names; the seed is the prompt's, whoever is asked
    assert len(found) == len(client.asked) == 12
    assert {own[2:] for own in client.asked} == {(9, 0.5)}
    assert {own[1] for own in client.asked if own[0] == "base"} == {1, 2}
    assert not found[0]["ended"]
    assert served.served_answers(["a", "b"], stores, file, sampling) == found
    assert len(client.asked) == 12
    assert json.loads(file.read_text().splitlines()[0])["model"] == "fernhill/dpo"

    scores = served_of(SANDBOX, found)
    assert set(scores["street"]) == {"base", "fernhill", "street"}
    assert advantages(scores)["fernhill"].estimate > 0
