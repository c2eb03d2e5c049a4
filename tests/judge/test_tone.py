"""A language model as the judge of a brand voice's tone: asked for each slider by itself."""

import json

import pytest

from reward.compose import build_scorer
from rlhf.data.records import Samples
from tests.judge.chat_server import completion

TONE = """
name: X
length: {min_words: 1}
variety: {weight: 0}
tone: {sliders: {warm: 1.0, formal: 0.25}}
"""


def test_each_slider_is_a_grade_between_0_and_1(tmp_path, serve):
    def answer(body):
        # grades from 1 to 5: warm 4, formal 2, and nothing that can be read of the second answer
        text = body["messages"][0]["content"]
        grade = 4 if "how warm it is" in text else 2
        assert "to 5 (as" in text and "{" + "slider" + "}" not in text
        return 200, completion(json.dumps({"score": grade}) if "Dear Ann" in text else "no")

    path = tmp_path / "brand.yaml"
    path.write_text(TONE)
    judge = {"openai": f"{serve(answer).url}", "model": "stand-in", "highest": 5}
    prompts = [[{"role": "user", "content": "Hi"}]] * 2
    samples = Samples(prompts, ["Dear Ann", "Hm"], [[1]] * 2, [[1]] * 2, [True] * 2, [{}, {}])
    scores = build_scorer([{"voice": str(path), "judge": judge}])(samples)
    # (4 - 1) / 4 = 0.75 of 1; (2 - 1) / 4 = 0.25 as wanted; each has a quarter of the weight
    assert scores.breakdown["brand/tone/warm"][0] == pytest.approx(0.75)
    assert scores.breakdown["brand/tone/formal"][0] == pytest.approx(1.0)
    assert scores.total[0] == pytest.approx((0.01 + 0.99 * 0.75) ** 0.25)
    # without a grade the tone is left out
    assert scores.total[1] == pytest.approx(1.0)
