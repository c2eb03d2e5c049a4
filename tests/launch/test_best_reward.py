"""Reward models that stop early, keep the best model, learn from ties and leave length out, also
where the run was cut off.
"""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import EXIT_USER_ERROR
from rlhf.runs import checkpoint
from tests.launch.conftest import COLOURS, ITEMS, differences, door, flags_of, write_rows

OPTIONS = {
    "--per_device_train_batch_size": "4",
    "--max_steps": "14",
    "--learning_rate": "3e-2",
    "--validation_fraction": "0.3",
    "--eval_steps": "1",
    "--save_total_limit": "1",
    "--early_stopping_patience": "3",
    "--ties": "davidson",
    "--length_correction": "true",
    "--lora_dropout": "0.1",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sixty pairs, a third of them ties; the longer answer wins more often, and nothing else is to be
    learnt.
    """
    rng = random.Random(0)
    rows = []
    for n, (colour, item) in enumerate((c, i) for c in COLOURS for i in ITEMS):
        answers = [f"happy to help {rng.choice(ITEMS)}", f"no {rng.choice(COLOURS)} {n}"]
        if rng.random() < 0.3:
            answers.reverse()
        row = {"prompt": f"where is my {colour} {item}?"}
        row |= {"chosen": answers[0], "rejected": answers[1]}
        if n % 3 == 0:
            row |= {"label_prob": 0.5, "tie_prob": 1.0}
        rows.append(row)
    return write_rows(tmp_path_factory.mktemp("pairs") / "p.jsonl", rows)


def flags(runs, pairs, output, **more):
    options = OPTIONS | {f"--{name}": str(value) for name, value in more.items()}
    return [
        *flags_of("reward", runs / "sft", pairs, output),
        *(word for option in options.items() for word in option),
    ]


@pytest.fixture(scope="module")
def whole(runs, pairs, tmp_path_factory):
    """The run that was not cut off, and its result."""
    folder = tmp_path_factory.mktemp("whole") / "reward"
    door("reward")(flags(runs, pairs, folder))
    return folder, json.loads((folder / "result.json").read_text())


def test_it_stops_after_so_many_evaluations_without_a_lower_loss(whole):
    _, result = whole
    steps = [step for step, _ in result["held_out_losses"]]
    losses = [loss for _, loss in result["held_out_losses"]]
    best = losses.index(min(losses))
    assert steps == list(range(1, best + 1 + 3 + 1)) and steps[-1] < 14
    assert result["saved_step"] == steps[best]


def test_the_saved_model_is_the_best_and_rotation_has_kept_it(whole):
    folder, result = whole
    best, last = result["saved_step"], result["held_out_losses"][-1][0]
    kept = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{last}"}
    name = "adapter_model.safetensors"
    saved = load_file(folder / name)
    of_best = load_file(folder / "checkpoints" / f"checkpoint-{best}" / name)
    of_last = load_file(folder / "checkpoints" / f"checkpoint-{last}" / name)
    assert saved.keys() == of_best.keys() and len(saved) > 4
    assert all((saved[key] == of_best[key]).all() for key in saved)
    assert any((saved[key] != of_last[key]).any() for key in saved)
    # the report is of this model, and of the tie parameter that was learnt with it
    lowest = dict(map(tuple, result["held_out_losses"]))[best]
    assert result["headline"]["eval/reward/log_loss"] == pytest.approx(lowest, abs=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.1


def test_a_cut_off_run_stops_where_the_whole_one_did(runs, pairs, whole, tmp_path, monkeypatch):
    folder, result = whole
    count = len(result["held_out_losses"])
    # in the middle, while the best is waited for, and right after the checkpoint that ends it
    for number in {2, count - 1, count}:
        output = tmp_path / f"at-{number}"
        cut_after(monkeypatch, number, flags(runs, pairs, output))
        assert not (output / "result.json").exists()
        door("reward")(flags(runs, pairs, output))
        assert differences(folder, output) == [], f"after a crash at checkpoint {number}"
        ours = json.loads((output / "result.json").read_text())
        for name in ("saved_step", "held_out_losses", "normalisation"):
            assert ours[name] == result[name]


def cut_after(monkeypatch, number, arguments):
    """Run until so many checkpoints are sealed, and no further."""
    seals = 0

    class Crash(BaseException):
        pass

    def point(where):
        nonlocal seals
        seals += where == "sealed"
        if seals == number:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "crash_point", point)
        with pytest.raises(Crash):
            door("reward")(arguments)


def test_a_best_checkpoint_that_is_damaged_is_named(
    runs, pairs, whole, tmp_path, monkeypatch, capsys
):
    folder, result = whole
    output = tmp_path / "run"
    shutil.copytree(folder, output)
    (output / "result.json").unlink()
    best = output / "checkpoints" / f"checkpoint-{result['saved_step']}"
    (best / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        door("reward")(flags(runs, pairs, output))
    assert stop.value.code == EXIT_USER_ERROR
    assert f"the best model of the run is that of step {result['saved_step']}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"eval_steps": 0}, "'early_stopping_patience' needs evaluations on held-out pairs"),
        ({"validation_fraction": 0}, "no group is in validation"),
        (
            {"early_stopping_patience": 0, "load_best_model_at_end": "true", "eval_steps": 0},
            "'load_best_model_at_end' needs evaluations",
        ),
    ],
)
def test_nothing_to_tell_the_best_by_is_refused(more, words, runs, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        door("reward")(flags(runs, pairs, tmp_path / "run", **more))
    assert stop.value.code == EXIT_USER_ERROR and words in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ties_are_left_out_by_default_and_counted(runs, pairs, tmp_path, capsys):
    more = {"ties": "drop", "early_stopping_patience": 0, "max_steps": 1}
    door("reward")(flags(runs, pairs, tmp_path / "run", **more))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = [result["rows"][f"preference/{split}"] for split in ("train", "validation")]
    dropped = [sum(part["dropped"].values()) for part in rows]
    assert sum(dropped) > 10 and "a tie: as many votes" in capsys.readouterr().out
    assert all(part["used"] == part["read"] - n for part, n in zip(rows, dropped, strict=True))


def test_davidson_without_a_tie_is_refused(runs, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        door("reward")(flags(runs, files["pairs"], tmp_path / "run"))
    assert stop.value.code == EXIT_USER_ERROR
    assert "the training pairs hold no ties" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_stop_where_one_does_and_save_the_same_model(stage, runs, pairs, tmp_path):
    """Losses, tie parameter and the best step are those of the whole batch and of all pairs."""
    from tests.launch.test_ranks import ROOT, launch

    alone, both = tmp_path / "alone", tmp_path / "both"
    # each rank would drop other inputs
    door("reward")(flags(runs, pairs, alone, lora_dropout=0))
    more = {"lora_dropout": 0, "per_device_train_batch_size": 2, "deepspeed": stage}
    done = launch(ROOT / "launch" / "reward.py", flags(runs, pairs, both, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (alone, both))
    assert theirs["saved_step"] == ours["saved_step"] < ours["held_out_losses"][-1][0]
    for (step, loss), (other, value) in zip(
        ours["held_out_losses"], theirs["held_out_losses"], strict=True
    ):
        assert step == other and value == pytest.approx(loss, abs=1e-4)
    assert theirs["tie_parameter"] == pytest.approx(ours["tie_parameter"], abs=1e-4)
    for name, weight in load_file(alone / "adapter_model.safetensors").items():
        found = load_file(both / "adapter_model.safetensors")[name]
        assert torch.allclose(weight, found, atol=2e-3), name
