"""SFT on conversations: what is said of them, and runs that go on as they began."""

import json

import pytest
import yaml

from rlhf.runs import checkpoint
from rlhf.runs.tracking import read_metrics
from tests.launch.conftest import COLOURS, differences, door, write_rows
from tests.launch.test_programs import launch

OPENING, REST = "thank you for your order", ("help is on its way", "today", "kind regards")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """48 dialogues with a service team, of one to four turns of the assistant each."""
    rows = []
    for number in range(48):
        messages = [{"role": "system", "content": "be happy to help"}]
        for turn in range(number % 4 + 1):
            asked = f"where is my {COLOURS[number % 6]} chair {number} {turn}?"
            said = REST[turn - 1] if turn else OPENING
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "split": "validation" if number < 8 else "train"})
    return write_rows(tmp_path_factory.mktemp("dialogues") / "d.jsonl", rows)


@pytest.fixture
def sft(base_path, tmp_path):
    def start(data, name, *more):
        flags = ["--model_name_or_path", base_path, "--data", data, "--output_dir"]
        limits = ["--max_prompt_length", "400", "--max_response_length", "20", "--eval_prompts"]
        steps = ["--logging_steps", "1", "--max_steps", "4", "--per_device_train_batch_size", "4"]
        door("sft")([*flags, str(tmp_path / name), *limits, "0", *steps, *more])
        return tmp_path / name

    return start


def learnt(folder):
    return json.loads((folder / "result.json").read_text())["learnt"]


def test_how_much_is_learnt_is_said_and_recorded(sft, dialogues, capsys):
    now, before = (
        learnt(sft(dialogues, "all")),
        learnt(sft(dialogues, "last", "--train_on", "last")),
    )
    said = capsys.readouterr().out
    # 40 rows of 1, 2, 3 and 4 turns in equal numbers
    assert (now["turns"], now["turns_read"], now["left_out"]) == (100, 100, {})
    assert (before["turns"], before["left_out"]) == (40, {"train_on is last": 60})
    assert now["tokens"] == before["tokens"] and now["tokens_learnt"] > before["tokens_learnt"]
    assert now["share"] == now["tokens_learnt"] / now["tokens"]
    for found in (now, before):
        line = f"of 100 assistant turns are learnt, {found['share']:.1%} of {found['tokens']} tok"
        assert f"sft: {found['turns']} {line}" in said
    assert "60 turns are not learnt (60: train_on is last)" in said


def test_what_is_cut_off_is_said(sft, dialogues, capsys):
    sft(dialogues, "cut", "--trl", "{max_length: 60}")
    said = capsys.readouterr().out
    assert (
        "WARNING: trl: max_length 60 cuts off" in said and "leaves 0 of 40 rows with none" in said
    )
    shorter = learnt(sft(dialogues, "shorter", "--max_prompt_length", "150"))
    (reason,) = shorter["left_out"]
    assert reason == "in the part of a conversation that is too long"
    assert shorter["turns"] + shorter["left_out"][reason] == 100 > shorter["turns"] > 40
    with pytest.raises(SystemExit):
        sft(dialogues, "none", "--trl", "{max_length: 8}")
    assert "no token is left to learn: raise max_length" in capsys.readouterr().err


def test_rows_of_one_turn_are_learnt_as_ever(sft, files):
    one, other = (sft(files["instructions"], on, "--train_on", on) for on in ("all", "last"))
    assert differences(one, other) == []


@pytest.mark.parametrize("trl", ["{}", "{packing: true, max_length: 300}"])
def test_a_run_on_conversations_that_was_cut_off_ends_as_one_that_was_not(
    sft, dialogues, monkeypatch, trl
):
    options = ("--save_steps", "1", "--logging_steps", "2", "--trl", trl)
    whole = sft(dialogues, "whole", *options)

    class Crash(BaseException):
        pass

    def crash(where):
        if where == "sealed":
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "crash_point", crash)
        sft(dialogues, "cut", *options)
    assert differences(whole, sft(dialogues, "cut", *options)) == []


def test_a_run_from_before_there_was_a_choice_goes_on_with_the_last_turns(
    sft, dialogues, tmp_path, capsys
):
    options = ("--lr_scheduler_type", "constant")
    whole = sft(dialogues, "whole", "--train_on", "last", *options)
    old = sft(dialogues, "old", "--train_on", "last", "--max_steps", "2", *options)
    for file in old.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(file.read_text())
        del manifest["about"]["options"]["train_on"], manifest["sha256"]
        file.write_text(json.dumps(manifest))
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["train_on"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))

    capsys.readouterr()
    sft(dialogues, "old", *options)
    assert "began before 'train_on' existed, and goes on with last" in capsys.readouterr().out
    assert yaml.safe_load((old / "config.yaml").read_text())["train_on"] == "last"
    assert (old / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


def test_what_is_learnt_is_fixed_for_a_run(sft, dialogues, capsys):
    sft(dialogues, "run")
    with pytest.raises(SystemExit):
        sft(dialogues, "run", "--train_on", "last", "--max_steps", "5")
    assert "train_on: was 'all', now 'last'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(sft, dialogues, tmp_path):
    alone = sft(dialogues, "alone")
    flags = ["--config", str(alone / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    done = launch(2, "sft", [*flags, "--per_device_train_batch_size", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "alone"))
    losses = []
    for rows in (ours, theirs):
        losses.append([row["loss/total"] for row in rows if "loss/total" in row])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ours[-1]["budget/tokens_trained"] == theirs[-1]["budget/tokens_trained"]
    assert learnt(tmp_path / "two") == learnt(alone)
