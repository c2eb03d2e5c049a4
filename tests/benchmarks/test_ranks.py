"""The page about many ranks, and its rows, from numbers known beforehand."""

import math

from benchmarks.ranks.combinations import page_of, rows_of, text_of
from benchmarks.result_rows import holds
from tests.launch.combinations import plainest


def apart(loss, largest, tokens=0.0):
    return {
        "loss": loss,
        "largest": largest,
        "norm": largest / 2,
        "gradient": loss,
        "tokens": tokens,
    }


FOUND = {
    "combinations": [
        plainest("sft", "2") | apart(1e-6, 1e-3) | {"cpu": 1.26},
        plainest("reward", "3 offload")
        | apart(1e-2, 1e-3, math.nan)
        | {"cpu": 2.0, "dtype": "bfloat16"},
    ],
    "whole ppo": [
        plainest("ppo", "2", "whole") | apart(1e-6, 1e-6) | {"cpu": 1.5},
        plainest("ppo", "2", "whole") | apart(1e-2, 1e-3) | {"cpu": 1.0, "dtype": "bfloat16"},
    ],
    "meaning": [
        {"program": "sft", "what": "six steps"} | apart(2e-6, 3e-5),
        {"program": "reward", "what": "six steps"} | apart(1e-6, 1e-5, math.nan),
        {"program": "ppo", "what": "one step"} | apart(1e-6, 1e-6),
        {"program": "ppo", "what": "six steps"} | apart(4e-3, 2e-3),
        {"program": "ppo", "what": "six steps, float64"} | apart(1e-12, 1e-12),
        {"program": "sft", "what": "past the end of an epoch"} | apart(0.5, 0.1),
    ],
    "resume": [
        plainest("ppo", "2") | {"ranks": 2} | apart(0.0, 0.0),
        plainest("ppo", "2") | {"ranks": 4} | apart(0.0, 2e-7),
    ],
}


def test_rows_take_the_worst_of_what_they_are_about():
    rows = {row["id"]: row for row in rows_of(FOUND)}
    assert rows["combinations-float32"]["value"] == 1e-6
    assert rows["combinations-bfloat16"]["value"] == 1e-2
    assert rows["whole-ppo-float32"]["value"] == 5e-7
    assert rows["whole-ppo-bfloat16"]["value"] == 5e-4
    # what happens at the end of an epoch is not among it
    assert rows["same-loss"]["value"] == 2e-6 and rows["same-weights"]["value"] == 3e-5
    assert rows["resume-2"]["value"] == 0.0 and rows["resume-1-4"]["value"] == 2e-7
    kept = {name for name, row in rows.items() if holds(row["value"], row["bound"])}
    assert set(rows) - kept == {
        "combinations",
        "whole-ppo",
        "same-loss-ppo",
        "same-weights-ppo",
    }


def test_the_page_has_each_run():
    page = page_of(FOUND)
    assert (
        "| reward | 3 offload | lora | 1 | no | bfloat16 | 0.01 | 0.001 | 0.0005 | 0.01 | - | 2 |"
        in page
    )
    assert "| ppo | 2 | lora | 4 | 2e-07 | 0 |" in page
    assert [text_of(value) for value in (True, 0.12345, 3, math.nan)] == ["yes", "0.12", "3", "-"]
