"""The report as W&B tables: flat rows, written beside the run whether W&B is there or not."""

import json

import pytest

from rlhf.report.wandb_tables import log_report, rows_of
from rlhf.runs.tracking import Tracker
from tests.compare.report_example import example, interval, judged_pairs


def test_rows_hold_the_numbers_flat():
    report = example()
    report["points"][0] |= {"kl": interval(1.5) | {"low": 1.25, "high": 1.75}}
    report["frontier"][0]["rows"] = [
        {
            "kl": 4.0,
            "difference": interval(0.12) | {"low": 0.03, "high": 0.21},
            "p_adjusted": 0.04,
            "minimum_detectable_effect": 0.1,
            "minimum_detectable_effect_range": [0.06, 0.2],
        }
    ]
    report["wins"]["raw"][1][0] = interval(0.75) | {"low": 0.7, "high": 0.8}
    report["judge_of_pairs"] = judged_pairs()
    rows = rows_of(report)
    assert {name: len(found) for name, found in rows.items()} == {
        "frontier": 16 + 16 + 4, "equal_kl": 1, "tuned": 1, "wins": 13 * 12 // 2, "judge_of_pairs": 1,
        "cost": 12, "samples": 6,
        "sentences": 7 + 5,
    }  # fmt: skip
    assert rows["judge_of_pairs"] == [
        {"a": "ppo", "b": "dpo", "raw": 0.6, "raw/low": 0.5, "raw/high": 0.7, "equal_length": None,
         "equal_length/low": None, "equal_length/high": None, "ties": 0.25, "consistency": 0.875}
    ]  # fmt: skip
    first = rows["frontier"][0]
    assert (first["method"], first["swept"], first["training_step"], first["seeds"]) == (
        "ppo",
        0.02,
        25,
        5,
    )
    assert (first["kl"], first["kl/low"], first["kl/high"]) == (1.5, 1.25, 1.75)
    assert (
        first["over_initial/gold"]
        == report["points"][0]["scores"]["gold"]["difference"]["estimate"]
    )
    assert rows["equal_kl"][0] == {
        "a": "ppo", "b": "dpo", "kl": 4.0, "difference": 0.12, "difference/low": 0.03, "difference/high": 0.21,
        "p_adjusted": 0.04, "minimum_detectable_effect": 0.1, "minimum_detectable_effect/low": 0.06,
        "minimum_detectable_effect/high": 0.2,
    }  # fmt: skip
    won = rows["wins"][0]
    assert (won["a"], won["b"], won["raw"], won["raw/low"]) == (
        "ppo kl_coef 0.02",
        "sft",
        0.75,
        0.7,
    )
    cost = rows["cost"][4]
    assert (cost["method"], cost["own/seconds"], cost["pairs/seconds"], cost["total/seconds"]) == (
        "dpo",
        80.0,
        14.0,
        94.0,
    )
    flat = [
        value
        for found in rows.values()
        for row in found
        for name, value in row.items()
        if name != "prompt"
    ]
    assert all(isinstance(value, (str, int, float, type(None))) for value in flat)


def test_a_report_may_lack_parts():
    rows = rows_of(
        example(judge=None)
        | {"budget": {"match": None, "matched": None, "rows": []}, "samples": []}
    )
    assert [name for name, found in rows.items() if found] == ["frontier", "sentences"]


def test_tables_are_written_without_wandb(tmp_path):
    with Tracker(tmp_path) as tracker:
        log_report(example(), tracker, {"frontier": tmp_path / "not there.png"})
    lines = (tmp_path / "tables/equal_kl.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[2])["kl"] == 9.0
    assert (
        len(json.loads((tmp_path / "tables/samples.jsonl").read_text().splitlines()[0])["prompt"])
        > 5
    )


def test_wandb_gets_tables_and_images_offline_without_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "NETRC",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    from matplotlib.figure import Figure

    Figure(figsize=(2, 1)).savefig(tmp_path / "frontier.png")
    with Tracker(tmp_path / "run", report_to="wandb") as tracker:
        log_report(example(), tracker, {"frontier": tmp_path / "frontier.png"})
        assert tracker.wandb.run is not None  # no call failed
    media = tmp_path / "run" / "wandb"
    assert list(media.glob("offline-run-*/files/media/images/figures/frontier*.png"))
    for name in ("frontier", "equal_kl", "wins", "cost", "samples"):
        assert list(media.glob(f"offline-run-*/files/media/table/tables/{name}*.json")), name
