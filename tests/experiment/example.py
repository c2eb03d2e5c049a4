"""A small experiment: two methods, two strengths, two seeds, pairs that are given. No model is
loaded for it.
"""

import json
from pathlib import Path

import yaml

from rlhf.experiment.config import ExperimentConfig


def write_files(folder: Path) -> dict[str, str]:
    """What the experiment names: data, prompts, a foundation, a file of options for each program."""
    rows = [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    )
    (folder / "sft").mkdir(exist_ok=True)
    (folder / "sft" / "adapter_model.safetensors").write_bytes(b"weights")
    options = {
        "dpo": {"learning_rate": 1e-3, "max_steps": 40},
        "ppo": {"learning_rate": 1e-3, "rollout_batch_size": 16, "total_episodes": 320},
        "reward": {"num_train_epochs": 1},
        "voice": {"name": "kind", "use": {"words": ["kind"]}},
    }
    for name, values in options.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return {
        name: str(folder / name)
        for name in ("pairs.jsonl", "prompts.jsonl", "sft", *(f"{n}.yaml" for n in options))
    }


def options(folder: Path, **more) -> dict:
    """The options of the experiment, some of them replaced; None takes one away."""
    files = write_files(folder)
    values = {
        "output_dir": str(folder / "out"),
        "initial_policy": files["sft"],
        "pairs": {"data": [files["pairs.jsonl"]]},
        "prompts": [files["prompts.jsonl"]],
        "reward": {"config": files["reward.yaml"]},
        "gold": [{"voice": files["voice.yaml"]}],
        "methods": {
            "dpo": {"program": "dpo", "config": files["dpo.yaml"], "sweep": {"beta": [0.1, 0.5]}},
            "ppo": {
                "program": "ppo",
                "config": files["ppo.yaml"],
                "sweep": {"kl_coef": [0.02, 0.2]},
            },
            "best_of_n": {"sweep": {"n": [2, 4]}},
        },
        "seeds": [0, 1],
        "checkpoints": 2,
    } | more
    return {name: value for name, value in values.items() if value is not None}


def experiment(folder: Path, **more) -> ExperimentConfig:
    config = ExperimentConfig(**options(folder, **more))
    config.validate()
    return config


def method(program: str = "dpo", **more) -> dict:
    """One method; its strength is beta or kl_coef."""
    swept = {"beta": [0.1]} if program == "dpo" else {"kl_coef": [0.1]}
    return {"program": program, "sweep": swept} | more
