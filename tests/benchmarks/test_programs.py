import json
import sys

import pytest

from benchmarks.programs import finished, folder_and_seeds, paired


def test_the_interval_over_seeds_by_hand():
    # mean 2, standard deviation sqrt(2), standard error 1; t(0.975, 1) = 12.706205
    found = paired([1.0, 3.0])
    assert found["mean"] == 2.0 and found["values"] == [1.0, 3.0]
    assert (found["low"], found["high"]) == pytest.approx((-10.706205, 14.706205), abs=1e-6)
    assert paired([0.5]) == {"mean": 0.5, "low": None, "high": None, "values": [0.5]}


def test_a_run_has_ended_where_its_result_says_so(tmp_path):
    assert not finished(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"finished": False}))
    assert not finished(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"finished": "2026-11-29"}))
    assert finished(tmp_path)


def test_a_script_over_seeds_makes_its_folder_and_knows_it_from_anywhere(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["critics.py", "runs/critics"])
    assert folder_and_seeds("") == (tmp_path / "runs" / "critics", 5)
    assert (tmp_path / "runs" / "critics").is_dir()

    monkeypatch.setattr(sys, "argv", ["critics.py", "runs/critics", "--seeds", "2"])
    assert folder_and_seeds("")[1] == 2

    monkeypatch.setattr(sys, "argv", ["critics.py", "--help"])
    with pytest.raises(SystemExit):
        folder_and_seeds("Compare critics.\n\nAt length.")
    printed = capsys.readouterr().out
    assert "Compare critics." in printed and "At length." not in printed
