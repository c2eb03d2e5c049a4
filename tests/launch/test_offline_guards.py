"""Guards of SFT, reward models and DPO in runs: a healthy one hears nothing, and one that diverges is
stopped, saved and written down.
"""

import json

import pytest

from tests.launch.conftest import door, flags_of

MORE = ["--per_device_train_batch_size", "4", "--lora_r", "4", "--learning_rate", "1e-2"]
DATA = {"sft": "instructions", "reward": "pairs", "dpo": "pairs"}


def start(name, model, files, folder, *more):
    door(name)([*flags_of(name, model, files[DATA[name]], folder), *MORE, *more])
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", DATA)
def test_a_healthy_run_hears_nothing(base_path, files, tmp_path, name):
    result = start(name, base_path, files, tmp_path / "run", "--max_steps", "12")
    assert result["guards"] == [] and "stopped" not in result


@pytest.mark.parametrize("name", DATA)
def test_a_run_that_diverges_is_stopped_saved_and_written_down(
    base_path, files, tmp_path, capsys, monkeypatch, name
):
    # the losses that the guards are told: three healthy ones, then five of a model that diverges
    monkeypatch.setattr(
        "rlhf.offline.callbacks.RunCallback._step_loss",
        lambda self, step: 1.0 if step <= 3 else 5.0,
    )
    flags = ("--max_steps", "20", "--save_steps", "2")
    with pytest.raises(SystemExit) as ended:
        start(name, base_path, files, tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert ended.value.code == 3
    assert f"{name}: stopped by guard divergence at step 8: loss/total of a step is 5" in said

    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["stopped"].startswith("guard divergence at step 8")
    assert [(e["guard"], e["action"], e["step"]) for e in result["guards"]] == [
        ("divergence", "stop", 8)
    ]
    # no checkpoint of the step that is at fault, and those from before
    assert {path.name for path in folder.glob("checkpoints/*")} >= {"checkpoint-4", "checkpoint-6"}
    assert not (folder / "checkpoints/checkpoint-8").exists()
    assert (folder / "adapter_model.safetensors").is_file()

    # the same command does not go on without being told to
    with pytest.raises(SystemExit) as again:
        start(name, base_path, files, folder, *flags)
    assert again.value.code == 3 and "holds a run that was stopped" in capsys.readouterr().out


def test_the_losses_of_steps_do_not_depend_on_when_they_are_logged(
    base_path, files, tmp_path, monkeypatch
):
    told: dict[str, list[float]] = {}

    def note(self, step, loss):
        told[self.name].append(loss)
        return []

    monkeypatch.setattr("rlhf.offline.guards.OfflineGuards.loss", note)
    for every in ("1", "3", "100"):
        monkeypatch.setattr("rlhf.offline.guards.OfflineGuards.name", every, raising=False)
        told[every] = []
        start(
            "sft", base_path, files, tmp_path / every, "--max_steps", "7", "--logging_steps", every
        )
    assert len(told["1"]) == 7
    assert told["3"] == pytest.approx(told["1"], abs=1e-5)
    assert told["100"] == pytest.approx(told["1"], abs=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "1/metrics.jsonl").read_text().splitlines()]
    logged = [row["loss/total"] for row in rows if "loss/total" in row]
    assert told["1"] == pytest.approx(logged, abs=1e-4)
