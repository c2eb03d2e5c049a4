"""launch/ppo.py on whole weights: what it writes, and that it goes on after a crash."""

import json

import pytest

from rlhf.errors import UserError
from rlhf.runs import checkpoint
from tests.launch.conftest import differences, door, flags_of


def flags(base_path, reward_path, files, output, *more):
    options = {
        "use_peft": "false", "reward": f"[{{model: {reward_path}}}]", "critic_trunk": "own",
        "total_episodes": 16, "rollout_batch_size": 8, "per_device_train_batch_size": 4,
        "num_ppo_epochs": 1, "learning_rate": 1e-3, "save_steps": 1, "save_total_limit": 1,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    return [*flags_of("ppo", base_path, files["pairs"], output), *given, *more]


class Crash(BaseException):
    """The process ends here; nothing catches it."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_on_whole_weights_runs_and_goes_on_after_a_crash(
    base_path, reward_path, files, tmp_path, monkeypatch, capsys, dtype
):
    given = (base_path, reward_path, files)
    door("ppo")(flags(*given, tmp_path / "whole", "--dtype", dtype))
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["steps"] == 2 and result["headline"]["eval/kl/sequence"] != 0
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/kl/sequence"] == 0.0
    assert "the critic learns weights of its own, from reward" in capsys.readouterr().out

    # the first checkpoint is written when the second one begins
    passed = []

    def point(where):
        passed.append(where)
        if passed.count("renamed") == 1 and len(passed) > passed.index("renamed") + 1:
            raise Crash(where)

    monkeypatch.setattr(checkpoint, "crash_point", point)
    with pytest.raises(Crash):
        door("ppo")(flags(*given, tmp_path / "cut", "--dtype", dtype))
    monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)
    capsys.readouterr()
    door("ppo")(flags(*given, tmp_path / "cut", "--dtype", dtype))
    assert "after step 1\n" in capsys.readouterr().out
    assert differences(tmp_path / "whole", tmp_path / "cut") == []

    # the run is a start as any whole model is
    door("ppo")(
        flags(tmp_path / "whole", *given[1:], tmp_path / "next", "--critic_trunk", "policy")
    )


def test_the_critic_starts_from_a_reward_model_of_whole_weights(
    base_path, whole_reward_path, files, tmp_path, capsys
):
    given = (base_path, whole_reward_path, files)
    door("ppo")(flags(*given, tmp_path / "run", "--critic_trunk", "auto"))
    said = capsys.readouterr().out
    assert "the critic learns weights of its own, from reward (critic_from)" in said
    assert (tmp_path / "run" / "value" / "model.safetensors").is_file()
    # beside adapters there is no model for it to be
    asked = ("--use_peft", "true", "--critic_from", "reward")
    with pytest.raises((SystemExit, UserError)):
        door("ppo")(flags(*given, tmp_path / "adapters", *asked))
    assert "Use --critic_from policy" in capsys.readouterr().err


def test_ppo_on_whole_weights_does_not_start_from_an_adapter(
    sft_path, reward_path, files, tmp_path, capsys
):
    with pytest.raises((SystemExit, UserError)):
        door("ppo")(flags(sft_path, reward_path, files, tmp_path))
    assert "is an adapter. Train its whole weights from a merged run" in capsys.readouterr().err
