"""The texts written for the brand of configs/voices/outdoor.yaml: whole, on brand, split cleanly."""

import re
from collections import Counter
from pathlib import Path

import pytest

from reward.voice.phrases import Text
from reward.voice.scorer import load_voice
from rlhf.data.load import load
from rlhf.data.prepare.duplicates import contained_texts, similar_prompts
from rlhf.data.prepare.pii import find
from rlhf.data.records import Instruction, Prompt

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "rlhf" / "brand_data" / "outdoor"
VOICE = load_voice(ROOT / "configs" / "voices" / "outdoor.yaml")
REAL_BRANDS = re.compile(
    r"\b(gore-?tex|velcro|vibram|patagonia|north face|mammut|nikwax|osprey|thermos|primus|decathlon"
    r"|salomon|paypal|klarna|visa|mastercard|amazon|google|instagram|whatsapp|dhl|fedex|ups)\b",
    re.IGNORECASE,
)


def read(name: str, kind):
    return load(str(FOLDER / f"{name}.jsonl"), kind)


@pytest.fixture(scope="module")
def questions() -> list[Prompt]:
    return read("questions", Prompt)


@pytest.fixture(scope="module")
def answers() -> list[Instruction]:
    return read("answers", Instruction)


@pytest.fixture(scope="module")
def dialogues() -> list[Instruction]:
    return read("dialogues", Instruction)


@pytest.fixture(scope="module")
def neutral() -> list[Instruction]:
    return read("neutral", Instruction)


def test_counts_are_those_of_the_readme(questions, answers, dialogues, neutral):
    counts = [len(questions), len(answers), len(dialogues), len(neutral)]
    assert counts == [600, 211, 60, 100]
    table = re.findall(r"^\| `\w+\.jsonl` \| (\d+) \|", (FOLDER / "README.md").read_text(), re.M)
    assert counts == list(map(int, table))

    by_split = Counter(row.split for row in questions)
    assert by_split == {"train": 420, "validation": 57, "test": 123}
    groups = Counter(row.group for row in questions)
    assert len(groups) == 72 and set(groups.values()) == {8, 9}


def test_ids_are_unique_and_answers_repeat_their_question(questions, answers, dialogues, neutral):
    for rows in (questions, answers, dialogues, neutral):
        assert len({row.metadata["id"] for row in rows}) == len(rows)
    asked = {row.metadata["id"]: row for row in questions}
    for row in answers:
        question = asked[row.metadata["id"]]
        assert (row.prompt, row.group, row.split, row.metadata) == (
            question.prompt,
            question.group,
            question.split,
            question.metadata,
        )


def test_a_group_has_one_split_and_every_split_several_topics(questions, answers, dialogues):
    split_of_group = {row.group: row.split for row in questions}
    assert all(split_of_group[row.group] == row.split for row in (*answers, *dialogues))

    topics: dict[str, set[str]] = {}
    for row in questions:
        assert row.group.startswith(row.metadata["topic"] + "-")
        topics.setdefault(row.split, set()).add(row.metadata["topic"])
    assert [len(topics[name]) for name in ("train", "validation", "test")] == [24, 7, 15]


def test_no_two_questions_are_near_duplicates(questions, dialogues):
    """Not within a split either: the most similar two share 0.23 of their 4-grams."""
    # a dialogue counts by its first question
    rows = [*questions, *(Prompt(prompt=first_turn(row)) for row in dialogues)]
    assert similar_prompts(rows, threshold=0.4) == []
    assert contained_texts(rows) == []


def first_turn(row: Instruction) -> list[dict]:
    return [next(message for message in row.prompt if message["role"] == "user")]


def test_answers_obey_the_specification(answers, dialogues):
    """Measured: all 211 answers and all 152 assistant turns score 1.0."""
    scores = {}
    for row in (*answers, *dialogues):
        scores[row.response] = VOICE.score(row.response, row.metadata)["total"]
        for message in row.prompt:
            if message["role"] == "assistant":
                scores[message["content"]] = VOICE.score(message["content"])["total"]
    assert len(scores) == 211 + 152
    assert {text: score for text, score in scores.items() if score < 1 - 1e-9} == {}


def test_the_facts_stand_in_the_customers_words(questions):
    """What nobody could know from the question would be noise in the score."""
    answer = VOICE.facts["answer"]
    for row in questions:
        value = row.metadata.get("answer")
        said = Text(row.prompt[-1]["content"])
        assert value is None or answer.mark_value(said, value, exact=True).score == 1.0, row


def test_dialogues_take_turns(dialogues):
    turns = Counter()
    for row in dialogues:
        roles = [message["role"] for message in row.prompt if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        turns[len(roles) + 1] += 1
    assert turns == {4: 33, 6: 22, 8: 5}


def test_neutral_texts_are_held_out_and_off_topic(neutral):
    assert {row.split for row in neutral} == {"test"} and len({row.group for row in neutral}) == 25
    # no brand voice in them: a stray word of a greeting is worth next to nothing
    assert all(VOICE.score(row.response)["greeting"] < 0.05 for row in neutral)


def test_no_personal_data_and_no_real_brands():
    for path in FOLDER.glob("*.jsonl"):
        text = path.read_text(encoding="utf-8")
        found = [find(line) for line in text.splitlines()]
        assert not any(found), path.name
        assert REAL_BRANDS.findall(text) == [], path.name
