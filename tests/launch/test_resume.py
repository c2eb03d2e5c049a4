"""A run that was cut off anywhere goes on to the same last bit."""

import json
import os
import signal
from pathlib import Path

import pytest

from rlhf.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from rlhf.runs import checkpoint
from rlhf.runs.tracking import read_metrics
from tests.launch.conftest import SMALL, differences, door, flags_of, ppo_flags

STEPS = {"sft": "5", "reward": "5", "dpo": "5"}
EACH = ["--save_steps", "1", "--save_total_limit", "1"]


class Crash(BaseException):
    """The process ends here; nothing catches it."""


def flags(name, runs, files, output, *more):
    data = files["instructions" if name == "sft" else "pairs"]
    start = (
        json.loads((runs / "sft" / "rlhf.json").read_text())["base_model_name_or_path"]
        if name == "sft"
        else None
    )
    common = flags_of(name, start or runs / "sft", data, output)
    if name == "ppo":
        scores = [
            "--missing_eos_score",
            "none",
            "--normalize_scores",
            "true",
            "--kl_target",
            "6",
            "--kl_horizon",
            "64",
        ]
        moving = ["--reference_ema", "0.5", "--total_episodes", "32"]
        return [*common, *ppo_flags(runs), *scores, *moving, *EACH, *more]
    small = [*SMALL[:2], "--max_steps", STEPS[name], *SMALL[4:]]
    return [*common, *small, "--learning_rate", "1e-2", "--logging_steps", "2", *EACH, *more]


