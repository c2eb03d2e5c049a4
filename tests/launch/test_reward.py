"""The reward program from end to end on a tiny base, as a user starts it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from reward.model import load_reward
from rlhf.data.encode import encode
from rlhf.data.load import load
from rlhf.data.records import Preference
from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = ROOT / "launch" / "reward.py"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """60 pairs that differ by courtesy: easy to tell apart."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"where is parcel {i}?",
            "chosen": f"parcel {i} is on its way. kind regards, the team",
            "rejected": f"parcel {i} is on its way",
            "label_prob": 0.9,
            "annotator": "ann" if i % 2 else "bob",
        }
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def options(start, data, output, **more):
    values = {
        "model_name_or_path": start,
        "data": data,
        "output_dir": str(output),
        "learning_rate": 0.01,
    }
    values |= {
        "num_train_epochs": 3,
        "max_prompt_length": 64,
        "max_response_length": 64,
        "validation_fraction": 0.3,
    }
    return [f"--{name}={value}" for name, value in (values | more).items()]


def check_run(folder: Path, data: str) -> dict:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "README.md",
        "card.md",
        "card.json",
        "reliability.png",
    ):
        assert (folder / name).is_file(), name
    result, card = (
        json.loads((folder / "result.json").read_text()),
        json.loads((folder / "card.json").read_text()),
    )
    assert result["finished"] and result["program"] == "reward"
    assert result["headline"]["eval/reward/accuracy"] == pytest.approx(card["accuracy"]["accuracy"])
    assert card["accuracy"]["accuracy"] > 0.9  # a cue as plain as this is learnt
    assert result["headline"]["eval/reward/groups"] == card["groups"] == card["pairs"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/reward/accuracy"] == pytest.approx(card["accuracy"]["accuracy"])

    # what is loaded from the folder is what was measured, with the held-out chosen responses at 0
    # on average
    reward = load_reward(str(folder), "cpu")
    held_out = load([data], Preference, split="validation", validation_fraction=0.3)
    rows, _ = encode(held_out, reward.tokenizer, 64, 64)
    chosen = reward.score_ids([row["prompt_ids"] + row["chosen_ids"] for row in rows])
    rejected = reward.score_ids([row["prompt_ids"] + row["rejected_ids"] for row in rows])
    assert len(rows) == card["pairs"] > 5
    assert sum(chosen) / len(chosen) == pytest.approx(0.0, abs=1e-5)
    right = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)) / len(rows)
    assert right == pytest.approx(card["accuracy"]["accuracy"])
    return json.loads((folder / "reward.json").read_text())


def test_adapter_from_sft_started_in_another_folder(sft_path, pairs, tmp_path):
    output = tmp_path / "runs" / "reward"
    command = [sys.executable, str(PROGRAM), *options(sft_path, pairs, output)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report card:" in done.stdout
    kept = check_run(output, pairs)
    identity = json.loads((output / "rlhf.json").read_text())
    assert kept["base_fingerprint"] == identity["base_fingerprint"]
    assert (output / "adapter_model.safetensors").is_file()


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the program replaces its first entry
    spec = importlib.util.spec_from_file_location("launch_reward", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "launch_reward", module)
    spec.loader.exec_module(module)
    return module


def test_whole_model(program, base_path, pairs, tmp_path):
    program.main(
        options(base_path, pairs, tmp_path / "whole", use_peft="false", learning_rate=0.003)
    )
    check_run(tmp_path / "whole", pairs)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"eval_scorers": "[{rule: length}]"}, "unknown option 'eval_scorers'"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"center_rewards_coefficient": -1}, "at least 0"),
        ({"centre_rewards_coefficient": 0.01}, "Did you mean 'center_rewards_coefficient'"),
    ],
)
def test_options_that_cannot_work_stop_at_once(program, more, words, tmp_path):
    from rlhf.config import parse

    with pytest.raises(UserError) as caught:
        parse(program.RewardRunConfig, options("base", "pairs.jsonl", tmp_path, **more))
    assert words in str(caught.value)


def test_the_shipped_configuration_parses(program):
    from rlhf.config import parse

    config = parse(program.RewardRunConfig, ["--config", str(ROOT / "configs" / "reward.yaml")])
    assert config.center_rewards_coefficient == 0.01
