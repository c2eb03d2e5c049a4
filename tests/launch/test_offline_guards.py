"""Guards of SFT, reward models and DPO in runs: a healthy one hears nothing, and one that diverges is
stopped, saved and written down.
"""

import json

import pytest

from tests.launch.combinations import start as start_ranks
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_decide_alike_by_the_mean_of_their_losses(base_path, files, tmp_path):
    jobs = []
    for name in DATA:
        flags = [*flags_of(name, base_path, files[DATA[name]], tmp_path / name), *MORE]
        # the Trainer's sum of losses begins again when it is logged
        steps = ["--max_steps", "4", "--save_steps", "4", "--logging_steps", "100"]
        jobs.append((name, [*flags, *steps]))
    # all weights are moved by 1 in its first step
    flags = [*flags_of("sft", base_path, files["instructions"], tmp_path / "far"), *MORE]
    bound = "{divergence: {threshold: 1.01, window: 1}}"
    far = ["--learning_rate", "1", "--max_steps", "20", "--guards", bound]
    jobs.append(("sft", [*flags, *far]))
    seen = start_ranks(tmp_path, "runs", jobs, ranks=2)

    assert [run["code"] for run in seen] == [0, 0, 0, 3]
    for name in DATA:
        folder = tmp_path / name / "checkpoints/checkpoint-4"
        one, other = (json.loads((folder / f"memory-{rank}.json").read_text()) for rank in (0, 1))
        # each has rows of its own, and both have been told the same
        assert one["tr_loss"] != other["tr_loss"]
        told = one["guards"]["recent"]
        assert one["guards"] == other["guards"] and len(told) == 4
        assert sum(told) == pytest.approx((one["tr_loss"] + other["tr_loss"]) / 2, rel=1e-5)
    stopped = json.loads((tmp_path / "far/result.json").read_text())["stopped"]
    assert stopped.startswith("guard divergence at step ")
