"""The quickstart's plan, run with a small script in the place of every program."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.jobs import commands, runner
from rlhf.jobs.job import fingerprints
from rlhf.jobs.steps import last_states
from rlhf.sandbox import quickstart as module
from rlhf.sandbox.quickstart import QuickstartConfig, jobs

NAMES = ["sandbox", "sft", "sample", "annotate", "reward", "dpo", "ppo", "compare"]
# leaves the outputs of a job, and says so; "sample" must find no store, and "fail" in the folder is
# a mistake
PROGRAM = """
import json, pathlib, sys
name, *outputs = sys.argv[1:]
print(f"output of {name}")
if pathlib.Path(f"fail-{name}").exists():
    sys.exit(2)
for output in map(pathlib.Path, outputs):
    assert name != "sample" or not output.exists(), "votes on other responses would stay"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"finished": "now"}))
with open("ran", "a") as ran:
    ran.write(f"{name}\\n")
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A function that runs the pipeline with commands that only leave their files, and returns the
    jobs that ran.
    """

    def command(launcher, job):
        return [sys.executable, "-c", PROGRAM, job.name, *job.outputs]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(module, "code_files", list)
    monkeypatch.setattr(module, "show_report", lambda report: None)
    monkeypatch.setattr(runner, "full_command", command)
    monkeypatch.setattr(runner, "code_version", dict)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(commands, "has_accelerator", lambda: False)

    def run(**more):
        Path("ran").write_text("")
        module.quickstart(QuickstartConfig(**more))
        # jobs that run side by side end in any order
        return sorted(Path("ran").read_text().split(), key=NAMES.index)

    return run


def config(tmp_path, name, text):
    file = tmp_path / "configs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_every_command_and_its_output_are_shown_and_kept(pipeline, capfdbinary, tmp_path):
    assert pipeline() == NAMES
    said = capfdbinary.readouterr().out.decode()
    assert "[2/8] sft: imitate the shop's answers" in said
    assert "$ deepspeed --num_accelerators 1 --module launch.sft --config " in said
    assert [said.count(f"output of {name}\n") for name in NAMES] == [1] * 8
    assert "output of dpo" in (tmp_path / "runs/quickstart/logs/dpo.log").read_text()
    assert "runs/quickstart/report/report.json" in said


def test_a_second_run_does_nothing_and_says_so(pipeline, capsys):
    assert pipeline() == NAMES
    assert pipeline() == []
    assert "reused: sandbox, sft" in capsys.readouterr().out


def test_a_change_runs_its_job_and_those_that_depend_on_it_again(pipeline, tmp_path):
    pipeline()
    config(tmp_path, "dpo.yaml", "beta: 0.2")
    assert pipeline() == ["dpo", "compare"]
    config(tmp_path, "reward.yaml", "seed: 1")
    assert pipeline() == ["reward", "ppo", "compare"]


def test_another_sft_policy_or_other_annotators_get_a_fresh_store(pipeline, tmp_path):
    pipeline()
    config(tmp_path, "sft.yaml", "max_steps: 1")
    assert pipeline() == NAMES[1:]
    config(tmp_path, "annotate.yaml", "noise: 5")
    assert pipeline() == NAMES[2:]


def test_a_missing_result_is_made_again(pipeline, tmp_path):
    pipeline()
    (tmp_path / "runs/quickstart/ppo/result.json").unlink()
    assert pipeline() == ["ppo"]


def test_results_that_no_record_speaks_of_are_made_anew(pipeline, tmp_path):
    old = tmp_path / "runs/quickstart/sft/result.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"finished": "long ago"}')
    assert pipeline() == NAMES and "now" in old.read_text()


def test_a_failure_ends_the_pipeline_and_names_the_log(pipeline, tmp_path):
    (tmp_path / "fail-dpo").touch()
    with pytest.raises(
        UserError, match=r"step 'dpo' failed, exit code 2; .* runs/quickstart/logs/dpo.log"
    ):
        pipeline()
    ran = (tmp_path / "ran").read_text().split()
    assert ran[:5] == NAMES[:5] and "compare" not in ran
    (tmp_path / "fail-dpo").unlink()
    assert pipeline()[0] == "dpo"


def test_dpo_runs_beside_reward_and_ppo_where_there_are_two_cores(pipeline, monkeypatch):
    started, most = [], []
    real_start = runner.start

    def start(state, how, job):
        real_start(state, how, job)
        started.append(job.name)
        most.append(len(state.running))

    monkeypatch.setattr(runner, "start", start)
    for cores, at_a_time in ((1, 1), (16, 2)):
        monkeypatch.setattr(module.os, "cpu_count", lambda cores=cores: cores)
        pipeline(run=f"runs/{cores}", world=f"runs/world-{cores}")
        assert started == NAMES and max(most) == at_a_time
        started.clear(), most.clear()


def test_lines_of_jobs_side_by_side_begin_with_their_names():
    text = b"\n$ deepspeed\n  0%| | 1/4\r 50%| | 2/4\r\ndone\n"
    assert last_states(text) == [b"$ deepspeed", b" 50%| | 2/4", b"done"]


def test_seed_and_folder_reach_every_job():
    todo = jobs(QuickstartConfig(run="runs/other", seed=7))
    for job in todo[1:]:
        assert "7" in job.command and any("runs/other" in word for word in job.command), job.name
    assert len(set(fingerprints(todo).values())) == len(todo)
    # PPO learns on the prompts of DPO's pairs
    assert json.dumps(todo[6].command).count("preferences.db") == 1


def test_a_signal_ends_the_pipeline_with_code_75(tmp_path):
    command = [sys.executable, "-m", "rlhf.cli", "sandbox", "quickstart"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "runs/quickstart/logs/sandbox.log"
    end = time.monotonic() + 300
    while not log.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 75 and "stopped by SIGINT; the same command resumes" in said
    assert not (tmp_path / "runs/quickstart/jobs/sft.json").exists()
