"""A folder that the first version of the runner has written: options, records and measurements
under their old names.

old_experiment.json holds its files (path -> content). They have `foundation` and `on_bad`,
`strength` where there is `sweep` today, and records whose commands start programs by path and end
with the settings of a measurement.
"""

import json
from pathlib import Path

import pytest

from rlhf.config import parse
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import plan
from rlhf.experiment.progress import experiment_status
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment, load_state
from rlhf.jobs.runner import RunOptions, set_jobs
from rlhf.jobs.state import PlanState
from rlhf.options.shared import NOISE_VERSION

DPO = "seed-0/dpo-beta-0.1"
FILES = json.loads((Path(__file__).parent / "old_experiment.json").read_text())


@pytest.fixture
def config(tmp_path, monkeypatch) -> ExperimentConfig:
    """The experiment, as it is found from where it was run."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    monkeypatch.chdir(tmp_path)
    return load_experiment("out")


def test_its_options_are_read_under_todays_names(config):
    assert config.initial_policy == "sft" and config.on_error == "skip"
    assert config.methods["dpo"] == {
        "program": "dpo",
        "config": "dpo.yaml",
        "sweep": {"beta": [0.1, 1]},
    }
    assert config.method_specs["best_of_n"].values == [2]
    assert parse(ExperimentConfig, ["--config", "x.yaml"]) == config


def test_all_its_jobs_are_done_and_reported(config):
    state = load_state(config)
    assert [job.name for job in state.jobs if job.name not in state.done] == []
    results = read_results(config)
    assert results.meta["missing"] == results.meta["left_out"] == []
    ends = {(p.method, p.swept, p.seed, p.step) for p in results.points}
    assert ends == {
        ("sft", None, None, 0),
        ("sft", None, 0, 0),
        ("best_of_n", 2.0, 0, 2),
        ("dpo", 0.1, 0, 4),
        ("dpo", 1.0, 0, 4),
        ("ppo", 0.02, 0, 5),
    }
    # by hand: gold is 0.3 + 0.1 prompt + 0.02 sample, and 0.25 more for PPO
    end = next(point for point in results.points if point.method == "ppo")
    assert end.values["score/gold"][2, 1] == pytest.approx(0.77)


def test_what_differs_from_an_old_record_is_named(config):
    config.n_prompts = 2
    state = PlanState(Path("out"), lengths={"dpo": 4, "ppo": 6})
    with pytest.raises(UserError) as refused:
        set_jobs(state, plan(config, state.lengths), RunOptions())
    said = str(refused.value)
    assert "measure/foundation: n_prompts was None, now 2" in said
    assert "seed-0/ppo-kl_coef-0.02: --total_episodes was 320, now 384" in said
    assert "on_error" not in said and "initial_policy" not in said


def test_nothing_is_added_to_what_was_drawn_with_another_noise(config, tmp_path):
    # all is done: nothing to add, nothing to refuse
    lengths = {"dpo": 4, "ppo": 5}
    set_jobs(PlanState(Path("out"), lengths=lengths), plan(config, lengths), RunOptions())

    # one more seed would be measured beside the first
    config.seeds = [0, 1]
    jobs = plan(config, lengths)
    with pytest.raises(UserError) as refused:
        set_jobs(PlanState(Path("out"), lengths=lengths), jobs, RunOptions())
    lines = str(refused.value).splitlines()[1:]
    told = f"sampling noise was 1, now {NOISE_VERSION}"
    assert [line for line in lines if line.strip() == f"measure/foundation: {told}"]
    assert [line for line in lines if line.strip() == f"seed-0/ppo-kl_coef-0.02: {told}"]
    # neither the reward model nor DPO samples anything, and no job of theirs is made anew
    assert not [line for line in lines if line.split(":")[0].strip() in ("seed-0/reward", DPO)]

    state = PlanState(Path("out"), lengths=lengths)
    set_jobs(state, jobs, RunOptions(changed="set aside"))
    assert state.done == {"seed-0/reward", "seed-0/dpo-beta-0.1", "seed-0/dpo-beta-1"}


def test_the_status_of_an_experiment_is_told_from_what_is_there(config, capsys):
    (Path("out") / "seed-0" / "reward" / "result.json").unlink()
    config.method_specs["ppo"].options["total_episodes"] = 640
    experiment_status(config)
    said = capsys.readouterr().out
    lines = {
        line.split("|")[1].strip(): line.split("|")[2].strip()
        for line in said.splitlines()
        if line[:1] == "|"
    }
    assert lines["seed-0/reward"] == "output missing" and lines["measure/foundation"] == "done"
    assert (
        lines["seed-0/ppo-kl_coef-0.02"]
        == lines["measure/seed-0/ppo-kl_coef-0.02"]
        == "of other options"
    )
    assert "out: 6 done, 1 output missing, 2 of other options" in said
