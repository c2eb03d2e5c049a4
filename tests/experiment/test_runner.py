"""The runner with small scripts in the place of the programs (see fake.py)."""

import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf.errors import EarlyExit, UserError
from rlhf.experiment.plan import plan
from rlhf.experiment.run import run_experiment
from rlhf.jobs import commands, runner
from rlhf.jobs.commands import MARK, environment, full_command, programs_of
from rlhf.jobs.job import Job
from rlhf.jobs.state import PlanState
from rlhf.startup import Ranks, read_ranks
from tests.experiment import fake
from tests.experiment.example import experiment, method, options, write_files

LENGTHS = {"dpo": 4, "ppo": 5}
SMALL = {"methods": {"dpo": method(options={"max_steps": 4})}, "reward": None, "seeds": [0]}
BOTH = {
    "methods": {
        "dpo": method(options={"max_steps": 4}),
        "ppo": method("ppo", options={"total_episodes": 320}),
    }
}
BOTH["seeds"] = [0]
TRIAL = "seed-0/dpo-beta-0.1"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for one experiment; whatever its programs leave behind is ended."""
    fake.install(tmp_path, monkeypatch.setattr)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    behave(tmp_path)
    yield tmp_path
    for process in programs_of(tmp_path / "out"):
        process.kill()


def behave(folder: Path, **jobs) -> None:
    (folder / "behave.json").write_text(json.dumps(jobs.pop("jobs", {}) | jobs))


def log(folder: Path, what: str = "") -> list[str]:
    """The lines of the log that begin with `what`, without it."""
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [line.removeprefix(what).strip() for line in lines if line.startswith(what)]


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / "out" / "jobs" / f"{name}.json").read_text())


def wait_for(condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# what is done, in which order


@pytest.mark.parametrize("processes", [1, 3])
def test_everything_is_done_once_after_what_it_needs(folder, processes, monkeypatch):
    at_once, start = [], runner.start

    def counted(state, how, job):
        start(state, how, job)
        at_once.append(len(state.running))

    monkeypatch.setattr(runner, "start", counted)
    behave(folder, jobs={"": {"seconds": 0.1}})
    config = experiment(folder, **BOTH, processes=processes)
    run_experiment(config)
    jobs = plan(config, LENGTHS)
    assert (
        sorted(log(folder, "end"))
        == sorted(log(folder, "begin"))
        == sorted(job.name for job in jobs)
    )
    lines = log(folder)
    for job in jobs:
        assert all(
            lines.index(f"end {other}") < lines.index(f"begin {job.name}") for other in job.needs
        )
    assert max(at_once) == processes
    assert lines[-1] == "report" and lines.count("report") == 1
    for job in jobs:
        about = record(folder, job.name)
        assert about["finished"] and about["exit"] == 0 and about["command"] == job.command
        assert (folder / "out" / "logs" / f"{job.name}.log").is_file()


def test_what_is_done_is_not_done_again_and_a_new_seed_is_added(folder):
    run_experiment(experiment(folder, **BOTH))
    first = log(folder, "begin")
    run_experiment(experiment(folder, **BOTH, processes=2, launcher="python"))
    assert log(folder, "begin") == first and log(folder, "report") == ["", ""]
    run_experiment(experiment(folder, **BOTH | {"seeds": [0, 2]}))
    assert len(log(folder, "begin")) == len(first) + 6
    assert all("seed-2" in name for name in log(folder, "begin")[len(first) :])


def test_a_file_that_is_gone_is_made_again_and_nothing_else(folder):
    run_experiment(experiment(folder, **BOTH))
    before = len(log(folder, "begin"))
    (folder / "out" / "seed-0" / "reward" / "result.json").unlink()
    (folder / "out" / "measures" / TRIAL / "done.json").write_text('{"finished": ')  # torn
    run_experiment(experiment(folder, **BOTH))
    assert sorted(log(folder, "begin")[before:]) == [f"measure/{TRIAL}", "seed-0/reward"]


def test_matched_lengths_follow_from_the_pilots(folder):
    # a pilot's step costs 10; nothing else costs anything here: 450 / 10 = 45 steps
    methods = {"dpo": method(), "ppo": method("ppo")}
    run_experiment(
        experiment(folder, methods=methods, seeds=[0], budget={"match": "flops", "total": 450})
    )
    command = record(folder, TRIAL)["command"]
    assert command[command.index("--max_steps") + 1] == "45"
    lines = log(folder)
    trials = [
        i
        for i, line in enumerate(lines)
        if line.startswith("begin seed-0/dpo") or line.startswith("begin seed-0/p")
    ]
    assert max(
        lines.index("end pilot/dpo"), lines.index("end pilot/ppo"), lines.index("end seed-0/reward")
    ) < min(trials)


def test_a_budget_that_is_too_small_stops_all_after_the_pilots(folder):
    behave(folder, jobs={"measure/seed-0/foundation": {"seconds": 600}})
    with pytest.raises(
        UserError, match=r"budget: of 15 flops 0 go into pairs .*1 steps of 'dpo' \(10 each"
    ):
        run_experiment(
            experiment(
                folder,
                methods={"dpo": method()},
                budget={"match": "flops", "total": 15},
                processes=3,
            )
        )
    assert not any("dpo-" in name for name in log(folder, "begin"))
    assert programs_of(folder / "out") == []


# what goes wrong


def test_a_program_that_was_killed_is_started_again(folder):
    behave(folder, jobs={TRIAL: {"exit": [-9, 75, 0]}})
    run_experiment(experiment(folder, **SMALL))
    assert log(folder, "begin").count(TRIAL) == 3 and log(folder, "end").count(TRIAL) == 1
    assert record(folder, TRIAL)["finished"]


def test_a_program_that_fails_each_time_is_given_up(folder):
    behave(folder, jobs={TRIAL: {"exit": [1]}})
    with pytest.raises(EarlyExit) as stopped:
        run_experiment(experiment(folder, **SMALL))
    assert stopped.value.code == 1 and log(folder, "begin").count(TRIAL) == runner.ATTEMPTS == 3
    assert "finished" not in record(folder, TRIAL) and log(folder, "report") == []


def test_what_a_program_refuses_is_not_tried_again_and_holds_up_only_what_needs_it(folder):
    behave(folder, jobs={"seed-0/reward": {"exit": [2]}})
    with pytest.raises(EarlyExit) as stopped:
        run_experiment(experiment(folder, **BOTH))
    # PPO's run, what the reward model would score: PPO's policies, DPO's, the foundation
    said = str(stopped.value)
    assert said.startswith("1 of 7 jobs failed; 4 that need them were not started:")
    assert (
        f"seed-0/reward: exit code 2, {folder}/out/logs/seed-0/reward.log" in said
        and stopped.value.code == 1
    )
    assert log(folder, "begin").count("seed-0/reward") == 1
    assert (
        sorted(log(folder, "end")) == ["measure/foundation", TRIAL] and log(folder, "report") == []
    )
    behave(folder)
    run_experiment(experiment(folder, **BOTH))  # mended: only the rest is done
    assert len(log(folder, "end")) == len(set(log(folder, "end"))) == 7


def test_what_needs_a_blocked_job_is_blocked_too(tmp_path):
    def job(name, *needs):
        return Job(name=name, program="rlhf", arguments=[], kind="trial", needs=list(needs))

    # a has failed: b needs it and c needs b; d needs nothing
    state = PlanState(tmp_path)
    state.set_jobs([job("a"), job("b", "a"), job("c", "b"), job("d")])
    state.failed, state.done = {"a": 1}, set()
    found = [state.status(planned) for planned in state.jobs]
    assert found == ["failed", "blocked", "blocked", "waiting"]


def test_a_run_that_a_guard_has_stopped_is_a_result(folder):
    behave(folder, jobs={TRIAL: {"exit": [3], "stopped": "kl above 30"}})
    run_experiment(experiment(folder, **SMALL))
    assert record(folder, TRIAL)["exit"] == 3 and log(folder, "end").count(f"measure/{TRIAL}") == 1


def test_torchrun_says_1_when_a_guard_has_stopped_a_run(folder):
    behave(folder, jobs={TRIAL: {"exit": [1], "stopped": "kl above 30"}})
    run_experiment(experiment(folder, **SMALL))
    assert log(folder, "begin").count(TRIAL) == 1 and record(folder, TRIAL)["finished"]


@pytest.mark.parametrize("code,said", [(3, "exit code 3"), (0, "ended without a result")])
def test_an_end_without_a_result_is_a_failure(folder, code, said):
    behave(folder, jobs={TRIAL: {"exit": [code], "nothing": True}})
    with pytest.raises(
        EarlyExit, match=f"{TRIAL}: {said}, {folder}/out/logs/{TRIAL}.log"
    ) as stopped:
        run_experiment(experiment(folder, **SMALL))
    assert stopped.value.code == 1 and log(folder, "begin").count(TRIAL) == 1


# options that change


def test_other_options_are_refused_with_what_differs_and_set_aside_when_asked(folder):
    more = {
        "seeds": [0],
        "methods": {"dpo": method(sweep={"beta": [0.1, 0.5]}, options={"max_steps": 4})},
    }
    run_experiment(experiment(folder, **more))
    before = log(folder, "begin")
    more["methods"]["dpo"]["options"] = {"max_steps": 6}
    with pytest.raises(UserError) as refused:
        run_experiment(experiment(folder, **more))
    said = str(refused.value)
    assert (
        "holds results of other options" in said
        and "--redo true" in said
        and "another --output_dir" in said
    )
    assert f"  {TRIAL}: --max_steps was 4, now 6; --save_steps was 2, now 3" in said
    assert f"  measure/{TRIAL}: what it reads or depends on" in said and "reward" not in said
    assert log(folder, "begin") == before
    assert yaml.safe_load((folder / "out" / "experiment.yaml").read_text())["methods"]["dpo"][
        "options"
    ] == {"max_steps": 4}
    (folder / "out" / TRIAL / "mine").touch()
    run_experiment(experiment(folder, **more, redo=True))
    again = log(folder, "begin")[len(before) :]
    trials = [TRIAL, "seed-0/dpo-beta-0.5"]
    assert sorted(again) == sorted([*trials, *(f"measure/{name}" for name in trials)])
    (aside,) = (folder / "out" / "aside" / "seed-0").glob("dpo-beta-0.1-*")
    assert (aside / "dpo-beta-0.1" / "mine").is_file() and not (
        folder / "out" / TRIAL / "mine"
    ).exists()
    assert (
        len(
            list(
                (folder / "out" / "aside" / "measure" / "seed-0").glob(
                    "dpo-beta-0.1-*/dpo-beta-0.1/done.json"
                )
            )
        )
        == 1
    )
    run_experiment(experiment(folder, **more))  # without being asked again: all of it fits now


def test_how_it_is_measured_is_named_in_the_difference(folder):
    run_experiment(experiment(folder, **SMALL))
    with pytest.raises(UserError, match="measure/foundation: n_prompts was None, now 2"):
        run_experiment(experiment(folder, **SMALL, n_prompts=2))
    before = len(log(folder, "begin"))
    run_experiment(experiment(folder, **SMALL, n_prompts=2, redo=True))
    assert len(log(folder, "begin")) == before + 3 and TRIAL not in log(folder, "begin")[before:]


def test_a_mistake_that_a_program_has_refused_is_mended_without_further_ado(folder):
    behave(folder, jobs={TRIAL: {"exit": [2]}})
    with pytest.raises(EarlyExit):
        run_experiment(experiment(folder, **SMALL))
    behave(folder)
    mended = SMALL | {"methods": {"dpo": method(options={"max_steps": 4, "learning_rate": 1e-3})}}
    run_experiment(experiment(folder, **mended))
    assert not (folder / "out" / "aside").exists()


def test_votes_of_other_annotators_are_not_added_to_those_of_the_first(folder):
    write_files(folder)
    for name in ("sample", "annotate"):
        (folder / f"{name}.yaml").write_text("seed: 0")
    pairs = {n: str(folder / f"{n}.yaml") for n in ("sample", "annotate")} | {
        "prompts": [str(folder / "prompts.jsonl")]
    }
    more = SMALL | {"pairs": pairs}
    run_experiment(experiment(folder, **more))
    before = len(log(folder, "begin"))
    (folder / "out" / "seed-0" / "preferences.db").write_text("votes of the first")
    (folder / "annotate.yaml").write_text("noise: 0.5")
    run_experiment(experiment(folder, **more, redo=True))
    again = log(folder, "begin")[before:]
    assert {"seed-0/sample", "seed-0/annotate", TRIAL} <= set(
        again
    ) and "measure/foundation" not in again
    assert (folder / "out" / "seed-0" / "preferences.db").read_text() == ""
    kept = list((folder / "out" / "aside" / "seed-0").glob("annotate-*/preferences.db"))
    assert [file.read_text() for file in kept] == ["votes of the first"]


def test_sampling_that_was_cut_off_begins_with_an_empty_store(folder):
    # sampling adds its cost to what the store says, so that a store which was full when its program
    # was killed would count it twice
    write_files(folder)
    for name in ("sample", "annotate"):
        (folder / f"{name}.yaml").write_text("seed: 0")
    pairs = {name: str(folder / f"{name}.yaml") for name in ("sample", "annotate")}
    more = SMALL | {"pairs": pairs | {"prompts": [str(folder / "prompts.jsonl")]}}
    store = folder / "out" / "seed-0" / "preferences.db"
    store.parent.mkdir(parents=True)
    store.write_text("samples and their cost")
    run_experiment(experiment(folder, **more))
    assert store.read_text() == "" and log(folder, "begin").count("seed-0/sample") == 1
    assert len(list((folder / "out" / "aside" / "seed-0").glob("sample-*/preferences.db"))) == 1


# signals, crashes, two at once


def test_a_second_runner_is_refused(folder):
    (folder / "out").mkdir()
    with open(folder / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is at work in this folder"):
            run_experiment(experiment(folder))
    assert log(folder) == []


def runner_process(folder: Path, **more) -> subprocess.Popen:
    """`rlhf experiment run` in a process of its own, with fake programs."""
    (folder / "x.yaml").write_text(yaml.safe_dump(options(folder, **more)))
    command = [sys.executable, fake.__file__, "runner", str(folder), str(folder / "x.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate()
    return process.returncode, said


def test_a_signal_lets_the_programs_save_and_the_same_command_goes_on(folder):
    behave(folder, jobs={name: {"seconds": 600} for name in ("seed-0/reward", TRIAL)})
    process = runner_process(folder, **BOTH, processes=2)
    wait_for(lambda: {"seed-0/reward", TRIAL} <= set(log(folder, "begin")))
    process.send_signal(signal.SIGTERM)
    code, said = finished(process)
    assert code == 75 and "stopped by SIGTERM; the same command resumes" in said
    assert (
        sorted(log(folder, "saved")) == sorted(["seed-0/reward", TRIAL])
        and programs_of(folder / "out") == []
    )
    behave(folder)
    code, said = finished(runner_process(folder, **BOTH, processes=2))
    assert code == 0, said
    assert len(log(folder, "end")) == len(set(log(folder, "end"))) == 7


def test_a_runner_that_is_killed_at_any_moment_leaves_nothing_that_the_next_does_not_finish(folder):
    # long beside what it takes to look for them, on a busy machine too
    behave(folder, jobs={"": {"seconds": 1.5}})
    moments = random.Random(0)
    orphans = 0
    for _ in range(3):
        known = len(log(folder, "begin"))
        process = runner_process(folder, **BOTH, processes=3)
        wait_for(lambda known=known: len(log(folder, "begin")) > known)
        time.sleep(0.3 * moments.random())
        process.kill()
        process.communicate()
        orphans += len(programs_of(folder / "out"))
    assert orphans > 0  # else this would show nothing
    code, said = finished(runner_process(folder, **BOTH, processes=3))
    assert code == 0, said
    jobs = plan(experiment(folder, **BOTH), LENGTHS)
    assert sorted(log(folder, "end")) == sorted(job.name for job in jobs)  # each once
    assert log(folder, "clash") == []  # no two programs in one folder at a time
    assert all(record(folder, job.name)["finished"] for job in jobs)


def test_orphans_are_ended_before_anything_is_started(folder):
    behave(folder, jobs={TRIAL: {"seconds": 600}})
    process = runner_process(folder, **SMALL)
    wait_for(lambda: TRIAL in log(folder, "begin"))
    process.kill()
    process.communicate()
    behave(folder)
    code, said = finished(runner_process(folder, **SMALL))
    assert code == 0 and f"{folder}/out: ending 1 processes of a run that was cut off" in said
    lines = log(folder)
    assert lines.index(f"saved {TRIAL}") < len(lines) - 1 - lines[::-1].index(f"begin {TRIAL}")
    assert log(folder, "clash") == []


def test_a_signal_goes_to_the_program_and_not_to_what_has_launched_it(folder):
    behave(folder, jobs={TRIAL: {"launch": "rank", "seconds": 600}})
    process = runner_process(folder, **SMALL)
    wait_for(lambda: TRIAL in log(folder, "begin"))
    process.send_signal(signal.SIGTERM)
    assert finished(process)[0] == 75
    assert log(folder, "saved") == [TRIAL]  # the launcher would have killed it
    assert programs_of(folder / "out") == []


def test_a_launcher_that_is_about_to_launch_is_ended_too(folder):
    # beside a program that is under way, which takes the signal as it should
    behave(
        folder,
        jobs={
            TRIAL: {"launch": "slowly", "seconds": 600},
            "measure/foundation": {"launch": "rank", "seconds": 600},
        },
    )
    process = runner_process(folder, **SMALL, processes=2)
    wait_for(
        lambda: log(folder, "launching") == [TRIAL] and "measure/foundation" in log(folder, "begin")
    )
    process.send_signal(signal.SIGTERM)
    assert finished(process)[0] == 75
    time.sleep(2.2)  # by now it would have launched
    assert programs_of(folder / "out") == [] and TRIAL not in log(folder, "begin")
    assert log(folder, "saved") == ["measure/foundation"]


def test_a_launcher_that_was_killed_is_not_started_again_beside_its_program(folder):
    behave(folder, jobs={TRIAL: {"launch": "crash", "seconds": 0.5}})
    run_experiment(experiment(folder, **SMALL))
    assert log(folder, "clash") == [] and log(folder, "saved") == [TRIAL]
    assert log(folder, "begin").count(TRIAL) == 2 and log(folder, "end").count(TRIAL) == 1


def test_only_the_programs_of_this_folder_are_ended(folder):
    other = {**os.environ, MARK: str(folder / "other")}
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=other)
    try:
        run_experiment(experiment(folder, **SMALL))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


# how programs are started


def words(launcher: str, program: str = "launch.dpo", arguments=("--seed", "0")) -> list[str]:
    return full_command(launcher, Job("x", program, list(arguments), "trial"))


def test_what_launches_a_program(monkeypatch):
    monkeypatch.setattr(commands, "has_accelerator", lambda: True)
    module = ["launch.dpo", "--seed", "0"]
    script = ["-m", *module]
    assert words("python") == [sys.executable, *script]
    assert words("python -u") == [sys.executable, "-u", *script]
    first, second = (words("deepspeed --num_accelerators 1") for _ in range(2))
    assert first[:4] == ["deepspeed", "--num_accelerators", "1", "--master_port"] and first[5:] == [
        "--module",
        *module,
    ]
    assert int(first[4]) > 1023 and first[4] != second[4]  # several at a time
    torchrun = words("'/my tools/torchrun' --nproc_per_node 2")
    assert torchrun[:4] == ["/my tools/torchrun", "--nproc_per_node", "2", "--master_port"]
    for own in ("--master_port 99", "--master_port=99", "--master-port 99"):
        assert words(f"torchrun {own}") == ["torchrun", *shlex.split(own), *script]


def test_commands_of_rlhf_run_without_a_launcher():
    arguments = ("experiment", "measure", "out", "--trial", "x")
    assert words("deepspeed", "rlhf", arguments) == [sys.executable, "-m", "rlhf.cli", *arguments]


def test_the_environment_marks_a_program_and_finds_the_tools_beside_this_python(tmp_path):
    found = environment(tmp_path / "out", Job("x", "rlhf", [], "measure"))
    assert found[MARK] == str((tmp_path / "out").resolve())
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_one_process_on_a_cpu_is_started_without_its_launcher(monkeypatch):
    monkeypatch.setattr(commands, "has_accelerator", lambda: False)
    for option in ("--num_accelerators", "--num_gpus"):
        started = words(f"deepspeed {option} 1")
        assert started[0] == "env" and started[-5:] == [
            *(sys.executable, "-m", "launch.dpo", "--seed", "0")
        ]
        ranks = read_ranks(dict(word.split("=") for word in started[1:-5]))
        assert ranks == Ranks(rank=0, size=1, local_rank=0, local_size=1)
    assert words("deepspeed --num_accelerators 2")[0] == "deepspeed"


@pytest.mark.parametrize(
    ("processes", "threads", "expected"), [(1, None, None), (2, None, "4"), (2, 1, "1")]
)
def test_threads_of_a_program_on_a_cpu(monkeypatch, tmp_path, processes, threads, expected):
    monkeypatch.setattr(commands, "has_accelerator", lambda: False)
    monkeypatch.setattr(commands.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = Job("x", "rlhf", [], "measure")
    assert environment(tmp_path, job, processes, threads).get("OMP_NUM_THREADS") == expected
    # the user's choice holds
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(tmp_path, job, processes, threads)["OMP_NUM_THREADS"] == "3"
