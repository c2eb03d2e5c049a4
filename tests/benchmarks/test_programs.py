import json

import pytest

from benchmarks.programs import finished, paired


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
