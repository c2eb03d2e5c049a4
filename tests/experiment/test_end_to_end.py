"""A real experiment on a tiny model: every program is the real one, started as `rlhf experiment
run` starts it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.cost import pilot_cost, planned_lengths, run_cost
from rlhf.experiment.plan import pilot, trial
from rlhf.experiment.results import read_rows
from rlhf.jobs.commands import programs_of
from tests.conftest import ROOT
from tests.launch.conftest import door, write_data

# about a minute on two idle cores; the programs load torch nine times
pytestmark = pytest.mark.timeout(1200)
OUT = "my runs/out"  # relative, and with a space, through all programs
TRAINING = {
    "per_device_train_batch_size": 4,
    "lora_r": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}
POLICIES = {"measures/seed-0/dpo-beta-0.1": ["step-000002", "step-000003"],
            "measures/seed-0/ppo-kl_coef-0.02": ["step-000001", "step-000002"],
            "measures/seed-0/foundation": ["step-000000", "best-of-000002"]}  # fmt: skip


def rlhf(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlhf.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    logs = (
        "\n".join(log.read_text()[-1500:] for log in folder.glob(f"{OUT}/logs/**/*.log"))
        if done.returncode
        else ""
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\n{logs}"
    return done


@pytest.fixture(scope="module")
def folder(sft_path, tmp_path_factory) -> Iterator[Path]:
    """Where an experiment was run, and run again."""
    folder = tmp_path_factory.mktemp("experiment")
    write_data(folder)
    ppo = {"rollout_batch_size": 8, "total_episodes": 16, "num_mini_batches": 2}
    # no response of this model ends, and equal scores would stop PPO
    ppo["missing_eos_score"] = None
    options = {
        "output_dir": OUT,
        "initial_policy": sft_path,
        "pairs": {"data": ["p.jsonl"]},
        "prompts": ["p.jsonl"],
        "reward": {
            "options": {k: v for k, v in TRAINING.items() if k != "learning_rate"}
            | {"max_steps": 2}
        },
        "methods": {
            "dpo": {
                "program": "dpo",
                "sweep": {"beta": [0.1]},
                "options": TRAINING | {"max_steps": 3},
            },
            "ppo": {"program": "ppo", "sweep": {"kl_coef": [0.02]}, "options": TRAINING | ppo},
            "best_of_n": {"sweep": {"n": [2]}},
        },
        "seeds": [0],
        "checkpoints": 2,
        "gold": [{"rule": "length", "low": 2, "high": 6, "name": "truth"}],
        "perplexity": {"sft": ["i.jsonl"]},
        "n_prompts": 6,
        "test_fraction": 0.3,
        "max_prompt_length": 64,
        "max_response_length": 16,
        "batch_size": 16,
        "processes": 2,
        "launcher": "python",
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(options))
    try:
        rlhf(folder, "experiment", "run", "x.yaml")
        yield folder
    finally:  # none, unless it was cut off
        for process in programs_of(folder / OUT):
            process.kill()


def rows_of(folder: Path, name: str) -> list[dict]:
    return read_rows(folder / OUT / f"{name}.jsonl")[1]


def test_every_policy_is_measured_on_the_same_prompts(folder):
    prompts = (folder / OUT / "measures" / "foundation" / "prompts.json").read_text()
    assert len(json.loads(prompts)["prompts"]) == 6
    for place, files in POLICIES.items():
        done = json.loads((folder / OUT / place / "done.json").read_text())
        assert done["files"] == [f"{name}.jsonl" for name in files] and done["judge"] == "truth"
        assert (folder / OUT / place / "prompts.json").read_text() == prompts
        for name in files:
            rows = rows_of(folder, f"{place}/{name}")
            assert [(r["prompt"], r["sample"]) for r in rows] == [
                (p, s) for p in range(6) for s in range(2)
            ]
            assert {"truth", "proxy"} <= set(rows[0]["scores"])


def test_the_foundation_is_at_kl_0_and_training_has_moved_away_from_it(folder):
    initial = rows_of(folder, "measures/foundation/step-000000")
    # 2 samples of each prompt, and 2 blocks of 2 to choose from
    assert len(initial) == 6 * 6 and all(row["kl"] == 0 for row in initial)
    for place, files in list(POLICIES.items())[:2]:
        for name in files:
            rows = rows_of(folder, f"{place}/{name}")
            assert sum(row["kl"] for row in rows) / len(rows) > 0 and any(
                row["kl"] != 0 for row in rows
            ), (place, name)
    best = rows_of(folder, "measures/seed-0/foundation/best-of-000002")
    own = {(r["prompt"], r["response"]) for r in initial}
    assert {(r["prompt"], r["response"]) for r in best} <= own


def test_the_report_is_there(folder):
    report = json.loads((folder / OUT / "report" / "report.json").read_text())
    assert set(report["methods"]) == {"dpo", "ppo", "best_of_n"} and report["judge"] == "truth"
    assert report["meta"]["missing"] == report["meta"]["left_out"] == []
    assert "<html" in (folder / OUT / "report" / "report.html").read_text()[:200]
    rlhf(folder, "experiment", "report", OUT, "--output_dir", "again")
    assert json.loads((folder / "again" / "report.json").read_text())["points"] == report["points"]
    assert (folder / "again" / "report.md").read_text() == (
        folder / OUT / "report" / "report.md"
    ).read_text()


def test_nothing_is_done_twice(folder):
    done = rlhf(folder, "experiment", "run", "x.yaml")
    assert "7 of 7 jobs are done already" in done.stdout and "started" not in done.stdout


def test_runs_of_dpo_spend_their_budget_whether_they_compute_the_reference_or_find_it(
    sft_path, tmp_path
):
    data = [write_data(tmp_path)["pairs"]]
    total = 1.05e9
    config = ExperimentConfig(
        output_dir=str(tmp_path / "out"),
        initial_policy=sft_path,
        pairs={"data": data},
        prompts=data,
        gold=[{"rule": "length", "low": 2, "high": 6}],
        methods={
            "dpo": {
                "program": "dpo",
                "sweep": {"beta": [0.1, 0.5]},
                "options": TRAINING | {"per_device_train_batch_size": 2},
            }
        },
        seeds=[0],
        checkpoints=1,
        budget={"match": "flops", "total": total},
        max_prompt_length=64,
        max_response_length=16,
    )
    config.validate()
    door("dpo")(pilot(config, "dpo").arguments)
    steps = planned_lengths(config)["dpo"]

    spent = []
    for beta in (0.1, 0.5):
        run, _ = trial(config, "dpo", beta, 0, steps)
        door("dpo")(run.arguments)
        spent.append(run_cost(Path(run.run_folder))["flops"])
    cost = pilot_cost(Path(config.output_dir) / "pilot" / "dpo", "flops", 8)
    assert abs(spent[0] - total) < cost.step
    # the second run has found what the first one computed
    assert spent[1] == pytest.approx(spent[0], rel=1e-9)
    # the pilot was shorter than a pass, the runs longer than two
    assert steps > 2 * cost.steps > 2 * 8
