"""The benchmark of the quickstart's cost, with a plan of two jobs in the place of the quickstart."""

import json
import sys

import pytest

from benchmarks.speed import quickstart_cost
from benchmarks.speed.quickstart_cost import Cost, measure, page, table

# a plan of two jobs by the runner of the quickstart: one computes for half a second, one sleeps
PLAN = """
import sys
from pathlib import Path
from rlhf.jobs import runner
from rlhf.jobs.job import Job
from rlhf.jobs.runner import RunOptions, claim, run_jobs, set_jobs
from rlhf.jobs.state import PlanState

BUSY = "import time; [0 for _ in iter(lambda: time.process_time() < 0.5, False)]"
IDLE = "import time; time.sleep(0.5)"
runner.POLL_SECONDS = 0.05
runner.environment = lambda *_: None
runner.full_command = lambda _, job: [sys.executable, "-S", "-c", *job.arguments, job.outputs[0]]
WRITE = "; import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('done')"


class Display:
    started = log = lambda *_: None
    update = lambda *_: None


options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = Path(options["--run"])
jobs = [
    Job("busy", "rlhf", [BUSY + WRITE], "sample", outputs=[str(run / "a")]),
    Job("idle", "rlhf", [IDLE + WRITE], "sample", outputs=[str(run / "b")], needs=["busy"]),
]
state = PlanState(run)
how = RunOptions()
with claim(state) as signals:
    set_jobs(state, jobs, how)
    run_jobs(state, how, Display(), signals)
"""


def test_cpu_seconds_of_each_job_are_those_of_its_process(tmp_path):
    cost = measure([sys.executable, "-c", PLAN], tmp_path)
    assert list(cost.jobs) == ["busy", "idle"]
    (busy, _), (idle, idle_seconds) = cost.jobs.values()
    # an interpreter that only starts takes some 0.02
    assert 0.5 <= busy < 1.0
    assert idle < 0.25 and idle_seconds >= 0.5
    assert cost.total[0] >= busy + idle


def test_the_page_has_a_row_for_each_job_and_the_ratio():
    alone = Cost({"sft": (20.0, 21.0), "ppo": (80.0, 81.0)}, (102.0, 90.0))
    beside = Cost({"sft": (25.0, 40.0), "ppo": (90.0, 150.0)}, (122.4, 190.0))
    text = page({"alone": alone, "beside": beside}, "2026-01-01")
    assert "| sft | 20.0 | 21.0 | 25.0 | 40.0 |" in text
    assert "| all processes | 102 | 90 | 122 | 190 |" in text
    assert "1.20 times the CPU seconds" in text
    assert "beside" not in table({"alone": alone})


def test_the_busy_core_is_busy_only_while_it_is_wanted(tmp_path, monkeypatch):
    ended = tmp_path / "ended"
    monkeypatch.setattr(quickstart_cost, "BUSY", [sys.executable, "-c", "while True: pass"])
    began = quickstart_cost.children_cpu_seconds()
    with quickstart_cost.busy_core(False):
        pass
    assert quickstart_cost.children_cpu_seconds() - began == 0
    with pytest.raises(ZeroDivisionError), quickstart_cost.busy_core(True):
        ended.write_text(json.dumps({}))
        raise ZeroDivisionError
    # it was killed and reaped, so that its time is known
    assert quickstart_cost.children_cpu_seconds() > began