@pytest.fixture(scope="session")
def whole(runs, files, tmp_path_factory):
    """The uninterrupted run of a program, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            door(name)(flags(name, runs, files, made[name]))
        return made[name]

    return of


def crash_at(monkeypatch, name, arguments, number):
    """Run until the checkpoint writer has passed `number` points, and no further; False if it has
    fewer.
    """
    passed = []

    def point(where):
        passed.append(where)
        if len(passed) == number:
            raise Crash(where)

    monkeypatch.setattr(checkpoint, "crash_point", point)
    try:
        door(name)(arguments)
        return False
    except Crash:
        return True
    finally:
        monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)


def points_of_one_checkpoint(monkeypatch, name, arguments):
    """(points passed up to the end of the second checkpoint with its pruning, points up to the end
    of the first).
    """
    passed = []
    monkeypatch.setattr(checkpoint, "crash_point", passed.append)
    door(name)(arguments)
    monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)
    last = "renamed" if name == "ppo" else "sealed"
    ends = [i for i, where in enumerate(passed, 1) if where == last]
    return ends[0], ends[1] + 1  # pruning removes the first one after the second


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_a_crash_at_any_point_of_the_writer_costs_nothing(
    name, runs, files, whole, tmp_path, monkeypatch, capsys
):
    first, last = points_of_one_checkpoint(
        monkeypatch, name, flags(name, runs, files, tmp_path / "count")
    )
    assert last - first >= 10
    for number in range(first, last + 1):
        output = tmp_path / f"at-{number}"
        arguments = flags(name, runs, files, output)
        assert crash_at(monkeypatch, name, arguments, number)
        capsys.readouterr()
        door(name)(arguments)
        said = capsys.readouterr().out  # a run that began anew would end equal too
        assert "after step 1\n" in said or "after step 2\n" in said, (
            f"after a crash at point {number}: {said}"
        )
        assert differences(whole(name), output) == [], f"after a crash at point {number}"


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_crash_after_a_checkpoint_costs_nothing(
    name, runs, files, whole, tmp_path, monkeypatch, capsys
):
    seals = 0

    def point(where):
        nonlocal seals
        seals += where == "sealed"
        if seals == 3:
            raise Crash

    monkeypatch.setattr(checkpoint, "crash_point", point)
    with pytest.raises(Crash):
        door(name)(flags(name, runs, files, tmp_path))
    monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)
    door(name)(flags(name, runs, files, tmp_path))
    assert "after step 3\n" in capsys.readouterr().out
    assert differences(whole(name), tmp_path) == []


@pytest.mark.parametrize("name,number", [("ppo", signal.SIGTERM), ("dpo", signal.SIGINT)])
def test_a_signal_ends_the_step_saves_and_says_so(
    name, number, runs, files, whole, tmp_path, monkeypatch, capsys
):
    from rlhf.runs.tracking import Tracker

    log = Tracker.log

    def log_and_be_stopped(self, metrics, step):
        log(self, metrics, step)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Tracker, "log", log_and_be_stopped)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        door(name)(flags(name, runs, files, tmp_path, "--save_steps", "0"))
    assert stop.value.code == EXIT_INTERRUPTED
    assert f"stopped by {number.name} after step" in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(Tracker, "log", log)
    door(name)(flags(name, runs, files, tmp_path))
    assert "resuming from" in capsys.readouterr().out
    assert differences(whole(name), tmp_path) == []
    assert signal.getsignal(number) is handler


def test_a_finished_run_says_that_it_is_finished(runs, files, whole, capsys):
    before = (whole("ppo") / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        door("ppo")(flags("ppo", runs, files, whole("ppo")))
    assert stop.value.code == 0 and "is finished" in capsys.readouterr().out
    assert (whole("ppo") / "metrics.jsonl").read_bytes() == before


def test_a_fixed_option_is_refused_with_the_difference_shown(runs, files, whole, capsys):
    with pytest.raises(SystemExit) as stop:
        door("ppo")(
            flags("ppo", runs, files, whole("ppo"), "--kl_coef", "0.2", "--logging_steps", "3")
        )
    said = capsys.readouterr().err
    assert stop.value.code == EXIT_USER_ERROR
    assert "kl_coef: was 0.05, now 0.2" in said and "logging_steps" not in said


@pytest.mark.parametrize(
    "name,more", [("ppo", ("--total_episodes", "48")), ("sft", ("--max_steps", "7"))]
)
def test_a_finished_run_can_be_made_longer(name, more, runs, files, tmp_path):
    door(name)(flags(name, runs, files, tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    door(name)(flags(name, runs, files, tmp_path, *more))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    steps = [r["step"] for r in rows]
    assert max(steps) == (6 if name == "ppo" else 7) and steps == sorted(steps)
    kept = [r for r in rows if r["step"] < (4 if name == "ppo" else 5)]
    assert [json.dumps(untouched) for untouched in kept] == before[: len(kept)]


def test_a_run_resumed_at_the_end_of_an_epoch_trains_on(runs, files, tmp_path):
    pairs = flags("dpo", runs, files, tmp_path, "--max_steps", "-1", "--num_train_epochs", "1")
    door("dpo")(pairs)
    end = max(r["step"] for r in read_metrics(tmp_path / "metrics.jsonl"))
    door("dpo")([*pairs, "--num_train_epochs", "2"])
    assert max(r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")) == 2 * end


def interrupted(monkeypatch, runs, files, output, after=3, *more):
    """A PPO run that has ended in the middle, with several checkpoints."""
    seals = 0

    def point(where):
        nonlocal seals
        seals += where == "renamed"
        if seals == after:
            raise Crash

    monkeypatch.setattr(checkpoint, "crash_point", point)
    with pytest.raises(Crash):
        door("ppo")(flags("ppo", runs, files, output, "--save_total_limit", "5", *more))
    monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)


def test_a_damaged_checkpoint_is_passed_over_by_name(
    runs, files, whole, tmp_path, monkeypatch, capsys
):
    interrupted(monkeypatch, runs, files, tmp_path)
    damaged = tmp_path / "checkpoints" / "step-000003" / "learner" / "plain.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    door("ppo")(flags("ppo", runs, files, tmp_path))
    said = capsys.readouterr().out
    assert f"skipping {damaged.parent.parent}: learner/plain.pt is not what was written" in said
    assert "step-000002, after step 2" in said
    assert differences(whole("ppo"), tmp_path) == []


def test_a_run_goes_on_from_the_checkpoint_it_is_told(
    device, runs, files, whole, tmp_path, monkeypatch, capsys
):
    interrupted(monkeypatch, runs, files, tmp_path)
    first = tmp_path / "checkpoints" / "step-000001"
    door("ppo")(flags("ppo", runs, files, tmp_path, "--resume", str(first)))
    assert f"resuming from {first}, after step 1" in capsys.readouterr().out
    assert differences(whole("ppo"), tmp_path) == []


def test_other_data_is_refused(runs, files, tmp_path, monkeypatch, capsys):
    data = tmp_path / "p.jsonl"
    text = Path(files["pairs"]).read_text()
    data.write_text(text)
    interrupted(monkeypatch, runs, files, tmp_path / "run", 1, "--data", str(data))
    data.write_text(text.replace("where is my red lamp", "where was my red lamp"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        door("ppo")(flags("ppo", runs, files, tmp_path / "run", "--data", str(data)))
    assert stop.value.code == EXIT_USER_ERROR and "not the rows that" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_newest_and_the_best_checkpoint_are_kept(runs, files, tmp_path):
    more = ("--total_episodes", "48", "--eval_steps", "1", "--save_total_limit", "2")
    door("ppo")(flags("ppo", runs, files, tmp_path, *more))
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    scores = {
        r["step"]: r["eval/score/total"]
        for r in read_metrics(tmp_path / "metrics.jsonl")
        if "eval/score/total" in r
    }
    scores.pop(0)
    best = max(scores, key=lambda step: (scores[step], step))
    assert left == [f"step-{n:06d}" for n in sorted({5, 6, best})]


def test_a_checkpoint_holds_adapters_that_can_be_used(runs, files, whole):
    from rlhf.model.loading import load_model

    folder = whole("ppo") / "checkpoints" / "step-000004"
    assert load_model(str(folder)).adapter_path == str(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        whole("ppo") / "adapter_model.safetensors"
    ).read_bytes()


def test_another_reward_model_is_refused(runs, files, tmp_path, monkeypatch, capsys):
    import shutil

    reward = tmp_path / "reward"
    shutil.copytree(runs / "reward", reward)
    more = ("--reward", f"[{{model: {reward}}}]")
    interrupted(monkeypatch, runs, files, tmp_path / "run", 1, *more)
    shift = json.loads((reward / "reward.json").read_text())
    (reward / "reward.json").write_text(
        json.dumps(shift | {"scale": 2.0 * shift.get("scale", 1.0)})
    )
    with pytest.raises(SystemExit) as stop:
        door("ppo")(flags("ppo", runs, files, tmp_path / "run", *more))
    assert (
        stop.value.code == EXIT_USER_ERROR
        and "its files have changed since" in capsys.readouterr().err
    )


def test_a_run_that_begins_anew_leaves_nothing_of_the_old_one(runs, files, tmp_path):
    """An adapter beside whole weights would be taken for the run's result."""
    from rlhf.model.loading import load_model

    small = ["--max_steps", "1", "--overwrite_output_dir", "true"]
    door("sft")(flags("sft", runs, files, tmp_path, *small))
    assert load_model(str(tmp_path)).adapter_path
    door("sft")(flags("sft", runs, files, tmp_path, *small, "--merge", "true"))
    assert (tmp_path / "model.safetensors").is_file() and load_model(
        str(tmp_path)
    ).adapter_path is None
    import yaml

    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["overwrite_output_dir"] is False and written["resume"] == "auto"


