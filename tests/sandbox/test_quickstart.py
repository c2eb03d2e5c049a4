import json

import pytest

from rlhf.sandbox import quickstart as module
from rlhf.sandbox.quickstart import QuickstartConfig, fingerprint, steps


@pytest.fixture()
def pipeline(tmp_path, monkeypatch):
    """The pipeline with commands that only leave their files; returns (run, names of the steps that ran)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(module, "show_table", lambda report: None)
    ran = []

    def execute(step, log):
        ran.append(step.name)
        for name in step.leaves:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if step.name == "sample":
                assert not file.exists(), "votes on other responses would stay"
            file.write_text(step.name)
        return 1.0

    monkeypatch.setattr(module, "execute", execute)

    def run(**more):
        ran.clear()
        module.quickstart(QuickstartConfig(**more))
        return list(ran)

    return run


NAMES = ["sandbox", "sft", "sample", "annotate", "reward", "dpo", "ppo", "compare"]


def config(tmp_path, name, text):
    file = tmp_path / "configs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_second_run_does_nothing_and_says_so(pipeline, capsys):
    assert pipeline() == NAMES
    assert pipeline() == []
    assert "reused: sandbox, sft" in capsys.readouterr().out


def test_a_change_runs_its_step_and_those_after_it_again(pipeline, tmp_path):
    pipeline()
    config(tmp_path, "dpo.yaml", "beta: 0.2")
    assert pipeline() == ["dpo", "ppo", "compare"]


def test_another_sft_policy_or_other_annotators_get_a_fresh_store(pipeline, tmp_path):
    pipeline()
    config(tmp_path, "sft.yaml", "max_steps: 1")
    assert pipeline() == NAMES[1:]
    config(tmp_path, "annotate.yaml", "noise: 5")
    assert pipeline() == NAMES[2:]


def test_a_missing_result_is_made_again(pipeline, tmp_path):
    pipeline()
    (tmp_path / "runs/quickstart/ppo/result.json").unlink()
    assert pipeline() == ["ppo", "compare"]


def test_seed_and_folder_reach_every_step():
    todo = steps(QuickstartConfig(run="runs/other", seed=7))
    for step in todo[1:]:
        assert "7" in step.command and any("runs/other" in word for word in step.command), step.name
    assert len({fingerprint(step) for step in todo}) == len(todo)
    assert json.dumps(todo[6].command).count("preferences.db") == 1  # PPO learns on the prompts of DPO's pairs