def test_a_checkpoint_is_compared_as_its_run(whole):
    from rlhf.compare.runs import hashes, run_config

    folder = whole("ppo") / "checkpoints" / "step-000004"
    assert run_config(folder) == run_config(whole("ppo")) and run_config(folder)["reward"]
    assert hashes(str(folder)) == hashes(str(whole("ppo"))) and hashes(str(folder))


def test_what_ended_a_finished_run_is_what_has_to_be_raised(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from rlhf.errors import EarlyExit
    from rlhf.runs import start as runs_module

    monkeypatch.setattr(runs_module, "check_fixed", lambda *_: None)
    (tmp_path / "config.yaml").write_text("max_steps: 2\nnum_train_epochs: 1.0\n")

    def finished(max_steps, num_train_epochs=1.0):
        config = SimpleNamespace(
            output_dir=str(tmp_path),
            resume="auto",
            max_steps=max_steps,
            num_train_epochs=num_train_epochs,
        )
        runs_module.check_finished("sft", config, {"finished": "today"})

    with pytest.raises(EarlyExit, match="raise --max_steps"):
        finished(2)
    finished(4)
    finished(-1)  # to the end of the epochs
    (tmp_path / "config.yaml").write_text("max_steps: -1\nnum_train_epochs: 1.0\n")
    with pytest.raises(EarlyExit, match="raise --num_train_epochs"):
        finished(-1)
